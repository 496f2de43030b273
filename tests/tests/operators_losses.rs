//! Cross-entropy, divergences and the choice of tokens against their f64 references.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use autograd::ops::{
    self, Divergence, DivergenceOptions, HeadChunks, HeadLabels, HeadTeacher, IGNORED_LABEL, NO_TOKEN, SamplingOptions,
    TeacherSource,
};
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
        1 => Just(2056usize), 2 => (1..80usize).prop_map(|vectors| 8 * vectors)
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

/// Rows that GPUs keep in shared memory alone, in registers too, and that exceed both; in bf16, whose losses and gradients one
/// kernel computes. More rows than blocks, some of which do not count.
#[test]
fn long_rows_of_bf16() {
    // (rows, vocabulary): with 2 KiB to a round of 256 threads, 8 rounds are held in registers and 14 in shared memory.
    for (rows, vocabulary) in
        [(531, 8), (3, 16_376), (3, 16_384), (2, 28_680), (3, 45_064), (2, 53_248), (2, 65_544), (2, 131_072)]
    {
        let mut random = Random::new(vocabulary as u64);
        let student = tensor(DType::Bf16, &[rows, vocabulary], &random.normals(rows * vocabulary, 2.0));
        let teacher = tensor(DType::Bf16, &[rows, vocabulary], &random.normals(rows * vocabulary, 2.0));
        let mask: Vec<f64> = (0..rows).map(|row| if row % 3 == 1 { 0.0 } else { 0.5 }).collect();
        let labels: Vec<Option<usize>> =
            (0..rows).map(|row| (row % 3 != 0 || rows == 2).then(|| random.below(vocabulary))).collect();
        let [s, t] = [&student, &teacher].map(|logits| widened(logits).unwrap());
        let log_softmax = |row: &[f64]| {
            let greatest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = row.iter().map(|logit| (logit - greatest).exp()).sum();
            row.iter().map(|logit| logit - greatest - sum.ln()).collect::<Vec<f64>>()
        };

        let mask_tensor = tensor(DType::F32, &[rows], &mask);
        let options = DivergenceOptions {
            divergence: Divergence::ReverseKl,
            student_temperature: 1.0,
            teacher_temperature: 1.0,
            mask: Some(&mask_tensor),
            denominator: 4.0,
        };
        let tape = Tape::new();
        let result = ops::divergence(&tape, &tape.leaf(&student), &teacher, options).unwrap();
        let per_token = reference::divergence(Kind::ReverseKl, &s, &t, vocabulary, 1.0, 1.0);
        for (row, got) in widened(&result.per_token).unwrap().into_iter().enumerate() {
            close(got, if mask[row] == 0.0 { 0.0 } else { per_token[row] }).unwrap();
        }
        let expected: Vec<f64> = (0..rows)
            .flat_map(|row| {
                let range = row * vocabulary..(row + 1) * vocabulary;
                let (a, b) = (log_softmax(&s[range.clone()]), log_softmax(&t[range]));
                let weight = mask[row] / 4.0;
                let mean = per_token[row];
                a.into_iter().zip(b).map(move |(a, b)| weight * a.exp() * (a - b - mean))
            })
            .collect();
        let gradient = tape.backward(&result.loss).unwrap().take(&student).unwrap();
        let shape = [rows, vocabulary];
        // One rounding to bf16: at most 2^-8 of each value.
        verdict("divergence", &shape, &widened(&gradient).unwrap(), &expected, Bounds::new(4e-3, 4e-3)).unwrap();

        let tape = Tape::new();
        let result = ops::cross_entropy(&tape, &tape.leaf(&student), &tensor_of_labels(&labels), 4.0).unwrap();
        let expected = reference::cross_entropy(&s, &labels, vocabulary);
        for (got, expected) in widened(&result.per_token).unwrap().into_iter().zip(expected) {
            close(got, expected).unwrap();
        }
        let expected: Vec<f64> = (0..rows)
            .flat_map(|row| {
                let label = labels[row];
                let log_q = log_softmax(&s[row * vocabulary..(row + 1) * vocabulary]);
                log_q.into_iter().enumerate().map(move |(token, log_q)| match label {
                    None => 0.0,
                    Some(label) => (log_q.exp() - if token == label { 1.0 } else { 0.0 }) / 4.0,
                })
            })
            .collect();
        let gradient = tape.backward(&result.loss).unwrap().take(&student).unwrap();
        verdict("cross-entropy", &shape, &widened(&gradient).unwrap(), &expected, Bounds::new(4e-3, 4e-3)).unwrap();
    }
}

