//! The selective scan of Mamba (Gu and Dao 2023), with grouped B and C.

mod cpu;
mod gpu;

use std::num::NonZeroUsize;

use crate::{Error, Result, Tape, Tensor, Var, check};

const OPERATOR: &str = "selective_scan";

/// The most states of a channel that GPUs have kernels for; the CPU scans any number.
pub const MOST_GPU_STATES: usize = kernels_ptx::kernels::selective_scan::MOST_STATES as usize;

/// What a scan reads. Channels `d`, groups `g`, states `n`.
#[derive(Clone, Copy, Debug)]
pub struct ScanInputs<'a> {
    /// u `[batch, time, channels]`.
    pub input: &'a Var,
    /// Step sizes before bias and softplus, `[batch, time, channels]`.
    pub delta: &'a Var,
    /// A, f32 `[channels, states]`, negative for a decaying state.
    pub a: &'a Var,
    /// B `[batch, time, groups of B, states]`; channel `d` uses group `d / (channels / groups)`.
    pub b: &'a Var,
    /// C `[batch, time, groups of C, states]`; its number of groups may differ from B's.
    pub c: &'a Var,
    /// D, f32 `[channels]`: the skip connection.
    pub d: Option<&'a Var>,
    /// z `[batch, time, channels]`: the gate.
    pub gate: Option<&'a Var>,
    /// f32 `[channels]`, added to `delta`.
    pub delta_bias: Option<&'a Var>,
    /// Whether softplus is applied to `delta + delta_bias`.
    pub delta_softplus: bool,
    /// f32 `[batch, channels, states]`: the state before the first step. `None`: zeros. Not together with
    /// `document_start`.
    pub initial_state: Option<&'a Var>,
    /// u32 `[batch, time]`: start of each token's document; the state is dropped there. `None`: one document per row.
    pub document_start: Option<&'a Tensor>,
}

/// What a scan gives.
#[derive(Debug)]
pub struct ScanOutput {
    /// `[batch, time, channels]`.
    pub output: Var,
    /// f32 `[batch, channels, states]`: the state after the last step.
    pub last_state: Var,
}

/// Per channel, with `Δ = softplus(delta + delta_bias)`:
/// `h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t`, `y_t = C_t · h_t + D u_t`, `output_t = y_t · silu(z_t)`.
///
/// Softplus passes values above 20 through. At the first token of a document the state before it counts as zero.
///
/// # Errors
/// Shape errors that name the argument; groups that do not divide the channels; an initial state together with
/// document starts; on GPUs more than [`MOST_GPU_STATES`] states, or none.
pub fn selective_scan(tape: &Tape<'_>, inputs: ScanInputs<'_>) -> Result<ScanOutput> {
    scan(tape, inputs, None)
}

/// How time is taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ScanWay {
    /// On GPUs each row from its first step to its last in one pass, and back in another: for channels of 16 states whose
    /// groups of B and C are multiples of 16 channels.
    Serial,
    /// The same, with the tiles of 16 channels cut in time so that so many blocks have as much to do each in the forward pass;
    /// no more blocks than tiles are used.
    Shared(NonZeroUsize),
    /// On GPUs rows are cut into spans where they are few, which are taken in parallel.
    Spans,
    /// States are saved for the backward pass every so many steps; GPUs take the chunks in parallel.
    Chunks(NonZeroUsize),
}

/// As [`selective_scan`], in a given way. The other function chooses, and is the one to use: this one is for tests and
/// measurements.
///
/// # Errors
/// As [`selective_scan`]; on GPUs, serially or shared, shapes that [`ScanWay::Serial`] does not name, and in chunks, more than 4096
/// states of a channel and chunk.
pub fn selective_scan_by(tape: &Tape<'_>, inputs: ScanInputs<'_>, way: ScanWay) -> Result<ScanOutput> {
    scan(tape, inputs, Some(way))
}

