//! Who touched memory last: what finds races, and reads of shared memory that nothing wrote.
//!
//! Time is counted in phases. Everything that orders threads (a barrier, the beginning of a block) begins a new phase.
//! Each warp knows, for every warp of its block, the phase up to which that warp's accesses come before its own
//! ([`Clock`]). An access is recorded with its phase and who made it; a later access is ordered behind it if its warp
//! knows that phase to be over. Records are never cleared: those of earlier blocks and launches have earlier phases.

/// Lanes of a warp.
pub(super) const LANES: usize = 32;
/// Warps of the largest block.
pub(super) const WARPS: usize = 32;

/// The phase of bytes that an asynchronous copy still fills.
const PENDING: u32 = u32::MAX;
/// Phases after which records are cleared and counting starts again.
const LAST_PHASE: u32 = 1 << 31;

/// Who made an access, in the bits of a number: lane (5), warp (5), whether several lanes did, whether it was atomic, and
/// the instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Who(u32);

const SEVERAL: u32 = 1 << 10;
const ATOMIC: u32 = 1 << 11;
const THREAD: u32 = (1 << 10) - 1;

impl Who {
    /// Lane 0 of the warp, at an instruction.
    pub fn new(instruction: usize, warp: usize, atomic: bool) -> Self {
        Self((instruction as u32) << 12 | if atomic { ATOMIC } else { 0 } | (warp as u32) << 5)
    }

    fn of_lane(self, lane: usize) -> Self {
        Self(self.0 | lane as u32)
    }

    pub fn instruction(self) -> usize {
        (self.0 >> 12) as usize
    }

    pub fn warp(self) -> usize {
        (self.0 >> 5) as usize % WARPS
    }

    pub fn lane(self) -> usize {
        self.0 as usize % LANES
    }

    fn atomic(self) -> bool {
        self.0 & ATOMIC != 0
    }

    fn same_thread(self, other: Self) -> bool {
        (self.0 ^ other.0) & THREAD == 0
    }
}

/// Why an access is a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// Nothing of this block wrote the bytes.
    Unwritten,
    /// An asynchronous copy that nobody waited for fills them.
    Pending(Who),
    /// Another thread touched them, and nothing orders the two.
    Race { other: Who, phase: u32, wrote: bool, other_block: bool },
}

/// What the warps of a block know of each other's progress.
pub(super) struct Clock {
    phase: u32,
    launch_start: u32,
    block_start: u32,
    /// Accesses of earlier blocks up to this phase come before this block's: it saw an atomic flag that followed them.
    acquired: u32,
    /// Accesses up to this phase were made known by a fence with an atomic access behind it.
    released: u32,
    /// The phase of the last fence; 0 without one.
    fenced: u32,
    touched_atomic: bool,
    /// `known[w][v]`: accesses of warp `v` in phases before this come before those of warp `w` from now on.
    known: Vec<[u32; WARPS]>,
    /// The least of `known[w]`.
    least: Vec<u32>,
}

impl Default for Clock {
    fn default() -> Self {
        Self {
            phase: 1,
            launch_start: 1,
            block_start: 1,
            acquired: 0,
            released: 0,
            fenced: 0,
            touched_atomic: false,
            known: Vec::new(),
            least: Vec::new(),
        }
    }
}

impl Clock {
    /// Begins a launch; whether records must be cleared because counting starts again.
    pub fn begin_launch(&mut self) -> bool {
        let again = self.phase >= LAST_PHASE;
        self.phase = if again { 1 } else { self.phase + 1 };
        self.launch_start = self.phase;
        self.acquired = 0;
        self.released = 0;
        again
    }

    /// Begins a block of so many warps; its first phase.
    pub fn begin_block(&mut self, warps: usize) -> u32 {
        // Phases run out only within one launch of billions of barriers: records then look as if ordered.
        self.phase = (self.phase + 1).min(PENDING - 1);
        self.block_start = self.phase;
        self.acquired = 0;
        self.fenced = 0;
        self.touched_atomic = false;
        self.known.clear();
        self.known.resize(warps, [self.phase; WARPS]);
        self.least.clear();
        self.least.resize(warps, self.phase);
        self.phase
    }

    fn next_phase(&mut self) -> u32 {
        self.phase = (self.phase + 1).min(PENDING - 1);
        self.phase
    }

    /// The lanes of a warp are ordered behind one another.
    pub fn synchronise_warp(&mut self, warp: usize) {
        let phase = self.next_phase();
        self.known[warp][warp] = phase;
        self.note_least(warp);
    }

