//! What the order of instructions tells: where diverged lanes meet again, which registers may be read unwritten, and which
//! registers can share a slot because they never hold values at the same time.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use super::program::{FileSizes, Slot};
use super::syntax::Width;

/// An instruction as far as the order goes.
pub(super) struct Step {
    /// Registers that it reads, the guard among them, and writes.
    pub reads: Vec<usize>,
    pub writes: Vec<usize>,
    /// Whether it runs under a predicate.
    pub guarded: bool,
    pub flow: Flow,
}

/// What follows an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flow {
    Next,
    /// The instruction of this index; the next one too if guarded.
    Branch(usize),
    /// Nothing; the next instruction if guarded.
    Exit,
}

/// Stands for a meeting place that is not there: the lanes exit before they meet.
pub(super) const NEVER: u32 = u32::MAX;

pub(super) struct Graph<'s> {
    steps: &'s [Step],
    blocks: Vec<Block>,
}

/// Instructions that run one after the other.
struct Block {
    first: usize,
    end: usize,
    successors: Vec<usize>,
    /// Whether it ends every thread that gets to its end.
    exits: bool,
}

impl<'s> Graph<'s> {
    /// The last step must be an exit without a guard.
    pub fn new(steps: &'s [Step]) -> Self {
        let mut leads = vec![false; steps.len() + 1];
        leads[0] = true;
        for (index, step) in steps.iter().enumerate() {
            match step.flow {
                Flow::Next => {}
                Flow::Branch(target) => {
                    leads[target] = true;
                    leads[index + 1] = true;
                }
                Flow::Exit => leads[index + 1] = true,
            }
        }
        let firsts: Vec<usize> = (0..steps.len()).filter(|&index| leads[index]).collect();
        let mut block_of = vec![0; steps.len()];
        for (block, &first) in firsts.iter().enumerate() {
            let end = firsts.get(block + 1).copied().unwrap_or(steps.len());
            block_of[first..end].fill(block);
        }
        let blocks = firsts.iter().enumerate().map(|(block, &first)| {
            let end = firsts.get(block + 1).copied().unwrap_or(steps.len());
            let last = &steps[end - 1];
            let mut successors = Vec::new();
            if let Flow::Branch(target) = last.flow {
                successors.push(block_of[target]);
            }
            if (last.flow == Flow::Next || last.guarded) && end < steps.len() && !successors.contains(&(block + 1)) {
                successors.push(block + 1);
            }
            Block { first, end, successors, exits: last.flow == Flow::Exit && !last.guarded }
        });
        Self { steps, blocks: blocks.collect() }
    }

    /// Per branch, by its index, the instruction where lanes that part there meet again; [`NEVER`] for all other
    /// instructions.
    ///
    /// That is the branch's immediate post-dominator. Early exits do not count as ways past it: lanes that go on past an
    /// early exit still meet where they would without it.
    pub fn meetings(&self) -> Vec<u32> {
        let count = self.blocks.len();
        let reachable = self.reachable();
        let main = (0..count).rev().find(|&block| self.blocks[block].exits && reachable[block]);
        let mut meets = vec![None; count];
        let main_sinks: Vec<usize> = main.into_iter().collect();
        let to_main = self.reaching(&main_sinks);
        self.post_dominators(&to_main, &main_sinks, &mut meets);
        let others: Vec<usize> = (0..count).filter(|&block| self.blocks[block].exits && !to_main[block]).collect();
        let elsewhere: Vec<bool> =
            self.reaching(&others).iter().zip(&to_main).map(|(&reaches, &main)| reaches && !main).collect();
        self.post_dominators(&elsewhere, &others, &mut meets);
        let mut meetings = vec![NEVER; self.steps.len()];
        for (block, meet) in self.blocks.iter().zip(meets) {
            if let Some(meet) = meet {
                meetings[block.end - 1] = self.blocks[meet].first as u32;
            }
        }
        meetings
    }

    /// Blocks that can be reached from the beginning.
    fn reachable(&self) -> Vec<bool> {
        let mut reached = vec![false; self.blocks.len()];
        let mut queue = VecDeque::from([0]);
        while let Some(block) = queue.pop_front() {
            if !std::mem::replace(&mut reached[block], true) {
                queue.extend(&self.blocks[block].successors);
            }
        }
        reached
    }

