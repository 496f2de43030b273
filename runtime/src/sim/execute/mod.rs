//! Runs the instructions of one warp.

mod access;
mod arithmetic;
mod exchange;
mod matrix;

use arithmetic::each_lane;

use super::control_flow::NEVER;
use super::numbers::{bit_field, insert_bits};
use super::program::{
    Check, Combine, CompareKind, Conversion, Instruction, NO_SLOT, Op, PredicateOp, Program, Slot, VoteOp,
};
use super::shadow::LANES;
use super::spaces::{Checked, Memory, Raised};
use super::warp::{FULL, Parted, State, Warp};

/// Why a warp stops running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// All its lanes exited.
    Finished,
    /// It arrived at a barrier where so many threads meet (all of the block for `None`), and waits there unless it only
    /// tells that it arrived.
    Barrier { id: u32, count: Option<u32>, waits: bool },
}

/// A warp that runs.
pub(super) struct Execution<'x, 'r> {
    pub program: &'x Program,
    pub warp: &'x mut Warp,
    pub memory: &'x mut Memory<'r>,
    /// How often each instruction ran, for statistics.
    pub counts: &'x mut [u64],
}

impl Execution<'_, '_> {
    /// Runs the warp until it stops.
    ///
    /// # Errors
    /// What is wrong with the instruction at the warp's place.
    pub fn run(&mut self) -> Checked<Stop> {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("bmi2") {
            // SAFETY: the processor has the instructions that the function is compiled for.
            return unsafe { self.run_with_avx2() };
        }
        self.steps()
    }

    /// The same, compiled for processors with wide vectors and fused multiply-add: the lanes of a warp are eight at a time.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt")]
    fn run_with_avx2(&mut self) -> Checked<Stop> {
        self.steps()
    }

    #[inline(always)]
    fn steps(&mut self) -> Checked<Stop> {
        loop {
            while self.warp.at as u32 == self.warp.meet || self.warp.lanes == 0 {
                match self.warp.parted.pop() {
                    Some(next) => self.resume(next),
                    None => {
                        self.warp.state = State::Finished;
                        return Ok(Stop::Finished);
                    }
                }
            }
            let at = self.warp.at;
            let instruction = self.program.instructions[at];
            if self.warp.budget == 0 {
                return Err(self.runaway());
            }
            self.warp.budget -= 1;
            self.counts[at] += 1;
            let mut lanes = self.warp.lanes;
            if instruction.guard != NO_SLOT {
                if instruction.check != 0 {
                    self.check_guard(instruction)?;
                }
                let holds = self.warp.predicates[usize::from(instruction.guard)];
                lanes &= if instruction.negated { !holds } else { holds };
                if lanes == 0 {
                    self.warp.at = at + 1;
                    continue;
                }
            }
            if instruction.check != 0 {
                self.check_registers(instruction, lanes)?;
            }
            match instruction.op {
                Op::Branch { target, meet } => {
                    self.branch(lanes, target as usize, meet);
                    continue;
                }
                Op::Exit => {
                    self.warp.exit(lanes);
                    self.warp.at = at + 1;
                    continue;
                }
                Op::Barrier { id, count, arrive, aligned: _ } => {
                    let stop = self.barrier(lanes, id, count, arrive)?;
                    self.warp.at = at + 1;
                    return Ok(stop);
                }
                op => self.operate(op, lanes)?,
            }
            self.warp.at = at + 1;
        }
    }

    /// Lanes that waited run on, with those that are with them now.
    #[inline(always)]
    fn resume(&mut self, next: Parted) {
        self.warp.at = next.at;
        self.warp.meet = next.meet;
        self.warp.lanes = next.lanes & self.warp.alive;
    }

    #[inline(always)]
    fn branch(&mut self, taken: u32, target: usize, meet: u32) {
        let warp = &mut *self.warp;
        let stay = warp.lanes & !taken;
        if stay == 0 {
            warp.at = target;
            return;
        }
        // Where lanes meet that part here, all of them go on together. If they already meet there others that parted
        // before, that entry is there.
        if meet != warp.meet || meet == NEVER {
            warp.parted.push(Parted { at: meet as usize, meet: warp.meet, lanes: warp.lanes });
        }
        let next = warp.at + 1;
        let goes_on = |at: usize| at as u32 != meet || meet == NEVER;
        match (goes_on(target), goes_on(next)) {
            (true, true) => {
                warp.parted.push(Parted { at: target, meet, lanes: taken });
                (warp.at, warp.lanes) = (next, stay);
            }
            (true, false) => (warp.at, warp.lanes) = (target, taken),
            _ => (warp.at, warp.lanes) = (next, stay),
        }
        warp.meet = meet;
    }

