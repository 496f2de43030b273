//! Global and shared memory as a running kernel reaches them: every access is checked, then done.

use super::memory::{Elsewhere, GlobalMemory, Written};
use super::program::{Program, SharedPlace};
use super::shadow::{Clock, LANES, Shadow, Trouble, Who};

/// Offsets or addresses, one per lane.
pub(super) type Places = [u64; LANES];
/// Up to 16 bytes per lane: element `k` of lane `l` at `[k][l]`, elements of 64 bits in two (the lower half first).
pub(super) type Moved = [[u32; LANES]; 4];

/// A fault of a lane.
pub(super) struct Raised {
    pub lane: usize,
    /// What is wrong; it ends with the place of `other` if there is one.
    pub problem: String,
    pub other: Option<OtherThread>,
}

impl Raised {
    /// A fault that no other thread has part in.
    pub fn new(lane: usize, problem: String) -> Box<Self> {
        Box::new(Self { lane, problem, other: None })
    }
}

pub(super) type Checked<T> = Result<T, Box<Raised>>;

/// What one access of a warp is.
#[derive(Clone, Copy)]
pub(super) struct Access {
    /// Lanes that take part.
    pub lanes: u32,
    /// Bytes of an element: 1, 2, 4 or 8.
    pub element: u32,
    pub count: u32,
    pub who: Who,
    /// Whether the text promises that nobody writes the memory while the kernel runs.
    pub read_only: bool,
}

impl Access {
    fn bytes(&self) -> u32 {
        self.element * self.count
    }
}

/// All memory of a launch.
pub(super) struct Memory<'r> {
    pub global: Global<'r>,
    pub shared: Shared,
    pub clock: Clock,
}

/// The allocations that a launch was given.
pub(super) struct Global<'r> {
    memory: Option<&'r GlobalMemory>,
    /// In the order of their addresses.
    allocations: Vec<Allocation<'r>>,
    /// Granules are `1 << granule` bytes.
    granule: u32,
    /// The allocation that was used last.
    last: usize,
}

/// An allocation that a launch was given.
pub(super) struct Allocation<'r> {
    /// The parameter that points to it.
    pub name: String,
    pub address: u64,
    pub bytes: u64,
    pub contents: AllocationContents<'r>,
    pub shadow: Shadow,
}

pub(super) enum AllocationContents<'r> {
    /// To be read only.
    Read(&'r [u8], &'r Written),
    Write(&'r mut [u8], &'r mut Written),
}

impl AllocationContents<'_> {
    fn data(&self) -> &[u8] {
        match self {
            Self::Read(data, _) => data,
            Self::Write(data, _) => data,
        }
    }

    fn written(&self) -> &Written {
        match self {
            Self::Read(_, written) => written,
            Self::Write(_, written) => written,
        }
    }
}

impl<'r> Global<'r> {
    /// Memory that consists of these allocations; `memory` knows the others.
    pub fn new(program: &Program, memory: Option<&'r GlobalMemory>, mut allocations: Vec<Allocation<'r>>) -> Self {
        let granule = program.global_granule.trailing_zeros();
        allocations.sort_by_key(|allocation| allocation.address);
        for allocation in &mut allocations {
            if let AllocationContents::Write(data, _) = &allocation.contents {
                allocation.shadow.resize(data.len().div_ceil(1 << granule));
            }
        }
        Self { memory, allocations, granule, last: 0 }
    }

