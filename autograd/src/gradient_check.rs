//! Gradients against finite differences.

use crate::{Result, Tape, Tensor, Var};

/// The outcome of a comparison.
#[derive(Clone, Debug)]
pub struct GradientCheck {
    /// Per input: the greatest difference between analytic and numeric gradient, relative to the input's greatest
    /// gradient (absolute where all gradients are zero). NaN if either is.
    pub worst: Vec<f64>,
}

/// Compares the gradients of `Σ function(inputs) · weights` (fixed pseudo-random weights, summed in f64) with central
/// differences of step `step`, on f32 tensors of the CPU. f32 arithmetic limits the agreement to roughly
/// `1e-7 / step`; checks against f64 references are stricter and live in the workspace's tests.
///
/// # Errors
/// Those of `function`.
pub fn gradient_check(
    inputs: &[Tensor],
    step: f32,
    function: impl Fn(&Tape<'_>, &[Var]) -> Result<Var>,
) -> Result<GradientCheck> {
    let tape = Tape::new();
    let variables: Vec<Var> = inputs.iter().map(|input| tape.leaf(input)).collect();
    let output = function(&tape, &variables)?;
    let weights: Vec<f32> = (0..output.count()).map(weight).collect();
    let seed = Tensor::from_slice(output.device(), output.shape(), &weights)?;
    let gradients = tape.backward_from(vec![(output, seed)])?;

    let objective = |inputs: &[Tensor]| -> Result<f64> {
        let constants: Vec<Var> = inputs.iter().map(Var::constant).collect();
        let values = function(&Tape::inference(), &constants)?.to_f32_vec()?;
        Ok(values.iter().zip(&weights).map(|(value, weight)| f64::from(*value) * f64::from(*weight)).sum())
    };
    let mut worst = Vec::with_capacity(inputs.len());
    for (index, input) in inputs.iter().enumerate() {
        let analytic = match gradients.get(input) {
            Some(gradient) => gradient.to_f32_vec()?,
            None => vec![0.0; input.count()],
        };
        let values = input.to_vec::<f32>()?;
        let mut greatest_gradient = 0.0f64;
        let mut greatest_difference = 0.0f64;
        for (element, analytic) in analytic.into_iter().enumerate() {
            let mut moved = inputs.to_vec();
            let mut objective_at = |value: f32| -> Result<f64> {
                let mut values = values.clone();
                values[element] = value;
                moved[index] = Tensor::from_slice(input.device(), input.shape(), &values)?;
                objective(&moved)
            };
            let (above, below) = (values[element] + step, values[element] - step);
            let numeric = (objective_at(above)? - objective_at(below)?) / f64::from(above - below);
            let difference = (f64::from(analytic) - numeric).abs();
            greatest_gradient = greatest_gradient.max(numeric.abs()).max(f64::from(analytic.abs()));
            // NaN is taken, and once taken it stays, since no comparison with it holds.
            if difference.is_nan() || difference > greatest_difference {
                greatest_difference = difference;
            }
        }
        worst.push(if greatest_gradient > 0.0 { greatest_difference / greatest_gradient } else { greatest_difference });
    }
    Ok(GradientCheck { worst })
}

/// Weights in [-1, 1] that follow no pattern an operator could share.
fn weight(index: usize) -> f32 {
    ((index as f32 + 1.0) * 12.9898).sin() * 0.9 + 0.1
}

#[cfg(test)]
mod tests {
    use runtime::Device;

    use super::*;
    use crate::ops;

    #[test]
    fn a_right_gradient_passes_and_a_wrong_one_does_not() {
        let input = Tensor::from_slice(&Device::cpu(), &[3], &[0.5f32, -1.0, 2.0]).unwrap();
        let right = gradient_check(std::slice::from_ref(&input), 1e-2, |tape, x| ops::mul(tape, &x[0], &x[0])).unwrap();
        assert!(right.worst[0] <= 1e-3, "{right:?}");
        let wrong = gradient_check(&[input], 1e-2, |tape, x| {
            let squares = ops::mul(&Tape::inference(), &x[0], &x[0])?;
            Ok(tape.record_one(&[&x[0]], squares.tensor().clone(), |gradient, _| Ok(vec![Some(gradient.clone())])))
        })
        .unwrap();
        assert!(wrong.worst[0] > 0.1, "{wrong:?}");
    }
}