    /// What a warp tells others by arriving at a barrier without waiting there.
    pub fn arrive(&mut self, warp: usize) -> [u32; WARPS] {
        let phase = self.next_phase();
        let mut told = self.known[warp];
        told[warp] = phase;
        told
    }

    /// The warps in `waiting` meet at a barrier where others arrived that told `told`.
    pub fn synchronise(&mut self, waiting: u32, told: &[u32; WARPS]) {
        let phase = self.next_phase();
        let mut together = *told;
        for warp in (0..self.known.len()).filter(|warp| waiting >> warp & 1 == 1) {
            for (together, known) in together.iter_mut().zip(&self.known[warp]) {
                *together = (*together).max(*known);
            }
        }
        for warp in (0..self.known.len()).filter(|warp| waiting >> warp & 1 == 1) {
            together[warp] = phase;
        }
        for warp in (0..self.known.len()).filter(|warp| waiting >> warp & 1 == 1) {
            self.known[warp] = together;
            self.note_least(warp);
        }
    }

    fn note_least(&mut self, warp: usize) {
        let warps = self.known.len();
        self.least[warp] = self.known[warp][..warps].iter().copied().min().unwrap_or(self.phase);
    }

    /// A fence: what came before is made known by the next atomic access; what an atomic access before has seen is known.
    pub fn fence(&mut self) {
        self.fenced = self.phase;
        if self.touched_atomic {
            self.acquired = self.released;
        }
    }

    /// An atomic read of global memory: what blocks before this one made known, this block sees with its next fence.
    pub fn read_atomic(&mut self) {
        self.touched_atomic = true;
    }

    /// An atomic write of global memory: what this block did before its last fence is made known from here on.
    pub fn write_atomic(&mut self) {
        self.released = self.released.max(self.fenced);
    }
}

impl Reads {
    /// The first read of a phase.
    #[inline(always)]
    fn begin<const GLOBAL: bool>(&mut self, clock: &Clock, who: Who, bit: u32) {
        let (phase, who) = (clock.phase, who.0);
        if self.phase < clock.block_start {
            let earlier = if GLOBAL && self.phase >= clock.launch_start { self.phase } else { 0 };
            *self = Self { phase, who, warps: bit, earlier };
        } else if self.phase < clock.least[Who(who).warp()] {
            *self = Self { phase, who, warps: bit, earlier: self.earlier };
        } else {
            // Not ordered behind all of them: they stay, and this read counts as one of their phase.
            self.warps |= bit;
        }
    }
}

/// Records of the accesses to one piece of memory.
#[derive(Default)]
pub(super) struct Shadow {
    /// Per granule, phase and [`Who`] of the last write.
    writes: Vec<u64>,
    reads: Vec<Reads>,
    /// Whether any read is recorded in `reads` since the memory was taken on.
    any_reads: bool,
}

/// The reads of a granule since its last write, or since all warps knew of them.
#[derive(Clone, Copy, Default)]
struct Reads {
    phase: u32,
    /// The first of them.
    who: u32,
    /// Warps that read in that phase or later.
    warps: u32,
    /// The phase of a read by an earlier block, or 0.
    earlier: u32,
}

impl Shadow {
    /// Makes room for so many granules, forgetting nothing.
    pub fn resize(&mut self, granules: usize) {
        if self.writes.len() < granules {
            self.writes.resize(granules, 0);
            self.reads.resize(granules, Reads::default());
        }
        self.any_reads = false;
    }