    #[inline(always)]
    fn word(&self, slot: Slot) -> &[u32; LANES] {
        &self.warp.words[usize::from(slot)].0
    }

    #[inline(always)]
    fn double(&self, slot: Slot) -> &[u64; LANES] {
        &self.warp.doubles[usize::from(slot)].0
    }

    #[inline(always)]
    fn put_word(&mut self, slot: Slot, lanes: u32, value: &[u32; LANES]) {
        let place = &mut self.warp.words[usize::from(slot)].0;
        if lanes == FULL {
            *place = *value;
        } else {
            for lane in 0..LANES {
                place[lane] = if lanes >> lane & 1 == 1 { value[lane] } else { place[lane] };
            }
        }
    }

    #[inline(always)]
    fn put_double(&mut self, slot: Slot, lanes: u32, value: &[u64; LANES]) {
        let place = &mut self.warp.doubles[usize::from(slot)].0;
        if lanes == FULL {
            *place = *value;
        } else {
            for lane in 0..LANES {
                place[lane] = if lanes >> lane & 1 == 1 { value[lane] } else { place[lane] };
            }
        }
    }

    #[inline(always)]
    fn put_predicate(&mut self, slot: Slot, lanes: u32, value: u32) {
        let place = &mut self.warp.predicates[usize::from(slot)];
        *place = *place & !lanes | value & lanes;
    }

