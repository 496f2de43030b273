//! Causal convolution and selective scan against their f64 references: whole, packed, resumed, and step by step.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::num::NonZeroUsize;

use autograd::ops::{self, Activation, ConvolutionOptions, ScanInputs, ScanStepInputs, ScanWay};
use autograd::{DType, Tape, Tensor, Var};
use grafter_tests::check::{
    Input, Precision, Tolerance, agree, cases, check_operator, indices, tensor, verdict, widened,
};
use grafter_tests::compare::Bounds;
use grafter_tests::random::Random;
use grafter_tests::reference::{self, Convolution, Scan, silu};
use proptest::prelude::*;

const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Bf16];

/// A few products per output; weight gradients sum over up to 260 steps.
const CONVOLUTION: Tolerance = Tolerance::relative(2e-6);
/// A recurrence over up to 130 steps whose factors are exponentials.
const SCAN: Tolerance = Tolerance::relative(4e-6);

/// Nothing, one, odd, and around the chunks of 64 steps in which the operators work.
fn times() -> impl Strategy<Value = usize> {
    prop_oneof![
        1 => Just(0usize), 2 => Just(1usize), 6 => 2..20usize, 1 => 31..=33usize, 2 => 63..=65usize, 1 => 127..=129usize
    ]
}

/// Channels around the lanes of the scan's blocks.
fn channels() -> impl Strategy<Value = usize> {
    prop_oneof![2 => 1..4usize, 2 => Just(6usize), 1 => 15..=17usize, 1 => Just(24usize), 1 => 31..=33usize]
}

#[derive(Clone, Debug)]
struct ConvolutionCase {
    sizes: Convolution,
    bias: bool,
    initial: bool,
    seed: u64,
}

fn convolutions() -> impl Strategy<Value = ConvolutionCase> {
    // Around the steps of a block, forward and backward, as well.
    let times = prop_oneof![10 => times(), 1 => 127..=130usize, 1 => 511..=514usize];
    // A warp of the convolution takes 128 channels.
    let channels = prop_oneof![6 => channels(), 1 => Just(128usize), 1 => Just(136usize)];
    (0..3usize, times, channels, 1..6usize, any::<[bool; 4]>(), any::<u64>()).prop_map(
        |(batch, time, channels, width, [silu, bias, documents, initial], seed)| {
            let mut random = Random::new(seed);
            let starts = || (0..batch).flat_map(|_| random.document_starts(time)).collect();
            let document_start = documents.then(starts);
            let sizes = Convolution { batch, time, channels, width, silu, document_start };
            // An initial state belongs to one document per row.
            ConvolutionCase { sizes, bias, initial: initial && !documents, seed }
        },
    )
}

impl ConvolutionCase {
    fn inputs(&self) -> Vec<Input> {
        let Convolution { batch, time, channels, width, .. } = self.sizes;
        let mut random = Random::new(self.seed);
        let mut inputs = vec![
            Input::normal("input", &[batch, time, channels], &mut random),
            Input::normal("weight", &[channels, width], &mut random),
        ];
        if self.bias {
            inputs.push(Input::normal("bias", &[channels], &mut random));
        }
        if self.initial {
            inputs.push(Input::normal("initial state", &[batch, width - 1, channels], &mut random));
        }
        inputs
    }

    fn activation(&self) -> Activation {
        if self.sizes.silu { Activation::Silu } else { Activation::Identity }
    }

    fn starts(&self) -> Option<Tensor> {
        let starts = self.sizes.document_start.as_ref()?;
        Some(indices(&[self.sizes.batch, self.sizes.time], starts))
    }

    fn operator(&self, tape: &Tape<'_>, inputs: &[Var], starts: Option<&Tensor>) -> autograd::Result<Var> {
        let options = ConvolutionOptions {
            activation: self.activation(),
            document_start: starts,
            initial_state: self.initial.then(|| &inputs[inputs.len() - 1]),
        };
        ops::causal_conv1d(tape, &inputs[0], &inputs[1], self.bias.then(|| &inputs[2]), options)
    }

    fn reference(&self, values: &[Vec<f64>]) -> Vec<f64> {
        let bias = self.bias.then(|| &values[2][..]);
        let initial = self.initial.then(|| &values[values.len() - 1][..]);
        reference::causal_conv1d(&self.sizes, &values[0], &values[1], bias, initial)
    }
}

#[derive(Clone, Debug)]
struct ScanCase {
    batch: usize,
    time: usize,
    channels: usize,
    states: usize,
    b_groups: usize,
    c_groups: usize,
    d: bool,
    gate: bool,
    delta_bias: bool,
    softplus: bool,
    initial: bool,
    document_start: Option<Vec<usize>>,
    /// Some step sizes are huge and some tiny.
    extreme: bool,
    seed: u64,
}

/// How many groups `channels` can be divided into.
fn divisors(channels: usize) -> Vec<usize> {
    (1..=channels).filter(|groups| channels.is_multiple_of(*groups)).collect()
}

