//! Cross-entropy and divergences against their f64 references.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use autograd::ops::{self, Divergence, DivergenceOptions, IGNORED_LABEL};
use autograd::{DType, Tape, Var};
use grafter_tests::check::{Input, Precision, Tolerance, cases, check_operator, indices, tensor, verdict, widened};
use grafter_tests::compare::Bounds;
use grafter_tests::random::Random;
use grafter_tests::reference::{self, Kind};
use proptest::prelude::*;

const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Bf16];

/// A loss is a difference of logits and their log-sum-exp, which is good to an ulp of it: some 4e-6 for logits up to 30.
/// Losses that are much smaller have that absolute error, which [`close`] allows; gradients are held to relative bounds.
const LOSS: Tolerance = Tolerance {
    output: Bounds { relative_l2: Some(f64::INFINITY), relative_max: Some(f64::INFINITY) },
    ..Tolerance::relative(4e-6)
};

fn close(got: f64, expected: f64) -> Result<(), TestCaseError> {
    prop_assert!((got - expected).abs() <= 4e-6 * (1.0 + expected.abs()), "{got:e}, expected {expected:e}");
    Ok(())
}

const KINDS: [(Divergence, Kind); 4] = [
    (Divergence::ReverseKl, Kind::ReverseKl),
    (Divergence::ForwardKl, Kind::ForwardKl),
    (Divergence::JensenShannon, Kind::JensenShannon),
    (Divergence::SoftCrossEntropy, Kind::SoftCrossEntropy),
];

fn rows() -> impl Strategy<Value = usize> {
    prop_oneof![1 => Just(0usize), 2 => Just(1usize), 5 => 2..12usize]
}

/// Around the 32 lanes and the blocks of 1024 in which log-sum-exp is formed; longer than what a block of threads takes at
/// a time.
fn vocabularies() -> impl Strategy<Value = usize> {
    prop_oneof![
        1 => Just(1usize), 4 => 2..40usize, 1 => 63..=65usize, 1 => 127..=129usize, 1 => 1023..=1025usize,
        1 => Just(2056usize)
    ]
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn cross_entropy(rows in rows(), vocabulary in vocabularies(), spread in prop_oneof![Just(1.0), Just(8.0)], seed: u64) {
        let mut random = Random::new(seed);
        let labels: Vec<Option<usize>> =
            (0..rows).map(|_| (random.below(4) > 0).then(|| random.below(vocabulary))).collect();
        let counted = labels.iter().flatten().count().max(1) as f64;
        let label_tensor = tensor_of_labels(&labels);
        let inputs = [Input::new("logits", &[rows, vocabulary], random.normals(rows * vocabulary, spread))];
        for precision in PRECISIONS {
            check_operator(
                precision, seed, LOSS, &inputs, &[&[]],
                |tape, inputs| Ok(vec![ops::cross_entropy(tape, &inputs[0], &label_tensor, counted as f32)?.loss]),
                |values| vec![vec![reference::cross_entropy(&values[0], &labels, vocabulary).iter().sum::<f64>() / counted]],
            ).map_err(|message| TestCaseError::fail(format!("{precision:?}: {message}")))?;
        }
        let logits = tensor(DType::F32, &[rows, vocabulary], &inputs[0].values);
        let expected = reference::cross_entropy(&widened(&logits).unwrap(), &labels, vocabulary);
        let result =
            ops::cross_entropy(&Tape::inference(), &Var::constant(&logits), &label_tensor, counted as f32).unwrap();
        close(f64::from(result.loss.item().unwrap()), expected.iter().sum::<f64>() / counted)?;
        for (got, expected) in widened(&result.per_token).unwrap().into_iter().zip(expected) {
            close(got, expected)?;
        }
    }

    #[test]
    fn divergence(
        rows in rows(),
        vocabulary in vocabularies(),
        which in 0..KINDS.len(),
        temperatures in prop_oneof![Just((1.0, 1.0)), Just((2.0, 2.0)), Just((1.0, 2.0)), Just((0.5, 4.0))],
        spread in prop_oneof![Just(1.0), Just(5.0)],
        masked: bool,
        seed: u64,
    ) {
        let mut random = Random::new(seed);
        let (kind, reference_kind) = KINDS[which];
        let mask: Vec<f64> = (0..rows).map(|_| if masked { random.below(3) as f64 / 2.0 } else { 1.0 }).collect();
        let mask_tensor = tensor(DType::F32, &[rows], &mask);
        let denominator = mask.iter().sum::<f64>().max(1.0);
        let shape = [rows, vocabulary];
        let teacher = random.normals(rows * vocabulary, spread);
        let inputs = [Input::new("student", &shape, random.normals(rows * vocabulary, spread))];
        for precision in PRECISIONS {
            let teacher = tensor(if precision == Precision::F32 { DType::F32 } else { DType::Bf16 }, &shape, &teacher);
            let teacher_values = widened(&teacher).unwrap();
            let options = DivergenceOptions {
                divergence: kind,
                student_temperature: temperatures.0 as f32,
                teacher_temperature: temperatures.1 as f32,
                mask: masked.then_some(&mask_tensor),
                denominator: denominator as f32,
            };
            let per_token = |student: &[f64]| reference::divergence(
                reference_kind, student, &teacher_values, vocabulary, temperatures.0, temperatures.1,
            );
            let total = |student: &[f64]| {
                per_token(student).iter().zip(&mask).map(|(value, mask)| value * mask).sum::<f64>() / denominator
            };
            check_operator(
                precision, seed, LOSS, &inputs, &[&[]],
                |tape, inputs| Ok(vec![ops::divergence(tape, &inputs[0], &teacher, options)?.loss]),
                |values| vec![vec![total(&values[0])]],
            ).map_err(|message| TestCaseError::fail(format!("{kind:?} in {precision:?}: {message}")))?;
            let student = tensor(teacher.dtype(), &shape, &inputs[0].values);
            let result = ops::divergence(&Tape::inference(), &Var::constant(&student), &teacher, options).unwrap();
            let student = widened(&student).unwrap();
            let loss = f64::from(result.loss.item().unwrap());
            let expected = total(&student);
            close(loss, expected)?;
            for ((got, expected), mask) in widened(&result.per_token).unwrap().into_iter().zip(per_token(&student)).zip(&mask) {
                close(got, if *mask == 0.0 { 0.0 } else { expected })?;
            }
        }
    }
}