    /// Blocks from which one of the `targets` can be reached.
    fn reaching(&self, targets: &[usize]) -> Vec<bool> {
        let predecessors = self.predecessors();
        let mut reached = vec![false; self.blocks.len()];
        let mut queue: VecDeque<usize> = targets.iter().copied().collect();
        while let Some(block) = queue.pop_front() {
            if !std::mem::replace(&mut reached[block], true) {
                queue.extend(&predecessors[block]);
            }
        }
        reached
    }

    fn predecessors(&self) -> Vec<Vec<usize>> {
        let mut predecessors = vec![Vec::new(); self.blocks.len()];
        for (index, block) in self.blocks.iter().enumerate() {
            for &successor in &block.successors {
                predecessors[successor].push(index);
            }
        }
        predecessors
    }

    /// Immediate post-dominators of the blocks in `within`, whose ways all end in `sinks` (K. D. Cooper, T. J. Harvey and
    /// K. Kennedy, "A Simple, Fast Dominance Algorithm", on the reversed graph).
    fn post_dominators(&self, within: &[bool], sinks: &[usize], meets: &mut [Option<usize>]) {
        let end = self.blocks.len();
        let predecessors = self.predecessors();
        // Depth-first from the end, which stands behind all sinks; blocks are numbered when they are left.
        let mut number = vec![usize::MAX; end + 1];
        let mut order = Vec::new();
        let mut entered = vec![false; end + 1];
        let before = |block: usize| if block == end { sinks } else { predecessors[block].as_slice() };
        let mut stack = vec![(end, 0)];
        entered[end] = true;
        while let Some((block, position)) = stack.last_mut() {
            match before(*block).get(*position) {
                Some(&next) => {
                    *position += 1;
                    if within[next] && !entered[next] {
                        entered[next] = true;
                        stack.push((next, 0));
                    }
                }
                None => {
                    number[*block] = order.len();
                    order.push(*block);
                    stack.pop();
                }
            }
        }
        let mut dominator = vec![usize::MAX; end + 1];
        dominator[end] = end;
        let mut changed = true;
        while changed {
            changed = false;
            for &block in order.iter().rev().filter(|&&block| block != end) {
                let of_sink = if sinks.contains(&block) { Some(end) } else { None };
                let after = self.blocks[block].successors.iter().copied().filter(|&after| within[after]);
                let mut meeting = usize::MAX;
                for candidate in after.chain(of_sink) {
                    if dominator[candidate] == usize::MAX {
                        continue;
                    }
                    if meeting == usize::MAX {
                        meeting = candidate;
                        continue;
                    }
                    let mut other = candidate;
                    while meeting != other {
                        while number[meeting] < number[other] {
                            meeting = dominator[meeting];
                        }
                        while number[other] < number[meeting] {
                            other = dominator[other];
                        }
                    }
                }
                if dominator[block] != meeting {
                    dominator[block] = meeting;
                    changed = true;
                }
            }
        }
        for block in (0..end).filter(|&block| within[block] && dominator[block] < end) {
            meets[block] = Some(dominator[block]);
        }
    }

    /// Registers that some instruction may read before anything wrote them, of `count` registers.
    pub fn maybe_unwritten(&self, count: usize) -> Vec<bool> {
        let predecessors = self.predecessors();
        let mut after: Vec<Option<Set>> = vec![None; self.blocks.len()];
        let mut queue: VecDeque<usize> = VecDeque::from([0]);
        let mut unwritten = vec![false; count];
        let before = |block: usize, after: &[Option<Set>]| {
            // The entry has a way in on which nothing is written.
            let mut written: Option<Set> = (block == 0).then(|| Set::new(count));
            for set in predecessors[block].iter().filter_map(|&one| after[one].as_ref()) {
                match &mut written {
                    Some(written) => written.keep(set),
                    None => written = Some(set.clone()),
                }
            }
            written.unwrap_or_else(|| Set::new(count))
        };
        while let Some(block) = queue.pop_front() {
            let mut written = before(block, &after);
            for step in &self.steps[self.blocks[block].first..self.blocks[block].end] {
                if !step.guarded {
                    step.writes.iter().for_each(|&register| written.insert(register));
                }
            }
            if after[block].as_ref() != Some(&written) {
                after[block] = Some(written);
                queue.extend(&self.blocks[block].successors);
            }
        }
        for (index, block) in self.blocks.iter().enumerate().filter(|(index, _)| after[*index].is_some()) {
            let mut written = before(index, &after);
            for step in &self.steps[block.first..block.end] {
                for &register in step.reads.iter().filter(|&&register| !written.has(register)) {
                    unwritten[register] = true;
                }
                if !step.guarded {
                    step.writes.iter().for_each(|&register| written.insert(register));
                }
            }
        }
        unwritten
    }