/// A head, its teacher and its labels.
struct HeadCase {
    rows: usize,
    vocabulary: usize,
    /// [hidden, head, the teacher's hidden, the teacher's head].
    values: [Vec<f64>; 4],
    width: usize,
    divergence: Option<(Divergence, Kind)>,
    temperatures: (f64, f64),
    mask: Option<Vec<f64>>,
    labels: Option<Vec<Option<usize>>>,
    weights: (f64, f64),
}

impl HeadCase {
    const DENOMINATORS: (f64, f64) = (3.0, 5.0);

    fn shapes(&self) -> [[usize; 2]; 4] {
        let (hidden, head) = ([self.rows, self.width], [self.vocabulary, self.width]);
        [hidden, head, hidden, head]
    }

    /// The sum of the losses by `head_loss` in chunks, or (`None`) by the operators that it replaces.
    fn loss(&self, tape: &Tape<'_>, hidden: &Var, head: &Var, chunks: Option<HeadChunks>) -> autograd::Result<Var> {
        let dtype = hidden.dtype();
        let shapes = self.shapes();
        let [teacher_hidden, teacher_head] = [2, 3].map(|index| tensor(dtype, &shapes[index], &self.values[index]));
        let mask = self.mask.as_ref().map(|mask| tensor(DType::F32, &[self.rows], mask));
        let labels = self.labels.as_ref().map(|labels| tensor_of_labels(labels));
        let options = self.divergence.map(|(divergence, _)| DivergenceOptions {
            divergence,
            student_temperature: self.temperatures.0 as f32,
            teacher_temperature: self.temperatures.1 as f32,
            mask: mask.as_ref(),
            denominator: Self::DENOMINATORS.0 as f32,
        });
        let (weights, denominator) = ((self.weights.0 as f32, self.weights.1 as f32), Self::DENOMINATORS.1 as f32);
        if let Some(chunks) = chunks {
            let teacher = options.map(|options| HeadTeacher {
                source: TeacherSource::Head { hidden: &teacher_hidden, head: &teacher_head },
                options,
                weight: weights.0,
            });
            let labels = labels.as_ref().map(|labels| HeadLabels { labels, denominator, weight: weights.1 });
            return Ok(ops::head_loss_in_chunks(tape, hidden, head, teacher, labels, chunks)?.loss);
        }
        let logits = ops::linear(tape, hidden, head, None)?;
        let mut terms = Vec::new();
        if let Some(options) = options {
            let inference = Tape::inference();
            let (hidden, head) = (Var::constant(&teacher_hidden), Var::constant(&teacher_head));
            let teacher = ops::linear(&inference, &hidden, &head, None)?;
            let loss = ops::divergence(tape, &logits, &teacher, options)?.loss;
            terms.push(ops::scale(tape, &loss, weights.0)?);
        }
        if let Some(labels) = &labels {
            let loss = ops::cross_entropy(tape, &logits, labels, denominator)?.loss;
            terms.push(ops::scale(tape, &loss, weights.1)?);
        }
        let first = terms.remove(0);
        terms.iter().try_fold(first, |sum, term| ops::add(tape, &sum, term))
    }

    fn reference(&self, hidden: &[f64], head: &[f64]) -> f64 {
        let logits = |hidden: &[f64], head: &[f64]| -> Vec<f64> {
            hidden
                .chunks(self.width)
                .flat_map(|row| head.chunks(self.width).map(|weight| row.iter().zip(weight).map(|(a, b)| a * b).sum()))
                .collect()
        };
        let student = logits(hidden, head);
        let mut total = 0.0;
        if let Some((_, kind)) = self.divergence {
            let [hidden, head] = [2, 3]
                .map(|index| widened(&tensor(DType::F32, &[self.values[index].len()], &self.values[index])).unwrap());
            let teacher = logits(&hidden, &head);
            let (student_temperature, teacher_temperature) = self.temperatures;
            let losses = reference::divergence(
                kind,
                &student,
                &teacher,
                self.vocabulary,
                student_temperature,
                teacher_temperature,
            );
            let weight = |row: usize| self.mask.as_ref().map_or(1.0, |mask| mask[row]);
            let sum: f64 = losses.iter().enumerate().map(|(row, loss)| weight(row) * loss).sum();
            total += self.weights.0 * sum / Self::DENOMINATORS.0;
        }
        if let Some(labels) = &self.labels {
            let losses = reference::cross_entropy(&student, labels, self.vocabulary);
            total += self.weights.1 * losses.iter().sum::<f64>() / Self::DENOMINATORS.1;
        }
        total
    }

