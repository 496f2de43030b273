//! Operators at the sizes of real models, forward and backward.

use anyhow::Result;
use autograd::ops::{
    self, Activation, AttentionOptions, ConvolutionOptions, Divergence, DivergenceOptions, HeadTeacher,
    MambaStepInputs, RotaryScaling, RotaryTable, ScanInputs,
};
use autograd::{DType, Tape, Tensor, Var};
use runtime::Device;

/// An operator with the sizes of one use of it.
pub struct Case {
    /// What `profile operator` calls it.
    pub name: &'static str,
    /// The sizes, for people.
    pub sizes: &'static str,
    run: fn(&Inputs<'_>) -> Result<()>,
}

/// Every case. SmolLM2-135M at 8 × 2048 tokens; a 15B model at 16,384.
pub const CASES: &[Case] = &[
    Case { name: "rms_norm", sizes: "16384 x 5120", run: |make| rms_norm(make, 16_384, 5120) },
    Case { name: "rope", sizes: "16384 x 32 heads of 128", run: |make| rope(make, 16_384, 32, 128) },
    Case { name: "swiglu", sizes: "16384 x 14336", run: |make| swiglu(make, 16_384, 14_336) },
    Case { name: "causal_conv1d", sizes: "1 x 16384 x 4096", run: |make| causal_conv1d(make, 1, 16_384, 4096) },
    Case { name: "embedding", sizes: "16384 of 131072 x 5120", run: |make| embedding(make, 16_384, 131_072, 5120) },
    Case { name: "divergence", sizes: "4096 x 131072", run: |make| divergence(make, 4096, 131_072) },
    Case { name: "cross_entropy", sizes: "4096 x 131072", run: |make| cross_entropy(make, 4096, 131_072) },
    Case {
        name: "head_loss",
        sizes: "16384 x 5120 x 131072, reverse KL",
        run: |make| head_loss(make, 16_384, 5120, 131_072),
    },
    Case {
        name: "head_products",
        sizes: "16384 x 5120 x 131072, its four products",
        run: |make| head_products(make, 16_384, 5120, 131_072),
    },
    Case {
        name: "head_loss_8192",
        sizes: "8192 x 5120 x 131072, reverse KL",
        run: |make| head_loss(make, 8192, 5120, 131_072),
    },
    Case {
        name: "head_products_8192",
        sizes: "8192 x 5120 x 131072, its four products",
        run: |make| head_products(make, 8192, 5120, 131_072),
    },
    Case {
        name: "head_loss_smollm2",
        sizes: "16384 x 576 x 49152, reverse KL",
        run: |make| head_loss(make, 16_384, 576, 49_152),
    },
    Case {
        name: "head_products_smollm2",
        sizes: "16384 x 576 x 49152, its four products",
        run: |make| head_products(make, 16_384, 576, 49_152),
    },
    Case {
        name: "selective_scan",
        sizes: "1 x 16384 x 4096, 16 states, 256 groups",
        run: |make| selective_scan(make, 1, 16_384, 4096, 256),
    },
    Case {
        name: "selective_scan_batch",
        sizes: "64 x 1024 x 4096, 16 states, 256 groups",
        run: |make| selective_scan(make, 64, 1024, 4096, 256),
    },
    Case {
        name: "selective_scan_smollm2",
        sizes: "8 x 2048 x 576, 16 states, 36 groups",
        run: |make| selective_scan(make, 8, 2048, 576, 36),
    },
    Case {
        name: "attention",
        sizes: "1 x 16384, 32 query and 8 key heads of 128",
        run: |make| attention(make, 1, 16_384, 32, 8, 128),
    },
    Case {
        name: "attention_smollm2",
        sizes: "8 x 2048, 9 query and 3 key heads of 64",
        run: |make| attention(make, 8, 2048, 9, 3, 64),
    },
    Case { name: "linear", sizes: "8192 x 5120 x 14336", run: |make| linear(make, 8192, 5120, 14_336) },
    Case { name: "linear_smollm2", sizes: "16384 x 576 x 1536", run: |make| linear(make, 16_384, 576, 1536) },
    Case { name: "linear_row", sizes: "1 x 5120 x 14336, forward", run: |make| few_rows(make, 1, 5120, 14_336) },
    Case { name: "linear_row_square", sizes: "1 x 5120 x 5120, forward", run: |make| few_rows(make, 1, 5120, 5120) },
    Case { name: "linear_row_head", sizes: "1 x 5120 x 131072, forward", run: |make| few_rows(make, 1, 5120, 131_072) },
    Case { name: "linear_64_rows", sizes: "64 x 5120 x 14336, forward", run: |make| few_rows(make, 64, 5120, 14_336) },
    Case { name: "mamba_step", sizes: "1 x 4096, 16 states", run: |make| mamba_step(make, 1) },
    Case { name: "mamba_step_32", sizes: "32 x 4096, 16 states", run: |make| mamba_step(make, 32) },
    Case { name: "mamba_step_64", sizes: "64 x 4096, 16 states", run: |make| mamba_step(make, 64) },
    Case { name: "linear_head_smollm2", sizes: "16384 x 576 x 49152", run: |make| linear(make, 16_384, 576, 49_152) },
];

/// Cases whose kernels' time is compared with that of others: (case, the other).
pub const BESIDE: &[(&str, &str)] = &[
    ("head_loss", "head_products"),
    ("head_loss_8192", "head_products_8192"),
    ("head_loss_smollm2", "head_products_smollm2"),
];

/// Runs a case once, forward and backward, in `dtype`.
///
/// # Errors
/// Those of the operator; out of memory.
pub fn run_case(case: &Case, device: &Device, dtype: DType) -> Result<()> {
    (case.run)(&Inputs { device, dtype })
}

/// Makes inputs whose values mean nothing but stay in range.
struct Inputs<'a> {
    device: &'a Device,
    dtype: DType,
}