fn scans() -> impl Strategy<Value = ScanCase> {
    // Few different ones: on GPUs each is a kernel of its own, which is compiled first.
    let states = prop_oneof![
        1 => Just(1usize), 3 => Just(3), 1 => Just(8), 5 => Just(16), 1 => prop_oneof![Just(33usize), Just(64)]
    ];
    let options = prop_oneof![3 => Just([true; 4]), 1 => any::<[bool; 4]>()];
    (0..3usize, times(), channels(), states, options, any::<[bool; 3]>(), any::<u64>()).prop_map(
        |(batch, time, channels, states, options, [initial, documents, extreme], seed)| {
            let [d, gate, delta_bias, softplus] = options;
            let mut random = Random::new(seed);
            // The finite differences run the reference a hundred times: long sequences have few channels and states.
            let (batch, channels, states) = if time * channels * states > 4000 {
                (batch.min(1), channels.min(17), states.min(3))
            } else {
                (batch, channels, states)
            };
            let groups = divisors(channels);
            let (b_groups, c_groups) = (groups[random.below(groups.len())], groups[random.below(groups.len())]);
            let starts = (0..batch).flat_map(|_| random.document_starts(time)).collect();
            ScanCase {
                batch,
                time,
                channels,
                states,
                b_groups,
                c_groups,
                d,
                gate,
                delta_bias,
                softplus,
                initial: initial && !documents,
                document_start: documents.then_some(starts),
                extreme: extreme && softplus,
                seed,
            }
        },
    )
}

impl ScanCase {
    fn inputs(&self) -> Vec<Input> {
        let Self { batch, time, channels, states, b_groups, c_groups, .. } = *self;
        let mut random = Random::new(self.seed);
        let tokens = [batch, time, channels];
        let count = batch * time * channels;
        let delta = match (self.softplus, self.extreme) {
            (true, false) => random.normals(count, 1.0),
            (true, true) => random.uniforms(count, -25.0, 25.0),
            (false, _) => random.uniforms(count, 0.05, 0.8),
        };
        let mut inputs = vec![
            Input::normal("input", &tokens, &mut random),
            Input::new("delta", &tokens, delta),
            Input::f32("a", &[channels, states], random.uniforms(channels * states, -2.0, -0.05)),
            Input::normal("b", &[batch, time, b_groups, states], &mut random),
            Input::normal("c", &[batch, time, c_groups, states], &mut random),
        ];
        if self.d {
            inputs.push(Input::f32("d", &[channels], random.normals(channels, 1.0)));
        }
        if self.gate {
            inputs.push(Input::normal("gate", &tokens, &mut random));
        }
        if self.delta_bias {
            // Without softplus the sum must stay a positive step size.
            inputs.push(Input::f32("delta_bias", &[channels], random.uniforms(channels, 0.0, 0.3)));
        }
        if self.initial {
            inputs.push(Input::f32(
                "initial_state",
                &[batch, channels, states],
                random.normals(batch * channels * states, 1.0),
            ));
        }
        inputs
    }

    /// The optional inputs among `all`: D, gate, bias, initial state.
    fn optional<'a, T>(&self, all: &'a [T]) -> [Option<&'a T>; 4] {
        let mut rest = all[5..].iter();
        [self.d, self.gate, self.delta_bias, self.initial].map(|present| if present { rest.next() } else { None })
    }

    fn starts(&self) -> Option<Tensor> {
        Some(indices(&[self.batch, self.time], self.document_start.as_ref()?))
    }

    fn operator(&self, tape: &Tape<'_>, inputs: &[Var], starts: Option<&Tensor>) -> autograd::Result<Vec<Var>> {
        self.operator_by(tape, inputs, starts, None)
    }

    fn operator_by(
        &self,
        tape: &Tape<'_>,
        inputs: &[Var],
        starts: Option<&Tensor>,
        way: Option<ScanWay>,
    ) -> autograd::Result<Vec<Var>> {
        let [d, gate, delta_bias, initial_state] = self.optional(inputs);
        let inputs = ScanInputs {
            input: &inputs[0],
            delta: &inputs[1],
            a: &inputs[2],
            b: &inputs[3],
            c: &inputs[4],
            d,
            gate,
            delta_bias,
            delta_softplus: self.softplus,
            initial_state,
            document_start: starts,
        };
        let result = match way {
            Some(way) => ops::selective_scan_by(tape, inputs, way)?,
            None => ops::selective_scan(tape, inputs)?,
        };
        Ok(vec![result.output, result.last_state])
    }

    /// Random gradients of the output and of the last state.
    fn seeds(&self, dtype: DType) -> [Tensor; 2] {
        let Self { batch, time, channels, states, .. } = *self;
        let mut random = Random::new(self.seed ^ 0x5eed);
        [(dtype, [batch, time, channels]), (DType::F32, [batch, channels, states])]
            .map(|(dtype, shape)| tensor(dtype, &shape, &random.normals(shape.iter().product(), 1.0)))
    }

    /// The output, the last state, and the gradients of all inputs under random seeds.
    fn results_by(&self, inputs: &[Tensor], starts: Option<&Tensor>, way: Option<ScanWay>) -> Vec<Tensor> {
        self.results_from(inputs, starts, way, self.seeds(inputs[0].dtype()))
    }

    /// The output, the last state, and the gradients of all inputs under these seeds.
    fn results_from(
        &self,
        inputs: &[Tensor],
        starts: Option<&Tensor>,
        way: Option<ScanWay>,
        seeds: [Tensor; 2],
    ) -> Vec<Tensor> {
        let tape = Tape::new();
        let leaves: Vec<Var> = inputs.iter().map(|input| tape.leaf(input)).collect();
        let outputs = self.operator_by(&tape, &leaves, starts, way).unwrap();
        let gradients = tape.backward_from(outputs.iter().cloned().zip(seeds).collect()).unwrap();
        let mut all: Vec<Tensor> = outputs.iter().map(|output| output.tensor().clone()).collect();
        all.extend(inputs.iter().map(|input| gradients.get(input).unwrap().clone()));
        all
    }

    fn reference(&self, values: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let [d, gate, delta_bias, initial_state] = self.optional(values).map(|values| values.map(Vec::as_slice));
        let result = reference::selective_scan(&Scan {
            batch: self.batch,
            time: self.time,
            channels: self.channels,
            states: self.states,
            b_groups: self.b_groups,
            c_groups: self.c_groups,
            input: &values[0],
            delta: &values[1],
            a: &values[2],
            b: &values[3],
            c: &values[4],
            d,
            gate,
            delta_bias,
            softplus: self.softplus,
            initial_state,
            document_start: self.document_start.as_deref(),
        });
        vec![result.output, result.last_state]
    }

    /// Sizes of the terms that the outputs and the last state are sums of: the reference over absolute values. Rounding
    /// errors are relative to them, however much the terms cancel.
    fn terms(&self, inputs: &[Tensor]) -> Vec<Vec<f64>> {
        let values: Vec<Vec<f64>> = inputs.iter().map(|input| widened(input).unwrap()).collect();
        let signed =
            [1, 2].into_iter().chain(self.delta_bias.then_some(5 + usize::from(self.d) + usize::from(self.gate)));
        let mut sizes: Vec<Vec<f64>> =
            values.iter().map(|values| values.iter().map(|value| value.abs()).collect()).collect();
        for index in signed {
            sizes[index].clone_from(&values[index]);
        }
        let gate = self.gate.then(|| {
            sizes.remove(5 + usize::from(self.d));
            &values[5 + usize::from(self.d)]
        });
        let mut terms = Self { gate: false, ..self.clone() }.reference(&sizes);
        for (output, gate) in terms[0].iter_mut().zip(gate.into_iter().flatten()) {
            *output *= silu(*gate).abs();
        }
        terms
    }
}