    /// Loss and gradients of hidden states and head (none where it is frozen) in bf16.
    fn run(&self, chunks: Option<HeadChunks>, frozen: bool) -> (f32, Vec<f32>, Option<Vec<f32>>) {
        let shapes = self.shapes();
        let [hidden, head] = [0, 1].map(|index| tensor(DType::Bf16, &shapes[index], &self.values[index]));
        let tape = Tape::new();
        let head_var = if frozen { Var::constant(&head) } else { tape.leaf(&head) };
        let loss = self.loss(&tape, &tape.leaf(&hidden), &head_var, chunks).unwrap();
        let value = loss.item().unwrap();
        // A gradient other than 1 comes in.
        let loss = ops::scale(&tape, &loss, 0.5).unwrap();
        let mut gradients = tape.backward(&loss).unwrap();
        let mut take = |leaf| gradients.take(leaf).map(|gradient| gradient.to_f32_vec().unwrap());
        (value, take(&hidden).unwrap(), take(&head))
    }

    /// That chunks change nothing but roundings: a logit may round to its neighbour in bf16, 2^-8 of numbers of up to 4, which
    /// its probability, and what is formed from differences of logarithms, then is off by.
    fn check_chunks(&self, chunks: HeadChunks, frozen: bool) -> Result<(), TestCaseError> {
        let (loss, hidden, head) = self.run(Some(chunks), frozen);
        let (expected_loss, expected_hidden, expected_head) = self.run(None, frozen);
        prop_assert!(
            (loss - expected_loss).abs() <= 2e-2 * (1.0 + expected_loss.abs()),
            "{loss}, expected {expected_loss}"
        );
        let shapes = self.shapes();
        let wide = |values: &[f32]| values.iter().copied().map(f64::from).collect::<Vec<f64>>();
        let mut pairs = vec![("hidden", shapes[0], &hidden, &expected_hidden)];
        prop_assert_eq!(head.is_none(), frozen);
        if let (Some(head), Some(expected)) = (&head, &expected_head) {
            pairs.push(("head", shapes[1], head, expected));
        }
        for (name, shape, got, expected) in pairs {
            verdict(name, &shape, &wide(got), &wide(expected), Bounds::new(3e-2, 3e-2)).map_err(TestCaseError::fail)?;
        }
        let again = self.run(Some(chunks), frozen);
        prop_assert!(again == (loss, hidden, head), "two runs differ");
        Ok(())
    }
}

proptest! {
    #![proptest_config(cases(192))]

    #[test]
    fn head_and_losses_in_chunks(
        rows in 0..9usize,
        width in prop_oneof![Just(8usize), 1..20usize],
        vocabulary in prop_oneof![3 => (1..12usize).prop_map(|vectors| 8 * vectors), 2 => 1..40usize],
        which in prop_oneof![4 => Just(0usize), 2 => 1..KINDS.len(), 1 => Just(KINDS.len())],
        temperatures in prop_oneof![2 => Just((1.0, 1.0)), 1 => Just((2.0, 2.0)), 1 => Just((1.0, 2.0))],
        masked: bool,
        labelled: bool,
        weights in prop_oneof![Just((1.0, 1.0)), Just((0.75, 2.0))],
        chunks in (1..6usize, 1..9usize),
        frozen: bool,
        seed: u64,
    ) {
        let mut random = Random::new(seed);
        let divergence = KINDS.get(which).copied();
        let spread = 1.0 / (width as f64).sqrt();
        let case = HeadCase {
            rows,
            vocabulary,
            values: [
                random.normals(rows * width, 1.5),
                random.normals(vocabulary * width, spread),
                random.normals(rows * width, 1.5),
                random.normals(vocabulary * width, spread),
            ],
            width,
            divergence,
            temperatures,
            mask: masked.then(|| (0..rows).map(|_| random.below(3) as f64 / 2.0).collect()),
            labels: (labelled || divergence.is_none())
                .then(|| (0..rows).map(|_| (random.below(4) > 0).then(|| random.below(vocabulary))).collect()),
            weights,
        };
        let chunks = HeadChunks { logits: chunks.0, gradients: chunks.1 };
        let shapes = case.shapes();
        let inputs = [
            Input::new("hidden", &shapes[0], case.values[0].clone()),
            Input::new("head", &shapes[1], case.values[1].clone()),
        ];
        check_operator(
            Precision::F32, seed, LOSS, &inputs, &[&[]],
            |tape, inputs| Ok(vec![case.loss(tape, &inputs[0], &inputs[1], Some(chunks))?]),
            |values| vec![vec![case.reference(&values[0], &values[1])]],
        ).map_err(TestCaseError::fail)?;
        if vocabulary > 1 {
            case.check_chunks(chunks, frozen)?;
        }
    }
}

