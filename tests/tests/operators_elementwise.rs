//! Elementwise operators, sums and rearrangements against their f64 references.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use autograd::{DType, Tape, Tensor, Var, ops};
use grafter_tests::check::{Input, Precision, Tolerance, cases, check_operator, tensor, widened};
use grafter_tests::random::Random;
use grafter_tests::reference;
use proptest::prelude::*;

/// Both precisions, in every case.
const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Bf16];

/// Shapes of one to three dimensions: nothing, one, odd, and around the operators' block sizes.
fn shapes() -> impl Strategy<Value = Vec<usize>> {
    prop_oneof![
        Just(vec![]),
        prop_oneof![Just(0usize), Just(1), 2..9usize, 31..=33usize, 127..=129usize].prop_map(|size| vec![size]),
        (0..4usize, 1..20usize).prop_map(|(rows, width)| vec![rows, width]),
        (1..3usize, 1..5usize, prop_oneof![1..4usize, 63..=65usize]).prop_map(|(a, b, c)| vec![a, b, c]),
        (8191..=8193usize).prop_map(|size| vec![size]),
        (16383..=16385usize).prop_map(|size| vec![size]),
    ]
}

/// Sizes of parts: any, and multiples of 8, which GPUs move at once.
fn parts() -> impl Strategy<Value = Vec<usize>> {
    let any = prop::collection::vec(0..9usize, 1..5);
    let eights = prop::collection::vec((0..5usize).prop_map(|eights| 8 * eights), 1..5);
    prop_oneof![any, eights]
}

