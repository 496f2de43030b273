//! Registers and arithmetic.

use std::marker::PhantomData;
use std::ops::{Add, BitAnd, BitOr, BitXor, Mul, Neg, Not, Shl, Shr, Sub};

use super::Assembler;
use super::print::{Line, Piece};

/// A register type.
pub trait Type: Copy + 'static {
    /// How such registers are declared.
    const CLASS: &'static str;
    /// The first letters of unnamed ones.
    const PREFIX: &'static str;
    /// The type in an instruction that moves or chooses values.
    const BITS: &'static str;
    /// The type in arithmetic.
    const ARITHMETIC: &'static str;
}

macro_rules! types {
    ($($(#[$meta:meta])* $name:ident $class:literal $prefix:literal $bits:literal $arithmetic:literal;)*) => {$(
        $(#[$meta])*
        #[derive(Clone, Copy, Debug)]
        pub struct $name;

        impl Type for $name {
            const CLASS: &'static str = $class;
            const PREFIX: &'static str = $prefix;
            const BITS: &'static str = $bits;
            const ARITHMETIC: &'static str = $arithmetic;
        }
    )*};
}
types! {
    /// A truth value.
    Pred ".pred" "p" "pred" "pred";
    /// 16 bits: a bf16 as it is stored.
    U16 ".b16" "h" "b16" "u16";
    /// A 32-bit unsigned number, or 32 bits (two bf16, for one).
    U32 ".b32" "r" "b32" "u32";
    /// A 32-bit floating-point number.
    F32 ".f32" "f" "f32" "f32";
    /// A 64-bit unsigned number: large indices and addresses.
    U64 ".b64" "rd" "b64" "u64";
}

/// A register that was written once.
pub struct Value<'a, T> {
    pub(super) assembler: &'a Assembler,
    pub(super) id: usize,
    marker: PhantomData<T>,
}

impl<T> Clone for Value<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Value<'_, T> {}

/// What an instruction takes: a register, or a number of its type.
pub trait Operand<'a, T>: Copy {
    #[doc(hidden)]
    fn operand(self) -> OperandPiece;
}

/// The printed form of an [`Operand`].
#[derive(Clone)]
pub struct OperandPiece(pub(super) Piece);

impl<'a, T: Type> Operand<'a, T> for Value<'a, T> {
    fn operand(self) -> OperandPiece {
        OperandPiece(self.piece())
    }
}

impl<'a, T: Type> Operand<'a, T> for Variable<'a, T> {
    fn operand(self) -> OperandPiece {
        OperandPiece(self.get().piece())
    }
}

impl<'a> Operand<'a, U32> for u32 {
    fn operand(self) -> OperandPiece {
        OperandPiece(Piece::Text(self.to_string()))
    }
}

impl<'a> Operand<'a, U64> for u64 {
    fn operand(self) -> OperandPiece {
        OperandPiece(Piece::Text(self.to_string()))
    }
}

impl<'a> Operand<'a, F32> for f32 {
    fn operand(self) -> OperandPiece {
        OperandPiece(Piece::Text(format!("0f{:08X}", self.to_bits())))
    }
}

/// A register that changes.
///
/// [`Variable::get`] names the register itself: what was built from it before a [`Variable::set`] keeps its old value,
/// but a bare `get()` that is kept across a `set` sees the new one.
pub struct Variable<'a, T>(Value<'a, T>);

impl<T> Clone for Variable<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Variable<'_, T> {}

impl<'a, T: Type> Variable<'a, T> {
    /// The register.
    pub fn get(self) -> Value<'a, T> {
        self.0
    }

    /// Gives the register a name in the text.
    pub fn named(self, name: &'static str) -> Self {
        Self(self.0.named(name))
    }

    /// Overwrites the register. A value that the last instruction computed is written straight into it, and cannot be
    /// used on its own afterwards.
    pub fn set(self, value: impl Operand<'a, T>) {
        let assembler = self.0.assembler;
        let piece = value.operand().0;
        {
            let mut state = assembler.state.borrow_mut();
            let state = &mut *state;
            if let Piece::Register(fresh) = piece
                && fresh != self.0.id
                && state.registers[fresh].name.is_none()
                && let Some(Line::Instruction { predicate: None, pieces, .. }) = state.lines.last_mut()
                && let Some(Piece::Register(result)) = pieces.first_mut()
                && *result == fresh
            {
                *result = self.0.id;
                state.registers[fresh].moved = true;
                return;
            }
        }
        assembler.emit_effect(format!("mov.{}", T::BITS), vec![self.0.piece(), piece]);
    }
}