/// Divergence and cross-entropy in one kernel, of rows that GPUs keep in each of the three ways, positions that count for one of
/// them alone, and none.
#[test]
fn head_and_losses_of_a_real_vocabulary() {
    // The last one's head has a gradient of several large tiles.
    for (vocabulary, width) in [(16_384, 8), (53_248, 8), (65_544, 8), (264, 136)] {
        let rows = 5;
        let mut random = Random::new(11);
        let mut values = |count: usize, spread: f64| random.normals(count, spread);
        let case = HeadCase {
            rows,
            vocabulary,
            values: [
                values(rows * width, 1.5),
                values(vocabulary * width, 1.4 / (width as f64).sqrt()),
                values(rows * width, 1.5),
                values(vocabulary * width, 1.4 / (width as f64).sqrt()),
            ],
            width,
            divergence: Some(KINDS[0]),
            temperatures: (1.0, 1.5),
            mask: Some(vec![1.0, 0.0, 0.0, 0.5, 1.0]),
            labels: Some(vec![Some(7), None, Some(vocabulary - 1), None, Some(vocabulary / 2)]),
            weights: (1.0, 0.5),
        };
        case.check_chunks(HeadChunks { logits: 2, gradients: 4 }, false).unwrap();
    }
}

/// A weight that is embedding and head has the sum of both gradients.
#[test]
fn a_tied_head_sums_its_gradients() {
    let (rows, width, vocabulary) = (6, 8, 24);
    let mut random = Random::new(3);
    let weight = tensor(DType::F32, &[vocabulary, width], &random.normals(vocabulary * width, 0.5));
    let tokens: Vec<usize> = (0..rows).map(|_| random.below(vocabulary)).collect();
    let labels = indices(&[rows], &(0..rows).map(|_| random.below(vocabulary)).collect::<Vec<_>>());
    let gradient = |chunked: bool| {
        let tape = Tape::new();
        let leaf = tape.leaf(&weight);
        let hidden = ops::embedding(&tape, &indices(&[rows], &tokens), &leaf, DType::F32).unwrap();
        let loss = if chunked {
            let labels = HeadLabels { labels: &labels, denominator: 6.0, weight: 1.0 };
            let chunks = HeadChunks { logits: 2, gradients: 4 };
            ops::head_loss_in_chunks(&tape, &hidden, &leaf, None, Some(labels), chunks).unwrap().loss
        } else {
            let logits = ops::linear(&tape, &hidden, &leaf, None).unwrap();
            ops::cross_entropy(&tape, &logits, &labels, 6.0).unwrap().loss
        };
        widened(tape.backward(&loss).unwrap().get(&weight).unwrap()).unwrap()
    };
    verdict("weight", &[vocabulary, width], &gradient(true), &gradient(false), Bounds::new(2e-6, 4e-6)).unwrap();
}

/// Logits with many ties where `coarse`.
fn logits(count: usize, spread: f64, coarse: bool, random: &mut Random) -> Vec<f64> {
    let values = random.normals(count, spread);
    if coarse { values.into_iter().map(f64::round).collect() } else { values }
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn argmax_is_the_first_of_the_greatest(
        rows in rows(), vocabulary in vocabularies(), coarse: bool, nan in 0..4usize, seed: u64,
    ) {
        let mut random = Random::new(seed);
        let mut values = logits(rows * vocabulary, 3.0, coarse, &mut random);
        if nan == 0 && rows > 0 {
            values[random.below(rows * vocabulary)] = f64::NAN;
        }
        for dtype in [DType::F32, DType::Bf16] {
            let logits = tensor(dtype, &[rows, vocabulary], &values);
            let expected: Vec<u32> = widened(&logits).unwrap().chunks(vocabulary).map(|row| {
                let greatest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let first = row.iter().position(|logit| *logit == greatest);
                if row.iter().any(|logit| logit.is_nan()) { NO_TOKEN } else { first.unwrap() as u32 }
            }).collect();
            prop_assert_eq!(ops::argmax(&logits).unwrap().to_vec::<u32>().unwrap(), expected, "{:?}", dtype);
        }
    }
}