    /// The allocations, when the launch is over.
    pub fn into_allocations(self) -> Vec<Allocation<'r>> {
        self.allocations
    }

    /// The allocation that an address lies in or near.
    #[inline(always)]
    fn find(&mut self, address: u64) -> Option<usize> {
        // Allocations are 4 GiB apart at least.
        let holds = |allocation: &Allocation<'_>| {
            address.wrapping_sub(allocation.address) <= allocation.bytes.max(u64::from(u32::MAX))
        };
        if self.allocations.get(self.last).is_some_and(holds) {
            return Some(self.last);
        }
        let found = self.allocations.partition_point(|allocation| allocation.address <= address).checked_sub(1);
        let found = found.filter(|&found| holds(&self.allocations[found]));
        self.last = found.unwrap_or(self.last);
        found
    }

    /// Reads as `access` says.
    #[inline(always)]
    pub fn read(&mut self, clock: &Clock, access: Access, places: &Places, moved: &mut Moved) -> Checked<()> {
        let mut rest = access.lanes;
        while rest != 0 {
            let lane = rest.trailing_zeros() as usize;
            let (index, offsets, lanes) = self.group(access, rest, lane, places, false)?;
            rest &= !lanes;
            let granule = self.granule;
            let allocation = &mut self.allocations[index];
            let bytes = access.bytes();
            if let Written::Some(bits) = allocation.contents.written() {
                check_written(bits, access, lanes, &offsets, places, allocation)?;
            }
            if let AllocationContents::Write(..) = allocation.contents {
                for lane in each(lanes) {
                    let first = (offsets[lane] >> granule) as usize;
                    let last = ((offsets[lane] + u64::from(bytes) - 1) >> granule) as usize;
                    if let Some(trouble) = allocation.shadow.read::<true>(clock, first, last, access.who, lane) {
                        let place = describe(allocation, offsets[lane], bytes);
                        return Err(raise(lane, format!("reads {place}"), trouble));
                    }
                    if access.read_only && (first..=last).any(|at| allocation.shadow.written_since(clock, at)) {
                        let place = describe(allocation, offsets[lane], bytes);
                        let problem =
                            format!("reads {place} as memory that nobody writes (.nc), but this kernel has written it");
                        return Err(Raised::new(lane, problem));
                    }
                }
            }
            let data = allocation.contents.data();
            if lanes == access.lanes {
                fetch(data, access, &offsets, moved);
            } else {
                // `fetch` gives every lane something; only these lanes read this allocation.
                let mut own: Moved = [[0; LANES]; 4];
                fetch(data, access, &offsets, &mut own);
                for (moved, own) in moved.iter_mut().zip(own) {
                    each(lanes).for_each(|lane| moved[lane] = own[lane]);
                }
            }
        }
        Ok(())
    }

    /// Writes as `access` says.
    #[inline(always)]
    pub fn write(&mut self, clock: &Clock, access: Access, places: &Places, moved: &Moved) -> Checked<()> {
        let mut rest = access.lanes;
        while rest != 0 {
            let lane = rest.trailing_zeros() as usize;
            let (index, offsets, lanes) = self.group(access, rest, lane, places, true)?;
            rest &= !lanes;
            let granule = self.granule;
            let allocation = &mut self.allocations[index];
            let bytes = access.bytes();
            let AllocationContents::Write(data, written) = &mut allocation.contents else { continue };
            for lane in each(lanes) {
                let offset = offsets[lane] as usize;
                let first = offset >> granule;
                let last = (offset + bytes as usize - 1) >> granule;
                for at in first..=last {
                    let same = || holds(data, offset, access, lane, moved);
                    if let Some(trouble) = allocation.shadow.write::<true>(clock, at, access.who, lane, same) {
                        let place = describe(allocation, offsets[lane], bytes);
                        return Err(raise(lane, format!("writes {place}"), trouble));
                    }
                }
                put(data, offset, access, lane, moved);
                if let Written::Some(bits) = &mut **written {
                    bits[offset / 64] |= mask_of(bytes) << (offset % 64);
                }
            }
        }
        Ok(())
    }

    /// An atomic operation of one lane: `change` makes the new value from the old one.
    pub fn change(
        &mut self,
        clock: &mut Clock,
        access: Access,
        places: &Places,
        lane: usize,
        change: impl FnOnce(u64) -> u64,
    ) -> Checked<u64> {
        let (index, offsets, _) = self.group(access, 1 << lane, lane, places, true)?;
        let granule = self.granule;
        let allocation = &mut self.allocations[index];
        let bytes = access.bytes();
        if let Written::Some(bits) = allocation.contents.written() {
            check_written(bits, access, 1 << lane, &offsets, places, allocation)?;
        }
        clock.read_atomic();
        clock.write_atomic();
        let offset = offsets[lane] as usize;
        for at in offset >> granule..=(offset + bytes as usize - 1) >> granule {
            if let Some(trouble) = allocation.shadow.write::<true>(clock, at, access.who, lane, || false) {
                let place = describe(allocation, offsets[lane], bytes);
                return Err(raise(lane, format!("changes {place}"), trouble));
            }
        }
        let AllocationContents::Write(data, _) = &mut allocation.contents else { return Ok(0) };
        Ok(change_value(&mut data[offset..offset + bytes as usize], change))
    }

    /// The allocation of lane `first`, the offsets in it, and which of the `lanes` have a valid place there; `first` is
    /// one of them. Other lanes' offsets are that of `first`.
    #[inline(always)]
    fn group(
        &mut self,
        access: Access,
        lanes: u32,
        first: usize,
        places: &Places,
        writes: bool,
    ) -> Checked<(usize, Places, u32)> {
        let size = u64::from(access.bytes());
        let Some(index) = self.find(places[first]) else { return Err(self.outside(access, first, places, writes)) };
        let allocation = &self.allocations[index];
        let mut offsets = [0; LANES];
        let mut sign = 0;
        let mut low = 0;
        let limit = allocation.bytes.wrapping_sub(size);
        let start = places[first].wrapping_sub(allocation.address);
        for lane in 0..LANES {
            let offset = places[lane].wrapping_sub(allocation.address);
            let offset = if lanes >> lane & 1 == 1 { offset } else { start };
            offsets[lane] = offset;
            sign |= offset | limit.wrapping_sub(offset);
            low |= offset;
        }
        let read_only = writes && matches!(allocation.contents, AllocationContents::Read(..));
        let valid = sign >> 63 == 0 && allocation.bytes >= size && low & (size - 1) == 0;
        if valid && !read_only {
            return Ok((index, offsets, lanes));
        }
        self.sort_out(access, lanes, first, places, writes, index)
    }

    /// What [`Global::group`] does where not all lanes are valid places of one allocation.
    #[cold]
    fn sort_out(
        &mut self,
        access: Access,
        lanes: u32,
        first: usize,
        places: &Places,
        writes: bool,
        index: usize,
    ) -> Checked<(usize, Places, u32)> {
        let allocation = &self.allocations[index];
        let size = u64::from(access.bytes());
        let valid = |lane: usize| {
            let offset = places[lane].wrapping_sub(allocation.address);
            offset.checked_add(size).is_some_and(|end| end <= allocation.bytes) && offset.is_multiple_of(size)
        };
        if !valid(first) || writes && matches!(allocation.contents, AllocationContents::Read(..)) {
            return Err(self.outside(access, first, places, writes));
        }
        let valid_lanes = each(lanes).filter(|&lane| valid(lane)).fold(0, |lanes, lane| lanes | 1 << lane);
        let start = places[first].wrapping_sub(allocation.address);
        let offsets = std::array::from_fn(|lane| {
            if valid_lanes >> lane & 1 == 1 { places[lane].wrapping_sub(allocation.address) } else { start }
        });
        Ok((index, offsets, valid_lanes))
    }

    /// The fault of a lane whose place is not valid.
    #[cold]
    fn outside(&mut self, access: Access, lane: usize, places: &Places, writes: bool) -> Box<Raised> {
        let address = places[lane];
        let bytes = access.bytes();
        let does = if writes { "writes" } else { "reads" };
        let problem = match self.find(address) {
            Some(index) => {
                let allocation = &self.allocations[index];
                let offset = address - allocation.address;
                let (name, length) = (&allocation.name, allocation.bytes);
                if offset.checked_add(u64::from(bytes)).is_none_or(|end| end > length) {
                    format!("{does} {bytes} bytes at byte {offset} of {name}, which has {length} bytes: out of bounds")
                } else if !offset.is_multiple_of(u64::from(bytes)) {
                    let wanted = if access.count > 1 { " (all elements of a vector together)" } else { "" };
                    format!(
                        "{does} {bytes} bytes at byte {offset} of {name}: misaligned, the place must be a multiple of \
                         {bytes}{wanted}"
                    )
                } else {
                    format!("writes to {name}, which the kernel declares as memory that it only reads")
                }
            }
            None => match self.memory.map_or(Elsewhere::Nothing, |memory| memory.at(address)) {
                Elsewhere::Live { bytes: length, offset } if offset < length as u64 => format!(
                    "{does} {bytes} bytes at address {address:#x}: byte {offset} of a buffer of {length} bytes that this \
                     launch was not given"
                ),
                Elsewhere::Live { bytes: length, offset } => format!(
                    "{does} {bytes} bytes at address {address:#x}: {offset} bytes behind the beginning of a buffer of \
                     {length} bytes that this launch was not given"
                ),
                Elsewhere::Freed { bytes: length, offset } => format!(
                    "{does} {bytes} bytes at address {address:#x}: byte {offset} of a buffer of {length} bytes that was freed"
                ),
                Elsewhere::Nothing => {
                    let before = self
                        .allocations
                        .iter()
                        .find(|allocation| allocation.address.wrapping_sub(address) <= u64::from(u32::MAX));
                    match before {
                        Some(allocation) => format!(
                            "{does} {bytes} bytes {} bytes before the beginning of {}: out of bounds",
                            allocation.address - address,
                            allocation.name
                        ),
                        None => format!("{does} {bytes} bytes at address {address:#x}, where there is no memory"),
                    }
                }
            },
        };
        Raised::new(lane, problem)
    }
}

