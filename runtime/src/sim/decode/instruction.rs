//! One instruction of the text made into one of the program. A match over names: the file reads like the index of the PTX
//! ISA's chapter of instructions.

use super::super::lexer::Number;
use super::super::program::{
    Binary32 as B32, Binary64 as B64, Combine, CompareKind, Comparison, Conversion, FloatMode, FloatOp, MatrixShape,
    NO_SLOT, Narrow, NumberType, Op, PredicateOp, ReduceOp, Rounding, Shift, ShuffleMode, Slot, Ternary32 as T32,
    Ternary64 as T64, Unary32 as U32, Unary64 as U64, VoteOp, Widen,
};
use super::super::syntax::{Instruction, Operand, Width};
use super::memory;
use super::operands::{Decoded, Operands, SHARED_WINDOW};

/// What qualifies an instruction's name: `.global`, `.f32`, … Each is taken once; one that nobody takes is unknown.
pub(super) struct Qualifiers<'a> {
    pub name: &'a str,
    rest: Vec<&'a str>,
}

impl<'a> Qualifiers<'a> {
    fn new(opcode: &'a str) -> Self {
        let mut parts = opcode.split('.');
        Self { name: parts.next().unwrap_or_default(), rest: parts.collect() }
    }

    /// Whether the qualifier is there; it is taken.
    pub fn takes(&mut self, qualifier: &str) -> bool {
        let position = self.rest.iter().position(|&one| one == qualifier);
        position.map(|position| self.rest.remove(position)).is_some()
    }

    /// Takes what is there of the table, and gives the entry's value.
    pub fn choose<T: Copy>(&mut self, table: &[(&str, T)]) -> Option<T> {
        table.iter().find(|(name, _)| self.takes(name)).map(|&(_, value)| value)
    }

    /// Takes the next qualifier.
    pub fn first(&mut self) -> Option<&'a str> {
        (!self.rest.is_empty()).then(|| self.rest.remove(0))
    }

    /// Takes qualifiers that make no difference here.
    pub fn ignore(&mut self, qualifiers: &[&str]) {
        for qualifier in qualifiers {
            self.takes(qualifier);
        }
    }

    /// Takes every qualifier that the condition holds for.
    pub fn ignore_if(&mut self, condition: impl Fn(&str) -> bool) {
        self.rest.retain(|qualifier| !condition(qualifier));
    }

    /// The type at the end, taken.
    pub fn kind(&mut self) -> Decoded<&'a str> {
        self.rest.pop().ok_or_else(|| format!("the type of {} is missing", self.name))
    }

    fn done(&self) -> Decoded<()> {
        match self.rest.first() {
            Some(unknown) => Err(format!("the simulator does not know `.{unknown}` of {}", self.name)),
            None => Ok(()),
        }
    }
}

/// The instruction's operation; branches get their targets later. The instruction's registers are noted in `operands`.
///
/// # Errors
/// What the simulator does not know, or does not agree with.
pub(super) fn decode<'a>(instruction: &Instruction<'a>, operands: &mut Operands<'_, 'a>) -> Decoded<Op> {
    let mut qualifiers = Qualifiers::new(instruction.opcode);
    let decoder = Decoder { from: instruction, to: operands };
    let op = decoder.operation(&mut qualifiers)?;
    qualifiers.done()?;
    Ok(op)
}

pub(super) struct Decoder<'d, 'e, 'a> {
    pub from: &'d Instruction<'a>,
    pub to: &'d mut Operands<'e, 'a>,
}

const ROUNDINGS: [(&str, Rounding); 5] = [
    ("rn", Rounding::NearestEven),
    ("rz", Rounding::Zero),
    ("rm", Rounding::Down),
    ("rp", Rounding::Up),
    ("rna", Rounding::NearestAway),
];

const PLAIN: FloatMode = FloatMode { rounding: Rounding::NearestEven, flush: false, saturate: false };

