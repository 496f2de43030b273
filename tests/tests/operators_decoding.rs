//! What decoding alone uses: products of few rows, steps on caches, against their references and against the operators on
//! whole sequences.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use autograd::ops::{self, CacheStep, MambaStepInputs, RotaryScaling, RotaryTable};
use autograd::{DType, Tape, Tensor, Var};
use grafter_tests::check::{agree, cases, indices, tensor, widened};
use grafter_tests::random::Random;
use grafter_tests::reference;
use proptest::prelude::*;
use tools::compare::Bounds;

/// Results in bf16: their own rounding, and that of the residual's sum before.
const ROUNDED: Bounds = Bounds { relative_l2: Some(4e-3), relative_max: Some(8e-3) };

/// `[rows, width]` of normal numbers.
fn matrix(dtype: DType, rows: usize, width: usize, random: &mut Random) -> Tensor {
    tensor(dtype, &[rows, width], &random.normals(rows * width, 1.0))
}

/// Rows around what tensor cores take at a time and around the most that the way for few rows takes.
fn few_rows() -> impl Strategy<Value = usize> {
    prop_oneof![2 => Just(1usize), 2 => 2..=9usize, 1 => 15..=17usize, 1 => 31..=33usize, 1 => 63..=65usize]
}

/// Depths around a lane's words, a warp's part, all warps' parts and the parts on their way.
fn depth() -> impl Strategy<Value = usize> {
    prop_oneof![
        1 => Just(0usize),
        4 => (1..=17usize).prop_map(|eighths| 8 * eighths),
        1 => (63..=65usize).prop_map(|eighths| 8 * eighths),
        1 => (255..=257usize).prop_map(|eighths| 8 * eighths),
        1 => (383..=385usize).prop_map(|eighths| 8 * eighths),
        1 => 1..40usize,
    ]
}

proptest! {
    #![proptest_config(cases(128))]

    #[test]
    fn products_of_few_rows(
        rows in few_rows(), depth in depth(), outer in prop_oneof![1..=20usize, 1..=3usize], bias: bool, residual: bool, seed: u64,
    ) {
        let mut random = Random::new(seed);
        let scale = (depth.max(1) as f64).powf(-0.5);
        let input = matrix(DType::Bf16, rows, depth, &mut random);
        let weight = tensor(DType::Bf16, &[outer, depth], &random.normals(outer * depth, scale));
        let added = matrix(DType::Bf16, rows, outer, &mut random);
        let bias = bias.then(|| tensor(DType::F32, &[outer], &random.normals(outer, 1.0)));
        let product = |input: &Tensor, added: &Tensor| {
            let [input, added] = [input, added].map(Var::constant);
            let (weight, bias) = (Var::constant(&weight), bias.as_ref().map(Var::constant));
            let tape = Tape::inference();
            let output = match residual {
                true => ops::linear_residual(&tape, &added, &input, &weight, bias.as_ref()),
                false => ops::linear(&tape, &input, &weight, bias.as_ref()),
            };
            output.unwrap().tensor().clone()
        };
        let output = product(&input, &added);
        let bias_values = bias.as_ref().map(|bias| widened(bias).unwrap());
        let mut expected = reference::linear(
            &widened(&input).unwrap(), &widened(&weight).unwrap(), bias_values.as_deref(), rows, depth, outer,
        );
        if residual {
            expected.iter_mut().zip(widened(&added).unwrap()).for_each(|(expected, added)| *expected += added);
        }
        prop_assert_eq!(output.dtype(), DType::Bf16);
        let values = widened(&output).unwrap();
        agree("output", &[rows, outer], &values, &expected, ROUNDED).map_err(TestCaseError::fail)?;

        // A row's result does not depend on the others, wherever one way takes both.
        if rows <= 64 && depth % 8 == 0 && !grafter_tests::device().is_cpu() {
            let last = |tensor: &Tensor| {
                let width = tensor.shape()[1];
                let values = widened(tensor).unwrap();
                self::tensor(DType::Bf16, &[1, width], &values[(rows - 1) * width..])
            };
            let alone = product(&last(&input), &last(&added));
            prop_assert_eq!(widened(&alone).unwrap(), values[(rows - 1) * outer..].to_vec());
        }
    }
}

