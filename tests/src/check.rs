//! An operator on the device under test against its f64 reference: results, and gradients against finite differences.

use autograd::{DType, Tape, Tensor, Var};
use half::bf16;
use proptest::test_runner::{Config, RngSeed};
use tools::compare::{Bounds, compare};

use crate::random::Random;

/// Cases of a property test elsewhere than on the CPU: the simulator takes about a hundred times as long for each, and a GPU's
/// driver compiles the kernels of every new configuration.
const DEVICE_CASES: u32 = 64;

/// Property tests over `count` cases (fewer on other devices than the CPU), the same in every run. `PROPTEST_CASES` and
/// `PROPTEST_RNG_SEED` search further.
pub fn cases(count: u32) -> Config {
    let given = |name: &str| std::env::var_os(name).is_some();
    let default = Config::default();
    let count = if crate::device().is_cpu() { count } else { count.min(DEVICE_CASES) };
    Config {
        cases: if given("PROPTEST_CASES") { default.cases } else { count },
        rng_seed: if given("PROPTEST_RNG_SEED") { default.rng_seed } else { RngSeed::Fixed(2026) },
        failure_persistence: None,
        ..default
    }
}

/// The element type of an operator's main inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// f32.
    F32,
    /// bf16.
    Bf16,
}

/// A differentiable input.
#[derive(Clone, Debug)]
pub struct Input {
    /// What messages call it.
    pub name: &'static str,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Row-major.
    pub values: Vec<f64>,
    /// Whether it is f32 whatever the others are.
    pub always_f32: bool,
    /// Size of the terms that its gradient is a sum of. Where they cancel, their rounding errors stay: bounds are then
    /// relative to this size.
    pub gradient_terms: f64,
}

impl Input {
    /// An input that follows the precision of the run.
    pub fn new(name: &'static str, shape: &[usize], values: Vec<f64>) -> Self {
        assert_eq!(values.len(), shape.iter().product::<usize>(), "{name}");
        Self { name, shape: shape.to_vec(), values, always_f32: false, gradient_terms: 1.0 }
    }

    /// An input that is f32 in every run.
    pub fn f32(name: &'static str, shape: &[usize], values: Vec<f64>) -> Self {
        Self { always_f32: true, ..Self::new(name, shape, values) }
    }

    /// An input of normal numbers.
    pub fn normal(name: &'static str, shape: &[usize], random: &mut Random) -> Self {
        Self::new(name, shape, random.normals(shape.iter().product(), 1.0))
    }
}

/// How far an operator may be from its reference.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    /// Bounds on results in f32.
    pub output: Bounds,
    /// Bounds on gradients in f32.
    pub gradient: Bounds,
}

impl Tolerance {
    /// For operators that round each element a few times (unit roundoff of f32: 6e-8).
    pub const ELEMENTWISE: Self = Self::relative(5e-7);
    /// For operators that sum up to a few hundred terms, whose rounding errors add like their square root.
    pub const SUM: Self = Self::relative(2e-6);

    /// Bounds of `rms` and twice that on results, and four times as much on gradients, which pass through the
    /// operator's formula and its saved intermediate results once more.
    pub const fn relative(rms: f64) -> Self {
        Self {
            output: Bounds { relative_l2: Some(rms), relative_max: Some(2.0 * rms) },
            gradient: Bounds { relative_l2: Some(4.0 * rms), relative_max: Some(8.0 * rms) },
        }
    }

    fn at(self, dtype: DType, bounds: Bounds) -> Bounds {
        match dtype {
            // Rounding to bf16 moves a value by at most 2^-8 of its size. A result may be rounded twice: itself, and what
            // it is a product of (a normalised value, a saved result). An array may be a single element.
            DType::Bf16 => Bounds::new(8e-3, 12e-3),
            _ => bounds,
        }
    }
}

/// Elements of each input whose gradients are checked one by one. A direction through all of them is checked as well.
const SAMPLES: usize = 5;

/// Step of central differences in f64, relative to inputs of size 1: their error is about its square.
const STEP: f64 = 1e-5;

