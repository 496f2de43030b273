//! Operators that move values without changing them.

use kernels_ptx::Element;
use kernels_ptx::kernels::layout::{CopyColumns, RepeatChunks, SumChunks, chunks_grid, takes_vectors};
use rayon::prelude::*;
use runtime::{Argument, Device};

use crate::gpu::{self, Output};
use crate::{DType, Error, Result, Tape, Tensor, Var, check};

/// Cuts the innermost dimension into parts of the given sizes: `[…, Σ sizes]` into `[…, sizes[i]]` each.
///
/// # Errors
/// A shape error when the sizes do not add up to the innermost dimension.
pub fn split(tape: &Tape<'_>, input: &Var, sizes: &[usize]) -> Result<Vec<Var>> {
    const OPERATOR: &str = "split";
    check::is_float(OPERATOR, "input", input)?;
    if sizes.iter().sum::<usize>() != input.last_dimension() {
        return Err(Error::Shape {
            operator: OPERATOR,
            argument: "input",
            expected: format!("a last dimension of {sizes:?} together"),
            found: input.shape().to_vec(),
        });
    }
    let on_cpu = input.device().is_cpu();
    let parts = if on_cpu { split_cpu(input, sizes)? } else { split_gpu(input, sizes)? };
    let (input_like, sizes) = (Like::new(input), sizes.to_vec());
    Ok(tape.record(&[input], parts, move |gradients, _| {
        let join = if on_cpu { join_cpu } else { join_gpu };
        Ok(vec![Some(join(gradients, &input_like, &sizes)?)])
    }))
}

/// Tensors of one element each as one vector, f32 `[count]`, outside any tape: several results that are read together make
/// the host wait once.
///
/// # Errors
/// [`Error::Shape`] for a tensor of another number of elements; element-type errors.
pub fn stack(device: &Device, scalars: &[&Tensor]) -> Result<Tensor> {
    const OPERATOR: &str = "stack";
    for scalar in scalars {
        check::is_float(OPERATOR, "scalars", scalar)?;
        if scalar.count() != 1 {
            let expected = "one element each".to_owned();
            return Err(Error::Shape {
                operator: OPERATOR,
                argument: "scalars",
                expected,
                found: scalar.shape().to_vec(),
            });
        }
    }
    if device.is_cpu() {
        let values: Vec<f32> = scalars.iter().map(|scalar| scalar.item()).collect::<Result<_>>()?;
        return Tensor::from_slice(device, &[values.len()], &values);
    }
    let mut vector = Output::new(device, &[scalars.len()], DType::F32)?;
    for (place, scalar) in scalars.iter().enumerate() {
        let columns = Columns { rows: 1, count: 1, from: (0, 1), to: (place, scalars.len()) };
        copy_columns(OPERATOR, vector.write(), &scalar.cast(DType::F32)?, &columns)?;
    }
    Ok(vector.tensor())
}

/// What a tensor's gradient looks like.
struct Like {
    device: Device,
    shape: Vec<usize>,
    dtype: DType,
}

impl Like {
    fn new(tensor: &Tensor) -> Self {
        Self { device: tensor.device().clone(), shape: tensor.shape().to_vec(), dtype: tensor.dtype() }
    }
}

/// The shape with another innermost dimension.
fn with_last(shape: &[usize], size: usize) -> Vec<usize> {
    let mut shape = shape.to_vec();
    if let Some(last) = shape.last_mut() {
        *last = size;
    }
    shape
}

fn split_cpu(input: &Tensor, sizes: &[usize]) -> Result<Vec<Tensor>> {
    let (values, width) = (input.host_f32()?, input.last_dimension());
    let mut start = 0;
    let mut parts = Vec::with_capacity(sizes.len());
    for &size in sizes {
        parts.push(Tensor::compute(input.device(), &with_last(input.shape(), size), input.dtype(), |part| {
            if size > 0 {
                part.par_chunks_mut(size).zip(values.par_chunks(width)).for_each(|(part, row)| {
                    part.copy_from_slice(&row[start..][..size]);
                });
            }
            Ok(())
        })?);
        start += size;
    }
    Ok(parts)
}

fn join_cpu(gradients: &[Option<Tensor>], like: &Like, sizes: &[usize]) -> Result<Tensor> {
    let width: usize = sizes.iter().sum();
    let rows = like.shape[..like.shape.len().saturating_sub(1)].iter().product();
    Tensor::compute(&like.device, &like.shape, like.dtype, |joined| {
        let mut start = 0;
        for (gradient, &size) in gradients.iter().zip(sizes) {
            let gradient = gradient.as_ref().map(Tensor::host_f32).transpose()?;
            for row in 0..rows {
                let target = &mut joined[row * width + start..][..size];
                match &gradient {
                    Some(gradient) => target.copy_from_slice(&gradient[row * size..][..size]),
                    None => target.fill(0.0),
                }
            }
            start += size;
        }
        Ok(())
    })
}

