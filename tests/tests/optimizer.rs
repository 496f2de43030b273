//! AdamW, clipping and schedules against plain f64; gradient accumulation against whole batches.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use approx::assert_relative_eq;
use autograd::optimizer::{
    AdamW, AdamWOptions, Decay, Schedule, clip_factor, clip_gradients, gradient_norm, gradient_square_sum,
};
use autograd::{DType, Gradients, Parameter, Parameters, Tape, Tensor, Var, ops};
use grafter_tests::check::{agree, all_within, cases, indices, tensor, verdict, widened};
use grafter_tests::compare::Bounds;
use grafter_tests::random::Random;
use grafter_tests::reference;
use proptest::prelude::*;

fn parameter(name: &str, shape: &[usize], decay: bool, random: &mut Random) -> Parameter {
    let values = random.normals(shape.iter().product(), 1.0);
    let rate = [1.0, 1.0, 4.0, 0.3][random.below(4)];
    Parameter { name: name.to_owned(), value: tensor(DType::F32, shape, &values), trainable: true, decay, rate }
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn adamw_is_adamw(
        sizes in prop::collection::vec(prop_oneof![Just(0usize), Just(1), 2..40usize, 32767..=32769usize], 1..4),
        steps in prop_oneof![1..8usize, Just(20)],
        weight_decay in prop_oneof![Just(0.0), Just(0.1)],
        beta2 in prop_oneof![Just(0.95), Just(0.999)],
        clip in prop_oneof![Just(0.5), Just(1e9)],
        seed: u64,
    ) {
        let mut random = Random::new(seed);
        let mut parameters = Parameters::default();
        for (index, size) in sizes.iter().enumerate() {
            parameters.push(parameter(&index.to_string(), &[*size], index % 2 == 0, &mut random));
        }
        let options = AdamWOptions { beta1: 0.9, beta2, epsilon: 1e-8, weight_decay };
        let mut optimizer = AdamW::new(options, &parameters);
        let mut references: Vec<reference::AdamW> = parameters.iter().map(|(_, parameter)| {
            let value = widened(&parameter.value).unwrap();
            let zeros = vec![0.0; value.len()];
            reference::AdamW {
                beta1: 0.9, beta2, epsilon: 1e-8,
                weight_decay: if parameter.decay { weight_decay } else { 0.0 },
                value, first: zeros.clone(), second: zeros, steps: 0,
            }
        }).collect();
        for step in 0..steps {
            let rate = 1e-2 / (step + 1) as f64;
            let mut gradients = Gradients::default();
            let mut expected = Vec::new();
            for (_, parameter) in parameters.iter() {
                let count = parameter.value.count();
                // Gradients of very different sizes, and exact zeros.
                let size = 10f64.powi(random.below(5) as i32 - 3);
                let values: Vec<f64> =
                    (0..count).map(|_| if random.below(9) == 0 { 0.0 } else { random.normal() * size }).collect();
                let gradient = tensor(DType::F32, &[count], &values);
                expected.push(widened(&gradient).unwrap());
                gradients.add(&parameter.value, gradient).unwrap();
            }
            let norm = expected.iter().flatten().map(|value| value * value).sum::<f64>().sqrt();
            let got = gradient_norm(&parameters, &gradients).unwrap();
            assert_relative_eq!(got, norm, max_relative = 1e-6);
            let squares = gradient_square_sum(&parameters, &gradients).unwrap().unwrap().item().unwrap();
            assert_relative_eq!(f64::from(squares), norm * norm, max_relative = 2e-6);
            clip_gradients(&mut gradients, got, clip).unwrap();
            optimizer.update(&mut parameters, &gradients, rate as f32).unwrap();
            let factor = (clip / (norm + 1e-6)).min(1.0);
            for ((reference, gradient), (_, parameter)) in references.iter_mut().zip(expected).zip(parameters.iter()) {
                let clipped: Vec<f64> = gradient.into_iter().map(|value| value * factor).collect();
                reference.step(&clipped, f64::from(rate as f32) * f64::from(parameter.rate));
            }
        }
        prop_assert_eq!(optimizer.steps(), steps as u64);
        for (((_, parameter), moments), reference) in parameters.iter().zip(optimizer.moments()).zip(&references) {
            let shape = parameter.value.shape();
            let (first, second) = moments.as_ref().unwrap();
            // A few roundings a step. Values that steps of both signs have left near zero keep the errors of the terms:
            // parameters of size 1, gradients up to 40; squares cannot cancel.
            for (what, got, expected, bounds, floor) in [
                ("parameter", &parameter.value, &reference.value, Bounds::new(5e-7, 1e-6), 1e-6),
                ("first moment", first, &reference.first, Bounds::new(2e-6, 4e-6), 4e-6),
                ("second moment", second, &reference.second, Bounds::new(4e-6, 8e-6), 0.0),
            ] {
                let got = widened(got).unwrap();
                if !all_within(&got, expected, floor) {
                    verdict(what, shape, &got, expected, bounds).map_err(TestCaseError::fail)?;
                }
            }
        }
    }

    /// Stopping, saving and going on ends with the same bits.
    #[test]
    fn a_restored_optimizer_continues_to_the_same_bits(steps in 1..6u64, rest in 1..6u64, narrow: bool, seed: u64) {
        let mut random = Random::new(seed);
        let options = AdamWOptions { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 };
        let mut whole = Parameters::default();
        whole.push(parameter("a", &[3, 5], true, &mut random));
        whole.push(parameter("b", &[4], false, &mut random));
        if narrow {
            for (_, parameter) in whole.iter_mut() {
                parameter.value = parameter.value.cast(DType::Bf16).unwrap();
            }
        }
        let mut cut = whole.clone();
        let update = |optimizer: &mut AdamW, parameters: &mut Parameters, step: u64| {
            let mut gradients = Gradients::default();
            let mut random = Random::new(seed ^ step);
            for (_, parameter) in parameters.iter() {
                let values = random.normals(parameter.value.count(), 1.0);
                gradients.add(&parameter.value, tensor(DType::F32, parameter.value.shape(), &values)).unwrap();
            }
            optimizer.update(parameters, &gradients, 1e-2).unwrap();
        };
        let mut optimizer = AdamW::new(options, &whole);
        for step in 0..steps + rest {
            update(&mut optimizer, &mut whole, step);
        }
        let mut before = AdamW::new(options, &cut);
        for step in 0..steps {
            update(&mut before, &mut cut, step);
        }
        let copy = |tensor: &Tensor| Tensor::from_slice(tensor.device(), tensor.shape(), &tensor.to_vec::<f32>().unwrap()).unwrap();
        let moments = before.moments().iter().map(|moments| moments.as_ref().map(|(a, b)| (copy(a), copy(b)))).collect();
        let masters = before.masters().iter().map(|master| master.as_ref().map(copy)).collect();
        let mut after = AdamW::restore(options, &cut, before.steps(), moments, masters).unwrap();
        for step in steps..steps + rest {
            update(&mut after, &mut cut, step);
        }
        for ((_, whole), (_, cut)) in whole.iter().zip(cut.iter()) {
            prop_assert_eq!(whole.value.to_f32_vec().unwrap(), cut.value.to_f32_vec().unwrap());
        }
        for (whole, cut) in optimizer.masters().iter().zip(after.masters()) {
            let bits = |master: &Option<Tensor>| master.as_ref().map(|master| master.to_vec::<f32>().unwrap());
            prop_assert_eq!(whole.is_some(), narrow);
            prop_assert_eq!(bits(whole), bits(cut));
        }
    }

    /// Many parameters of all sizes, in f32 and in bf16, updated together: the bits of each updated alone, of gradients that
    /// were clipped before, and of a second run. Their norm is that of all of them.
    #[test]
    fn many_parameters_together_are_each_alone(
        sizes in prop::collection::vec(
            prop_oneof![0..9usize, 30..34usize, 1020..1030usize, 2046..2050usize, 8190..8200usize, 16384..16400usize],
            1..30,
        ),
        clips: bool,
        seed: u64,
    ) {
        let mut random = Random::new(seed);
        let options = AdamWOptions { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 };
        let mut parameters = Parameters::default();
        for (index, size) in sizes.iter().enumerate() {
            let mut one = parameter(&index.to_string(), &[*size], random.below(2) == 0, &mut random);
            if random.below(2) == 0 {
                one.value = one.value.cast(DType::Bf16).unwrap();
            }
            one.trainable = random.below(9) > 0;
            parameters.push(one);
        }
        let gradients: Vec<Vec<Tensor>> = (0..2)
            .map(|_| sizes.iter().map(|&size| tensor(DType::F32, &[size], &random.normals(size, 1.0))).collect())
            .collect();
        let copy = |tensor: &Tensor| tensor.reshape(tensor.shape()).unwrap();
        let (limit, rate) = (if clips { 0.5 } else { 1e9 }, 1e-2);
        let together = || {
            let mut parameters = parameters.clone();
            let mut optimizer = AdamW::new(options, &parameters);
            let mut norms = Vec::new();
            for step in &gradients {
                let mut gradients = Gradients::default();
                for ((_, parameter), gradient) in parameters.iter().zip(step) {
                    gradients.add(&parameter.value, gradient.clone()).unwrap();
                }
                let norm = gradient_norm(&parameters, &gradients).unwrap();
                norms.push(norm);
                optimizer.update_scaled(&mut parameters, &gradients, rate, clip_factor(norm, limit)).unwrap();
            }
            (parameters, optimizer, norms)
        };
        let (all, of_all, norms) = together();
        let (again, _, norms_again) = together();
        let bits = |tensor: &Tensor| -> Vec<u32> {
            tensor.to_f32_vec().unwrap().into_iter().map(f32::to_bits).collect()
        };
        prop_assert_eq!(&norms, &norms_again);
        for (norm, step) in norms.iter().zip(&gradients) {
            let trainable = parameters.iter().zip(step).filter(|((_, parameter), _)| parameter.trainable);
            let squares: f64 = trainable
                .map(|(_, gradient)| widened(gradient).unwrap().iter().map(|value| value * value).sum::<f64>())
                .sum();
            assert_relative_eq!(*norm, squares.sqrt(), max_relative = 1e-6);
        }
        for (index, ((_, together), (_, again))) in all.iter().zip(again.iter()).enumerate() {
            prop_assert_eq!(bits(&together.value), bits(&again.value));
            let mut alone = Parameters::default();
            let (_, before) = parameters.iter().nth(index).unwrap();
            alone.push(Parameter { value: copy(&before.value), ..before.clone() });
            let mut optimizer = AdamW::new(options, &alone);
            for (step, norm) in gradients.iter().zip(&norms) {
                let mut gradients = Gradients::default();
                // In memory of its own: it is scaled in place.
                let gradient = Tensor::from_slice(step[index].device(), step[index].shape(), &step[index].to_vec::<f32>().unwrap());
                gradients.add(&alone.iter().next().unwrap().1.value, gradient.unwrap()).unwrap();
                clip_gradients(&mut gradients, *norm, limit).unwrap();
                optimizer.update(&mut alone, &gradients, rate).unwrap();
            }
            prop_assert_eq!(bits(&together.value), bits(&alone.iter().next().unwrap().1.value));
            let states = |optimizer: &AdamW, index: usize| -> Vec<Vec<u32>> {
                let moments = optimizer.moments()[index].iter().flat_map(|(first, second)| [first, second]);
                moments.chain(optimizer.masters()[index].iter()).map(bits).collect()
            };
            prop_assert_eq!(states(&of_all, index), states(&optimizer, 0));
        }
    }

    /// A parameter in bf16 is the one in f32, rounded, after any number of steps.
    #[test]
    fn parameters_in_bf16_follow_those_in_f32(steps in 1..6u64, count in prop_oneof![Just(1usize), 7..10usize, 2040..2060usize], seed: u64) {
        let mut random = Random::new(seed);
        let mut narrow = Parameters::default();
        narrow.push(parameter("a", &[count], true, &mut random));
        for (_, parameter) in narrow.iter_mut() {
            parameter.value = parameter.value.cast(DType::Bf16).unwrap();
        }
        let mut wide = narrow.clone();
        for (_, parameter) in wide.iter_mut() {
            parameter.value = parameter.value.cast(DType::F32).unwrap();
        }
        let options = AdamWOptions { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 };
        let (mut of_narrow, mut of_wide) = (AdamW::new(options, &narrow), AdamW::new(options, &wide));
        for _ in 0..steps {
            let gradient = tensor(DType::F32, &[count], &random.normals(count, 1.0));
            for (parameters, optimizer) in [(&mut narrow, &mut of_narrow), (&mut wide, &mut of_wide)] {
                let mut gradients = Gradients::default();
                gradients.add(&parameters.iter().next().unwrap().1.value, gradient.clone()).unwrap();
                optimizer.update(parameters, &gradients, 1e-4).unwrap();
            }
        }
        let value = |parameters: &Parameters| parameters.iter().next().unwrap().1.value.clone();
        prop_assert_eq!(of_narrow.masters()[0].as_ref().unwrap().to_vec::<f32>().unwrap(), value(&wide).to_vec::<f32>().unwrap());
        prop_assert_eq!(value(&narrow).to_f32_vec().unwrap(), value(&wide).cast(DType::Bf16).unwrap().to_f32_vec().unwrap());
    }

    /// A batch's loss and gradients do not depend on how it is cut into micro-batches, whatever their sizes and however
    /// the labels that count are spread over them: the denominator is the whole batch's.
    #[test]
    fn accumulated_gradients_are_those_of_the_batch(cuts in prop::collection::vec(1..6usize, 1..5), seed: u64) {
        let mut random = Random::new(seed);
        let (width, vocabulary) = (9, 17);
        let rows: usize = cuts.iter().sum();
        let x = random.normals(rows * width, 1.0);
        let labels: Vec<usize> =
            (0..rows).map(|_| if random.below(3) == 0 { u32::MAX as usize } else { random.below(vocabulary) }).collect();
        let counted = labels.iter().filter(|label| **label != u32::MAX as usize).count().max(1) as f32;
        let weight = tensor(DType::F32, &[vocabulary, width], &random.normals(vocabulary * width, 0.5));
        let run = |first: usize, count: usize| -> (f64, Gradients) {
            let tape = Tape::new();
            let input = Var::constant(&tensor(DType::F32, &[count, width], &x[first * width..][..count * width]));
            let logits = ops::linear(&tape, &input, &tape.leaf(&weight), None).unwrap();
            let loss = ops::cross_entropy(&tape, &logits, &indices(&[count], &labels[first..][..count]), counted).unwrap().loss;
            (f64::from(loss.item().unwrap()), tape.backward(&loss).unwrap())
        };
        let (whole_loss, whole) = run(0, rows);
        let (mut loss, mut sum, mut first) = (0.0, Gradients::default(), 0);
        for count in cuts {
            let (part, gradients) = run(first, count);
            loss += part;
            sum.merge(gradients).unwrap();
            first += count;
        }
        prop_assert!((loss - whole_loss).abs() <= 1e-6 * (1.0 + whole_loss), "{loss} and {whole_loss}");
        let [got, expected] = [&sum, &whole].map(|gradients| widened(gradients.get(&weight).unwrap()).unwrap());
        agree("gradient", &[vocabulary, width], &got, &expected, Bounds::new(1e-6, 2e-6)).map_err(TestCaseError::fail)?;
    }

    /// Warm-up climbs to the base rate in equal steps, decay never rises nor leaves [minimum, base].
    #[test]
    fn schedules_climb_and_fall(warmup_steps in 0..20u64, length in 1..50u64, which in 0..3usize) {
        let decay = [Decay::Constant, Decay::Linear, Decay::Cosine][which];
        let (base, minimum) = (3e-4, 3e-5);
        let schedule = Schedule { base, minimum, warmup_steps, decay_steps: warmup_steps + length, decay };
        for step in 1..warmup_steps {
            assert_relative_eq!(schedule.rate(step), base * step as f64 / warmup_steps as f64, max_relative = 1e-12);
        }
        assert_relative_eq!(schedule.rate(warmup_steps.max(1)) , if warmup_steps == 0 { schedule.rate(1) } else { base }, max_relative = 1e-12);
        let mut previous = f64::INFINITY;
        for step in warmup_steps.max(1)..=warmup_steps + length + 5 {
            let rate = schedule.rate(step);
            let progress = ((step - warmup_steps) as f64 / length as f64).min(1.0);
            let expected = match decay {
                Decay::Constant => base,
                Decay::Linear => base + (minimum - base) * progress,
                Decay::Cosine => minimum + (base - minimum) * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            };
            assert_relative_eq!(rate, expected, max_relative = 1e-9);
            prop_assert!(rate <= previous && (minimum * 0.999_999..=base * 1.000_001).contains(&rate));
            previous = rate;
        }
    }
}

