//! Operators that move values without changing them.

use rayon::prelude::*;

use crate::{Error, Result, Tape, Tensor, Var, check};

/// Cuts the innermost dimension into parts of the given sizes: `[…, Σ sizes]` into `[…, sizes[i]]` each.
///
/// # Errors
/// A shape error when the sizes do not add up to the innermost dimension.
pub fn split(tape: &Tape<'_>, input: &Var, sizes: &[usize]) -> Result<Vec<Var>> {
    const OPERATOR: &str = "split";
    check::on_cpu(OPERATOR, input)?;
    let (width, rows) = (input.last_dimension(), input.rows());
    if sizes.iter().sum::<usize>() != width {
        return Err(Error::Shape {
            operator: OPERATOR,
            argument: "input",
            expected: format!("a last dimension of {:?} together", sizes),
            found: input.shape().to_vec(),
        });
    }
    let values = input.host_f32()?;
    let mut start = 0;
    let mut parts = Vec::with_capacity(sizes.len());
    for &size in sizes {
        let mut shape = input.shape().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = size;
        }
        parts.push(Tensor::compute(input.device(), &shape, input.dtype(), |part| {
            if size > 0 {
                part.par_chunks_mut(size).zip(values.par_chunks(width)).for_each(|(part, row)| {
                    part.copy_from_slice(&row[start..][..size]);
                });
            }
            Ok(())
        })?);
        start += size;
    }
    let (device, shape, dtype, sizes) = (input.device().clone(), input.shape().to_vec(), input.dtype(), sizes.to_vec());
    Ok(tape.record(&[input], parts, move |gradients, _| {
        let joined = Tensor::compute(&device, &shape, dtype, |joined| {
            let mut start = 0;
            for (gradient, &size) in gradients.iter().zip(&sizes) {
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
        })?;
        Ok(vec![Some(joined)])
    }))
}

/// Repeats each run of `chunk` innermost elements `repeats` times in place (repeat-interleave of chunks):
/// `y[…, (c · repeats + r) · chunk + j] = x[…, c · chunk + j]`.
///
/// # Errors
/// A shape error when `chunk` does not divide the innermost dimension.
pub fn repeat_chunks(tape: &Tape<'_>, input: &Var, chunk: usize, repeats: usize) -> Result<Var> {
    const OPERATOR: &str = "repeat_chunks";
    check::on_cpu(OPERATOR, input)?;
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
    let (device, narrow, dtype) = (input.device().clone(), input.shape().to_vec(), input.dtype());
    let mut wide = narrow.clone();
    if let Some(last) = wide.last_mut() {
        *last *= repeats;
    }
    let values = input.host_f32()?;
    let output = Tensor::compute(&device, &wide, dtype, |output| {
        output.par_chunks_mut(chunk * repeats).zip(values.par_chunks(chunk)).for_each(|(copies, source)| {
            for copy in copies.chunks_exact_mut(chunk) {
                copy.copy_from_slice(source);
            }
        });
        Ok(())
    })?;
    Ok(tape.record_one(&[input], output, move |gradient, _| {
        let gradient = gradient.host_f32()?;
        let summed = Tensor::compute(&device, &narrow, dtype, |summed| {
            summed.par_chunks_mut(chunk).zip(gradient.par_chunks(chunk * repeats)).for_each(|(sum, copies)| {
                sum.fill(0.0);
                for copy in copies.chunks_exact(chunk) {
                    for (sum, value) in sum.iter_mut().zip(copy) {
                        *sum += value;
                    }
                }
            });
            Ok(())
        })?;
        Ok(vec![Some(summed)])
    }))
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
