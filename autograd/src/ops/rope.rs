//! Rotary position embedding (Su et al. 2021), in the rotate-half ("NeoX") form, with its scalings.

use crate::{Result, Tape, Tensor, Var};

/// How frequencies are stretched beyond the length that a model was trained on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RotaryScaling {
    /// Not at all.
    None,
    /// Llama 3's rule: long wavelengths divided by `factor`, a smooth passage between.
    Llama3 {
        /// Divides the low frequencies.
        factor: f32,
        /// Wavelengths above `original_length / low_frequency_factor` are scaled fully.
        low_frequency_factor: f32,
        /// Wavelengths below `original_length / high_frequency_factor` are not scaled.
        high_frequency_factor: f32,
        /// Positions that the model was first trained on.
        original_length: f32,
    },
    /// YaRN (Peng et al. 2023): a linear ramp over dimensions, and a factor on cosine and sine.
    Yarn {
        /// Divides the low frequencies.
        factor: f32,
        /// Multiplies cosine and sine; `None`: `0.1 ln factor + 1`.
        attention_factor: Option<f32>,
        /// Rotations above which a dimension is not scaled; usually 32.
        beta_fast: f32,
        /// Rotations below which a dimension is scaled fully; usually 1.
        beta_slow: f32,
        /// Positions that the model was first trained on.
        original_length: f32,
    },
}

/// The rotation frequencies of one attention geometry.
#[derive(Clone, Debug, PartialEq)]
pub struct RotaryTable {
    /// f32, `head size / 2` frequencies in radians per position.
    pub inverse_frequencies: Vec<f32>,
    /// Factor on cosine and sine.
    pub attention_factor: f32,
}

impl RotaryTable {
    /// The table for heads of `head_size` dimensions (even) and base `theta`.
    ///
    /// # Errors
    /// An odd or zero head size; a base or factor that is not positive.
    pub fn new(head_size: usize, theta: f32, scaling: RotaryScaling) -> Result<Self> {
        let _ = (head_size, theta, scaling);
        unimplemented!()
    }
}

/// Rotates pairs `(j, j + head size / 2)` of every head by `position · inverse_frequency[j]`:
/// `(a cos - b sin, b cos + a sin)`. Angles, cosine and sine are f32.
///
/// - `input` `[batch, time, heads, head size]`, `positions` u32 `[batch, time]`, result like `input`
///
/// # Errors
/// Shape errors that name the argument; a table of another head size.
pub fn rope(tape: &Tape<'_>, input: &Var, positions: &Tensor, table: &RotaryTable) -> Result<Var> {
    let _ = (tape, input, positions, table);
    unimplemented!()
}