/// A block's shared memory.
#[derive(Default)]
pub(super) struct Shared {
    data: Vec<u8>,
    /// First and end offsets of the arrays, and their names. The dynamic array comes first.
    arrays: Vec<(u64, u64, String)>,
    shadow: Shadow,
    granule: u32,
}

impl Shared {
    /// Makes room for the arrays of a program, the dynamic one of so many bytes.
    pub fn prepare(&mut self, program: &Program, dynamic_bytes: u32, forget: bool) {
        self.granule = program.shared_granule.trailing_zeros();
        let ranges = |place: &SharedPlace| {
            let bytes = place.bytes.unwrap_or(dynamic_bytes);
            (u64::from(place.offset), u64::from(place.offset) + u64::from(bytes), place.name.clone())
        };
        let (dynamic, fixed): (Vec<_>, Vec<_>) = program.shared.iter().partition(|place| place.bytes.is_none());
        self.arrays = dynamic.into_iter().chain(fixed).map(ranges).collect();
        let end = self.arrays.iter().map(|&(_, end, _)| end).max().unwrap_or(0) as usize;
        // Addresses are those of the text; what lies before the first array is never used.
        if self.data.len() < end {
            self.data.resize(end, 0);
        }
        if forget {
            self.shadow.clear();
        }
        self.shadow.resize(end.div_ceil(1 << self.granule));
    }