    /// An instruction that neither jumps nor stops the warp.
    #[inline(always)]
    fn operate(&mut self, op: Op, lanes: u32) -> Checked<()> {
        match op {
            Op::Unary32 { op, d, a } => {
                self.put_word(d, lanes, &arithmetic::unary32(op, self.word(a)));
            }
            Op::Binary32 { op, d, a, b } => {
                self.put_word(d, lanes, &arithmetic::binary32(op, self.word(a), self.word(b)));
            }
            Op::Ternary32 { op, d, a, b, c } => {
                self.put_word(d, lanes, &arithmetic::ternary32(op, self.word(a), self.word(b), self.word(c)));
            }
            Op::Lop3 { d, a, b, c, table } => {
                self.put_word(d, lanes, &arithmetic::lop3(table, self.word(a), self.word(b), self.word(c)));
            }
            Op::BitFieldInsert32 { d, a, b, c, e } => {
                let (a, b, c, e) = (self.word(a), self.word(b), self.word(c), self.word(e));
                let inserted = |lane: usize| insert_bits(a[lane].into(), b[lane].into(), c[lane], e[lane], 32) as u32;
                self.put_word(d, lanes, &each_lane(inserted));
            }
            Op::Float32 { op, mode, d, a, b, c } => {
                self.put_word(d, lanes, &arithmetic::float32(op, mode, self.word(a), self.word(b), self.word(c)));
            }
            Op::Bf16 { op, packed, relu, d, a, b, c } => {
                let value = arithmetic::bf16(op, packed, relu, self.word(a), self.word(b), self.word(c));
                self.put_word(d, lanes, &value);
            }
            Op::Unary64 { op, d, a } => {
                self.put_double(d, lanes, &arithmetic::unary64(op, self.double(a)));
            }
            Op::Binary64 { op, d, a, b } => {
                self.put_double(d, lanes, &arithmetic::binary64(op, self.double(a), self.double(b)));
            }
            Op::Ternary64 { op, d, a, b, c } => {
                self.put_double(d, lanes, &arithmetic::ternary64(op, self.double(a), self.double(b), self.double(c)));
            }
            Op::Shift64 { op, d, a, b } => {
                self.put_double(d, lanes, &arithmetic::shift64(op, self.double(a), self.word(b)));
            }
            Op::BitFieldExtract64 { signed, d, a, b, c } => {
                let (a, b, c) = (self.double(a), self.word(b), self.word(c));
                self.put_double(d, lanes, &each_lane(|lane| bit_field(a[lane], b[lane], c[lane], 64, signed)));
            }
            Op::BitFieldInsert64 { d, a, b, c, e } => {
                let (a, b, c, e) = (self.double(a), self.double(b), self.word(c), self.word(e));
                self.put_double(d, lanes, &each_lane(|lane| insert_bits(a[lane], b[lane], c[lane], e[lane], 64)));
            }
            Op::Widen { op, d, a } => {
                self.put_double(d, lanes, &arithmetic::widen(op, self.word(a)));
            }
            Op::Narrow { op, d, a } => {
                self.put_word(d, lanes, &arithmetic::narrow(op, self.double(a)));
            }
            Op::MultiplyWide { signed, d, a, b } => {
                self.put_double(d, lanes, &arithmetic::multiply_wide(signed, self.word(a), self.word(b)));
            }
            Op::MultiplyAddWide { signed, d, a, b, c } => {
                let product = arithmetic::multiply_wide(signed, self.word(a), self.word(b));
                let c = self.double(c);
                self.put_double(d, lanes, &each_lane(|lane| product[lane].wrapping_add(c[lane])));
            }
            Op::Convert { conversion, wide_source, result, d, a } => {
                self.convert(lanes, conversion, wide_source, result, d, a);
            }
            Op::PackHalves { d, low, high } => {
                let (low, high) = (self.word(low), self.word(high));
                self.put_word(d, lanes, &each_lane(|lane| low[lane] & 0xffff | high[lane] << 16));
            }
            Op::UnpackHalves { low, high, a } => {
                let a = *self.word(a);
                self.put_word(low, lanes, &each_lane(|lane| a[lane] & 0xffff));
                self.put_word(high, lanes, &each_lane(|lane| a[lane] >> 16));
            }
            Op::PackWords { d, low, high } => {
                let (low, high) = (self.word(low), self.word(high));
                self.put_double(d, lanes, &each_lane(|lane| u64::from(low[lane]) | u64::from(high[lane]) << 32));
            }
            Op::UnpackWords { low, high, a } => {
                let a = *self.double(a);
                self.put_word(low, lanes, &each_lane(|lane| a[lane] as u32));
                self.put_word(high, lanes, &each_lane(|lane| (a[lane] >> 32) as u32));
            }
            Op::PackQuarters { d, list } => {
                let mut packed = [0; LANES];
                for (part, &slot) in self.program.wide[list as usize][..4].iter().enumerate() {
                    for lane in 0..LANES {
                        packed[lane] |= u64::from(self.word(slot)[lane] & 0xffff) << (16 * part);
                    }
                }
                self.put_double(d, lanes, &packed);
            }
            Op::UnpackQuarters { a, list } => {
                let a = *self.double(a);
                for part in 0..4 {
                    let slot = self.program.wide[list as usize][part];
                    self.put_word(slot, lanes, &each_lane(|lane| (a[lane] >> (16 * part)) as u32 & 0xffff));
                }
            }
            Op::Compare { kind, comparison, combine, d, q, a, b, c } => {
                let holds = match kind {
                    CompareKind::U64 | CompareKind::S64 | CompareKind::F64 => {
                        arithmetic::compare64(kind, comparison, self.double(a), self.double(b))
                    }
                    _ => arithmetic::compare32(kind, comparison, self.word(a), self.word(b)),
                };
                let with = |negated: bool| {
                    let c = self.warp.predicates[usize::from(c)];
                    if negated { !c } else { c }
                };
                let join = |holds: u32| match combine {
                    Combine::None => holds,
                    Combine::And { negated } => holds & with(negated),
                    Combine::Or { negated } => holds | with(negated),
                    Combine::Xor { negated } => holds ^ with(negated),
                };
                let (holds, fails) = (join(holds), join(!holds));
                self.put_predicate(d, lanes, holds);
                if q != NO_SLOT {
                    self.put_predicate(q, lanes, fails);
                }
            }
            Op::Select32 { d, a, b, p } => {
                let choice = self.warp.predicates[usize::from(p)];
                let (a, b) = (self.word(a), self.word(b));
                let chosen = |lane: usize| if choice >> lane & 1 == 1 { a[lane] } else { b[lane] };
                self.put_word(d, lanes, &each_lane(chosen));
            }
            Op::Select64 { d, a, b, p } => {
                let choice = self.warp.predicates[usize::from(p)];
                let (a, b) = (self.double(a), self.double(b));
                let chosen = |lane: usize| if choice >> lane & 1 == 1 { a[lane] } else { b[lane] };
                self.put_double(d, lanes, &each_lane(chosen));
            }
            Op::SelectBySign { float, d, a, b, c } => {
                let (a, b, c) = (self.word(a), self.word(b), self.word(c));
                let first = |bits: u32| if float { f32::from_bits(bits) >= 0.0 } else { bits as i32 >= 0 };
                self.put_word(d, lanes, &each_lane(|lane| if first(c[lane]) { a[lane] } else { b[lane] }));
            }
            Op::Predicate { op, d, a, b } => {
                let (a, b) = (self.warp.predicates[usize::from(a)], self.warp.predicates[usize::from(b)]);
                let value = match op {
                    PredicateOp::Move => a,
                    PredicateOp::Not => !a,
                    PredicateOp::And => a & b,
                    PredicateOp::Or => a | b,
                    PredicateOp::Xor => a ^ b,
                };
                self.put_predicate(d, lanes, value);
            }
            Op::Load { space, element, count, read_only, atomic, address, d } => {
                self.load(lanes, space, element, usize::from(count), (read_only, atomic), address, d)?;
            }
            Op::Store { space, element, count, atomic, address, a } => {
                self.store(lanes, space, element, usize::from(count), atomic, address, a)?;
            }
            Op::Atomic { space, op, wide, d, address, b, c } => {
                self.atomic(lanes, space, op, wide, d, address, (b, c))?;
            }
            Op::CopyAsync { bytes, target, source, source_bytes } => {
                self.copy_async(lanes, bytes, target, source, source_bytes)?;
            }
            Op::CommitCopies => {
                for lane in 0..LANES {
                    self.warp.groups[lane] += lanes >> lane & 1;
                }
            }
            Op::WaitCopies { groups } => self.wait_copies(lanes, groups),
            Op::LoadMatrix { count, transposed, address, d } => {
                self.load_matrix(lanes, usize::from(count), transposed, address, d)?;
            }
            Op::StoreMatrix { count, transposed, address, a } => {
                self.store_matrix(lanes, usize::from(count), transposed, address, a)?;
            }
            Op::MatrixMultiply { shape, list } => {
                self.whole_warp(lanes, "mma.sync")?;
                let slots = self.program.wide[list as usize];
                let known = |slot: Slot| self.word(if slot == NO_SLOT { slots[4] } else { slot });
                let a = [known(slots[4]), known(slots[5]), known(slots[6]), known(slots[7])];
                let b = [known(slots[8]), known(slots[9])];
                let c = [known(slots[10]), known(slots[11]), known(slots[12]), known(slots[13])];
                let d = matrix::multiply(shape, a, b, c);
                for (&slot, value) in slots[..4].iter().zip(&d) {
                    self.put_word(slot, lanes, value);
                }
            }
            Op::Shuffle { mode, d, p, a, b, c, members } => {
                exchange::check_members(self.word(members), lanes, "shfl.sync")?;
                let (value, inside) = exchange::shuffle(mode, self.word(a), self.word(b), self.word(c), lanes)?;
                self.put_word(d, lanes, &value);
                if p != NO_SLOT {
                    self.put_predicate(p, lanes, inside);
                }
            }
            Op::Vote { op, d, a, negated, members } => {
                exchange::check_members(self.word(members), lanes, "vote.sync")?;
                let condition = self.warp.predicates[usize::from(a)];
                let value = exchange::vote(op, if negated { !condition } else { condition }, lanes);
                if op == VoteOp::Ballot {
                    self.put_word(d, lanes, &[value; LANES]);
                } else {
                    self.put_predicate(d, lanes, value);
                }
            }
            Op::Reduce { op, d, a, members } => {
                exchange::check_members(self.word(members), lanes, "redux.sync")?;
                let value = exchange::reduce(op, self.word(a), lanes);
                self.put_word(d, lanes, &[value; LANES]);
            }
            Op::ActiveMask { d } => self.put_word(d, lanes, &[lanes; LANES]),
            // Instructions that ran stand for time: the same in every run.
            Op::Clock32 { d, high } => {
                let clock = self.clock();
                self.put_word(d, lanes, &[if high { (clock >> 32) as u32 } else { clock as u32 }; LANES]);
            }
            Op::Clock64 { d } => {
                let clock = self.clock();
                self.put_double(d, lanes, &[clock; LANES]);
            }
            Op::WarpBarrier { members } => {
                exchange::check_members(self.word(members), lanes, "bar.warp.sync")?;
                self.memory.clock.synchronise_warp(self.warp.index);
            }
            Op::Fence => self.memory.clock.fence(),
            Op::Trap => {
                return Err(Raised::new(
                    lanes.trailing_zeros() as usize & 31,
                    "trap: the kernel stopped itself".to_owned(),
                ));
            }
            Op::Nothing => {}
            Op::Branch { .. } | Op::Exit | Op::Barrier { .. } => unreachable!("the loop above runs these"),
        }
        Ok(())
    }

