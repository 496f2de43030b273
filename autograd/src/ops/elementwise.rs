//! Operators that treat every element alike, and the sum.

use kernels_ptx::kernels::elementwise::{Elementwise, Operation};
use kernels_ptx::kernels::square_sums::SquareSums;
use kernels_ptx::kernels::sum::{Broadcast, Sum};
use rayon::prelude::*;
use runtime::{Argument, Device, Table, Word};

use crate::gpu::{self, Output};
use crate::{DType, Error, Result, Tape, Tensor, Var, check, cpu};

/// Elements of a block: what one thread takes at a time, and the unit in which sums are formed.
const BLOCK: usize = 1 << 14;

/// `a + b`, equal shapes.
///
/// # Errors
/// A shape error when they differ.
pub fn add(tape: &Tape<'_>, a: &Var, b: &Var) -> Result<Var> {
    let output = zip("add", Operation::Add, a, b, |a, b| a + b)?;
    Ok(tape.record_one(&[a, b], output, |gradient, _| Ok(vec![Some(gradient.clone()), Some(gradient.clone())])))
}

/// `a - b`, equal shapes.
///
/// # Errors
/// A shape error when they differ.
pub fn sub(tape: &Tape<'_>, a: &Var, b: &Var) -> Result<Var> {
    let output = zip("sub", Operation::Sub, a, b, |a, b| a - b)?;
    Ok(tape.record_one(&[a, b], output, |gradient, needed| {
        let negative = if needed[1] { Some(scaled("sub", gradient, -1.0)?) } else { None };
        Ok(vec![Some(gradient.clone()), negative])
    }))
}

/// `a · b` elementwise, equal shapes.
///
/// # Errors
/// A shape error when they differ.
pub fn mul(tape: &Tape<'_>, a: &Var, b: &Var) -> Result<Var> {
    const OPERATOR: &str = "mul";
    let output = product(OPERATOR, a, b)?;
    let (saved_a, saved_b) = (a.tensor().clone(), b.tensor().clone());
    Ok(tape.record_one(&[a, b], output, move |gradient, needed| {
        let a_gradient = if needed[0] { Some(product(OPERATOR, gradient, &saved_b)?) } else { None };
        let b_gradient = if needed[1] { Some(product(OPERATOR, gradient, &saved_a)?) } else { None };
        Ok(vec![a_gradient, b_gradient])
    }))
}

/// `factor · x`.
///
/// # Errors
/// Element-type errors.
pub fn scale(tape: &Tape<'_>, x: &Var, factor: f32) -> Result<Var> {
    const OPERATOR: &str = "scale";
    let output = scaled(OPERATOR, x, factor)?;
    Ok(tape.record_one(&[x], output, move |gradient, _| Ok(vec![Some(scaled(OPERATOR, gradient, factor)?)])))
}

/// `-e^x`: from a Mamba mixer's `A_log` to its A.
///
/// # Errors
/// Element-type errors.
pub fn negative_exp(tape: &Tape<'_>, x: &Var) -> Result<Var> {
    const OPERATOR: &str = "negative_exp";
    let output = map(OPERATOR, Operation::NegativeExp, x, |x| -cpu::exp(x))?;
    let saved = output.clone();
    Ok(tape.record_one(&[x], output, move |gradient, _| Ok(vec![Some(product(OPERATOR, gradient, &saved)?)])))
}

/// `x · sigmoid(x)`.
///
/// # Errors
/// Element-type errors.
pub fn silu(tape: &Tape<'_>, x: &Var) -> Result<Var> {
    const OPERATOR: &str = "silu";
    let output = map(OPERATOR, Operation::Silu, x, |x| x * cpu::sigmoid(x))?;
    let saved = x.tensor().clone();
    Ok(tape.record_one(&[x], output, move |gradient, _| {
        let slope = |g: f32, x: f32| {
            let s = cpu::sigmoid(x);
            g * s * (1.0 + x * (1.0 - s))
        };
        Ok(vec![Some(zip(OPERATOR, Operation::SiluGradient, gradient, &saved, slope)?)])
    }))
}

/// `ln(1 + e^x)`; values above 20 pass through.
///
/// # Errors
/// Element-type errors.
pub fn softplus(tape: &Tape<'_>, x: &Var) -> Result<Var> {
    const OPERATOR: &str = "softplus";
    let output = map(OPERATOR, Operation::Softplus, x, cpu::softplus)?;
    let saved = x.tensor().clone();
    Ok(tape.record_one(&[x], output, move |gradient, _| {
        let slope = |g: f32, x: f32| if x > 20.0 { g } else { g * cpu::sigmoid(x) };
        Ok(vec![Some(zip(OPERATOR, Operation::SoftplusGradient, gradient, &saved, slope)?)])
    }))
}

