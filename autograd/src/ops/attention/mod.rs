//! Causal grouped-query attention.

mod cpu;
mod gpu;

pub(super) use cpu::softmax;
pub(super) use gpu::{Last, cached};

use crate::{Error, Result, Tape, Tensor, Var, check};

const OPERATOR: &str = "attention";

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
/// On GPUs, where reading the starts of documents would make the host wait, a document that starts after its token gives
/// that token NaN.
///
/// # Errors
/// Shape errors that name the argument; query heads that the key heads do not divide; more queries than keys; a window
/// of 0; on the CPU, [`crate::Error::IndexOutOfRange`] for a document that starts after its token.
pub fn attention(tape: &Tape<'_>, query: &Var, key: &Var, value: &Var, options: AttentionOptions<'_>) -> Result<Var> {
    check::is_float(OPERATOR, "query", query)?;
    check::is_float(OPERATOR, "key", key)?;
    check::is_float(OPERATOR, "value", value)?;
    let sizes = Sizes::new(query, key, value, options)?;
    if query.device().is_cpu() {
        let attention = cpu::Attention::new(sizes, options)?;
        let (output, log_sums) = attention.forward(query, key, value)?;
        let saved = [query.tensor().clone(), key.tensor().clone(), value.tensor().clone(), output.clone()];
        return Ok(tape.record_one(&[query, key, value], output, move |gradient, _| {
            let [query, key, value, output] = &saved;
            attention.backward(gradient, query, key, value, output, &log_sums)
        }));
    }
    let saved = gpu::forward(sizes, query, key, value, options)?;
    let output = saved.output().clone();
    Ok(tape.record_one(&[query, key, value], output, move |gradient, _| saved.backward(gradient)))
}

/// Sizes of the tensors and the factor on the scores.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    query_time: usize,
    key_time: usize,
    heads: usize,
    key_heads: usize,
    size: usize,
    scale: f32,
}

impl Sizes {
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
        if let Some(starts) = options.document_start {
            check::is_u32(OPERATOR, "document_start", starts)?;
            check::shape(OPERATOR, "document_start", starts, &[batch, key_time])?;
        }
        Ok(Self { batch, query_time, key_time, heads, key_heads, size, scale: options.scale })
    }
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
