//! The memory pool of one GPU: the bookkeeping alone, no driver.
//!
//! Memory is taken from the driver in *segments* and handed out in *blocks*. A block is cut from the smallest free one
//! that holds it; when it comes back, it is merged with free neighbours of its segment. Segments stay reserved until
//! [`Pool::trim`], or until the driver has no more memory. Asking the driver costs a synchronisation of the whole GPU, a
//! block from the pool costs two tree look-ups.
//!
//! Blocks of up to 1 MiB, of up to 10 MiB and larger ones live in separate segments: a small block that lives long would
//! otherwise keep a whole large segment from going back.

use std::collections::{BTreeMap, BTreeSet};

use crate::{MemoryUsage, Result};

/// Unit and alignment of every block, in bytes.
const UNIT: usize = 512;
/// The largest block that is cut from a small segment.
const SMALL_LIMIT: usize = 1 << 20;
/// Bytes of a small segment, and the unit of all others (the driver maps memory in pages of this size).
const SMALL_SEGMENT: usize = 2 << 20;
/// The largest block that is cut from a medium segment.
const MEDIUM_LIMIT: usize = 10 << 20;
/// Bytes of a medium segment.
const MEDIUM_SEGMENT: usize = 20 << 20;

/// Where segments come from.
pub(super) trait Source {
    /// The address of `bytes` new bytes; `None` when there are not so many.
    ///
    /// # Errors
    /// Any failure other than a lack of memory.
    fn reserve(&mut self, bytes: usize) -> Result<Option<u64>>;

    /// Waits until all work is done that may still use free memory.
    ///
    /// # Errors
    /// Those of that work.
    fn settle(&mut self) -> Result<()>;

    /// Gives a segment back.
    ///
    /// # Errors
    /// Any failure; the segment is still there then.
    fn release(&mut self, address: u64) -> Result<()>;
}

/// Segments, the blocks cut from them, and their counts.
#[derive(Default)]
pub(super) struct Pool {
    /// Every block by its address; blocks tile their segments.
    blocks: BTreeMap<u64, Block>,
    /// Free blocks of each class as (bytes, address).
    free: [BTreeSet<(usize, u64)>; 3],
    in_use: usize,
    peak: usize,
    reserved: usize,
}

#[derive(Clone, Copy)]
struct Block {
    bytes: usize,
    /// Address and bytes of the segment that the block is part of.
    segment: (u64, usize),
    class: Class,
    free: bool,
}

/// What sizes a segment serves.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    /// Up to 1 MiB.
    Small,
    /// Up to 10 MiB.
    Medium,
    /// Above; a new segment serves one block at first.
    Large,
}

impl Pool {
    /// The address of a block of at least `bytes` bytes, aligned to 512; `None` when there is no memory for it even after
    /// every unused segment went back to the source.
    ///
    /// # Errors
    /// Those of the source.
    pub(super) fn take(&mut self, bytes: usize, source: &mut impl Source) -> Result<Option<u64>> {
        // Nothing of a size near the whole address space exists: no memory, and no overflow below.
        if bytes > isize::MAX as usize {
            return Ok(None);
        }
        let bytes = bytes.max(1).next_multiple_of(UNIT);
        let (address, block) = match self.best_fit(bytes) {
            Some(found) => found,
            None => match self.grow(bytes, source)? {
                Some(found) => found,
                None => return Ok(None),
            },
        };
        self.cut(address, block, bytes);
        Ok(Some(address))
    }

    /// Takes a block back. Work that still uses it must come before any work of its next owner.
    pub(super) fn put_back(&mut self, address: u64) {
        let Some(mut block) = self.blocks.remove(&address) else { return };
        self.in_use -= block.bytes;
        let mut start = address;
        let next = address + block.bytes as u64;
        if let Some(&neighbour) = self.blocks.get(&next)
            && neighbour.free
            && neighbour.segment == block.segment
        {
            self.forget_free(next, neighbour);
            block.bytes += neighbour.bytes;
        }
        if let Some((&previous, &neighbour)) = self.blocks.range(..address).next_back()
            && neighbour.free
            && neighbour.segment == block.segment
        {
            self.forget_free(previous, neighbour);
            block.bytes += neighbour.bytes;
            start = previous;
        }
        self.remember_free(start, block);
    }

    /// Bytes of a block as [`Pool::usage`] counts them.
    pub(super) fn bytes_of(&self, address: u64) -> usize {
        self.blocks.get(&address).map_or(0, |block| block.bytes)
    }

    /// Gives every segment that no block uses back to the source.
    ///
    /// # Errors
    /// Those of the source.
    pub(super) fn trim(&mut self, source: &mut impl Source) -> Result<()> {
        let whole: Vec<(u64, Block)> = self
            .blocks
            .iter()
            .filter(|(_, block)| block.free && block.bytes == block.segment.1)
            .map(|(&address, &block)| (address, block))
            .collect();
        if whole.is_empty() {
            return Ok(());
        }
        source.settle()?;
        for (address, block) in whole {
            source.release(address)?;
            self.forget_free(address, block);
            self.reserved -= block.bytes;
        }
        Ok(())
    }

