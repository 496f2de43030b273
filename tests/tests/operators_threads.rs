//! Every operator by itself gives the same bits, forward and backward, whatever the number of threads and however often
//! it runs. Sizes go beyond the operators' blocks and are no multiples of them, so that threads have shares of work.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::LazyLock;

use autograd::ops::{
    self, Activation, AttentionOptions, ConvolutionOptions, Divergence, DivergenceOptions, IGNORED_LABEL,
    RotaryScaling, RotaryTable, ScanInputs, ScanStepInputs,
};
use autograd::optimizer::{AdamW, AdamWOptions, clip_gradients, gradient_norm};
use autograd::{DType, Gradients, Parameter, Parameters, Tape, Tensor, Var};
use grafter_tests::check::{Input, indices, tensor};
use grafter_tests::random::Random;
use rayon::{ThreadPool, ThreadPoolBuilder};

/// Pools of one, two and three threads.
static POOLS: LazyLock<Vec<ThreadPool>> =
    LazyLock::new(|| (1..=3).map(|threads| ThreadPoolBuilder::new().num_threads(threads).build().unwrap()).collect());

/// Runs `function` with one thread, then with two, three and again two, and compares the bits of what it gives.
fn same_bits(what: &str, function: impl Fn() -> Vec<Tensor> + Sync) {
    let bits = |tensor: &Tensor| tensor.to_f32_vec().unwrap().into_iter().map(f32::to_bits).collect::<Vec<u32>>();
    let run = |pool: &ThreadPool| pool.install(|| function().iter().map(bits).collect::<Vec<_>>());
    let one = run(&POOLS[0]);
    assert!(one.iter().any(|bits| !bits.is_empty()), "{what}: nothing to compare");
    assert!(one.iter().flatten().all(|bits| f32::from_bits(*bits).is_finite()), "{what}: not finite");
    for pool in [&POOLS[1], &POOLS[2], &POOLS[1]] {
        for (index, (one, other)) in one.iter().zip(run(pool)).enumerate() {
            let differs = one.iter().zip(&other).position(|(one, other)| one != other);
            assert!(
                one.len() == other.len() && differs.is_none(),
                "{what}: result {index} differs at {differs:?} with {} threads",
                pool.current_num_threads()
            );
        }
    }
}