fn scan(tape: &Tape<'_>, inputs: ScanInputs<'_>, way: Option<ScanWay>) -> Result<ScanOutput> {
    let scan = Scan::new(&inputs, way)?;
    let mut variables = vec![inputs.input, inputs.delta, inputs.a, inputs.b, inputs.c];
    let optional = [inputs.d, inputs.gate, inputs.delta_bias, inputs.initial_state];
    variables.extend(optional.iter().flatten());
    let present = optional.map(|input| input.is_some());
    let needed = tape.is_recording() && variables.iter().any(|variable| variable.needs_gradient());
    let (output, last_state, saved) = if inputs.input.device().is_cpu() {
        let (output, last_state, chunk_states) = scan.forward_cpu()?;
        (output, last_state, Saved::Cpu(chunk_states))
    } else {
        let (output, last_state, chunk_states) = gpu::forward(&scan, needed)?;
        (output, last_state, Saved::Gpu(chunk_states))
    };
    let mut results = tape.record(&variables, vec![output, last_state], move |gradients, _| {
        let (output_gradient, state_gradient) = (gradients[0].as_ref(), gradients[1].as_ref());
        let [required @ .., d, gate, delta_bias, initial_state] = match &saved {
            Saved::Cpu(chunk_states) => scan.backward_cpu(output_gradient, state_gradient, chunk_states)?,
            Saved::Gpu(chunk_states) => gpu::backward(&scan, output_gradient, state_gradient, chunk_states)?,
        };
        let mut result: Vec<Option<Tensor>> = required.into_iter().collect();
        for (gradient, present) in [d, gate, delta_bias, initial_state].into_iter().zip(present) {
            if present {
                result.push(gradient);
            }
        }
        Ok(result)
    });
    let (last_state, output) = (results.remove(1), results.remove(0));
    Ok(ScanOutput { output, last_state })
}

/// The states at the starts of chunks.
enum Saved {
    /// By block of channels.
    Cpu(Vec<Vec<cpu::Lanes>>),
    /// f32 `[batch, chunks, channels, states]`.
    Gpu(Tensor),
}

/// Everything that a scan reads, as tensors, with its sizes.
struct Scan {
    batch: usize,
    time: usize,
    channels: usize,
    states: usize,
    /// How time is taken, where it was asked for.
    way: Option<ScanWay>,
    input: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Option<Tensor>,
    gate: Option<Tensor>,
    delta_bias: Option<Tensor>,
    delta_softplus: bool,
    initial_state: Option<Tensor>,
    document_start: Option<Tensor>,
}

impl Scan {
    fn new(inputs: &ScanInputs<'_>, way: Option<ScanWay>) -> Result<Self> {
        let input = inputs.input;
        check::is_float(OPERATOR, "input", input)?;
        check::rank(OPERATOR, "input", input, 3, "[batch, time, channels]")?;
        check::rank(OPERATOR, "a", inputs.a, 2, "[channels, states]")?;
        let [batch, time, channels] = *input.shape() else { unreachable!("the rank was checked") };
        let states = inputs.a.shape()[1];
        check::is_float(OPERATOR, "delta", inputs.delta)?;
        check::is_float(OPERATOR, "a", inputs.a)?;
        check::shape(OPERATOR, "delta", inputs.delta, input.shape())?;
        check::shape(OPERATOR, "a", inputs.a, &[channels, states])?;
        for (name, group_tensor) in [("b", inputs.b), ("c", inputs.c)] {
            check::is_float(OPERATOR, name, group_tensor)?;
            check::rank(OPERATOR, name, group_tensor, 4, "[batch, time, groups, states]")?;
            let groups = group_tensor.shape()[2];
            check::shape(OPERATOR, name, group_tensor, &[batch, time, groups, states])?;
            if groups == 0 || !channels.is_multiple_of(groups) {
                return Err(Error::Invalid {
                    operator: OPERATOR,
                    message: format!("{groups} groups of {name} do not divide {channels} channels"),
                });
            }
        }
        for (name, vector) in [("d", inputs.d), ("delta_bias", inputs.delta_bias)] {
            if let Some(vector) = vector {
                check::shape(OPERATOR, name, vector, &[channels])?;
            }
        }
        if let Some(gate) = inputs.gate {
            check::shape(OPERATOR, "gate", gate, input.shape())?;
        }
        if let Some(state) = inputs.initial_state {
            check::shape(OPERATOR, "initial_state", state, &[batch, channels, states])?;
            if inputs.document_start.is_some() {
                let message = "an initial state belongs to one document per row: leave out document_start".to_owned();
                return Err(Error::Invalid { operator: OPERATOR, message });
            }
        }
        if let Some(starts) = inputs.document_start {
            check::is_u32(OPERATOR, "document_start", starts)?;
            check::shape(OPERATOR, "document_start", starts, &[batch, time])?;
        }
        let owned = |variable: &Var| variable.tensor().clone();
        Ok(Self {
            batch,
            time,
            channels,
            states,
            way,
            input: owned(input),
            delta: owned(inputs.delta),
            a: owned(inputs.a),
            b: owned(inputs.b),
            c: owned(inputs.c),
            d: inputs.d.map(owned),
            gate: inputs.gate.map(owned),
            delta_bias: inputs.delta_bias.map(owned),
            delta_softplus: inputs.delta_softplus,
            initial_state: inputs.initial_state.map(owned),
            document_start: inputs.document_start.cloned(),
        })
    }
}

