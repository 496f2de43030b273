//! Loads, stores, atomic operations, asynchronous copies and matrix fragments: from registers to [`super::super::spaces`].

use super::super::decode::SHARED_WINDOW;
use super::super::program::{Address, AtomicOp, Element, NO_SLOT, Slot, Space};
use super::super::shadow::{LANES, Who};
use super::super::spaces::{Access, Checked, Moved, Places, Raised, each};
use super::super::warp::Copy;
use super::Execution;

impl Execution<'_, '_> {
    /// The places that an address names, one per lane.
    #[inline(always)]
    fn places(&self, address: Address) -> Places {
        let mut places = [0; LANES];
        if address.wide {
            let base = self.double(address.base);
            for lane in 0..LANES {
                places[lane] = base[lane].wrapping_add_signed(i64::from(address.offset));
            }
        } else {
            let base = self.word(address.base);
            for lane in 0..LANES {
                places[lane] = u64::from(base[lane].wrapping_add_signed(address.offset));
            }
        }
        places
    }

    /// The space of a generic address; addresses of shared memory become places there.
    fn resolve(&self, space: Space, lanes: u32, places: &mut Places) -> Checked<bool> {
        let shared = |place: u64| (SHARED_WINDOW..SHARED_WINDOW + (1 << 32)).contains(&place);
        match space {
            Space::Global => Ok(false),
            Space::Shared => Ok(true),
            Space::Generic => {
                let first = lanes.trailing_zeros() as usize & 31;
                let all = shared(places[first]);
                if let Some(lane) = each(lanes).find(|&lane| shared(places[lane]) != all) {
                    let problem = "the simulator does not know generic accesses of which some lanes go to shared memory and \
                                   some to global memory";
                    return Err(Raised::new(lane, problem.to_owned()));
                }
                if all {
                    places.iter_mut().for_each(|place| *place = place.wrapping_sub(SHARED_WINDOW));
                }
                Ok(all)
            }
        }
    }

    #[inline(always)]
    fn who(&self, atomic: bool) -> Who {
        Who::new(self.warp.at, self.warp.index, atomic)
    }

    #[inline(always)]
    pub(super) fn load(
        &mut self,
        lanes: u32,
        space: Space,
        element: Element,
        count: usize,
        (read_only, atomic): (bool, bool),
        address: Address,
        d: [Slot; 4],
    ) -> Checked<()> {
        let mut places = self.places(address);
        let shared =
            if space == Space::Generic { self.resolve(space, lanes, &mut places)? } else { space == Space::Shared };
        let access = Access { lanes, element: element.bytes(), count: count as u32, who: self.who(atomic), read_only };
        let mut moved: Moved = [[0; LANES]; 4];
        if shared {
            self.memory.shared.read(&self.memory.clock, access, &places, &mut moved)?;
        } else {
            self.memory.global.read(&self.memory.clock, access, &places, &mut moved)?;
            if atomic {
                self.memory.clock.read_atomic();
            }
        }
        if element == Element::B32 || element == Element::U8 || element == Element::U16 {
            for k in 0..count {
                self.put_word(d[k], lanes, &moved[k]);
            }
            return Ok(());
        }
        for k in 0..count {
            let mut double = [0u64; LANES];
            let mut word = [0u32; LANES];
            for lane in 0..LANES {
                let low = moved[k][lane];
                match element {
                    Element::S8 => word[lane] = i32::from(low as i8) as u32,
                    Element::S8To16 => word[lane] = u32::from(i16::from(low as i8) as u16),
                    Element::S16 => word[lane] = i32::from(low as i16) as u32,
                    Element::B64 => {
                        double[lane] = u64::from(moved[2 * k][lane]) | u64::from(moved[2 * k + 1][lane]) << 32;
                    }
                    Element::S8To64 => double[lane] = i64::from(low as i8) as u64,
                    Element::S16To64 => double[lane] = i64::from(low as i16) as u64,
                    Element::S32To64 => double[lane] = i64::from(low as i32) as u64,
                    _ => double[lane] = u64::from(low),
                }
            }
            if element.wide() {
                self.put_double(d[k], lanes, &double);
            } else {
                self.put_word(d[k], lanes, &word);
            }
        }
        Ok(())
    }

