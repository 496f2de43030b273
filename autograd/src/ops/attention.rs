//! Causal grouped-query attention.
//!
//! On the CPU queries are taken in blocks. A block's scores against all keys that any of its rows sees are one matrix
//! product; softmax and the product with the values follow, and nothing but the log-sum-exp of every row is kept for the
//! backward pass, which computes the probabilities again (as FlashAttention does: Dao et al. 2022).

use std::ops::Range;

use rayon::prelude::*;
use runtime::matrix::{Matrix, MatrixMut, Threads, multiply};

use crate::{Error, Result, Tape, Tensor, Var, check, cpu};

const OPERATOR: &str = "attention";

/// Queries of a block.
const BLOCK: usize = 64;

/// How scores are formed and which keys a query sees.
#[derive(Clone, Copy, Debug)]
pub struct AttentionOptions<'a> {
    /// Factor on the scores before softmax; usually `head_size^-0.5`.
    pub scale: f32,
    /// u32 `[batch, key time]`: start of each token's document. `None`: one document per row.
    pub document_start: Option<&'a Tensor>,
    /// Sliding window: a query sees itself and the `window - 1` keys before it. `None`: all keys before it.
    pub window: Option<usize>,
}

/// `softmax(scale · q kᵀ + mask) v` per head (Vaswani et al. 2017; grouped heads: Ainslie et al. 2023).
///
/// - `query` `[batch, query time, query heads, head size]`: the last `query time` positions of the keys' time
/// - `key`, `value` `[batch, key time, key heads, head size]`; query head `h` uses key head
///   `h / (query heads / key heads)`
/// - result like `query`
///
/// # Errors
/// Shape errors that name the argument; query heads that the key heads do not divide; more queries than keys; a window
/// of 0.
pub fn attention(tape: &Tape<'_>, query: &Var, key: &Var, value: &Var, options: AttentionOptions<'_>) -> Result<Var> {
    check::on_cpu(OPERATOR, query)?;
    check::is_float(OPERATOR, "query", query)?;
    check::is_float(OPERATOR, "key", key)?;
    check::is_float(OPERATOR, "value", value)?;
    let geometry = Geometry::new(query, key, value, options)?;
    let (output, log_sums) = geometry.forward_cpu(query, key, value)?;
    let saved = [query.tensor().clone(), key.tensor().clone(), value.tensor().clone(), output.clone()];
    Ok(tape.record_one(&[query, key, value], output, move |gradient, _| {
        let [query, key, value, output] = &saved;
        geometry.backward_cpu(gradient, query, key, value, output, &log_sums)
    }))
}

/// Sizes, scale and the keys that each query sees.
struct Geometry {
    batch: usize,
    query_time: usize,
    key_time: usize,
    heads: usize,
    key_heads: usize,
    size: usize,
    scale: f32,
    /// `[batch, query time]`: the first key that each query sees. The last one is its own position.
    first_visible: Vec<usize>,
}