    #[inline(always)]
    fn check(&self, access: Access, lane: usize, places: &Places, does: &str) -> Checked<usize> {
        let size = u64::from(access.bytes());
        let at = places[lane];
        let inside = |&(start, end, _): &(u64, u64, String)| at >= start && at.wrapping_add(size) <= end && at < end;
        if at.is_multiple_of(size) && self.arrays.iter().any(inside) {
            return Ok(at as usize);
        }
        Err(self.outside(access, lane, places, does))
    }

    /// Whether all places are valid and in the first array.
    #[inline(always)]
    fn all_valid(&self, access: Access, places: &Places) -> bool {
        let Some(&(start, end, _)) = self.arrays.first() else { return false };
        let size = u64::from(access.bytes());
        let (mut sign, mut low) = (0, 0);
        let limit = end.wrapping_sub(size);
        for lane in 0..LANES {
            let place = if access.lanes >> lane & 1 == 1 { places[lane] } else { start };
            sign |= place.wrapping_sub(start) | limit.wrapping_sub(place);
            low |= place;
        }
        sign >> 63 == 0 && low & (size - 1) == 0 && end - start >= size
    }

    #[cold]
    fn outside(&self, access: Access, lane: usize, places: &Places, does: &str) -> Box<Raised> {
        let at = places[lane];
        let bytes = access.bytes();
        let within = self.arrays.iter().find(|&&(start, end, _)| at >= start && at < end);
        let problem = match within {
            Some((start, end, name)) if at + u64::from(bytes) > *end => format!(
                "{does} {bytes} bytes at byte {} of the shared array {name}, which has {} bytes: out of bounds",
                at - start,
                end - start
            ),
            Some((start, _, name)) => format!(
                "{does} {bytes} bytes at byte {} of the shared array {name}: misaligned, the place must be a multiple of {bytes}",
                at - start
            ),
            None => {
                let before = self.arrays.iter().filter(|&&(start, _, _)| start <= at).max_by_key(|&&(start, ..)| start);
                match before {
                    Some((start, end, name)) => format!(
                        "{does} {bytes} bytes at byte {} of the shared array {name}, which has {} bytes: out of bounds",
                        at - start,
                        end - start
                    ),
                    None => format!("{does} {bytes} bytes at shared address {at:#x}, where there is no array"),
                }
            }
        };
        Raised::new(lane, problem)
    }