impl Assembler {
    /// A register that changes, with its first value.
    pub fn variable<'a, T: Type>(&'a self, initial: impl Operand<'a, T>) -> Variable<'a, T> {
        Variable(self.constant(initial))
    }

    /// A register with a given value: a number, or a copy of another register.
    pub fn constant<'a, T: Type>(&'a self, value: impl Operand<'a, T>) -> Value<'a, T> {
        self.emit(format!("mov.{}", T::BITS), vec![value.operand().0])
    }
}

impl<'a, T: Type> Value<'a, T> {
    pub(super) fn new(assembler: &'a Assembler, id: usize) -> Self {
        Self { assembler, id, marker: PhantomData }
    }

    pub(super) fn piece(self) -> Piece {
        Piece::Register(self.id)
    }

    /// Gives the register a name in the text.
    pub fn named(self, name: &'static str) -> Self {
        self.assembler.state.borrow_mut().registers[self.id].name = Some(name);
        self
    }

    fn binary<R: Type>(self, opcode: &str, other: impl Operand<'a, T>) -> Value<'a, R> {
        self.assembler.emit(opcode, vec![self.piece(), other.operand().0])
    }

    fn unary<R: Type>(self, opcode: &str) -> Value<'a, R> {
        self.assembler.emit(opcode, vec![self.piece()])
    }

