//! Rotary embedding and attention against their f64 references; cached attention against whole sequences.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use autograd::ops::{self, AttentionOptions, RotaryScaling, RotaryTable};
use autograd::{DType, Tape, Tensor, Var};
use grafter_tests::check::{Input, Precision, Tolerance, agree, cases, check_operator, indices, tensor, widened};
use grafter_tests::compare::Bounds;
use grafter_tests::random::Random;
use grafter_tests::reference::{self, Attention, Scaling};
use proptest::prelude::*;

const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Bf16];

/// Scores of normal queries and keys, softmax, and sums over up to 130 keys. A query's gradient is a difference from a
/// mean, and vanishes where there is one key.
const ATTENTION: Tolerance = Tolerance::relative(3e-6);

fn scalings() -> impl Strategy<Value = (RotaryScaling, Scaling)> {
    prop_oneof![
        Just((RotaryScaling::None, Scaling::None)),
        (1u8..17, 1u8..3, 3u8..6, prop_oneof![Just(64.0f32), Just(8192.0)]).prop_map(
            |(factor, low, high, original)| {
                let (factor, low, high) = (f32::from(factor), f32::from(low), f32::from(high));
                let wide = f64::from;
                (
                    RotaryScaling::Llama3 {
                        factor,
                        low_frequency_factor: low,
                        high_frequency_factor: high,
                        original_length: original,
                    },
                    Scaling::Llama3 {
                        factor: wide(factor),
                        low: wide(low),
                        high: wide(high),
                        original: wide(original),
                    },
                )
            }
        ),
        (1u8..17, prop_oneof![Just(64.0f32), Just(4096.0)]).prop_map(|(factor, original)| {
            let factor = f32::from(factor);
            (
                RotaryScaling::Yarn {
                    factor,
                    attention_factor: None,
                    beta_fast: 32.0,
                    beta_slow: 1.0,
                    original_length: original,
                },
                Scaling::Yarn {
                    factor: f64::from(factor),
                    beta_fast: 32.0,
                    beta_slow: 1.0,
                    original: f64::from(original),
                },
            )
        }),
    ]
}

fn bases() -> impl Strategy<Value = f32> {
    prop_oneof![Just(10_000.0f32), Just(100_000.0), Just(1_000_000.0)]
}

/// Sizes of an attention whose work stays small.
fn geometries() -> impl Strategy<Value = (Attention, u64)> {
    let time = prop_oneof![
        1 => Just(0usize), 2 => Just(1usize), 5 => 2..20usize, 1 => 31..=33usize, 2 => 63..=65usize, 1 => 127..=129usize
    ];
    let heads = prop_oneof![Just((1usize, 1usize)), Just((2, 1)), Just((4, 2)), Just((3, 3)), Just((6, 2))];
    (
        0..3usize,
        time,
        heads,
        // Tensor cores take bf16 heads of 32, 64 and 128; 65 is more than a block of other kernels has columns.
        prop_oneof![
            4 => prop_oneof![Just(1usize), Just(2), Just(5), Just(8), Just(16), Just(65)],
            3 => prop_oneof![Just(32usize), Just(64), Just(128)],
        ],
        any::<[bool; 4]>(),
        any::<u64>(),
    )
        .prop_map(|(batch, key_time, (heads, key_heads), size, flags, seed)| {
            let mut random = Random::new(seed);
            // Long sequences in one row of few heads; large heads few.
            let (batch, heads, key_heads) = match (key_time > 40, size > 16) {
                (true, _) => (batch.min(1), heads / key_heads, 1),
                (false, true) => (batch, heads / key_heads, 1),
                (false, false) => (batch, heads, key_heads),
            };
            let size = if key_time > 40 && size < 32 { size.min(5) } else { size };
            let [documents, window, last, wide] = flags;
            let query_time = if last && key_time > 0 { 1 + random.below(key_time) } else { key_time };
            let starts = || (0..batch).flat_map(|_| random.document_starts(key_time)).collect();
            let document_start = documents.then(starts);
            let window = window.then(|| 1 + random.below(key_time.max(1) + 3));
            // Some sharp distributions: scores of several units.
            let scale = (size as f64).powf(-0.5) * if wide { 4.0 } else { 1.0 };
            let scale = f64::from(scale as f32);
            (Attention { batch, query_time, key_time, heads, key_heads, size, scale, document_start, window }, seed)
        })
}