/// The sum of all elements, a scalar f32.
///
/// # Errors
/// Element-type errors.
pub fn sum(tape: &Tape<'_>, x: &Var) -> Result<Var> {
    const OPERATOR: &str = "sum";
    check::is_float(OPERATOR, "x", x)?;
    let output = if x.device().is_cpu() { sum_cpu(x)? } else { sum_gpu(x)? };
    let (shape, dtype) = (x.shape().to_vec(), x.dtype());
    Ok(tape.record_one(&[x], output, move |gradient, _| Ok(vec![Some(broadcast(gradient, &shape, dtype)?)])))
}

fn sum_cpu(x: &Tensor) -> Result<Tensor> {
    let values = x.host_f32()?;
    let blocks: Vec<f64> =
        values.par_chunks(BLOCK).map(|block| block.iter().map(|value| f64::from(*value)).sum()).collect();
    Tensor::from_slice(x.device(), &[], &[blocks.iter().sum::<f64>() as f32])
}

/// Sums segments, then their sums.
fn sum_gpu(x: &Tensor) -> Result<Tensor> {
    const OPERATOR: &str = "sum";
    let count = gpu::size(OPERATOR, "the number of elements", x.count())?;
    let (blocks, segment) = Sum::segments(count);
    let shape: &[usize] = if blocks == 1 { &[] } else { &[blocks as usize] };
    let mut sums = Output::new(x.device(), shape, DType::F32)?;
    let kernel = Sum { element: gpu::element(x.dtype()) };
    let arguments = [sums.write(), gpu::read(x), Argument::U32(count), Argument::U32(segment)];
    gpu::launch(OPERATOR, x.device(), &kernel, Some([blocks, 1, 1]), &[count.into()], &arguments)?;
    if blocks == 1 { Ok(sums.tensor()) } else { sum_gpu(&sums.tensor()) }
}

/// The square of the Euclidean norm of several tensors' elements together, a scalar f32. On a GPU.
pub(crate) fn square_sum_gpu(operator: &'static str, device: &Device, tensors: &[&Tensor]) -> Result<Tensor> {
    // One launch per element type; the tensors' sums are added in the order of the tensors nevertheless.
    let mut launches = [DType::F32, DType::Bf16].map(|dtype| (dtype, Vec::new(), 0, 0));
    let mut place = 0;
    for tensor in tensors {
        check::is_float(operator, "tensor", tensor)?;
        let count = gpu::size(operator, "the number of elements", tensor.count())?;
        let (blocks, segment) = Sum::segments(count);
        for (dtype, words, first, elements) in &mut launches {
            if *dtype == tensor.dtype() {
                let numbers = [count.into(), segment.into(), *first, place].map(Word::U64);
                words.push(Word::Read(tensor.buffer(), gpu::element(*dtype)));
                words.extend(numbers);
                *first += u64::from(blocks);
                *elements += u64::from(count);
            }
        }
        place += u64::from(blocks);
    }
    let mut sums = Output::new(device, &[place as usize], DType::F32)?;
    for (dtype, words, blocks, elements) in launches {
        if words.is_empty() {
            continue;
        }
        let kernel = SquareSums { element: gpu::element(dtype) };
        let rows = gpu::size(operator, "the number of tensors", words.len() / SquareSums::WORDS)?;
        let table = Table::new();
        let arguments = [sums.write(), Argument::Table(&table, words), Argument::U32(rows)];
        gpu::launch(operator, device, &kernel, gpu::line(blocks), &[elements], &arguments)?;
    }
    sum_gpu(&sums.tensor())
}

/// A scalar in every place. On GPUs it is read there: the host does not wait for it.
fn broadcast(scalar: &Tensor, shape: &[usize], dtype: DType) -> Result<Tensor> {
    const OPERATOR: &str = "sum";
    let device = scalar.device();
    if device.is_cpu() {
        return Tensor::filled(device, shape, dtype, scalar.item()?);
    }
    let count = gpu::size(OPERATOR, "the number of elements", shape.iter().product())?;
    let kernel = Broadcast { element: gpu::element(dtype) };
    let mut output = Output::new(device, shape, dtype)?;
    let arguments = [output.write(), gpu::read(scalar), Argument::U32(count)];
    gpu::launch(OPERATOR, device, &kernel, kernel.grid(count.into()), &[count.into()], &arguments)?;
    Ok(output.tensor())
}