impl Inputs<'_> {
    fn tensor(&self, shape: &[usize], value: f32) -> Result<Tensor> {
        Ok(Tensor::filled(self.device, shape, self.dtype, value)?)
    }

    fn f32(&self, shape: &[usize], value: f32) -> Result<Tensor> {
        Ok(Tensor::filled(self.device, shape, DType::F32, value)?)
    }

    fn indices(&self, shape: &[usize], below: usize) -> Result<Tensor> {
        let count: usize = shape.iter().product();
        let values: Vec<u32> = (0..count as u64).map(|at| (at * 2_654_435_761 % below as u64) as u32).collect();
        Ok(Tensor::from_slice(self.device, shape, &values)?)
    }

    /// Writes so much that nothing made before is left in a GPU's cache.
    fn empty_cache(&self) -> Result<()> {
        self.f32(&[64 << 20], 1.0).map(drop)
    }

    /// Runs an operator on leaves and walks back from its output with a gradient of ones.
    fn both_ways(
        &self,
        inputs: Vec<Tensor>,
        operator: impl Fn(&Tape<'_>, &[Var]) -> autograd::Result<Var>,
    ) -> Result<()> {
        let tape = Tape::new();
        let leaves: Vec<Var> = inputs.iter().map(|input| tape.leaf(input)).collect();
        let output = operator(&tape, &leaves)?;
        let seed = Tensor::filled(self.device, output.shape(), output.dtype(), 0.01)?;
        tape.backward_from(vec![(output, seed)])?;
        Ok(())
    }
}

fn rms_norm(make: &Inputs<'_>, rows: usize, width: usize) -> Result<()> {
    let inputs = vec![make.tensor(&[rows, width], 0.7)?, make.f32(&[width], 1.1)?];
    make.both_ways(inputs, |tape, inputs| ops::rms_norm(tape, &inputs[0], &inputs[1], 1e-5))
}