    /// Whether it has room for nothing.
    pub fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.writes.fill(0);
        self.reads.fill(Reads::default());
    }

    /// A read of granules `first` to `last` by a lane of `who`'s warp. `GLOBAL`: memory that all blocks share, and that may
    /// hold values from before the launch.
    #[inline(always)]
    pub fn read<const GLOBAL: bool>(
        &mut self,
        clock: &Clock,
        first: usize,
        last: usize,
        who: Who,
        lane: usize,
    ) -> Option<Trouble> {
        let warp = who.warp();
        let own = who.of_lane(lane);
        let over = clock.least[warp] - clock.block_start;
        for &write in &self.writes[first..=last] {
            // Most writes are ones that a barrier of all warps has ended since.
            let phase = (write >> 32) as u32;
            let ordered = phase.wrapping_sub(clock.block_start) < over;
            if !(ordered || GLOBAL && phase < clock.launch_start)
                && let Some(trouble) = read_trouble::<GLOBAL>(clock, write, own)
            {
                return Some(trouble);
            }
        }
        if who.atomic() {
            return None;
        }
        self.any_reads = true;
        let bit = 1u32 << warp;
        for reads in &mut self.reads[first..=last] {
            if reads.phase != clock.phase {
                reads.begin::<GLOBAL>(clock, own, bit);
            } else if reads.warps & bit == 0 {
                reads.warps |= bit;
            } else if reads.who & (SEVERAL | THREAD) != own.0 & THREAD {
                reads.who |= SEVERAL;
            }
        }
        None
    }

    /// As a read by a second lane of the warp whose read by a first lane was recorded just before.
    #[inline(always)]
    pub fn read_again(&mut self, first: usize, last: usize, who: Who) {
        if who.atomic() {
            return;
        }
        for reads in &mut self.reads[first..=last] {
            reads.who |= SEVERAL;
        }
    }

    /// Whether the launch has written granule `at`.
    #[inline(always)]
    pub fn written_since(&self, clock: &Clock, at: usize) -> bool {
        (self.writes[at] >> 32) as u32 >= clock.launch_start
    }

    /// A write of granule `at`. `same` tells whether it leaves the bytes as they are.
    #[inline(always)]
    pub fn write<const GLOBAL: bool>(
        &mut self,
        clock: &Clock,
        at: usize,
        who: Who,
        lane: usize,
        same: impl FnOnce() -> bool,
    ) -> Option<Trouble> {
        let trouble = self.write_trouble::<GLOBAL>(clock, at, who, lane, same);
        self.writes[at] = u64::from(clock.phase) << 32 | u64::from(who.of_lane(lane).0);
        trouble
    }

    /// As [`Shadow::write`], by a copy that is not finished before [`Shadow::finish`].
    #[inline(always)]
    pub fn begin(&mut self, clock: &Clock, at: usize, who: Who, lane: usize) -> Option<Trouble> {
        let trouble = self.write_trouble::<false>(clock, at, who, lane, || false);
        self.writes[at] = u64::from(PENDING) << 32 | u64::from(who.of_lane(lane).0);
        trouble
    }

    /// The copy that this lane began is finished.
    #[inline(always)]
    pub fn finish(&mut self, clock: &Clock, at: usize, who: Who, lane: usize) {
        let begun = u64::from(PENDING) << 32 | u64::from(who.of_lane(lane).0);
        if self.writes[at] == begun {
            self.writes[at] = u64::from(clock.phase) << 32 | u64::from(who.of_lane(lane).0);
        }
    }

    #[inline(always)]
    fn write_trouble<const GLOBAL: bool>(
        &mut self,
        clock: &Clock,
        at: usize,
        who: Who,
        lane: usize,
        same: impl FnOnce() -> bool,
    ) -> Option<Trouble> {
        let write = self.writes[at];
        let phase = (write >> 32) as u32;
        let warp = who.warp();
        let old = if GLOBAL { clock.launch_start } else { clock.block_start };
        let over = clock.least[warp] - clock.block_start;
        let ordered = phase.wrapping_sub(clock.block_start) < over;
        if !(ordered || phase < old)
            && let Some(trouble) = write_after_write::<GLOBAL>(clock, write, who.of_lane(lane), same)
        {
            return Some(trouble);
        }
        if self.any_reads {
            let reads = self.reads[at];
            let ordered = reads.phase >= clock.block_start && reads.phase < clock.least[warp] && reads.earlier == 0;
            if !(ordered || reads.phase < old) {
                return write_after_read::<GLOBAL>(clock, reads, who.of_lane(lane));
            }
        }
        None
    }
}

#[cold]
fn read_trouble<const GLOBAL: bool>(clock: &Clock, write: u64, who: Who) -> Option<Trouble> {
    let (phase, other) = ((write >> 32) as u32, Who(write as u32));
    if phase == PENDING {
        return Some(Trouble::Pending(other));
    }
    let other_block = phase < clock.block_start;
    if other_block && !GLOBAL {
        return Some(Trouble::Unwritten);
    }
    let ordered = phase < clock.known[who.warp()][other.warp()];
    let harmless = if other_block { phase <= clock.acquired } else { ordered || other.same_thread(who) };
    (!(harmless || (other.atomic() && who.atomic()))).then_some(Trouble::Race {
        other,
        phase,
        wrote: true,
        other_block,
    })
}