fn inputs(sizes: &Attention, random: &mut Random) -> [Input; 3] {
    let Attention { batch, query_time, key_time, heads, key_heads, size, .. } = *sizes;
    [
        Input::normal("query", &[batch, query_time, heads, size], random),
        Input::normal("key", &[batch, key_time, key_heads, size], random),
        Input::normal("value", &[batch, key_time, key_heads, size], random),
    ]
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn rotation_frequencies(pairs in 1..65usize, theta in bases(), (scaling, expected) in scalings()) {
        let table = RotaryTable::new(2 * pairs, theta, scaling).unwrap();
        let (frequencies, factor) = reference::inverse_frequencies(2 * pairs, f64::from(theta), expected);
        prop_assert!((f64::from(table.attention_factor) - factor).abs() <= 1e-6 * factor);
        let got: Vec<f64> = table.inverse_frequencies.iter().map(|frequency| f64::from(*frequency)).collect();
        for (pair, (got, expected)) in got.iter().zip(&frequencies).enumerate() {
            // Powers of the base in f32 are good to a few ulp; Llama 3's passage is steep and amplifies that.
            let allowed = 2e-5 * expected;
            prop_assert!((got - expected).abs() <= allowed, "pair {pair}: {got:e}, expected {expected:e}");
        }
    }

    #[test]
    fn rope(
        batch in 0..3usize,
        time in prop_oneof![Just(0usize), Just(1), 2..20usize, 63..=65usize],
        heads in 1..7usize,
        pairs in prop_oneof![1..9usize, 31..=33usize, Just(64)],
        theta in bases(),
        (scaling, _) in scalings(),
        limit in prop_oneof![Just(20usize), Just(200), Just(8192)],
        seed: u64,
    ) {
        let mut random = Random::new(seed);
        let positions: Vec<usize> = (0..batch * time).map(|_| random.below(limit)).collect();
        let position_tensor = indices(&[batch, time], &positions);
        let table = RotaryTable::new(2 * pairs, theta, scaling).unwrap();
        let frequencies: Vec<f64> = table.inverse_frequencies.iter().map(|frequency| f64::from(*frequency)).collect();
        let factor = f64::from(table.attention_factor);
        let inputs = [Input::normal("input", &[batch, time, heads, 2 * pairs], &mut random)];
        // Angles are f32 products of position and frequency: at position p they are off by up to p · 6e-8.
        let tolerance = Tolerance::relative(5e-7 + limit as f64 * 6e-8);
        for precision in PRECISIONS {
            check_operator(
                precision, seed, tolerance, &inputs, &[&[batch, time, heads, 2 * pairs]],
                |tape, inputs| Ok(vec![ops::rope(tape, &inputs[0], &position_tensor, &table)?]),
                |values| vec![reference::rope(&values[0], &positions, heads, &frequencies, factor)],
            ).map_err(|message| TestCaseError::fail(format!("{precision:?}: {message}")))?;
        }
    }

    #[test]
    fn attention((sizes, seed) in geometries()) {
        let inputs = inputs(&sizes, &mut Random::new(seed));
        let starts = sizes.document_start.as_ref().map(|starts| indices(&[sizes.batch, sizes.key_time], starts));
        for precision in PRECISIONS {
            // The backward pass uses the saved output; rounded to bf16, it spoils the gradients of sharp distributions.
            let scale = if precision == Precision::F32 { sizes.scale } else { (sizes.size as f64).powf(-0.5) };
            let sizes = Attention { scale, ..sizes.clone() };
            let options = AttentionOptions {
                scale: scale as f32,
                document_start: starts.as_ref(),
                window: sizes.window,
            };
            check_operator(
                precision, seed, ATTENTION, &inputs, &[&inputs[0].shape],
                |tape, inputs| Ok(vec![ops::attention(tape, &inputs[0], &inputs[1], &inputs[2], options)?]),
                |values| vec![reference::attention(&sizes, &values[0], &values[1], &values[2])],
            ).map_err(|message| TestCaseError::fail(format!("{sizes:?} in {precision:?}: {message}")))?;
        }
    }

    /// Documents packed in a row give what each gives alone, gradients included.
    #[test]
    fn packed_documents_are_separate(lengths in prop::collection::vec(1..20usize, 1..5), seed: u64) {
        let mut random = Random::new(seed);
        let (heads, key_heads, size) = (4, 2, 8);
        let time: usize = lengths.iter().sum();
        let starts: Vec<usize> = lengths.iter().scan(0, |next, length| {
            let start = *next;
            *next += length;
            Some(vec![start; *length])
        }).flatten().collect();
        let sizes = [("query", heads), ("key", key_heads), ("value", key_heads), ("cotangent", heads)];
        let values: Vec<Vec<f64>> = sizes.iter().map(|(_, heads)| random.normals(time * heads * size, 1.0)).collect();
        let run = |first: usize, length: usize, document_start: Option<&Tensor>| {
            let parts: Vec<Tensor> = values.iter().zip(&sizes).map(|(values, (_, heads))| {
                let width = heads * size;
                tensor(DType::F32, &[1, length, *heads, size], &values[first * width..][..length * width])
            }).collect();
            let tape = Tape::new();
            let leaves: Vec<Var> = parts[..3].iter().map(|part| tape.leaf(part)).collect();
            let options = AttentionOptions { scale: 0.35, document_start, window: None };
            let output = ops::attention(&tape, &leaves[0], &leaves[1], &leaves[2], options).unwrap();
            let mut results = vec![widened(&output).unwrap()];
            let gradients = tape.backward_from(vec![(output, parts[3].clone())]).unwrap();
            results.extend(parts[..3].iter().map(|part| widened(gradients.get(part).unwrap()).unwrap()));
            results
        };
        let packed = run(0, time, Some(&indices(&[1, time], &starts)));
        let mut separate = vec![Vec::new(); 4];
        let mut first = 0;
        for length in lengths {
            for (all, part) in separate.iter_mut().zip(run(first, length, None)) {
                all.extend(part);
            }
            first += length;
        }
        for (name, (packed, separate)) in ["output", "query", "key", "value"].iter().zip(packed.iter().zip(&separate)) {
            agree(name, &[packed.len()], packed, separate, Bounds::new(1e-6, 2e-6)).map_err(TestCaseError::fail)?;
        }
    }

    /// Attention over a cache, in pieces of a few queries each, is attention over the whole.
    #[test]
    fn cached_attention_is_attention((sizes, seed) in geometries(), pieces in 1..4usize) {
        let sizes = Attention { document_start: None, query_time: sizes.key_time, ..sizes };
        let [query, key, value] = inputs(&sizes, &mut Random::new(seed)).map(|input| tensor(DType::F32, &input.shape, &input.values));
        let expected = reference::attention(
            &sizes, &widened(&query).unwrap(), &widened(&key).unwrap(), &widened(&value).unwrap(),
        );
        let Attention { batch, key_time, key_heads, size, .. } = sizes;
        let row = sizes.heads * size;
        let room = key_time + 3;
        let empty = tensor(DType::F32, &[batch, 0, key_heads, size], &[]);
        let mut keys = ops::with_room(&empty, room).unwrap();
        let mut values = ops::with_room(&empty, room).unwrap();
        let (mut got, mut wanted) = (Vec::new(), Vec::new());
        let mut time = 0;
        while time < key_time {
            let count = pieces.min(key_time - time);
            let piece = |whole: &Tensor, width: usize| {
                let whole = widened(whole).unwrap();
                let rows = (0..batch).flat_map(|row| whole[(row * key_time + time) * width..][..count * width].to_vec());
                rows.collect::<Vec<f64>>()
            };
            let cached = |whole: &Tensor| tensor(DType::F32, &[batch, count, key_heads, size], &piece(whole, key_heads * size));
            ops::write_time(&mut keys, &cached(&key), time).unwrap();
            ops::write_time(&mut values, &cached(&value), time).unwrap();
            let queries = tensor(DType::F32, &[batch, count, sizes.heads, size], &piece(&query, row));
            let output =
                ops::attention_cached(&queries, &keys, &values, time + count, sizes.scale as f32, sizes.window).unwrap();
            got.extend(widened(&output).unwrap());
            for batch_row in 0..batch {
                wanted.extend_from_slice(&expected[(batch_row * key_time + time) * row..][..count * row]);
            }
            time += count;
        }
        agree("output", &[got.len()], &got, &wanted, ATTENTION.output).map_err(TestCaseError::fail)?;
    }
}