    /// Slots for the registers, few enough that those in use stay in the processor's nearest cache: registers that never
    /// hold values at the same time share one. Those of `apart` have one of their own.
    pub fn slots(&self, widths: &[Width], apart: &[bool]) -> (Vec<Slot>, FileSizes) {
        let ranges = self.live_ranges(widths.len());
        let mut slots = vec![0; widths.len()];
        let mut sizes = FileSizes::default();
        for class in 0..3 {
            let of_class = |register: &usize| class_of(widths[*register]) == class;
            let mut size = 0usize;
            let mut take = |slot: &mut Slot| {
                *slot = size.min(usize::from(Slot::MAX)) as Slot;
                size += 1;
            };
            for register in (0..widths.len()).filter(of_class).filter(|&register| apart[register]) {
                take(&mut slots[register]);
            }
            let mut shared: Vec<usize> = (0..widths.len())
                .filter(of_class)
                .filter(|&register| !apart[register] && ranges[register].is_some())
                .collect();
            shared.sort_by_key(|&register| (ranges[register], register));
            let mut free: BinaryHeap<Reverse<Slot>> = BinaryHeap::new();
            let mut taken: BinaryHeap<Reverse<(usize, Slot)>> = BinaryHeap::new();
            for register in shared {
                let Some((start, end)) = ranges[register] else { continue };
                while let Some(&Reverse((last, slot))) = taken.peek()
                    && last < start
                {
                    taken.pop();
                    free.push(Reverse(slot));
                }
                match free.pop() {
                    Some(Reverse(slot)) => slots[register] = slot,
                    None => take(&mut slots[register]),
                }
                taken.push(Reverse((end, slots[register])));
            }
            *[&mut sizes.predicates, &mut sizes.words, &mut sizes.doubles][class] = size;
        }
        (slots, sizes)
    }

    /// First and last place where each register holds a value that is still wanted, or is written. An instruction reads at
    /// twice its index, and writes at the next place.
    fn live_ranges(&self, count: usize) -> Vec<Option<(usize, usize)>> {
        let predecessors = self.predecessors();
        let mut live_in = vec![Set::new(count); self.blocks.len()];
        let mut queue: VecDeque<usize> = (0..self.blocks.len()).rev().collect();
        let live_out = |block: usize, live_in: &[Set]| {
            let mut live = Set::new(count);
            self.blocks[block].successors.iter().for_each(|&after| live.add(&live_in[after]));
            live
        };
        while let Some(block) = queue.pop_front() {
            let mut live = live_out(block, &live_in);
            for step in self.steps[self.blocks[block].first..self.blocks[block].end].iter().rev() {
                if !step.guarded {
                    step.writes.iter().for_each(|&register| live.remove(register));
                }
                step.reads.iter().for_each(|&register| live.insert(register));
            }
            if live != live_in[block] {
                live_in[block] = live;
                queue.extend(&predecessors[block]);
            }
        }
        let mut ranges: Vec<Option<(usize, usize)>> = vec![None; count];
        let mut extend = |register: usize, place: usize| {
            let range = ranges[register].get_or_insert((place, place));
            *range = (range.0.min(place), range.1.max(place));
        };
        for (index, block) in self.blocks.iter().enumerate() {
            live_in[index].each(|register| extend(register, 2 * block.first));
            live_out(index, &live_in).each(|register| extend(register, 2 * block.end));
            for (at, step) in self.steps[block.first..block.end].iter().enumerate() {
                let place = 2 * (block.first + at);
                step.reads.iter().for_each(|&register| extend(register, place));
                step.writes.iter().for_each(|&register| extend(register, place + 1));
            }
        }
        ranges
    }
}

/// The part of the register file that registers of a width live in.
fn class_of(width: Width) -> usize {
    match width {
        Width::Predicate => 0,
        Width::B8 | Width::B16 | Width::B32 => 1,
        Width::B64 => 2,
    }
}

/// A set of registers.
#[derive(Clone, PartialEq)]
struct Set(Vec<u64>);

impl Set {
    fn new(count: usize) -> Self {
        Self(vec![0; count.div_ceil(64)])
    }

    fn has(&self, register: usize) -> bool {
        self.0[register / 64] >> (register % 64) & 1 == 1
    }

    fn insert(&mut self, register: usize) {
        self.0[register / 64] |= 1 << (register % 64);
    }