impl<'d, 'a> Decoder<'d, '_, 'a> {
    fn operation(mut self, q: &mut Qualifiers<'a>) -> Decoded<Op> {
        match q.name {
            "mov" => self.mov(q),
            "ld" | "ldu" => memory::load(&mut self, q),
            "st" => memory::store(&mut self, q),
            "atom" | "red" => memory::atomic(&mut self, q),
            "cp" => memory::copy(&mut self, q),
            "ldmatrix" | "stmatrix" => memory::matrix(&mut self, q),
            "prefetch" | "prefetchu" | "discard" | "applypriority" => {
                q.ignore_if(|_| true);
                Ok(Op::Nothing)
            }
            "cvta" => self.cvta(q),
            "cvt" => self.cvt(q),
            "add" | "sub" | "mul" | "mad" | "fma" | "div" | "rem" | "min" | "max" | "neg" | "abs" => self.arithmetic(q),
            "and" | "or" | "xor" | "not" | "shl" | "shr" => self.logic(q),
            "lop3" => {
                q.ignore(&["b32"]);
                let [d, a, b, c, table] = self.operands()?;
                let table = number(table, "the table")?;
                let table = u8::try_from(table).map_err(|_| format!("the table {table} has more than 8 bits"))?;
                let (a, b, c) = (self.to.word(a)?, self.to.word(b)?, self.to.word(c)?);
                Ok(Op::Lop3 { d: self.to.word_result(d)?, a, b, c, table })
            }
            "prmt" => {
                q.ignore(&["b32"]);
                self.ternary32(T32::Permute)
            }
            "shf" => {
                let op = match (q.choose(&[("l", true), ("r", false)]), q.choose(&[("wrap", true), ("clamp", false)])) {
                    (Some(true), Some(true)) => T32::FunnelLeftWrap,
                    (Some(true), Some(false)) => T32::FunnelLeftClamp,
                    (Some(false), Some(true)) => T32::FunnelRightWrap,
                    (Some(false), Some(false)) => T32::FunnelRightClamp,
                    _ => return Err("shf wants `.l` or `.r`, and `.wrap` or `.clamp`".to_owned()),
                };
                q.ignore(&["b32"]);
                self.ternary32(op)
            }
            "bfe" | "bfi" | "popc" | "clz" | "bfind" | "brev" => self.bits(q),
            "setp" => self.setp(q),
            "selp" => {
                let [d, a, b, p] = self.operands()?;
                let kind = q.kind()?;
                let (p, negated) = self.to.predicate(p)?;
                let (a, b) = if negated { (b, a) } else { (a, b) };
                Ok(match width(kind)? {
                    8 => {
                        let (a, b) = (self.double(kind, a)?, self.double(kind, b)?);
                        Op::Select64 { d: self.to.double_result(d)?, a, b, p }
                    }
                    bytes => {
                        let (a, b) = (self.narrow(kind, a)?, self.narrow(kind, b)?);
                        Op::Select32 { d: self.narrow_result(bytes, d)?, a, b, p }
                    }
                })
            }
            "slct" => {
                let float = match q.kind()? {
                    "f32" => true,
                    "s32" => false,
                    other => return Err(format!("slct chooses by an s32 or f32, not by `.{other}`")),
                };
                q.ignore(&["ftz"]);
                let kind = q.kind()?;
                let [d, a, b, c] = self.operands()?;
                if width(kind)? != 4 {
                    return Err(format!("the simulator knows slct of 32 bits, not of `.{kind}`"));
                }
                let (a, b, c) = (self.narrow(kind, a)?, self.narrow(kind, b)?, self.to.word(c)?);
                Ok(Op::SelectBySign { float, d: self.to.word_result(d)?, a, b, c })
            }
            "ex2" | "lg2" | "rcp" | "rsqrt" | "sqrt" | "sin" | "cos" | "tanh" => self.function(q),
            "bra" => {
                q.ignore(&["uni"]);
                match self.operands()? {
                    [Operand::Label(_)] => Ok(Op::Branch { target: 0, meet: 0 }),
                    _ => Err("bra wants a label".to_owned()),
                }
            }
            "ret" | "exit" => {
                q.ignore(&["uni"]);
                let [] = self.operands()?;
                Ok(Op::Exit)
            }
            "trap" => Ok(Op::Trap),
            "bar" | "barrier" => self.barrier(q),
            "shfl" => self.shuffle(q),
            "vote" => self.vote(q),
            "redux" => self.redux(q),
            "activemask" => {
                q.ignore(&["b32"]);
                let [d] = self.operands()?;
                Ok(Op::ActiveMask { d: self.to.word_result(d)? })
            }
            "membar" | "fence" => {
                q.ignore_if(|qualifier| {
                    ["sc", "acq_rel", "acquire", "release", "cta", "cluster", "gpu", "gl", "sys", "level"]
                        .contains(&qualifier)
                });
                Ok(Op::Fence)
            }
            "nanosleep" | "griddepcontrol" => {
                q.ignore_if(|_| true);
                Ok(Op::Nothing)
            }
            "mma" => self.mma(q),
            name => Err(format!("the simulator does not know the instruction {name}")),
        }
    }

    /// The operands, when there are as many as wanted.
    pub fn operands<const N: usize>(&self) -> Decoded<[&'d Operand<'a>; N]> {
        let operands: &'d [Operand<'a>] = &self.from.operands;
        if operands.len() != N {
            return Err(format!("{} wants {N} operands, not {}", self.from.opcode, operands.len()));
        }
        Ok(std::array::from_fn(|index| &operands[index]))
    }

    /// A source of a type of 16 or 32 bits.
    fn narrow(&mut self, kind: &str, operand: &Operand<'a>) -> Decoded<Slot> {
        match kind {
            "f32" => self.to.float(operand),
            _ if width(kind)? == 2 => self.to.half(operand),
            _ => self.to.word(operand),
        }
    }

    /// A source of a type of 64 bits.
    fn double(&mut self, kind: &str, operand: &Operand<'a>) -> Decoded<Slot> {
        if kind == "f64" { self.to.double_float(operand) } else { self.to.double(operand) }
    }

    /// A result of so many bytes, at most 4.
    fn narrow_result(&mut self, bytes: u32, operand: &Operand<'a>) -> Decoded<Slot> {
        if bytes == 2 { self.to.half_result(operand) } else { self.to.word_result(operand) }
    }

    fn unary32(&mut self, kind: &str, op: U32) -> Decoded<Op> {
        let [d, a] = self.operands()?;
        let a = self.narrow(kind, a)?;
        Ok(Op::Unary32 { op, d: self.narrow_result(width(kind)?, d)?, a })
    }

    fn unary64(&mut self, kind: &str, op: U64) -> Decoded<Op> {
        let [d, a] = self.operands()?;
        let a = self.double(kind, a)?;
        Ok(Op::Unary64 { op, d: self.to.double_result(d)?, a })
    }

    fn binary32(&mut self, kind: &str, op: B32) -> Decoded<Op> {
        let [d, a, b] = self.operands()?;
        let (a, b) = (self.narrow(kind, a)?, self.narrow(kind, b)?);
        Ok(Op::Binary32 { op, d: self.narrow_result(width(kind)?, d)?, a, b })
    }

    fn binary64(&mut self, kind: &str, op: B64) -> Decoded<Op> {
        let [d, a, b] = self.operands()?;
        let (a, b) = (self.double(kind, a)?, self.double(kind, b)?);
        Ok(Op::Binary64 { op, d: self.to.double_result(d)?, a, b })
    }

    fn ternary32(&mut self, op: T32) -> Decoded<Op> {
        let [d, a, b, c] = self.operands()?;
        let (a, b, c) = (self.to.word(a)?, self.to.word(b)?, self.to.word(c)?);
        Ok(Op::Ternary32 { op, d: self.to.word_result(d)?, a, b, c })
    }

    /// f32 arithmetic in its general form.
    fn float32(&mut self, op: FloatOp, mode: FloatMode) -> Decoded<Op> {
        let (d, sources) = self.from.operands.split_first().ok_or("operands are missing")?;
        let wanted = match op {
            FloatOp::FusedMultiplyAdd => 3,
            FloatOp::Add | FloatOp::Subtract | FloatOp::Multiply | FloatOp::Divide => 2,
            FloatOp::Min | FloatOp::Max | FloatOp::MinNan | FloatOp::MaxNan => 2,
            _ => 1,
        };
        if sources.len() != wanted {
            return Err(format!("{} wants {} operands, not {}", self.from.opcode, wanted + 1, sources.len() + 1));
        }
        let mut slots = [0; 3];
        for (slot, source) in slots.iter_mut().zip(sources) {
            *slot = self.to.float(source)?;
        }
        for index in wanted..3 {
            slots[index] = slots[0];
        }
        let [a, b, c] = slots;
        Ok(Op::Float32 { op, mode, d: self.to.word_result(d)?, a, b, c })
    }

    fn mov(&mut self, q: &mut Qualifiers<'a>) -> Decoded<Op> {
        let kind = q.kind()?;
        let [d, a] = self.operands()?;
        if let (Operand::Register(_), Operand::Special(name @ ("%clock" | "%clock_hi" | "%clock64" | "%globaltimer"))) =
            (d, a)
        {
            return Ok(match *name {
                "%clock" => Op::Clock32 { d: self.to.word_result(d)?, high: false },
                "%clock_hi" => Op::Clock32 { d: self.to.word_result(d)?, high: true },
                _ => Op::Clock64 { d: self.to.double_result(d)? },
            });
        }
        let bytes = if kind == "pred" { 0 } else { width(kind)? };
        if let (4, Operand::Special(name)) = (bytes, a) {
            let a = self.to.special(name)?;
            return Ok(Op::Unary32 { op: U32::Move, d: self.to.word_result(d)?, a });
        }
        match (bytes, d, a) {
            (0, _, _) => {
                let (a, negated) = self.to.predicate(a)?;
                let op = if negated { PredicateOp::Not } else { PredicateOp::Move };
                Ok(Op::Predicate { op, d: self.to.predicate_result(d)?, a, b: a })
            }
            (4, _, Operand::Vector(halves)) => {
                let [low, high] = halves.as_slice() else { return Err("two registers of 16 bits make 32".to_owned()) };
                let (low, high) = (self.to.half(low)?, self.to.half(high)?);
                Ok(Op::PackHalves { d: self.to.word_result(d)?, low, high })
            }
            (4, Operand::Vector(halves), _) => {
                let [low, high] = halves.as_slice() else { return Err("32 bits make two registers of 16".to_owned()) };
                let a = self.to.word(a)?;
                Ok(Op::UnpackHalves { low: self.to.half_result(low)?, high: self.to.half_result(high)?, a })
            }
            (8, _, Operand::Vector(parts)) => match parts.as_slice() {
                [low, high] => {
                    let (low, high) = (self.to.word(low)?, self.to.word(high)?);
                    Ok(Op::PackWords { d: self.to.double_result(d)?, low, high })
                }
                [_, _, _, _] => {
                    let quarters = parts.iter().map(|part| self.to.half(part)).collect::<Decoded<Vec<_>>>()?;
                    let list = self.to.keep(&quarters);
                    Ok(Op::PackQuarters { d: self.to.double_result(d)?, list })
                }
                _ => Err("two registers of 32 bits, or four of 16, make 64".to_owned()),
            },
            (8, Operand::Vector(parts), _) => {
                let a = self.to.double(a)?;
                match parts.as_slice() {
                    [low, high] => {
                        Ok(Op::UnpackWords { low: self.to.word_result(low)?, high: self.to.word_result(high)?, a })
                    }
                    [_, _, _, _] => {
                        let quarters =
                            parts.iter().map(|part| self.to.half_result(part)).collect::<Decoded<Vec<_>>>()?;
                        Ok(Op::UnpackQuarters { list: self.to.keep(&quarters), a })
                    }
                    _ => Err("64 bits make two registers of 32, or four of 16".to_owned()),
                }
            }
            (8, _, _) => self.unary64(kind, U64::Move),
            (2 | 4, _, _) => self.unary32(kind, U32::Move),
            _ => Err(format!("the simulator does not know mov of `.{kind}`")),
        }
    }

    fn cvta(&mut self, q: &mut Qualifiers<'a>) -> Decoded<Op> {
        let to = q.takes("to");
        let shared = match q.choose(&[("global", false), ("shared", true), ("shared::cta", true)]) {
            Some(shared) => shared,
            None => return Err("the simulator knows cvta of .global and .shared".to_owned()),
        };
        if q.kind()? != "u64" {
            return Err("addresses have 64 bits here: cvta wants .u64".to_owned());
        }
        if !shared {
            return self.unary64("u64", U64::Move);
        }
        let [d, a] = self.operands()?;
        let a = self.to.double(a)?;
        let b = self.to.constant64(if to { SHARED_WINDOW.wrapping_neg() } else { SHARED_WINDOW });
        Ok(Op::Binary64 { op: B64::Add, d: self.to.double_result(d)?, a, b })
    }

    fn arithmetic(&mut self, q: &mut Qualifiers<'a>) -> Decoded<Op> {
        let kind = q.kind()?;
        match kind {
            "f32" => self.arithmetic_f32(q),
            "f64" => self.arithmetic_f64(q),
            "bf16" | "bf16x2" => self.arithmetic_bf16(q, kind),
            "u16" | "s16" => self.arithmetic_16(q, kind),
            "u32" | "s32" => self.arithmetic_32(q, kind),
            "u64" | "s64" => self.arithmetic_64(q, kind),
            _ => Err(format!("the simulator does not know {} of `.{kind}`", q.name)),
        }
    }

    fn arithmetic_f32(&mut self, q: &mut Qualifiers<'a>) -> Decoded<Op> {
        let rounding = q.choose(&ROUNDINGS[..4]);
        let (flush, saturate) = (q.takes("ftz"), q.takes("sat"));
        let approximate = q.takes("approx") | q.takes("full");
        let nan = q.takes("NaN");
        let mode = FloatMode { rounding: rounding.unwrap_or(Rounding::NearestEven), flush, saturate };
        let (general, plain) = match q.name {
            "add" => (FloatOp::Add, Some(B32::AddF)),
            "sub" => (FloatOp::Subtract, Some(B32::SubtractF)),
            "mul" => (FloatOp::Multiply, Some(B32::MultiplyF)),
            "div" if rounding.is_none() && !approximate => {
                return Err("div.f32 wants a rounding, `.approx` or `.full`".to_owned());
            }
            "div" => (FloatOp::Divide, Some(B32::DivideF)),
            "min" if nan => (FloatOp::MinNan, Some(B32::MinNanF)),
            "max" if nan => (FloatOp::MaxNan, Some(B32::MaxNanF)),
            "min" => (FloatOp::Min, Some(B32::MinF)),
            "max" => (FloatOp::Max, Some(B32::MaxF)),
            "fma" | "mad" if rounding.is_none() => return Err(format!("{}.f32 wants a rounding", q.name)),
            "fma" | "mad" => (FloatOp::FusedMultiplyAdd, None),
            "neg" if mode == PLAIN => return self.unary32("f32", U32::NegateF),
            "abs" if mode == PLAIN => return self.unary32("f32", U32::AbsoluteF),
            "neg" => (FloatOp::Negate, None),
            "abs" => (FloatOp::Absolute, None),
            _ => return Err(format!("there is no {} of f32", q.name)),
        };
        match plain {
            Some(op) if mode == PLAIN => self.binary32("f32", op),
            None if mode == PLAIN && general == FloatOp::FusedMultiplyAdd => {
                let [d, a, b, c] = self.operands()?;
                let (a, b, c) = (self.to.float(a)?, self.to.float(b)?, self.to.float(c)?);
                Ok(Op::Ternary32 { op: T32::FusedMultiplyAdd, d: self.to.word_result(d)?, a, b, c })
            }
            _ => self.float32(general, mode),
        }
    }

    fn arithmetic_f64(&mut self, q: &mut Qualifiers<'a>) -> Decoded<Op> {
        let rounded = q.takes("rn");
        match q.name {
            "add" => self.binary64("f64", B64::AddF),
            "sub" => self.binary64("f64", B64::SubtractF),
            "mul" => self.binary64("f64", B64::MultiplyF),
            "div" if rounded => self.binary64("f64", B64::DivideF),
            "min" => self.binary64("f64", B64::MinF),
            "max" => self.binary64("f64", B64::MaxF),
            "neg" => self.unary64("f64", U64::NegateF),
            "abs" => self.unary64("f64", U64::AbsoluteF),
            "fma" | "mad" if rounded => {
                let [d, a, b, c] = self.operands()?;
                let (a, b, c) = (self.to.double_float(a)?, self.to.double_float(b)?, self.to.double_float(c)?);
                Ok(Op::Ternary64 { op: T64::FusedMultiplyAddF, d: self.to.double_result(d)?, a, b, c })
            }
            "div" | "fma" | "mad" => Err(format!("the simulator knows {}.rn.f64 only", q.name)),
            _ => Err(format!("there is no {} of f64", q.name)),
        }
    }

    fn arithmetic_bf16(&mut self, q: &mut Qualifiers<'a>, kind: &str) -> Decoded<Op> {
        q.ignore(&["rn"]);
        let (nan, relu) = (q.takes("NaN"), q.takes("relu"));
        let op = match (q.name, nan) {
            ("add", _) => FloatOp::Add,
            ("sub", _) => FloatOp::Subtract,
            ("mul", _) => FloatOp::Multiply,
            ("fma", _) => FloatOp::FusedMultiplyAdd,
            ("min", false) => FloatOp::Min,
            ("max", false) => FloatOp::Max,
            ("min", true) => FloatOp::MinNan,
            ("max", true) => FloatOp::MaxNan,
            ("neg", _) => FloatOp::Negate,
            ("abs", _) => FloatOp::Absolute,
            _ => return Err(format!("there is no {} of {kind}", q.name)),
        };
        if relu && op != FloatOp::FusedMultiplyAdd {
            return Err(format!("there is no .relu of {}", q.name));
        }
        let packed = kind == "bf16x2";
        let (d, sources) = self.from.operands.split_first().ok_or("operands are missing")?;
        let wanted = match op {
            FloatOp::FusedMultiplyAdd => 3,
            FloatOp::Negate | FloatOp::Absolute => 1,
            _ => 2,
        };
        if sources.len() != wanted {
            return Err(format!("{} wants {} operands, not {}", self.from.opcode, wanted + 1, sources.len() + 1));
        }
        let mut slots = [0; 3];
        for (slot, source) in slots.iter_mut().zip(sources) {
            *slot = if packed { self.to.word(source)? } else { self.to.half(source)? };
        }
        for index in wanted..3 {
            slots[index] = slots[0];
        }
        let [a, b, c] = slots;
        let d = if packed { self.to.word_result(d)? } else { self.to.half_result(d)? };
        Ok(Op::Bf16 { op, packed, relu, d, a, b, c })
    }

    /// Which part of a product is wanted.
    fn part(&self, q: &mut Qualifiers<'a>) -> Decoded<Part> {
        q.choose(&[("lo", Part::Low), ("hi", Part::High), ("wide", Part::Wide)])
            .ok_or_else(|| format!("{} of whole numbers wants `.lo`, `.hi` or `.wide`", q.name))
    }

    fn arithmetic_16(&mut self, q: &mut Qualifiers<'a>, kind: &str) -> Decoded<Op> {
        let signed = kind == "s16";
        let either = |u, s| if signed { s } else { u };
        let op = match q.name {
            "add" => B32::Add16,
            "sub" => B32::Subtract16,
            "mul" => match self.part(q)? {
                Part::Low => B32::Multiply16,
                Part::High => either(B32::MultiplyHighU16, B32::MultiplyHighS16),
                Part::Wide => {
                    let op = either(B32::MultiplyWideU16, B32::MultiplyWideS16);
                    let [d, a, b] = self.operands()?;
                    let (a, b) = (self.to.half(a)?, self.to.half(b)?);
                    return Ok(Op::Binary32 { op, d: self.to.word_result(d)?, a, b });
                }
            },
            "mad" => {
                let [d, a, b, c] = self.operands()?;
                let (a, b) = (self.to.half(a)?, self.to.half(b)?);
                return match self.part(q)? {
                    Part::Low => {
                        let c = self.to.half(c)?;
                        Ok(Op::Ternary32 { op: T32::MultiplyAdd16, d: self.to.half_result(d)?, a, b, c })
                    }
                    Part::Wide => {
                        let op = if signed { T32::MultiplyAddWideS16 } else { T32::MultiplyAddWideU16 };
                        let c = self.to.word(c)?;
                        Ok(Op::Ternary32 { op, d: self.to.word_result(d)?, a, b, c })
                    }
                    Part::High => Err(format!("the simulator does not know mad.hi of {kind}")),
                };
            }
            "div" => either(B32::DivideU, B32::DivideS16),
            "rem" => either(B32::RemainderU, B32::RemainderS16),
            "min" => either(B32::MinU, B32::MinS16),
            "max" => either(B32::MaxU, B32::MaxS16),
            "neg" if signed => return self.unary32(kind, U32::Negate16),
            "abs" if signed => return self.unary32(kind, U32::Absolute16),
            _ => return Err(format!("there is no {} of {kind}", q.name)),
        };
        self.binary32(kind, op)
    }

    fn arithmetic_32(&mut self, q: &mut Qualifiers<'a>, kind: &str) -> Decoded<Op> {
        let signed = kind == "s32";
        let either = |u, s| if signed { s } else { u };
        let op = match q.name {
            "add" => B32::Add,
            "sub" => B32::Subtract,
            "mul" => match self.part(q)? {
                Part::Low => B32::Multiply,
                Part::High => either(B32::MultiplyHighU, B32::MultiplyHighS),
                Part::Wide => {
                    let [d, a, b] = self.operands()?;
                    let (a, b) = (self.to.word(a)?, self.to.word(b)?);
                    return Ok(Op::MultiplyWide { signed, d: self.to.double_result(d)?, a, b });
                }
            },
            "mad" => match self.part(q)? {
                Part::Low => return self.ternary32(T32::MultiplyAdd),
                Part::High if signed => return self.ternary32(T32::MultiplyAddHighS),
                Part::High => return self.ternary32(T32::MultiplyAddHighU),
                Part::Wide => {
                    let [d, a, b, c] = self.operands()?;
                    let (a, b, c) = (self.to.word(a)?, self.to.word(b)?, self.to.double(c)?);
                    return Ok(Op::MultiplyAddWide { signed, d: self.to.double_result(d)?, a, b, c });
                }
            },
            "div" => either(B32::DivideU, B32::DivideS),
            "rem" => either(B32::RemainderU, B32::RemainderS),
            "min" => either(B32::MinU, B32::MinS),
            "max" => either(B32::MaxU, B32::MaxS),
            "neg" if signed => return self.unary32(kind, U32::Negate),
            "abs" if signed => return self.unary32(kind, U32::Absolute),
            _ => return Err(format!("there is no {} of {kind}", q.name)),
        };
        self.binary32(kind, op)
    }

    fn arithmetic_64(&mut self, q: &mut Qualifiers<'a>, kind: &str) -> Decoded<Op> {
        let signed = kind == "s64";
        let either = |u, s| if signed { s } else { u };
        let op = match q.name {
            "add" => B64::Add,
            "sub" => B64::Subtract,
            "mul" => match self.part(q)? {
                Part::Low => B64::Multiply,
                Part::High => either(B64::MultiplyHighU, B64::MultiplyHighS),
                Part::Wide => return Err("there is no mul.wide of 64 bits".to_owned()),
            },
            "mad" => {
                let op = match self.part(q)? {
                    Part::Low => T64::MultiplyAdd,
                    Part::High if signed => T64::MultiplyAddHighS,
                    Part::High => T64::MultiplyAddHighU,
                    Part::Wide => return Err("there is no mad.wide of 64 bits".to_owned()),
                };
                let [d, a, b, c] = self.operands()?;
                let (a, b, c) = (self.to.double(a)?, self.to.double(b)?, self.to.double(c)?);
                return Ok(Op::Ternary64 { op, d: self.to.double_result(d)?, a, b, c });
            }
            "div" => either(B64::DivideU, B64::DivideS),
            "rem" => either(B64::RemainderU, B64::RemainderS),
            "min" => either(B64::MinU, B64::MinS),
            "max" => either(B64::MaxU, B64::MaxS),
            "neg" if signed => return self.unary64(kind, U64::Negate),
            "abs" if signed => return self.unary64(kind, U64::Absolute),
            _ => return Err(format!("there is no {} of {kind}", q.name)),
        };
        self.binary64(kind, op)
    }

    fn logic(&mut self, q: &mut Qualifiers<'a>) -> Decoded<Op> {
        let kind = q.kind()?;
        if kind == "pred" {
            let op = match q.name {
                "and" => PredicateOp::And,
                "or" => PredicateOp::Or,
                "xor" => PredicateOp::Xor,
                "not" => {
                    let [d, a] = self.operands()?;
                    let a = self.to.plain_predicate(a)?;
                    return Ok(Op::Predicate { op: PredicateOp::Not, d: self.to.predicate_result(d)?, a, b: a });
                }
                _ => return Err(format!("there is no {} of predicates", q.name)),
            };
            let [d, a, b] = self.operands()?;
            let (a, b) = (self.to.plain_predicate(a)?, self.to.plain_predicate(b)?);
            return Ok(Op::Predicate { op, d: self.to.predicate_result(d)?, a, b });
        }
        let bytes = width(kind)?;
        let signed = kind.starts_with('s');
        let of_bits = kind.starts_with('b');
        let of_numbers = kind.starts_with(['u', 's']);
        if !(of_bits || (q.name == "shr" && of_numbers)) {
            return Err(format!("there is no {} of {kind}", q.name));
        }
        match (q.name, bytes) {
            ("not", 2) => self.unary32(kind, U32::Not16),
            ("not", 4) => self.unary32(kind, U32::Not),
            ("not", 8) => self.unary64(kind, U64::Not),
            ("shl" | "shr", 8) => {
                let [d, a, b] = self.operands()?;
                let (a, b) = (self.to.double(a)?, self.to.word(b)?);
                let op = match (q.name, signed) {
                    ("shl", _) => Shift::Left,
                    (_, true) => Shift::RightS,
                    _ => Shift::RightU,
                };
                Ok(Op::Shift64 { op, d: self.to.double_result(d)?, a, b })
            }
            ("shl" | "shr", _) => {
                let [d, a, b] = self.operands()?;
                let (a, b) = (self.narrow(kind, a)?, self.to.word(b)?);
                let op = match (q.name, bytes, signed) {
                    ("shl", 2, _) => B32::ShiftLeft16,
                    ("shl", _, _) => B32::ShiftLeft,
                    (_, 2, true) => B32::ShiftRightS16,
                    (_, _, true) => B32::ShiftRightS,
                    _ => B32::ShiftRightU,
                };
                Ok(Op::Binary32 { op, d: self.narrow_result(bytes, d)?, a, b })
            }
            ("and", 8) => self.binary64(kind, B64::And),
            ("or", 8) => self.binary64(kind, B64::Or),
            ("xor", 8) => self.binary64(kind, B64::Xor),
            ("and", _) => self.binary32(kind, B32::And),
            ("or", _) => self.binary32(kind, B32::Or),
            _ => self.binary32(kind, B32::Xor),
        }
    }

    /// Bit fields and bit counts.
    fn bits(&mut self, q: &mut Qualifiers<'a>) -> Decoded<Op> {
        let kind = q.kind()?;
        let wide = match width(kind)? {
            4 => false,
            8 => true,
            _ => return Err(format!("there is no {} of {kind}", q.name)),
        };
        let signed = kind.starts_with('s');
        let shift = q.takes("shiftamt");
        match q.name {
            "bfe" if wide => {
                let [d, a, b, c] = self.operands()?;
                let (a, b, c) = (self.to.double(a)?, self.to.word(b)?, self.to.word(c)?);
                Ok(Op::BitFieldExtract64 { signed, d: self.to.double_result(d)?, a, b, c })
            }
            "bfe" => self.ternary32(if signed { T32::BitFieldExtractS } else { T32::BitFieldExtractU }),
            "bfi" => {
                let [d, a, b, c, e] = self.operands()?;
                if wide {
                    let (a, b) = (self.to.double(a)?, self.to.double(b)?);
                    let (c, e) = (self.to.word(c)?, self.to.word(e)?);
                    return Ok(Op::BitFieldInsert64 { d: self.to.double_result(d)?, a, b, c, e });
                }
                let (a, b, c, e) = (self.to.word(a)?, self.to.word(b)?, self.to.word(c)?, self.to.word(e)?);
                Ok(Op::BitFieldInsert32 { d: self.to.word_result(d)?, a, b, c, e })
            }
            "brev" if wide => self.unary64(kind, U64::Reverse),
            "brev" => self.unary32(kind, U32::Reverse),
            name => {
                let (narrow, word) = match (name, signed, shift) {
                    ("popc", ..) => (Narrow::PopulationCount, U32::PopulationCount),
                    ("clz", ..) => (Narrow::LeadingZeros, U32::LeadingZeros),
                    (_, false, false) => (Narrow::FindU, U32::FindU),
                    (_, true, false) => (Narrow::FindS, U32::FindS),
                    (_, false, true) => (Narrow::FindShiftU, U32::FindShiftU),
                    (_, true, true) => (Narrow::FindShiftS, U32::FindShiftS),
                };
                if !wide {
                    return self.unary32(kind, word);
                }
                let [d, a] = self.operands()?;
                let a = self.to.double(a)?;
                Ok(Op::Narrow { op: narrow, d: self.to.word_result(d)?, a })
            }
        }
    }

    fn setp(&mut self, q: &mut Qualifiers<'a>) -> Decoded<Op> {
        use Comparison as C;
        let kind = q.kind()?;
        let flush = q.takes("ftz");
        let comparison = q.choose(&[
            ("eq", C::Equal),
            ("ne", C::NotEqual),
            ("lt", C::Less),
            ("le", C::LessEqual),
            ("gt", C::Greater),
            ("ge", C::GreaterEqual),
            ("lo", C::Less),
            ("ls", C::LessEqual),
            ("hi", C::Greater),
            ("hs", C::GreaterEqual),
            ("equ", C::EqualOrNan),
            ("neu", C::NotEqualOrNan),
            ("ltu", C::LessOrNan),
            ("leu", C::LessEqualOrNan),
            ("gtu", C::GreaterOrNan),
            ("geu", C::GreaterEqualOrNan),
            ("num", C::Numbers),
            ("nan", C::Nan),
        ]);
        let comparison = comparison.ok_or("setp wants a comparison, such as `.lt`")?;
        let compare = match kind {
            "b16" | "u16" | "b32" | "u32" => CompareKind::U32,
            "s16" => CompareKind::S16,
            "s32" => CompareKind::S32,
            "b64" | "u64" => CompareKind::U64,
            "s64" => CompareKind::S64,
            "f32" if flush => CompareKind::F32Flush,
            "f32" => CompareKind::F32,
            "f64" => CompareKind::F64,
            _ => return Err(format!("the simulator does not know setp of `.{kind}`")),
        };
        let unordered =
            !matches!(comparison, C::Equal | C::NotEqual | C::Less | C::LessEqual | C::Greater | C::GreaterEqual);
        if unordered && !kind.starts_with('f') {
            return Err(format!("this comparison is one of floating-point numbers, not of {kind}"));
        }
        let combine = q.choose(&[
            ("and", Combine::And { negated: false }),
            ("or", Combine::Or { negated: false }),
            ("xor", Combine::Xor { negated: false }),
        ]);
        let (d, a, b, c) = match combine {
            None => {
                let [d, a, b] = self.operands()?;
                (d, a, b, None)
            }
            Some(_) => {
                let [d, a, b, c] = self.operands()?;
                (d, a, b, Some(c))
            }
        };
        let (a, b) = match width(kind)? {
            8 => (self.double(kind, a)?, self.double(kind, b)?),
            _ => (self.narrow(kind, a)?, self.narrow(kind, b)?),
        };
        let (c, negated) = match c {
            Some(c) => self.to.predicate(c)?,
            None => (NO_SLOT, false),
        };
        let combine = match combine {
            None => Combine::None,
            Some(Combine::And { .. }) => Combine::And { negated },
            Some(Combine::Or { .. }) => Combine::Or { negated },
            Some(_) => Combine::Xor { negated },
        };
        let (d, p) = self.to.predicate_results(d)?;
        Ok(Op::Compare { kind: compare, comparison, combine, d, q: p, a, b, c })
    }

    /// Functions of one number.
    fn function(&mut self, q: &mut Qualifiers<'a>) -> Decoded<Op> {
        let kind = q.kind()?;
        let approximate = q.takes("approx");
        let rounding = q.choose(&ROUNDINGS[..4]);
        let flush = q.takes("ftz");
        if kind == "f64" {
            return match q.name {
                "rcp" if rounding == Some(Rounding::NearestEven) => self.unary64(kind, U64::ReciprocalF),
                "sqrt" if rounding == Some(Rounding::NearestEven) => self.unary64(kind, U64::RootF),
                name => Err(format!("the simulator knows rcp.rn and sqrt.rn of f64, not {name}")),
            };
        }
        if kind == "bf16" && approximate {
            return match q.name {
                "ex2" => self.unary32("b16", U32::Exp2Bf16),
                "tanh" => self.unary32("b16", U32::TanhBf16),
                name => Err(format!("the simulator does not know {name} of bf16")),
            };
        }
        if kind != "f32" {
            return Err(format!("the simulator does not know {} of `.{kind}`", q.name));
        }
        if approximate == rounding.is_some() {
            return Err(format!("{}.f32 wants `.approx`, or a rounding where there is one", q.name));
        }
        let (plain, general) = match q.name {
            "rcp" => (U32::Reciprocal, FloatOp::Reciprocal),
            "sqrt" => (U32::Root, FloatOp::Root),
            _ if !approximate => return Err(format!("there is no rounding of {}", q.name)),
            "rsqrt" => (U32::ReciprocalRoot, FloatOp::ReciprocalRoot),
            "ex2" => (U32::Exp2, FloatOp::Exp2),
            "lg2" => (U32::Log2, FloatOp::Log2),
            "sin" => (U32::Sine, FloatOp::Sine),
            "cos" => (U32::Cosine, FloatOp::Cosine),
            "tanh" if !flush => (U32::Tanh, FloatOp::Absolute),
            _ => return Err("there is no .ftz of tanh".to_owned()),
        };
        let mode = FloatMode { rounding: rounding.unwrap_or(Rounding::NearestEven), flush, saturate: false };
        if mode == PLAIN { self.unary32(kind, plain) } else { self.float32(general, mode) }
    }

    fn cvt(&mut self, q: &mut Qualifiers<'a>) -> Decoded<Op> {
        let from = q.kind()?;
        let to = q.kind()?;
        let whole = q.choose(&[
            ("rni", Rounding::NearestEven),
            ("rzi", Rounding::Zero),
            ("rmi", Rounding::Down),
            ("rpi", Rounding::Up),
        ]);
        let rounding = q.choose(&ROUNDINGS);
        let (flush, saturate, relu) = (q.takes("ftz"), q.takes("sat"), q.takes("relu"));
        if (to, from) == ("bf16x2", "f32") || (to, from) == ("f16x2", "f32") {
            if rounding != Some(Rounding::NearestEven) || relu || saturate {
                return Err(format!("the simulator knows cvt.rn.{to}.f32 only"));
            }
            let [d, a, b] = self.operands()?;
            let (a, b) = (self.to.float(a)?, self.to.float(b)?);
            let op = if to == "bf16x2" { B32::PackBf16 } else { B32::PackF16 };
            return Ok(Op::Binary32 { op, d: self.to.word_result(d)?, a, b });
        }
        let (to, from) = (number_type(to)?, number_type(from)?);
        let (float_to, float_from) = (is_float(to), is_float(from));
        let narrower = float_to && (!float_from || bytes_of(to) < bytes_of(from) || to == NumberType::Tf32);
        let rounded = match (float_to, float_from) {
            (_, true) if !float_to => {
                whole.ok_or("a conversion to whole numbers wants a rounding, such as `.rzi`".to_owned())?
            }
            (true, true) if to == from => whole.unwrap_or(Rounding::Zero),
            (true, _) if narrower => {
                rounding.ok_or("this conversion rounds: it wants a rounding, such as `.rn`".to_owned())?
            }
            _ if rounding.is_some() || whole.is_some() => return Err("this conversion does not round".to_owned()),
            _ => Rounding::NearestEven,
        };
        let conversion =
            Conversion { from, to, rounding: rounded, whole: whole.is_some() && to == from, flush, saturate, relu };
        let [d, a] = self.operands()?;
        let (a, wide_source) = self.to.at_least(a, bytes_of(from), float_from)?;
        let (d, register) = self.to.result_at_least(d, bytes_of(to))?;
        let wide_result = register == Width::B64;
        Ok(conversion_op(conversion, (a, wide_source), (d, wide_result, register)))
    }

    fn barrier(&mut self, q: &mut Qualifiers<'a>) -> Decoded<Op> {
        if q.takes("warp") {
            if !q.takes("sync") {
                return Err("bar.warp wants `.sync`".to_owned());
            }
            let [members] = self.operands()?;
            return Ok(Op::WarpBarrier { members: self.to.word(members)? });
        }
        q.ignore(&["cta"]);
        // `bar` is short for the aligned form of `barrier`.
        let aligned = q.takes("aligned") || q.name == "bar";
        let arrive = match q.choose(&[("sync", false), ("arrive", true)]) {
            Some(arrive) => arrive,
            None => return Err("the simulator knows bar.sync, bar.arrive and bar.warp.sync".to_owned()),
        };
        let (id, count) = match self.from.operands.as_slice() {
            [id] if !arrive => (id, None),
            [id, count] => (id, Some(count)),
            _ => return Err("a barrier wants its number, and how many threads arrive".to_owned()),
        };
        let id = self.to.word(id)?;
        let count = count.map_or(Ok(NO_SLOT), |count| self.to.word(count))?;
        Ok(Op::Barrier { id, count, arrive, aligned })
    }

    fn shuffle(&mut self, q: &mut Qualifiers<'a>) -> Decoded<Op> {
        let synchronised = q.takes("sync");
        q.ignore(&["b32"]);
        let mode = q.choose(&[
            ("up", ShuffleMode::Up),
            ("down", ShuffleMode::Down),
            ("bfly", ShuffleMode::Butterfly),
            ("idx", ShuffleMode::Index),
        ]);
        let (Some(mode), true) = (mode, synchronised) else {
            return Err("shfl wants `.sync`, and one of `.up`, `.down`, `.bfly`, `.idx`".to_owned());
        };
        let [d, a, b, c, members] = self.operands()?;
        let (a, b, c, members) = (self.to.word(a)?, self.to.word(b)?, self.to.word(c)?, self.to.word(members)?);
        let (d, p) = match d {
            Operand::Pair(d, p) => {
                let d = self.to.word_result(&Operand::Register(*d))?;
                (d, self.to.predicate_result(&Operand::Register(*p))?)
            }
            _ => (self.to.word_result(d)?, NO_SLOT),
        };
        Ok(Op::Shuffle { mode, d, p, a, b, c, members })
    }

    fn vote(&mut self, q: &mut Qualifiers<'a>) -> Decoded<Op> {
        let synchronised = q.takes("sync");
        let op = q.choose(&[
            ("any", VoteOp::Any),
            ("all", VoteOp::All),
            ("uni", VoteOp::Uniform),
            ("ballot", VoteOp::Ballot),
        ]);
        let (Some(op), true) = (op, synchronised) else {
            return Err("vote wants `.sync`, and one of `.any`, `.all`, `.uni`, `.ballot`".to_owned());
        };
        q.ignore(if op == VoteOp::Ballot { &["b32"] } else { &["pred"] });
        let [d, a, members] = self.operands()?;
        let ((a, negated), members) = (self.to.predicate(a)?, self.to.word(members)?);
        let d = if op == VoteOp::Ballot { self.to.word_result(d)? } else { self.to.predicate_result(d)? };
        Ok(Op::Vote { op, d, a, negated, members })
    }

    fn redux(&mut self, q: &mut Qualifiers<'a>) -> Decoded<Op> {
        let kind = q.kind()?;
        let synchronised = q.takes("sync");
        let name = q.first().unwrap_or_default();
        let op = match (name, kind) {
            ("add", "u32" | "s32") => ReduceOp::Add,
            ("min", "u32") => ReduceOp::MinU,
            ("min", "s32") => ReduceOp::MinS,
            ("max", "u32") => ReduceOp::MaxU,
            ("max", "s32") => ReduceOp::MaxS,
            ("and", "b32") => ReduceOp::And,
            ("or", "b32") => ReduceOp::Or,
            ("xor", "b32") => ReduceOp::Xor,
            _ => return Err(format!("there is no redux.{name} of {kind}")),
        };
        if !synchronised {
            return Err("redux wants `.sync`".to_owned());
        }
        let [d, a, members] = self.operands()?;
        let (a, members) = (self.to.word(a)?, self.to.word(members)?);
        Ok(Op::Reduce { op, d: self.to.word_result(d)?, a, members })
    }

    fn mma(&mut self, q: &mut Qualifiers<'a>) -> Decoded<Op> {
        q.ignore(&["sync", "aligned", "row", "col"]);
        let shape = q.first().unwrap_or_default();
        let types: Vec<&str> = std::iter::from_fn(|| q.first()).collect();
        let shape = match (shape, types.as_slice()) {
            ("m16n8k16", ["f32", "bf16", "bf16", "f32"]) => MatrixShape::Bf16K16,
            ("m16n8k8", ["f32", "bf16", "bf16", "f32"]) => MatrixShape::Bf16K8,
            ("m16n8k16", ["f32", "f16", "f16", "f32"]) => MatrixShape::F16K16,
            ("m16n8k8", ["f32", "tf32", "tf32", "f32"]) => MatrixShape::Tf32K8,
            ("m16n8k4", ["f32", "tf32", "tf32", "f32"]) => MatrixShape::Tf32K4,
            _ => return Err(format!("the simulator does not know mma of {shape} and types {}", types.join(", "))),
        };
        let (a_count, b_count) = match shape {
            MatrixShape::Bf16K16 | MatrixShape::F16K16 | MatrixShape::Tf32K8 => (4, 2),
            MatrixShape::Bf16K8 | MatrixShape::Tf32K4 => (2, 1),
        };
        let [d, a, b, c] = self.operands()?;
        let mut slots = [NO_SLOT; 14];
        let (d, a, b, c) = (self.to.elements(d), self.to.elements(a), self.to.elements(b), self.to.elements(c));
        if [d.len(), a.len(), b.len(), c.len()] != [4, a_count, b_count, 4] {
            return Err(format!("this mma wants vectors of 4, {a_count}, {b_count} and 4 registers"));
        }
        for (at, operand) in a.iter().enumerate() {
            slots[4 + at] = self.to.word(operand)?;
        }
        for (at, operand) in b.iter().enumerate() {
            slots[8 + at] = self.to.word(operand)?;
        }
        for (at, operand) in c.iter().enumerate() {
            slots[10 + at] = self.to.float(operand)?;
        }
        for (at, operand) in d.iter().enumerate() {
            slots[at] = self.to.word_result(operand)?;
        }
        Ok(Op::MatrixMultiply { shape, list: self.to.keep(&slots) })
    }
}

