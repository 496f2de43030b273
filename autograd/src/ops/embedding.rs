//! Rows of a table by index.

use std::collections::BTreeMap;

use half::bf16;
use rayon::prelude::*;

use crate::{DType, Error, Result, Tape, Tensor, Var, check, cpu};

const OPERATOR: &str = "embedding";

/// `y[…, :] = weight[ids[…], :]`.
///
/// - `ids` u32 `[…]`, `weight` `[vocabulary, width]`, result `[…, width]` of element type `output`: the type that the
///   forward pass computes in, which need not be the one that weights are kept in
///
/// # Errors
/// [`crate::Error::IndexOutOfRange`] for an id outside the vocabulary.
pub fn embedding(tape: &Tape<'_>, ids: &Tensor, weight: &Var, output: DType) -> Result<Var> {
    check::on_cpu(OPERATOR, weight)?;
    check::is_u32(OPERATOR, "ids", ids)?;
    check::rank(OPERATOR, "weight", weight, 2, "[vocabulary, width]")?;
    let vocabulary = weight.shape()[0];
    let indices = ids.host_slice::<u32>()?;
    if let Some(position) = indices.iter().position(|id| *id as usize >= vocabulary) {
        return Err(Error::IndexOutOfRange {
            operator: OPERATOR,
            argument: "ids",
            position,
            value: indices[position] as usize,
            limit: vocabulary,
        });
    }
    let looked_up = forward_cpu(indices, ids.shape(), weight, output)?;
    let (ids, shape, device) = (ids.clone(), weight.shape().to_vec(), weight.device().clone());
    Ok(tape.record_one(&[weight], looked_up, move |gradient, _| {
        let (rows, width) = (ids.host_slice::<u32>()?, shape[1]);
        let gradient = gradient.host_f32()?;
        let summed = Tensor::compute(&device, &shape, DType::F32, |weight_gradient| {
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
        })?;
        Ok(vec![Some(summed)])
    }))
}

fn forward_cpu(ids: &[u32], shape: &[usize], weight: &Tensor, output: DType) -> Result<Tensor> {
    let width = weight.shape()[1];
    let mut output_shape = shape.to_vec();
    output_shape.push(width);
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
