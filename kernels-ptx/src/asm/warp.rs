//! What the lanes of a warp, and the warps of a block, do together. Sums are formed in a fixed order.

use super::Assembler;
use super::memory::Shared;
use super::print::Piece;
use super::value::{F32, Operand, Pred, Type, U32, Value};

/// Lanes of a warp.
pub const LANES: u32 = 32;

/// A type of 32 bits, which lanes can exchange.
pub trait Exchanged: Type {}
impl Exchanged for F32 {}
impl Exchanged for U32 {}

impl Assembler {
    /// The thread's index in its warp, for blocks in x alone.
    pub fn lane(&self) -> Value<'_, U32> {
        self.thread() & (LANES - 1)
    }

    /// The index of the thread's warp in its block, for blocks in x alone.
    pub fn warp(&self) -> Value<'_, U32> {
        self.thread() >> 5
    }

    /// The value of the lane whose index differs in the bits of `mask`. All lanes of the warp take part.
    pub fn shuffle_xor<'a, T: Exchanged>(&'a self, value: Value<'a, T>, mask: u32) -> Value<'a, T> {
        self.shuffle("bfly", value, mask, 31)
    }

    /// The value of the lane `distance` below; a lane's own value where there is none. All lanes take part.
    pub fn shuffle_up<'a, T: Exchanged>(&'a self, value: Value<'a, T>, distance: u32) -> Value<'a, T> {
        self.shuffle("up", value, distance, 0)
    }

    /// The value of the lane `distance` above; a lane's own value where there is none. All lanes take part.
    pub fn shuffle_down<'a, T: Exchanged>(&'a self, value: Value<'a, T>, distance: u32) -> Value<'a, T> {
        self.shuffle("down", value, distance, 31)
    }

    /// The value of lane `lane`. All lanes take part.
    pub fn shuffle_from<'a, T: Exchanged>(&'a self, value: Value<'a, T>, lane: impl Operand<'a, U32>) -> Value<'a, T> {
        self.shuffle("idx", value, lane, 31)
    }

    fn shuffle<'a, T: Exchanged>(
        &'a self,
        mode: &str,
        value: Value<'a, T>,
        lane: impl Operand<'a, U32>,
        clamp: u32,
    ) -> Value<'a, T> {
        let pieces = vec![value.piece(), lane.operand().0, Piece::Text(clamp.to_string()), Piece::text("0xffffffff")];
        self.emit(format!("shfl.sync.{mode}.b32"), pieces)
    }

    /// Whether the condition holds in any lane. All lanes take part.
    pub fn any<'a>(&'a self, condition: Value<'a, Pred>) -> Value<'a, Pred> {
        self.emit("vote.sync.any.pred", vec![condition.piece(), Piece::text("0xffffffff")])
    }

    /// The lanes where the condition holds, as bits. All lanes take part.
    pub fn ballot<'a>(&'a self, condition: Value<'a, Pred>) -> Value<'a, U32> {
        self.emit("vote.sync.ballot.b32", vec![condition.piece(), Piece::text("0xffffffff")])
    }

    /// The sum over groups of `lanes` neighbouring lanes (a power of two), in every lane of each.
    pub fn lanes_sum<'a>(&'a self, value: Value<'a, F32>, lanes: u32) -> Value<'a, F32> {
        self.across(value, lanes, |a, b| a + b)
    }

    /// The maximum over groups of `lanes` neighbouring lanes (a power of two), in every lane of each.
    pub fn lanes_max<'a>(&'a self, value: Value<'a, F32>, lanes: u32) -> Value<'a, F32> {
        self.across(value, lanes, |a, b| a.max(b))
    }

    /// The sum over the warp, in every lane.
    pub fn warp_sum<'a>(&'a self, value: Value<'a, F32>) -> Value<'a, F32> {
        self.lanes_sum(value, LANES)
    }

    /// The maximum over the warp, in every lane.
    pub fn warp_max<'a>(&'a self, value: Value<'a, F32>) -> Value<'a, F32> {
        self.lanes_max(value, LANES)
    }

    fn across<'a>(
        &'a self,
        value: Value<'a, F32>,
        lanes: u32,
        combine: impl Fn(Value<'a, F32>, Value<'a, F32>) -> Value<'a, F32>,
    ) -> Value<'a, F32> {
        let mut total = value;
        let mut distance = lanes / 2;
        while distance > 0 {
            total = combine(total, self.shuffle_xor(total, distance));
            distance /= 2;
        }
        total
    }

    /// The sum over a block of `threads` threads in x, in every thread. `scratch` has one f32 per warp; it may be used
    /// again at once.
    pub fn block_sum<'a>(&'a self, value: Value<'a, F32>, threads: u32, scratch: Shared<'a>) -> Value<'a, F32> {
        self.across_block(value, threads, scratch, |a, b| a + b)
    }

    /// The maximum over a block of `threads` threads in x, in every thread; `scratch` as for [`Assembler::block_sum`].
    pub fn block_max<'a>(&'a self, value: Value<'a, F32>, threads: u32, scratch: Shared<'a>) -> Value<'a, F32> {
        self.across_block(value, threads, scratch, |a, b| a.max(b))
    }

    fn across_block<'a>(
        &'a self,
        value: Value<'a, F32>,
        threads: u32,
        scratch: Shared<'a>,
        combine: impl Fn(Value<'a, F32>, Value<'a, F32>) -> Value<'a, F32> + Copy,
    ) -> Value<'a, F32> {
        let warps = threads / LANES;
        assert!(
            threads.is_multiple_of(LANES) && scratch.count() >= warps,
            "the scratch is shorter than the block's warps"
        );
        let within = self.across(value, LANES, combine);
        if warps == 1 {
            return within;
        }
        let first = self.lane().eq(0);
        scratch.at(self.warp()).store_if(first, within);
        self.barrier();
        let total = (1..warps)
            .fold(scratch.first().load(), |total, warp| combine(total, scratch.first().plus(i64::from(warp)).load()));
        self.barrier();
        total
    }
}