    /// A conversion that is rare: one lane after the other.
    #[inline(never)]
    fn convert(&mut self, lanes: u32, conversion: Conversion, wide_source: bool, result: u8, d: Slot, a: Slot) {
        let converted: [u64; LANES] = each_lane(|lane| {
            let bits = if wide_source { self.double(a)[lane] } else { u64::from(self.word(a)[lane]) };
            let value = arithmetic::convert(conversion, bits);
            let extended = match arithmetic::sign_extends(conversion.to) {
                Some(bits) => ((value << (64 - bits)) as i64 >> (64 - bits)) as u64,
                None => value,
            };
            if result < 8 { extended & ((1 << (8 * result)) - 1) } else { extended }
        });
        if result == 8 {
            self.put_double(d, lanes, &converted);
        } else {
            self.put_word(d, lanes, &converted.map(|value| value as u32));
        }
    }

    fn clock(&self) -> u64 {
        super::block::BUDGET.wrapping_sub(self.warp.budget)
    }

    /// The warp arrives at a barrier.
    #[inline(never)]
    fn barrier(&mut self, lanes: u32, id: Slot, count: Slot, arrive: bool) -> Checked<Stop> {
        let first = lanes.trailing_zeros() as usize & 31;
        if lanes != self.warp.alive {
            let missing = self.warp.alive & !lanes;
            let lane = missing.trailing_zeros();
            let problem = format!(
                "only some threads of the warp reach this barrier: lanes {missing:#010x} (the first is {lane}) run elsewhere"
            );
            return Err(Raised::new(first, problem));
        }
        let id = self.word(id)[first];
        let count = if count == NO_SLOT { None } else { Some(self.word(count)[first]) };
        if id > 15 {
            return Err(Raised::new(first, format!("there is no barrier {id}: they have the numbers 0 to 15")));
        }
        if let Some(count) = count
            && (count == 0 || count % LANES as u32 != 0)
        {
            let problem = format!("{count} threads cannot meet at a barrier: it takes whole warps");
            return Err(Raised::new(first, problem));
        }
        if !arrive {
            self.warp.state = State::Waiting(id);
        }
        Ok(Stop::Barrier { id, count, waits: !arrive })
    }