    pub(super) fn usage(&self) -> MemoryUsage {
        MemoryUsage { in_use: self.in_use, peak: self.peak, reserved: self.reserved }
    }

    /// Starts a new measurement of the peak.
    pub(super) fn reset_peak(&mut self) {
        self.peak = self.in_use;
    }

    fn best_fit(&mut self, bytes: usize) -> Option<(u64, Block)> {
        let &(found, address) = self.free[Class::of(bytes) as usize].range((bytes, 0)..).next()?;
        debug_assert!(found >= bytes);
        let block = *self.blocks.get(&address)?;
        self.forget_free(address, block);
        Some((address, block))
    }

    /// A new segment as one block that is not in the free lists.
    fn grow(&mut self, bytes: usize, source: &mut impl Source) -> Result<Option<(u64, Block)>> {
        let class = Class::of(bytes);
        let wanted = match class {
            Class::Small => SMALL_SEGMENT,
            Class::Medium => MEDIUM_SEGMENT,
            Class::Large => bytes.next_multiple_of(SMALL_SEGMENT),
        };
        let least = bytes.next_multiple_of(SMALL_SEGMENT);
        let mut reserved = source.reserve(wanted)?.map(|address| (address, wanted));
        if reserved.is_none() {
            self.trim(source)?;
            reserved = source.reserve(wanted)?.map(|address| (address, wanted));
        }
        if reserved.is_none() && least < wanted {
            reserved = source.reserve(least)?.map(|address| (address, least));
        }
        let Some(segment) = reserved else { return Ok(None) };
        self.reserved += segment.1;
        Ok(Some((segment.0, Block { bytes: segment.1, segment, class, free: true })))
    }

    /// Makes the first `bytes` bytes of a block used; the rest becomes a free block if it is worth keeping apart.
    fn cut(&mut self, address: u64, mut block: Block, bytes: usize) {
        let rest = block.bytes - bytes;
        let worth_keeping = if block.class == Class::Small { rest >= UNIT } else { rest > SMALL_LIMIT };
        if worth_keeping {
            self.remember_free(address + bytes as u64, Block { bytes: rest, ..block });
            block.bytes = bytes;
        }
        block.free = false;
        self.blocks.insert(address, block);
        self.in_use += block.bytes;
        self.peak = self.peak.max(self.in_use);
    }

    fn remember_free(&mut self, address: u64, mut block: Block) {
        block.free = true;
        self.free[block.class as usize].insert((block.bytes, address));
        self.blocks.insert(address, block);
    }

    fn forget_free(&mut self, address: u64, block: Block) {
        self.free[block.class as usize].remove(&(block.bytes, address));
        self.blocks.remove(&address);
    }
}