fn split_gpu(input: &Tensor, sizes: &[usize]) -> Result<Vec<Tensor>> {
    let (rows, width) = (input.rows(), input.last_dimension());
    let mut start = 0;
    let mut parts = Vec::with_capacity(sizes.len());
    for &size in sizes {
        let mut part = Output::new(input.device(), &with_last(input.shape(), size), input.dtype())?;
        let columns = Columns { rows, count: size, from: (start, width), to: (0, size) };
        copy_columns("split", part.write(), input, &columns)?;
        parts.push(part.tensor());
        start += size;
    }
    Ok(parts)
}

fn join_gpu(gradients: &[Option<Tensor>], like: &Like, sizes: &[usize]) -> Result<Tensor> {
    let width: usize = sizes.iter().sum();
    let rows = like.shape[..like.shape.len().saturating_sub(1)].iter().product();
    let mut joined = Output::new(&like.device, &like.shape, like.dtype)?;
    if gradients.iter().any(Option::is_none) {
        joined.set_zero()?;
    }
    let mut start = 0;
    for (gradient, &size) in gradients.iter().zip(sizes) {
        if let Some(gradient) = gradient {
            let columns = Columns { rows, count: size, from: (0, size), to: (start, width) };
            copy_columns("split", joined.write(), &gradient.cast(like.dtype)?, &columns)?;
        }
        start += size;
    }
    Ok(joined.tensor())
}

/// Columns of a matrix that go to columns of another one.
pub(super) struct Columns {
    /// Rows of both matrices.
    pub rows: usize,
    /// Columns that are copied.
    pub count: usize,
    /// The first column in the input, and the input's columns.
    pub from: (usize, usize),
    /// The first column in the output, and the output's columns.
    pub to: (usize, usize),
}

/// Copies columns on a GPU. Input and output have one element type; u32 are copied as the f32 of the same bits, which is what
/// the output is then written as.
pub(super) fn copy_columns(
    operator: &'static str,
    output: Argument<'_>,
    input: &Tensor,
    columns: &Columns,
) -> Result<()> {
    let size = |size: usize| gpu::size(operator, "a dimension", size);
    let (rows, count) = (size(columns.rows)?, size(columns.count)?);
    let (from, input_width) = (size(columns.from.0)?, size(columns.from.1)?);
    let (to, output_width) = (size(columns.to.0)?, size(columns.to.1)?);
    let vector = takes_vectors(&[count, from, input_width, to, output_width]);
    let element = match input.dtype() {
        DType::Bf16 => Element::Bf16,
        DType::F32 | DType::U32 => Element::F32,
    };
    let kernel = CopyColumns { element, vector };
    let arguments = [
        output,
        Argument::Read(input.buffer(), element),
        Argument::U32(rows),
        Argument::U32(count),
        Argument::U32(output_width),
        Argument::U32(to),
        Argument::U32(input_width),
        Argument::U32(from),
    ];
    let sizes = [rows.into(), count.into()];
    gpu::launch(operator, input.device(), &kernel, kernel.grid(rows, count), &sizes, &arguments)
}

/// Repeats each run of `chunk` innermost elements `repeats` times in place (repeat-interleave of chunks):
/// `y[…, (c · repeats + r) · chunk + j] = x[…, c · chunk + j]`.
///
/// # Errors
/// A shape error when `chunk` does not divide the innermost dimension.
pub fn repeat_chunks(tape: &Tape<'_>, input: &Var, chunk: usize, repeats: usize) -> Result<Var> {
    const OPERATOR: &str = "repeat_chunks";
    check::is_float(OPERATOR, "input", input)?;
    let width = input.last_dimension();
    if chunk == 0 || repeats == 0 || !width.is_multiple_of(chunk) {
        return Err(Error::Shape {
            operator: OPERATOR,
            argument: "input",
            expected: format!("a last dimension of whole {chunk}-element chunks, repeated at least once"),
            found: input.shape().to_vec(),
        });
    }
    if repeats == 1 {
        return Ok(input.clone());
    }
    let input_like = Like::new(input);
    let on_cpu = input.device().is_cpu();
    let repeat = if on_cpu { repeat_cpu } else { repeat_gpu };
    let output = repeat(input, chunk, repeats)?;
    Ok(tape.record_one(&[input], output, move |gradient, _| {
        let sum = if on_cpu { sum_chunks_cpu } else { sum_chunks_gpu };
        Ok(vec![Some(sum(gradient, &input_like, chunk, repeats)?)])
    }))
}

fn repeat_cpu(input: &Tensor, chunk: usize, repeats: usize) -> Result<Tensor> {
    let wide = with_last(input.shape(), input.last_dimension() * repeats);
    let values = input.host_f32()?;
    Tensor::compute(input.device(), &wide, input.dtype(), |output| {
        output.par_chunks_mut(chunk * repeats).zip(values.par_chunks(chunk)).for_each(|(copies, source)| {
            for copy in copies.chunks_exact_mut(chunk) {
                copy.copy_from_slice(source);
            }
        });
        Ok(())
    })
}