proptest! {
    #![proptest_config(cases(64))]

    #[test]
    fn gated_products_are_two_products_and_swiglu(rows in few_rows(), depth in depth(), outer in 1..=20usize, seed: u64) {
        let mut random = Random::new(seed);
        for dtype in [DType::F32, DType::Bf16] {
            let input = matrix(dtype, rows, depth, &mut random);
            let [gate, up] = [0, 1].map(|_| matrix(dtype, outer, depth, &mut random));
            let tape = Tape::inference();
            let product = |weight: &Tensor| {
                ops::linear(&tape, &Var::constant(&input), &Var::constant(weight), None).unwrap()
            };
            let expected = ops::swiglu(&tape, &product(&gate), &product(&up)).unwrap();
            let found = ops::linear_swiglu(&input, &gate, &up).unwrap();
            prop_assert_eq!((found.dtype(), found.shape()), (dtype, expected.shape()));
            prop_assert_eq!(widened(&found).unwrap(), widened(&expected).unwrap());
        }
    }
}

/// The inputs of a step of a Mamba mixer.
#[derive(Clone)]
struct MambaCase {
    window: Tensor,
    state: Tensor,
    projected: Tensor,
    delta: Tensor,
    conv_weight: Tensor,
    conv_bias: Option<Tensor>,
    a_log: Tensor,
    d: Tensor,
    delta_bias: Option<Tensor>,
}

impl MambaCase {
    fn inputs(&self) -> MambaStepInputs<'_> {
        MambaStepInputs {
            projected: &self.projected,
            delta: &self.delta,
            conv_weight: &self.conv_weight,
            conv_bias: self.conv_bias.as_ref(),
            a_log: &self.a_log,
            d: &self.d,
            delta_bias: self.delta_bias.as_ref(),
        }
    }
}

proptest! {
    #![proptest_config(cases(128))]

    #[test]
    fn steps_of_a_mamba_mixer_equal_their_operators(
        batch in prop_oneof![Just(0usize), 1..=3usize, 15..=17usize], chunks in 1..=3usize, repeats in 1..=4usize,
        states in prop_oneof![4 => Just(16usize), 1 => Just(4usize), 1 => Just(8usize), 1 => Just(32usize), 1 => Just(5usize)],
        taps in prop_oneof![3 => Just(4usize), 1 => 1..=6usize], repeated: bool, conv_bias: bool, delta_bias: bool, seed: u64,
    ) {
        let mut random = Random::new(seed);
        let (xb, channels) = (chunks * states, chunks * states * repeats);
        let convolved = if repeated { channels } else { xb };
        let mut normal = |dtype, shape: &[usize]| tensor(dtype, shape, &random.normals(shape.iter().product(), 1.0));
        for dtype in [DType::F32, DType::Bf16] {
            let mut case = MambaCase {
                window: normal(DType::F32, &[batch, convolved, taps]),
                state: normal(DType::F32, &[batch, channels, states]),
                projected: normal(dtype, &[batch, 2 * (channels + xb)]),
                delta: normal(dtype, &[batch, channels]),
                conv_weight: normal(DType::F32, &[convolved, taps]),
                conv_bias: conv_bias.then(|| normal(DType::F32, &[convolved])),
                a_log: normal(DType::F32, &[channels, states]),
                d: normal(DType::F32, &[channels]),
                delta_bias: delta_bias.then(|| normal(DType::F32, &[channels])),
            };
            let mut simple = case.clone();
            for step in 0..2 {
                let (mut window, mut state) = (case.window.clone(), case.state.clone());
                let output = ops::mamba_step(&mut window, &mut state, case.inputs()).unwrap();
                let (mut simple_window, mut simple_state) = (simple.window.clone(), simple.state.clone());
                let expected =
                    ops::mamba_step_by_operators(&mut simple_window, &mut simple_state, simple.inputs()).unwrap();
                prop_assert_eq!(output.dtype(), dtype);
                // The state is f32 in both; the same formulas in another order of a few operations. An output of bf16 may
                // be rounded to the other neighbour.
                let close = Bounds { relative_l2: Some(2e-6), relative_max: Some(4e-6) };
                let bounds = if dtype == DType::Bf16 { ROUNDED } else { close };
                for (name, found, expected, bounds) in [
                    ("output", &output, &expected, bounds),
                    ("window", &window, &simple_window, Bounds { relative_l2: Some(0.0), relative_max: Some(0.0) }),
                    ("state", &state, &simple_state, if dtype == DType::Bf16 { ROUNDED } else { close }),
                ] {
                    let (values, expected) = (widened(found).unwrap(), widened(expected).unwrap());
                    agree(name, found.shape(), &values, &expected, bounds)
                        .map_err(|message| TestCaseError::fail(format!("{dtype} step {step}: {message}")))?;
                }
                (case.window, case.state, simple.window, simple.state) = (window, state, simple_window, simple_state);
            }
        }
    }
}

