//! Rows of a table by index.

use std::collections::BTreeMap;

use half::bf16;
use kernels_ptx::kernels::embedding::{EmbeddingBackward, EmbeddingForward, EmbeddingOrder, EmbeddingRepeated};
use rayon::prelude::*;
use runtime::Argument;

use crate::gpu::{self, Output};
use crate::{DType, Error, Result, Tape, Tensor, Var, check, cpu};

const OPERATOR: &str = "embedding";

/// `y[…, :] = weight[ids[…], :]`.
///
/// - `ids` u32 `[…]`, `weight` `[vocabulary, width]`, result `[…, width]` of element type `output`: the type that the
///   forward pass computes in, which need not be the one that weights are kept in
///
/// On GPUs, where reading the ids would make the host wait, an id outside the vocabulary gives a row of NaN.
///
/// # Errors
/// [`crate::Error::IndexOutOfRange`] on the CPU for an id outside the vocabulary.
pub fn embedding(tape: &Tape<'_>, ids: &Tensor, weight: &Var, output: DType) -> Result<Var> {
    check::is_u32(OPERATOR, "ids", ids)?;
    check::is_float(OPERATOR, "weight", weight)?;
    check::rank(OPERATOR, "weight", weight, 2, "[vocabulary, width]")?;
    let on_cpu = weight.device().is_cpu();
    let looked_up = if on_cpu { forward_cpu(ids, weight, output)? } else { forward_gpu(ids, weight, output)? };
    let (ids, shape) = (ids.clone(), weight.shape().to_vec());
    Ok(tape.record_one(&[weight], looked_up, move |gradient, _| {
        let backward = if on_cpu { backward_cpu } else { backward_gpu };
        Ok(vec![Some(backward(gradient, &ids, &shape)?)])
    }))
}

/// Tokens, vocabulary and width as kernels take them.
fn sizes(ids: &Tensor, shape: &[usize]) -> Result<[u32; 3]> {
    Ok([
        gpu::size(OPERATOR, "the number of tokens", ids.count())?,
        gpu::size(OPERATOR, "the vocabulary", shape[0])?,
        gpu::size(OPERATOR, "the width", shape[1])?,
    ])
}

fn forward_gpu(ids: &Tensor, weight: &Tensor, output: DType) -> Result<Tensor> {
    let [tokens, vocabulary, width] = sizes(ids, weight.shape())?;
    let kernel = EmbeddingForward::new(gpu::element(weight.dtype()), gpu::element(output), width);
    let mut looked_up = Output::new(weight.device(), &output_shape(ids, weight), output)?;
    let arguments = [
        looked_up.write(),
        gpu::read(ids),
        gpu::read(weight),
        Argument::U32(tokens),
        Argument::U32(vocabulary),
        Argument::U32(width),
    ];
    let sizes = [tokens.into(), width.into()];
    gpu::launch(OPERATOR, weight.device(), &kernel, kernel.grid(tokens, width), &sizes, &arguments)?;
    Ok(looked_up.tensor())
}

/// Sorts the tokens by id, then sums each id's.
fn backward_gpu(gradient: &Tensor, ids: &Tensor, shape: &[usize]) -> Result<Tensor> {
    let (device, [tokens, vocabulary, width]) = (gradient.device(), sizes(ids, shape)?);
    let (mut order, mut runs) = (Output::like(ids)?, Output::new(device, &[2, shape[0]], DType::U32)?);
    let mut repeated = Output::new(device, &[EmbeddingOrder::repeated(tokens) as usize], DType::U32)?;
    let arguments = [
        order.write(),
        runs.write(),
        repeated.write(),
        gpu::read(ids),
        Argument::U32(tokens),
        Argument::U32(vocabulary),
    ];
    let grid = EmbeddingOrder::grid(tokens, vocabulary);
    gpu::launch(OPERATOR, device, &EmbeddingOrder, grid, &[tokens.into(), vocabulary.into()], &arguments)?;
    let (order, runs, repeated) = (order.tensor(), runs.tensor(), repeated.tensor());

    let mut weight_gradient = Output::new(device, shape, DType::F32)?;
    let kernel = EmbeddingBackward::new(gpu::element(gradient.dtype()), width);
    let arguments = [
        weight_gradient.write(),
        gpu::read(gradient),
        gpu::read(&order),
        gpu::read(&runs),
        Argument::U32(vocabulary),
        Argument::U32(width),
    ];
    let sizes = [tokens.into(), vocabulary.into(), width.into()];
    gpu::launch(OPERATOR, device, &kernel, kernel.grid(vocabulary, width), &sizes, &arguments)?;

    let kernel = EmbeddingRepeated::new(gpu::element(gradient.dtype()), width);
    let arguments = [
        weight_gradient.write(),
        gpu::read(gradient),
        gpu::read(&order),
        gpu::read(&runs),
        gpu::read(&repeated),
        Argument::U32(tokens),
        Argument::U32(vocabulary),
        Argument::U32(width),
    ];
    let sizes = [tokens.into(), width.into()];
    gpu::launch(OPERATOR, device, &kernel, kernel.grid(tokens, width), &sizes, &arguments)?;
    Ok(weight_gradient.tensor())
}

