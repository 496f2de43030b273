//! Operators that treat every element alike, and the sum.

use rayon::prelude::*;

use crate::{Error, Result, Tape, Tensor, Var, check, cpu};

/// Elements of a block: what one thread takes at a time, and the unit in which sums are formed.
const BLOCK: usize = 1 << 14;

/// `a + b`, equal shapes.
///
/// # Errors
/// A shape error when they differ.
pub fn add(tape: &Tape<'_>, a: &Var, b: &Var) -> Result<Var> {
    let output = zip("add", a, b, |a, b| a + b)?;
    Ok(tape.record_one(&[a, b], output, |gradient, _| Ok(vec![Some(gradient.clone()), Some(gradient.clone())])))
}

/// `a - b`, equal shapes.
///
/// # Errors
/// A shape error when they differ.
pub fn sub(tape: &Tape<'_>, a: &Var, b: &Var) -> Result<Var> {
    let output = zip("sub", a, b, |a, b| a - b)?;
    Ok(tape.record_one(&[a, b], output, |gradient, needed| {
        let negative = if needed[1] { Some(map("sub", gradient, |g| -g)?) } else { None };
        Ok(vec![Some(gradient.clone()), negative])
    }))
}

/// `a · b` elementwise, equal shapes.
///
/// # Errors
/// A shape error when they differ.
pub fn mul(tape: &Tape<'_>, a: &Var, b: &Var) -> Result<Var> {
    const OPERATOR: &str = "mul";
    let output = zip(OPERATOR, a, b, |a, b| a * b)?;
    let (saved_a, saved_b) = (a.tensor().clone(), b.tensor().clone());
    Ok(tape.record_one(&[a, b], output, move |gradient, needed| {
        let product = |other: &Tensor| zip(OPERATOR, gradient, other, |g, other| g * other);
        let a_gradient = if needed[0] { Some(product(&saved_b)?) } else { None };
        let b_gradient = if needed[1] { Some(product(&saved_a)?) } else { None };
        Ok(vec![a_gradient, b_gradient])
    }))
}

/// `factor · x`.
///
/// # Errors
/// Element-type errors.
pub fn scale(tape: &Tape<'_>, x: &Var, factor: f32) -> Result<Var> {
    let output = map("scale", x, move |x| factor * x)?;
    Ok(tape.record_one(&[x], output, move |gradient, _| Ok(vec![Some(map("scale", gradient, move |g| factor * g)?)])))
}

/// `-e^x`: from a Mamba mixer's `A_log` to its A.
///
/// # Errors
/// Element-type errors.
pub fn negative_exp(tape: &Tape<'_>, x: &Var) -> Result<Var> {
    const OPERATOR: &str = "negative_exp";
    let output = map(OPERATOR, x, |x| -cpu::exp(x))?;
    let saved = output.clone();
    Ok(tape.record_one(&[x], output, move |gradient, _| Ok(vec![Some(zip(OPERATOR, gradient, &saved, |g, y| g * y)?)])))
}

/// `x · sigmoid(x)`.
///
/// # Errors
/// Element-type errors.
pub fn silu(tape: &Tape<'_>, x: &Var) -> Result<Var> {
    const OPERATOR: &str = "silu";
    let output = map(OPERATOR, x, |x| x * cpu::sigmoid(x))?;
    let saved = x.tensor().clone();
    Ok(tape.record_one(&[x], output, move |gradient, _| {
        let slope = |g: f32, x: f32| {
            let s = cpu::sigmoid(x);
            g * s * (1.0 + x * (1.0 - s))
        };
        Ok(vec![Some(zip(OPERATOR, gradient, &saved, slope)?)])
    }))
}

/// `ln(1 + e^x)`; values above 20 pass through.
///
/// # Errors
/// Element-type errors.
pub fn softplus(tape: &Tape<'_>, x: &Var) -> Result<Var> {
    const OPERATOR: &str = "softplus";
    let output = map(OPERATOR, x, cpu::softplus)?;
    let saved = x.tensor().clone();
    Ok(tape.record_one(&[x], output, move |gradient, _| {
        let slope = |g: f32, x: f32| if x > 20.0 { g } else { g * cpu::sigmoid(x) };
        Ok(vec![Some(zip(OPERATOR, gradient, &saved, slope)?)])
    }))
}

/// The sum of all elements, a scalar f32.
///
/// # Errors
/// Element-type errors.
pub fn sum(tape: &Tape<'_>, x: &Var) -> Result<Var> {
    const OPERATOR: &str = "sum";
    check::on_cpu(OPERATOR, x)?;
    check::is_float(OPERATOR, "x", x)?;
    let values = x.host_f32()?;
    let blocks: Vec<f64> =
        values.par_chunks(BLOCK).map(|block| block.iter().map(|value| f64::from(*value)).sum()).collect();
    let total = blocks.iter().sum::<f64>() as f32;
    let output = Tensor::from_slice(x.device(), &[], &[total])?;
    let (device, shape, dtype) = (x.device().clone(), x.shape().to_vec(), x.dtype());
    Ok(tape.record_one(&[x], output, move |gradient, _| {
        Ok(vec![Some(Tensor::filled(&device, &shape, dtype, gradient.item()?)?)])
    }))
}