#[test]
fn frozen_parameters_and_those_without_a_gradient_stay_as_they_are() {
    let mut random = Random::new(3);
    let mut parameters = Parameters::default();
    for (name, trainable) in [("frozen", false), ("unused", true), ("used", true)] {
        parameters.push(Parameter { trainable, ..parameter(name, &[4], true, &mut random) });
    }
    let before: Vec<Vec<f64>> = parameters.iter().map(|(_, parameter)| widened(&parameter.value).unwrap()).collect();
    let mut gradients = Gradients::default();
    for name in ["frozen", "used"] {
        let value = &parameters.get(parameters.find(name).unwrap()).value;
        gradients.add(value, tensor(DType::F32, &[4], &[3.0, 0.0, 4.0, 0.0])).unwrap();
    }
    // A frozen parameter's gradient does not count towards the norm.
    assert_relative_eq!(gradient_norm(&parameters, &gradients).unwrap(), 5.0, max_relative = 1e-9);
    let options = AdamWOptions { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.5 };
    let mut optimizer = AdamW::new(options, &parameters);
    optimizer.update(&mut parameters, &gradients, 0.1).unwrap();
    let after: Vec<Vec<f64>> = parameters.iter().map(|(_, parameter)| widened(&parameter.value).unwrap()).collect();
    assert_eq!(before[..2], after[..2]);
    // The first step of Adam is the rate times the gradient's sign, after 5 % of decay.
    for (index, sign) in [1.0, 0.0, 1.0, 0.0].into_iter().enumerate() {
        assert_relative_eq!(after[2][index], before[2][index] * 0.95 - 0.1 * sign, max_relative = 1e-5);
    }
}

#[test]
fn moments_of_another_shape_are_refused() {
    let mut random = Random::new(3);
    let mut parameters = Parameters::default();
    parameters.push(parameter("weight", &[2, 2], true, &mut random));
    let options = AdamWOptions { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.0 };
    let zeros = |shape: &[usize]| tensor(DType::F32, shape, &vec![0.0; shape.iter().product()]);
    let restore =
        |moments| AdamW::restore(options, &parameters, 3, moments, vec![None]).map(|_| ()).unwrap_err().to_string();
    assert!(restore(vec![]).contains("0 parameters for 1"));
    let message = restore(vec![Some((zeros(&[2, 2]), zeros(&[4])))]);
    assert!(message.contains("weight") && message.contains("[4]"), "{message}");
}
