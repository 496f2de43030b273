//! The simulated device's global memory: what buffers hold, and where it lies in the address space.
//!
//! Every allocation has its own stretch of the 64-bit address space, at least 4 GiB away from the next, and no address is
//! ever used twice. An access outside of an allocation, or to one that is freed, therefore never hits another by
//! accident: the address alone tells what was meant.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::host::{HostBlock, HostPool};
use crate::{Error, MemoryUsage, Result};

/// Where the first allocation lies.
const FIRST_ADDRESS: u64 = 0x0100_0000_0000;
/// Allocations begin at multiples of this, so that the upper half of an address tells the allocation.
const SLOT: u64 = 1 << 32;
/// Freed allocations that are remembered for messages.
const REMEMBERED: usize = 1 << 16;

/// All of the simulated device's memory.
#[derive(Default)]
pub(crate) struct GlobalMemory {
    pool: Arc<HostPool>,
    addresses: Mutex<Addresses>,
}

#[derive(Default)]
struct Addresses {
    next: u64,
    /// Lengths in bytes of the allocations that are there, by address.
    live: BTreeMap<u64, usize>,
    /// Lengths of those that were freed.
    freed: BTreeMap<u64, usize>,
}

/// What lies at an address that a kernel was not given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Elsewhere {
    /// Neither an allocation nor what was one.
    Nothing,
    /// An allocation that is there, so many bytes long, with the address so many bytes after its beginning.
    Live { bytes: usize, offset: u64 },
    /// An allocation that was freed.
    Freed { bytes: usize, offset: u64 },
}

impl GlobalMemory {
    /// An allocation whose bytes nothing has written.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] when the host has no such block.
    pub(crate) fn allocate(self: &Arc<Self>, bytes: usize) -> Result<Block> {
        let mut data = self.pool.take(bytes).map_err(|error| match error {
            Error::OutOfMemory { requested, in_use, peak, advice, .. } => {
                Error::OutOfMemory { device: "sim".to_owned(), requested, in_use, peak, advice }
            }
            error => error,
        })?;
        // NaN in every floating-point type: what a kernel forgets to write does not pass for a number on the host.
        data.bytes_mut().fill(0xff);
        let address = {
            let mut addresses = self.addresses();
            let address = FIRST_ADDRESS + addresses.next;
            addresses.next += (bytes as u64 + 1).next_multiple_of(SLOT) + SLOT;
            addresses.live.insert(address, bytes);
            address
        };
        let contents = Contents { data, written: Written::nothing(bytes) };
        Ok(Block { memory: Arc::clone(self), address, bytes, contents: RwLock::new(contents) })
    }

    pub(crate) fn usage(&self) -> MemoryUsage {
        self.pool.usage()
    }

    pub(crate) fn reset_peak(&self) {
        self.pool.reset_peak();
    }

    pub(crate) fn trim(&self) {
        self.pool.trim();
    }

    /// What lies at an address.
    pub(super) fn at(&self, address: u64) -> Elsewhere {
        let addresses = self.addresses();
        let before = |allocations: &BTreeMap<u64, usize>| {
            let (&start, &bytes) = allocations.range(..=address).next_back()?;
            Some((bytes, address - start)).filter(|_| address - start < (bytes as u64).next_multiple_of(SLOT).max(SLOT))
        };
        match (before(&addresses.live), before(&addresses.freed)) {
            (Some((bytes, offset)), _) => Elsewhere::Live { bytes, offset },
            (None, Some((bytes, offset))) => Elsewhere::Freed { bytes, offset },
            (None, None) => Elsewhere::Nothing,
        }
    }

    fn addresses(&self) -> MutexGuard<'_, Addresses> {
        // Maps of plain numbers: a panic elsewhere cannot leave them half-written.
        self.addresses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One allocation. It returns to the pool when dropped; its addresses are not used again.
pub(crate) struct Block {
    memory: Arc<GlobalMemory>,
    address: u64,
    bytes: usize,
    contents: RwLock<Contents>,
}

/// What an allocation holds.
pub(crate) struct Contents {
    pub(super) data: HostBlock,
    pub(super) written: Written,
}

impl Block {
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }

    /// The contents. Whoever holds a buffer's unique borrow writes it, so this never waits long.
    pub(super) fn read(&self) -> RwLockReadGuard<'_, Contents> {
        self.contents.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The contents, to be changed.
    pub(super) fn write(&self) -> RwLockWriteGuard<'_, Contents> {
        self.contents.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Overwrites the allocation with `source`, which is as long.
    pub(crate) fn copy_from_host(&mut self, source: &[u8]) {
        let mut contents = self.write();
        contents.data.bytes_mut().copy_from_slice(source);
        contents.written = Written::All;
    }