impl Class {
    /// The class that serves a block of this size.
    fn of(bytes: usize) -> Self {
        match bytes {
            0..=SMALL_LIMIT => Self::Small,
            _ if bytes <= MEDIUM_LIMIT => Self::Medium,
            _ => Self::Large,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Memory of a made-up device: segments at increasing addresses up to a limit.
    struct Machine {
        limit: usize,
        segments: BTreeMap<u64, usize>,
        next: u64,
        requests: usize,
    }

    impl Machine {
        fn of(limit: usize) -> Self {
            Self { limit, segments: BTreeMap::new(), next: 1 << 40, requests: 0 }
        }

        fn held(&self) -> usize {
            self.segments.values().sum()
        }
    }

    impl Source for Machine {
        fn reserve(&mut self, bytes: usize) -> Result<Option<u64>> {
            self.requests += 1;
            if self.held() + bytes > self.limit {
                return Ok(None);
            }
            let address = self.next;
            // Segments touch: merging must still stop at their borders.
            self.next += bytes as u64;
            self.segments.insert(address, bytes);
            Ok(Some(address))
        }

        fn settle(&mut self) -> Result<()> {
            Ok(())
        }

        fn release(&mut self, address: u64) -> Result<()> {
            assert!(self.segments.remove(&address).is_some(), "released twice or never reserved");
            Ok(())
        }
    }

    /// Blocks tile the segments, free neighbours are merged, and the counts are the sums.
    fn assert_consistent(pool: &Pool, machine: &Machine) {
        let mut in_use = 0;
        for (&segment, &bytes) in &machine.segments {
            let mut address = segment;
            let mut previous_free = false;
            while address < segment + bytes as u64 {
                let block = pool.blocks[&address];
                assert_eq!(block.segment, (segment, bytes));
                assert!(!(block.free && previous_free), "free neighbours were not merged");
                let listed = pool.free.iter().any(|list| list.contains(&(block.bytes, address)));
                assert_eq!(block.free, listed);
                in_use += if block.free { 0 } else { block.bytes };
                previous_free = block.free;
                address += block.bytes as u64;
            }
            assert_eq!(address, segment + bytes as u64);
        }
        assert_eq!(pool.usage().in_use, in_use);
        assert_eq!(pool.usage().reserved, machine.held());
        assert_eq!(
            pool.blocks.len(),
            pool.free.iter().map(BTreeSet::len).sum::<usize>() + used_blocks(pool),
            "a free list names a block that is not there"
        );
    }

    fn used_blocks(pool: &Pool) -> usize {
        pool.blocks.values().filter(|block| !block.free).count()
    }

    #[test]
    fn random_blocks_never_overlap_and_all_come_back() {
        let mut pool = Pool::default();
        let mut machine = Machine::of(1 << 30);
        let mut held: Vec<(u64, usize)> = Vec::new();
        let mut seed: u64 = 7;
        let mut random = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % below
        };
        for step in 0..20_000 {
            if random(2) == 0 || held.is_empty() {
                let largest = [4 << 10, 2 << 20, 64 << 20][random(3) as usize];
                let bytes = random(largest) as usize;
                let Some(address) = pool.take(bytes, &mut machine).unwrap() else { continue };
                assert_eq!(address % UNIT as u64, 0);
                for &(other, other_bytes) in &held {
                    let apart = address + bytes as u64 <= other || other + other_bytes as u64 <= address;
                    assert!(apart || bytes == 0 || other_bytes == 0, "blocks overlap");
                }
                held.push((address, bytes));
            } else {
                let (address, _) = held.swap_remove(random(held.len() as u64) as usize);
                pool.put_back(address);
            }
            if step % 500 == 0 {
                assert_consistent(&pool, &machine);
            }
        }
        let peak = pool.usage().peak;
        assert!(peak >= pool.usage().in_use && peak <= 1 << 30);
        for (address, _) in held {
            pool.put_back(address);
        }
        assert_consistent(&pool, &machine);
        pool.trim(&mut machine).unwrap();
        assert_eq!(machine.held(), 0);
        assert_eq!(pool.usage(), MemoryUsage { in_use: 0, peak, reserved: 0 });
    }

    #[test]
    fn the_same_sizes_again_reserve_nothing_new() {
        let mut pool = Pool::default();
        let mut machine = Machine::of(1 << 30);
        let sizes = [100, 3 << 20, 50 << 20, 700_000, 12_345_678];
        let mut requests = 0;
        for round in 0..100 {
            let addresses: Vec<u64> =
                sizes.iter().map(|&bytes| pool.take(bytes, &mut machine).unwrap().unwrap()).collect();
            for address in addresses {
                pool.put_back(address);
            }
            if round == 0 {
                requests = machine.requests;
            }
            assert_eq!(machine.requests, requests);
        }
    }

    #[test]
    fn unused_segments_are_given_up_before_memory_runs_out() {
        let mut pool = Pool::default();
        let mut machine = Machine::of(100 << 20);
        let first = pool.take(60 << 20, &mut machine).unwrap().unwrap();
        pool.put_back(first);
        // 60 MiB wait in the pool; 90 MiB fit only when they go back.
        let second = pool.take(90 << 20, &mut machine).unwrap().unwrap();
        assert_eq!(pool.usage().reserved, 90 << 20);
        // 8 MiB would come in a medium segment of 20 MiB; the last 10 MiB hold it alone.
        let third = pool.take(8 << 20, &mut machine).unwrap().unwrap();
        assert_eq!(pool.take(4 << 20, &mut machine).unwrap(), None);
        assert_consistent(&pool, &machine);
        for address in [second, third] {
            pool.put_back(address);
        }
        assert!(pool.take(100 << 20, &mut machine).unwrap().is_some());
    }

    #[test]
    fn a_small_block_does_not_keep_a_large_segment() {
        let mut pool = Pool::default();
        let mut machine = Machine::of(1 << 30);
        let large = pool.take(256 << 20, &mut machine).unwrap().unwrap();
        pool.put_back(large);
        let _small = pool.take(100, &mut machine).unwrap().unwrap();
        let _medium = pool.take(3 << 20, &mut machine).unwrap().unwrap();
        pool.trim(&mut machine).unwrap();
        assert_eq!(pool.usage().reserved, SMALL_SEGMENT + MEDIUM_SEGMENT);
    }

    #[test]
    fn absurd_sizes_are_no_memory_rather_than_an_overflow() {
        let mut pool = Pool::default();
        let mut machine = Machine::of(1 << 30);
        for bytes in [usize::MAX, usize::MAX / 2, 1 << 62] {
            assert_eq!(pool.take(bytes, &mut machine).unwrap(), None);
        }
        assert_eq!(pool.usage().reserved, 0);
    }

    #[test]
    fn a_block_of_nothing_has_an_address_of_its_own() {
        let mut pool = Pool::default();
        let mut machine = Machine::of(1 << 30);
        let first = pool.take(0, &mut machine).unwrap();
        assert_ne!(first, pool.take(0, &mut machine).unwrap());
    }
}