fn rope(make: &Inputs<'_>, time: usize, heads: usize, size: usize) -> Result<()> {
    let positions = make.indices(&[1, time], time)?;
    let table = RotaryTable::new(size, 1e4, RotaryScaling::None)?;
    let inputs = vec![make.tensor(&[1, time, heads, size], 0.7)?];
    make.both_ways(inputs, |tape, inputs| ops::rope(tape, &inputs[0], &positions, &table))
}

fn swiglu(make: &Inputs<'_>, rows: usize, width: usize) -> Result<()> {
    let inputs = vec![make.tensor(&[rows, width], 0.7)?, make.tensor(&[rows, width], -0.3)?];
    make.both_ways(inputs, |tape, inputs| ops::swiglu(tape, &inputs[0], &inputs[1]))
}

fn causal_conv1d(make: &Inputs<'_>, batch: usize, time: usize, channels: usize) -> Result<()> {
    let inputs =
        vec![make.tensor(&[batch, time, channels], 0.7)?, make.f32(&[channels, 4], 0.3)?, make.f32(&[channels], 0.1)?];
    make.both_ways(inputs, |tape, inputs| {
        let options = ConvolutionOptions { activation: Activation::Silu, document_start: None, initial_state: None };
        ops::causal_conv1d(tape, &inputs[0], &inputs[1], Some(&inputs[2]), options)
    })
}

fn embedding(make: &Inputs<'_>, tokens: usize, vocabulary: usize, width: usize) -> Result<()> {
    let ids = make.indices(&[1, tokens], vocabulary)?;
    let inputs = vec![make.tensor(&[vocabulary, width], 0.7)?];
    make.both_ways(inputs, |tape, inputs| ops::embedding(tape, &ids, &inputs[0], make.dtype))
}

fn divergence(make: &Inputs<'_>, rows: usize, vocabulary: usize) -> Result<()> {
    let teacher = make.tensor(&[rows, vocabulary], 0.2)?;
    make.both_ways(vec![make.tensor(&[rows, vocabulary], 0.7)?], |tape, inputs| {
        let options = DivergenceOptions {
            divergence: Divergence::ReverseKl,
            student_temperature: 1.0,
            teacher_temperature: 1.0,
            mask: None,
            denominator: rows as f32,
        };
        Ok(ops::divergence(tape, &inputs[0], &teacher, options)?.loss)
    })
}

fn cross_entropy(make: &Inputs<'_>, rows: usize, vocabulary: usize) -> Result<()> {
    let labels = make.indices(&[rows], vocabulary)?;
    make.both_ways(vec![make.tensor(&[rows, vocabulary], 0.7)?], |tape, inputs| {
        Ok(ops::cross_entropy(tape, &inputs[0], &labels, rows as f32)?.loss)
    })
}

fn head_loss(make: &Inputs<'_>, rows: usize, width: usize, vocabulary: usize) -> Result<()> {
    let (hidden, head) = (make.tensor(&[rows, width], 0.1)?, make.tensor(&[vocabulary, width], 0.02)?);
    let inputs = vec![make.tensor(&[rows, width], 0.2)?, make.tensor(&[vocabulary, width], 0.01)?];
    let tape = Tape::new();
    let leaves: Vec<Var> = inputs.iter().map(|input| tape.leaf(input)).collect();
    let options = DivergenceOptions {
        divergence: Divergence::ReverseKl,
        student_temperature: 1.0,
        teacher_temperature: 1.0,
        mask: None,
        denominator: rows as f32,
    };
    let teacher = HeadTeacher { hidden: &hidden, head: &head, options, weight: 1.0 };
    let loss = ops::head_loss(&tape, &leaves[0], &leaves[1], Some(teacher), None)?.loss;
    tape.backward(&loss)?;
    Ok(())
}

/// The products that [`head_loss`] takes, of all tokens at once: both models' logits and the two gradients.
fn head_products(make: &Inputs<'_>, rows: usize, width: usize, vocabulary: usize) -> Result<()> {
    let (hidden, head) = (make.tensor(&[rows, width], 0.1)?, make.tensor(&[vocabulary, width], 0.02)?);
    let tape = Tape::inference();
    drop(ops::linear(&tape, &Var::constant(&hidden), &Var::constant(&head), None)?);
    make.both_ways(vec![hidden, head], |tape, inputs| ops::linear(tape, &inputs[0], &inputs[1], None))
}