#[test]
fn sizes_that_leave_nothing_for_x_are_refused() {
    let zeros = |shape: &[usize]| tensor(DType::F32, shape, &vec![0.0; shape.iter().product()]);
    let case = MambaCase {
        window: zeros(&[1, 32, 4]),
        state: zeros(&[1, 32, 16]),
        projected: zeros(&[1, 64]),
        delta: zeros(&[1, 32]),
        conv_weight: zeros(&[32, 4]),
        conv_bias: None,
        a_log: zeros(&[32, 16]),
        d: zeros(&[32]),
        delta_bias: None,
    };
    let (mut window, mut state) = (case.window.clone(), case.state.clone());
    let message = ops::mamba_step(&mut window, &mut state, case.inputs()).unwrap_err().to_string();
    assert!(message.contains("rows of 64 in `projected` leave 0 elements for x"), "{message}");
}

proptest! {
    #![proptest_config(cases(96))]

    /// One token per row, each row at a position of its own: as rotation, writing and attention over so long a cache.
    #[test]
    fn steps_on_caches_of_keys_and_values(
        batch in 0..=3usize, key_heads in 1..=3usize, group in 1..=3usize, half in prop_oneof![1..=5usize, Just(16usize), Just(32usize)],
        room in prop_oneof![4 => 1..=40usize, 1 => 255..=258usize, 1 => Just(520usize)], window in prop::option::of(1..=300usize),
        bf16: bool, seed: u64,
    ) {
        let mut random = Random::new(seed);
        let dtype = if bf16 { DType::Bf16 } else { DType::F32 };
        // On the CPU, caches are in f32.
        let cache_dtype = if grafter_tests::device().is_cpu() { DType::F32 } else { dtype };
        let (heads, size) = (key_heads * group, 2 * half);
        let mut normal = |dtype, shape: &[usize]| tensor(dtype, shape, &random.normals(shape.iter().product(), 1.0));
        let (query, key) = (normal(dtype, &[batch, 1, heads, size]), normal(dtype, &[batch, 1, key_heads, size]));
        let value = normal(dtype, &[batch, 1, key_heads, size]);
        let cache = [batch, room, key_heads, size];
        let (old_keys, old_values) = (normal(cache_dtype, &cache), normal(cache_dtype, &cache));
        let places: Vec<usize> = (0..batch).map(|_| random.below(room)).collect();
        let positions = indices(&[batch, 1], &places);
        let rotary = RotaryTable::new(size, 1e4, RotaryScaling::None).unwrap();

        let (mut keys, mut values) = (old_keys.clone(), old_values.clone());
        let step = CacheStep { query: &query, key: &key, value: &value, positions: &positions, rotary: &rotary };
        let rotated = ops::extend_cache(&mut keys, &mut values, step).unwrap();
        let tape = Tape::inference();
        let rope = |tensor: &Tensor| ops::rope(&tape, &Var::constant(tensor), &positions, &rotary).unwrap();
        prop_assert_eq!(widened(&rotated).unwrap(), widened(&rope(&query)).unwrap());
        for (cache, old, new) in [(&keys, &old_keys, rope(&key).tensor()), (&values, &old_values, &value)] {
            let (mut expected, new) = (widened(old).unwrap(), widened(new).unwrap());
            let width = key_heads * size;
            for (row, place) in places.iter().enumerate() {
                expected[(row * room + place) * width..][..width].copy_from_slice(&new[row * width..][..width]);
            }
            prop_assert_eq!(widened(cache).unwrap(), expected);
        }

        let output = ops::attention_step(&rotated, &keys, &values, &positions, 0.3, window).unwrap();
        prop_assert_eq!((output.dtype(), output.shape()), (dtype, query.shape()));
        let got = widened(&output).unwrap();
        let row_of = |tensor: &Tensor, row: usize| {
            let values = widened(tensor).unwrap();
            let mut shape = tensor.shape().to_vec();
            let width = values.len() / shape[0];
            shape[0] = 1;
            self::tensor(tensor.dtype(), &shape, &values[row * width..][..width])
        };
        for (row, place) in places.iter().enumerate() {
            let [query, keys, values] = [&rotated, &keys, &values].map(|tensor| row_of(tensor, row));
            let alone = ops::attention_cached(&query, &keys, &values, place + 1, 0.3, window).unwrap();
            prop_assert_eq!(&widened(&alone).unwrap()[..], &got[row * heads * size..][..heads * size]);
        }
    }
}

#[test]
fn positions_go_on_by_one() {
    let mut positions = indices(&[300, 1], &(0..300).collect::<Vec<usize>>());
    ops::advance(&mut positions).unwrap();
    assert_eq!(positions.to_vec::<u32>().unwrap(), (1..=300).collect::<Vec<u32>>());
}