/// Bounds for two ways to compute one scan in f32, in units of the terms of each result.
const WAYS: Bounds = Bounds { relative_l2: Some(2e-6), relative_max: Some(4e-6) };

/// That results agree within [`WAYS`], in units of the `terms` that each is a sum of.
fn agree_by_terms(what: &str, got: &[f64], expected: &[f64], terms: &[f64]) -> Result<(), TestCaseError> {
    // A result whose terms are all zero must be zero.
    let scaled = |values: &[f64]| -> Vec<f64> {
        values.iter().zip(terms).map(|(value, size)| value / size.max(f64::from(f32::MIN_POSITIVE))).collect()
    };
    prop_assert_eq!(got.len(), terms.len());
    // Differences of numbers of at most size 1, beside 1.
    let differences: Vec<f64> =
        scaled(got).iter().zip(scaled(expected)).map(|(got, expected)| 1.0 + got - expected).collect();
    verdict(what, &[got.len()], &differences, &vec![1.0; got.len()], WAYS).map_err(TestCaseError::fail)
}

/// Steps `start..end` of a `[batch, time, …]` tensor.
fn steps(whole: &Tensor, start: usize, end: usize) -> Tensor {
    let (batch, time) = (whole.shape()[0], whole.shape()[1]);
    let width: usize = whole.shape()[2..].iter().product();
    let values = widened(whole).unwrap();
    let part: Vec<f64> =
        (0..batch).flat_map(|row| values[(row * time + start) * width..(row * time + end) * width].to_vec()).collect();
    tensor(whole.dtype(), &[&[batch, end - start], &whole.shape()[2..]].concat(), &part)
}

/// Row `row` of a `[batch, …]` tensor, as a batch of one.
fn row_of(whole: &Tensor, row: usize) -> Tensor {
    let width: usize = whole.shape()[1..].iter().product();
    let values = widened(whole).unwrap();
    tensor(whole.dtype(), &[&[1], &whole.shape()[1..]].concat(), &values[row * width..(row + 1) * width])
}

/// `[batch, time, …]` values of consecutive parts, as one.
fn joined(parts: &[Tensor]) -> Vec<f64> {
    let batch = parts[0].shape()[0];
    let values: Vec<Vec<f64>> = parts.iter().map(|part| widened(part).unwrap()).collect();
    (0..batch)
        .flat_map(|row| {
            values
                .iter()
                .flat_map(move |values| values[row * values.len() / batch..(row + 1) * values.len() / batch].to_vec())
        })
        .collect()
}