/// `sum += addend`, outside any tape: in `sum`'s memory where nothing else shares it.
///
/// # Errors
/// A shape error when they differ.
pub fn add_in_place(sum: &mut Tensor, addend: &Tensor) -> Result<()> {
    const OPERATOR: &str = "add_in_place";
    check::shape(OPERATOR, "addend", addend, sum.shape())?;
    let on_cpu = sum.device().is_cpu();
    if sum.is_shared() || (sum.dtype() == DType::Bf16 && (on_cpu || addend.dtype() == DType::F32)) {
        *sum = zip(OPERATOR, Operation::Add, sum, addend, |a, b| a + b)?;
        return Ok(());
    }
    if !on_cpu {
        let addend = addend.cast(sum.dtype())?;
        return in_place_gpu(OPERATOR, Operation::Add, sum, gpu::read(&addend));
    }
    let addend = addend.host_f32()?;
    sum.make_mut::<f32>()?.par_chunks_mut(BLOCK).zip(addend.par_chunks(BLOCK)).for_each(|(sum, addend)| {
        cpu::simd(
            #[inline(always)]
            || {
                for (sum, addend) in sum.iter_mut().zip(addend) {
                    *sum += addend;
                }
            },
        );
    });
    Ok(())
}

/// `x *= factor`, outside any tape: in `x`'s memory where nothing else shares it.
///
/// # Errors
/// Element-type errors.
pub fn scale_in_place(x: &mut Tensor, factor: f32) -> Result<()> {
    const OPERATOR: &str = "scale_in_place";
    let on_cpu = x.device().is_cpu();
    if x.is_shared() || (x.dtype() == DType::Bf16 && on_cpu) {
        *x = scaled(OPERATOR, x, factor)?;
        return Ok(());
    }
    if !on_cpu {
        check::is_float(OPERATOR, "x", x)?;
        return in_place_gpu(OPERATOR, Operation::Scale, x, Argument::F32(factor));
    }
    x.make_mut::<f32>()?.par_chunks_mut(BLOCK).for_each(|block| {
        cpu::simd(
            #[inline(always)]
            || {
                for value in block {
                    *value *= factor;
                }
            },
        );
    });
    Ok(())
}

/// `target = operation(target, operand)`, where the operand is a tensor of the target's type or a number.
fn in_place_gpu(
    operator: &'static str,
    operation: Operation,
    target: &mut Tensor,
    operand: Argument<'_>,
) -> Result<()> {
    let (device, dtype) = (target.device().clone(), gpu::element(target.dtype()));
    let count = gpu::size(operator, "the number of elements", target.count())?;
    let kernel = Elementwise { operation, element: dtype, in_place: true };
    let arguments = [Argument::Write(target.make_unique()?, dtype), operand, Argument::U32(count)];
    gpu::launch(operator, &device, &kernel, kernel.grid(count.into()), &[count.into()], &arguments)
}

/// `factor · x`.
fn scaled(operator: &'static str, x: &Tensor, factor: f32) -> Result<Tensor> {
    check::is_float(operator, "x", x)?;
    if x.device().is_cpu() {
        return map_cpu(x, move |x| factor * x);
    }
    apply_gpu(operator, Operation::Scale, x, Some(Argument::F32(factor)))
}

/// `a · b`.
fn product(operator: &'static str, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    zip(operator, Operation::Mul, a, b, |a, b| a * b)
}

/// An operation on every element; on the CPU by `function`.
fn map(
    operator: &'static str,
    operation: Operation,
    x: &Tensor,
    function: impl Fn(f32) -> f32 + Copy + Send + Sync,
) -> Result<Tensor> {
    check::is_float(operator, "x", x)?;
    if x.device().is_cpu() { map_cpu(x, function) } else { apply_gpu(operator, operation, x, None) }
}

/// An operation on every pair of elements, on the CPU by `function`; the result has `a`'s element type.
fn zip(
    operator: &'static str,
    operation: Operation,
    a: &Tensor,
    b: &Tensor,
    function: impl Fn(f32, f32) -> f32 + Copy + Send + Sync,
) -> Result<Tensor> {
    check::is_float(operator, "a", a)?;
    check::is_float(operator, "b", b)?;
    if a.shape() != b.shape() {
        return Err(Error::Shape {
            operator,
            argument: "b",
            expected: format!("{:?} like a", a.shape()),
            found: b.shape().to_vec(),
        });
    }
    if a.device().is_cpu() {
        return zip_cpu(a, b, function);
    }
    // Where the types differ, what bf16 would lose is kept until the result is rounded.
    let common = if a.dtype() == b.dtype() { a.dtype() } else { DType::F32 };
    let (wide_a, wide_b) = (a.cast(common)?, b.cast(common)?);
    apply_gpu(operator, operation, &wide_a, Some(gpu::read(&wide_b)))?.cast(a.dtype())
}