/// What one decoding step reads; shapes as in [`ScanInputs`] without time.
#[derive(Clone, Copy, Debug)]
pub struct ScanStepInputs<'a> {
    /// u `[batch, channels]`.
    pub input: &'a Tensor,
    /// Step sizes before bias and softplus, `[batch, channels]`.
    pub delta: &'a Tensor,
    /// A, f32 `[channels, states]`.
    pub a: &'a Tensor,
    /// B `[batch, groups of B, states]`.
    pub b: &'a Tensor,
    /// C `[batch, groups of C, states]`.
    pub c: &'a Tensor,
    /// D, f32 `[channels]`.
    pub d: Option<&'a Tensor>,
    /// z `[batch, channels]`.
    pub gate: Option<&'a Tensor>,
    /// f32 `[channels]`, added to `delta`.
    pub delta_bias: Option<&'a Tensor>,
    /// Whether softplus is applied to `delta + delta_bias`.
    pub delta_softplus: bool,
}

/// One step of [`selective_scan`]: updates `state` (f32 `[batch, channels, states]`) in place and returns the output,
/// `[batch, channels]`.
///
/// # Errors
/// Shape errors that name the argument.
pub fn selective_scan_step(state: &mut Tensor, inputs: ScanStepInputs<'_>) -> Result<Tensor> {
    const OPERATOR: &str = "selective_scan_step";
    let input = inputs.input;
    for (name, tensor) in [("input", input), ("delta", inputs.delta), ("a", inputs.a), ("b", inputs.b), ("c", inputs.c)]
    {
        check::is_float(OPERATOR, name, tensor)?;
    }
    check::is_f32(OPERATOR, "state", state)?;
    check::rank(OPERATOR, "input", input, 2, "[batch, channels]")?;
    check::rank(OPERATOR, "b", inputs.b, 3, "[batch, groups, states]")?;
    check::rank(OPERATOR, "c", inputs.c, 3, "[batch, groups, states]")?;
    let (batch, channels, states) = (input.shape()[0], input.shape()[1], inputs.b.shape()[2]);
    let (b_groups, c_groups) = (inputs.b.shape()[1], inputs.c.shape()[1]);
    check::shape(OPERATOR, "delta", inputs.delta, input.shape())?;
    check::shape(OPERATOR, "a", inputs.a, &[channels, states])?;
    check::shape(OPERATOR, "b", inputs.b, &[batch, b_groups, states])?;
    check::shape(OPERATOR, "c", inputs.c, &[batch, c_groups, states])?;
    check::shape(OPERATOR, "state", state, &[batch, channels, states])?;
    for (name, vector) in [("d", inputs.d), ("delta_bias", inputs.delta_bias)] {
        if let Some(vector) = vector {
            check::shape(OPERATOR, name, vector, &[channels])?;
        }
    }
    if let Some(gate) = inputs.gate {
        check::shape(OPERATOR, "gate", gate, input.shape())?;
    }
    for (name, groups) in [("b", b_groups), ("c", c_groups)] {
        if groups == 0 || !channels.is_multiple_of(groups) {
            return Err(Error::Invalid {
                operator: OPERATOR,
                message: format!("{groups} groups of {name} do not divide {channels} channels"),
            });
        }
    }
    let step = if input.device().is_cpu() { cpu::step } else { gpu::step };
    step(state, inputs)
}

