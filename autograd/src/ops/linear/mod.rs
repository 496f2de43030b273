//! Matrix product with a weight.
//!
//! On GPUs: tensor cores for bf16 inputs, plain multiply-adds for f32 ones. Three ways on the CPU: one matrix product for f32 weights; for bf16 weights the same in blocks of output rows, so
//! that no whole f32 copy of the weight ever exists; and, for the few rows of a decoding step, dot products straight on
//! the stored weights, which run at the speed of memory.

mod gpu;

use half::bf16;
use rayon::prelude::*;
use runtime::matrix::{Matrix, MatrixMut, Threads, multiply};

use crate::{DType, Result, Tape, Tensor, Var, check, cpu};

const OPERATOR: &str = "linear";

/// At most this many rows are multiplied by dot products.
const FEW_ROWS: usize = 4;
/// Output rows of a bf16 weight that are widened at a time: about the size of a core's cache.
const WIDENED_ROWS: usize = 1024;
/// Output rows that a thread takes at a time in the way for few rows.
const DOT_ROWS: usize = 64;
/// Elements of a residual that a thread adds at a time.
const BLOCK: usize = 1 << 14;
/// Rows of a bias gradient that are summed together before the blocks are added in order.
const BIAS_ROWS: usize = 64;

/// `y = x Wᵀ + bias`.
///
/// - `input` `[…, in]`, `weight` `[out, in]` (f32 or bf16, whatever the input's type), `bias` `[out]`
/// - result `[…, out]` of the input's element type; gradients of weight and bias are f32
///
/// # Errors
/// Shape errors that name the argument.
pub fn linear(tape: &Tape<'_>, input: &Var, weight: &Var, bias: Option<&Var>) -> Result<Var> {
    record(tape, input, weight, bias, None)
}

/// `y = residual + x Wᵀ + bias`, in one pass on GPUs.
///
/// As [`linear()`]; `residual` has the result's shape.
///
/// # Errors
/// Shape errors that name the argument.
pub fn linear_residual(tape: &Tape<'_>, residual: &Var, input: &Var, weight: &Var, bias: Option<&Var>) -> Result<Var> {
    record(tape, input, weight, bias, Some(residual))
}

/// `silu(x Gᵀ) · (x Uᵀ)`, outside any tape: for decoding, where GPUs do it in one launch.
///
/// - `input` `[…, in]`, `gate` and `up` `[out, in]`, result `[…, out]` of the input's element type, the same bits as those of
///   [`linear()`] twice and [`swiglu`](super::swiglu())
///
/// # Errors
/// Shape errors that name the argument.
pub fn linear_swiglu(input: &Tensor, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    check::is_float(OPERATOR, "input", input)?;
    for (name, weight) in [("gate", gate), ("up", up)] {
        check::is_float(OPERATOR, name, weight)?;
        check::rank(OPERATOR, name, weight, 2, "[out, in]")?;
        check::shape(OPERATOR, name, weight, &[gate.shape()[0], input.last_dimension()])?;
    }
    if input.device().is_gpu()
        && let Some(output) = gpu::gated(input, gate, up)?
    {
        return Ok(output);
    }
    let (tape, input) = (Tape::inference(), Var::constant(input));
    let product = |weight: &Tensor| linear(&tape, &input, &Var::constant(weight), None);
    Ok(super::swiglu(&tape, &product(gate)?, &product(up)?)?.tensor().clone())
}

fn record(tape: &Tape<'_>, input: &Var, weight: &Var, bias: Option<&Var>, residual: Option<&Var>) -> Result<Var> {
    check::is_float(OPERATOR, "input", input)?;
    check::is_float(OPERATOR, "weight", weight)?;
    check::rank(OPERATOR, "weight", weight, 2, "[out, in]")?;
    check::shape(OPERATOR, "weight", weight, &[weight.shape()[0], input.last_dimension()])?;
    if let Some(bias) = bias {
        check::shape(OPERATOR, "bias", bias, &[weight.shape()[0]])?;
    }
    if let Some(residual) = residual {
        check::is_float(OPERATOR, "residual", residual)?;
        check::shape(OPERATOR, "residual", residual, &output_shape(input, weight))?;
    }
    let ways = ways(input);
    let output = (ways.forward)(input, weight, bias.map(Var::tensor), residual.map(Var::tensor))?;
    let (saved_input, saved_weight) = (input.tensor().clone(), weight.tensor().clone());
    let with_bias = bias.is_some();
    let residual_dtype = residual.map(|residual| residual.dtype());
    let inputs: Vec<&Var> = [Some(input), Some(weight), bias, residual].into_iter().flatten().collect();
    Ok(tape.record_one(&inputs, output, move |gradient, needed| {
        let mut gradients = vec![
            needed[0].then(|| (ways.input_gradient)(gradient, &saved_input, &saved_weight)).transpose()?,
            needed[1].then(|| (ways.weight_gradient)(gradient, &saved_input, &saved_weight)).transpose()?,
        ];
        if with_bias {
            gradients.push(needed[2].then(|| (ways.bias_gradient)(gradient)).transpose()?);
        }
        if let Some(dtype) = residual_dtype {
            gradients.push(Some(gradient.cast(dtype)?));
        }
        Ok(gradients)
    }))
}