/// [`same_bits`] of an operator's results and of the gradients of all its inputs, in f32 and bf16.
fn same_bits_with_gradients(
    what: &str,
    inputs: &[Input],
    operator: impl Fn(&Tape<'_>, &[Var]) -> autograd::Result<Vec<Var>> + Sync,
) {
    for dtype in [DType::F32, DType::Bf16] {
        let of = |input: &Input| if input.always_f32 { DType::F32 } else { dtype };
        let tensors: Vec<Tensor> = inputs.iter().map(|input| tensor(of(input), &input.shape, &input.values)).collect();
        same_bits(&format!("{what} in {dtype}"), || {
            let tape = Tape::new();
            let leaves: Vec<Var> = tensors.iter().map(|tensor| tape.leaf(tensor)).collect();
            let outputs = operator(&tape, &leaves).unwrap();
            let mut results: Vec<Tensor> = outputs.iter().map(|output| output.tensor().clone()).collect();
            let mut random = Random::new(17);
            let seeds = outputs.into_iter().map(|output| {
                let seed = tensor(output.dtype(), output.shape(), &random.normals(output.count(), 1.0));
                (output, seed)
            });
            let gradients = tape.backward_from(seeds.collect()).unwrap();
            results.extend(tensors.iter().map(|tensor| gradients.get(tensor).unwrap().clone()));
            results
        });
    }
}

/// Documents of a few tokens each, in every row.
fn starts(batch: usize, time: usize) -> Tensor {
    let mut random = Random::new(23);
    let starts: Vec<usize> = (0..batch).flat_map(|_| random.document_starts(time)).collect();
    indices(&[batch, time], &starts)
}

fn normal(shape: &[usize], random: &mut Random) -> Tensor {
    tensor(DType::F32, shape, &random.normals(shape.iter().product(), 1.0))
}

#[test]
fn a_result_that_depends_on_the_threads_is_found() {
    let values = Random::new(1).normals(10_000, 1.0);
    let by_share = || {
        let share = values.len().div_ceil(rayon::current_num_threads());
        let sums = values.chunks(share).map(|share| share.iter().map(|value| *value as f32).sum::<f32>());
        vec![tensor(DType::F32, &[1], &[f64::from(sums.sum::<f32>())])]
    };
    assert!(catch_unwind(AssertUnwindSafe(|| same_bits("sum by shares", by_share))).is_err());
    same_bits("plain sum", || vec![tensor(DType::F32, &[1], &[values.iter().sum()])]);
}

#[test]
fn linear() {
    let mut random = Random::new(2);
    // Few rows and many; more outputs than are widened from bf16 at once.
    for (rows, inner, outer) in [(1, 301, 1100), (3, 77, 257), (67, 129, 131), (201, 65, 1101)] {
        let inputs = [
            Input::normal("input", &[rows, inner], &mut random),
            Input::normal("weight", &[outer, inner], &mut random),
            Input::normal("bias", &[outer], &mut random),
        ];
        same_bits_with_gradients(&format!("linear {rows} {inner} {outer}"), &inputs, |tape, inputs| {
            Ok(vec![ops::linear(tape, &inputs[0], &inputs[1], Some(&inputs[2]))?])
        });
    }
}

#[test]
fn embedding() {
    let mut random = Random::new(3);
    let ids: Vec<usize> = (0..411).map(|_| random.below(97)).collect();
    let ids = indices(&[3, 137], &ids);
    let inputs = [Input::normal("weight", &[97, 33], &mut random)];
    same_bits_with_gradients("embedding", &inputs, |tape, inputs| {
        Ok(vec![ops::embedding(tape, &ids, &inputs[0], inputs[0].dtype())?])
    });
}

#[test]
fn rms_norm() {
    let mut random = Random::new(4);
    let inputs = [Input::normal("input", &[3, 111, 95], &mut random), Input::normal("weight", &[95], &mut random)];
    same_bits_with_gradients("rms_norm", &inputs, |tape, inputs| {
        Ok(vec![ops::rms_norm(tape, &inputs[0], &inputs[1], 1e-5)?])
    });
}

#[test]
fn rope() {
    let mut random = Random::new(5);
    let positions: Vec<usize> = (0..2 * 201).map(|_| random.below(8192)).collect();
    let positions = indices(&[2, 201], &positions);
    let table = RotaryTable::new(34, 1e4, RotaryScaling::None).unwrap();
    let inputs = [Input::normal("input", &[2, 201, 3, 34], &mut random)];
    same_bits_with_gradients("rope", &inputs, |tape, inputs| {
        Ok(vec![ops::rope(tape, &inputs[0], &positions, &table)?])
    });
}

#[test]
fn attention() {
    let mut random = Random::new(6);
    let (batch, key_time, heads, key_heads, size) = (2, 199, 6, 2, 17);
    let documents = starts(batch, key_time);
    for (query_time, document_start, window) in [
        (key_time, None, None),
        (key_time, Some(&documents), None),
        (key_time, Some(&documents), Some(70)),
        (71, None, Some(90)),
    ] {
        let inputs = [
            Input::normal("query", &[batch, query_time, heads, size], &mut random),
            Input::normal("key", &[batch, key_time, key_heads, size], &mut random),
            Input::normal("value", &[batch, key_time, key_heads, size], &mut random),
        ];
        let options = AttentionOptions { scale: 0.25, document_start, window };
        let what = format!("attention of {query_time}, {}, {window:?}", document_start.is_some());
        same_bits_with_gradients(&what, &inputs, |tape, inputs| {
            Ok(vec![ops::attention(tape, &inputs[0], &inputs[1], &inputs[2], options)?])
        });
    }
}

#[test]
fn elementwise() {
    type Unary = fn(&Tape<'_>, &Var) -> autograd::Result<Var>;
    type Binary = fn(&Tape<'_>, &Var, &Var) -> autograd::Result<Var>;
    let mut random = Random::new(7);
    // Three blocks of 2^14.
    let inputs = [Input::normal("a", &[3, 13_001], &mut random), Input::normal("b", &[3, 13_001], &mut random)];
    let unary: [(&str, Unary); 5] = [
        ("scale", |tape, x| ops::scale(tape, x, 0.3)),
        ("negative_exp", ops::negative_exp),
        ("silu", ops::silu),
        ("softplus", ops::softplus),
        ("sum", ops::sum),
    ];
    for (name, operator) in unary {
        same_bits_with_gradients(name, &inputs[..1], |tape, inputs| Ok(vec![operator(tape, &inputs[0])?]));
    }
    let binary: [(&str, Binary); 4] =
        [("add", ops::add), ("sub", ops::sub), ("mul", ops::mul), ("swiglu", ops::swiglu)];
    for (name, operator) in binary {
        same_bits_with_gradients(name, &inputs, |tape, inputs| Ok(vec![operator(tape, &inputs[0], &inputs[1])?]));
    }
    let inputs = [Input::normal("x", &[203, 96], &mut random)];
    same_bits_with_gradients("split", &inputs, |tape, inputs| ops::split(tape, &inputs[0], &[17, 0, 79]));
    same_bits_with_gradients("repeat_chunks", &inputs, |tape, inputs| {
        Ok(vec![ops::repeat_chunks(tape, &inputs[0], 16, 3)?])
    });
}

#[test]
fn causal_conv1d() {
    let mut random = Random::new(8);
    let (batch, time, channels, width) = (3, 201, 37, 4);
    let documents = starts(batch, time);
    let inputs = [
        Input::normal("input", &[batch, time, channels], &mut random),
        Input::normal("weight", &[channels, width], &mut random),
        Input::normal("bias", &[channels], &mut random),
        Input::normal("initial state", &[batch, width - 1, channels], &mut random),
    ];
    same_bits_with_gradients("convolution of documents", &inputs[..3], |tape, inputs| {
        let options =
            ConvolutionOptions { activation: Activation::Silu, document_start: Some(&documents), initial_state: None };
        Ok(vec![ops::causal_conv1d(tape, &inputs[0], &inputs[1], Some(&inputs[2]), options)?])
    });
    same_bits_with_gradients("convolution that continues", &inputs, |tape, inputs| {
        let options = ConvolutionOptions {
            activation: Activation::Identity,
            document_start: None,
            initial_state: Some(&inputs[3]),
        };
        Ok(vec![ops::causal_conv1d(tape, &inputs[0], &inputs[1], Some(&inputs[2]), options)?])
    });
}

#[test]
fn selective_scan() {
    let mut random = Random::new(9);
    let (batch, time) = (2, 201);
    let documents = starts(batch, time);
    // Whole blocks of 16 channels, and a rest; groups as wide as a block, wider and narrower.
    for (channels, states, b_groups, c_groups) in [(96, 16, 6, 3), (35, 5, 7, 1), (33, 16, 1, 33)] {
        let tokens = [batch, time, channels];
        let inputs = [
            Input::normal("input", &tokens, &mut random),
            Input::normal("delta", &tokens, &mut random),
            Input::f32("a", &[channels, states], random.uniforms(channels * states, -2.0, -0.05)),
            Input::normal("b", &[batch, time, b_groups, states], &mut random),
            Input::normal("c", &[batch, time, c_groups, states], &mut random),
            Input::f32("d", &[channels], random.normals(channels, 1.0)),
            Input::normal("gate", &tokens, &mut random),
            Input::f32("delta_bias", &[channels], random.normals(channels, 1.0)),
            Input::f32("initial_state", &[batch, channels, states], random.normals(batch * channels * states, 1.0)),
        ];
        let scan = |tape: &Tape<'_>, inputs: &[Var], document_start| {
            let result = ops::selective_scan(
                tape,
                ScanInputs {
                    input: &inputs[0],
                    delta: &inputs[1],
                    a: &inputs[2],
                    b: &inputs[3],
                    c: &inputs[4],
                    d: Some(&inputs[5]),
                    gate: Some(&inputs[6]),
                    delta_bias: Some(&inputs[7]),
                    delta_softplus: true,
                    initial_state: inputs.get(8),
                    document_start,
                },
            )?;
            Ok(vec![result.output, result.last_state])
        };
        let what = format!("{channels} channels, {b_groups} and {c_groups} groups");
        same_bits_with_gradients(&format!("scan of documents, {what}"), &inputs[..8], |tape, inputs| {
            scan(tape, inputs, Some(&documents))
        });
        same_bits_with_gradients(&format!("scan that continues, {what}"), &inputs, |tape, inputs| {
            scan(tape, inputs, None)
        });
    }
}

#[test]
fn losses() {
    let mut random = Random::new(10);
    let (rows, vocabulary) = (37, 2051);
    let inputs = [Input::normal("logits", &[rows, vocabulary], &mut random)];
    let labels: Vec<usize> =
        (0..rows).map(|row| if row % 5 == 0 { IGNORED_LABEL as usize } else { random.below(vocabulary) }).collect();
    let labels = indices(&[rows], &labels);
    same_bits_with_gradients("cross-entropy", &inputs, |tape, inputs| {
        Ok(vec![ops::cross_entropy(tape, &inputs[0], &labels, 29.0)?.loss])
    });
    let teacher = normal(&[rows, vocabulary], &mut random);
    let mask: Vec<f64> = (0..rows).map(|_| random.below(3) as f64 / 2.0).collect();
    let mask = tensor(DType::F32, &[rows], &mask);
    for divergence in
        [Divergence::ReverseKl, Divergence::ForwardKl, Divergence::JensenShannon, Divergence::SoftCrossEntropy]
    {
        let options = DivergenceOptions {
            divergence,
            student_temperature: 1.5,
            teacher_temperature: 2.0,
            mask: Some(&mask),
            denominator: 20.0,
        };
        same_bits_with_gradients(&format!("{divergence:?}"), &inputs, |tape, inputs| {
            Ok(vec![ops::divergence(tape, &inputs[0], &teacher, options)?.loss])
        });
    }
}

#[test]
fn decoding() {
    let mut random = Random::new(11);
    let (batch, room, heads, key_heads, size) = (3, 150, 6, 2, 33);
    let query = normal(&[batch, 2, heads, size], &mut random);
    let [keys, values] = [0; 2].map(|_| normal(&[batch, room, key_heads, size], &mut random));
    same_bits("cached attention", || vec![ops::attention_cached(&query, &keys, &values, 141, 0.2, Some(100)).unwrap()]);

    // More channels than one task takes.
    let (channels, states, width) = (531, 16, 4);
    let [input, delta, gate] = [0; 3].map(|_| normal(&[batch, channels], &mut random));
    let weight = normal(&[channels, width], &mut random);
    let columns = normal(&[batch, channels, width], &mut random);
    same_bits("convolution step", || {
        let mut state = columns.clone();
        let output = ops::causal_conv1d_step(&mut state, &input, &weight, None, Activation::Silu).unwrap();
        vec![output, state]
    });
    let a = tensor(DType::F32, &[channels, states], &random.uniforms(channels * states, -2.0, -0.05));
    let [b, c] = [3, 177].map(|groups| normal(&[batch, groups, states], &mut random));
    let [d, bias] = [0; 2].map(|_| normal(&[channels], &mut random));
    let before = normal(&[batch, channels, states], &mut random);
    same_bits("scan step", || {
        let mut state = before.clone();
        let inputs = ScanStepInputs {
            input: &input,
            delta: &delta,
            a: &a,
            b: &b,
            c: &c,
            d: Some(&d),
            gate: Some(&gate),
            delta_bias: Some(&bias),
            delta_softplus: true,
        };
        vec![ops::selective_scan_step(&mut state, inputs).unwrap(), state]
    });
}

#[test]
fn optimizer() {
    let mut random = Random::new(12);
    // Blocks of 2^15.
    let shapes = [vec![100_003], vec![257, 129], vec![7]];
    let initial: Vec<Tensor> = shapes.iter().map(|shape| normal(shape, &mut random)).collect();
    let given: Vec<Tensor> = shapes.iter().map(|shape| normal(shape, &mut random)).collect();
    same_bits("AdamW", || {
        let mut parameters = Parameters::default();
        for value in &initial {
            let name = String::new();
            parameters.push(Parameter { name, value: value.clone(), trainable: true, decay: true, rate: 1.0 });
        }
        let options = AdamWOptions { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 };
        let mut optimizer = AdamW::new(options, &parameters);
        let mut results = Vec::new();
        for _ in 0..3 {
            let mut gradients = Gradients::default();
            for ((_, parameter), gradient) in parameters.iter().zip(&given) {
                gradients.add(&parameter.value, gradient.clone()).unwrap();
                gradients.add(&parameter.value, gradient.clone()).unwrap();
            }
            let norm = gradient_norm(&parameters, &gradients).unwrap();
            // All digits of the norm, in two f32.
            let high = norm as f32;
            results.push(tensor(DType::F32, &[2], &[f64::from(high), norm - f64::from(high)]));
            clip_gradients(&mut gradients, norm, 1.0).unwrap();
            optimizer.update(&mut parameters, &gradients, 1e-2).unwrap();
        }
        results.extend(parameters.iter().map(|(_, parameter)| parameter.value.clone()));
        let moments = optimizer.moments().iter().flatten();
        results.extend(moments.flat_map(|(first, second)| [first.clone(), second.clone()]));
        results
    });
}
