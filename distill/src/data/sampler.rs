//! The order of training rows, as a function of one integer.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Shuffles rows anew in every epoch. Which row is the `n`-th depends on seed, number of rows and `n` alone, so a run
/// continues exactly from the number of rows it has seen.
#[derive(Debug)]
pub struct Sampler {
    seed: u64,
    rows: u64,
    epoch: u64,
    order: Vec<u64>,
}

impl Sampler {
    /// An order of `rows` rows (at least one).
    pub fn new(seed: u64, rows: u64) -> Self {
        Self { seed, rows, epoch: 0, order: permutation(seed, 0, rows) }
    }

    /// The row that is the `position`-th to be seen, counted from 0.
    pub fn row(&mut self, position: u64) -> u64 {
        let epoch = position / self.rows;
        if epoch != self.epoch {
            self.epoch = epoch;
            self.order = permutation(self.seed, epoch, self.rows);
        }
        self.order[(position % self.rows) as usize]
    }
}

/// Fisher and Yates, with a generator whose numbers are specified: the order is the same on every machine for ever.
fn permutation(seed: u64, epoch: u64, rows: u64) -> Vec<u64> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(epoch);
    let mut order: Vec<u64> = (0..rows).collect();
    for last in (1..order.len()).rev() {
        let other = (u128::from(random.next_u64()) * (last as u128 + 1)) >> 64;
        order.swap(last, other as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_is_another_permutation() {
        let mut sampler = Sampler::new(1, 50);
        let mut epoch = |number: u64| -> Vec<u64> { (0..50).map(|index| sampler.row(number * 50 + index)).collect() };
        let (first, second) = (epoch(0), epoch(1));
        assert_ne!(first, second);
        assert_eq!(first, epoch(0));
        for mut order in [first.clone(), second] {
            order.sort_unstable();
            assert_eq!(order, (0..50).collect::<Vec<_>>());
        }
        assert_ne!(first, (0..50).map(|index| Sampler::new(2, 50).row(index)).collect::<Vec<_>>());
    }

    #[test]
    fn the_order_is_the_same_from_any_starting_point() {
        let mut whole = Sampler::new(9, 7);
        let expected: Vec<u64> = (0..40).map(|position| whole.row(position)).collect();
        for start in [0, 6, 7, 23] {
            let mut resumed = Sampler::new(9, 7);
            assert_eq!(
                (start..40).map(|position| resumed.row(position)).collect::<Vec<_>>(),
                expected[start as usize..]
            );
        }
    }

    #[test]
    fn every_place_is_equally_likely() {
        let mut counts = [0u32; 5];
        for seed in 0..5000 {
            counts[Sampler::new(seed, 5).row(0) as usize] += 1;
        }
        // Five standard deviations of a binomial count with mean 1000.
        assert!(counts.iter().all(|count| count.abs_diff(1000) < 142), "{counts:?}");
    }
}
