//! The checks themselves must be able to fail: each wrong operator and each spoilt array here is found.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use autograd::{Tape, Tensor, Var, ops};
use grafter_tests::check::{Input, Precision, Tolerance, check_operator, verdict, widened};
use grafter_tests::compare::Bounds;
use grafter_tests::random::Random;

type Operator = fn(&Tape<'_>, &[Var]) -> autograd::Result<Vec<Var>>;

/// `a · b`, through a given operator.
fn check(operator: Operator, precision: Precision) -> Result<(), String> {
    let mut random = Random::new(5);
    let inputs = [Input::normal("a", &[7, 9], &mut random), Input::normal("b", &[7, 9], &mut random)];
    check_operator(precision, 5, Tolerance::ELEMENTWISE, &inputs, &[&[7, 9]], operator, |values| {
        vec![values[0].iter().zip(&values[1]).map(|(a, b)| a * b).collect()]
    })
}

/// The right product, with gradients that `spoil` has had its hands on.
fn with_gradients(
    tape: &Tape<'_>,
    inputs: &[Var],
    spoil: fn(&mut Vec<f32>, &mut Vec<f32>),
) -> autograd::Result<Vec<Var>> {
    let [a, b] = [inputs[0].tensor().clone(), inputs[1].tensor().clone()];
    let output = ops::mul(&Tape::inference(), &inputs[0], &inputs[1])?.tensor().clone();
    Ok(vec![tape.record_one(&[&inputs[0], &inputs[1]], output, move |gradient, _| {
        let product = |other: &Tensor| -> autograd::Result<Vec<f32>> {
            Ok(gradient.to_f32_vec()?.iter().zip(other.to_f32_vec()?).map(|(g, x)| g * x).collect())
        };
        let (mut for_a, mut for_b) = (product(&b)?, product(&a)?);
        spoil(&mut for_a, &mut for_b);
        let tensor = |values: &[f32]| Tensor::from_slice(a.device(), a.shape(), values);
        Ok(vec![Some(tensor(&for_a)?), Some(tensor(&for_b)?)])
    })])
}

#[test]
fn a_right_operator_passes() {
    for precision in [Precision::F32, Precision::Bf16] {
        check(|tape, inputs| Ok(vec![ops::mul(tape, &inputs[0], &inputs[1])?]), precision).unwrap();
        check(|tape, inputs| with_gradients(tape, inputs, |_, _| {}), precision).unwrap();
    }
}

#[test]
fn wrong_operators_fail() {
    let wrong: [(&str, Operator, &str); 7] = [
        (
            "another shape",
            |tape, inputs| Ok(vec![ops::mul(tape, &inputs[0], &inputs[1])?.reshape(tape, &[9, 7])?]),
            "output 0 has shape [9, 7], expected [7, 9]",
        ),
        ("another result", |tape, inputs| Ok(vec![ops::add(tape, &inputs[0], &inputs[1])?]), "output 0"),
        (
            "a relative error of 1e-5",
            |tape, inputs| {
                let product = ops::mul(tape, &inputs[0], &inputs[1])?;
                Ok(vec![ops::scale(tape, &product, 1.00001)?])
            },
            "output 0",
        ),
        ("no gradient", |_, inputs| Ok(vec![ops::mul(&Tape::inference(), &inputs[0], &inputs[1])?]), "no gradient"),
        (
            "gradients of the wrong sign",
            |tape, inputs| with_gradients(tape, inputs, |a, _| a.iter_mut().for_each(|value| *value = -*value)),
            "gradient of a",
        ),
        (
            "one wrong element among many",
            |tape, inputs| with_gradients(tape, inputs, |_, b| b[31] += 0.1),
            "gradient of b",
        ),
        (
            "a gradient that is not a number",
            |tape, inputs| with_gradients(tape, inputs, |_, b| b[62] = f32::NAN),
            "gradient of b",
        ),
    ];
    for (what, operator, message) in wrong {
        let error = check(operator, Precision::F32).expect_err(what);
        assert!(error.contains(message), "{what}: {error}");
    }
}

#[test]
fn spoilt_arrays_fail() {
    let bounds = Bounds::new(1e-2, 1e-2);
    let expected = Random::new(3).normals(64, 1.0);
    let verdict_on = |got: &[f64]| verdict("array", &[8, 8], got, &expected, bounds);
    verdict_on(&expected).unwrap();

    let mut transposed_tile = expected.clone();
    for row in 0..4 {
        for column in 0..4 {
            transposed_tile[row * 8 + column] = expected[column * 8 + row];
        }
    }
    let mut shifted = expected.clone();
    shifted.rotate_right(1);
    let changed = |index: usize, value: f64| {
        let mut array = expected.clone();
        array[index] = value;
        array
    };
    let spoilt = [
        ("transposed tile", transposed_tile),
        ("shifted index", shifted),
        ("sign flip", changed(40, -expected[40])),
        ("NaN", changed(63, f64::NAN)),
        ("infinity", changed(0, f64::INFINITY)),
        ("minus infinity", changed(17, f64::NEG_INFINITY)),
        ("wrong length", expected[..63].to_vec()),
        ("zeros", vec![0.0; 64]),
    ];
    for (what, array) in spoilt {
        assert!(verdict_on(&array).is_err(), "{what} passes");
    }
    let nothing = vec![f64::NAN; 64];
    assert!(verdict("both NaN", &[8, 8], &nothing, &nothing, bounds).is_err());
}

#[test]
fn the_reference_sees_the_values_that_the_operator_sees() {
    // 0.1 is no bf16 number: the reference must get the rounded one.
    let inputs = [Input::new("x", &[1], vec![0.1])];
    check_operator(
        Precision::Bf16,
        1,
        Tolerance::ELEMENTWISE,
        &inputs,
        &[],
        |_, inputs| {
            assert_eq!(widened(&inputs[0]).unwrap(), [0.100_097_656_25]);
            Ok(vec![])
        },
        |values| {
            assert_eq!(values[0], [0.100_097_656_25]);
            vec![]
        },
    )
    .unwrap_err();
}