fn tensors(inputs: &[Input]) -> Vec<Tensor> {
    inputs.iter().map(|input| tensor(DType::F32, &input.shape, &input.values)).collect()
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn convolution(case in convolutions()) {
        let starts = case.starts();
        for precision in PRECISIONS {
            check_operator(
                precision, case.seed, CONVOLUTION, &case.inputs(), &[&case.inputs()[0].shape],
                |tape, inputs| Ok(vec![case.operator(tape, inputs, starts.as_ref())?]),
                |values| vec![case.reference(values)],
            ).map_err(|message| TestCaseError::fail(format!("{precision:?}: {message}")))?;
        }
    }

    #[test]
    fn scan(case in scans()) {
        let starts = case.starts();
        for precision in PRECISIONS {
            check_operator(
                precision, case.seed, SCAN, &case.inputs(), &[&case.inputs()[0].shape, &[case.batch, case.channels, case.states]],
                |tape, inputs| case.operator(tape, inputs, starts.as_ref()),
                |values| case.reference(values),
            ).map_err(|message| TestCaseError::fail(format!("{precision:?}: {message}")))?;
        }
    }

    /// A prefill and then single steps give what the whole sequence gives, and leave the same state.
    #[test]
    fn convolution_steps(case in convolutions(), prefill in 0..20usize, spare in 0..3usize) {
        let mut case = case;
        case.sizes.document_start = None;
        let inputs = tensors(&case.inputs());
        let variables: Vec<Var> = inputs.iter().map(Var::constant).collect();
        let tape = Tape::inference();
        let whole = case.operator(&tape, &variables, None).unwrap();
        let Convolution { batch, time, channels, width, .. } = case.sizes;
        let prefill = prefill.min(time);

        // What the steps continue from: the last inputs before them, wider than needed.
        let before = if case.initial { inputs[inputs.len() - 1].clone() } else { tensor(DType::F32, &[batch, 0, channels], &[]) };
        let seen = [before, steps(&inputs[0], 0, prefill)];
        let shape = [batch, seen[0].shape()[1] + prefill, channels];
        let mut state = ops::convolution_state(&tensor(DType::F32, &shape, &joined_or_empty(&seen)), width - 1 + spare).unwrap();
        let mut parts = vec![steps(&whole, 0, prefill)];
        for step in prefill..time {
            let input = steps(&inputs[0], step, step + 1).reshape(&[batch, channels]).unwrap();
            let bias = case.bias.then(|| &inputs[2]);
            let output = ops::causal_conv1d_step(&mut state, &input, &inputs[1], bias, case.activation()).unwrap();
            parts.push(output.reshape(&[batch, 1, channels]).unwrap());
        }
        let got = joined_or_empty(&parts);
        agree("steps", whole.shape(), &got, &widened(&whole).unwrap(), Bounds::new(1e-6, 2e-6)).map_err(TestCaseError::fail)?;
        let all = [seen[0].clone(), inputs[0].clone()];
        let shape = [batch, all[0].shape()[1] + time, channels];
        let last = ops::convolution_state(&tensor(DType::F32, &shape, &joined_or_empty(&all)), width - 1 + spare).unwrap();
        prop_assert_eq!(widened(&state).unwrap(), widened(&last).unwrap());
    }

    /// A scan, continued from its state, in two halves and step by step, is the whole scan.
    #[test]
    fn scan_steps(case in scans(), cut in 0..130usize) {
        let mut case = case;
        case.document_start = None;
        let inputs = tensors(&case.inputs());
        let variables: Vec<Var> = inputs.iter().map(Var::constant).collect();
        let tape = Tape::inference();
        let whole = case.operator(&tape, &variables, None).unwrap();
        let expected = (widened(&whole[0]).unwrap(), widened(&whole[1]).unwrap());
        let terms = case.terms(&inputs);
        let ScanCase { batch, time, channels, states, .. } = case;

        // Parameters have no time.
        let has_time = |tensor: &Tensor| tensor.shape().len() >= 3 && tensor.shape()[..2] == [batch, time];
        let part = |start: usize, end: usize| -> Vec<Var> {
            let count = inputs.len() - usize::from(case.initial);
            let timed = |(index, input): (usize, &Tensor)| {
                let timed = index < 2 || index == 3 || index == 4 || (has_time(input) && input.shape()[2] == channels);
                if timed { steps(input, start, end) } else { input.clone() }
            };
            inputs[..count].iter().enumerate().map(timed).map(|input| Var::constant(&input)).collect()
        };
        let initial = match case.initial {
            true => inputs[inputs.len() - 1].clone(),
            false => tensor(DType::F32, &[batch, channels, states], &vec![0.0; batch * channels * states]),
        };
        let with_state = ScanCase { initial: true, ..case.clone() };
        let cut = cut.min(time);
        let mut first = part(0, cut);
        first.push(Var::constant(&initial));
        let first = with_state.operator(&tape, &first, None).unwrap();
        let mut second = part(cut, time);
        second.push(first[1].clone());
        let second = with_state.operator(&tape, &second, None).unwrap();
        let halves = joined_or_empty(&[first[0].tensor().clone(), second[0].tensor().clone()]);
        agree_by_terms("halves", &halves, &expected.0, &terms[0])?;
        agree_by_terms("state", &widened(&second[1]).unwrap(), &expected.1, &terms[1])?;

        let mut state = initial;
        let mut outputs = Vec::new();
        for step in 0..time {
            let variables = part(step, step + 1);
            let [d, gate, delta_bias, _] = ScanCase { initial: false, ..case.clone() }.optional(&variables);
            let flat = |variable: &Var| variable.tensor().reshape(&[batch, channels]).unwrap();
            let grouped = |variable: &Var| variable.tensor().reshape(&[batch, variable.shape()[2], states]).unwrap();
            let output = ops::selective_scan_step(&mut state, ScanStepInputs {
                input: &flat(&variables[0]),
                delta: &flat(&variables[1]),
                a: &variables[2],
                b: &grouped(&variables[3]),
                c: &grouped(&variables[4]),
                d: d.map(|d| d.tensor()),
                gate: gate.map(flat).as_ref(),
                delta_bias: delta_bias.map(|bias| bias.tensor()),
                delta_softplus: case.softplus,
            }).unwrap();
            outputs.push(output.reshape(&[batch, 1, channels]).unwrap());
        }
        if !outputs.is_empty() {
            let got = joined_or_empty(&outputs);
            agree_by_terms("steps", &got, &expected.0, &terms[0])?;
        }
        agree_by_terms("state after steps", &widened(&state).unwrap(), &expected.1, &terms[1])?;
    }

    /// The length of the chunks, which devices may take in parallel, changes neither results nor gradients.
    #[test]
    fn scan_in_chunks(case in scans(), long in any::<bool>()) {
        let mut case = case;
        if long {
            // Longer than the longest chunk.
            (case.batch, case.channels, case.states, case.b_groups, case.c_groups) = (1, 6, 3, 2, 3);
            case.time = 257 + case.time % 40;
            let mut random = Random::new(case.seed);
            case.document_start = case.document_start.as_ref().map(|_| random.document_starts(case.time));
        }
        let starts = case.starts();
        let inputs = tensors(&case.inputs());
        let run = |chunk: Option<usize>| {
            let way = chunk.map(|chunk| ScanWay::Chunks(NonZeroUsize::new(chunk).unwrap()));
            case.results_by(&inputs, starts.as_ref(), way)
        };
        let expected = run(None);
        // GPUs have room for 4096 states of a channel and chunk.
        for chunk in [1, 16, 64, 256].into_iter().filter(|chunk| chunk * case.states <= 4096) {
            for (index, (got, expected)) in run(Some(chunk)).iter().zip(&expected).enumerate() {
                // Results and gradients within the bounds that each is held to against the reference.
                let what = format!("chunks of {chunk}: array {index}");
                let bounds = if index < 2 { SCAN.output } else { SCAN.gradient };
                agree(&what, expected.shape(), &widened(got).unwrap(), &widened(expected).unwrap(), bounds)
                    .map_err(TestCaseError::fail)?;
            }
        }
    }

    /// Documents packed in a row give what each gives alone, gradients included.
    #[test]
    fn packed_documents_are_separate(lengths in prop::collection::vec(1..30usize, 1..6), groups in 1..3usize, seed: u64) {
        let mut random = Random::new(seed);
        let (channels, states, width) = (4, 5, 4);
        let time: usize = lengths.iter().sum();
        let starts: Vec<usize> = lengths.iter().scan(0, |next, length| {
            let start = *next;
            *next += length;
            Some(vec![start; *length])
        }).flatten().collect();
        let mut normal = |shape: &[usize]| tensor(DType::F32, shape, &random.normals(shape.iter().product(), 1.0));
        let tokens = [1, time, channels];
        let timed = [
            normal(&tokens), normal(&tokens), normal(&[1, time, groups, states]), normal(&[1, time, groups, states]),
            normal(&tokens), normal(&tokens),
        ];
        let a = tensor(DType::F32, &[channels, states], &Random::new(seed).uniforms(channels * states, -2.0, -0.1));
        let weight = normal(&[channels, width]);
        let bias = normal(&[channels]);
        let run = |first: usize, last: usize, document_start: Option<&Tensor>| {
            let part: Vec<Tensor> = timed.iter().map(|whole| steps(whole, first, last)).collect();
            let tape = Tape::new();
            let [input, delta, b, c, gate] = [0, 1, 2, 3, 4].map(|index| tape.leaf(&part[index]));
            let parameters = [&a, &weight, &bias].map(|parameter| tape.leaf(parameter));
            let options = ConvolutionOptions { activation: Activation::Silu, document_start, initial_state: None };
            let convolved = ops::causal_conv1d(&tape, &input, &parameters[1], Some(&parameters[2]), options).unwrap();
            let scanned = ops::selective_scan(&tape, ScanInputs {
                input: &convolved, delta: &delta, a: &parameters[0], b: &b, c: &c, d: None, gate: Some(&gate),
                delta_bias: None, delta_softplus: true, initial_state: None, document_start,
            }).unwrap();
            let output = scanned.output.tensor().clone();
            let gradients = tape.backward_from(vec![(scanned.output, part[5].clone())]).unwrap();
            let mut timed = vec![output];
            timed.extend(part[..5].iter().map(|input| gradients.get(input).unwrap().clone()));
            let shared = [&a, &weight, &bias].map(|parameter| widened(gradients.get(parameter).unwrap()).unwrap());
            (timed, shared)
        };
        let (packed, packed_shared) = run(0, time, Some(&indices(&[1, time], &starts)));
        let mut separate: Vec<Vec<f64>> = vec![Vec::new(); packed.len()];
        let mut separate_shared: Vec<Vec<f64>> = packed_shared.iter().map(|values| vec![0.0; values.len()]).collect();
        let mut first = 0;
        for length in lengths {
            let (timed, shared) = run(first, first + length, None);
            for (all, part) in separate.iter_mut().zip(timed) {
                all.extend(widened(&part).unwrap());
            }
            for (sums, part) in separate_shared.iter_mut().zip(shared) {
                for (sum, value) in sums.iter_mut().zip(part) {
                    *sum += value;
                }
            }
            first += length;
        }
        for (index, (packed, separate)) in packed.iter().zip(&separate).enumerate() {
            let what = format!("output or gradient {index}");
            agree(&what, packed.shape(), &widened(packed).unwrap(), separate, Bounds::new(2e-6, 4e-6)).map_err(TestCaseError::fail)?;
        }
        for (index, (packed, separate)) in packed_shared.iter().zip(&separate_shared).enumerate() {
            let what = format!("gradient of parameter {index}");
            agree(&what, &[packed.len()], packed, separate, Bounds::new(1e-5, 2e-5)).map_err(TestCaseError::fail)?;
        }
    }
}

