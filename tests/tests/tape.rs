//! What the tape promises: checkpointing changes nothing, shared weights get sums, inference leaves no trace.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::cell::RefCell;

use autograd::{DType, Gradients, Parameter, Parameters, Tape, Tensor, Var, ops};
use grafter_tests::check::{agree, cases, tensor, widened};
use grafter_tests::compare::Bounds;
use grafter_tests::random::Random;
use proptest::prelude::*;

fn normal(shape: &[usize], random: &mut Random) -> Tensor {
    tensor(DType::F32, shape, &random.normals(shape.iter().product(), 0.5))
}

/// A layer with a residual: `x + silu(x W1) W2`, then RMSNorm.
fn layer(tape: &Tape<'_>, x: &Var, weights: &[Var]) -> autograd::Result<Var> {
    let hidden = ops::silu(tape, &ops::linear(tape, x, &weights[0], None)?)?;
    let sum = ops::add(tape, x, &ops::linear(tape, &hidden, &weights[1], None)?)?;
    ops::rms_norm(tape, &sum, &weights[2], 1e-5)
}

fn weights(width: usize, inner: usize, random: &mut Random) -> Vec<Tensor> {
    vec![normal(&[inner, width], random), normal(&[width, inner], random), normal(&[width], random)]
}

fn bits(gradients: &Gradients, tensors: &[Tensor]) -> Vec<Vec<u32>> {
    let of = |tensor: &Tensor| gradients.get(tensor).unwrap().to_f32_vec().unwrap();
    tensors.iter().map(|tensor| of(tensor).into_iter().map(f32::to_bits).collect()).collect()
}

proptest! {
    #![proptest_config(cases(256))]

    /// Layers run in checkpoints, nested ones too, give bit-identical results and gradients; weights are taken from the
    /// checkpoint's tape, as a model does, or handed in as inputs.
    #[test]
    fn checkpoints_change_nothing(
        rows in 1..20usize, width in 1..33usize, inner in 1..33usize, layers in 1..4usize, handed_in: bool, seed: u64,
    ) {
        let mut random = Random::new(seed);
        let x = normal(&[rows, width], &mut random);
        let all: Vec<Vec<Tensor>> = (0..layers).map(|_| weights(width, inner, &mut random)).collect();
        let cotangent = normal(&[rows, width], &mut random);
        let mut tensors = vec![x.clone()];
        tensors.extend(all.iter().flatten().cloned());

        let run = |checkpoint: usize| -> (Vec<u32>, Vec<Vec<u32>>) {
            let tape = Tape::new();
            let mut stream = tape.leaf(&x);
            for weights in &all {
                let leaves: Vec<Var> = weights.iter().map(|weight| tape.leaf(weight)).collect();
                stream = match checkpoint {
                    0 => layer(&tape, &stream, &leaves).unwrap(),
                    _ if handed_in => {
                        let inputs: Vec<&Var> = std::iter::once(&stream).chain(&leaves).collect();
                        tape.checkpoint(&inputs, |tape, inputs| Ok(vec![layer(tape, &inputs[0], &inputs[1..])?]))
                            .unwrap().remove(0)
                    }
                    depth => tape.checkpoint(&[&stream], move |tape, inputs| {
                        let leaves: Vec<Var> = weights.iter().map(|weight| tape.leaf(weight)).collect();
                        if depth == 1 {
                            return Ok(vec![layer(tape, &inputs[0], &leaves)?]);
                        }
                        tape.checkpoint(&[&inputs[0]], move |tape, inputs| {
                            let leaves: Vec<Var> = weights.iter().map(|weight| tape.leaf(weight)).collect();
                            Ok(vec![layer(tape, &inputs[0], &leaves)?])
                        })
                    }).unwrap().remove(0),
                };
            }
            let output = stream.to_f32_vec().unwrap().into_iter().map(f32::to_bits).collect();
            let gradients = tape.backward_from(vec![(stream, cotangent.clone())]).unwrap();
            (output, bits(&gradients, &tensors))
        };
        let plain = run(0);
        prop_assert_eq!(&run(1), &plain);
        prop_assert_eq!(&run(2), &plain);
    }

    /// A weight used several times gets the sum of what its uses would get apart.
    #[test]
    fn shared_weights_get_the_sum(rows in 1..10usize, width in 1..20usize, uses in 1..4usize, checkpointed: bool, seed: u64) {
        let mut random = Random::new(seed);
        let shared = normal(&[width, width], &mut random);
        let inputs: Vec<Tensor> = (0..uses).map(|_| normal(&[rows, width], &mut random)).collect();
        let cotangents: Vec<Tensor> = (0..uses).map(|_| normal(&[rows, width], &mut random)).collect();
        let product = |tape: &Tape<'_>, x: &Var, weight: &Var| ops::linear(tape, &ops::silu(tape, x)?, weight, None);

        let tape = Tape::new();
        let mut seeds = Vec::new();
        for (input, cotangent) in inputs.iter().zip(&cotangents) {
            let output = if checkpointed {
                let weight = &shared;
                tape.checkpoint(&[&Var::constant(input)], move |tape, inputs| {
                    Ok(vec![product(tape, &inputs[0], &tape.leaf(weight))?])
                }).unwrap().remove(0)
            } else {
                product(&tape, &Var::constant(input), &tape.leaf(&shared)).unwrap()
            };
            seeds.push((output, cotangent.clone()));
        }
        let together = tape.backward_from(seeds).unwrap();

        let mut sum = vec![0.0; width * width];
        for (input, cotangent) in inputs.iter().zip(&cotangents) {
            let tape = Tape::new();
            let output = product(&tape, &Var::constant(input), &tape.leaf(&shared)).unwrap();
            let alone = tape.backward_from(vec![(output, cotangent.clone())]).unwrap();
            for (sum, value) in sum.iter_mut().zip(widened(alone.get(&shared).unwrap()).unwrap()) {
                *sum += value;
            }
        }
        let got = widened(together.get(&shared).unwrap()).unwrap();
        agree("gradient", &[width, width], &got, &sum, Bounds::new(1e-6, 2e-6)).map_err(TestCaseError::fail)?;
    }

    /// Frozen parameters and inputs get no gradient; the others get the gradients that they get anyway.
    #[test]
    fn frozen_parameters_get_no_gradient(trainable in prop::array::uniform3(any::<bool>()), seed: u64) {
        let mut random = Random::new(seed);
        let x = normal(&[5, 7], &mut random);
        let cotangent = normal(&[5, 7], &mut random);
        let weights = weights(7, 11, &mut random);
        let run = |trainable: [bool; 3]| {
            let mut parameters = Parameters::default();
            for (weight, trainable) in weights.iter().zip(trainable) {
                let name = String::new();
                parameters.push(Parameter { name, value: weight.clone(), trainable, decay: false, rate: 1.0 });
            }
            let tape = Tape::new();
            let variables: Vec<Var> = parameters.iter().map(|(id, _)| parameters.var(&tape, id)).collect();
            let output = layer(&tape, &Var::constant(&x), &variables).unwrap();
            tape.backward_from(vec![(output, cotangent.clone())]).unwrap()
        };
        let (some, all) = (run(trainable), run([true; 3]));
        for (weight, trainable) in weights.iter().zip(trainable) {
            prop_assert_eq!(some.get(weight).is_some(), trainable);
            if trainable {
                let values = |gradients: &Gradients| gradients.get(weight).unwrap().to_f32_vec().unwrap();
                prop_assert_eq!(values(&some), values(&all));
            }
        }
        prop_assert!(some.get(&x).is_none());
    }
}

