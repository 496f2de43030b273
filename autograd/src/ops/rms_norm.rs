//! Root-mean-square normalisation.

use half::bf16;
use kernels_ptx::kernels::rms_norm::{Layout, RmsNormBackward, RmsNormForward};
use kernels_ptx::kernels::rms_norm_any_width::{
    RmsNormAnyWidthForward, RmsNormAnyWidthInputGradient, RmsNormAnyWidthWeightGradient, rows_grid,
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
    let sizes = sizes(input)?;
    let Some(layout) = Layout::of(sizes.1) else {
        let (output, inverse_roots) = forward_any_width(input, weight, epsilon, sizes)?;
        return Ok(tape.record_one(&[input, weight], output, move |gradient, needed| {
            let saved = Saved { input: saved_input, weight: saved_weight, inverse_roots, sizes };
            backward_any_width(&saved, gradient, needed)
        }));
    };
    let forward = forward_held(layout, input, None, weight, epsilon, sizes)?;
    Ok(tape.record_one(&[input, weight], forward.output, move |gradient, needed| {
        let saved = Saved { input: saved_input, weight: saved_weight, inverse_roots: forward.inverse_roots, sizes };
        let (input, weight) = backward_held(layout, &saved, gradient, None, needed[1])?;
        Ok(vec![Some(input), weight])
    }))
}

/// The sum `x = input + branch` of a residual stream and what a layer adds to it, and its norm: `(y, x)` with
/// `y = rms_norm(x)`. In bf16 the sum is rounded before it is normalised: the results are those of [`super::add`] and
/// [`rms_norm`] one after the other; GPUs do both in one pass where the rows fit into registers.
///
/// - `input`, `branch` `[…, width]` of one element type, `weight` `[width]`; both results like `input`
///
/// # Errors
/// Shape errors that name the argument.
pub fn rms_norm_residual(tape: &Tape<'_>, input: &Var, branch: &Var, weight: &Var, epsilon: f32) -> Result<(Var, Var)> {
    const OPERATOR: &str = "rms_norm_residual";
    check::is_float(OPERATOR, "input", input)?;
    check::is_float(OPERATOR, "weight", weight)?;
    check::shape(OPERATOR, "branch", branch, input.shape())?;
    check::shape(OPERATOR, "weight", weight, &[input.last_dimension()])?;
    let sizes = sizes(input)?;
    let layout = if input.device().is_cpu() || input.dtype() != branch.dtype() { None } else { Layout::of(sizes.1) };
    let Some(layout) = layout else {
        let sum = super::add(tape, input, branch)?;
        return Ok((rms_norm(tape, &sum, weight, epsilon)?, sum));
    };
    let forward = forward_held(layout, input, Some(branch), weight, epsilon, sizes)?;
    let saved = Saved {
        input: forward.normalised.clone(),
        weight: weight.tensor().clone(),
        inverse_roots: forward.inverse_roots,
        sizes,
    };
    let outputs = vec![forward.output, forward.normalised];
    let mut outputs = tape.record(&[input, branch, weight], outputs, move |gradients, needed| {
        let (sum, weight) = match (&gradients[0], &gradients[1]) {
            (Some(gradient), added) => {
                let (sum, weight) = backward_held(layout, &saved, gradient, added.as_ref(), needed[2])?;
                (Some(sum), weight)
            }
            (None, added) => (added.clone(), None),
        };
        Ok(vec![sum.clone(), sum, weight])
    });
    let sum = outputs.swap_remove(1);
    Ok((outputs.swap_remove(0), sum))
}

/// Rows and width as kernels take them.
fn sizes(input: &Tensor) -> Result<(u32, u32)> {
    let rows = gpu::size(OPERATOR, "the number of rows", input.rows())?;
    Ok((rows, gpu::size(OPERATOR, "the width", input.last_dimension())?))
}

/// What the backward pass needs.
struct Saved {
    /// What was normalised.
    input: Tensor,
    weight: Tensor,
    inverse_roots: Tensor,
    /// Rows and width.
    sizes: (u32, u32),
}

/// Results of the forward pass of rows in registers.
struct Forward {
    output: Tensor,
    /// What was normalised.
    normalised: Tensor,
    inverse_roots: Tensor,
}

/// Normalises the input, or its sum with a branch.
fn forward_held(
    layout: Layout,
    input: &Tensor,
    branch: Option<&Tensor>,
    weight: &Tensor,
    epsilon: f32,
    (rows, width): (u32, u32),
) -> Result<Forward> {
    let device = input.device();
    let kernel = RmsNormForward {
        element: gpu::element(input.dtype()),
        weight: gpu::element(weight.dtype()),
        layout,
        residual: branch.is_some(),
    };
    let (mut output, mut inverse_roots) = (Output::like(input)?, Output::new(device, &[input.rows()], DType::F32)?);
    let mut sum = branch.map(Output::like).transpose()?;
    let mut arguments = vec![output.write()];
    arguments.extend(sum.as_mut().map(Output::write));
    arguments.extend([inverse_roots.write(), gpu::read(input)]);
    arguments.extend(branch.map(gpu::read));
    arguments.extend([gpu::read(weight), Argument::F32(epsilon), Argument::U32(rows), Argument::U32(width)]);
    let sizes = [rows.into(), width.into()];
    gpu::launch(OPERATOR, device, &kernel, layout.forward_grid(rows), &sizes, &arguments)?;
    drop(arguments);
    Ok(Forward {
        output: output.tensor(),
        normalised: sum.map_or_else(|| input.clone(), Output::tensor),
        inverse_roots: inverse_roots.tensor(),
    })
}