/// The operator's three products one by one, for operators that are made of them.
pub(super) mod products {
    use super::*;

    /// `x Wᵀ`, `[…, out]` of the input's type.
    ///
    /// # Errors
    /// Out of memory; runtime errors.
    pub fn forward(input: &Tensor, weight: &Tensor) -> Result<Tensor> {
        (ways(input).forward)(input, weight, None, None)
    }

    /// `dX = dY W`, like `input`.
    ///
    /// # Errors
    /// Out of memory; runtime errors.
    pub fn input_gradient(gradient: &Tensor, input: &Tensor, weight: &Tensor) -> Result<Tensor> {
        (ways(input).input_gradient)(gradient, input, weight)
    }

    /// Adds `dW = dYᵀ X` to `sum` (f32, like `weight`), or makes it where there is none yet.
    ///
    /// # Errors
    /// Out of memory; runtime errors.
    pub fn add_weight_gradient(
        sum: Option<Tensor>,
        gradient: &Tensor,
        input: &Tensor,
        weight: &Tensor,
    ) -> Result<Tensor> {
        match sum {
            None => (ways(input).weight_gradient)(gradient, input, weight),
            Some(sum) => (ways(input).add_weight_gradient)(sum, gradient, input),
        }
    }
}

fn ways(input: &Tensor) -> &'static Ways {
    if input.device().is_cpu() { &CPU } else { &gpu::WAYS }
}