/// Runs an operator on the given inputs, rounded to the precision, and compares every output with the reference's (and
/// its shape with `shapes`), and the gradients of `Σ outputs · random weights` with finite differences of the reference.
///
/// Gradients are checked for single elements (the one with the greatest gradient among them) and along a random
/// direction through all elements of each input.
///
/// # Errors
/// A message that names the output or input and the worst element.
pub fn check_operator(
    precision: Precision,
    seed: u64,
    tolerance: Tolerance,
    inputs: &[Input],
    shapes: &[&[usize]],
    operator: impl Fn(&Tape<'_>, &[Var]) -> autograd::Result<Vec<Var>>,
    reference: impl Fn(&[Vec<f64>]) -> Vec<Vec<f64>>,
) -> Result<(), String> {
    let mut random = Random::new(seed ^ 0x5eed);
    let (tensors, values) = prepare(precision, inputs);
    let tape = Tape::new();
    let leaves: Vec<Var> = tensors.iter().map(|tensor| tape.leaf(tensor)).collect();
    let outputs = operator(&tape, &leaves).map_err(|error| error.to_string())?;
    let expected = reference(&values);
    if outputs.len() != shapes.len() || expected.len() != shapes.len() {
        return Err(format!("{} outputs, {} of the reference, {} shapes", outputs.len(), expected.len(), shapes.len()));
    }
    let mut seeds = Vec::new();
    let mut weights = Vec::new();
    for (index, (output, expected)) in outputs.iter().zip(&expected).enumerate() {
        if output.shape() != shapes[index] {
            return Err(format!("output {index} has shape {:?}, expected {:?}", output.shape(), shapes[index]));
        }
        let got = widened(output)?;
        // Results are of size 1; smaller ones may be sums of such terms.
        let floor = tolerance.output.relative_max.unwrap_or(0.0);
        if !all_within(&got, expected, floor) {
            let bounds = tolerance.at(output.dtype(), tolerance.output);
            verdict(&format!("output {index}"), output.shape(), &got, expected, bounds)?;
        }
        // Rounded to bf16, so that a run in bf16 sees the same weights.
        let weight: Vec<f64> = (0..got.len()).map(|_| f64::from(bf16::from_f64(random.normal()))).collect();
        seeds.push((output.clone(), tensor(output.dtype(), output.shape(), &weight)));
        weights.push(weight);
    }
    let gradients = tape.backward_from(seeds).map_err(|error| error.to_string())?;
    let objective = |values: &[Vec<f64>]| -> f64 {
        reference(values).iter().flatten().zip(weights.iter().flatten()).map(|(value, weight)| value * weight).sum()
    };
    for (index, input) in inputs.iter().enumerate() {
        let analytic = match gradients.get(&tensors[index]) {
            Some(gradient) if gradient.shape() == input.shape => widened(gradient)?,
            Some(gradient) => {
                return Err(format!(
                    "gradient of {} has shape {:?}, expected {:?}",
                    input.name,
                    gradient.shape(),
                    input.shape
                ));
            }
            None => return Err(format!("{} has no gradient", input.name)),
        };
        if analytic.is_empty() {
            continue;
        }
        let dtype = gradients.get(&tensors[index]).map_or(DType::F32, Tensor::dtype);
        let bounds = tolerance.at(dtype, tolerance.gradient);
        // What a backward pass saved in bf16 puts errors into each term.
        let terms = input.gradient_terms * if precision == Precision::Bf16 { 4.0 } else { 1.0 };
        let floor = bounds.relative_max.unwrap_or(0.0) * terms;
        check_gradient(input.name, index, &values, &analytic, &mut random, (bounds, floor), &objective)?;
    }
    Ok(())
}

fn check_gradient(
    name: &str,
    index: usize,
    values: &[Vec<f64>],
    analytic: &[f64],
    random: &mut Random,
    (bounds, floor): (Bounds, f64),
    objective: &impl Fn(&[Vec<f64>]) -> f64,
) -> Result<(), String> {
    let greatest = (0..analytic.len()).max_by(|a, b| analytic[*a].abs().total_cmp(&analytic[*b].abs())).unwrap_or(0);
    let mut samples = vec![greatest];
    samples.extend((1..SAMPLES.min(analytic.len())).map(|_| random.below(analytic.len())));
    let mut moved = values.to_vec();
    let mut numeric = Vec::new();
    for &sample in &samples {
        let middle = values[index][sample];
        let mut at = |value: f64| {
            moved[index][sample] = value;
            objective(&moved)
        };
        let (above, below) = (middle + STEP, middle - STEP);
        numeric.push((at(above) - at(below)) / (above - below));
        moved[index][sample] = middle;
    }
    let sampled: Vec<f64> = samples.iter().map(|&sample| analytic[sample]).collect();
    if !all_within(&sampled, &numeric, floor) {
        verdict(&format!("gradient of {name} at {samples:?}"), &[samples.len()], &sampled, &numeric, bounds)?;
    }

    // Signs, so that every element weighs the same.
    let direction: Vec<f64> = (0..analytic.len()).map(|_| if random.below(2) == 0 { 1.0 } else { -1.0 }).collect();
    let mut at = |step: f64| {
        for (moved, (value, sign)) in moved[index].iter_mut().zip(values[index].iter().zip(&direction)) {
            *moved = value + step * sign;
        }
        objective(&moved)
    };
    let numeric = (at(STEP) - at(-STEP)) / (2.0 * STEP);
    let along: f64 = analytic.iter().zip(&direction).map(|(gradient, sign)| gradient * sign).sum();
    // The errors of the elements add like their square root; those of the sum are relative to its terms.
    let size = analytic.iter().map(|gradient| gradient * gradient).sum::<f64>().sqrt();
    let allowed = bounds.relative_max.unwrap_or(0.0) * size + floor * (analytic.len() as f64).sqrt();
    if (along - numeric).abs() <= allowed + 1e-9 * objective(values).abs() {
        Ok(())
    } else {
        Err(format!("gradient of {name} along a direction is {along:e}, finite differences give {numeric:e}"))
    }
}

/// That two ways to one result agree: within the bounds, or each element within the greater one for terms of size 1, whose
/// sums may be small.
///
/// # Errors
/// As [`verdict`].
pub fn agree(what: &str, shape: &[usize], got: &[f64], expected: &[f64], bounds: Bounds) -> Result<(), String> {
    if all_within(got, expected, bounds.relative_max.unwrap_or(0.0)) {
        return Ok(());
    }
    verdict(what, shape, got, expected, bounds)
}

/// Whether there are as many values as expected, each within `floor` of it. NaN is not.
pub fn all_within(got: &[f64], expected: &[f64], floor: f64) -> bool {
    got.len() == expected.len() && got.iter().zip(expected).all(|(got, expected)| (got - expected).abs() <= floor)
}

/// The inputs as tensors, and as the f64 values that these hold.
fn prepare(precision: Precision, inputs: &[Input]) -> (Vec<Tensor>, Vec<Vec<f64>>) {
    inputs
        .iter()
        .map(|input| {
            let narrow = precision == Precision::Bf16 && !input.always_f32;
            let tensor = tensor(if narrow { DType::Bf16 } else { DType::F32 }, &input.shape, &input.values);
            let values = widened(&tensor).unwrap_or_else(|message| panic!("{}: {message}", input.name));
            (tensor, values)
        })
        .unzip()
}

/// A tensor of the given values on the device under test, rounded to `dtype`.
pub fn tensor(dtype: DType, shape: &[usize], values: &[f64]) -> Tensor {
    let device = crate::device();
    let made = match dtype {
        DType::F32 => {
            Tensor::from_slice(&device, shape, &values.iter().map(|value| *value as f32).collect::<Vec<f32>>())
        }
        DType::Bf16 => Tensor::from_slice(
            &device,
            shape,
            &values.iter().map(|value| bf16::from_f64(*value)).collect::<Vec<bf16>>(),
        ),
        DType::U32 => {
            Tensor::from_slice(&device, shape, &values.iter().map(|value| *value as u32).collect::<Vec<u32>>())
        }
    };
    made.unwrap_or_else(|error| panic!("a tensor of shape {shape:?}: {error}"))
}

/// A tensor of indices on the device under test.
pub fn indices(shape: &[usize], values: &[usize]) -> Tensor {
    tensor(DType::U32, shape, &values.iter().map(|value| *value as f64).collect::<Vec<f64>>())
}

/// A tensor's values as f64.
///
/// # Errors
/// A tensor that cannot be read.
pub fn widened(tensor: &Tensor) -> Result<Vec<f64>, String> {
    let values = tensor.to_f32_vec().map_err(|error| error.to_string())?;
    Ok(values.into_iter().map(f64::from).collect())
}

/// Compares values of one shape.
///
/// # Errors
/// A message with both measures and the worst element when they are outside the bounds.
pub fn verdict(what: &str, shape: &[usize], got: &[f64], expected: &[f64], bounds: Bounds) -> Result<(), String> {
    let comparison = compare((shape, got), (shape, expected)).map_err(|error| format!("{what}: {error}"))?;
    if comparison.within(bounds) {
        return Ok(());
    }
    let worst = comparison.worst.map_or(String::new(), |worst| {
        format!(", worst at {:?}: {:e}, expected {:e}", worst.index, worst.got, worst.expected)
    });
    Err(format!(
        "{what} of shape {shape:?}: relative rms {:.2e} and max {:.2e}, allowed {bounds:?}{worst}",
        comparison.relative_l2, comparison.relative_max
    ))
}
