//! The selective scan of Mamba with grouped B and C, parallel over channels and over spans of time.
//!
//! Per channel, with `Δ = softplus(delta + delta_bias)`: `h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t u_t`,
//! `output_t = (C_t · h_t + D u_t) silu(z_t)`. Tensors are `[batch, time, channels]`, B and C `[batch, time, groups, states]`,
//! A and states `[…, channels, states]`.
//!
//! - Layout: a *tile* is up to 16 channels that share their group of B and of C; half a warp scans one. A lane holds 4
//!   channels by a quarter of the states in registers (4 × 4 for 16 states): the four lanes of a *quad row* share 4 channels,
//!   the four rows of a tile share the states. So a step takes one 16-byte read of shared memory each for Δ, Δu, B and C per
//!   lane, and sums over states or channels are two exchanges in which every lane ends up with one of four results. What
//!   depends on the channel alone (softplus, gate, D) is computed once, by the lane whose index is the channel's in its tile.
//!   Stages of 8 steps are read ahead together.
//! - Time: rows are cut into *spans* when there are too few tiles to fill a device. [`SpanStates`] computes each
//!   span's state from zero and its sum of Δ (the product of its decays is `exp(A ΣΔ)`), [`CombineSpans`] turns them into
//!   the states at the starts of the spans, in order, and [`ScanForward`] runs each span from its true start.
//! - Whole rows: where there are enough tiles of 16 channels by 16 states, [`SerialForward`] scans each from first step to last
//!   in one pass, four channels-by-states per lane, with warps beside it that read, write and compute what depends on the
//!   channel alone. Where a third tile on some multiprocessors would take the others' time, blocks share the tiles in time
//!   ([`Shares`]). [`SerialBackward`] takes them from last chunk to first, with warps for four tasks. The others stay
//!   their check, and take every other shape.
//! - Backward: the forward pass saves the states at the starts of *chunks* of [`CHUNK`] steps. [`ScanBackward`] takes the chunks
//!   of a span from the last to the first: it computes the states at each stage of 8 steps again (shared memory), then,
//!   stage by stage from the end, the states of its steps (registers), and walks back through them. What later spans
//!   send back comes from [`SpanCarries`] and [`CombineSpans`] as in the forward pass. Gradients of B and C are summed over
//!   the channels of a tile in a fixed order; [`GroupSums`] adds the tiles of a group. Those of A, D and the bias are written as
//!   one part per span and row, which [`ColumnSums`](super::column_sums::ColumnSums) adds in a fixed order.
//! - Bound by the exponentials, one per channel, state and step (two with spans; four backward), and by the
//!   instructions around them.
//! - Documents: at the first step of a document the state before it counts as zero.
//! - Source: Gu and Dao 2023, "Mamba", section 3.3.2 and appendix D; the layout is ours.

mod backward;
mod combine;
mod forward;
mod lane;
mod serial;
mod serial_backward;
mod serial_forward;
mod step;

pub use backward::{GroupGradient, GroupSums, ScanBackward, SpanCarries};
pub use combine::CombineSpans;
pub use forward::{ScanForward, SpanStates};
pub use serial_backward::SerialBackward;
pub use serial_forward::{SerialForward, Shares};
pub use step::ScanStep;

use crate::Element;

/// Channels of a tile.
pub const TILE: u32 = 16;
/// Steps between saved states, unless told otherwise.
pub const CHUNK: u32 = 64;
/// The most states of a channel.
pub const MOST_STATES: u32 = 64;
/// Steps of a chunk times states of a channel that shared memory has room for in the backward pass.
pub const MOST_CHUNK_STATES: u32 = 4096;
/// Steps that are read ahead together.
const STAGE: u32 = 8;
/// Threads of a block: one warp, which shares nothing with others.
const THREADS: u32 = 32;

/// What a scan reads beside the inputs that it always has.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Scan {
    /// Type of u, delta, z, B, C, the output, and their gradients.
    pub element: Element,
    /// States of a channel, at most [`MOST_STATES`].
    pub states: u32,
    /// There is D.
    pub skip: bool,
    /// There is z.
    pub gate: bool,
    /// There is a bias of delta.
    pub bias: bool,
    /// Softplus is applied to delta.
    pub softplus: bool,
    /// Rows hold several documents.
    pub documents: bool,
}

impl Scan {
    fn name(&self, kernel: &str) -> String {
        let flags = [
            (self.skip, "_skip"),
            (self.gate, "_gate"),
            (self.bias, "_bias"),
            (self.softplus, "_softplus"),
            (self.documents, "_documents"),
        ];
        let flags: String = flags.iter().filter(|(set, _)| *set).map(|(_, name)| *name).collect();
        format!("{kernel}_{}_n{}{flags}", self.element, self.states)
    }

    /// States of a lane: a quarter, rounded up.
    fn states_per_lane(&self) -> u32 {
        self.states.div_ceil(4)
    }

    /// What models use: 16 states and every input, packed documents or not.
    fn configurations() -> Vec<Self> {
        let of = |element, documents| Self {
            element,
            states: 16,
            skip: true,
            gate: true,
            bias: true,
            softplus: true,
            documents,
        };
        [Element::F32, Element::Bf16].into_iter().flat_map(|element| [of(element, false), of(element, true)]).collect()
    }
}

/// The sizes of a scan, and how it is cut into tiles.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sizes {
    /// Rows.
    pub batch: u32,
    /// Steps.
    pub time: u32,
    /// Channels.
    pub channels: u32,
    /// Groups of B; they divide the channels.
    pub b_groups: u32,
    /// Groups of C; they divide the channels.
    pub c_groups: u32,
}

