//! A teacher that is known by its likeliest tokens and the mass of the others, against f64 references over "the listed tokens
//! and another one".

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use autograd::ops::{self, Divergence, DivergenceOptions, HeadChunks, HeadTeacher, TeacherSource, TopLogProbabilities};
use autograd::{DType, Tape, Tensor, Var};
use grafter_tests::check::{Input, Precision, Tolerance, cases, check_operator, tensor, verdict, widened};
use grafter_tests::compare::Bounds;
use grafter_tests::random::Random;
use grafter_tests::reference::{self, Kind};
use proptest::prelude::*;

const KINDS: [(Divergence, Kind); 3] = [
    (Divergence::ReverseKl, Kind::ReverseKl),
    (Divergence::ForwardKl, Kind::ForwardKl),
    (Divergence::JensenShannon, Kind::JensenShannon),
];

fn rows() -> impl Strategy<Value = usize> {
    prop_oneof![1 => Just(0usize), 2 => Just(1usize), 5 => 2..9usize]
}

/// Around warps and blocks of 256 threads, in vectors of 8 and not.
fn vocabularies() -> impl Strategy<Value = usize> {
    prop_oneof![1 => Just(1usize), 4 => 2..40usize, 1 => 255..=257usize, 1 => Just(2056usize), 2 => (1..80usize).prop_map(|n| 8 * n)]
}

/// How many tokens are listed, in parts of the vocabulary: one of them, some, all.
fn shares() -> impl Strategy<Value = f64> {
    prop_oneof![1 => Just(0.0), 4 => 0.0..1.0, 1 => Just(1.0)]
}

fn count_of(share: f64, vocabulary: usize) -> usize {
    ((share * vocabulary as f64) as usize).clamp(1, vocabulary)
}

/// The listed tokens of every row by sorting, with their log-probabilities, and the tail's.
fn listed(logits: &[f64], vocabulary: usize, count: usize, temperature: f64) -> Vec<(Vec<usize>, Vec<f64>, f64)> {
    let of_row = |row: &[f64]| {
        let mut order: Vec<usize> = (0..vocabulary).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
        let log_p = reference::log_softmax(row, temperature);
        let rest: f64 = order[count..].iter().map(|&token| log_p[token].exp()).sum();
        let tokens = order[..count].to_vec();
        let log_probabilities = tokens.iter().map(|&token| log_p[token]).collect();
        (tokens, log_probabilities, rest.ln())
    };
    logits.chunks(vocabulary).map(of_row).collect()
}

/// The divergence of every row between the distributions over the listed tokens and "another one".
fn coarse(
    kind: Kind,
    student: &[f64],
    teacher: &[f64],
    vocabulary: usize,
    count: usize,
    temperatures: (f64, f64),
) -> Vec<f64> {
    let rows = student.chunks(vocabulary).zip(listed(teacher, vocabulary, count, temperatures.1));
    rows.map(|(row, (tokens, mut log_p, tail))| {
        let all = reference::log_softmax(row, temperatures.0);
        let mut log_q: Vec<f64> = tokens.iter().map(|&token| all[token]).collect();
        if count < vocabulary {
            let others = (0..vocabulary).filter(|token| !tokens.contains(token));
            log_q.push(others.map(|token| all[token].exp()).sum::<f64>().ln());
            log_p.push(tail);
        }
        reference::divergence(kind, &log_q, &log_p, log_q.len(), 1.0, 1.0)[0]
    })
    .collect()
}

fn on_device(teacher: &Tensor, count: usize, temperature: f64) -> TopLogProbabilities {
    TopLogProbabilities::of(teacher, count, temperature as f32).unwrap().to_device(teacher.device()).unwrap()
}