type Unary = fn(&Tape<'_>, &Var) -> autograd::Result<Var>;
type Binary = fn(&Tape<'_>, &Var, &Var) -> autograd::Result<Var>;
type UnaryFormula = fn(f64) -> f64;
type BinaryFormula = fn(f64, f64) -> f64;

const UNARY: [(&str, Unary, UnaryFormula); 4] = [
    ("scale", |tape, x| ops::scale(tape, x, -1.75), |x| -1.75 * x),
    ("negative_exp", ops::negative_exp, |x| -x.exp()),
    ("silu", ops::silu, reference::silu),
    ("softplus", ops::softplus, reference::softplus),
];

const BINARY: [(&str, Binary, BinaryFormula); 4] = [
    ("add", ops::add, |a, b| a + b),
    ("sub", ops::sub, |a, b| a - b),
    ("mul", ops::mul, |a, b| a * b),
    ("swiglu", ops::swiglu, |gate, up| reference::silu(gate) * up),
];

/// The polynomials behind exp and sigmoid err by about 2 ulp each.
const TOLERANCE: Tolerance = Tolerance::relative(5e-7);

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn functions_of_one_number(shape in shapes(), seed: u64, spread in prop_oneof![Just(1.0), Just(8.0)]) {
        let mut random = Random::new(seed);
        let inputs = [Input::new("x", &shape, random.normals(shape.iter().product(), spread))];
        let all = UNARY.into_iter().flat_map(|entry| PRECISIONS.map(|precision| (entry, precision)));
        for ((name, operator, formula), precision) in all {
            check_operator(
                precision, seed, TOLERANCE, &inputs, &[&shape],
                |tape, inputs| Ok(vec![operator(tape, &inputs[0])?]),
                |values| vec![values[0].iter().map(|x| formula(*x)).collect()],
            ).map_err(|message| TestCaseError::fail(format!("{name} in {precision:?}: {message}")))?;
        }
    }

    #[test]
    fn functions_of_two_numbers(shape in shapes(), seed: u64) {
        let mut random = Random::new(seed);
        let inputs = [Input::normal("a", &shape, &mut random), Input::normal("b", &shape, &mut random)];
        let all = BINARY.into_iter().flat_map(|entry| PRECISIONS.map(|precision| (entry, precision)));
        for ((name, operator, formula), precision) in all {
            check_operator(
                precision, seed, TOLERANCE, &inputs, &[&shape],
                |tape, inputs| Ok(vec![operator(tape, &inputs[0], &inputs[1])?]),
                |values| vec![values[0].iter().zip(&values[1]).map(|(a, b)| formula(*a, *b)).collect()],
            ).map_err(|message| TestCaseError::fail(format!("{name} in {precision:?}: {message}")))?;
        }
    }

    #[test]
    fn sums(shape in shapes(), seed: u64) {
        // Positive numbers, so that the sum is no smaller than its terms.
        let count = shape.iter().product();
        let inputs = [Input::new("x", &shape, Random::new(seed).uniforms(count, 0.5, 1.5))];
        for precision in PRECISIONS {
            check_operator(
                precision, seed, TOLERANCE, &inputs, &[&[]],
                |tape, inputs| Ok(vec![ops::sum(tape, &inputs[0])?]),
                |values| vec![vec![values[0].iter().sum()]],
            ).map_err(|message| TestCaseError::fail(format!("sum in {precision:?}: {message}")))?;
        }
    }

    #[test]
    fn splitting(rows in 0..5usize, sizes in parts(), seed: u64) {
        let width: usize = sizes.iter().sum();
        let shapes: Vec<[usize; 2]> = sizes.iter().map(|size| [rows, *size]).collect();
        let shapes: Vec<&[usize]> = shapes.iter().map(|shape| &shape[..]).collect();
        let inputs = [Input::normal("x", &[rows, width], &mut Random::new(seed))];
        for precision in PRECISIONS {
            check_operator(
                precision, seed, TOLERANCE, &inputs, &shapes,
                |tape, inputs| ops::split(tape, &inputs[0], &sizes),
                |values| {
                    let mut start = 0;
                    sizes.iter().map(|size| {
                        let first = start;
                        start += size;
                        (0..rows).flat_map(|row| &values[0][row * width + first..][..*size]).copied().collect()
                    }).collect()
                },
            ).map_err(|message| TestCaseError::fail(format!("split in {precision:?}: {message}")))?;
        }
    }

    #[test]
    fn repeating_chunks(rows in 0..4usize, chunks in 1..5usize, chunk in 1..18usize, repeats in 1..5usize, seed: u64) {
        let inputs = [Input::normal("x", &[rows, 2, chunks * chunk], &mut Random::new(seed))];
        for precision in PRECISIONS {
            check_operator(
                precision, seed, TOLERANCE, &inputs, &[&[rows, 2, chunks * chunk * repeats]],
                |tape, inputs| Ok(vec![ops::repeat_chunks(tape, &inputs[0], chunk, repeats)?]),
                |values| vec![reference::repeat_chunks(&values[0], chunk, repeats)],
            ).map_err(|message| TestCaseError::fail(format!("repeat_chunks in {precision:?}: {message}")))?;
        }
    }

    #[test]
    fn in_place_sums_and_products(shape in shapes(), seed: u64) {
        let mut random = Random::new(seed);
        let count = shape.iter().product();
        let (a, b) = (random.normals(count, 1.0), random.normals(count, 1.0));
        for (dtype, other_dtype) in [
            (DType::F32, DType::F32), (DType::F32, DType::Bf16), (DType::Bf16, DType::Bf16), (DType::Bf16, DType::F32),
        ] {
            let rounded = |value: f32| match dtype {
                DType::Bf16 => half::bf16::from_f32(value).to_f32(),
                _ => value,
            };
            let mut sum = tensor(dtype, &shape, &a);
            let other = tensor(other_dtype, &shape, &b);
            // Once with another holder of the memory, who must not see a change, and once without.
            let before = sum.to_f32_vec().unwrap();
            let holder = sum.clone();
            let mut expected = before.clone();
            for _ in 0..2 {
                ops::add_in_place(&mut sum, &other).unwrap();
                ops::scale_in_place(&mut sum, 0.3).unwrap();
                for (value, other) in expected.iter_mut().zip(other.to_f32_vec().unwrap()) {
                    *value = rounded(rounded(*value + other) * 0.3);
                }
                prop_assert_eq!(&sum.to_f32_vec().unwrap(), &expected, "{} += {}", dtype, other_dtype);
            }
            let mut holder = holder;
            prop_assert_eq!(holder.to_f32_vec().unwrap(), before.clone());
            let view = holder.reshape(&[count]).unwrap();
            ops::scale_in_place(&mut holder, 2.0).unwrap();
            prop_assert_eq!(view.to_f32_vec().unwrap(), before);
        }
    }

    #[test]
    fn filled_tensors(count in prop_oneof![0..10usize, 255..=257usize, 1023..=1025usize], value in -4..5i32) {
        let device = grafter_tests::device();
        for dtype in [DType::F32, DType::Bf16] {
            // The memory that the tensor will get: what is not written shows.
            drop(tensor(dtype, &[count], &vec![f64::NAN; count]));
            let filled = Tensor::filled(&device, &[count], dtype, value as f32).unwrap();
            prop_assert_eq!(filled.dtype(), dtype);
            prop_assert_eq!(filled.to_f32_vec().unwrap(), vec![value as f32; count]);
        }
        let value = value.unsigned_abs();
        let filled = Tensor::filled(&device, &[count], DType::U32, value as f32).unwrap();
        prop_assert_eq!(filled.to_vec::<u32>().unwrap(), vec![value; count]);
    }

    #[test]
    fn caches_of_decoding(
        batch in 0..4usize, old in 0..5usize, more in 0..5usize, steps in 0..4usize,
        width in prop_oneof![1..20usize, Just(64)], seed: u64,
    ) {
        let mut random = Random::new(seed);
        let room = old + more + steps;
        let mut numbers = |count: usize| -> Vec<f32> {
            random.normals(count, 1.0).into_iter().map(|value| value as f32).collect()
        };
        let (old_values, step_values) = (numbers(batch * old * width), numbers(batch * steps * width));
        let device = grafter_tests::device();
        let cache = Tensor::from_slice(&device, &[batch, old, width], &old_values).unwrap();
        let step = Tensor::from_slice(&device, &[batch, steps, width], &step_values).unwrap();
        let mut cache = ops::with_room(&cache, room).unwrap();
        prop_assert_eq!(cache.shape(), &[batch, room, width]);
        // The rest of the room is unspecified: it is written here.
        let rest = Tensor::filled(&device, &[batch, room - old, width], DType::F32, 7.0).unwrap();
        ops::write_time(&mut cache, &rest, old).unwrap();
        let time = old + more;
        ops::write_time(&mut cache, &step, time).unwrap();
        let values = cache.to_vec::<f32>().unwrap();
        for row in 0..batch {
            let of_row = |from: usize, to: usize| &values[(row * room + from) * width..(row * room + to) * width];
            prop_assert_eq!(of_row(0, old), &old_values[row * old * width..][..old * width]);
            prop_assert!(of_row(old, time).iter().all(|value| *value == 7.0));
            prop_assert_eq!(of_row(time, room), &step_values[row * steps * width..][..steps * width]);
        }
        if room > 0 {
            let last = ops::last_step(&cache).unwrap();
            prop_assert_eq!(last.shape(), &[batch, width]);
            let expected: Vec<f32> =
                (0..batch).flat_map(|row| &values[((row + 1) * room - 1) * width..][..width]).copied().collect();
            prop_assert_eq!(last.to_vec::<f32>().unwrap(), expected);
        } else {
            prop_assert!(ops::last_step(&cache).is_err());
        }
    }

    #[test]
    fn states_of_convolutions(
        batch in 0..3usize, time in 0..9usize, channels in 1..34usize, width in 1..6usize, seed: u64,
    ) {
        let values = Random::new(seed).normals(batch * time * channels, 1.0);
        for dtype in [DType::F32, DType::Bf16] {
            let input = tensor(dtype, &[batch, time, channels], &values);
            let state = ops::convolution_state(&input, width).unwrap();
            prop_assert_eq!(state.dtype(), DType::F32);
            prop_assert_eq!(state.shape(), &[batch, channels, width]);
            let (input, state) = (input.to_f32_vec().unwrap(), state.to_vec::<f32>().unwrap());
            for (index, value) in state.iter().enumerate() {
                let (column, channel, row) = (index % width, index / width % channels, index / width / channels);
                let expected = match (time + column).checked_sub(width) {
                    Some(step) => input[(row * time + step) * channels + channel],
                    None => 0.0,
                };
                prop_assert_eq!(*value, expected);
            }
        }
    }
}

#[test]
fn extreme_arguments_give_the_limits() {
    let tape = Tape::inference();
    let values = [-1e4, -200.0, -90.0, -20.0, 0.0, 19.999, 20.001, 90.0, 200.0, 1e4];
    let x = Var::constant(&tensor(DType::F32, &[values.len()], &values));
    for (name, got, formula) in [
        ("softplus", ops::softplus(&tape, &x).unwrap(), reference::softplus as fn(f64) -> f64),
        ("silu", ops::silu(&tape, &x).unwrap(), reference::silu),
    ] {
        for (got, x) in widened(&got).unwrap().into_iter().zip(values) {
            let expected = formula(x);
            assert!(
                (got - expected).abs() <= 1e-6 * expected.abs() + 1e-30,
                "{name}({x}) is {got:e}, not {expected:e}"
            );
        }
    }
}

/// More elements than one block sums, and more blocks' sums than a thread takes at a time.
#[test]
fn a_long_sum() {
    let count = 200_003;
    let values = Random::new(5).uniforms(count, 0.5, 1.5);
    for dtype in [DType::F32, DType::Bf16] {
        let x = tensor(dtype, &[count], &values);
        let expected: f64 = widened(&x).unwrap().iter().sum();
        let got = f64::from(ops::sum(&Tape::inference(), &Var::constant(&x)).unwrap().item().unwrap());
        assert!((got / expected - 1.0).abs() <= 5e-7, "{dtype}: {got}, not {expected}");
    }
}

#[test]
fn shapes_that_differ_are_refused() {
    let tape = Tape::inference();
    let a = Var::constant(&tensor(DType::F32, &[2, 3], &[0.0; 6]));
    let b = Var::constant(&tensor(DType::F32, &[3, 2], &[0.0; 6]));
    for (name, operator, _) in BINARY {
        let message = operator(&tape, &a, &b).unwrap_err().to_string();
        assert!(message.contains(name) && message.contains("[3, 2]"), "{message}");
    }
    assert!(ops::split(&tape, &a, &[1, 1]).is_err());
    assert!(ops::repeat_chunks(&tape, &a, 2, 2).is_err());
}