impl Sizes {
    /// Channels of a group of B.
    pub fn b_width(&self) -> u32 {
        self.channels / self.b_groups
    }

    /// Channels of a group of C.
    pub fn c_width(&self) -> u32 {
        self.channels / self.c_groups
    }

    /// Neighbouring channels that share their groups of B and C: the greatest common divisor of the groups' widths.
    pub fn run(&self) -> u32 {
        let (mut a, mut b) = (self.b_width(), self.c_width());
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a
    }

    /// Tiles of a row.
    pub fn tiles(&self) -> u32 {
        // Without channels there is no run.
        let run = self.run().max(1);
        self.channels / run * run.div_ceil(TILE)
    }

    /// Tiles of a group of B.
    pub fn b_tiles(&self) -> u32 {
        self.tiles() / self.b_groups
    }

    /// Tiles of a group of C.
    pub fn c_tiles(&self) -> u32 {
        self.tiles() / self.c_groups
    }

    /// Warps that scan all tiles, two each.
    pub fn warps(&self) -> u64 {
        (u64::from(self.batch) * u64::from(self.tiles())).div_ceil(2)
    }

    /// Steps of a span, a multiple of `chunk`, so that a device of about this many multiprocessors is filled.
    pub fn span(&self, chunk: u32, multiprocessors: u32) -> u32 {
        // From this many warps on, one pass over whole rows is faster than two over spans.
        let enough = u64::from(multiprocessors) * 6;
        let wanted = u64::from(multiprocessors) * 32;
        let chunks = u64::from(self.time.div_ceil(chunk).max(1));
        let chunks_per_span = if self.warps() >= enough { chunks } else { (chunks * self.warps() / wanted).max(1) };
        (chunks_per_span * u64::from(chunk)).min(u64::from(u32::MAX / 2)) as u32
    }

    /// Blocks that take all tiles of `spans` spans; `None` when one launch cannot cover them.
    pub fn grid(&self, spans: u32) -> Option<[u32; 3]> {
        let warps = self.warps();
        let tokens = u64::from(self.batch) * u64::from(self.time);
        (warps <= i32::MAX as u64 && spans <= 65_535 && tokens <= u64::from(u32::MAX)).then_some([
            warps as u32,
            spans,
            1,
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::{Shares, Sizes};

    #[test]
    fn tiles_lie_within_groups() {
        let sizes = |channels, b_groups, c_groups| Sizes { batch: 2, time: 100, channels, b_groups, c_groups };
        // The Apriel hybrid, and SmolLM2.
        assert_eq!((sizes(4096, 64, 256).tiles(), sizes(4096, 64, 256).b_tiles()), (256, 4));
        assert_eq!((sizes(576, 12, 36).tiles(), sizes(576, 12, 36).b_tiles()), (36, 3));
        // One group of all channels; groups of one; groups of 6 and of 4, which share runs of 2.
        assert_eq!(sizes(40, 1, 1).tiles(), 3);
        assert_eq!(sizes(7, 7, 1).tiles(), 7);
        assert_eq!((sizes(12, 2, 3).run(), sizes(12, 2, 3).tiles(), sizes(12, 2, 3).c_tiles()), (2, 6, 2));
    }

    #[test]
    fn spans_fill_a_device_and_are_whole_chunks() {
        let small = Sizes { batch: 8, time: 2048, channels: 576, b_groups: 12, c_groups: 36 };
        assert_eq!(small.span(64, 132), 64);
        let large = Sizes { batch: 1, time: 16_384, channels: 4096, b_groups: 64, c_groups: 256 };
        assert_eq!(large.span(64, 132) % 64, 0);
        assert!(large.span(64, 132) < 16_384);
        let many = Sizes { batch: 64, ..large };
        assert_eq!(many.span(64, 132), 16_384);
    }

    #[test]
    fn tiles_are_shared_where_a_third_would_wait() {
        let smollm2 = Sizes { batch: 8, time: 2048, channels: 576, b_groups: 36, c_groups: 36 };
        // 288 tiles of 32 chunks.
        assert_eq!(Shares::of(&smollm2), Some(Shares { blocks: 264, share: 35, chunks: 9216 }));
        // No more than two for each multiprocessor; four; so short that shares are no shorter.
        for other in [
            Sizes { batch: 7, ..smollm2 },
            Sizes { batch: 14, ..smollm2 },
            Sizes { batch: 1, time: 16_384, channels: 4096, b_groups: 64, c_groups: 256 },
            Sizes { time: 64, ..smollm2 },
            Sizes { time: 128, ..smollm2 },
        ] {
            assert_eq!(Shares::of(&other), None, "{other:?}");
        }
        // Two chunks more than a tile, where one would do but be late.
        assert_eq!(Shares::of(&Sizes { time: 704, ..smollm2 }), Some(Shares { blocks: 244, share: 13, chunks: 3168 }));
        // Never less than a tile for a block; the last may have less.
        assert_eq!(Shares::among(&smollm2, 1000), Some(Shares { blocks: 288, share: 32, chunks: 9216 }));
        assert_eq!(Shares::among(&smollm2, 7), Some(Shares { blocks: 7, share: 1317, chunks: 9216 }));
        // Chunks beyond 32 bits.
        assert_eq!(Shares::among(&Sizes { batch: 1 << 20, time: 1 << 20, ..smollm2 }, 264), None);
    }
}