#[cfg(test)]
mod tests {
    use runtime::Device;

    use super::*;
    use crate::gradient_check;

    fn wave(shape: &[usize], phase: f32) -> Tensor {
        let count: usize = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|i| (i as f32 * 0.731 + phase).sin()).collect();
        Tensor::from_slice(&Device::cpu(), shape, &values).unwrap()
    }

    /// input, delta, a, b, c, d, gate, delta_bias, initial_state
    fn tensors(batch: usize, time: usize, channels: usize, states: usize, groups: (usize, usize)) -> [Tensor; 9] {
        let a: Vec<f32> = (0..channels * states).map(|i| -0.2 - (i % 7) as f32 * 0.3).collect();
        [
            wave(&[batch, time, channels], 0.0),
            wave(&[batch, time, channels], 1.0),
            Tensor::from_slice(&Device::cpu(), &[channels, states], &a).unwrap(),
            wave(&[batch, time, groups.0, states], 2.0),
            wave(&[batch, time, groups.1, states], 3.0),
            wave(&[channels], 4.0),
            wave(&[batch, time, channels], 5.0),
            wave(&[channels], 6.0),
            wave(&[batch, channels, states], 7.0),
        ]
    }

    fn inputs<'a>(v: &'a [Var], document_start: Option<&'a Tensor>) -> ScanInputs<'a> {
        ScanInputs {
            input: &v[0],
            delta: &v[1],
            a: &v[2],
            b: &v[3],
            c: &v[4],
            d: Some(&v[5]),
            gate: Some(&v[6]),
            delta_bias: Some(&v[7]),
            delta_softplus: true,
            initial_state: v.get(8),
            document_start,
        }
    }

    #[test]
    fn one_channel_by_hand() {
        let one = |shape: &[usize], values: &[f32]| {
            Var::constant(&Tensor::from_slice(&Device::cpu(), shape, values).unwrap())
        };
        let v = [
            one(&[1, 2, 1], &[2.0, 3.0]),
            one(&[1, 2, 1], &[0.5, 1.0]),
            one(&[1, 1], &[-1.0]),
            one(&[1, 2, 1, 1], &[1.0, 4.0]),
            one(&[1, 2, 1, 1], &[10.0, 1.0]),
        ];
        let inputs = ScanInputs {
            input: &v[0],
            delta: &v[1],
            a: &v[2],
            b: &v[3],
            c: &v[4],
            d: None,
            gate: None,
            delta_bias: None,
            delta_softplus: false,
            initial_state: None,
            document_start: None,
        };
        let result = selective_scan(&Tape::inference(), inputs).unwrap();
        let second = (-1f32).exp() * 1.0 + 12.0;
        let output = result.output.to_vec::<f32>().unwrap();
        assert!((output[0] - 10.0).abs() < 1e-6 && (output[1] - second).abs() < 1e-5, "{output:?}");
        assert!((result.last_state.item().unwrap() - second).abs() < 1e-5);
    }

    #[test]
    fn steps_equal_the_whole() {
        let tensors = tensors(2, 70, 24, 5, (2, 6));
        let v: Vec<Var> = tensors.iter().map(Var::constant).collect();
        let whole = selective_scan(&Tape::inference(), inputs(&v, None)).unwrap();
        let mut state = tensors[8].clone();
        let at = |tensor: &Tensor, step: usize| {
            let width: usize = tensor.shape()[2..].iter().product();
            let values = tensor.to_vec::<f32>().unwrap();
            let rows: Vec<f32> = (0..2).flat_map(|row| values[(row * 70 + step) * width..][..width].to_vec()).collect();
            let mut shape = tensor.shape().to_vec();
            shape.remove(1);
            Tensor::from_slice(&Device::cpu(), &shape, &rows).unwrap()
        };
        for step in 0..70 {
            let [u, delta, b, c, z] = [0, 1, 3, 4, 6].map(|index| at(&tensors[index], step));
            let inputs = ScanStepInputs {
                input: &u,
                delta: &delta,
                a: &tensors[2],
                b: &b,
                c: &c,
                d: Some(&tensors[5]),
                gate: Some(&z),
                delta_bias: Some(&tensors[7]),
                delta_softplus: true,
            };
            let output = selective_scan_step(&mut state, inputs).unwrap().to_vec::<f32>().unwrap();
            let expected = at(&whole.output, step).to_vec::<f32>().unwrap();
            for (found, expected) in output.iter().zip(&expected) {
                assert!((found - expected).abs() <= 1e-5, "step {step}: {found} {expected}");
            }
        }
        for (found, expected) in state.to_vec::<f32>().unwrap().iter().zip(whole.last_state.to_vec::<f32>().unwrap()) {
            assert!((found - expected).abs() <= 1e-5);
        }
    }

    #[test]
    fn gradients_agree_with_differences_with_groups_state_and_documents() {
        let full = tensors(2, 5, 6, 2, (2, 3));
        let check = gradient_check(&full, 1e-2, |tape, v| Ok(selective_scan(tape, inputs(v, None))?.output)).unwrap();
        assert!(check.worst.iter().all(|worst| *worst <= 1e-2), "{check:?}");
        let check =
            gradient_check(&full, 1e-2, |tape, v| Ok(selective_scan(tape, inputs(v, None))?.last_state)).unwrap();
        assert!(check.worst.iter().all(|worst| *worst <= 1e-2), "{check:?}");
        let starts = Tensor::from_slice(&Device::cpu(), &[2, 5], &[0u32, 0, 2, 2, 4, 0, 1, 1, 1, 1]).unwrap();
        let check =
            gradient_check(&full[..8], 1e-2, |tape, v| Ok(selective_scan(tape, inputs(v, Some(&starts)))?.output))
                .unwrap();
        assert!(check.worst.iter().all(|worst| *worst <= 1e-2), "{check:?}");
    }

    /// Output and last state, and the gradients of all inputs under a fixed seed.
    fn run(tensors: &[Tensor], starts: Option<&Tensor>) -> (Vec<f32>, Vec<f32>, Vec<Vec<f32>>) {
        let tape = Tape::new();
        let v: Vec<Var> = tensors.iter().map(|tensor| tape.leaf(tensor)).collect();
        let result = selective_scan(&tape, inputs(&v, starts)).unwrap();
        let (output, last_state) = (result.output.to_vec().unwrap(), result.last_state.to_vec().unwrap());
        let seed = tensors[0].clone();
        let gradients = tape.backward_from(vec![(result.output, seed)]).unwrap();
        let gradients = tensors.iter().map(|tensor| gradients.get(tensor).unwrap().to_vec().unwrap()).collect();
        (output, last_state, gradients)
    }

    #[test]
    fn packed_documents_equal_separate_ones_across_chunks() {
        // Documents that end on a chunk's border, just past one, within one, and after a single token.
        let lengths = [64, 65, 40, 1, 30];
        let total: usize = lengths.iter().sum();
        let tensors = tensors(1, total, 20, 3, (5, 2));
        let starts: Vec<u32> = lengths
            .iter()
            .scan(0u32, |next, &length| {
                let first = *next;
                *next += length as u32;
                Some(std::iter::repeat_n(first, length))
            })
            .flatten()
            .collect();
        let starts = Tensor::from_slice(&Device::cpu(), &[1, total], &starts).unwrap();
        let (packed, packed_state, packed_gradients) = run(&tensors[..8], Some(&starts));
        let cut = |tensor: &Tensor, first: usize, length: usize| {
            let width: usize = tensor.shape()[2..].iter().product();
            let mut shape = tensor.shape().to_vec();
            shape[1] = length;
            let values = &tensor.to_vec::<f32>().unwrap()[first * width..][..length * width];
            Tensor::from_slice(&Device::cpu(), &shape, values).unwrap()
        };
        const BY_TIME: [usize; 5] = [0, 1, 3, 4, 6];
        let mut sums = [vec![0.0; 60], vec![0.0; 20], vec![0.0; 20]];
        let mut first = 0;
        for length in lengths {
            let mut document = tensors[..8].to_vec();
            for index in BY_TIME {
                document[index] = cut(&tensors[index], first, length);
            }
            let (output, state, gradients) = run(&document, None);
            assert_eq!(output, packed[first * 20..][..length * 20]);
            for index in BY_TIME {
                let width = gradients[index].len() / length;
                assert_eq!(gradients[index], packed_gradients[index][first * width..][..length * width], "{index}");
            }
            for (sum, index) in sums.iter_mut().zip([2, 5, 7]) {
                for (sum, value) in sum.iter_mut().zip(&gradients[index]) {
                    *sum += value;
                }
            }
            first += length;
            if first == total {
                assert_eq!(state, packed_state);
            }
        }
        // These sum over time, in another order: f32 rounding of 200 terms of order 1.
        for (sum, index) in sums.iter().zip([2, 5, 7]) {
            for (sum, packed) in sum.iter().zip(&packed_gradients[index]) {
                assert!((sum - packed).abs() <= 1e-4, "{index}: {sum} {packed}");
            }
        }
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let tensors = tensors(2, 70, 40, 4, (2, 5));
        let with_threads = |threads| {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| run(&tensors, None))
        };
        assert_eq!(with_threads(1), with_threads(3));
    }

    #[test]
    fn not_a_number_reaches_only_its_channel_and_the_future() {
        let mut tensors = tensors(1, 4, 3, 2, (1, 1));
        tensors[0].make_mut::<f32>().unwrap()[2 * 3 + 1] = f32::NAN;
        let (output, _, _) = run(&tensors, None);
        for (index, value) in output.iter().enumerate() {
            assert_eq!(value.is_nan(), index % 3 == 1 && index / 3 >= 2, "{index}");
        }
    }

    #[test]
    fn a_sequence_of_no_steps_keeps_its_state() {
        let tensors = tensors(1, 0, 4, 3, (1, 1));
        let v: Vec<Var> = tensors.iter().map(Var::constant).collect();
        let result = selective_scan(&Tape::inference(), inputs(&v, None)).unwrap();
        assert_eq!(result.output.shape(), [1, 0, 4]);
        assert_eq!(result.last_state.to_vec::<f32>().unwrap(), tensors[8].to_vec::<f32>().unwrap());
    }

    #[test]
    fn groups_that_do_not_divide_and_two_kinds_of_start_are_refused() {
        let v: Vec<Var> = tensors(1, 2, 6, 2, (4, 3)).iter().map(Var::constant).collect();
        let message = selective_scan(&Tape::inference(), inputs(&v, None)).unwrap_err().to_string();
        assert_eq!(message, "selective_scan: 4 groups of b do not divide 6 channels");
        let v: Vec<Var> = tensors(1, 2, 6, 2, (2, 3)).iter().map(Var::constant).collect();
        let starts = Tensor::from_slice(&Device::cpu(), &[1, 2], &[0u32, 1]).unwrap();
        assert!(selective_scan(&Tape::inference(), inputs(&v, Some(&starts))).is_err());
    }
}