/// Lengths around those at which GPUs divide a cache into parts.
#[test]
fn long_caches() {
    let mut random = Random::new(17);
    for (length, window) in [(255, None), (256, None), (257, None), (600, None), (600, Some(300)), (600, Some(20))] {
        let (batch, query_time, heads, key_heads, size) = (2, 2, 4, 2, 8);
        let scale = f64::from((size as f64).powf(-0.5) as f32);
        let document_start = None;
        let sizes =
            Attention { batch, query_time, key_time: length, heads, key_heads, size, scale, document_start, window };
        let [query, key, value] =
            inputs(&sizes, &mut random).map(|input| tensor(DType::F32, &input.shape, &input.values));
        let got = ops::attention_cached(&query, &key, &value, length, scale as f32, window).unwrap();
        let [query, key, value] = [query, key, value].map(|tensor| widened(&tensor).unwrap());
        let expected = reference::attention(&sizes, &query, &key, &value);
        let got = widened(&got).unwrap();
        agree(&format!("{length} keys"), &[got.len()], &got, &expected, ATTENTION.output).unwrap();
    }
}

#[test]
fn arguments_that_make_no_sense_are_named() {
    let tape = Tape::inference();
    let zeros = |shape: &[usize]| Var::constant(&tensor(DType::F32, shape, &vec![0.0; shape.iter().product()]));
    let plain = AttentionOptions { scale: 1.0, document_start: None, window: None };
    let run = |query: &[usize], key: &[usize], options| {
        ops::attention(&tape, &zeros(query), &zeros(key), &zeros(key), options).unwrap_err().to_string()
    };
    let message = run(&[1, 4, 3, 8], &[1, 4, 2, 8], plain);
    assert!(message.contains("2 key heads do not divide 3 query heads"), "{message}");
    let message = run(&[1, 5, 2, 8], &[1, 4, 2, 8], plain);
    assert!(message.contains("5 queries over 4 keys"), "{message}");
    let message = run(&[1, 4, 2, 8], &[1, 4, 2, 8], AttentionOptions { window: Some(0), ..plain });
    assert!(message.contains("window of 0"), "{message}");
    let late = indices(&[1, 4], &[0, 2, 2, 3]);
    let options = AttentionOptions { document_start: Some(&late), ..plain };
    if grafter_tests::device().is_cpu() {
        let message = run(&[1, 4, 2, 8], &[1, 4, 2, 8], options);
        assert!(message.contains("document_start[1] is 2"), "{message}");
    } else {
        // Nothing waits to look at the starts there: the token itself shows it.
        for (dtype, size) in [(DType::F32, 8), (DType::Bf16, 64)] {
            let ones = Var::constant(&tensor(dtype, &[1, 4, 2, size], &vec![1.0; 8 * size]));
            let output = widened(&ops::attention(&tape, &ones, &ones, &ones, options).unwrap()).unwrap();
            for (token, values) in output.chunks(2 * size).enumerate() {
                assert!(
                    values.iter().all(|value| if token == 1 { value.is_nan() } else { *value == 1.0 }),
                    "{values:?}"
                );
            }
        }
    }
    assert!(RotaryTable::new(7, 1e4, RotaryScaling::None).is_err());
    assert!(RotaryTable::new(8, -1.0, RotaryScaling::None).is_err());
    let table = RotaryTable::new(8, 1e4, RotaryScaling::None).unwrap();
    assert!(ops::rope(&tape, &zeros(&[1, 2, 1, 6]), &indices(&[1, 2], &[0, 1]), &table).is_err());
}
