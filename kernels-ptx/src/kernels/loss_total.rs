//! A batch's loss from those of its rows: `total[0] = Σ weights[i] · losses[i] / denominator`.
//!
//! - Layout: one block. Thread `t` adds the rows `t`, `t + 256`, … in order, then the threads' sums are added in a fixed
//!   order: as many roundings as a row's place in its thread and some 40 more.
//! - Traffic: two numbers per row. Bound by the launch.

use crate::asm::{Assembler, Description, LANES};
use crate::{Element, Kernel, KernelSource, Target, Work};

const THREADS: u32 = 256;

/// The weighted sum of rows' losses, divided by a number. One block.
///
/// Parameters: `total` (f32, one element, written), `losses` (f32 `[count]`), `weights` (f32 `[count]`; only where `weighted`),
/// `denominator` (f32), `count` (u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct LossTotal {
    /// Whether the rows have weights; all are 1 otherwise.
    pub weighted: bool,
}

impl KernelSource for LossTotal {
    fn build(&self) -> Kernel {
        let weighted = self.weighted;
        let (name, terms, bytes) = if weighted {
            ("weighted_loss_total", "weights[i] * losses[i]", 8)
        } else {
            ("loss_total", "losses[i]", 4)
        };
        let description = Description {
            name: name.to_owned(),
            summary: format!("total = sum of {terms} / denominator; one block"),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["count"],
            work: move |sizes: &[u64]| Work { bytes: bytes * sizes[0] + 4, operations: 2 * sizes[0] },
        };
        Assembler::assemble(description, |k| {
            let (total, losses) = (k.write("total", Element::F32), k.read("losses", Element::F32));
            let weights = weighted.then(|| k.read("weights", Element::F32));
            let (denominator, count) = (k.f32("denominator"), k.u32("count"));
            let sum = k.variable(0.0f32).named("sum");
            k.for_(k.thread(), count, THREADS, |index| {
                let loss = losses.at(index).load();
                sum.set(match weights {
                    Some(weights) => weights.at(index).load().fma(loss, sum.get()),
                    None => sum.get() + loss,
                });
            });
            let sum = k.block_sum(sum.get(), THREADS, k.shared(Element::F32, THREADS / LANES));
            total.first().store_if(k.thread().eq(0), sum.div(denominator));
        })
    }

    fn configurations() -> Vec<Self> {
        [false, true].map(|weighted| Self { weighted }).to_vec()
    }
}