impl Geometry {
    fn new(query: &Tensor, key: &Tensor, value: &Tensor, options: AttentionOptions<'_>) -> Result<Self> {
        check::rank(OPERATOR, "query", query, 4, "[batch, query time, query heads, head size]")?;
        check::rank(OPERATOR, "key", key, 4, "[batch, key time, key heads, head size]")?;
        let [batch, query_time, heads, size] = *query.shape() else { unreachable!("the rank was checked") };
        let [_, key_time, key_heads, _] = *key.shape() else { unreachable!("the rank was checked") };
        check::shape(OPERATOR, "key", key, &[batch, key_time, key_heads, size])?;
        check::shape(OPERATOR, "value", value, key.shape())?;
        let invalid = |message: String| Err(Error::Invalid { operator: OPERATOR, message });
        if key_heads == 0 || !heads.is_multiple_of(key_heads) {
            return invalid(format!("{key_heads} key heads do not divide {heads} query heads"));
        }
        if query_time > key_time {
            return invalid(format!("{query_time} queries over {key_time} keys: queries are the last positions"));
        }
        if options.window == Some(0) {
            return invalid("a window of 0 keys: a query sees at least itself".to_owned());
        }
        let starts = match options.document_start {
            Some(starts) => {
                check::is_u32(OPERATOR, "document_start", starts)?;
                check::shape(OPERATOR, "document_start", starts, &[batch, key_time])?;
                Some(starts.host_slice::<u32>()?)
            }
            None => None,
        };
        let mut first_visible = Vec::with_capacity(batch * query_time);
        for row in 0..batch {
            for position in key_time - query_time..key_time {
                let start = starts.map_or(0, |starts| starts[row * key_time + position] as usize);
                if start > position {
                    return Err(Error::IndexOutOfRange {
                        operator: OPERATOR,
                        argument: "document_start",
                        position: row * key_time + position,
                        value: start,
                        limit: position + 1,
                    });
                }
                let window_start = options.window.map_or(0, |window| (position + 1).saturating_sub(window));
                first_visible.push(start.max(window_start));
            }
        }
        Ok(Self { batch, query_time, key_time, heads, key_heads, size, scale: options.scale, first_visible })
    }

    /// The result, and the log-sum-exp of every row of scores, `[batch, query time, heads]`.
    fn forward_cpu(&self, query: &Tensor, key: &Tensor, value: &Tensor) -> Result<(Tensor, Vec<f32>)> {
        let (q, k, v) = (query.host_f32()?, key.host_f32()?, value.host_f32()?);
        let mut log_sums = vec![0.0; self.batch * self.query_time * self.heads];
        let (row_width, row_heads) = (self.heads * self.size, self.heads);
        let output = Tensor::compute(query.device(), query.shape(), query.dtype(), |output| {
            if output.is_empty() {
                return Ok(());
            }
            // A block lies within one batch row, because blocks are cut row by row.
            let mut tasks = Vec::new();
            for ((row, output), log_sums) in output
                .chunks_mut(self.query_time * row_width)
                .enumerate()
                .zip(log_sums.chunks_mut(self.query_time * row_heads))
            {
                for ((block, output), log_sums) in
                    output.chunks_mut(BLOCK * row_width).enumerate().zip(log_sums.chunks_mut(BLOCK * row_heads))
                {
                    tasks.push((row, block * BLOCK, output, log_sums));
                }
            }
            tasks.into_par_iter().for_each(|(row, first, output, log_sums)| {
                let rows = log_sums.len() / row_heads;
                let keys = self.visible_keys(row, first, rows);
                let mut scores = vec![0.0; rows * keys.len()];
                for head in 0..self.heads {
                    let (query, key) = (self.query_block(&q, row, first, rows, head), self.keys(&k, row, head, &keys));
                    multiply(
                        MatrixMut::row_major(&mut scores, rows, keys.len()),
                        0.0,
                        query,
                        key.transposed(),
                        self.scale,
                        Threads::One,
                    );
                    for (index, scores) in scores.chunks_exact_mut(keys.len()).enumerate() {
                        let visible = self.visible_within(row, first + index, &keys);
                        log_sums[index * row_heads + head] = softmax(scores, visible);
                    }
                    multiply(
                        MatrixMut::strided(&mut output[head * self.size..], rows, self.size, row_width),
                        0.0,
                        Matrix::row_major(&scores, rows, keys.len()),
                        self.keys(&v, row, head, &keys),
                        1.0,
                        Threads::One,
                    );
                }
            });
            Ok(())
        })?;
        Ok((output, log_sums))
    }

