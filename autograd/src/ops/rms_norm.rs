//! Root-mean-square normalisation.

use half::bf16;
use kernels_ptx::kernels::column_sums::ColumnSums;
use kernels_ptx::kernels::rms_norm::{
    RmsNormForward, RmsNormInputGradient, RmsNormWeightGradient, rows_grid, takes_vectors,
};
use rayon::prelude::*;
use runtime::Argument;

use crate::gpu::{self, Output};
use crate::{DType, Result, Tape, Tensor, Var, check, cpu};

const OPERATOR: &str = "rms_norm";

/// Rows whose contributions to the weight's gradient are summed together before the blocks are added in order, so that
/// the sum does not depend on the number of threads.
const BLOCK_ROWS: usize = 64;

/// `y = weight · x / sqrt(mean(x²) + epsilon)` over the innermost dimension (Zhang and Sennrich 2019). In bf16 the
/// normalised value is rounded to bf16 before the product with the weight, as Hugging Face's Llama and Mistral do.
///
/// - `input` `[…, width]`, `weight` `[width]`, result like `input`
///
/// # Errors
/// Shape errors that name the argument.
pub fn rms_norm(tape: &Tape<'_>, input: &Var, weight: &Var, epsilon: f32) -> Result<Var> {
    check::is_float(OPERATOR, "input", input)?;
    check::is_float(OPERATOR, "weight", weight)?;
    check::shape(OPERATOR, "weight", weight, &[input.last_dimension()])?;
    let (saved_input, saved_weight) = (input.tensor().clone(), weight.tensor().clone());
    if input.device().is_cpu() {
        let (output, inverse_roots) = forward_cpu(input, weight, epsilon)?;
        return Ok(tape.record_one(&[input, weight], output, move |gradient, needed| {
            let (input_gradient, weight_gradient) =
                backward_cpu(gradient, &saved_input, &saved_weight, &inverse_roots, needed)?;
            Ok(vec![input_gradient, weight_gradient])
        }));
    }
    let (output, inverse_roots) = forward_gpu(input, weight, epsilon)?;
    Ok(tape.record_one(&[input, weight], output, move |gradient, needed| {
        let gradient = gradient.cast(saved_input.dtype())?;
        let input_gradient = if needed[0] {
            Some(input_gradient_gpu(&gradient, &saved_input, &saved_weight, &inverse_roots)?)
        } else {
            None
        };
        let weight_gradient =
            if needed[1] { Some(weight_gradient_gpu(&gradient, &saved_input, &inverse_roots)?) } else { None };
        Ok(vec![input_gradient, weight_gradient])
    }))
}

/// Rows and width as kernels take them.
fn sizes(input: &Tensor) -> Result<(u32, u32)> {
    let rows = gpu::size(OPERATOR, "the number of rows", input.rows())?;
    Ok((rows, gpu::size(OPERATOR, "the width", input.last_dimension())?))
}

fn forward_gpu(input: &Tensor, weight: &Tensor, epsilon: f32) -> Result<(Tensor, Tensor)> {
    let (device, (rows, width)) = (input.device(), sizes(input)?);
    let kernel = RmsNormForward {
        element: gpu::element(input.dtype()),
        weight: gpu::element(weight.dtype()),
        vector: takes_vectors(width),
    };
    let (mut output, mut inverse_roots) = (Output::like(input)?, Output::new(device, &[input.rows()], DType::F32)?);
    let arguments = [
        output.write(),
        inverse_roots.write(),
        gpu::read(input),
        gpu::read(weight),
        Argument::F32(epsilon),
        Argument::U32(rows),
        Argument::U32(width),
    ];
    gpu::launch(OPERATOR, device, &kernel, rows_grid(rows), &[rows.into(), width.into()], &arguments)?;
    Ok((output.tensor(), inverse_roots.tensor()))
}

fn input_gradient_gpu(gradient: &Tensor, input: &Tensor, weight: &Tensor, inverse_roots: &Tensor) -> Result<Tensor> {
    let (device, (rows, width)) = (input.device(), sizes(input)?);
    let kernel = RmsNormInputGradient {
        element: gpu::element(input.dtype()),
        weight: gpu::element(weight.dtype()),
        vector: takes_vectors(width),
    };
    let mut input_gradient = Output::like(input)?;
    let arguments = [
        input_gradient.write(),
        gpu::read(gradient),
        gpu::read(input),
        gpu::read(weight),
        gpu::read(inverse_roots),
        Argument::U32(rows),
        Argument::U32(width),
    ];
    gpu::launch(OPERATOR, device, &kernel, rows_grid(rows), &[rows.into(), width.into()], &arguments)?;
    Ok(input_gradient.tensor())
}

/// Sums over parts of the rows, then over the parts.
fn weight_gradient_gpu(gradient: &Tensor, input: &Tensor, inverse_roots: &Tensor) -> Result<Tensor> {
    let (device, (rows, width)) = (input.device(), sizes(input)?);
    let kernel = RmsNormWeightGradient { element: gpu::element(input.dtype()), vector: takes_vectors(width) };
    let (parts, part_rows) = RmsNormWeightGradient::parts(rows);
    let mut sums = Output::new(device, &[parts as usize, width as usize], DType::F32)?;
    let arguments = [
        sums.write(),
        gpu::read(gradient),
        gpu::read(input),
        gpu::read(inverse_roots),
        Argument::U32(rows),
        Argument::U32(width),
        Argument::U32(part_rows),
    ];
    let grid = kernel.grid(width, parts);
    gpu::launch(OPERATOR, device, &kernel, grid, &[rows.into(), width.into()], &arguments)?;
    let sums = sums.tensor();
    let mut total = Output::new(device, &[width as usize], DType::F32)?;
    let arguments = [
        total.write(),
        gpu::read(&sums),
        Argument::U32(parts),
        Argument::U32(width),
        Argument::U32(parts.next_multiple_of(4)),
    ];
    let kernel = ColumnSums { element: kernels_ptx::Element::F32 };
    gpu::launch(OPERATOR, device, &kernel, ColumnSums::grid(width, 1), &[parts.into(), width.into()], &arguments)?;
    Ok(total.tensor())
}