proptest! {
    #![proptest_config(cases(128))]

    #[test]
    fn samples_are_where_the_running_sum_exceeds_the_number(
        rows in 0..4usize,
        vocabulary in prop_oneof![1 => Just(1usize), 4 => 2..40usize, 1 => 511..=513usize, 1 => Just(1032usize)],
        coarse: bool,
        temperature in prop_oneof![Just(1.0f32), Just(0.7), Just(3.0)],
        top_k in prop_oneof![2 => Just(None), 1 => Just(Some(1usize)), 2 => (2..60usize).prop_map(Some)],
        top_p in prop_oneof![2 => Just(1.0f32), 1 => Just(1e-6), 3 => 0.05..0.99f32],
        seed: u64,
    ) {
        let mut random = Random::new(seed);
        let values = logits(rows * vocabulary, 2.0, coarse, &mut random);
        let uniforms: Vec<f64> = (0..rows).map(|_| random.below(1 << 24) as f64 / f64::from(1 << 24)).collect();
        let options = SamplingOptions { temperature, top_k, top_p };
        for dtype in [DType::F32, DType::Bf16] {
            let logits = tensor(dtype, &[rows, vocabulary], &values);
            let tokens = ops::sample(&logits, &tensor(DType::F32, &[rows], &uniforms), options).unwrap();
            for ((row, uniform), token) in
                widened(&logits).unwrap().chunks(vocabulary).zip(&uniforms).zip(tokens.to_vec::<u32>().unwrap())
            {
                let allowed = allowed_samples(row, *uniform, options);
                prop_assert!(allowed.contains(&(token as usize)), "{dtype:?}: {token} is none of {allowed:?}");
            }
        }
    }
}

/// The tokens that may be chosen: one, or the neighbours at a boundary that the number is within f32's precision of.
fn allowed_samples(row: &[f64], uniform: f64, options: SamplingOptions) -> Vec<usize> {
    const NEAR: f64 = 4e-6;
    let mut order: Vec<usize> = (0..row.len()).collect();
    order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
    order.truncate(options.top_k.unwrap_or(usize::MAX));
    let weight = |token: &usize| ((row[*token] - row[order[0]]) / f64::from(options.temperature)).exp();
    let sums: Vec<f64> = order
        .iter()
        .scan(0.0, |sum, token| {
            *sum += weight(token);
            Some(*sum)
        })
        .collect();
    let before = |place: usize| if place == 0 { 0.0 } else { sums[place - 1] };
    let total = sums[sums.len() - 1];
    let needed = f64::from(options.top_p) * total;
    let mut allowed = Vec::new();
    for kept in 1..=order.len() {
        if (kept > 1 && before(kept - 1) >= needed + NEAR * total)
            || (kept < order.len() && sums[kept - 1] < needed - NEAR * total)
        {
            continue;
        }
        let target = uniform * sums[kept - 1];
        let is_there = |place: &usize| before(*place) <= target + NEAR * total && sums[*place] > target - NEAR * total;
        allowed.extend((0..kept).filter(is_there).map(|place| order[place]));
    }
    allowed
}

/// The whole of a real vocabulary, in both types.
#[test]
fn long_rows_are_sampled() {
    let vocabulary = 49152;
    let values = Random::new(5).normals(2 * vocabulary, 2.5);
    for dtype in [DType::F32, DType::Bf16] {
        let logits = tensor(dtype, &[2, vocabulary], &values);
        let options = SamplingOptions { temperature: 0.8, top_k: Some(5000), top_p: 0.9 };
        let uniforms = [0.37, 0.92];
        let tokens = ops::sample(&logits, &tensor(DType::F32, &[2], &uniforms), options).unwrap();
        let rows = widened(&logits).unwrap();
        for ((row, uniform), token) in rows.chunks(vocabulary).zip(uniforms).zip(tokens.to_vec::<u32>().unwrap()) {
            let allowed = allowed_samples(row, f64::from(uniform as f32), options);
            assert!(allowed.contains(&(token as usize)), "{dtype:?}: {token} is none of {allowed:?}");
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
fn scalars_are_stacked_in_order() {
    let device = grafter_tests::device();
    let scalars =
        [tensor(DType::F32, &[], &[1.5]), tensor(DType::Bf16, &[1], &[-2.0]), tensor(DType::F32, &[1, 1], &[3.0])];
    let vector = ops::stack(&device, &scalars.each_ref()).unwrap();
    assert_eq!((vector.shape(), vector.to_vec::<f32>().unwrap()), (&[3][..], vec![1.5, -2.0, 3.0]));
    assert_eq!(ops::stack(&device, &[]).unwrap().shape(), [0]);
    let pair = tensor(DType::F32, &[2], &[1.0, 2.0]);
    assert!(ops::stack(&device, &[&pair]).unwrap_err().to_string().contains("[2]"));
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
