//! The state of a warp: its registers, which of its lanes run, and its asynchronous copies.

use std::collections::VecDeque;

use super::control_flow::NEVER;
use super::program::{Preset, Program, Special};
use super::shadow::{LANES, Who};

/// All lanes.
pub(super) const FULL: u32 = u32::MAX;

/// A 32-bit slot of all lanes.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Words(pub [u32; LANES]);

/// A 64-bit slot of all lanes.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Doubles(pub [u64; LANES]);

/// A warp.
pub(super) struct Warp {
    pub index: usize,
    pub words: Vec<Words>,
    pub doubles: Vec<Doubles>,
    /// One bit per lane.
    pub predicates: Vec<u32>,
    /// Lanes in which each watched register was written.
    pub marks: Vec<u32>,
    /// The next instruction.
    pub at: usize,
    /// Lanes that run.
    pub lanes: u32,
    /// Where the running lanes meet those in the uppermost entry of `parted`.
    pub meet: u32,
    pub parted: Vec<Parted>,
    /// Lanes that the block has.
    pub all: u32,
    /// Lanes that did not exit.
    pub alive: u32,
    pub copies: VecDeque<Copy>,
    /// Groups of copies that each lane closed.
    pub groups: [u32; LANES],
    /// Instructions that the warp may still run.
    pub budget: u64,
    pub state: State,
}

/// Lanes that wait for others, or for their turn.
pub(super) struct Parted {
    pub at: usize,
    pub meet: u32,
    pub lanes: u32,
}

/// An asynchronous copy that is under way.
pub(super) struct Copy {
    pub who: Who,
    pub lanes: u32,
    pub bytes: u32,
    /// Places in shared memory.
    pub places: [u32; LANES],
    /// The group that each lane's copy is part of.
    pub groups: [u32; LANES],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Running,
    /// At a barrier of this number.
    Waiting(u32),
    Finished,
}

/// What a block is, as special registers tell it.
pub(super) struct BlockPlace {
    pub grid: [u32; 3],
    pub extents: [u32; 3],
    pub block: [u32; 3],
}

impl BlockPlace {
    pub fn threads(&self) -> u32 {
        self.extents.iter().product()
    }

    /// The place of a thread of the block.
    pub fn thread(&self, warp: usize, lane: usize) -> [u32; 3] {
        let [x, y, _] = self.extents;
        let number = (warp * LANES + lane) as u32;
        [number % x, number / x % y, number / x / y]
    }
}

impl Warp {
    /// A warp with room for a program's registers, and its constants filled in.
    pub fn new(program: &Program, index: usize, parameters: &[u64]) -> Self {
        let files = program.files;
        let mut warp = Self {
            index,
            words: vec![Words([0; LANES]); files.words],
            doubles: vec![Doubles([0; LANES]); files.doubles],
            predicates: vec![0; files.predicates],
            marks: vec![0; program.tracked.len()],
            at: 0,
            lanes: 0,
            meet: NEVER,
            parted: Vec::new(),
            all: 0,
            alive: 0,
            copies: VecDeque::new(),
            groups: [0; LANES],
            budget: 0,
            state: State::Finished,
        };
        for preset in &program.presets {
            match *preset {
                Preset::Word(slot, value) => warp.words[usize::from(slot)].0 = [value; LANES],
                Preset::Double(slot, value) => warp.doubles[usize::from(slot)].0 = [value; LANES],
                Preset::Predicate(slot, lanes) => warp.predicates[usize::from(slot)] = lanes,
                Preset::ParameterWord(slot, parameter) => {
                    warp.words[usize::from(slot)].0 = [parameters[usize::from(parameter)] as u32; LANES];
                }
                Preset::ParameterDouble(slot, parameter) => {
                    warp.doubles[usize::from(slot)].0 = [parameters[usize::from(parameter)]; LANES];
                }
                Preset::Special(..) => {}
            }
        }
        warp
    }

    /// Begins a block.
    pub fn begin(&mut self, program: &Program, place: &BlockPlace, budget: u64) {
        let first = (self.index * LANES) as u32;
        let count = (place.threads() - first).min(LANES as u32);
        self.all = FULL >> (LANES as u32 - count);
        self.alive = self.all;
        self.lanes = self.all;
        self.at = 0;
        self.meet = NEVER;
        self.parted.clear();
        self.marks.fill(0);
        self.copies.clear();
        self.groups = [0; LANES];
        self.budget = budget;
        self.state = State::Running;
        for preset in &program.presets {
            if let Preset::Special(slot, special) = *preset {
                let index = self.index;
                self.words[usize::from(slot)].0 = std::array::from_fn(|lane| special.value(place, index, lane));
            }
        }
    }

    /// Ends the lanes.
    pub fn exit(&mut self, lanes: u32) {
        self.alive &= !lanes;
        self.lanes &= !lanes;
    }
}

impl Special {
    fn value(self, place: &BlockPlace, warp: usize, lane: usize) -> u32 {
        let bit = 1u32 << lane;
        match self {
            Self::Thread(axis) => place.thread(warp, lane)[usize::from(axis)],
            Self::BlockExtent(axis) => place.extents[usize::from(axis)],
            Self::Block(axis) => place.block[usize::from(axis)],
            Self::GridExtent(axis) => place.grid[usize::from(axis)],
            Self::Lane => lane as u32,
            Self::Warp => warp as u32,
            Self::WarpCount => place.threads().div_ceil(LANES as u32),
            Self::LaneMaskEqual => bit,
            Self::LaneMaskLess => bit - 1,
            Self::LaneMaskLessEqual => bit | (bit - 1),
            Self::LaneMaskGreater => !(bit | (bit - 1)),
            Self::LaneMaskGreaterEqual => !(bit - 1),
            Self::Processor => 0,
            Self::ProcessorCount => 1,
        }
    }
}