/// The result, and `1 / sqrt(mean(x²) + epsilon)` of every row.
fn forward_cpu(input: &Tensor, weight: &Tensor, epsilon: f32) -> Result<(Tensor, Vec<f32>)> {
    let width = input.last_dimension();
    let (values, weight) = (input.host_f32()?, weight.host_f32()?);
    let mut inverse_roots = vec![0.0; input.rows()];
    let narrow = input.dtype() == DType::Bf16;
    let output = Tensor::compute(input.device(), input.shape(), input.dtype(), |output| {
        if width > 0 {
            output.par_chunks_mut(width).zip(values.par_chunks(width)).zip(&mut inverse_roots).for_each(
                |((output, row), inverse_root)| {
                    cpu::simd(
                        #[inline(always)]
                        || {
                            *inverse_root = 1.0 / (cpu::dot(row, row) / width as f32 + epsilon).sqrt();
                            if narrow {
                                for ((output, x), weight) in output.iter_mut().zip(row).zip(&weight[..]) {
                                    *output = bf16::from_f32(x * *inverse_root).to_f32() * weight;
                                }
                            } else {
                                for ((output, x), weight) in output.iter_mut().zip(row).zip(&weight[..]) {
                                    *output = x * *inverse_root * weight;
                                }
                            }
                        },
                    );
                },
            );
        }
        Ok(())
    })?;
    Ok((output, inverse_roots))
}

/// With `r` the row's inverse root and `m = mean(g · weight · x)`: `dx = r (g · weight - x r² m)`,
/// `d weight = Σ_rows g · x · r`.
fn backward_cpu(
    gradient: &Tensor,
    input: &Tensor,
    weight: &Tensor,
    inverse_roots: &[f32],
    needed: &[bool],
) -> Result<(Option<Tensor>, Option<Tensor>)> {
    let width = input.last_dimension();
    let (g, x, weight_values) = (gradient.host_f32()?, input.host_f32()?, weight.host_f32()?);
    let block = BLOCK_ROWS * width.max(1);
    let mut partial_sums = vec![0.0f32; if needed[1] { x.len().div_ceil(block) * width } else { 0 }];
    if needed[1] && width > 0 {
        partial_sums
            .par_chunks_mut(width)
            .zip(g.par_chunks(block).zip(x.par_chunks(block)))
            .zip(inverse_roots.par_chunks(BLOCK_ROWS))
            .for_each(|((sums, (g, x)), inverse_roots)| {
                cpu::simd(
                    #[inline(always)]
                    || {
                        for ((g, x), root) in g.chunks_exact(width).zip(x.chunks_exact(width)).zip(inverse_roots) {
                            for ((sum, g), x) in sums.iter_mut().zip(g).zip(x) {
                                *sum += g * x * root;
                            }
                        }
                    },
                );
            });
    }
    let weight_gradient = needed[1]
        .then(|| {
            Tensor::compute(weight.device(), &[width], DType::F32, |total| {
                total.fill(0.0);
                for sums in partial_sums.chunks_exact(width.max(1)) {
                    for (total, sum) in total.iter_mut().zip(sums) {
                        *total += sum;
                    }
                }
                Ok(())
            })
        })
        .transpose()?;
    let input_gradient = needed[0]
        .then(|| {
            Tensor::compute(input.device(), input.shape(), input.dtype(), |output| {
                if width == 0 {
                    return Ok(());
                }
                output
                    .par_chunks_mut(width)
                    .zip(g.par_chunks(width).zip(x.par_chunks(width)))
                    .zip(inverse_roots)
                    .for_each(|((output, (g, x)), &root)| {
                        cpu::simd(
                            #[inline(always)]
                            || {
                                for ((output, g), weight) in output.iter_mut().zip(g).zip(&weight_values[..]) {
                                    *output = g * weight;
                                }
                                let factor = root * root * cpu::dot(output, x) / width as f32;
                                for (output, x) in output.iter_mut().zip(x) {
                                    *output = root * (*output - x * factor);
                                }
                            },
                        );
                    });
                Ok(())
            })
        })
        .transpose()?;
    Ok((input_gradient, weight_gradient))
}

#[cfg(test)]
mod tests {
    use runtime::Device;

    use super::*;

    #[test]
    fn a_row_of_equal_values_becomes_the_weight() {
        let device = Device::cpu();
        let input = Var::constant(&Tensor::filled(&device, &[2, 4], DType::F32, 3.0).unwrap());
        let weight = Var::constant(&Tensor::from_slice(&device, &[4], &[1.0f32, 2.0, -1.0, 0.0]).unwrap());
        let output = rms_norm(&Tape::inference(), &input, &weight, 0.0).unwrap();
        assert_eq!(output.to_vec::<f32>().unwrap(), [1.0, 2.0, -1.0, 0.0, 1.0, 2.0, -1.0, 0.0]);
    }

    #[test]
    fn a_weight_of_another_width_is_refused() {
        let device = Device::cpu();
        let input = Var::constant(&Tensor::zeros(&device, &[2, 4], DType::F32).unwrap());
        let weight = Var::constant(&Tensor::zeros(&device, &[3], DType::F32).unwrap());
        let message = rms_norm(&Tape::inference(), &input, &weight, 1e-5).unwrap_err().to_string();
        assert_eq!(message, "rms_norm: weight has shape [3], expected [4]");
    }
}