    fn describe(&self, at: u64, bytes: u32) -> String {
        match self.arrays.iter().find(|&&(start, end, _)| at >= start && at < end) {
            Some((start, _, name)) => format!("{bytes} bytes at byte {} of the shared array {name}", at - start),
            None => format!("{bytes} bytes of shared memory"),
        }
    }

    /// Granules of a place.
    #[inline(always)]
    fn granules(&self, at: usize, bytes: u32) -> std::ops::RangeInclusive<usize> {
        at >> self.granule..=(at + bytes as usize - 1) >> self.granule
    }

    /// Reads as `access` says.
    #[inline(always)]
    pub fn read(&mut self, clock: &Clock, access: Access, places: &Places, moved: &mut Moved) -> Checked<()> {
        let bytes = access.bytes();
        if !self.all_valid(access, places) {
            for lane in each(access.lanes) {
                self.check(access, lane, places, "reads")?;
            }
        }
        let mut before = u64::MAX;
        for lane in each(access.lanes) {
            let (first, last) = self.granules(places[lane] as usize, bytes).into_inner();
            // Neighbouring lanes often read the same place.
            if places[lane] == before {
                self.shadow.read_again(first, last, access.who);
                continue;
            }
            before = places[lane];
            if let Some(trouble) = self.shadow.read::<false>(clock, first, last, access.who, lane) {
                let place = self.describe(places[lane], bytes);
                return Err(raise(lane, format!("reads {place}"), trouble));
            }
        }
        let first = places[access.lanes.trailing_zeros() as usize & 31];
        let offsets = std::array::from_fn(|lane| if access.lanes >> lane & 1 == 1 { places[lane] } else { first });
        fetch(&self.data, access, &offsets, moved);
        Ok(())
    }

    /// Writes as `access` says.
    #[inline(always)]
    pub fn write(&mut self, clock: &Clock, access: Access, places: &Places, moved: &Moved) -> Checked<()> {
        let bytes = access.bytes();
        if !self.all_valid(access, places) {
            for lane in each(access.lanes) {
                self.check(access, lane, places, "writes")?;
            }
        }
        for lane in each(access.lanes) {
            let offset = places[lane] as usize;
            for at in self.granules(offset, bytes) {
                let same = || holds(&self.data, offset, access, lane, moved);
                if let Some(trouble) = self.shadow.write::<false>(clock, at, access.who, lane, same) {
                    let place = self.describe(places[lane], bytes);
                    return Err(raise(lane, format!("writes {place}"), trouble));
                }
            }
            put(&mut self.data, offset, access, lane, moved);
        }
        Ok(())
    }