    /// Copies the allocation to `target`, which is as long. Bytes that nothing has written are 0xff.
    pub(crate) fn copy_to_host(&self, target: &mut [u8]) {
        target.copy_from_slice(self.read().data.bytes());
    }

    /// Overwrites the allocation with another one of the same length. Bytes that nothing has written stay so.
    pub(crate) fn copy_from(&mut self, source: &Self) {
        let source = source.read();
        let mut contents = self.write();
        contents.data.bytes_mut().copy_from_slice(source.data.bytes());
        contents.written = source.written.clone();
    }

    /// Sets every byte to zero.
    pub(crate) fn set_zero(&mut self) {
        let mut contents = self.write();
        contents.data.bytes_mut().fill(0);
        contents.written = Written::All;
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let mut addresses = self.memory.addresses();
        if let Some(bytes) = addresses.live.remove(&self.address) {
            addresses.freed.insert(self.address, bytes);
            if addresses.freed.len() > REMEMBERED {
                addresses.freed.pop_first();
            }
        }
    }
}

/// Which bytes of an allocation were ever written.
#[derive(Clone)]
pub(super) enum Written {
    /// Every byte.
    All,
    /// Those whose bit is set: bit `i mod 64` of word `i / 64` for byte `i`. Bits beyond the last byte are set.
    Some(Vec<u64>),
}

impl Written {
    /// No byte of `bytes`.
    fn nothing(bytes: usize) -> Self {
        if bytes == 0 {
            return Self::All;
        }
        let mut bits = vec![0; bytes.div_ceil(64)];
        if let Some(last) = bits.last_mut()
            && !bytes.is_multiple_of(64)
        {
            *last = u64::MAX << (bytes % 64);
        }
        Self::Some(bits)
    }

    /// Those bytes that are marked.
    pub(super) fn these(marked: &[bool]) -> Self {
        let mut written = Self::nothing(marked.len());
        if let Self::Some(bits) = &mut written {
            for (byte, &marked) in marked.iter().enumerate() {
                bits[byte / 64] |= u64::from(marked) << (byte % 64);
            }
        }
        written.settle();
        written
    }

    /// Whether a byte was written.
    pub(super) fn has(&self, byte: usize) -> bool {
        match self {
            Self::All => true,
            Self::Some(bits) => bits[byte / 64] >> (byte % 64) & 1 == 1,
        }
    }

    /// Forgets the bits when all are set: reads are faster then.
    pub(super) fn settle(&mut self) {
        if let Self::Some(bits) = self
            && bits.iter().all(|&word| word == u64::MAX)
        {
            *self = Self::All;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allocations_are_far_apart_and_addresses_tell_what_was_meant() {
        let memory = Arc::new(GlobalMemory::default());
        let (a, b) = (memory.allocate(100).unwrap(), memory.allocate(5 << 30 >> 20).unwrap());
        assert!(b.address() - a.address() >= 2 * SLOT);
        assert_eq!(memory.at(a.address() + 99), Elsewhere::Live { bytes: 100, offset: 99 });
        assert_eq!(memory.at(a.address() + 1000), Elsewhere::Live { bytes: 100, offset: 1000 });
        assert_eq!(memory.at(12), Elsewhere::Nothing);
        assert_eq!(memory.at(a.address() - 1), Elsewhere::Nothing);
        let address = a.address();
        drop(a);
        assert_eq!(memory.at(address + 4), Elsewhere::Freed { bytes: 100, offset: 4 });
        assert_ne!(memory.allocate(100).unwrap().address(), address);
        assert_eq!(memory.usage().in_use, (5usize << 30 >> 20).next_multiple_of(64));
    }

    #[test]
    fn what_was_written_is_known_to_the_byte() {
        let mut written = Written::nothing(70);
        let Written::Some(bits) = &mut written else { panic!("nothing is written") };
        assert_eq!(bits.as_slice(), [0, u64::MAX << 6]);
        bits.fill(u64::MAX);
        written.settle();
        assert!(matches!(written, Written::All));
    }

    #[test]
    fn fresh_memory_is_not_a_number() {
        let memory = Arc::new(GlobalMemory::default());
        let mut block = memory.allocate(4).unwrap();
        let mut bytes = [0; 4];
        block.copy_to_host(&mut bytes);
        assert!(f32::from_le_bytes(bytes).is_nan());
        let mut copy = memory.allocate(4).unwrap();
        copy.copy_from(&block);
        assert!(matches!(copy.read().written, Written::Some(_)));
        block.set_zero();
        copy.copy_from(&block);
        assert!(matches!(copy.read().written, Written::All));
    }
}
