//! What PTX text is decoded to: instructions whose operands are slots of a warp's register file.
//!
//! A register file has three parts: predicates (one bit per lane), 32-bit slots (registers of 8, 16 and 32 bits) and 64-bit
//! slots. Constants, parameters and special registers are slots too, filled before the first instruction, so that every
//! source is a slot.

/// The place of a register in its part of the register file.
pub(super) type Slot = u16;

/// Stands for a result or source that is not there.
pub(super) const NO_SLOT: Slot = Slot::MAX;

/// Special registers that can be read.
pub(super) const SPECIAL_REGISTERS: [&str; 26] = [
    "%tid.x",
    "%tid.y",
    "%tid.z",
    "%ntid.x",
    "%ntid.y",
    "%ntid.z",
    "%ctaid.x",
    "%ctaid.y",
    "%ctaid.z",
    "%nctaid.x",
    "%nctaid.y",
    "%nctaid.z",
    "%laneid",
    "%warpid",
    "%nwarpid",
    "%lanemask_eq",
    "%lanemask_lt",
    "%lanemask_le",
    "%lanemask_gt",
    "%lanemask_ge",
    "%smid",
    "%nsmid",
    "%clock",
    "%clock_hi",
    "%clock64",
    "%globaltimer",
];

/// An entry, decoded.
pub(super) struct Program {
    pub name: String,
    pub instructions: Vec<Instruction>,
    /// Per instruction, what faults and statistics need of the text.
    pub places: Vec<Place>,
    /// Lines of the text, for messages.
    pub text: String,
    pub parameters: Vec<ProgramParameter>,
    pub required_block: Option<[u32; 3]>,
    pub shared: Vec<SharedPlace>,
    pub files: FileSizes,
    pub presets: Vec<Preset>,
    /// Register checks of instructions whose sources may be unwritten: ranges of `checked`.
    pub checks: Vec<Check>,
    /// Names of registers that are checked, by their index in a warp's marks.
    pub tracked: Vec<String>,
    /// Smallest access to global and to shared memory in bytes: 1, 2, 4, 8 or 16.
    pub global_granule: u32,
    pub shared_granule: u32,
    /// Operands that do not fit into an instruction.
    pub wide: Vec<[Slot; 16]>,
}

/// Slots per part of the register file.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct FileSizes {
    pub predicates: usize,
    pub words: usize,
    pub doubles: usize,
}

pub(super) struct ProgramParameter {
    pub name: String,
    pub bytes: u32,
}

/// A shared array's place in a block's shared memory.
pub(super) struct SharedPlace {
    pub name: String,
    pub offset: u32,
    /// `None` for the dynamic array.
    pub bytes: Option<u32>,
}

/// Where an instruction stands.
#[derive(Clone)]
pub(super) struct Place {
    pub line: u32,
    /// The name without qualifiers, for statistics.
    pub kind: String,
}

/// A slot that is filled before the first instruction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Preset {
    Word(Slot, u32),
    Double(Slot, u64),
    /// Lanes where it is true.
    Predicate(Slot, u32),
    /// The first four bytes of a parameter.
    ParameterWord(Slot, u16),
    /// A parameter of eight bytes.
    ParameterDouble(Slot, u16),
    Special(Slot, Special),
}

/// A special register that does not change while a block runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Special {
    Thread(u8),
    BlockExtent(u8),
    Block(u8),
    GridExtent(u8),
    Lane,
    Warp,
    WarpCount,
    LaneMaskEqual,
    LaneMaskLess,
    LaneMaskLessEqual,
    LaneMaskGreater,
    LaneMaskGreaterEqual,
    Processor,
    ProcessorCount,
}

/// Registers to check before an instruction, and to mark after it, by their index in a warp's marks.
#[derive(Clone, Debug, Default)]
pub(super) struct Check {
    pub guard: Option<u16>,
    pub reads: Vec<u16>,
    pub writes: Vec<u16>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Instruction {
    pub op: Op,
    /// The predicate under which it runs, or [`NO_SLOT`].
    pub guard: Slot,
    /// Whether it runs where the predicate is false.
    pub negated: bool,
    /// Index in [`Program::checks`] plus one; 0 for none.
    pub check: u32,
}

/// The place of memory in a register plus a constant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Address {
    pub base: Slot,
    /// Whether the base is a 64-bit slot.
    pub wide: bool,
    pub offset: i32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Space {
    Global,
    Shared,
    /// Global or shared, as the address says.
    Generic,
}

/// Width of one element in memory, and how it fills a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Element {
    U8,
    /// One byte, sign-extended to 16 bits.
    S8To16,
    /// One byte, sign-extended to 32 bits.
    S8,
    U16,
    S16,
    B32,
    B64,
    /// Narrower elements into 64-bit registers.
    U8To64,
    S8To64,
    U16To64,
    S16To64,
    U32To64,
    S32To64,
}