    #[inline(always)]
    pub(super) fn store(
        &mut self,
        lanes: u32,
        space: Space,
        element: Element,
        count: usize,
        atomic: bool,
        address: Address,
        a: [Slot; 4],
    ) -> Checked<()> {
        let mut places = self.places(address);
        let shared =
            if space == Space::Generic { self.resolve(space, lanes, &mut places)? } else { space == Space::Shared };
        let mut moved: Moved = [[0; LANES]; 4];
        for k in 0..count {
            if element == Element::B64 {
                let value = self.double(a[k]);
                for lane in 0..LANES {
                    moved[2 * k][lane] = value[lane] as u32;
                    moved[2 * k + 1][lane] = (value[lane] >> 32) as u32;
                }
            } else if element.wide() {
                let value = self.double(a[k]);
                for lane in 0..LANES {
                    moved[k][lane] = value[lane] as u32;
                }
            } else {
                moved[k] = *self.word(a[k]);
            }
        }
        let access =
            Access { lanes, element: element.bytes(), count: count as u32, who: self.who(atomic), read_only: false };
        if shared {
            self.memory.shared.write(&self.memory.clock, access, &places, &moved)
        } else {
            if atomic {
                self.memory.clock.write_atomic();
            }
            self.memory.global.write(&self.memory.clock, access, &places, &moved)
        }
    }

    /// One lane after the other, from the lowest: a GPU's order is not specified, but the simulator's is always this.
    #[inline(never)]
    pub(super) fn atomic(
        &mut self,
        lanes: u32,
        space: Space,
        op: AtomicOp,
        wide: bool,
        d: Slot,
        address: Address,
        (b, c): (Slot, Slot),
    ) -> Checked<()> {
        let mut places = self.places(address);
        let shared = self.resolve(space, lanes, &mut places)?;
        let access =
            Access { lanes, element: if wide { 8 } else { 4 }, count: 1, who: self.who(true), read_only: false };
        let mut old = [0; LANES];
        for lane in each(lanes) {
            let value = |slot: Slot| if wide { self.double(slot)[lane] } else { u64::from(self.word(slot)[lane]) };
            let (b, c) = (value(b), value(c));
            let change = |old: u64| changed(op, wide, old, b, c);
            let memory = &mut *self.memory;
            old[lane] = if shared {
                memory.shared.change(&memory.clock, access, &places, lane, change)?
            } else {
                memory.global.change(&mut memory.clock, access, &places, lane, change)?
            };
        }
        if d != NO_SLOT && wide {
            self.put_double(d, lanes, &old);
        } else if d != NO_SLOT {
            self.put_word(d, lanes, &old.map(|value| value as u32));
        }
        Ok(())
    }

    #[inline(always)]
    pub(super) fn copy_async(
        &mut self,
        lanes: u32,
        bytes: u8,
        target: Address,
        source: Address,
        source_bytes: Slot,
    ) -> Checked<()> {
        let bytes = u32::from(bytes);
        let targets = self.places(target);
        let sources = self.places(source);
        let mut whole = lanes;
        let mut partial = 0;
        if source_bytes != NO_SLOT {
            let wanted = self.word(source_bytes);
            for lane in 0..LANES {
                whole &= !(u32::from(wanted[lane] != bytes) << lane);
                partial |= u32::from(wanted[lane] != bytes && wanted[lane] != 0) << lane;
            }
        }
        let who = self.who(false);
        let mut moved: Moved = [[0; LANES]; 4];
        let access = Access { lanes: whole, element: 4, count: bytes / 4, who, read_only: false };
        if whole != 0 {
            self.memory.global.read(&self.memory.clock, access, &sources, &mut moved)?;
            if whole != lanes {
                for row in &mut moved {
                    for lane in 0..LANES {
                        row[lane] = if whole >> lane & 1 == 1 { row[lane] } else { 0 };
                    }
                }
            }
        }
        for lane in each(partial & lanes) {
            self.copy_part(lane, bytes, source_bytes, &sources, &mut moved)?;
        }
        let access = Access { lanes, ..access };
        self.memory.shared.begin_write(&self.memory.clock, access, &targets, &moved)?;
        let places = targets.map(|place| place as u32);
        self.warp.copies.push_back(Copy { who, lanes, bytes, places, groups: self.warp.groups });
        Ok(())
    }

    /// Reads the first bytes of a lane's source; the rest is zero.
    #[cold]
    fn copy_part(
        &mut self,
        lane: usize,
        bytes: u32,
        source_bytes: Slot,
        sources: &Places,
        moved: &mut Moved,
    ) -> Checked<()> {
        let wanted = self.word(source_bytes)[lane];
        if wanted > bytes {
            let problem = format!("cp.async of {bytes} bytes is told to read {wanted}");
            return Err(Raised::new(lane, problem));
        }
        if !sources[lane].is_multiple_of(u64::from(bytes)) {
            let problem = format!("cp.async of {bytes} bytes reads from address {:#x}: misaligned", sources[lane]);
            return Err(Raised::new(lane, problem));
        }
        for byte in 0..wanted {
            let access = Access { lanes: 1 << lane, element: 1, count: 1, who: self.who(false), read_only: false };
            let mut one: Moved = [[0; LANES]; 4];
            let places = sources.map(|source| source + u64::from(byte));
            self.memory.global.read(&self.memory.clock, access, &places, &mut one)?;
            moved[byte as usize / 4][lane] |= one[0][lane] << (8 * (byte % 4));
        }
        Ok(())
    }

