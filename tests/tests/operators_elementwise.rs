//! Elementwise operators, sums and rearrangements against their f64 references.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use autograd::{DType, Tape, Var, ops};
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
    fn functions_of_one_number(shape in shapes(), seed: u64, which in 0..UNARY.len(), spread in prop_oneof![Just(1.0), Just(8.0)]) {
        let (name, operator, formula) = UNARY[which];
        let mut random = Random::new(seed);
        let inputs = [Input::new("x", &shape, random.normals(shape.iter().product(), spread))];
        for precision in PRECISIONS {
            check_operator(
                precision, seed, TOLERANCE, &inputs, &[&shape],
                |tape, inputs| Ok(vec![operator(tape, &inputs[0])?]),
                |values| vec![values[0].iter().map(|x| formula(*x)).collect()],
            ).map_err(|message| TestCaseError::fail(format!("{name} in {precision:?}: {message}")))?;
        }
    }

    #[test]
    fn functions_of_two_numbers(shape in shapes(), seed: u64, which in 0..BINARY.len()) {
        let (name, operator, formula) = BINARY[which];
        let mut random = Random::new(seed);
        let inputs = [Input::normal("a", &shape, &mut random), Input::normal("b", &shape, &mut random)];
        for precision in PRECISIONS {
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
    fn splitting(rows in 0..5usize, sizes in prop::collection::vec(0..9usize, 1..5), seed: u64) {
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
        let mut sum = tensor(DType::F32, &shape, &a);
        let other = tensor(DType::F32, &shape, &b);
        let expected: Vec<f32> =
            sum.to_f32_vec().unwrap().iter().zip(other.to_f32_vec().unwrap()).map(|(a, b)| a + b).collect();
        ops::add_in_place(&mut sum, &other).unwrap();
        prop_assert_eq!(sum.to_f32_vec().unwrap(), &expected[..]);
        ops::scale_in_place(&mut sum, 0.3).unwrap();
        let expected: Vec<f32> = expected.into_iter().map(|value| value * 0.3).collect();
        prop_assert_eq!(sum.to_f32_vec().unwrap(), expected);
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