    fn compare(self, comparison: &str, other: impl Operand<'a, T>) -> Value<'a, Pred> {
        self.binary(&format!("setp.{comparison}.{}", T::ARITHMETIC), other)
    }

    /// `self < other`; false with NaN.
    pub fn lt(self, other: impl Operand<'a, T>) -> Value<'a, Pred> {
        self.compare("lt", other)
    }

    /// `self ≤ other`; false with NaN.
    pub fn le(self, other: impl Operand<'a, T>) -> Value<'a, Pred> {
        self.compare("le", other)
    }

    /// `self > other`; false with NaN.
    pub fn gt(self, other: impl Operand<'a, T>) -> Value<'a, Pred> {
        self.compare("gt", other)
    }

    /// `self ≥ other`; false with NaN.
    pub fn ge(self, other: impl Operand<'a, T>) -> Value<'a, Pred> {
        self.compare("ge", other)
    }

    /// `self = other`; false with NaN.
    pub fn eq(self, other: impl Operand<'a, T>) -> Value<'a, Pred> {
        self.compare("eq", other)
    }

    /// `self ≠ other`; false with NaN.
    pub fn ne(self, other: impl Operand<'a, T>) -> Value<'a, Pred> {
        self.compare("ne", other)
    }

    /// The lesser; of a NaN and a number, the number.
    pub fn min(self, other: impl Operand<'a, T>) -> Self {
        self.binary(&format!("min.{}", T::ARITHMETIC), other)
    }

    /// The greater; of a NaN and a number, the number.
    pub fn max(self, other: impl Operand<'a, T>) -> Self {
        self.binary(&format!("max.{}", T::ARITHMETIC), other)
    }
}

impl<'a> Value<'a, Pred> {
    /// `self ? yes : no`.
    pub fn select<T: Type>(self, yes: impl Operand<'a, T>, no: impl Operand<'a, T>) -> Value<'a, T> {
        self.assembler.emit(format!("selp.{}", T::BITS), vec![yes.operand().0, no.operand().0, self.piece()])
    }
}

impl<'a> BitAnd for Value<'a, Pred> {
    type Output = Self;

    fn bitand(self, other: Self) -> Self {
        self.binary("and.pred", other)
    }
}

impl<'a> BitOr for Value<'a, Pred> {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        self.binary("or.pred", other)
    }
}

impl<'a> Not for Value<'a, Pred> {
    type Output = Self;

    fn not(self) -> Self {
        self.unary("not.pred")
    }
}

macro_rules! operators {
    ($($type:ident: $($trait:ident $method:ident $opcode:literal),*;)*) => {$($(
        impl<'a, R: Operand<'a, $type>> $trait<R> for Value<'a, $type> {
            type Output = Self;

            fn $method(self, other: R) -> Self {
                self.binary($opcode, other)
            }
        }
    )*)*};
}
operators! {
    F32: Add add "add.rn.f32", Sub sub "sub.rn.f32", Mul mul "mul.rn.f32";
    U32: Add add "add.u32", Sub sub "sub.u32", Mul mul "mul.lo.u32", BitAnd bitand "and.b32", BitOr bitor "or.b32",
        BitXor bitxor "xor.b32";
    U64: Add add "add.u64", Sub sub "sub.u64", Mul mul "mul.lo.u64";
}

impl<'a, R: Operand<'a, U32>> Shl<R> for Value<'a, U32> {
    type Output = Self;

    fn shl(self, bits: R) -> Self {
        self.binary("shl.b32", bits)
    }
}

impl<'a, R: Operand<'a, U32>> Shr<R> for Value<'a, U32> {
    type Output = Self;

    fn shr(self, bits: R) -> Self {
        self.binary("shr.u32", bits)
    }
}

impl<'a> Neg for Value<'a, F32> {
    type Output = Self;

    fn neg(self) -> Self {
        self.unary("neg.f32")
    }
}

impl<'a> Value<'a, U32> {
    /// `self / other`, rounded down.
    #[allow(clippy::should_implement_trait)] // an operator would hide how slow it is
    pub fn div(self, other: impl Operand<'a, U32>) -> Self {
        self.binary("div.u32", other)
    }

    /// `self mod other`.
    #[allow(clippy::should_implement_trait)] // an operator would hide how slow it is
    pub fn rem(self, other: impl Operand<'a, U32>) -> Self {
        self.binary("rem.u32", other)
    }

    /// `self · factor + addend`.
    pub fn mad(self, factor: impl Operand<'a, U32>, addend: impl Operand<'a, U32>) -> Self {
        self.assembler.emit("mad.lo.u32", vec![self.piece(), factor.operand().0, addend.operand().0])
    }

    /// The upper 32 bits of `self · factor`.
    pub fn mul_high(self, factor: impl Operand<'a, U32>) -> Self {
        self.binary("mul.hi.u32", factor)
    }

    /// `self · factor` in 64 bits.
    pub fn mul_wide(self, factor: impl Operand<'a, U32>) -> Value<'a, U64> {
        self.binary("mul.wide.u32", factor)
    }

    /// `self · factor + addend`, product and sum in 64 bits.
    pub fn mad_wide(self, factor: impl Operand<'a, U32>, addend: impl Operand<'a, U64>) -> Value<'a, U64> {
        self.assembler.emit("mad.wide.u32", vec![self.piece(), factor.operand().0, addend.operand().0])
    }

    /// How many bits are set.
    pub fn count_ones(self) -> Self {
        self.unary("popc.b32")
    }

    /// The same number in 64 bits.
    pub fn wide(self) -> Value<'a, U64> {
        self.unary("cvt.u64.u32")
    }

    /// The nearest f32.
    pub fn to_f32(self) -> Value<'a, F32> {
        self.unary("cvt.rn.f32.u32")
    }