/// `sum += addend`, outside any tape.
///
/// # Errors
/// A shape error when they differ.
pub fn add_in_place(sum: &mut Tensor, addend: &Tensor) -> Result<()> {
    const OPERATOR: &str = "add_in_place";
    check::on_cpu(OPERATOR, sum)?;
    check::shape(OPERATOR, "addend", addend, sum.shape())?;
    if sum.dtype() != crate::DType::F32 {
        *sum = zip(OPERATOR, sum, addend, |a, b| a + b)?;
        return Ok(());
    }
    let addend = addend.host_f32()?;
    sum.make_mut::<f32>()?.par_chunks_mut(BLOCK).zip(addend.par_chunks(BLOCK)).for_each(|(sum, addend)| {
        cpu::simd(
            #[inline(always)]
            || {
                for (sum, addend) in sum.iter_mut().zip(addend) {
                    *sum += addend;
                }
            },
        );
    });
    Ok(())
}

/// `x *= factor`, outside any tape.
///
/// # Errors
/// Element-type errors.
pub fn scale_in_place(x: &mut Tensor, factor: f32) -> Result<()> {
    const OPERATOR: &str = "scale_in_place";
    check::on_cpu(OPERATOR, x)?;
    if x.dtype() != crate::DType::F32 {
        *x = map(OPERATOR, x, move |x| factor * x)?;
        return Ok(());
    }
    x.make_mut::<f32>()?.par_chunks_mut(BLOCK).for_each(|block| {
        cpu::simd(
            #[inline(always)]
            || {
                for value in block {
                    *value *= factor;
                }
            },
        );
    });
    Ok(())
}

/// `function` of every element.
pub(super) fn map(
    operator: &'static str,
    x: &Tensor,
    function: impl Fn(f32) -> f32 + Copy + Send + Sync,
) -> Result<Tensor> {
    check::on_cpu(operator, x)?;
    check::is_float(operator, "x", x)?;
    let values = x.host_f32()?;
    Tensor::compute(x.device(), x.shape(), x.dtype(), |output| {
        output.par_chunks_mut(BLOCK).zip(values.par_chunks(BLOCK)).for_each(|(output, values)| {
            cpu::simd(
                #[inline(always)]
                || {
                    for (output, value) in output.iter_mut().zip(values) {
                        *output = function(*value);
                    }
                },
            );
        });
        Ok(())
    })
}

/// `function` of every pair of elements; the result has `a`'s element type.
pub(super) fn zip(
    operator: &'static str,
    a: &Tensor,
    b: &Tensor,
    function: impl Fn(f32, f32) -> f32 + Copy + Send + Sync,
) -> Result<Tensor> {
    check::on_cpu(operator, a)?;
    check::is_float(operator, "a", a)?;
    if a.shape() != b.shape() {
        return Err(Error::Shape {
            operator,
            argument: "b",
            expected: format!("{:?} like a", a.shape()),
            found: b.shape().to_vec(),
        });
    }
    let (a_values, b_values) = (a.host_f32()?, b.host_f32()?);
    Tensor::compute(a.device(), a.shape(), a.dtype(), |output| {
        output.par_chunks_mut(BLOCK).zip(a_values.par_chunks(BLOCK)).zip(b_values.par_chunks(BLOCK)).for_each(
            |((output, a), b)| {
                cpu::simd(
                    #[inline(always)]
                    || {
                        for ((output, a), b) in output.iter_mut().zip(a).zip(b) {
                            *output = function(*a, *b);
                        }
                    },
                );
            },
        );
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use runtime::Device;

    use super::*;

    fn vector(values: &[f32]) -> Tensor {
        Tensor::from_slice(&Device::cpu(), &[values.len()], values).unwrap()
    }

    #[test]
    fn gradients_of_a_small_expression() {
        // Σ (a·b - 2a), so da = b - 2 and db = a.
        let (a, b) = (vector(&[1.0, 2.0]), vector(&[5.0, -3.0]));
        let tape = Tape::new();
        let (va, vb) = (tape.leaf(&a), tape.leaf(&b));
        let difference = sub(&tape, &mul(&tape, &va, &vb).unwrap(), &scale(&tape, &va, 2.0).unwrap()).unwrap();
        let total = sum(&tape, &difference).unwrap();
        assert_eq!(total.item().unwrap(), -7.0);
        let gradients = tape.backward(&total).unwrap();
        assert_eq!(gradients.get(&a).unwrap().to_vec::<f32>().unwrap(), [3.0, -5.0]);
        assert_eq!(gradients.get(&b).unwrap().to_vec::<f32>().unwrap(), [1.0, 2.0]);
    }

    #[test]
    fn softplus_passes_large_values_through_and_keeps_small_ones() {
        let x = Var::constant(&vector(&[25.0, -60.0, 0.0]));
        let y = softplus(&Tape::inference(), &x).unwrap().to_vec::<f32>().unwrap();
        assert_eq!(y[0], 25.0);
        assert!((y[1] / (-60f32).exp() - 1.0).abs() < 1e-6);
        assert!((y[2] - 2f32.ln()).abs() < 1e-7);
    }

    #[test]
    fn different_shapes_are_refused_by_name() {
        let (a, b) = (Var::constant(&vector(&[1.0])), Var::constant(&vector(&[1.0, 2.0])));
        let message = add(&Tape::inference(), &a, &b).unwrap_err().to_string();
        assert_eq!(message, "add: b has shape [2], expected [1] like a");
    }
}
