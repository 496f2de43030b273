//! Divergences between the student's and the teacher's next-token distributions: the distillation losses.

use crate::{Result, Tape, Tensor, Var};

/// Which divergence, of student `q` and teacher `p`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Divergence {
    /// `Σ q (ln q - ln p)`: mode-seeking, the Apriel-H1 loss (equation 5).
    ReverseKl,
    /// `Σ p (ln p - ln q)`.
    ForwardKl,
    /// `½ KL(q ‖ m) + ½ KL(p ‖ m)`, `m = (q + p) / 2`.
    JensenShannon,
    /// `-Σ p ln q`: the forward KL plus the teacher's entropy.
    SoftCrossEntropy,
}

/// Temperatures, mask and normalisation of a divergence.
#[derive(Clone, Copy, Debug)]
pub struct DivergenceOptions<'a> {
    /// Which divergence.
    pub divergence: Divergence,
    /// Divides the student's logits. No factor τ² is applied to the loss.
    pub student_temperature: f32,
    /// Divides the teacher's logits.
    pub teacher_temperature: f32,
    /// f32 `[…]`: weight of each position, usually 0 or 1. `None`: all 1.
    pub mask: Option<&'a Tensor>,
    /// Divides the masked sum: usually the number of positions that count in the whole batch.
    pub denominator: f32,
}

/// A divergence and what it was made of.
#[derive(Debug)]
pub struct DivergenceLoss {
    /// Scalar f32: `Σ mask · per_token / denominator`.
    pub loss: Var,
    /// f32 `[…]`: the divergence of each position in nats, unmasked.
    pub per_token: Tensor,
}

/// The divergence of the student's distribution from the teacher's, position by position. Gradients flow to the student
/// only.
///
/// - `student`, `teacher` logits `[…, vocabulary]` of equal shape
///
/// # Errors
/// Shape errors that name the argument; a temperature or denominator that is not positive.
pub fn divergence(
    tape: &Tape<'_>,
    student: &Var,
    teacher: &Tensor,
    options: DivergenceOptions<'_>,
) -> Result<DivergenceLoss> {
    let _ = (tape, student, teacher, options);
    unimplemented!()
}
