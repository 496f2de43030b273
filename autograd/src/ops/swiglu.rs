//! The gated activation of the MLP.

use kernels_ptx::kernels::{
    self,
    swiglu::{SwigluBackward, SwigluForward},
};
use rayon::prelude::*;
use runtime::Argument;

use super::elementwise;
use crate::gpu::{self, Output};
use crate::{Result, Tape, Tensor, Var, check, cpu};

const OPERATOR: &str = "swiglu";

/// Elements that one thread takes at a time.
const BLOCK: usize = 1 << 13;

/// `silu(gate) · up`, elementwise (Shazeer 2020). Equal shapes.
///
/// # Errors
/// A shape error when they differ.
pub fn swiglu(tape: &Tape<'_>, gate: &Var, up: &Var) -> Result<Var> {
    check::is_float(OPERATOR, "gate", gate)?;
    check::is_float(OPERATOR, "up", up)?;
    check::shape(OPERATOR, "up", up, gate.shape())?;
    let on_cpu = gate.device().is_cpu();
    let output = if on_cpu { forward_cpu(gate, up)? } else { forward_gpu(gate, up)? };
    let (saved_gate, saved_up) = (gate.tensor().clone(), up.tensor().clone());
    Ok(tape.record_one(&[gate, up], output, move |gradient, _| {
        let backward = if on_cpu { backward_cpu } else { backward_gpu };
        let (gate_gradient, up_gradient) = backward(gradient, &saved_gate, &saved_up)?;
        Ok(vec![Some(gate_gradient), Some(up_gradient)])
    }))
}

fn forward_gpu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let up = up.cast(gate.dtype())?;
    let count = gpu::size(OPERATOR, "the number of elements", gate.count())?;
    let kernel = SwigluForward { element: gpu::element(gate.dtype()) };
    let mut output = Output::like(gate)?;
    let arguments = [output.write(), gpu::read(gate), gpu::read(&up), Argument::U32(count)];
    let grid = kernels::swiglu::grid(count.into(), kernel.element);
    gpu::launch(OPERATOR, gate.device(), &kernel, grid, &[count.into()], &arguments)?;
    Ok(output.tensor())
}

fn backward_gpu(gradient: &Tensor, gate: &Tensor, up: &Tensor) -> Result<(Tensor, Tensor)> {
    let (gradient, same_up) = (gradient.cast(gate.dtype())?, up.cast(gate.dtype())?);
    let count = gpu::size(OPERATOR, "the number of elements", gate.count())?;
    let kernel = SwigluBackward { element: gpu::element(gate.dtype()) };
    let (mut gate_gradient, mut up_gradient) = (Output::like(gate)?, Output::like(&same_up)?);
    let arguments = [
        gate_gradient.write(),
        up_gradient.write(),
        gpu::read(&gradient),
        gpu::read(gate),
        gpu::read(&same_up),
        Argument::U32(count),
    ];
    let grid = kernels::swiglu::grid(count.into(), kernel.element);
    gpu::launch(OPERATOR, gate.device(), &kernel, grid, &[count.into()], &arguments)?;
    Ok((gate_gradient.tensor(), up_gradient.tensor().cast(up.dtype())?))
}

fn forward_cpu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    elementwise::zip_cpu(gate, up, |gate, up| gate * cpu::sigmoid(gate) * up)
}

/// With `s = sigmoid(gate)`: `d gate = g · up · s (1 + gate (1 - s))`, `d up = g · gate · s`.
fn backward_cpu(gradient: &Tensor, gate: &Tensor, up: &Tensor) -> Result<(Tensor, Tensor)> {
    let (g, gate_values, up_values) = (gradient.host_f32()?, gate.host_f32()?, up.host_f32()?);
    let mut up_gradient = None;
    let gate_gradient = Tensor::compute(gate.device(), gate.shape(), gate.dtype(), |gate_gradient| {
        up_gradient = Some(Tensor::compute(up.device(), up.shape(), up.dtype(), |up_gradient| {
            gate_gradient
                .par_chunks_mut(BLOCK)
                .zip(up_gradient.par_chunks_mut(BLOCK))
                .zip(g.par_chunks(BLOCK).zip(gate_values.par_chunks(BLOCK)).zip(up_values.par_chunks(BLOCK)))
                .for_each(|((gate_gradient, up_gradient), ((g, gate), up))| {
                    cpu::simd(
                        #[inline(always)]
                        || {
                            for index in 0..g.len() {
                                let s = cpu::sigmoid(gate[index]);
                                gate_gradient[index] = g[index] * up[index] * s * (1.0 + gate[index] * (1.0 - s));
                                up_gradient[index] = g[index] * gate[index] * s;
                            }
                        },
                    );
                });
            Ok(())
        })?);
        Ok(())
    })?;
    match up_gradient {
        Some(up_gradient) => Ok((gate_gradient, up_gradient)),
        None => unreachable!("the closure that fills the first gradient makes the second"),
    }
}

#[cfg(test)]
mod tests {
    use runtime::Device;

    use super::*;
    use crate::{gradient_check, ops};

    #[test]
    fn values_and_gradients() {
        let device = Device::cpu();
        let gate = Tensor::from_slice(&device, &[3], &[0.0f32, 1.0, -2.0]).unwrap();
        let up = Tensor::from_slice(&device, &[3], &[5.0f32, 2.0, 3.0]).unwrap();
        let output = swiglu(&Tape::inference(), &Var::constant(&gate), &Var::constant(&up)).unwrap();
        let values = output.to_vec::<f32>().unwrap();
        assert_eq!(values[0], 0.0);
        assert!((values[1] - 2.0 / (1.0 + (-1f32).exp())).abs() < 1e-6);
        let check = gradient_check(&[gate, up], 1e-2, |tape, inputs| {
            let output = swiglu(tape, &inputs[0], &inputs[1])?;
            ops::mul(tape, &output, &output)
        })
        .unwrap();
        assert!(check.worst.iter().all(|worst| *worst <= 1e-2), "{check:?}");
    }
}