fn tensor_of_labels(labels: &[Option<usize>]) -> autograd::Tensor {
    indices(&[labels.len()], &labels.iter().map(|label| label.unwrap_or(IGNORED_LABEL as usize)).collect::<Vec<_>>())
}

/// Every divergence of a distribution from itself is zero, but for the soft cross-entropy, which is its entropy.
#[test]
fn equal_distributions_do_not_diverge() {
    let logits = tensor(DType::F32, &[3, 50], &Random::new(7).normals(150, 3.0));
    let tape = Tape::new();
    let student = tape.leaf(&logits);
    for (divergence, kind) in KINDS {
        let options = DivergenceOptions {
            divergence,
            student_temperature: 1.5,
            teacher_temperature: 1.5,
            mask: None,
            denominator: 3.0,
        };
        let result = ops::divergence(&tape, &student, &logits, options).unwrap();
        let values = widened(&logits).unwrap();
        let expected = reference::divergence(kind, &values, &values, 50, 1.5, 1.5);
        verdict("per token", &[3], &widened(&result.per_token).unwrap(), &expected, Bounds::new(2e-6, 2e-6)).unwrap();
    }
}

/// A position that does not count may hold anything.
#[test]
fn a_masked_position_does_not_spoil_the_loss() {
    let mut values = Random::new(1).normals(20, 1.0);
    values[10..].fill(f64::NAN);
    let student = tensor(DType::F32, &[2, 10], &values);
    let teacher = tensor(DType::F32, &[2, 10], &Random::new(2).normals(20, 1.0));
    let mask = tensor(DType::F32, &[2], &[1.0, 0.0]);
    for (divergence, _) in KINDS {
        let options = DivergenceOptions {
            divergence,
            student_temperature: 1.0,
            teacher_temperature: 1.0,
            mask: Some(&mask),
            denominator: 1.0,
        };
        let tape = Tape::new();
        let leaf = tape.leaf(&student);
        let result = ops::divergence(&tape, &leaf, &teacher, options).unwrap();
        assert!(result.loss.item().unwrap().is_finite(), "{divergence:?}");
        assert_eq!(result.per_token.to_f32_vec().unwrap()[1], 0.0, "{divergence:?}");
        let gradients = tape.backward(&result.loss).unwrap();
        let gradient = gradients.get(&student).unwrap().to_f32_vec().unwrap();
        assert!(gradient[..10].iter().all(|value| value.is_finite()), "{divergence:?}");
        assert!(gradient[10..].iter().all(|value| *value == 0.0), "{divergence:?}: {:?}", &gradient[10..]);
    }
}

#[test]
fn arguments_that_make_no_sense_are_named() {
    let tape = Tape::inference();
    let logits = Var::constant(&tensor(DType::F32, &[2, 3], &[0.0; 6]));
    let outside = ops::cross_entropy(&tape, &logits, &indices(&[2], &[0, 3]), 1.0);
    if logits.device().is_cpu() {
        let message = outside.unwrap_err().to_string();
        assert!(message.contains("labels[1] is 3"), "{message}");
    } else {
        // Labels are not read on the host there.
        let outside = outside.unwrap();
        let per_token = outside.per_token.to_f32_vec().unwrap();
        assert!(outside.loss.item().unwrap().is_nan() && per_token[0].is_finite() && per_token[1].is_nan());
    }
    let message = ops::cross_entropy(&tape, &logits, &indices(&[2], &[0, 1]), 0.0).unwrap_err().to_string();
    assert!(message.contains("denominator is 0"), "{message}");
    let options = DivergenceOptions {
        divergence: Divergence::ReverseKl,
        student_temperature: 0.0,
        teacher_temperature: 1.0,
        mask: None,
        denominator: 1.0,
    };
    let message = ops::divergence(&tape, &logits, &logits, options).unwrap_err().to_string();
    assert!(message.contains("student_temperature is 0"), "{message}");
    let narrow = tensor(DType::F32, &[2, 2], &[0.0; 4]);
    let options = DivergenceOptions { student_temperature: 1.0, ..options };
    let message = ops::divergence(&tape, &logits, &narrow, options).unwrap_err().to_string();
    assert!(message.contains("teacher has shape [2, 2]"), "{message}");
}