impl Element {
    pub fn bytes(self) -> u32 {
        match self {
            Self::U8 | Self::S8To16 | Self::S8 | Self::U8To64 | Self::S8To64 => 1,
            Self::U16 | Self::S16 | Self::U16To64 | Self::S16To64 => 2,
            Self::B32 | Self::U32To64 | Self::S32To64 => 4,
            Self::B64 => 8,
        }
    }

    /// Whether the register has 64 bits.
    pub fn wide(self) -> bool {
        use Element as E;
        matches!(self, E::B64 | E::U8To64 | E::S8To64 | E::U16To64 | E::S16To64 | E::U32To64 | E::S32To64)
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Op {
    Unary32 {
        op: Unary32,
        d: Slot,
        a: Slot,
    },
    Binary32 {
        op: Binary32,
        d: Slot,
        a: Slot,
        b: Slot,
    },
    Ternary32 {
        op: Ternary32,
        d: Slot,
        a: Slot,
        b: Slot,
        c: Slot,
    },
    Lop3 {
        d: Slot,
        a: Slot,
        b: Slot,
        c: Slot,
        table: u8,
    },
    BitFieldInsert32 {
        d: Slot,
        a: Slot,
        b: Slot,
        c: Slot,
        e: Slot,
    },
    /// f32 arithmetic with other rounding than to nearest, flushing of subnormal numbers, or saturation.
    Float32 {
        op: FloatOp,
        mode: FloatMode,
        d: Slot,
        a: Slot,
        b: Slot,
        c: Slot,
    },
    Bf16 {
        op: FloatOp,
        packed: bool,
        relu: bool,
        d: Slot,
        a: Slot,
        b: Slot,
        c: Slot,
    },
    Unary64 {
        op: Unary64,
        d: Slot,
        a: Slot,
    },
    Binary64 {
        op: Binary64,
        d: Slot,
        a: Slot,
        b: Slot,
    },
    Ternary64 {
        op: Ternary64,
        d: Slot,
        a: Slot,
        b: Slot,
        c: Slot,
    },
    Shift64 {
        op: Shift,
        d: Slot,
        a: Slot,
        b: Slot,
    },
    BitFieldExtract64 {
        signed: bool,
        d: Slot,
        a: Slot,
        b: Slot,
        c: Slot,
    },
    BitFieldInsert64 {
        d: Slot,
        a: Slot,
        b: Slot,
        c: Slot,
        e: Slot,
    },
    /// From 32 to 64 bits.
    Widen {
        op: Widen,
        d: Slot,
        a: Slot,
    },
    /// From 64 to 32 bits.
    Narrow {
        op: Narrow,
        d: Slot,
        a: Slot,
    },
    MultiplyWide {
        signed: bool,
        d: Slot,
        a: Slot,
        b: Slot,
    },
    MultiplyAddWide {
        signed: bool,
        d: Slot,
        a: Slot,
        b: Slot,
        c: Slot,
    },
    /// Any conversion, one lane after the other; `result` is the bytes of the register that it fills.
    Convert {
        conversion: Conversion,
        wide_source: bool,
        result: u8,
        d: Slot,
        a: Slot,
    },
    /// The lower half, then the upper half.
    PackHalves {
        d: Slot,
        low: Slot,
        high: Slot,
    },
    UnpackHalves {
        low: Slot,
        high: Slot,
        a: Slot,
    },
    PackWords {
        d: Slot,
        low: Slot,
        high: Slot,
    },
    UnpackWords {
        low: Slot,
        high: Slot,
        a: Slot,
    },
    /// Four 16-bit registers of `wide[list]`, the lowest first.
    PackQuarters {
        d: Slot,
        list: u32,
    },
    UnpackQuarters {
        a: Slot,
        list: u32,
    },
    Compare {
        kind: CompareKind,
        comparison: Comparison,
        combine: Combine,
        d: Slot,
        q: Slot,
        a: Slot,
        b: Slot,
        c: Slot,
    },
    Select32 {
        d: Slot,
        a: Slot,
        b: Slot,
        p: Slot,
    },
    Select64 {
        d: Slot,
        a: Slot,
        b: Slot,
        p: Slot,
    },
    SelectBySign {
        float: bool,
        d: Slot,
        a: Slot,
        b: Slot,
        c: Slot,
    },
    Predicate {
        op: PredicateOp,
        d: Slot,
        a: Slot,
        b: Slot,
    },
    Load {
        space: Space,
        element: Element,
        count: u8,
        read_only: bool,
        atomic: bool,
        address: Address,
        d: [Slot; 4],
    },
    Store {
        space: Space,
        element: Element,
        count: u8,
        atomic: bool,
        address: Address,
        a: [Slot; 4],
    },
    Atomic {
        space: Space,
        op: AtomicOp,
        wide: bool,
        d: Slot,
        address: Address,
        b: Slot,
        c: Slot,
    },
    CopyAsync {
        bytes: u8,
        target: Address,
        source: Address,
        source_bytes: Slot,
    },
    CommitCopies,
    /// Waits until at most so many groups are under way; `u32::MAX` for all copies, in groups or not.
    WaitCopies {
        groups: u32,
    },
    LoadMatrix {
        count: u8,
        transposed: bool,
        address: Address,
        d: [Slot; 4],
    },
    StoreMatrix {
        count: u8,
        transposed: bool,
        address: Address,
        a: [Slot; 4],
    },
    /// Slots in `wide[list]`: d (4), a (4), b (2), c (4).
    MatrixMultiply {
        shape: MatrixShape,
        list: u32,
    },
    Shuffle {
        mode: ShuffleMode,
        d: Slot,
        p: Slot,
        a: Slot,
        b: Slot,
        c: Slot,
        members: Slot,
    },
    Vote {
        op: VoteOp,
        d: Slot,
        a: Slot,
        negated: bool,
        members: Slot,
    },
    Reduce {
        op: ReduceOp,
        d: Slot,
        a: Slot,
        members: Slot,
    },
    ActiveMask {
        d: Slot,
    },
    Clock32 {
        d: Slot,
        high: bool,
    },
    Clock64 {
        d: Slot,
    },
    Barrier {
        id: Slot,
        count: Slot,
        arrive: bool,
        /// Whether it is the aligned form.
        aligned: bool,
    },
    WarpBarrier {
        members: Slot,
    },
    Fence,
    Branch {
        target: u32,
        meet: u32,
    },
    Exit,
    Trap,
    Nothing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unary32 {
    Move,
    Not,
    Not16,
    Negate,
    Negate16,
    Absolute,
    Absolute16,
    PopulationCount,
    LeadingZeros,
    FindU,
    FindS,
    FindShiftU,
    FindShiftS,
    Reverse,
    NegateF,
    AbsoluteF,
    Reciprocal,
    Root,
    ReciprocalRoot,
    Exp2,
    Log2,
    Sine,
    Cosine,
    Tanh,
    Exp2Bf16,
    TanhBf16,
    /// Conversions that are frequent.
    U32ToF32,
    S32ToF32,
    F32ToU32,
    F32ToS32,
    F32ToBf16,
    Bf16ToF32,
    SignExtend8,
    SignExtend16,
    ZeroExtend8,
    ZeroExtend16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Binary32 {
    Add,
    Subtract,
    Multiply,
    MultiplyHighU,
    MultiplyHighS,
    DivideU,
    DivideS,
    RemainderU,
    RemainderS,
    MinU,
    MinS,
    MaxU,
    MaxS,
    And,
    Or,
    Xor,
    ShiftLeft,
    ShiftRightU,
    ShiftRightS,
    Add16,
    Subtract16,
    Multiply16,
    MultiplyHighU16,
    MultiplyHighS16,
    DivideS16,
    RemainderS16,
    MinS16,
    MaxS16,
    ShiftLeft16,
    ShiftRightS16,
    MultiplyWideU16,
    MultiplyWideS16,
    AddF,
    SubtractF,
    MultiplyF,
    DivideF,
    MinF,
    MaxF,
    MinNanF,
    MaxNanF,
    /// Two f32 to two bf16, the first in the upper half.
    PackBf16,
    PackF16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ternary32 {
    MultiplyAdd,
    MultiplyAddHighU,
    MultiplyAddHighS,
    MultiplyAdd16,
    MultiplyAddWideU16,
    MultiplyAddWideS16,
    FusedMultiplyAdd,
    Permute,
    BitFieldExtractU,
    BitFieldExtractS,
    FunnelLeftWrap,
    FunnelLeftClamp,
    FunnelRightWrap,
    FunnelRightClamp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unary64 {
    Move,
    Not,
    Negate,
    Absolute,
    Reverse,
    NegateF,
    AbsoluteF,
    ReciprocalF,
    RootF,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Binary64 {
    Add,
    Subtract,
    Multiply,
    MultiplyHighU,
    MultiplyHighS,
    DivideU,
    DivideS,
    RemainderU,
    RemainderS,
    MinU,
    MinS,
    MaxU,
    MaxS,
    And,
    Or,
    Xor,
    AddF,
    SubtractF,
    MultiplyF,
    DivideF,
    MinF,
    MaxF,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ternary64 {
    MultiplyAdd,
    MultiplyAddHighU,
    MultiplyAddHighS,
    FusedMultiplyAddF,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shift {
    Left,
    RightU,
    RightS,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Widen {
    Zero,
    Sign,
    F32ToF64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Narrow {
    Low,
    PopulationCount,
    LeadingZeros,
    FindU,
    FindS,
    FindShiftU,
    FindShiftS,
    F64ToF32,
}

/// Floating-point operations in their general form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FloatOp {
    Add,
    Subtract,
    Multiply,
    FusedMultiplyAdd,
    Divide,
    Min,
    Max,
    MinNan,
    MaxNan,
    Negate,
    Absolute,
    Reciprocal,
    Root,
    ReciprocalRoot,
    Exp2,
    Log2,
    Sine,
    Cosine,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FloatMode {
    pub rounding: Rounding,
    /// Subnormal sources and results become zero.
    pub flush: bool,
    /// The result is kept between 0 and 1.
    pub saturate: bool,
}

/// Which neighbour an exact result is rounded to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rounding {
    NearestEven,
    /// To nearest, ties away from zero.
    NearestAway,
    Zero,
    Down,
    Up,
}

/// A conversion between two types of numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Conversion {
    pub from: NumberType,
    pub to: NumberType,
    pub rounding: Rounding,
    /// The result of a conversion to the same floating-point type is a whole number.
    pub whole: bool,
    pub flush: bool,
    pub saturate: bool,
    pub relu: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NumberType {
    U8,
    S8,
    U16,
    S16,
    U32,
    S32,
    U64,
    S64,
    F16,
    Bf16,
    Tf32,
    F32,
    F64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CompareKind {
    U32,
    S32,
    S16,
    F32,
    /// f32 with subnormal sources as zero.
    F32Flush,
    U64,
    S64,
    F64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
    EqualOrNan,
    NotEqualOrNan,
    LessOrNan,
    LessEqualOrNan,
    GreaterOrNan,
    GreaterEqualOrNan,
    Numbers,
    Nan,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Combine {
    None,
    And { negated: bool },
    Or { negated: bool },
    Xor { negated: bool },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PredicateOp {
    Move,
    Not,
    And,
    Or,
    Xor,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AtomicOp {
    Add,
    MinU,
    MinS,
    MaxU,
    MaxS,
    And,
    Or,
    Xor,
    Exchange,
    CompareAndSwap,
    Increment,
    Decrement,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MatrixShape {
    /// 16 × 16 by 16 × 8, bf16 in, f32 out.
    Bf16K16,
    /// 16 × 8 by 8 × 8, bf16 in, f32 out.
    Bf16K8,
    /// 16 × 8 by 8 × 8, tf32 in, f32 out.
    Tf32K8,
    /// 16 × 4 by 4 × 8, tf32 in, f32 out.
    Tf32K4,
    /// 16 × 16 by 16 × 8, f16 in, f32 out.
    F16K16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ShuffleMode {
    Up,
    Down,
    Butterfly,
    Index,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum VoteOp {
    Any,
    All,
    Uniform,
    Ballot,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReduceOp {
    Add,
    MinU,
    MinS,
    MaxU,
    MaxS,
    And,
    Or,
    Xor,
}