proptest! {
    #![proptest_config(cases(64))]

    /// What A, D and the bias of the step sizes get from a batch is the sum of what they get from each of its rows.
    #[test]
    fn rows_share_parameters(
        case in scans(), batch in prop_oneof![5 => 2..20usize, 1 => 120..140usize], time in 1..20usize, tiles in 0..4usize,
    ) {
        let mut case = ScanCase { batch, time, ..case };
        if batch > 20 {
            (case.time, case.channels, case.states) = (time.min(3), case.channels.min(17), case.states.min(16));
        }
        // On GPUs, tiles of whole rows are scanned by other kernels.
        let way = Some(if tiles > 0 { ScanWay::Serial } else { ScanWay::Spans });
        if tiles > 0 {
            (case.channels, case.states) = (16 * tiles, 16);
        }
        (case.b_groups, case.c_groups, case.document_start) = (1, 1, None);
        let inputs = case.inputs();
        let whole = tensors(&inputs);
        let results = case.results_by(&whole, None, way);
        let seeds = case.seeds(DType::F32);
        let row_case = ScanCase { batch: 1, ..case.clone() };
        let shared = |index: usize| ["a", "d", "delta_bias"].contains(&inputs[index].name);
        let rows: Vec<Vec<Tensor>> = (0..batch).map(|row| {
            let row_inputs: Vec<Tensor> = whole.iter().enumerate()
                .map(|(index, input)| if shared(index) { input.clone() } else { row_of(input, row) })
                .collect();
            row_case.results_from(&row_inputs, None, way, seeds.each_ref().map(|seed| row_of(seed, row)))
        }).collect();
        for index in (0..inputs.len()).filter(|index| shared(*index)) {
            let rows: Vec<Vec<f64>> = rows.iter().map(|results| widened(&results[2 + index]).unwrap()).collect();
            let sum = |term: fn(f64) -> f64| -> Vec<f64> {
                (0..rows[0].len()).map(|place| rows.iter().map(|values| term(values[place])).sum()).collect()
            };
            let got = widened(&results[2 + index]).unwrap();
            agree_by_terms(inputs[index].name, &got, &sum(|value| value), &sum(f64::abs))?;
        }
    }
}

