//! The CPU's memory pool.
//!
//! Large blocks that go back to the operating system cost a page fault per 4 KiB when they are asked for again. A
//! training step asks for the same sizes over and over, so freed blocks are kept, by size class, and handed out again.
//! What is in use and what is kept together exceed the most that was ever in use at once by an eighth at most: a process
//! needs hardly more memory with the pool than without it, and a step that repeats finds every block of the step before.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::{Error, MemoryUsage, Result};

/// Bytes of a cache line, the unit and alignment of every block.
const LINE: usize = 64;
/// Blocks below this size are left to the allocator, which is good at them.
const SMALLEST_CACHED: usize = 64 << 10;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; LINE]);

// SAFETY: `Line` is an array of bytes whose size (64) equals its alignment: no padding, every bit pattern is valid.
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: as above; the type is `Copy`, `'static` and has no interior mutability.
unsafe impl bytemuck::Pod for Line {}

/// Memory of the CPU: whole cache lines, initialised, returned to the pool when dropped.
pub(crate) struct HostBlock {
    lines: Vec<Line>,
    bytes: usize,
    pool: Arc<HostPool>,
}

impl HostBlock {
    pub(crate) fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.lines)[..self.bytes]
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.bytes]
    }
}

impl Drop for HostBlock {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        self.pool.put_back(lines);
    }
}

/// Counts and keeps the CPU's blocks.
#[derive(Default)]
pub(crate) struct HostPool {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    in_use: usize,
    peak: usize,
    /// The most that was in use at once since the pool was last trimmed; unlike `peak`, measurements leave it alone.
    most_in_use: usize,
    /// Free blocks by number of lines.
    free: BTreeMap<usize, Vec<Vec<Line>>>,
    free_bytes: usize,
}

impl HostPool {
    /// A block of at least `bytes` bytes whose contents are unspecified (but initialised).
    pub(crate) fn take(self: &Arc<Self>, bytes: usize) -> Result<HostBlock> {
        let class = size_class(bytes);
        let (reused, surplus) = {
            let mut state = self.lock();
            state.in_use += class * LINE;
            state.peak = state.peak.max(state.in_use);
            state.most_in_use = state.most_in_use.max(state.in_use);
            let found = state.free.get_mut(&class).and_then(Vec::pop);
            if found.is_some() {
                state.free_bytes -= class * LINE;
            }
            (found, state.take_surplus())
        };
        // Given back before a fresh block is asked for, and without holding the lock.
        drop(surplus);
        let lines = match reused {
            Some(lines) => lines,
            None => self.fresh(class, bytes)?,
        };
        Ok(HostBlock { lines, bytes, pool: Arc::clone(self) })
    }

    pub(crate) fn usage(&self) -> MemoryUsage {
        let state = self.lock();
        MemoryUsage { in_use: state.in_use, peak: state.peak, reserved: state.in_use + state.free_bytes }
    }

    /// Forgets the peak so far: it becomes what is in use now.
    pub(crate) fn reset_peak(&self) {
        let mut state = self.lock();
        state.peak = state.in_use;
    }

    /// Gives every free block back to the operating system.
    pub(crate) fn trim(&self) {
        let mut state = self.lock();
        state.free.clear();
        state.free_bytes = 0;
        state.most_in_use = state.in_use;
    }

    fn fresh(&self, class: usize, bytes: usize) -> Result<Vec<Line>> {
        let mut lines = Vec::new();
        if lines.try_reserve_exact(class).is_err() {
            let mut state = self.lock();
            state.in_use -= class * LINE;
            return Err(Error::OutOfMemory {
                device: "cpu".to_owned(),
                requested: bytes,
                in_use: state.in_use,
                peak: state.peak,
                advice: "a smaller batch or sequence needs less".to_owned(),
            });
        }
        advise_huge_pages(&lines);
        lines.resize(class, Line([0; LINE]));
        Ok(lines)
    }