/// The operator's functions on one kind of device.
struct Ways {
    /// Input, weight, bias, residual: `residual + x Wᵀ + bias`.
    forward: fn(&Tensor, &Tensor, Option<&Tensor>, Option<&Tensor>) -> Result<Tensor>,
    /// Gradient, input, weight: `dX = dY W`.
    input_gradient: fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    /// Gradient, input, weight: `dW = dYᵀ X`, f32.
    weight_gradient: fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    /// Sum, gradient, input: `sum + dYᵀ X`, in the sum's memory where nothing else shares it.
    add_weight_gradient: fn(Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    /// Gradient: `db = Σ_rows dY`, f32.
    bias_gradient: fn(&Tensor) -> Result<Tensor>,
}

const CPU: Ways = Ways {
    forward: forward_cpu,
    input_gradient: input_gradient_cpu,
    weight_gradient: weight_gradient_cpu,
    add_weight_gradient: add_weight_gradient_cpu,
    bias_gradient: bias_gradient_cpu,
};

/// The shape of `x Wᵀ`.
fn output_shape(input: &Tensor, weight: &Tensor) -> Vec<usize> {
    let mut shape = input.shape().to_vec();
    match shape.last_mut() {
        Some(last) => *last = weight.shape()[0],
        None => shape.push(weight.shape()[0]),
    }
    shape
}

fn forward_cpu(input: &Tensor, weight: &Tensor, bias: Option<&Tensor>, residual: Option<&Tensor>) -> Result<Tensor> {
    let (rows, inner, outer) = (input.rows(), input.last_dimension(), weight.shape()[0]);
    let values = input.host_f32()?;
    let bias = bias.map(Tensor::host_f32).transpose()?;
    let residual = residual.map(Tensor::host_f32).transpose()?;
    Tensor::compute(input.device(), &output_shape(input, weight), input.dtype(), |output| {
        if rows <= FEW_ROWS {
            match weight.dtype() {
                DType::Bf16 => few_rows(&values, weight.host_slice::<bf16>()?, inner, rows, output),
                _ => few_rows(&values, weight.host_slice::<f32>()?, inner, rows, output),
            }
        } else {
            let left = Matrix::row_major(&values, rows, inner);
            for_widened_blocks(weight, |first, count, block| {
                let target = MatrixMut::strided(&mut output[first..], rows, count, outer);
                let right = Matrix::row_major(block, count, inner).transposed();
                multiply(target, 0.0, left, right, 1.0, Threads::All);
            })?;
        }
        if let Some(bias) = &bias {
            output.par_chunks_mut(outer.max(1)).for_each(|row| {
                for (value, bias) in row.iter_mut().zip(&bias[..]) {
                    *value += bias;
                }
            });
        }
        if let Some(residual) = &residual {
            output.par_chunks_mut(BLOCK).zip(residual.par_chunks(BLOCK)).for_each(|(output, residual)| {
                for (value, residual) in output.iter_mut().zip(residual) {
                    *value += residual;
                }
            });
        }
        Ok(())
    })
}

/// An element type that weights are kept in. A trait and not a function argument: a call through an argument would be
/// compiled apart from the loop around it, without that loop's vectors.
trait Stored: Sync + Sized {
    /// `Σ input[i] row[i]`.
    fn dot(input: &[f32], row: &[Self]) -> f32;
}

impl Stored for f32 {
    #[inline(always)]
    fn dot(input: &[f32], row: &[Self]) -> f32 {
        cpu::dot(input, row)
    }
}

impl Stored for bf16 {
    #[inline(always)]
    fn dot(input: &[f32], row: &[Self]) -> f32 {
        cpu::dot_bf16(input, row)
    }
}

/// Dot products of every input row with every weight row.
fn few_rows<T: Stored>(input: &[f32], weight: &[T], inner: usize, rows: usize, output: &mut [f32]) {
    if rows == 0 || inner == 0 {
        output.fill(0.0);
        return;
    }
    let outer = output.len() / rows;
    // Output rows side by side per weight row; a single input row needs no rearrangement.
    let mut by_weight_row = if rows == 1 { Vec::new() } else { vec![0.0; output.len()] };
    let target: &mut [f32] = if rows == 1 { &mut *output } else { &mut by_weight_row };
    target.par_chunks_mut(DOT_ROWS * rows).zip(weight.par_chunks(DOT_ROWS * inner)).for_each(|(target, weight)| {
        cpu::simd(
            #[inline(always)]
            || {
                for (target, weight) in target.chunks_exact_mut(rows).zip(weight.chunks_exact(inner)) {
                    for (target, input) in target.iter_mut().zip(input.chunks_exact(inner)) {
                        *target = T::dot(input, weight);
                    }
                }
            },
        );
    });
    if rows > 1 {
        for (index, value) in output.iter_mut().enumerate() {
            *value = by_weight_row[index % outer * rows + index / outer];
        }
    }
}

/// Calls `function` with (first output row, number of rows, their weights in f32) for the whole weight.
fn for_widened_blocks(weight: &Tensor, mut function: impl FnMut(usize, usize, &[f32])) -> Result<()> {
    let (outer, inner) = (weight.shape()[0], weight.shape()[1]);
    if weight.dtype() == DType::F32 {
        function(0, outer, weight.host_slice()?);
        return Ok(());
    }
    let narrow = weight.host_slice::<bf16>()?;
    let mut scratch = vec![0.0; WIDENED_ROWS.min(outer) * inner];
    for first in (0..outer).step_by(WIDENED_ROWS) {
        let count = WIDENED_ROWS.min(outer - first);
        let block = &mut scratch[..count * inner];
        let part = 64 * inner.max(1);
        block
            .par_chunks_mut(part)
            .zip(narrow[first * inner..][..count * inner].par_chunks(part))
            .for_each(|(wide, narrow)| cpu::widen(narrow, wide));
        function(first, count, block);
    }
    Ok(())
}

/// `dX = dY W`.
fn input_gradient_cpu(gradient: &Tensor, input: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (rows, inner, outer) = (input.rows(), input.last_dimension(), weight.shape()[0]);
    let values = gradient.host_f32()?;
    Tensor::compute(input.device(), input.shape(), input.dtype(), |output| {
        if outer == 0 {
            output.fill(0.0);
        }
        for_widened_blocks(weight, |first, count, block| {
            let left = Matrix::strided(&values[first.min(values.len())..], rows, count, outer);
            let keep = if first == 0 { 0.0 } else { 1.0 };
            let target = MatrixMut::row_major(output, rows, inner);
            multiply(target, keep, left, Matrix::row_major(block, count, inner), 1.0, Threads::All);
        })
    })
}

/// `dW = dYᵀ X`.
fn weight_gradient_cpu(gradient: &Tensor, input: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (rows, inner, outer) = (input.rows(), input.last_dimension(), weight.shape()[0]);
    let (g, x) = (gradient.host_f32()?, input.host_f32()?);
    Tensor::compute(weight.device(), weight.shape(), DType::F32, |output| {
        let left = Matrix::row_major(&g, rows, outer).transposed();
        let right = Matrix::row_major(&x, rows, inner);
        multiply(MatrixMut::row_major(output, outer, inner), 0.0, left, right, 1.0, Threads::All);
        Ok(())
    })
}

/// `sum + dYᵀ X`.
fn add_weight_gradient_cpu(mut sum: Tensor, gradient: &Tensor, input: &Tensor) -> Result<Tensor> {
    let (rows, inner, outer) = (input.rows(), input.last_dimension(), gradient.last_dimension());
    let (g, x) = (gradient.host_f32()?, input.host_f32()?);
    let left = Matrix::row_major(&g, rows, outer).transposed();
    let right = Matrix::row_major(&x, rows, inner);
    multiply(MatrixMut::row_major(sum.make_mut()?, outer, inner), 1.0, left, right, 1.0, Threads::All);
    Ok(sum)
}

/// `db = Σ_rows dY`.
fn bias_gradient_cpu(gradient: &Tensor) -> Result<Tensor> {
    let outer = gradient.last_dimension();
    let values = gradient.host_f32()?;
    let partial_sums: Vec<Vec<f32>> = values
        .par_chunks((BIAS_ROWS * outer).max(1))
        .map(|block| {
            let mut sums = vec![0.0; outer];
            for row in block.chunks_exact(outer.max(1)) {
                for (sum, value) in sums.iter_mut().zip(row) {
                    *sum += value;
                }
            }
            sums
        })
        .collect();
    Tensor::compute(gradient.device(), &[outer], DType::F32, |total| {
        total.fill(0.0);
        for sums in &partial_sums {
            for (total, sum) in total.iter_mut().zip(sums) {
                *total += sum;
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use runtime::Device;

    use super::*;
    use crate::ops;

    fn ramp(shape: &[usize], modulus: usize) -> Tensor {
        let count: usize = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|i| (i * 7 % modulus) as f32 - (modulus / 2) as f32).collect();
        Tensor::from_slice(&Device::cpu(), shape, &values).unwrap()
    }

    /// Integer-valued inputs: every way must give the same exact sums.
    #[test]
    fn all_ways_agree_exactly_on_integers() {
        for (rows, inner, outer) in [(1, 5, 3), (4, 33, 65), (5, 33, 65), (9, 16, 2100), (0, 3, 2), (3, 0, 2)] {
            let (input, weight, bias) = (ramp(&[rows, inner], 11), ramp(&[outer, inner], 9), ramp(&[outer], 5));
            let narrow = weight.cast(DType::Bf16).unwrap();
            let (x, w, b) =
                (input.to_vec::<f32>().unwrap(), weight.to_vec::<f32>().unwrap(), bias.to_vec::<f32>().unwrap());
            let expected: Vec<f32> = (0..rows * outer)
                .map(|i| {
                    b[i % outer] + (0..inner).map(|k| x[i / outer * inner + k] * w[i % outer * inner + k]).sum::<f32>()
                })
                .collect();
            for weight in [&weight, &narrow] {
                let tape = Tape::new();
                let (vx, vb) = (tape.leaf(&input), tape.leaf(&bias));
                let output = linear(&tape, &vx, &tape.leaf(weight), Some(&vb)).unwrap();
                assert_eq!(output.to_vec::<f32>().unwrap(), expected, "{rows} {inner} {outer} {weight:?}");
                let total = ops::sum(&tape, &output).unwrap();
                let gradients = tape.backward(&total).unwrap();
                let column_sums: Vec<f32> = (0..inner).map(|k| (0..outer).map(|o| w[o * inner + k]).sum()).collect();
                assert_eq!(gradients.get(&input).unwrap().to_vec::<f32>().unwrap(), column_sums.repeat(rows));
                let row_sums: Vec<f32> = (0..inner).map(|k| (0..rows).map(|r| x[r * inner + k]).sum()).collect();
                assert_eq!(gradients.get(weight).unwrap().to_vec::<f32>().unwrap(), row_sums.repeat(outer));
                assert_eq!(gradients.get(&bias).unwrap().to_vec::<f32>().unwrap(), vec![rows as f32; outer]);
            }
        }
    }

    #[test]
    fn a_weight_of_another_width_is_refused() {
        let (x, w) = (Var::constant(&ramp(&[2, 3], 5)), Var::constant(&ramp(&[4, 5], 5)));
        let message = linear(&Tape::inference(), &x, &w, None).unwrap_err().to_string();
        assert_eq!(message, "linear: weight has shape [4, 5], expected [4, 3]");
    }
}