/// Scans that GPUs can take row by row: 16 states, groups of whole tiles of 16 channels; no step, one, and around intervals
/// of 16 and chunks of 64.
fn serial_scans() -> impl Strategy<Value = ScanCase> {
    serial_scans_of(prop_oneof![
        1 => Just(0usize), 1 => Just(1usize), 2 => 2..15usize, 2 => 15..=17usize, 1 => 31..=33usize, 1 => 47..=49usize,
        1 => 63..=65usize, 1 => 79..=81usize, 1 => 127..=129usize
    ])
}

fn serial_scans_of(times: impl Strategy<Value = usize>) -> impl Strategy<Value = ScanCase> {
    (scans(), times, 1..4usize, any::<[bool; 2]>()).prop_map(|(case, time, tiles, [whole_b, whole_c])| {
        let mut random = Random::new(case.seed);
        let batch = case.batch.max(1);
        let starts = (0..batch).flat_map(|_| random.document_starts(time)).collect();
        ScanCase {
            batch,
            time,
            channels: 16 * tiles,
            states: 16,
            b_groups: if whole_b { 1 } else { tiles },
            c_groups: if whole_c { 1 } else { tiles },
            document_start: case.document_start.as_ref().map(|_| starts),
            ..case
        }
    })
}

proptest! {
    #![proptest_config(cases(96))]

    /// Whole rows against the f64 reference; their gradients as well, where finite differences are affordable.
    #[test]
    fn scan_of_whole_rows(case in serial_scans()) {
        let mut case = case;
        if case.time > 33 || case.channels > 16 {
            case.batch = 1;
            case.document_start = case.document_start.map(|starts| starts[..case.time].to_vec());
        }
        let starts = case.starts();
        if case.time * case.channels <= 16 * 17 {
            for precision in PRECISIONS {
                check_operator(
                    precision, case.seed, SCAN, &case.inputs(), &[&case.inputs()[0].shape, &[case.batch, case.channels, 16]],
                    |tape, inputs| case.operator_by(tape, inputs, starts.as_ref(), Some(ScanWay::Serial)),
                    |values| case.reference(values),
                ).map_err(|message| TestCaseError::fail(format!("{precision:?}: {message}")))?;
            }
        }
        let inputs = tensors(&case.inputs());
        let values: Vec<Vec<f64>> = inputs.iter().map(|input| widened(input).unwrap()).collect();
        let variables: Vec<Var> = inputs.iter().map(Var::constant).collect();
        let got = case.operator_by(&Tape::inference(), &variables, starts.as_ref(), Some(ScanWay::Serial)).unwrap();
        let expected = case.reference(&values);
        let terms = case.terms(&inputs);
        for (index, what) in ["output", "last state"].into_iter().enumerate() {
            agree_by_terms(what, &widened(&got[index]).unwrap(), &expected[index], &terms[index])?;
        }
    }

    /// Rows scanned whole and in spans give the same results and gradients, and the same bits every time.
    #[test]
    fn scan_of_whole_rows_and_in_spans(case in serial_scans()) {
        let starts = case.starts();
        for dtype in [DType::F32, DType::Bf16] {
            let inputs: Vec<Tensor> = case.inputs().iter().map(|input| {
                let dtype = if input.always_f32 { DType::F32 } else { dtype };
                tensor(dtype, &input.shape, &input.values)
            }).collect();
            let run = |way| case.results_by(&inputs, starts.as_ref(), Some(way));
            let (serial, spans) = (run(ScanWay::Serial), run(ScanWay::Spans));
            for (index, (got, expected)) in serial.iter().zip(&spans).enumerate() {
                let bounds = match (dtype, index) {
                    // One unit in the last place of bf16.
                    (DType::Bf16, _) => Bounds::new(4e-3, 8e-3),
                    (_, 0 | 1) => SCAN.output,
                    _ => SCAN.gradient,
                };
                agree(&format!("{dtype:?}: array {index}"), expected.shape(), &widened(got).unwrap(), &widened(expected).unwrap(), bounds)
                    .map_err(TestCaseError::fail)?;
            }
            let again = run(ScanWay::Serial);
            for (first, second) in serial.iter().zip(&again) {
                prop_assert_eq!(widened(first).unwrap(), widened(second).unwrap());
            }
        }
    }

    /// Tiles that blocks share in time, in chunks of 64 steps, give the bits of whole rows, resumed or not, and so do the states
    /// that are saved.
    #[test]
    fn scan_of_shared_tiles(
        case in serial_scans_of(prop_oneof![1 => 0..65usize, 2 => 65..=66usize, 1 => 127..=129usize, 2 => 190..=257usize]),
        blocks in 1..8usize,
    ) {
        let starts = case.starts();
        let way = ScanWay::Shared(NonZeroUsize::new(blocks).unwrap());
        for dtype in [DType::F32, DType::Bf16] {
            let inputs: Vec<Tensor> = case.inputs().iter().map(|input| {
                let dtype = if input.always_f32 { DType::F32 } else { dtype };
                tensor(dtype, &input.shape, &input.values)
            }).collect();
            let expected = case.results_by(&inputs, starts.as_ref(), Some(ScanWay::Serial));
            let got = case.results_by(&inputs, starts.as_ref(), Some(way));
            let variables: Vec<Var> = inputs.iter().map(Var::constant).collect();
            let inferred = case.operator_by(&Tape::inference(), &variables, starts.as_ref(), Some(way)).unwrap();
            let inferred = inferred.iter().map(Var::tensor);
            for (got, expected) in got.iter().zip(&expected).chain(inferred.zip(&expected)) {
                prop_assert_eq!(widened(got).unwrap(), widened(expected).unwrap());
            }
        }
    }
}

