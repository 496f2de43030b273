//! Rotary position embedding (Su et al. 2021), in the rotate-half ("NeoX") form, with its scalings.

use std::collections::HashMap;
use std::sync::{Mutex, OnceLock, PoisonError};

use kernels_ptx::kernels::rope::Rope;
use rayon::prelude::*;
use runtime::{Argument, Device, DeviceKind};

use crate::gpu::{self, Output};
use crate::{Error, Result, Tape, Tensor, Var, check};

const OPERATOR: &str = "rope";

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
        let invalid = |message: String| Err(Error::Invalid { operator: OPERATOR, message });
        if head_size == 0 || head_size % 2 == 1 {
            return invalid(format!("heads of {head_size} dimensions have no pairs to rotate: expected an even size"));
        }
        if !(theta > 0.0 && theta.is_finite()) {
            return invalid(format!("base {theta}: expected a positive number"));
        }
        // f32 throughout, as Hugging Face computes them: the trained model has seen these very values.
        let plain: Vec<f32> =
            (0..head_size / 2).map(|pair| 1.0 / theta.powf((2 * pair) as f32 / head_size as f32)).collect();
        match scaling {
            RotaryScaling::None => Ok(Self { inverse_frequencies: plain, attention_factor: 1.0 }),
            RotaryScaling::Llama3 { factor, low_frequency_factor, high_frequency_factor, original_length } => {
                if !(factor > 0.0 && high_frequency_factor > low_frequency_factor && original_length > 0.0) {
                    return invalid(format!(
                        "llama3 scaling with factor {factor}, low {low_frequency_factor}, high \
                         {high_frequency_factor}, original length {original_length}: expected positive numbers, high \
                         above low"
                    ));
                }
                let scaled = |frequency: f32| {
                    let wavelength = std::f32::consts::TAU / frequency;
                    if wavelength < original_length / high_frequency_factor {
                        frequency
                    } else if wavelength > original_length / low_frequency_factor {
                        frequency / factor
                    } else {
                        let smooth = (original_length / wavelength - low_frequency_factor)
                            / (high_frequency_factor - low_frequency_factor);
                        (1.0 - smooth) * frequency / factor + smooth * frequency
                    }
                };
                Ok(Self { inverse_frequencies: plain.into_iter().map(scaled).collect(), attention_factor: 1.0 })
            }
            RotaryScaling::Yarn { factor, attention_factor, beta_fast, beta_slow, original_length } => {
                if !(factor > 0.0 && beta_fast > 0.0 && beta_slow > 0.0 && original_length > 0.0) {
                    return invalid(format!(
                        "yarn scaling with factor {factor}, beta_fast {beta_fast}, beta_slow {beta_slow}, original \
                         length {original_length}: expected positive numbers"
                    ));
                }
                let dimension = |rotations: f32| {
                    head_size as f64
                        * (f64::from(original_length) / (f64::from(rotations) * std::f64::consts::TAU)).ln()
                        / (2.0 * f64::from(theta).ln())
                };
                let low = dimension(beta_fast).floor().max(0.0);
                let high = dimension(beta_slow).ceil().min((head_size - 1) as f64);
                // Equal ends would divide by zero; the reference widens them by this much.
                let high = if low == high { high + 0.001 } else { high };
                let scaled = |(pair, frequency): (usize, f32)| {
                    let ramp = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0) as f32;
                    ramp * frequency / factor + (1.0 - ramp) * frequency
                };
                Ok(Self {
                    inverse_frequencies: plain.into_iter().enumerate().map(scaled).collect(),
                    attention_factor: attention_factor.unwrap_or(0.1 * factor.ln() + 1.0),
                })
            }
        }
    }

    /// Cosine and sine of every position: f32 `[positions, head size / 2]` each, the attention factor included.
    pub fn cosine_sine(&self, positions: &[u32]) -> (Vec<f32>, Vec<f32>) {
        let angles = positions.par_iter().flat_map_iter(|position| {
            self.inverse_frequencies.iter().map(move |frequency| *position as f32 * frequency)
        });
        let pairs: Vec<(f32, f32)> =
            angles.map(|angle| (angle.cos() * self.attention_factor, angle.sin() * self.attention_factor)).collect();
        pairs.into_iter().unzip()
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
    check::is_float(OPERATOR, "input", input)?;
    check::rank(OPERATOR, "input", input, 4, "[batch, time, heads, head size]")?;
    check::is_u32(OPERATOR, "positions", positions)?;
    check::shape(OPERATOR, "positions", positions, &input.shape()[..2])?;
    if table.inverse_frequencies.len() * 2 != input.last_dimension() {
        return Err(Error::Shape {
            operator: OPERATOR,
            argument: "input",
            expected: format!("heads of {} dimensions", table.inverse_frequencies.len() * 2),
            found: input.shape().to_vec(),
        });
    }
    if !input.device().is_cpu() {
        let (positions, table) = (positions.clone(), table.clone());
        let output = rotate_gpu(input, &positions, &table, 1.0)?;
        return Ok(tape.record_one(&[input], output, move |gradient, _| {
            Ok(vec![Some(rotate_gpu(gradient, &positions, &table, -1.0)?)])
        }));
    }
    let (cosine, sine) = table.cosine_sine(positions.host_slice()?);
    let output = rotate_cpu(input, &cosine, &sine, 1.0)?;
    // A rotation's transpose is the rotation back.
    Ok(tape
        .record_one(&[input], output, move |gradient, _| Ok(vec![Some(rotate_cpu(gradient, &cosine, &sine, -1.0)?)])))
}