    fn remove(&mut self, register: usize) {
        self.0[register / 64] &= !(1 << (register % 64));
    }

    fn add(&mut self, other: &Self) {
        self.0.iter_mut().zip(&other.0).for_each(|(own, other)| *own |= other);
    }

    fn keep(&mut self, other: &Self) {
        self.0.iter_mut().zip(&other.0).for_each(|(own, other)| *own &= other);
    }

    fn each(&self, mut visit: impl FnMut(usize)) {
        for (index, &word) in self.0.iter().enumerate() {
            let mut rest = word;
            while rest != 0 {
                visit(64 * index + rest.trailing_zeros() as usize);
                rest &= rest - 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(reads: &[usize], writes: &[usize]) -> Step {
        Step { reads: reads.to_vec(), writes: writes.to_vec(), guarded: false, flow: Flow::Next }
    }

    fn branch(target: usize) -> Step {
        Step { flow: Flow::Branch(target), ..step(&[], &[]) }
    }

    fn branch_if(target: usize) -> Step {
        Step { guarded: true, ..branch(target) }
    }

    fn exit() -> Step {
        Step { flow: Flow::Exit, ..step(&[], &[]) }
    }

    #[test]
    fn lanes_meet_after_the_if_and_after_the_loop() {
        // 0: if → 3; 1: then; 2: → 4; 3: else; 4: loop body; 5: again → 4; 6: exit
        let steps = [branch_if(3), step(&[], &[]), branch(4), step(&[], &[]), step(&[], &[]), branch_if(4), exit()];
        let meetings = Graph::new(&steps).meetings();
        assert_eq!((meetings[0], meetings[5]), (4, 6));
    }

    #[test]
    fn early_exits_do_not_keep_the_others_from_meeting() {
        // 0: if → 4; 1: if → 3; 2: exit; 3: then; 4: both; 5: exit; 6: nobody gets here
        let steps = [branch_if(4), branch_if(3), exit(), step(&[], &[]), step(&[], &[]), exit(), exit()];
        let meetings = Graph::new(&steps).meetings();
        assert_eq!((meetings[0], meetings[1]), (4, 3));
        // 0: if → 2; 1: exit; 2: exit: both ways end.
        let steps = [branch_if(2), exit(), exit()];
        assert_eq!(Graph::new(&steps).meetings()[0], 2);
    }

    #[test]
    fn a_loop_without_end_has_no_meeting() {
        let steps = [branch_if(3), step(&[], &[]), branch(1), exit()];
        let meetings = Graph::new(&steps).meetings();
        assert_eq!((meetings[0], meetings[2]), (3, NEVER));
    }

    #[test]
    fn reads_that_a_path_leaves_unwritten_are_found() {
        // 0: writes 0; 1: if → 3; 2: writes 1; 3: reads 0 and 1; 4: exit
        let steps = [step(&[], &[0]), branch_if(3), step(&[], &[1]), step(&[0, 1], &[]), exit()];
        assert_eq!(Graph::new(&steps).maybe_unwritten(3), [false, true, false]);
        let mut steps = [step(&[], &[0]), step(&[0], &[]), exit()];
        steps[0].guarded = true;
        assert_eq!(Graph::new(&steps).maybe_unwritten(1), [true]);
    }

    #[test]
    fn registers_share_slots_unless_they_hold_values_at_once() {
        // 0 → 1 → 2, each read by the next; 3 is read at the end.
        let steps = [step(&[], &[3]), step(&[], &[0]), step(&[0], &[1]), step(&[1], &[2]), step(&[2, 3], &[]), exit()];
        let (slots, sizes) = Graph::new(&steps).slots(&[Width::B32; 4], &[false; 4]);
        assert_eq!(sizes.words, 2);
        assert!(slots[0] == slots[1] && slots[1] == slots[2] && slots[2] != slots[3]);
        // A value that a loop needs again is kept all through the loop.
        let steps = [step(&[], &[0]), step(&[0], &[]), step(&[], &[1]), step(&[1], &[]), branch_if(1), exit()];
        let (slots, _) = Graph::new(&steps).slots(&[Width::B32; 2], &[false; 2]);
        assert_ne!(slots[0], slots[1]);
        let (slots, sizes) = Graph::new(&[step(&[], &[0]), exit()]).slots(&[Width::Predicate, Width::B64], &[true; 2]);
        assert_eq!((slots[0], slots[1], sizes.predicates, sizes.doubles), (0, 0, 1, 1));
    }
}