#[test]
fn inference_records_nothing() {
    let mut random = Random::new(1);
    let weights = weights(8, 8, &mut random);
    let x = normal(&[4, 8], &mut random);
    let tape = Tape::inference();
    assert!(!tape.is_recording());
    let leaves: Vec<Var> = weights.iter().map(|weight| tape.leaf(weight)).collect();
    assert!(leaves.iter().all(|leaf| !leaf.needs_gradient()));
    let output = layer(&tape, &tape.leaf(&x), &leaves).unwrap();
    assert!(!output.needs_gradient());
    let checkpointed = tape.checkpoint(&[&output], |tape, inputs| Ok(vec![ops::silu(tape, &inputs[0])?])).unwrap();
    assert!(!checkpointed[0].needs_gradient());
    assert!(!holds_on_to_inputs(&tape), "an inference tape keeps an operator's input");
    assert!(holds_on_to_inputs(&Tape::new()));
    let gradients = tape.backward_from(vec![(output.clone(), output.tensor().clone())]).unwrap();
    assert!(weights.iter().chain([&x]).all(|tensor| gradients.get(tensor).is_none()));
}

/// Whether a tensor is shared after an operator has used it: writing to it then makes a copy.
fn holds_on_to_inputs(tape: &Tape<'_>) -> bool {
    let mut x = tensor(DType::F32, &[2], &[1.0, 2.0]);
    let id = x.id();
    ops::silu(tape, &tape.leaf(&x)).unwrap();
    ops::scale_in_place(&mut x, 2.0).unwrap();
    x.id() != id
}

#[test]
fn a_recording_tape_with_constants_only_records_nothing() {
    let tape = Tape::new();
    let constant = Var::constant(&tensor(DType::F32, &[2], &[1.0, 2.0]));
    assert!(!ops::silu(&tape, &constant).unwrap().needs_gradient());
    assert!(!tape.checkpoint(&[&constant], |_, inputs| Ok(inputs.to_vec())).unwrap().is_empty());
}

#[test]
fn a_checkpoint_runs_its_function_twice_and_keeps_nothing_of_the_first_run() {
    let x = tensor(DType::F32, &[3], &[0.5, -1.0, 2.0]);
    let runs = RefCell::new(Vec::new());
    let tape = Tape::new();
    let leaf = tape.leaf(&x);
    let output = tape
        .checkpoint(&[&leaf], |tape, inputs| {
            runs.borrow_mut().push(tape.is_recording());
            Ok(vec![ops::mul(tape, &inputs[0], &inputs[0])?])
        })
        .unwrap()
        .remove(0);
    assert_eq!(*runs.borrow(), [false]);
    let ones = tensor(DType::F32, &[3], &[1.0; 3]);
    let gradients = tape.backward_from(vec![(output, ones)]).unwrap();
    assert_eq!(*runs.borrow(), [false, true]);
    assert_eq!(widened(gradients.get(&x).unwrap()).unwrap(), [1.0, -2.0, 4.0]);
}

#[test]
fn backward_wants_a_scalar_and_seeds_of_the_right_shape() {
    let x = tensor(DType::F32, &[2], &[1.0, 2.0]);
    let tape = Tape::new();
    let leaf = tape.leaf(&x);
    assert!(tape.backward(&leaf).err().unwrap().to_string().contains("one element"));
    let tape = Tape::new();
    let leaf = tape.leaf(&x);
    let seed = tensor(DType::F32, &[3], &[1.0; 3]);
    assert!(tape.backward_from(vec![(leaf, seed)]).err().unwrap().to_string().contains("seed has shape [3]"));
}