fn rotate_gpu(input: &Tensor, positions: &Tensor, table: &RotaryTable, direction: f32) -> Result<Tensor> {
    let (device, [batch, time, heads, size]) = (input.device(), [0, 1, 2, 3].map(|axis| input.shape()[axis]));
    let tokens = gpu::size(OPERATOR, "the number of tokens", batch * time)?;
    let heads = gpu::size(OPERATOR, "the number of heads", heads)?;
    let half = gpu::size(OPERATOR, "half the head size", size / 2)?;
    let frequencies = frequencies_on(device, table)?;
    let kernel = Rope::new(gpu::element(input.dtype()), half);
    let mut output = Output::like(input)?;
    let arguments = [
        output.write(),
        gpu::read(input),
        gpu::read(positions),
        gpu::read(&frequencies),
        Argument::F32(table.attention_factor),
        Argument::F32(direction * table.attention_factor),
        Argument::U32(tokens),
        Argument::U32(heads),
        Argument::U32(half),
    ];
    let sizes = [tokens.into(), heads.into(), 2 * u64::from(half)];
    gpu::launch(OPERATOR, device, &kernel, kernel.grid(tokens, heads, half), &sizes, &arguments)?;
    Ok(output.tensor())
}

/// The table's frequencies on the device. They are copied there once: a model has one or two geometries, and a copy at
/// every call would make the host wait.
pub(super) fn frequencies_on(device: &Device, table: &RotaryTable) -> Result<Tensor> {
    type Copies = HashMap<(DeviceKind, Vec<u32>), Tensor>;
    static COPIES: OnceLock<Mutex<Copies>> = OnceLock::new();
    let mut copies = COPIES.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    let bits = table.inverse_frequencies.iter().map(|frequency| frequency.to_bits()).collect();
    let key = (device.kind(), bits);
    if let Some(copy) = copies.get(&key) {
        return Ok(copy.clone());
    }
    let copy = Tensor::from_slice(device, &[table.inverse_frequencies.len()], &table.inverse_frequencies)?;
    copies.insert(key, copy.clone());
    Ok(copy)
}

fn rotate_cpu(input: &Tensor, cosine: &[f32], sine: &[f32], direction: f32) -> Result<Tensor> {
    let (heads, size) = (input.shape()[2], input.shape()[3]);
    let half = size / 2;
    let values = input.host_f32()?;
    Tensor::compute(input.device(), input.shape(), input.dtype(), |output| {
        let width = (heads * size).max(1);
        output
            .par_chunks_mut(width)
            .zip(values.par_chunks(width))
            .zip(cosine.par_chunks(half.max(1)).zip(sine.par_chunks(half.max(1))))
            .for_each(|((output, token), (cosine, sine))| {
                for (output, head) in output.chunks_exact_mut(size).zip(token.chunks_exact(size)) {
                    let ((output_a, output_b), (a, b)) = (output.split_at_mut(half), head.split_at(half));
                    for pair in 0..half {
                        let (cosine, sine) = (cosine[pair], direction * sine[pair]);
                        output_a[pair] = a[pair] * cosine - b[pair] * sine;
                        output_b[pair] = b[pair] * cosine + a[pair] * sine;
                    }
                }
            });
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use runtime::Device;

    use super::*;

    #[test]
    fn position_zero_is_unchanged_and_a_quarter_turn_exchanges_the_pair() {
        let device = Device::cpu();
        let input = Tensor::from_slice(&device, &[1, 2, 1, 2], &[1.0f32, 2.0, 1.0, 2.0]).unwrap();
        let positions = Tensor::from_slice(&device, &[1, 2], &[0u32, 1]).unwrap();
        let table = RotaryTable { inverse_frequencies: vec![std::f32::consts::FRAC_PI_2], attention_factor: 1.0 };
        let output = rope(&Tape::inference(), &Var::constant(&input), &positions, &table).unwrap();
        let values = output.to_vec::<f32>().unwrap();
        assert_eq!(values[..2], [1.0, 2.0]);
        assert!((values[2] + 2.0).abs() < 1e-6 && (values[3] - 1.0).abs() < 1e-6, "{values:?}");
    }

    #[test]
    fn scalings_leave_high_frequencies_and_divide_low_ones() {
        let plain = RotaryTable::new(64, 500_000.0, RotaryScaling::None).unwrap();
        let llama = RotaryScaling::Llama3 {
            factor: 8.0,
            low_frequency_factor: 1.0,
            high_frequency_factor: 4.0,
            original_length: 8192.0,
        };
        let yarn = RotaryScaling::Yarn {
            factor: 8.0,
            attention_factor: None,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original_length: 8192.0,
        };
        for scaling in [llama, yarn] {
            let table = RotaryTable::new(64, 500_000.0, scaling).unwrap();
            assert_eq!(table.inverse_frequencies[0], plain.inverse_frequencies[0]);
            assert_eq!(table.inverse_frequencies[31], plain.inverse_frequencies[31] / 8.0);
            assert!(table.inverse_frequencies.is_sorted_by(|a, b| a > b));
        }
        let factor = RotaryTable::new(64, 1e4, yarn).unwrap().attention_factor;
        assert!((factor - (0.1 * 8f32.ln() + 1.0)).abs() < 1e-6);
        assert!(RotaryTable::new(3, 1e4, RotaryScaling::None).is_err());
    }
}