fn sum_chunks_cpu(gradient: &Tensor, like: &Like, chunk: usize, repeats: usize) -> Result<Tensor> {
    let gradient = gradient.host_f32()?;
    Tensor::compute(&like.device, &like.shape, like.dtype, |summed| {
        summed.par_chunks_mut(chunk).zip(gradient.par_chunks(chunk * repeats)).for_each(|(sum, copies)| {
            sum.fill(0.0);
            for copy in copies.chunks_exact(chunk) {
                for (sum, value) in sum.iter_mut().zip(copy) {
                    *sum += value;
                }
            }
        });
        Ok(())
    })
}

fn repeat_gpu(input: &Tensor, chunk: usize, repeats: usize) -> Result<Tensor> {
    let [count, chunk, repeats] = chunk_sizes(input.count(), chunk, repeats)?;
    let vector = takes_vectors(&[chunk]);
    let kernel = RepeatChunks { element: gpu::element(input.dtype()), vector };
    let wide = with_last(input.shape(), input.last_dimension() * repeats as usize);
    let mut output = Output::new(input.device(), &wide, input.dtype())?;
    let sizes = [count, chunk, repeats].map(Argument::U32);
    let arguments: Vec<_> = [output.write(), gpu::read(input)].into_iter().chain(sizes).collect();
    let sizes = [count.into(), repeats.into()];
    gpu::launch("repeat_chunks", input.device(), &kernel, chunks_grid(vector, count), &sizes, &arguments)?;
    Ok(output.tensor())
}

fn sum_chunks_gpu(gradient: &Tensor, like: &Like, chunk: usize, repeats: usize) -> Result<Tensor> {
    let gradient = gradient.cast(like.dtype)?;
    let [count, chunk, repeats] = chunk_sizes(like.shape.iter().product(), chunk, repeats)?;
    let vector = takes_vectors(&[chunk]);
    let kernel = SumChunks { element: gpu::element(like.dtype), vector };
    let mut summed = Output::new(&like.device, &like.shape, like.dtype)?;
    let sizes = [count, chunk, repeats].map(Argument::U32);
    let arguments: Vec<_> = [summed.write(), gpu::read(&gradient)].into_iter().chain(sizes).collect();
    let sizes = [count.into(), repeats.into()];
    gpu::launch("repeat_chunks", &like.device, &kernel, chunks_grid(vector, count), &sizes, &arguments)?;
    Ok(summed.tensor())
}

fn chunk_sizes(count: usize, chunk: usize, repeats: usize) -> Result<[u32; 3]> {
    const OPERATOR: &str = "repeat_chunks";
    Ok([
        gpu::size(OPERATOR, "the number of elements", count)?,
        gpu::size(OPERATOR, "the chunk", chunk)?,
        gpu::size(OPERATOR, "the number of repetitions", repeats)?,
    ])
}

#[cfg(test)]
mod tests {
    use runtime::Device;

    use super::*;
    use crate::ops::{scale, sum};

    #[test]
    fn parts_and_their_gradients_go_where_they_belong() {
        let input = Tensor::from_slice(&Device::cpu(), &[2, 3], &[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
        let tape = Tape::new();
        let parts = split(&tape, &tape.leaf(&input), &[1, 2]).unwrap();
        assert_eq!(parts[0].to_vec::<f32>().unwrap(), [1.0, 4.0]);
        assert_eq!(parts[1].to_vec::<f32>().unwrap(), [2.0, 3.0, 5.0, 6.0]);
        let total = sum(&tape, &scale(&tape, &parts[1], 2.0).unwrap()).unwrap();
        let gradients = tape.backward(&total).unwrap();
        assert_eq!(gradients.get(&input).unwrap().to_vec::<f32>().unwrap(), [0.0, 2.0, 2.0, 0.0, 2.0, 2.0]);
    }

    #[test]
    fn chunks_repeat_in_place_and_their_gradients_add_up() {
        let input = Tensor::from_slice(&Device::cpu(), &[1, 4], &[1.0f32, 2.0, 3.0, 4.0]).unwrap();
        let tape = Tape::new();
        let output = repeat_chunks(&tape, &tape.leaf(&input), 2, 3).unwrap();
        assert_eq!(output.to_vec::<f32>().unwrap(), [1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 3.0, 4.0, 3.0, 4.0, 3.0, 4.0]);
        let total = sum(&tape, &output).unwrap();
        let gradients = tape.backward(&total).unwrap();
        assert_eq!(gradients.get(&input).unwrap().to_vec::<f32>().unwrap(), [3.0; 4]);
        assert!(repeat_chunks(&Tape::inference(), &Var::constant(&input), 3, 2).is_err());
    }
}
