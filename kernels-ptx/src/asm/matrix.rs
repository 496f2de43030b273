//! Tensor-core products and the loads of their fragments.
//!
//! Fragments of `mma.m16n8k16` (PTX ISA, "Matrix Fragments for mma.m16n8k16"), for lane `l` with `g = l / 4` and
//! `t = l mod 4`; each register holds two neighbouring bf16:
//!
//! - A (16 × 16, rows × k): a0 = (g, 2t), a1 = (g + 8, 2t), a2 = (g, 2t + 8), a3 = (g + 8, 2t + 8)
//! - B (16 × 8, k × columns): b0 = (2t, g), b1 = (2t + 8, g), pairs along k
//! - C and D (16 × 8, f32): c0 = (g, 2t), c1 = (g, 2t + 1), c2 = (g + 8, 2t), c3 = (g + 8, 2t + 1)

use super::Assembler;
use super::memory::Address;
use super::print::Piece;
use super::value::{F32, U32, Value, Variable};

impl Assembler {
    /// Four 8 × 8 matrices of bf16 from shared memory: lane `l` gives the place of row `l mod 8` of matrix `l / 8` (16
    /// bytes, aligned), and receives of each matrix the pair at row `l / 4`, columns `2 (l mod 4)` and the next.
    pub fn load_matrices<'a>(&'a self, row: Address<'a>) -> [Value<'a, U32>; 4] {
        self.ldmatrix("ldmatrix.sync.aligned.m8n8.x4.shared.b16", row)
    }

    /// As [`Assembler::load_matrices`], each matrix transposed: the lane receives rows `2 (l mod 4)` and the next of
    /// column `l / 4`.
    pub fn load_matrices_transposed<'a>(&'a self, row: Address<'a>) -> [Value<'a, U32>; 4] {
        self.ldmatrix("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", row)
    }

    fn ldmatrix<'a>(&'a self, opcode: &str, row: Address<'a>) -> [Value<'a, U32>; 4] {
        assert!(row.is_shared(), "matrices are loaded from shared memory");
        let parts: [Value<'a, U32>; 4] = std::array::from_fn(|_| self.register());
        self.emit_effect(opcode, vec![Piece::Vector(parts.iter().map(|part| part.id).collect()), row.piece()]);
        parts
    }

    /// `accumulator += a b` for a 16 × 16 by 16 × 8 product of bf16, accumulated in f32, by the whole warp.
    pub fn multiply_accumulate<'a>(
        &'a self,
        accumulator: [Variable<'a, F32>; 4],
        a: [Value<'a, U32>; 4],
        b: [Value<'a, U32>; 2],
    ) {
        let sums = Piece::Vector(accumulator.iter().map(|sum| sum.get().id).collect());
        let pieces = vec![
            sums.clone(),
            Piece::Vector(a.iter().map(|part| part.id).collect()),
            Piece::Vector(b.iter().map(|part| part.id).collect()),
            sums,
        ];
        self.emit_effect("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", pieces);
    }
}