    /// The lanes wait until at most `groups` of their groups of copies are under way.
    #[inline(always)]
    pub(super) fn wait_copies(&mut self, lanes: u32, groups: u32) {
        let closed = self.warp.groups;
        let memory = &mut *self.memory;
        for copy in &mut self.warp.copies {
            let mut done = 0;
            for lane in 0..LANES {
                // A lane's copy is done when its group, which is closed, is not among the last `groups` closed ones.
                let over = groups == u32::MAX || copy.groups[lane].saturating_add(groups) < closed[lane];
                done |= u32::from(over) << lane;
            }
            let done = done & lanes & copy.lanes;
            if done != 0 {
                memory.shared.finish(&memory.clock, copy.who, done, copy.bytes, &copy.places);
                copy.lanes &= !done;
            }
        }
        while self.warp.copies.front().is_some_and(|copy| copy.lanes == 0) {
            self.warp.copies.pop_front();
        }
    }

    /// Lanes 8 m to 8 m + 7 give the places of the rows of matrix m, 16 bytes each.
    #[inline(always)]
    pub(super) fn load_matrix(
        &mut self,
        lanes: u32,
        count: usize,
        transposed: bool,
        address: Address,
        d: [Slot; 4],
    ) -> Checked<()> {
        self.whole_warp(lanes, "ldmatrix")?;
        let places = self.places(address);
        let rows = u32::MAX >> (LANES - 8 * count);
        let access = Access { lanes: rows, element: 4, count: 4, who: self.who(false), read_only: false };
        let mut moved: Moved = [[0; LANES]; 4];
        self.memory.shared.read(&self.memory.clock, access, &places, &mut moved)?;
        for matrix in 0..count {
            let mut word = [0; LANES];
            for lane in 0..LANES {
                let (g, t) = (lane / 4, lane % 4);
                word[lane] = if transposed {
                    // Column g of rows 2 t and 2 t + 1.
                    let half = |row: usize| moved[g / 2][8 * matrix + row] >> (16 * (g % 2)) & 0xffff;
                    half(2 * t) | half(2 * t + 1) << 16
                } else {
                    moved[t][8 * matrix + g]
                };
            }
            self.put_word(d[matrix], lanes, &word);
        }
        Ok(())
    }

    #[inline(never)]
    pub(super) fn store_matrix(
        &mut self,
        lanes: u32,
        count: usize,
        transposed: bool,
        address: Address,
        a: [Slot; 4],
    ) -> Checked<()> {
        self.whole_warp(lanes, "stmatrix")?;
        let places = self.places(address);
        let rows = u32::MAX >> (LANES - 8 * count);
        let access = Access { lanes: rows, element: 4, count: 4, who: self.who(false), read_only: false };
        let mut moved: Moved = [[0; LANES]; 4];
        for matrix in 0..count {
            let word = self.word(a[matrix]);
            for lane in 0..LANES {
                let (g, t) = (lane / 4, lane % 4);
                if transposed {
                    for (half, row) in [2 * t, 2 * t + 1].into_iter().enumerate() {
                        moved[g / 2][8 * matrix + row] |= (word[lane] >> (16 * half) & 0xffff) << (16 * (g % 2));
                    }
                } else {
                    moved[t][8 * matrix + g] = word[lane];
                }
            }
        }
        self.memory.shared.write(&self.memory.clock, access, &places, &moved)
    }
}

/// What an atomic operation leaves in memory.
fn changed(op: AtomicOp, wide: bool, old: u64, b: u64, c: u64) -> u64 {
    let signed = |value: u64| if wide { value as i64 } else { i64::from(value as i32) };
    match op {
        AtomicOp::Add => old.wrapping_add(b),
        AtomicOp::MinU => old.min(b),
        AtomicOp::MaxU => old.max(b),
        AtomicOp::MinS => {
            if signed(old) <= signed(b) {
                old
            } else {
                b
            }
        }
        AtomicOp::MaxS => {
            if signed(old) >= signed(b) {
                old
            } else {
                b
            }
        }
        AtomicOp::And => old & b,
        AtomicOp::Or => old | b,
        AtomicOp::Xor => old ^ b,
        AtomicOp::Exchange => b,
        AtomicOp::CompareAndSwap => {
            if old == b {
                c
            } else {
                old
            }
        }
        AtomicOp::Increment => {
            if old >= b {
                0
            } else {
                old + 1
            }
        }
        AtomicOp::Decrement => {
            if old == 0 || old > b {
                b
            } else {
                old - 1
            }
        }
    }
}