#[derive(Clone, Copy)]
enum Part {
    Low,
    High,
    Wide,
}

/// Bytes of a type of 16, 32 or 64 bits.
pub(super) fn width(kind: &str) -> Decoded<u32> {
    match super::super::syntax::type_bytes(kind) {
        Some(bytes @ (2 | 4 | 8)) => Ok(bytes),
        _ => Err(format!("the simulator does not know the type `.{kind}` here")),
    }
}

/// A number in the text.
fn number(operand: &Operand<'_>, what: &str) -> Decoded<u64> {
    match operand {
        Operand::Number(Number::Integer(value)) => Ok(*value),
        _ => Err(format!("{what} must be a number")),
    }
}

fn number_type(name: &str) -> Decoded<NumberType> {
    use NumberType as N;
    Ok(match name {
        "u8" => N::U8,
        "s8" => N::S8,
        "u16" => N::U16,
        "s16" => N::S16,
        "u32" => N::U32,
        "s32" => N::S32,
        "u64" => N::U64,
        "s64" => N::S64,
        "f16" => N::F16,
        "bf16" => N::Bf16,
        "tf32" => N::Tf32,
        "f32" => N::F32,
        "f64" => N::F64,
        _ => return Err(format!("the simulator does not know the type `.{name}` of conversions")),
    })
}