/// `operation(a, operand)`, where the operand is a tensor of a's type or a number.
fn apply_gpu(
    operator: &'static str,
    operation: Operation,
    a: &Tensor,
    operand: Option<Argument<'_>>,
) -> Result<Tensor> {
    let count = gpu::size(operator, "the number of elements", a.count())?;
    let kernel = Elementwise { operation, element: gpu::element(a.dtype()), in_place: false };
    let mut output = Output::like(a)?;
    let mut arguments = vec![output.write(), gpu::read(a)];
    arguments.extend(operand);
    arguments.push(Argument::U32(count));
    gpu::launch(operator, a.device(), &kernel, kernel.grid(count.into()), &[count.into()], &arguments)?;
    Ok(output.tensor())
}

/// `function` of every element.
fn map_cpu(x: &Tensor, function: impl Fn(f32) -> f32 + Copy + Send + Sync) -> Result<Tensor> {
    let values = x.host_f32()?;
    Tensor::compute(x.device(), x.shape(), x.dtype(), |output| {
        output.par_chunks_mut(BLOCK).zip(values.par_chunks(BLOCK)).for_each(|(output, values)| {
            cpu::simd(
                #[inline(always)]
                || {
                    for (output, value) in output.iter_mut().zip(values) {
                        *output = function(*value);
                    }
                },
            );
        });
        Ok(())
    })
}

/// `function` of every pair of elements; the result has `a`'s element type.
pub(super) fn zip_cpu(
    a: &Tensor,
    b: &Tensor,
    function: impl Fn(f32, f32) -> f32 + Copy + Send + Sync,
) -> Result<Tensor> {
    let (a_values, b_values) = (a.host_f32()?, b.host_f32()?);
    Tensor::compute(a.device(), a.shape(), a.dtype(), |output| {
        output.par_chunks_mut(BLOCK).zip(a_values.par_chunks(BLOCK)).zip(b_values.par_chunks(BLOCK)).for_each(
            |((output, a), b)| {
                cpu::simd(
                    #[inline(always)]
                    || {
                        for ((output, a), b) in output.iter_mut().zip(a).zip(b) {
                            *output = function(*a, *b);
                        }
                    },
                );
            },
        );
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use runtime::Device;

    use super::*;

    fn vector(values: &[f32]) -> Tensor {
        Tensor::from_slice(&Device::cpu(), &[values.len()], values).unwrap()
    }

    #[test]
    fn gradients_of_a_small_expression() {
        // Σ (a·b - 2a), so da = b - 2 and db = a.
        let (a, b) = (vector(&[1.0, 2.0]), vector(&[5.0, -3.0]));
        let tape = Tape::new();
        let (va, vb) = (tape.leaf(&a), tape.leaf(&b));
        let difference = sub(&tape, &mul(&tape, &va, &vb).unwrap(), &scale(&tape, &va, 2.0).unwrap()).unwrap();
        let total = sum(&tape, &difference).unwrap();
        assert_eq!(total.item().unwrap(), -7.0);
        let gradients = tape.backward(&total).unwrap();
        assert_eq!(gradients.get(&a).unwrap().to_vec::<f32>().unwrap(), [3.0, -5.0]);
        assert_eq!(gradients.get(&b).unwrap().to_vec::<f32>().unwrap(), [1.0, 2.0]);
    }

    #[test]
    fn softplus_passes_large_values_through_and_keeps_small_ones() {
        let x = Var::constant(&vector(&[25.0, -60.0, 0.0]));
        let y = softplus(&Tape::inference(), &x).unwrap().to_vec::<f32>().unwrap();
        assert_eq!(y[0], 25.0);
        assert!((y[1] / (-60f32).exp() - 1.0).abs() < 1e-6);
        assert!((y[2] - 2f32.ln()).abs() < 1e-7);
    }

    #[test]
    fn different_shapes_are_refused_by_name() {
        let (a, b) = (Var::constant(&vector(&[1.0])), Var::constant(&vector(&[1.0, 2.0])));
        let message = add(&Tape::inference(), &a, &b).unwrap_err().to_string();
        assert_eq!(message, "add: b has shape [2], expected [1] like a");
    }
}