    /// Begins to write as `access` says; [`Shared::finish`] ends it.
    #[inline(always)]
    pub fn begin_write(&mut self, clock: &Clock, access: Access, places: &Places, moved: &Moved) -> Checked<()> {
        let bytes = access.bytes();
        for lane in each(access.lanes) {
            let offset = self.check(access, lane, places, "copies to")?;
            for at in self.granules(offset, bytes) {
                if let Some(trouble) = self.shadow.begin(clock, at, access.who, lane) {
                    let place = self.describe(places[lane], bytes);
                    return Err(raise(lane, format!("copies to {place}"), trouble));
                }
            }
            put(&mut self.data, offset, access, lane, moved);
        }
        Ok(())
    }

    /// Ends what [`Shared::begin_write`] began in these lanes.
    #[inline(always)]
    pub fn finish(&mut self, clock: &Clock, who: Who, lanes: u32, bytes: u32, places: &[u32; LANES]) {
        for lane in each(lanes) {
            for at in self.granules(places[lane] as usize, bytes) {
                self.shadow.finish(clock, at, who, lane);
            }
        }
    }

    /// An atomic operation of one lane: `change` makes the new value from the old one.
    pub fn change(
        &mut self,
        clock: &Clock,
        access: Access,
        places: &Places,
        lane: usize,
        change: impl FnOnce(u64) -> u64,
    ) -> Checked<u64> {
        let offset = self.check(access, lane, places, "changes")?;
        let bytes = access.bytes();
        for at in self.granules(offset, bytes) {
            let trouble = self.shadow.read::<false>(clock, at, at, access.who, lane);
            let trouble = trouble.or_else(|| self.shadow.write::<false>(clock, at, access.who, lane, || false));
            if let Some(trouble) = trouble {
                let place = self.describe(places[lane], bytes);
                return Err(raise(lane, format!("changes {place}"), trouble));
            }
        }
        Ok(change_value(&mut self.data[offset..offset + bytes as usize], change))
    }
}

/// Lanes of a set, the lowest first.
#[inline(always)]
pub(super) fn each(lanes: u32) -> impl Iterator<Item = usize> {
    let mut rest = lanes;
    std::iter::from_fn(move || {
        let lane = rest.trailing_zeros() as usize;
        (rest != 0).then(|| rest &= rest - 1).map(|()| lane)
    })
}

/// Bits for so many bytes.
#[inline(always)]
fn mask_of(bytes: u32) -> u64 {
    (1 << bytes) - 1
}

fn check_written(
    bits: &[u64],
    access: Access,
    lanes: u32,
    offsets: &Places,
    places: &Places,
    allocation: &Allocation<'_>,
) -> Checked<()> {
    let bytes = access.bytes();
    for lane in each(lanes) {
        let offset = offsets[lane] as usize;
        let wanted = mask_of(bytes) << (offset % 64);
        if bits[offset / 64] & wanted != wanted {
            debug_assert_eq!(places[lane] - allocation.address, offsets[lane]);
            let place = describe(allocation, offsets[lane], bytes);
            return Err(raise(lane, format!("reads {place}"), Trouble::Unwritten));
        }
    }
    Ok(())
}

#[cold]
fn describe(allocation: &Allocation<'_>, offset: u64, bytes: u32) -> String {
    format!("{bytes} bytes at byte {offset} of {}", allocation.name)
}

/// The fault for what the records tell.
#[cold]
fn raise(lane: usize, does: String, trouble: Trouble) -> Box<Raised> {
    let (problem, other) = match trouble {
        Trouble::Unwritten => (format!("{does}, which nothing has written"), None),
        Trouble::Pending(who) => (
            format!("{does} before anything waited for the cp.async that fills it, begun by "),
            Some(OtherThread { who, phase: None }),
        ),
        Trouble::Race { other, phase, wrote, other_block } => (
            format!(
                "{does}: a race, {} the {} by ",
                if other_block {
                    "since blocks of one launch run in any order, with"
                } else {
                    "there is no barrier between this and"
                },
                if wrote { "write" } else { "read" },
            ),
            Some(OtherThread { who: other, phase: other_block.then_some(phase) }),
        ),
    };
    Box::new(Raised { lane, problem, other })
}