    /// Checks that no lane is missing where the whole warp must take part.
    #[inline(always)]
    fn whole_warp(&self, lanes: u32, name: &str) -> Checked<()> {
        if lanes == FULL { Ok(()) } else { Err(missing_lanes(lanes, name)) }
    }

    #[cold]
    fn runaway(&self) -> Box<Raised> {
        let lane = self.warp.lanes.trailing_zeros() as usize & 31;
        let problem =
            "the thread's warp still runs after all the instructions that a block may take: a loop without end?";
        Raised::new(lane, problem.to_owned())
    }

    #[cold]
    fn check_guard(&self, instruction: Instruction) -> Checked<()> {
        let check = &self.program.checks[instruction.check as usize - 1];
        check.guard.map_or(Ok(()), |register| self.check_register(register, self.warp.lanes))
    }

    #[inline(never)]
    fn check_registers(&mut self, instruction: Instruction, lanes: u32) -> Checked<()> {
        let program = self.program;
        let Check { reads, writes, .. } = &program.checks[instruction.check as usize - 1];
        for &register in reads {
            self.check_register(register, lanes)?;
        }
        for &register in writes {
            self.warp.marks[usize::from(register)] |= lanes;
        }
        Ok(())
    }

    fn check_register(&self, register: u16, lanes: u32) -> Checked<()> {
        let unwritten = lanes & !self.warp.marks[usize::from(register)];
        if unwritten == 0 {
            return Ok(());
        }
        let name = &self.program.tracked[usize::from(register)];
        Err(Raised::new(
            unwritten.trailing_zeros() as usize,
            format!("reads the register {name}, which nothing has written"),
        ))
    }
}

#[cold]
fn missing_lanes(lanes: u32, name: &str) -> Box<Raised> {
    let problem = format!("{name} takes the whole warp, but only the lanes {lanes:#010x} are here");
    Raised::new(lanes.trailing_zeros() as usize & 31, problem)
}