    /// `self < other`, both signed.
    pub fn lt_signed(self, other: impl Operand<'a, U32>) -> Value<'a, Pred> {
        self.binary("setp.lt.s32", other)
    }

    /// `self ≥ other`, both signed.
    pub fn ge_signed(self, other: impl Operand<'a, U32>) -> Value<'a, Pred> {
        self.binary("setp.ge.s32", other)
    }

    /// The lesser, both signed.
    pub fn min_signed(self, other: impl Operand<'a, U32>) -> Self {
        self.binary("min.s32", other)
    }

    /// The greater, both signed.
    pub fn max_signed(self, other: impl Operand<'a, U32>) -> Self {
        self.binary("max.s32", other)
    }

    /// The f32 of these bits.
    pub fn as_f32(self) -> Value<'a, F32> {
        self.unary("mov.b32")
    }

    /// The two bf16 in these bits as f32: the lower half, then the upper half.
    pub fn unpack_bf16(self) -> [Value<'a, F32>; 2] {
        let upper = Piece::text("0xffff0000");
        [self.low_bf16(), self.assembler.emit("and.b32", vec![self.piece(), upper])]
    }

    /// The greater of the two bf16 in the lower halves beside that of the upper halves; of a NaN and a number, the number.
    pub fn max_bf16_pairs(self, other: Self) -> Self {
        self.binary("max.bf16x2", other)
    }

    /// The bf16 in the lower half as f32.
    pub fn low_bf16(self) -> Value<'a, F32> {
        self.assembler.emit("shl.b32", vec![self.piece(), Piece::text("16")])
    }
}

impl<'a> Value<'a, U64> {
    /// The lower 32 bits.
    pub fn narrow(self) -> Value<'a, U32> {
        self.unary("cvt.u32.u64")
    }

    /// `self · factor + addend`.
    pub fn mad(self, factor: impl Operand<'a, U64>, addend: impl Operand<'a, U64>) -> Self {
        self.assembler.emit("mad.lo.u64", vec![self.piece(), factor.operand().0, addend.operand().0])
    }

    /// `self / other`, rounded down: slow, for use once per thread.
    #[allow(clippy::should_implement_trait)] // an operator would hide how slow it is
    pub fn div(self, other: impl Operand<'a, U64>) -> Self {
        self.binary("div.u64", other)
    }

    /// `self mod other`: slow, for use once per thread.
    #[allow(clippy::should_implement_trait)] // an operator would hide how slow it is
    pub fn rem(self, other: impl Operand<'a, U64>) -> Self {
        self.binary("rem.u64", other)
    }
}

impl<'a> Value<'a, F32> {
    /// `self · factor + addend` with one rounding.
    pub fn fma(self, factor: impl Operand<'a, F32>, addend: impl Operand<'a, F32>) -> Self {
        self.assembler.emit("fma.rn.f32", vec![self.piece(), factor.operand().0, addend.operand().0])
    }

    /// `self / other`, correctly rounded.
    #[allow(clippy::should_implement_trait)] // an operator would hide how slow it is
    pub fn div(self, other: impl Operand<'a, F32>) -> Self {
        self.binary("div.rn.f32", other)
    }

    /// `1 / self`, to 1 unit in the last place.
    pub fn reciprocal(self) -> Self {
        self.unary("rcp.approx.f32")
    }

    /// `1 / self`, to 1 unit in the last place, in one instruction: results and arguments below 2⁻¹²⁶ count as zero.
    pub fn reciprocal_flushed(self) -> Self {
        self.unary("rcp.approx.ftz.f32")
    }

    /// `1 / √self`, to 2 units in the last place.
    pub fn reciprocal_root(self) -> Self {
        self.unary("rsqrt.approx.f32")
    }

    /// `√self`, correctly rounded.
    pub fn root(self) -> Self {
        self.unary("sqrt.rn.f32")
    }

    /// `2^self`, to 2 units in the last place.
    pub fn exp2(self) -> Self {
        self.unary("ex2.approx.f32")
    }

    /// `2^self`, to 2 units in the last place, in one instruction: results below 2⁻¹²⁶ are zero.
    pub fn exp2_flushed(self) -> Self {
        self.unary("ex2.approx.ftz.f32")
    }

    /// The binary logarithm, with an absolute error of 2⁻²² near 1.
    pub fn log2(self) -> Self {
        self.unary("lg2.approx.f32")
    }

