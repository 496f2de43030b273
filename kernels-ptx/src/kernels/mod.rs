//! One file per kernel.

pub mod axpy;
pub mod fill;

/// Blocks of `threads` threads in x so that each of `count` elements has its own; `None` beyond the 2³¹ − 1 blocks that
/// every device takes.
fn one_thread_per_element(count: u64, threads: u32) -> Option<[u32; 3]> {
    let blocks = count.div_ceil(u64::from(threads));
    (blocks <= i32::MAX as u64).then_some([blocks as u32, 1, 1])
}

#[cfg(test)]
mod tests {
    use super::one_thread_per_element;

    #[test]
    fn the_grid_covers_every_element() {
        assert_eq!(one_thread_per_element(0, 256), Some([0, 1, 1]));
        assert_eq!(one_thread_per_element(1, 256), Some([1, 1, 1]));
        assert_eq!(one_thread_per_element(256, 256), Some([1, 1, 1]));
        assert_eq!(one_thread_per_element(257, 256), Some([2, 1, 1]));
        assert_eq!(one_thread_per_element(u64::MAX, 256), None);
    }
}