/// The other thread of a fault.
pub(super) struct OtherThread {
    pub who: Who,
    /// Of a thread of another block, the phase of its access.
    pub phase: Option<u32>,
}

/// The elements at the offsets, which are valid for all lanes.
#[inline(always)]
fn fetch(data: &[u8], access: Access, offsets: &Places, moved: &mut Moved) {
    match (access.element, access.count) {
        (4, 1) => {
            let start = offsets[0];
            let mut apart = 0;
            for lane in 0..LANES {
                apart |= offsets[lane] ^ start.wrapping_add(4 * lane as u64);
            }
            match data.get(start as usize..start as usize + 4 * LANES) {
                Some(row) if apart == 0 => {
                    for (value, bytes) in moved[0].iter_mut().zip(row.as_chunks::<4>().0) {
                        *value = u32::from_le_bytes(*bytes);
                    }
                }
                _ => {
                    for lane in 0..LANES {
                        moved[0][lane] = word(data, offsets[lane] as usize);
                    }
                }
            }
        }
        (1, count) => {
            for lane in 0..LANES {
                for k in 0..count as usize {
                    moved[k][lane] = u32::from(data[offsets[lane] as usize + k]);
                }
            }
        }
        (2, count) => {
            for lane in 0..LANES {
                for k in 0..count as usize {
                    let at = offsets[lane] as usize + 2 * k;
                    moved[k][lane] = u32::from(data[at]) | u32::from(data[at + 1]) << 8;
                }
            }
        }
        (element, count) => {
            // Elements of 64 bits are two words.
            let words = (element / 4 * count) as usize;
            for lane in 0..LANES {
                let at = offsets[lane] as usize;
                let bytes = &data[at..at + 4 * words];
                for (k, value) in bytes.as_chunks::<4>().0.iter().enumerate() {
                    moved[k][lane] = u32::from_le_bytes(*value);
                }
            }
        }
    }
}

#[inline(always)]
fn word(data: &[u8], at: usize) -> u32 {
    data[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

/// Stores one lane's elements.
#[inline(always)]
fn put(data: &mut [u8], at: usize, access: Access, lane: usize, moved: &Moved) {
    match (access.element, access.count) {
        (4, 1) => {
            if let Some(place) = data.get_mut(at..at + 4) {
                place.copy_from_slice(&moved[0][lane].to_le_bytes());
            }
        }
        (1, count) => {
            for k in 0..count as usize {
                data[at + k] = moved[k][lane] as u8;
            }
        }
        (2, count) => {
            for k in 0..count as usize {
                data[at + 2 * k..at + 2 * k + 2].copy_from_slice(&(moved[k][lane] as u16).to_le_bytes());
            }
        }
        (element, count) => {
            let words = (element / 4 * count) as usize;
            let place = &mut data[at..at + 4 * words];
            for (k, bytes) in place.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                *bytes = moved[k][lane].to_le_bytes();
            }
        }
    }
}

/// Whether a place holds what a lane is about to store.
#[cold]
fn holds(data: &[u8], at: usize, access: Access, lane: usize, moved: &Moved) -> bool {
    let bytes = access.bytes() as usize;
    let mut stored = [0; 16];
    put(&mut stored, 0, access, lane, moved);
    data[at..at + bytes] == stored[..bytes]
}

fn change_value(place: &mut [u8], change: impl FnOnce(u64) -> u64) -> u64 {
    let mut bytes = [0; 8];
    bytes[..place.len()].copy_from_slice(place);
    let old = u64::from_le_bytes(bytes);
    place.copy_from_slice(&change(old).to_le_bytes()[..place.len()]);
    old
}