proptest! {
    #![proptest_config(cases(128))]

    #[test]
    fn the_likeliest_are_listed(
        rows in rows(), vocabulary in vocabularies(), share in shares(), temperature in prop_oneof![Just(1.0), Just(2.0)], seed: u64,
    ) {
        let count = count_of(share, vocabulary);
        let logits = tensor(DType::F32, &[rows, vocabulary], &Random::new(seed).normals(rows * vocabulary, 3.0));
        let got = TopLogProbabilities::of(&logits, count, temperature as f32).unwrap();
        let expected = listed(&widened(&logits).unwrap(), vocabulary, count, temperature);
        let tokens: Vec<u32> = expected.iter().flat_map(|(tokens, ..)| tokens.iter().map(|&token| token as u32)).collect();
        prop_assert_eq!(got.tokens.to_vec::<u32>().unwrap(), tokens);
        let log_p: Vec<f64> = expected.iter().flat_map(|(_, log_p, _)| log_p.clone()).collect();
        let check = |what, got: &Tensor, expected: &[f64]| {
            verdict(what, got.shape(), &widened(got).unwrap(), expected, Bounds::new(1e-6, 2e-6)).map_err(TestCaseError::fail)
        };
        check("log-probabilities", &got.log_probabilities, &log_p)?;
        let tails: Vec<f64> = expected.iter().map(|(.., tail)| *tail).collect();
        if count < vocabulary {
            check("tails", &got.tail, &tails)?;
        } else {
            prop_assert!(got.tail.to_vec::<f32>().unwrap().iter().all(|tail| *tail == f32::NEG_INFINITY));
        }
    }

    #[test]
    fn the_divergence_is_that_over_the_listed_tokens_and_another_one(
        rows in rows(), vocabulary in vocabularies(), share in shares(), which in 0..KINDS.len(),
        temperatures in prop_oneof![Just((1.0, 1.0)), Just((2.0, 2.0)), Just((1.0, 2.0))], seed: u64,
    ) {
        let mut random = Random::new(seed);
        let (divergence, kind) = KINDS[which];
        let (count, shape) = (count_of(share, vocabulary), [rows, vocabulary]);
        let teacher = tensor(DType::F32, &shape, &random.normals(rows * vocabulary, 2.0));
        let teacher_values = widened(&teacher).unwrap();
        let top = on_device(&teacher, count, temperatures.1);
        let options = DivergenceOptions {
            divergence, student_temperature: temperatures.0 as f32, teacher_temperature: 1.0, mask: None, denominator: 1.0,
        };
        let inputs = [Input::new("student", &shape, random.normals(rows * vocabulary, 2.0))];
        // The loss is a difference of log-probabilities, each good to some ulps of logits of this size.
        let tolerance = Tolerance {
            output: Bounds { relative_l2: Some(f64::INFINITY), relative_max: Some(f64::INFINITY) },
            ..Tolerance::relative(4e-6)
        };
        check_operator(
            Precision::F32, seed, tolerance, &inputs, &[&[]],
            |tape, inputs| {
                let teacher = top.logits_beside(inputs[0].tensor(), temperatures.0 as f32)?;
                Ok(vec![ops::divergence(tape, &inputs[0], &teacher, options)?.loss])
            },
            |values| vec![vec![coarse(kind, &values[0], &teacher_values, vocabulary, count, temperatures).iter().sum()]],
        ).map_err(|message| TestCaseError::fail(format!("{divergence:?}: {message}")))?;

        let student = tensor(DType::F32, &shape, &inputs[0].values);
        let beside = top.logits_beside(&student, temperatures.0 as f32).unwrap();
        let got = ops::divergence(&Tape::inference(), &Var::constant(&student), &beside, options).unwrap();
        let student = widened(&student).unwrap();
        let expected = coarse(kind, &student, &teacher_values, vocabulary, count, temperatures);
        let whole = reference::divergence(kind, &student, &teacher_values, vocabulary, temperatures.0, temperatures.1);
        for ((got, expected), whole) in widened(&got.per_token).unwrap().into_iter().zip(expected).zip(whole) {
            prop_assert!((got - expected).abs() <= 4e-6 * (1.0 + expected.abs()), "{got:e}, expected {expected:e}");
            // What is not told apart cannot add to a divergence.
            prop_assert!(expected <= whole + 1e-12, "{expected:e} of {whole:e}");
            prop_assert!(count < vocabulary || (expected - whole).abs() < 1e-9 * (1.0 + whole));
        }
    }

    #[test]
    fn logits_are_rounded_once_to_bf16(rows in rows(), vocabulary in vocabularies(), share in shares(), seed: u64) {
        let mut random = Random::new(seed);
        let (count, shape) = (count_of(share, vocabulary), [rows, vocabulary]);
        let [teacher, student] = [(); 2].map(|()| tensor(DType::Bf16, &shape, &random.normals(rows * vocabulary, 2.0)));
        let got = on_device(&teacher, count, 1.0).logits_beside(&student, 1.0).unwrap();
        prop_assert_eq!(got.dtype(), DType::Bf16);
        let students = widened(&student).unwrap();
        let mut expected = Vec::new();
        for (row, (tokens, log_p, tail)) in
            students.chunks(vocabulary).zip(listed(&widened(&teacher).unwrap(), vocabulary, count, 1.0))
        {
            let others: f64 = (0..vocabulary).filter(|token| !tokens.contains(token)).map(|token| row[token].exp()).sum();
            expected.extend((0..vocabulary).map(|token| match tokens.iter().position(|&listed| listed == token) {
                Some(index) => log_p[index],
                None => tail + row[token] - others.ln(),
            }));
        }
        let bounds = Bounds::new(4e-3, 4e-3);
        verdict("logits", &shape, &widened(&got).unwrap(), &expected, bounds).map_err(TestCaseError::fail)?;
    }

    #[test]
    fn of_a_head_is_of_its_logits(rows in rows(), vocabulary in 1..70usize, share in shares(), bf16: bool, seed: u64) {
        const WIDTH: usize = 16;
        let mut random = Random::new(seed);
        let dtype = if bf16 { DType::Bf16 } else { DType::F32 };
        let hidden = tensor(dtype, &[rows, WIDTH], &random.normals(rows * WIDTH, 1.0));
        let head = tensor(DType::F32, &[vocabulary, WIDTH], &random.normals(vocabulary * WIDTH, 0.5));
        let count = count_of(share, vocabulary);
        let got = TopLogProbabilities::of_head(&hidden, &head, count, 2.0).unwrap();
        let tape = Tape::inference();
        let logits = ops::linear(&tape, &Var::constant(&hidden), &Var::constant(&head), None).unwrap();
        let expected = TopLogProbabilities::of(logits.tensor(), count, 2.0).unwrap();
        prop_assert_eq!(got.tokens.to_vec::<u32>().unwrap(), expected.tokens.to_vec::<u32>().unwrap());
        let bits = |tensor: &Tensor| tensor.to_vec::<f32>().unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>();
        prop_assert_eq!(bits(&got.log_probabilities), bits(&expected.log_probabilities));
        prop_assert_eq!(bits(&got.tail), bits(&expected.tail));
    }

    #[test]
    fn a_head_in_chunks_gives_the_same(
        rows in 1..20usize, vocabulary in 2..70usize, share in shares(), logits in 1..9usize, groups in 1..4usize, bf16: bool, seed: u64,
    ) {
        const WIDTH: usize = 16;
        let mut random = Random::new(seed);
        let count = count_of(share, vocabulary);
        let dtype = if bf16 { DType::Bf16 } else { DType::F32 };
        let hidden = tensor(dtype, &[rows, WIDTH], &random.normals(rows * WIDTH, 1.0));
        let head = tensor(dtype, &[vocabulary, WIDTH], &random.normals(vocabulary * WIDTH, 0.5));
        let teacher = tensor(DType::F32, &[rows, vocabulary], &random.normals(rows * vocabulary, 2.0));
        let top = on_device(&teacher, count, 1.0);
        let mask: Vec<f64> = (0..rows).map(|_| random.below(2) as f64).collect();
        let mask = tensor(DType::F32, &[rows], &mask);
        let options = DivergenceOptions {
            divergence: Divergence::ReverseKl, student_temperature: 1.0, teacher_temperature: 1.0, mask: Some(&mask), denominator: 3.0,
        };
        let run = |chunks: Option<HeadChunks>| {
            let tape = Tape::new();
            let (hidden_leaf, head_leaf) = (tape.leaf(&hidden), tape.leaf(&head));
            let loss = match chunks {
                Some(chunks) => {
                    let teacher = HeadTeacher { source: TeacherSource::Top(&top), options, weight: 1.0 };
                    ops::head_loss_in_chunks(&tape, &hidden_leaf, &head_leaf, Some(teacher), None, chunks).unwrap().loss
                }
                None => {
                    let logits = ops::linear(&tape, &hidden_leaf, &head_leaf, None).unwrap();
                    let beside = top.logits_beside(logits.tensor(), 1.0).unwrap();
                    ops::divergence(&tape, &logits, &beside, options).unwrap().loss
                }
            };
            let value = f64::from(loss.tensor().item().unwrap());
            drop((hidden_leaf, head_leaf));
            let gradients = tape.backward(&loss).unwrap();
            (value, [&hidden, &head].map(|leaf| widened(gradients.get(leaf).unwrap()).unwrap()))
        };
        let (expected, expected_gradients) = run(None);
        let (got, gradients) = run(Some(HeadChunks { logits, gradients: logits * groups }));
        prop_assert!((got - expected).abs() <= 4e-6 * (1.0 + expected.abs()), "{got:e}, expected {expected:e}");
        let bounds = if bf16 { Bounds::new(8e-3, 12e-3) } else { Bounds::new(4e-6, 8e-6) };
        for (index, (got, expected)) in gradients.iter().zip(&expected_gradients).enumerate() {
            if expected.iter().any(|value| value.abs() > 1e-6) {
                verdict(["hidden", "head"][index], &[got.len()], got, expected, bounds).map_err(TestCaseError::fail)?;
            }
        }
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    let logits = tensor(DType::F32, &[2, 5], &[0.0; 10]);
    for count in [0, 6] {
        let message = TopLogProbabilities::of(&logits, count, 1.0).unwrap_err().to_string();
        assert!(message.contains("from 1 to the vocabulary's 5"), "{message}");
    }
    let top = on_device(&logits, 2, 1.0);
    // Equal ones: the lower ids.
    assert_eq!(top.tokens.to_vec::<u32>().unwrap(), [0, 1, 0, 1]);
    let message = top.logits_beside(&tensor(DType::F32, &[3, 5], &[0.0; 15]), 1.0).unwrap_err().to_string();
    assert!(message.contains("tokens"), "{message}");
    let (hidden, head) = (tensor(DType::F32, &[2, 4], &[0.5; 8]), tensor(DType::F32, &[5, 4], &[0.5; 20]));
    let refuse = |divergence, teacher_temperature| {
        let options = DivergenceOptions {
            divergence,
            student_temperature: 1.0,
            teacher_temperature,
            mask: None,
            denominator: 1.0,
        };
        let teacher = HeadTeacher { source: TeacherSource::Top(&top), options, weight: 1.0 };
        let (hidden, head) = (Var::constant(&hidden), Var::constant(&head));
        ops::head_loss(&Tape::inference(), &hidden, &head, Some(teacher), None).unwrap_err().to_string()
    };
    assert!(refuse(Divergence::ReverseKl, 2.0).contains("give 1"));
    assert!(refuse(Divergence::SoftCrossEntropy, 1.0).contains("forward KL"));
}
