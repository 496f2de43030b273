//! Attention on the CPU.
//!
//! Queries are taken in blocks. A block's scores against all keys that any of its rows sees are one matrix product; softmax
//! and the product with the values follow, and nothing but the log-sum-exp of every row is kept for the backward pass,
//! which computes the probabilities again (as FlashAttention does: Dao et al. 2022).

use std::ops::Range;

use rayon::prelude::*;
use runtime::matrix::{Matrix, MatrixMut, Threads, multiply};

use super::{AttentionOptions, OPERATOR, Sizes};
use crate::{Error, Result, Tensor, cpu};

/// Queries of a block.
const BLOCK: usize = 64;

/// An attention whose masks are known.
pub(super) struct Attention {
    sizes: Sizes,
    /// `[batch, query time]`: the first key that each query sees. The last one is its own position.
    first_visible: Vec<usize>,
}

impl Attention {
    /// # Errors
    /// A document that begins after its token.
    pub(super) fn new(sizes: Sizes, options: AttentionOptions<'_>) -> Result<Self> {
        let Sizes { batch, query_time, key_time, .. } = sizes;
        let starts = options.document_start.map(Tensor::host_slice::<u32>).transpose()?;
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
        Ok(Self { sizes, first_visible })
    }

    /// The result, and the log-sum-exp of every row of scores, `[batch, query time, heads]`.
    pub(super) fn forward(&self, query: &Tensor, key: &Tensor, value: &Tensor) -> Result<(Tensor, Vec<f32>)> {
        let (q, k, v) = (query.host_f32()?, key.host_f32()?, value.host_f32()?);
        let mut log_sums = vec![0.0; self.sizes.batch * self.sizes.query_time * self.sizes.heads];
        let (row_width, row_heads) = (self.sizes.heads * self.sizes.size, self.sizes.heads);
        let output = Tensor::compute(query.device(), query.shape(), query.dtype(), |output| {
            if output.is_empty() {
                return Ok(());
            }
            // A block lies within one batch row, because blocks are cut row by row.
            let mut tasks = Vec::new();
            for ((row, output), log_sums) in output
                .chunks_mut(self.sizes.query_time * row_width)
                .enumerate()
                .zip(log_sums.chunks_mut(self.sizes.query_time * row_heads))
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
                for head in 0..self.sizes.heads {
                    let (query, key) = (self.query_block(&q, row, first, rows, head), self.keys(&k, row, head, &keys));
                    multiply(
                        MatrixMut::row_major(&mut scores, rows, keys.len()),
                        0.0,
                        query,
                        key.transposed(),
                        self.sizes.scale,
                        Threads::One,
                    );
                    for (index, scores) in scores.chunks_exact_mut(keys.len()).enumerate() {
                        let visible = self.visible_within(row, first + index, &keys);
                        log_sums[index * row_heads + head] = softmax(scores, visible);
                    }
                    multiply(
                        MatrixMut::strided(&mut output[head * self.sizes.size..], rows, self.sizes.size, row_width),
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
    pub(super) fn backward(
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
        let query_part = self.sizes.query_time * self.sizes.size;
        let key_part = self.sizes.key_time * self.sizes.size;
        let tasks = self.sizes.batch * self.sizes.heads;
        let mut query_parts = vec![0.0f32; tasks * query_part];
        let mut key_parts = vec![0.0f32; tasks * key_part];
        let mut value_parts = vec![0.0f32; tasks * key_part];
        query_parts
            .par_chunks_mut(query_part.max(1))
            .zip(key_parts.par_chunks_mut(key_part.max(1)))
            .zip(value_parts.par_chunks_mut(key_part.max(1)))
            .enumerate()
            .for_each(|(task, ((query_gradient, key_gradient), value_gradient))| {
                let (row, head) = (task / self.sizes.heads, task % self.sizes.heads);
                for first in (0..self.sizes.query_time).step_by(BLOCK) {
                    let rows = BLOCK.min(self.sizes.query_time - first);
                    let keys = self.visible_keys(row, first, rows);
                    let mut probabilities = vec![0.0; rows * keys.len()];
                    let mut slopes = vec![0.0; rows * keys.len()];
                    let query = self.query_block(&q, row, first, rows, head);
                    let out_gradient = self.query_block(&g, row, first, rows, head);
                    let key = self.keys(&k, row, head, &keys);
                    let target = MatrixMut::row_major(&mut probabilities, rows, keys.len());
                    multiply(target, 0.0, query, key.transposed(), self.sizes.scale, Threads::One);
                    let target = MatrixMut::row_major(&mut slopes, rows, keys.len());
                    let value = self.keys(&v, row, head, &keys);
                    multiply(target, 0.0, out_gradient, value.transposed(), 1.0, Threads::One);
                    for index in 0..rows {
                        let token = (row * self.sizes.query_time + first + index) * self.sizes.heads + head;
                        let at = token * self.sizes.size..(token + 1) * self.sizes.size;
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
                    let target =
                        MatrixMut::row_major(&mut query_gradient[first * self.sizes.size..], rows, self.sizes.size);
                    multiply(target, 0.0, slopes, key, self.sizes.scale, Threads::One);
                    let target = &mut key_gradient[keys.start * self.sizes.size..];
                    let target = MatrixMut::row_major(target, keys.len(), self.sizes.size);
                    multiply(target, 1.0, slopes.transposed(), query, self.sizes.scale, Threads::One);
                    let probabilities = Matrix::row_major(&probabilities, rows, keys.len());
                    let target = &mut value_gradient[keys.start * self.sizes.size..];
                    let target = MatrixMut::row_major(target, keys.len(), self.sizes.size);
                    multiply(target, 1.0, probabilities.transposed(), out_gradient, 1.0, Threads::One);
                }
            });
        Ok(vec![
            Some(self.assemble(query, &query_parts, self.sizes.query_time, self.sizes.heads)?),
            Some(self.assemble(key, &key_parts, self.sizes.key_time, self.sizes.key_heads)?),
            Some(self.assemble(value, &value_parts, self.sizes.key_time, self.sizes.key_heads)?),
        ])
    }

    /// From parts `[batch, query heads, time, head size]` to `[batch, time, heads, head size]`, summing the query heads
    /// that share one of `heads`.
    fn assemble(&self, like: &Tensor, parts: &[f32], time: usize, heads: usize) -> Result<Tensor> {
        let group = self.sizes.heads / heads.max(1);
        Tensor::compute(like.device(), like.shape(), like.dtype(), |output| {
            output.par_chunks_mut(self.sizes.size.max(1)).enumerate().for_each(|(index, output)| {
                let (head, step, row) = (index % heads, index / heads % time, index / heads / time);
                output.fill(0.0);
                for member in head * group..(head + 1) * group {
                    let part = &parts[((row * self.sizes.heads + member) * time + step) * self.sizes.size..]
                        [..self.sizes.size];
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
        let starts = &self.first_visible[row * self.sizes.query_time + first..][..rows];
        let start = starts.iter().copied().min().unwrap_or(0);
        start..self.sizes.key_time - self.sizes.query_time + first + rows
    }

    /// Keys that one query sees, counted from the start of its block's keys.
    fn visible_within(&self, row: usize, query: usize, keys: &Range<usize>) -> Range<usize> {
        let first = self.first_visible[row * self.sizes.query_time + query];
        first - keys.start..self.sizes.key_time - self.sizes.query_time + query + 1 - keys.start
    }

    fn query_block<'a>(&self, values: &'a [f32], row: usize, first: usize, rows: usize, head: usize) -> Matrix<'a> {
        let stride = self.sizes.heads * self.sizes.size;
        Matrix::strided(
            &values[(row * self.sizes.query_time + first) * stride + head * self.sizes.size..],
            rows,
            self.sizes.size,
            stride,
        )
    }

    /// The keys or values in `keys` that query head `head` uses.
    fn keys<'a>(&self, values: &'a [f32], row: usize, head: usize, keys: &Range<usize>) -> Matrix<'a> {
        let stride = self.sizes.key_heads * self.sizes.size;
        let key_head = head / (self.sizes.heads / self.sizes.key_heads);
        Matrix::strided(
            &values[(row * self.sizes.key_time + keys.start) * stride + key_head * self.sizes.size..],
            keys.len(),
            self.sizes.size,
            stride,
        )
    }
}

/// Softmax of the visible scores in place, zero elsewhere; returns the log-sum-exp.
pub(crate) fn softmax(scores: &mut [f32], visible: Range<usize>) -> f32 {
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