fn selective_scan(make: &Inputs<'_>, batch: usize, time: usize, channels: usize, groups: usize) -> Result<()> {
    const STATES: usize = 16;
    let sequence = [batch, time, channels];
    let inputs = vec![
        make.tensor(&sequence, 0.7)?,
        make.tensor(&sequence, -2.0)?,
        make.f32(&[channels, STATES], -1.0)?,
        make.tensor(&[batch, time, groups, STATES], 0.5)?,
        make.tensor(&[batch, time, groups, STATES], 0.4)?,
        make.f32(&[channels], 1.0)?,
        make.tensor(&sequence, 0.3)?,
        make.f32(&[channels], -1.0)?,
    ];
    make.both_ways(inputs, |tape, inputs| {
        let scan = ops::selective_scan(
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
                initial_state: None,
                document_start: None,
            },
        )?;
        Ok(scan.output)
    })
}

fn attention(make: &Inputs<'_>, batch: usize, time: usize, heads: usize, key_heads: usize, size: usize) -> Result<()> {
    let inputs = vec![
        make.tensor(&[batch, time, heads, size], 0.3)?,
        make.tensor(&[batch, time, key_heads, size], 0.2)?,
        make.tensor(&[batch, time, key_heads, size], 0.7)?,
    ];
    make.both_ways(inputs, |tape, inputs| {
        let options = AttentionOptions { scale: (size as f32).powf(-0.5), document_start: None, window: None };
        ops::attention(tape, &inputs[0], &inputs[1], &inputs[2], options)
    })
}

fn linear(make: &Inputs<'_>, rows: usize, inner: usize, outer: usize) -> Result<()> {
    let inputs = vec![make.tensor(&[rows, inner], 0.3)?, make.tensor(&[outer, inner], 0.02)?];
    make.both_ways(inputs, |tape, inputs| ops::linear(tape, &inputs[0], &inputs[1], None))
}

/// A product of few rows as decoding has it: without a way back.
fn few_rows(make: &Inputs<'_>, rows: usize, inner: usize, outer: usize) -> Result<()> {
    let input = Var::constant(&make.tensor(&[rows, inner], 0.3)?);
    let weight = Var::constant(&make.tensor(&[outer, inner], 0.02)?);
    make.empty_cache()?;
    ops::linear(&Tape::inference(), &input, &weight, None)?;
    Ok(())
}

/// The decoding step of a 15B hybrid's Mamba mixer.
fn mamba_step(make: &Inputs<'_>, batch: usize) -> Result<()> {
    const CHANNELS: usize = 4096;
    const XB: usize = 1024;
    const STATES: usize = 16;
    const TAPS: usize = 4;
    let projected = make.tensor(&[batch, 2 * (CHANNELS + XB)], 0.3)?;
    let delta = make.tensor(&[batch, CHANNELS], -2.0)?;
    let (conv_weight, conv_bias) = (make.f32(&[CHANNELS, TAPS], 0.3)?, make.f32(&[CHANNELS], 0.1)?);
    let (a_log, d) = (make.f32(&[CHANNELS, STATES], 0.5)?, make.f32(&[CHANNELS], 1.0)?);
    let delta_bias = make.f32(&[CHANNELS], -1.0)?;
    let (mut window, mut state) =
        (make.f32(&[batch, CHANNELS, TAPS], 0.2)?, make.f32(&[batch, CHANNELS, STATES], 0.1)?);
    make.empty_cache()?;
    let inputs = MambaStepInputs {
        projected: &projected,
        delta: &delta,
        conv_weight: &conv_weight,
        conv_bias: Some(&conv_bias),
        a_log: &a_log,
        d: &d,
        delta_bias: Some(&delta_bias),
    };
    ops::mamba_step(&mut window, &mut state, inputs)?;
    Ok(())
}