    /// Gradients of query, key and value. With `P` the probabilities and `dP = dO Vᵀ`:
    /// `dS = P (dP - Σ dO·O)`, `dQ = scale dS K`, `dK = scale dSᵀ Q`, `dV = Pᵀ dO`.
    fn backward_cpu(
        &self,
        gradient: &Tensor,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        output: &Tensor,
        log_sums: &[f32],
    ) -> Result<Vec<Option<Tensor>>> {
        let (g, o) = (gradient.host_f32()?, output.host_f32()?);
        let (q, k, v) = (query.host_f32()?, key.host_f32()?, value.host_f32()?);
        // Head by head, so that every task writes memory of its own; key heads are summed over their query heads, in
        // order, when the parts are put in place.
        let query_part = self.query_time * self.size;
        let key_part = self.key_time * self.size;
        let tasks = self.batch * self.heads;
        let mut query_parts = vec![0.0f32; tasks * query_part];
        let mut key_parts = vec![0.0f32; tasks * key_part];
        let mut value_parts = vec![0.0f32; tasks * key_part];
        query_parts
            .par_chunks_mut(query_part.max(1))
            .zip(key_parts.par_chunks_mut(key_part.max(1)))
            .zip(value_parts.par_chunks_mut(key_part.max(1)))
            .enumerate()
            .for_each(|(task, ((query_gradient, key_gradient), value_gradient))| {
                let (row, head) = (task / self.heads, task % self.heads);
                for first in (0..self.query_time).step_by(BLOCK) {
                    let rows = BLOCK.min(self.query_time - first);
                    let keys = self.visible_keys(row, first, rows);
                    let mut probabilities = vec![0.0; rows * keys.len()];
                    let mut slopes = vec![0.0; rows * keys.len()];
                    let query = self.query_block(&q, row, first, rows, head);
                    let out_gradient = self.query_block(&g, row, first, rows, head);
                    let key = self.keys(&k, row, head, &keys);
                    let target = MatrixMut::row_major(&mut probabilities, rows, keys.len());
                    multiply(target, 0.0, query, key.transposed(), self.scale, Threads::One);
                    let target = MatrixMut::row_major(&mut slopes, rows, keys.len());
                    let value = self.keys(&v, row, head, &keys);
                    multiply(target, 0.0, out_gradient, value.transposed(), 1.0, Threads::One);
                    for index in 0..rows {
                        let token = (row * self.query_time + first + index) * self.heads + head;
                        let at = token * self.size..(token + 1) * self.size;
                        let range = index * keys.len()..(index + 1) * keys.len();
                        softmax_backward(
                            &mut probabilities[range.clone()],
                            &mut slopes[range],
                            self.visible_within(row, first + index, &keys),
                            log_sums[token],
                            (&g[at.clone()], &o[at]),
                        );
                    }
                    let slopes = Matrix::row_major(&slopes, rows, keys.len());
                    let target = MatrixMut::row_major(&mut query_gradient[first * self.size..], rows, self.size);
                    multiply(target, 0.0, slopes, key, self.scale, Threads::One);
                    let target = &mut key_gradient[keys.start * self.size..];
                    let target = MatrixMut::row_major(target, keys.len(), self.size);
                    multiply(target, 1.0, slopes.transposed(), query, self.scale, Threads::One);
                    let probabilities = Matrix::row_major(&probabilities, rows, keys.len());
                    let target = &mut value_gradient[keys.start * self.size..];
                    let target = MatrixMut::row_major(target, keys.len(), self.size);
                    multiply(target, 1.0, probabilities.transposed(), out_gradient, 1.0, Threads::One);
                }
            });
        Ok(vec![
            Some(self.assemble(query, &query_parts, self.query_time, self.heads)?),
            Some(self.assemble(key, &key_parts, self.key_time, self.key_heads)?),
            Some(self.assemble(value, &value_parts, self.key_time, self.key_heads)?),
        ])
    }