    fn put_back(&self, lines: Vec<Line>) {
        let class = lines.len();
        let mut state = self.lock();
        state.in_use -= class * LINE;
        if class * LINE >= SMALLEST_CACHED {
            state.free_bytes += class * LINE;
            state.free.entry(class).or_default().push(lines);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The counters are plain numbers: a panic elsewhere cannot leave them half-written.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Takes free blocks out, the largest first, until what is in use and free is near what was once in use. Not
    /// exactly there, since then a few bytes more than in the step before would cost its largest block.
    fn take_surplus(&mut self) -> Vec<Vec<Line>> {
        let mut surplus = Vec::new();
        while self.in_use + self.free_bytes > self.most_in_use + self.most_in_use / 8 {
            let Some(mut largest) = self.free.last_entry() else { break };
            match largest.get_mut().pop() {
                Some(lines) => {
                    self.free_bytes -= lines.len() * LINE;
                    surplus.push(lines);
                }
                None => drop(largest.remove()),
            }
        }
        surplus
    }
}

/// Asks for huge pages under a block whose memory nothing has touched yet: a pass over weights then misses the address
/// cache 512 times less often, and first use faults as much less. A hint: where it is refused nothing changes.
#[cfg(target_os = "linux")]
fn advise_huge_pages(lines: &Vec<Line>) {
    const HUGE_PAGE: usize = 2 << 20;
    let start = (lines.as_ptr() as usize).next_multiple_of(HUGE_PAGE);
    let end = (lines.as_ptr() as usize + lines.capacity() * LINE) / HUGE_PAGE * HUGE_PAGE;
    if end > start {
        // SAFETY: start..end lies inside the vector's own allocation (start is not below its first byte, end not above
        // its last), and MADV_HUGEPAGE changes neither the contents nor the validity of memory, only the size of the
        // pages behind it.
        unsafe {
            libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE);
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn advise_huge_pages(_: &Vec<Line>) {}

/// Number of lines of the class that holds `bytes`: at most an eighth larger than asked for.
fn size_class(bytes: usize) -> usize {
    let lines = bytes.div_ceil(LINE);
    if lines * LINE < SMALLEST_CACHED {
        return lines;
    }
    let step = (lines.next_power_of_two() / 16).max(1);
    lines.div_ceil(step) * step
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_freed_block_is_handed_out_again_and_counted() {
        let pool = Arc::new(HostPool::default());
        let block = pool.take(1 << 20).unwrap();
        assert_eq!(block.bytes().len(), 1 << 20);
        let address = block.bytes().as_ptr();
        let other = pool.take(1 << 20).unwrap();
        drop(block);
        assert_eq!(pool.usage().in_use, 1 << 20);
        assert_eq!(pool.usage().peak, 2 << 20);
        let again = pool.take(1 << 20).unwrap();
        assert_eq!(again.bytes().as_ptr(), address);
        drop((other, again));
        pool.trim();
        assert_eq!(pool.usage(), MemoryUsage { in_use: 0, peak: 2 << 20, reserved: 0 });
    }

    #[test]
    fn what_is_kept_and_used_stays_near_what_was_once_used() {
        const MIB: usize = 1 << 20;
        let pool = Arc::new(HostPool::default());
        let step = || {
            let blocks: Vec<HostBlock> = [4 * MIB, 2 * MIB, MIB, MIB].map(|bytes| pool.take(bytes).unwrap()).into();
            blocks.iter().map(|block| block.bytes().as_ptr() as usize).collect::<std::collections::BTreeSet<_>>()
        };
        let first = step();
        assert_eq!(pool.usage().reserved, 8 * MIB);
        pool.reset_peak();
        assert_eq!(step(), first, "a step that repeats gets the same blocks");
        let little = pool.take(MIB / 2).unwrap();
        assert_eq!(step(), first, "a little more costs no block");
        drop(little);
        pool.trim();
        drop(step());
        let other = pool.take(6 * MIB).unwrap();
        assert_eq!(pool.usage(), MemoryUsage { in_use: 6 * MIB, peak: 8 * MIB + MIB / 2, reserved: 8 * MIB });
        let more = pool.take(6 * MIB).unwrap();
        assert!(pool.usage().reserved <= 12 * MIB + 12 * MIB / 8, "{:?}", pool.usage());
        drop((other, more));
        assert!(pool.usage().reserved <= 12 * MIB + 12 * MIB / 8, "{:?}", pool.usage());
    }

    #[test]
    fn a_size_class_wastes_at_most_an_eighth() {
        for bytes in [0, 1, 63, 64, 65, 65_535, 65_536, 65_537, 1_000_003, 123_456_789] {
            let class = size_class(bytes) * LINE;
            assert!(class >= bytes && class <= bytes + bytes / 8 + LINE, "{bytes} became {class}");
        }
    }

    #[test]
    fn an_impossible_request_is_an_error_that_names_sizes() {
        let pool = Arc::new(HostPool::default());
        let message = pool.take(usize::MAX / 4).err().unwrap().to_string();
        assert!(message.contains("out of memory on cpu") && message.contains("0 bytes are in use"), "{message}");
        assert_eq!(pool.usage().in_use, 0);
    }
}