fn output_shape(ids: &Tensor, weight: &Tensor) -> Vec<usize> {
    [ids.shape(), &weight.shape()[1..]].concat()
}

fn backward_cpu(gradient: &Tensor, ids: &Tensor, shape: &[usize]) -> Result<Tensor> {
    let (rows, width) = (ids.host_slice::<u32>()?, shape[1]);
    let device = gradient.device();
    let gradient = gradient.host_f32()?;
    Tensor::compute(device, shape, DType::F32, |weight_gradient| {
        weight_gradient.par_chunks_mut(1 << 16).for_each(|block| block.fill(0.0));
        // Positions of one id stay in order, so that its sum does not depend on the threads.
        let mut positions: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (position, id) in rows.iter().enumerate() {
            positions.entry(*id as usize).or_default().push(position);
        }
        for (id, positions) in positions {
            let sum = &mut weight_gradient[id * width..][..width];
            for position in positions {
                for (sum, value) in sum.iter_mut().zip(&gradient[position * width..][..width]) {
                    *sum += value;
                }
            }
        }
        Ok(())
    })
}

fn forward_cpu(ids: &Tensor, weight: &Tensor, output: DType) -> Result<Tensor> {
    let (vocabulary, width) = (weight.shape()[0], weight.shape()[1]);
    let output_shape = output_shape(ids, weight);
    let ids = ids.host_slice::<u32>()?;
    if let Some(position) = ids.iter().position(|id| *id as usize >= vocabulary) {
        return Err(Error::IndexOutOfRange {
            operator: OPERATOR,
            argument: "ids",
            position,
            value: ids[position] as usize,
            limit: vocabulary,
        });
    }
    let row = |id: u32| id as usize * width..(id as usize + 1) * width;
    match weight.dtype() {
        DType::Bf16 => {
            let table = weight.host_slice::<bf16>()?;
            Tensor::compute(weight.device(), &output_shape, output, |values| {
                if width > 0 {
                    values.par_chunks_mut(width).zip(ids).for_each(|(values, id)| cpu::widen(&table[row(*id)], values));
                }
                Ok(())
            })
        }
        _ => {
            let table = weight.host_slice::<f32>()?;
            Tensor::compute(weight.device(), &output_shape, output, |values| {
                if width > 0 {
                    values
                        .par_chunks_mut(width)
                        .zip(ids)
                        .for_each(|(values, id)| values.copy_from_slice(&table[row(*id)]));
                }
                Ok(())
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use runtime::Device;

    use super::*;
    use crate::ops;

    #[test]
    fn a_repeated_id_gets_the_sum_of_its_gradients() {
        let device = Device::cpu();
        let weight = Tensor::from_slice(&device, &[3, 2], &[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
        let ids = Tensor::from_slice(&device, &[3], &[2u32, 0, 2]).unwrap();
        let tape = Tape::new();
        let output = embedding(&tape, &ids, &tape.leaf(&weight), DType::F32).unwrap();
        assert_eq!(output.to_vec::<f32>().unwrap(), [5.0, 6.0, 1.0, 2.0, 5.0, 6.0]);
        let squared = ops::mul(&tape, &output, &output).unwrap();
        let total = ops::sum(&tape, &squared).unwrap();
        let gradients = tape.backward(&total).unwrap();
        assert_eq!(gradients.get(&weight).unwrap().to_vec::<f32>().unwrap(), [2.0, 4.0, 0.0, 0.0, 20.0, 24.0]);
    }

    #[test]
    fn an_id_outside_the_vocabulary_is_named() {
        let device = Device::cpu();
        let weight = Var::constant(&Tensor::zeros(&device, &[3, 2], DType::Bf16).unwrap());
        let ids = Tensor::from_slice(&device, &[2], &[1u32, 3]).unwrap();
        let message = embedding(&Tape::inference(), &ids, &weight, DType::F32).unwrap_err().to_string();
        assert_eq!(message, "embedding: ids[1] is 3, expected a value below 3");
    }
}