/// The gradients of what was normalised, with the gradient that it has from elsewhere `added`, and of the weight.
fn backward_held(
    layout: Layout,
    saved: &Saved,
    gradient: &Tensor,
    added: Option<&Tensor>,
    weight_needed: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    let Saved { input, weight, inverse_roots, sizes: (rows, width) } = saved;
    let device = input.device();
    let kernel = RmsNormBackward {
        element: gpu::element(input.dtype()),
        weight: gpu::element(weight.dtype()),
        layout,
        residual: added.is_some(),
    };
    let gradient = gradient.cast(input.dtype())?;
    let added = added.map(|added| added.cast(input.dtype())).transpose()?;
    let mut input_gradient = Output::like(input)?;
    let mut weight_gradient = Output::new(device, &[*width as usize], DType::F32)?;
    let mut sums = device.zeroed(layout.sums(*rows, *width) * DType::U32.size())?;
    let mut arguments = vec![input_gradient.write(), weight_gradient.write()];
    arguments.extend([Argument::Write(sums.buffer(), kernels_ptx::Element::U32), gpu::read(&gradient)]);
    arguments.extend(added.as_ref().map(gpu::read));
    arguments.extend([gpu::read(input), gpu::read(weight), gpu::read(inverse_roots)]);
    arguments.extend([*rows, *width, layout.row_blocks(*rows)].map(Argument::U32));
    let sizes = [u64::from(*rows), u64::from(*width)];
    gpu::launch(OPERATOR, device, &kernel, layout.backward_grid(*rows, *width), &sizes, &arguments)?;
    drop(arguments);
    sums.keep()?;
    Ok((input_gradient.tensor(), weight_needed.then(|| weight_gradient.tensor())))
}

fn forward_any_width(
    input: &Tensor,
    weight: &Tensor,
    epsilon: f32,
    (rows, width): (u32, u32),
) -> Result<(Tensor, Tensor)> {
    let device = input.device();
    let kernel = RmsNormAnyWidthForward { element: gpu::element(input.dtype()), weight: gpu::element(weight.dtype()) };
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

fn backward_any_width(saved: &Saved, gradient: &Tensor, needed: &[bool]) -> Result<Vec<Option<Tensor>>> {
    let gradient = gradient.cast(saved.input.dtype())?;
    let input = needed[0].then(|| input_gradient_any_width(saved, &gradient)).transpose()?;
    let weight = needed[1].then(|| weight_gradient_any_width(saved, &gradient)).transpose()?;
    Ok(vec![input, weight])
}

fn input_gradient_any_width(saved: &Saved, gradient: &Tensor) -> Result<Tensor> {
    let Saved { input, weight, inverse_roots, sizes: (rows, width) } = saved;
    let kernel =
        RmsNormAnyWidthInputGradient { element: gpu::element(input.dtype()), weight: gpu::element(weight.dtype()) };
    let mut input_gradient = Output::like(input)?;
    let arguments = [
        input_gradient.write(),
        gpu::read(gradient),
        gpu::read(input),
        gpu::read(weight),
        gpu::read(inverse_roots),
        Argument::U32(*rows),
        Argument::U32(*width),
    ];
    let sizes = [u64::from(*rows), u64::from(*width)];
    gpu::launch(OPERATOR, input.device(), &kernel, rows_grid(*rows), &sizes, &arguments)?;
    Ok(input_gradient.tensor())
}

/// Sums over parts of the rows, then over the parts.
fn weight_gradient_any_width(saved: &Saved, gradient: &Tensor) -> Result<Tensor> {
    let Saved { input, inverse_roots, sizes: (rows, width), .. } = saved;
    let kernel = RmsNormAnyWidthWeightGradient { element: gpu::element(input.dtype()) };
    let (parts, part_rows) = RmsNormAnyWidthWeightGradient::parts(*rows);
    let mut sums = Output::new(input.device(), &[parts as usize, *width as usize], DType::F32)?;
    let arguments = [
        sums.write(),
        gpu::read(gradient),
        gpu::read(input),
        gpu::read(inverse_roots),
        Argument::U32(*rows),
        Argument::U32(*width),
        Argument::U32(part_rows),
    ];
    let (grid, sizes) = (RmsNormAnyWidthWeightGradient::grid(*width, parts), [u64::from(*rows), u64::from(*width)]);
    gpu::launch(OPERATOR, input.device(), &kernel, grid, &sizes, &arguments)?;
    gpu::column_sums(OPERATOR, (&sums.tensor(), &[*width as usize]), parts)
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