    /// From parts `[batch, query heads, time, head size]` to `[batch, time, heads, head size]`, summing the query heads
    /// that share one of `heads`.
    fn assemble(&self, like: &Tensor, parts: &[f32], time: usize, heads: usize) -> Result<Tensor> {
        let group = self.heads / heads.max(1);
        Tensor::compute(like.device(), like.shape(), like.dtype(), |output| {
            output.par_chunks_mut(self.size.max(1)).enumerate().for_each(|(index, output)| {
                let (head, step, row) = (index % heads, index / heads % time, index / heads / time);
                output.fill(0.0);
                for member in head * group..(head + 1) * group {
                    let part = &parts[((row * self.heads + member) * time + step) * self.size..][..self.size];
                    for (output, part) in output.iter_mut().zip(part) {
                        *output += part;
                    }
                }
            });
            Ok(())
        })
    }

    /// Keys that any of the rows `first..first + rows` of a block sees.
    fn visible_keys(&self, row: usize, first: usize, rows: usize) -> Range<usize> {
        let starts = &self.first_visible[row * self.query_time + first..][..rows];
        let start = starts.iter().copied().min().unwrap_or(0);
        start..self.key_time - self.query_time + first + rows
    }

    /// Keys that one query sees, counted from the start of its block's keys.
    fn visible_within(&self, row: usize, query: usize, keys: &Range<usize>) -> Range<usize> {
        let first = self.first_visible[row * self.query_time + query];
        first - keys.start..self.key_time - self.query_time + query + 1 - keys.start
    }

    fn query_block<'a>(&self, values: &'a [f32], row: usize, first: usize, rows: usize, head: usize) -> Matrix<'a> {
        let stride = self.heads * self.size;
        Matrix::strided(&values[(row * self.query_time + first) * stride + head * self.size..], rows, self.size, stride)
    }

    /// The keys or values in `keys` that query head `head` uses.
    fn keys<'a>(&self, values: &'a [f32], row: usize, head: usize, keys: &Range<usize>) -> Matrix<'a> {
        let stride = self.key_heads * self.size;
        let key_head = head / (self.heads / self.key_heads);
        Matrix::strided(
            &values[(row * self.key_time + keys.start) * stride + key_head * self.size..],
            keys.len(),
            self.size,
            stride,
        )
    }
}

/// Softmax of the visible scores in place, zero elsewhere; returns the log-sum-exp.
pub(super) fn softmax(scores: &mut [f32], visible: Range<usize>) -> f32 {
    cpu::simd(
        #[inline(always)]
        || {
            scores[..visible.start].fill(0.0);
            scores[visible.end..].fill(0.0);
            let scores = &mut scores[visible];
            let greatest = cpu::maximum(scores);
            for score in scores.iter_mut() {
                *score = cpu::exp(*score - greatest);
            }
            let total = cpu::total(scores);
            let factor = 1.0 / total;
            for score in scores.iter_mut() {
                *score *= factor;
            }
            greatest + total.ln()
        },
    )
}