#[cold]
fn write_after_write<const GLOBAL: bool>(
    clock: &Clock,
    write: u64,
    who: Who,
    same: impl FnOnce() -> bool,
) -> Option<Trouble> {
    let (phase, other) = ((write >> 32) as u32, Who(write as u32));
    if phase == PENDING {
        return Some(Trouble::Pending(other));
    }
    let other_block = phase < clock.block_start;
    let harmless = if other_block {
        phase <= clock.acquired
    } else {
        let one_instruction = other.warp() == who.warp() && other.instruction() == who.instruction();
        let ordered = phase < clock.known[who.warp()][other.warp()];
        ordered || other.same_thread(who) || one_instruction && phase == clock.phase && same()
    };
    (!(harmless || (other.atomic() && who.atomic()))).then_some(Trouble::Race {
        other,
        phase,
        wrote: true,
        other_block,
    })
}

#[cold]
fn write_after_read<const GLOBAL: bool>(clock: &Clock, reads: Reads, who: Who) -> Option<Trouble> {
    let first = Who(reads.who);
    let race =
        |other: Who, phase: u32, other_block: bool| Some(Trouble::Race { other, phase, wrote: false, other_block });
    if reads.phase < clock.block_start {
        return if reads.phase <= clock.acquired { None } else { race(first, reads.phase, true) };
    }
    if GLOBAL && reads.earlier > clock.acquired {
        return race(first, reads.earlier, true);
    }
    let own = who.warp();
    let known = &clock.known[own];
    for warp in (0..WARPS).filter(|warp| reads.warps >> warp & 1 == 1) {
        if reads.phase < known[warp] {
            continue;
        }
        if warp != own {
            let other = if first.warp() == warp { first } else { Who(first.0 & !THREAD | (warp as u32) << 5) };
            return race(other, reads.phase, false);
        }
        let only_first = reads.warps == 1 << own && reads.who & SEVERAL == 0;
        if reads.who & SEVERAL != 0 || only_first && !first.same_thread(who) {
            return race(first, reads.phase, false);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(warps: usize) -> (Shadow, Clock) {
        let (mut shadow, mut clock) = (Shadow::default(), Clock::default());
        shadow.resize(8);
        clock.begin_launch();
        clock.begin_block(warps);
        (shadow, clock)
    }

    fn who(warp: usize) -> Who {
        Who::new(7, warp, false)
    }

    fn write(shadow: &mut Shadow, clock: &Clock, warp: usize, lane: usize) -> Option<Trouble> {
        shadow.write::<false>(clock, 3, who(warp), lane, || false)
    }

    fn read(shadow: &mut Shadow, clock: &Clock, warp: usize, lane: usize) -> Option<Trouble> {
        shadow.read::<false>(clock, 3, 3, who(warp), lane)
    }

    fn is_race(trouble: Option<Trouble>, wrote: bool) -> bool {
        matches!(trouble, Some(Trouble::Race { wrote: own, .. }) if own == wrote)
    }

    #[test]
    fn a_barrier_orders_what_stands_before_and_after_it() {
        let (mut shadow, mut clock) = block(2);
        assert_eq!(read(&mut shadow, &clock, 0, 0), Some(Trouble::Unwritten));
        assert_eq!(write(&mut shadow, &clock, 0, 5), None);
        assert_eq!(read(&mut shadow, &clock, 0, 5), None, "its own write");
        assert!(is_race(read(&mut shadow, &clock, 1, 5), true));
        clock.synchronise(0b11, &[0; WARPS]);
        assert_eq!(read(&mut shadow, &clock, 1, 5), None);
        assert_eq!(read(&mut shadow, &clock, 0, 1), None);
        assert!(is_race(write(&mut shadow, &clock, 0, 1), false), "warp 1 reads");
        clock.synchronise(0b11, &[0; WARPS]);
        assert_eq!(write(&mut shadow, &clock, 1, 0), None);
        clock.begin_block(2);
        assert_eq!(read(&mut shadow, &clock, 1, 0), Some(Trouble::Unwritten), "another block");
    }

    #[test]
    fn lanes_of_a_warp_are_ordered_by_its_barrier() {
        let (mut shadow, mut clock) = block(1);
        assert_eq!(write(&mut shadow, &clock, 0, 1), None);
        assert!(is_race(read(&mut shadow, &clock, 0, 2), true));
        clock.synchronise_warp(0);
        assert_eq!(read(&mut shadow, &clock, 0, 2), None);
        assert_eq!(write(&mut shadow, &clock, 0, 2), None, "the only reader");
        clock.synchronise_warp(0);
        assert_eq!(read(&mut shadow, &clock, 0, 2), None);
        assert_eq!(read(&mut shadow, &clock, 0, 3), None);
        assert!(is_race(write(&mut shadow, &clock, 0, 2), false));
    }

    #[test]
    fn a_barrier_of_some_warps_orders_those_only() {
        let (mut shadow, mut clock) = block(3);
        assert_eq!(write(&mut shadow, &clock, 0, 0), None);
        clock.synchronise(0b011, &[0; WARPS]);
        assert_eq!(read(&mut shadow, &clock, 1, 0), None);
        assert!(is_race(read(&mut shadow, &clock, 2, 0), true));
        // Warp 1 passes on what it knows of warp 0.
        clock.synchronise(0b110, &[0; WARPS]);
        assert_eq!(read(&mut shadow, &clock, 2, 0), None);
        let (mut shadow, mut clock) = block(2);
        assert_eq!(write(&mut shadow, &clock, 0, 0), None);
        let told = clock.arrive(0);
        clock.synchronise(0b10, &told);
        assert_eq!(read(&mut shadow, &clock, 1, 0), None);
        assert!(is_race(write(&mut shadow, &clock, 0, 0), false), "warp 0 did not wait for the reader");
    }

    #[test]
    fn copies_are_read_after_they_are_finished() {
        let (mut shadow, mut clock) = block(2);
        assert_eq!(shadow.begin(&clock, 3, who(0), 4), None);
        assert_eq!(read(&mut shadow, &clock, 0, 4), Some(Trouble::Pending(who(0).of_lane(4))));
        clock.synchronise(0b11, &[0; WARPS]);
        assert!(matches!(read(&mut shadow, &clock, 1, 4), Some(Trouble::Pending(_))));
        shadow.finish(&clock, 3, who(0), 4);
        assert_eq!(read(&mut shadow, &clock, 0, 4), None);
        assert!(is_race(read(&mut shadow, &clock, 1, 4), true));
        clock.synchronise(0b11, &[0; WARPS]);
        assert_eq!(read(&mut shadow, &clock, 1, 4), None);
    }

    #[test]
    fn nothing_orders_blocks_but_a_flag() {
        let (mut shadow, mut clock) = block(1);
        let flag = Who::new(9, 0, true);
        assert_eq!(shadow.write::<true>(&clock, 3, who(0), 0, || false), None);
        assert_eq!(shadow.read::<true>(&clock, 4, 4, who(0), 0), None);
        assert_eq!(shadow.write::<true>(&clock, 5, flag, 0, || false), None);
        clock.begin_block(1);
        assert!(is_race(shadow.read::<true>(&clock, 3, 3, who(0), 0), true));
        assert!(is_race(shadow.write::<true>(&clock, 4, who(0), 0, || false), false));
        assert_eq!(shadow.write::<true>(&clock, 5, flag, 0, || false), None, "both are atomic");
        clock.begin_launch();
        clock.begin_block(1);
        assert_eq!(shadow.read::<true>(&clock, 3, 3, who(0), 0), None, "another launch");
        assert_eq!(shadow.write::<true>(&clock, 3, who(0), 0, || false), None);
        clock.write_atomic();
        clock.begin_block(1);
        clock.read_atomic();
        clock.fence();
        assert!(is_race(shadow.read::<true>(&clock, 3, 3, who(0), 0), true), "no fence before the flag");
        clock.begin_launch();
        clock.begin_block(1);
        assert_eq!(shadow.write::<true>(&clock, 3, who(0), 0, || false), None);
        clock.fence();
        clock.write_atomic();
        clock.begin_block(1);
        clock.read_atomic();
        assert!(is_race(shadow.read::<true>(&clock, 3, 3, who(0), 0), true), "no fence behind the flag");
        clock.fence();
        assert_eq!(shadow.read::<true>(&clock, 3, 3, who(0), 0), None, "announced by the flag");
    }

    #[test]
    fn one_instruction_may_write_the_same_value_from_many_lanes() {
        let (mut shadow, clock) = block(1);
        assert_eq!(shadow.write::<false>(&clock, 0, who(0), 0, || false), None);
        assert_eq!(shadow.write::<false>(&clock, 0, who(0), 1, || true), None);
        assert!(is_race(shadow.write::<false>(&clock, 0, who(0), 2, || false), true));
    }
}