    /// `e^self`. The argument's rounding to base 2 costs about `|self|` units in the last place.
    pub fn exp(self) -> Self {
        (self * std::f32::consts::LOG2_E).exp2()
    }

    /// The natural logarithm; absolute error about 2⁻²².
    pub fn ln(self) -> Self {
        self.log2() * std::f32::consts::LN_2
    }

    /// `1 / (1 + e^-self)`.
    pub fn sigmoid(self) -> Self {
        ((self * -std::f32::consts::LOG2_E).exp2() + 1.0).reciprocal()
    }

    /// `e^self`, to 4 units in the last place: what base 2 takes from the argument's precision is made good.
    pub fn exp_precise(self) -> Self {
        use std::f32::consts::{LN_2, LOG2_E};
        /// log₂ e less its nearest f32.
        const REST: f32 = 1.925_963e-8;
        let scaled = self * LOG2_E;
        // Kept small, so that infinite and huge arguments give the limits.
        let lost = self.fma(REST, self.fma(LOG2_E, -scaled)).max(-1.0).min(1.0);
        scaled.exp2() * lost.fma(LN_2, 1.0)
    }

    /// `1 / (1 + e^-self)`, to 6 units in the last place down to -87, where it falls below every normal number.
    pub fn sigmoid_precise(self) -> Self {
        ((-self).exp_precise() + 1.0).reciprocal()
    }

    /// `ln(1 + e^self)`, to 8 units in the last place.
    pub fn softplus(self) -> Self {
        // ln((1 + s) / (1 - s)) = 2 (s + s³/3 + s⁵/5 + …) with s = x / (2 + x), at most 1/3 for x = e^-|self|; the last
        // coefficient carries the truncated tail.
        let x = (-self.abs()).exp_precise();
        let s = x * (x + 2.0).reciprocal_flushed();
        let square = s * s;
        let polynomial = square.fma(0.0999, 1.0 / 9.0);
        let polynomial = [1.0f32 / 7.0, 1.0 / 5.0, 1.0 / 3.0]
            .into_iter()
            .fold(polynomial, |polynomial, coefficient| polynomial.fma(square, coefficient));
        let twice = s + s;
        twice.fma(polynomial * square, twice) + self.max(0.0)
    }

    /// The nearest bf16 (ties to even), as f32.
    pub fn round_to_bf16(self) -> Self {
        self.pack_bf16(self).low_bf16()
    }

    /// `1 / (1 + e^-self)` in fewer instructions: results below 2⁻¹²⁶ are zero.
    pub fn sigmoid_flushed(self) -> Self {
        ((self * -std::f32::consts::LOG2_E).exp2_flushed() + 1.0).reciprocal_flushed()
    }

    /// The absolute value.
    pub fn abs(self) -> Self {
        self.unary("abs.f32")
    }

    /// `self - other`, kept between 0 and 1; 0 for NaN.
    pub fn sub_saturated(self, other: impl Operand<'a, F32>) -> Self {
        self.binary("sub.sat.f32", other)
    }

    /// The greater; NaN when either is.
    pub fn max_or_nan(self, other: impl Operand<'a, F32>) -> Self {
        self.binary("max.NaN.f32", other)
    }

    /// The whole number below; 0 for negative numbers and NaN, the greatest u32 beyond it.
    pub fn truncate(self) -> Value<'a, U32> {
        self.unary("cvt.rzi.u32.f32")
    }

    /// The 32 bits.
    pub fn bits(self) -> Value<'a, U32> {
        self.unary("mov.b32")
    }

    /// The nearest bf16, ties to even.
    pub fn to_bf16(self) -> Value<'a, U16> {
        self.unary("cvt.rn.bf16.f32")
    }

    /// This as the lower bf16 of a pair, `upper` as the upper one; each the nearest, ties to even.
    pub fn pack_bf16(self, upper: Self) -> Value<'a, U32> {
        self.assembler.emit("cvt.rn.bf16x2.f32", vec![upper.piece(), self.piece()])
    }
}