/// Rows of one tile, with all inputs.
fn rows_of_a_tile(batch: usize, time: usize) -> ScanCase {
    ScanCase {
        batch,
        time,
        channels: 16,
        states: 16,
        b_groups: 1,
        c_groups: 1,
        d: true,
        gate: true,
        delta_bias: true,
        softplus: true,
        initial: true,
        document_start: None,
        extreme: false,
        seed: 7,
    }
}

/// The convolution's gradient where its last blocks add up the sums of many: of several blocks a row, the last not a full one, of
/// stretches long enough to have rounds of steps without conditions, and of long and then short ones; with as many taps that the
/// last stretch of a block has no steps of its own. The same bits every time; words that a launch left behind would count in the
/// next one, whose sums are zero.
#[test]
fn sums_of_many_blocks() {
    for (batch, time, channels, width, [documents, initial]) in [
        (2, 64 * 9 + 21, 132, 4, [false, false]),
        (264, 150, 4, 4, [false, false]),
        (270, 301, 4, 4, [false, false]),
        (270, 301, 3, 3, [false, false]),
        (250, 290, 4, 4, [true, false]),
        (270, 260, 4, 5, [false, true]),
        (1, 230, 8, 22, [false, false]),
    ] {
        let mut random = Random::new(5);
        let starts = documents.then(|| (0..batch).flat_map(|_| random.document_starts(time)).collect());
        let sizes = Convolution { batch, time, channels, width, silu: true, document_start: starts };
        let case = ConvolutionCase { sizes, bias: true, initial, seed: 3 };
        let inputs = case.inputs();
        for precision in [Precision::F32, Precision::Bf16] {
            check_operator(
                precision,
                case.seed,
                CONVOLUTION,
                &inputs,
                &[&inputs[0].shape],
                |tape, inputs| Ok(vec![case.operator(tape, inputs, case.starts().as_ref())?]),
                |values| vec![case.reference(values)],
            )
            .unwrap();
        }
        let inputs = tensors(&inputs);
        let gradients = |seed: &Tensor| {
            let tape = Tape::new();
            let leaves: Vec<Var> = inputs.iter().map(|input| tape.leaf(input)).collect();
            let output = case.operator(&tape, &leaves, case.starts().as_ref()).unwrap();
            let gradients = tape.backward_from(vec![(output, seed.clone())]).unwrap();
            inputs.iter().map(|input| widened(gradients.get(input).unwrap()).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(gradients(&inputs[0]), gradients(&inputs[0]));
        // A sum of zero is a sum, too.
        let zeros = tensor(DType::F32, inputs[0].shape(), &vec![0.0; inputs[0].count()]);
        assert!(gradients(&zeros).iter().flatten().all(|&gradient| gradient == 0.0));
    }
}

/// Five tiles of five chunks for four blocks: seven chunks each, and the rest for the last, less than a tile.
#[test]
fn shared_tiles_are_cut() {
    let case = rows_of_a_tile(5, 64 * 5 - 3);
    let inputs = tensors(&case.inputs());
    let shared = ScanWay::Shared(NonZeroUsize::new(4).unwrap());
    let [serial, shared] = [ScanWay::Serial, shared].map(|way| case.results_by(&inputs, None, Some(way)));
    for (got, expected) in shared.iter().zip(&serial) {
        assert_eq!(widened(got).unwrap(), widened(expected).unwrap());
    }
}

/// Rows of more chunks than the backward pass over whole rows has arrangements of its places in shared memory.
#[test]
fn long_whole_rows_and_spans() {
    let case = rows_of_a_tile(1, 64 * 46 + 5);
    let inputs = tensors(&case.inputs());
    let [serial, spans] = [ScanWay::Serial, ScanWay::Spans].map(|way| case.results_by(&inputs, None, Some(way)));
    for (index, (got, expected)) in serial.iter().zip(&spans).enumerate() {
        let bounds = if index < 2 { SCAN.output } else { SCAN.gradient };
        let (got, values) = (widened(got).unwrap(), widened(expected).unwrap());
        agree(&format!("array {index}"), expected.shape(), &got, &values, bounds).unwrap();
    }
}

#[test]
fn whole_rows_of_other_shapes_are_refused_on_gpus() {
    let device = grafter_tests::device();
    let case = ScanCase {
        batch: 1,
        time: 3,
        channels: 24,
        states: 16,
        b_groups: 3,
        c_groups: 1,
        d: false,
        gate: false,
        delta_bias: false,
        softplus: true,
        initial: false,
        document_start: None,
        extreme: false,
        seed: 1,
    };
    let inputs: Vec<Var> = tensors(&case.inputs()).iter().map(Var::constant).collect();
    let result = case.operator_by(&Tape::inference(), &inputs, None, Some(ScanWay::Serial));
    if device.is_cpu() {
        assert!(result.is_ok());
    } else {
        let message = result.unwrap_err().to_string();
        assert!(message.contains("16 states, groups of 8 and 24 channels"), "{message}");
    }
}

/// As [`joined`], also for tensors without elements.
fn joined_or_empty(parts: &[Tensor]) -> Vec<f64> {
    if parts.is_empty() || parts[0].shape()[0] == 0 { Vec::new() } else { joined(parts) }
}

#[test]
fn a_step_size_of_zero_keeps_the_state() {
    let tape = Tape::inference();
    let constant =
        |shape: &[usize], value: f64| Var::constant(&tensor(DType::F32, shape, &vec![value; shape.iter().product()]));
    let state = constant(&[1, 2, 3], 0.7);
    let result = ops::selective_scan(
        &tape,
        ScanInputs {
            input: &constant(&[1, 4, 2], 5.0),
            delta: &constant(&[1, 4, 2], 0.0),
            a: &constant(&[2, 3], -1.0),
            b: &constant(&[1, 4, 1, 3], 1.0),
            c: &constant(&[1, 4, 1, 3], 1.0),
            d: None,
            gate: Some(&constant(&[1, 4, 2], 1.0)),
            delta_bias: None,
            delta_softplus: false,
            initial_state: Some(&state),
            document_start: None,
        },
    )
    .unwrap();
    assert_eq!(widened(&result.last_state).unwrap(), widened(&state).unwrap());
    for value in widened(&result.output).unwrap() {
        assert!((value - 2.1 * silu(1.0)).abs() < 1e-6, "{value}");
    }
}

#[test]
fn arguments_that_make_no_sense_are_named() {
    let tape = Tape::inference();
    let zeros = |shape: &[usize]| Var::constant(&tensor(DType::F32, shape, &vec![0.0; shape.iter().product()]));
    let starts = indices(&[1, 4], &[0; 4]);
    let scan = |b: &[usize], state: Option<&Var>| {
        ops::selective_scan(
            &tape,
            ScanInputs {
                input: &zeros(&[1, 4, 6]),
                delta: &zeros(&[1, 4, 6]),
                a: &zeros(&[6, 2]),
                b: &zeros(b),
                c: &zeros(&[1, 4, 2, 2]),
                d: None,
                gate: None,
                delta_bias: None,
                delta_softplus: true,
                initial_state: state,
                document_start: Some(&starts),
            },
        )
        .map(|_| ())
    };
    assert!(scan(&[1, 4, 3, 2], None).is_ok());
    let message = scan(&[1, 4, 4, 2], None).unwrap_err().to_string();
    assert!(message.contains("4 groups of b do not divide 6 channels"), "{message}");
    let message = scan(&[1, 5, 3, 2], None).unwrap_err().to_string();
    assert!(message.contains("selective_scan: b has shape"), "{message}");
    let message = scan(&[1, 4, 3, 2], Some(&zeros(&[1, 6, 2]))).unwrap_err().to_string();
    assert!(message.contains("initial state"), "{message}");
    let options = ConvolutionOptions { activation: Activation::Silu, document_start: None, initial_state: None };
    let message =
        ops::causal_conv1d(&tape, &zeros(&[1, 4, 6]), &zeros(&[5, 4]), None, options).unwrap_err().to_string();
    assert!(message.contains("weight has shape [5, 4]"), "{message}");
}