fn is_float(kind: NumberType) -> bool {
    use NumberType as N;
    matches!(kind, N::F16 | N::Bf16 | N::Tf32 | N::F32 | N::F64)
}

fn bytes_of(kind: NumberType) -> u32 {
    use NumberType as N;
    match kind {
        N::U8 | N::S8 => 1,
        N::U16 | N::S16 | N::F16 | N::Bf16 => 2,
        N::U32 | N::S32 | N::F32 | N::Tf32 => 4,
        N::U64 | N::S64 | N::F64 => 8,
    }
}

/// The quick operation for frequent conversions, or else the general one.
fn conversion_op(conversion: Conversion, (a, wide_source): (Slot, bool), (d, wide, width): (Slot, bool, Width)) -> Op {
    use NumberType as N;
    let nearest = conversion.rounding == Rounding::NearestEven;
    let plain = !(conversion.flush || conversion.saturate || conversion.relu || conversion.whole);
    let (from, to) = (conversion.from, conversion.to);
    match (from, to) {
        (N::U32, N::F32) if plain && nearest && !wide_source && !wide => Op::Unary32 { op: U32::U32ToF32, d, a },
        (N::S32, N::F32) if plain && nearest && !wide_source && !wide => Op::Unary32 { op: U32::S32ToF32, d, a },
        (N::F32, N::U32) if plain && conversion.rounding == Rounding::Zero && !wide_source && !wide => {
            Op::Unary32 { op: U32::F32ToU32, d, a }
        }
        (N::F32, N::S32) if plain && conversion.rounding == Rounding::Zero && !wide_source && !wide => {
            Op::Unary32 { op: U32::F32ToS32, d, a }
        }
        (N::F32, N::Bf16) if plain && nearest && width == Width::B16 => Op::Unary32 { op: U32::F32ToBf16, d, a },
        (N::Bf16, N::F32) if plain && !wide => Op::Unary32 { op: U32::Bf16ToF32, d, a },
        (N::F32, N::F64) if plain && !wide_source => Op::Widen { op: Widen::F32ToF64, d, a },
        (N::F64, N::F32) if plain && nearest && !wide => Op::Narrow { op: Narrow::F64ToF32, d, a },
        (N::U32, N::U64 | N::S64) if plain && !wide_source => Op::Widen { op: Widen::Zero, d, a },
        (N::S32, N::U64 | N::S64) if plain && !wide_source => Op::Widen { op: Widen::Sign, d, a },
        (N::U64 | N::S64, N::U32 | N::S32) if plain && !wide => Op::Narrow { op: Narrow::Low, d, a },
        (N::U16, N::U32 | N::S32) if plain && !wide_source && !wide => Op::Unary32 { op: U32::ZeroExtend16, d, a },
        (N::S16, N::U32 | N::S32) if plain && !wide_source && !wide => Op::Unary32 { op: U32::SignExtend16, d, a },
        (N::U8, N::U32 | N::S32) if plain && !wide_source && !wide => Op::Unary32 { op: U32::ZeroExtend8, d, a },
        (N::S8, N::U32 | N::S32) if plain && !wide_source && !wide => Op::Unary32 { op: U32::SignExtend8, d, a },
        _ => Op::Convert {
            conversion,
            wide_source,
            result: match width {
                Width::B8 => 1,
                Width::B16 => 2,
                Width::B64 => 8,
                _ => 4,
            },
            d,
            a,
        },
    }
}