/// From scores and `dP` to probabilities and `dS`, in place.
fn softmax_backward(
    scores: &mut [f32],
    slopes: &mut [f32],
    visible: Range<usize>,
    log_sum: f32,
    (gradient, output): (&[f32], &[f32]),
) {
    cpu::simd(
        #[inline(always)]
        || {
            let mean = cpu::dot(gradient, output);
            for buffer in [&mut *scores, &mut *slopes] {
                buffer[..visible.start].fill(0.0);
                buffer[visible.end..].fill(0.0);
            }
            for (score, slope) in scores[visible.clone()].iter_mut().zip(&mut slopes[visible]) {
                *score = cpu::exp(*score - log_sum);
                *slope = *score * (*slope - mean);
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use runtime::Device;

    use super::*;
    use crate::{gradient_check, ops};

    fn ramp(shape: &[usize], modulus: usize) -> Tensor {
        let count: usize = shape.iter().product();
        let values: Vec<f32> =
            (0..count).map(|i| ((i * 37 % modulus) as f32 - modulus as f32 / 2.0) / modulus as f32).collect();
        Tensor::from_slice(&Device::cpu(), shape, &values).unwrap()
    }

    fn run(query: &Tensor, key: &Tensor, value: &Tensor, options: AttentionOptions<'_>) -> Result<Vec<f32>> {
        let [query, key, value] = [query, key, value].map(Var::constant);
        attention(&Tape::inference(), &query, &key, &value, options)?.to_vec()
    }

    const PLAIN: AttentionOptions<'_> = AttentionOptions { scale: 1.0, document_start: None, window: None };

    #[test]
    fn the_first_query_copies_its_value_and_equal_scores_average() {
        let (query, value) =
            (Tensor::zeros(&Device::cpu(), &[1, 2, 1, 2], crate::DType::F32).unwrap(), ramp(&[1, 2, 1, 2], 7));
        let v = value.to_vec::<f32>().unwrap();
        let output = run(&query, &query, &value, PLAIN).unwrap();
        assert_eq!(output, [v[0], v[1], (v[0] + v[2]) / 2.0, (v[1] + v[3]) / 2.0]);
    }

    #[test]
    fn packed_documents_equal_separate_ones() {
        let (q, k, v) = (ramp(&[1, 130, 4, 8], 101), ramp(&[1, 130, 2, 8], 89), ramp(&[1, 130, 2, 8], 97));
        let starts: Vec<u32> = (0..130).map(|position| if position < 67 { 0 } else { 67 }).collect();
        let starts = Tensor::from_slice(&Device::cpu(), &[1, 130], &starts).unwrap();
        let packed = run(&q, &k, &v, AttentionOptions { document_start: Some(&starts), ..PLAIN }).unwrap();
        let second = |tensor: &Tensor, heads: usize| {
            let values = tensor.to_vec::<f32>().unwrap();
            Tensor::from_slice(&Device::cpu(), &[1, 63, heads, 8], &values[67 * heads * 8..]).unwrap()
        };
        let separate = run(&second(&q, 4), &second(&k, 2), &second(&v, 2), PLAIN).unwrap();
        for (packed, separate) in packed[67 * 32..].iter().zip(&separate) {
            assert!((packed - separate).abs() <= 1e-6, "{packed} {separate}");
        }
    }

    #[test]
    fn gradients_agree_with_differences() {
        let inputs = [ramp(&[1, 3, 4, 4], 31), ramp(&[1, 5, 2, 4], 29), ramp(&[1, 5, 2, 4], 23)];
        for window in [None, Some(2)] {
            let check = gradient_check(&inputs, 1e-2, |tape, inputs| {
                attention(tape, &inputs[0], &inputs[1], &inputs[2], AttentionOptions { scale: 0.7, window, ..PLAIN })
            })
            .unwrap();
            assert!(check.worst.iter().all(|worst| *worst <= 1e-2), "{check:?}");
        }
    }

    #[test]
    fn wrong_geometry_is_refused() {
        let message = |query: &[usize], key: &[usize]| {
            run(&ramp(query, 5), &ramp(key, 5), &ramp(key, 5), PLAIN).unwrap_err().to_string()
        };
        assert!(message(&[1, 2, 3, 4], &[1, 2, 2, 4]).contains("2 key heads do not divide 3 query heads"));
        assert!(message(&[1, 3, 2, 4], &[1, 2, 2, 4]).contains("3 queries over 2 keys"));
        assert!(message(&[1, 2, 2, 4], &[1, 2, 2, 3]).contains("key has shape [1, 2, 2, 3]"));
        let empty = ops::attention(
            &Tape::inference(),
            &Var::constant(&ramp(&[0, 2, 2, 4], 5)),
            &Var::constant(&ramp(&[0, 2, 2, 4], 5)),
            &Var::constant(&ramp(&[0, 2, 2, 4], 5)),
            PLAIN,
        );
        assert_eq!(empty.unwrap().shape(), [0, 2, 2, 4]);
    }
}
