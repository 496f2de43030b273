//! The lines of the table of operators: what is measured at which sizes, what is asked, what others reach.
//!
//! To add a line: add it to [`lines`], with the sizes of the models that need it, and write the function that it names. That function
//! makes the inputs ([`Inputs`]), counts the bytes that a call of the operator must move (each input read once, each result
//! written once) and the operations of its matrix products, and gives a closure that runs a repeat, of one or several calls, the
//! timed part within [`Stopwatch::time`]. [`forward`], [`backward`], [`both_ways`], [`in_a_row`] and [`rotating`] do that for the
//! usual cases. Sizes go through [`Inputs::size`], so that `every_line_runs_on_the_simulator` can run the line with small ones.

use std::cell::{Cell, OnceCell};

use anyhow::Result;
use autograd::ops::{
    self, Activation, AttentionOptions, ConvolutionOptions, Divergence, DivergenceOptions, HeadTeacher,
    MambaStepInputs, RotaryScaling, RotaryTable, ScanInputs, ScanWay, TeacherSource,
};
use autograd::optimizer::{AdamW, AdamWOptions, gradient_square_sum};
use autograd::{DType, Gradients, Parameter, Parameters, Tape, Tensor, Var};
use runtime::{Device, DeviceKind};

use super::table::{Goal, Peer, Stopwatch};

/// An operator with the sizes of one use of it.
pub struct Line {
    /// What `profile operator` calls it.
    pub name: &'static str,
    /// The sizes, for people.
    pub sizes: &'static str,
    /// What is asked, all of it.
    pub goals: Vec<Goal>,
    /// What others reach.
    pub peer: Option<Peer>,
    /// Makes the inputs.
    pub prepare: fn(&Inputs<'_>) -> Result<Prepared>,
}

impl Line {
    fn new(name: &'static str, sizes: &'static str, prepare: fn(&Inputs<'_>) -> Result<Prepared>) -> Self {
        Self { name, sizes, goals: Vec::new(), peer: None, prepare }
    }

    fn asked(mut self, goal: Goal) -> Self {
        self.goals.push(goal);
        self
    }

    fn peer(mut self, name: &str, milliseconds: f64) -> Self {
        self.peer = Some(Peer { name: name.to_owned(), milliseconds });
        self
    }
}

/// Every line: a 15B hybrid at 16,384 tokens (width 5120, 14,336 in the MLP, 131,072 tokens in the vocabulary), and
/// SmolLM2-135M at 8 × 2048.
pub fn lines() -> Vec<Line> {
    use Goal::{ExtraMemory, Milliseconds, OfCopy, TimesOf};
    const NEAR_COPY: Goal = OfCopy(0.88);
    let products = |of: &str| TimesOf(of.to_owned(), 1.12);
    vec![
        Line::new("selective_scan_forward", "1 x 16384 x 4096, 16 states", |make| {
            scan(make, [1, 16_384, 256], forward)
        })
        .asked(Milliseconds(0.5))
        .peer("mamba_ssm", 1.50),
        Line::new("selective_scan_forward_serial", "1 x 16384 x 4096, 16 states", |make| {
            scan_by(make, [1, 16_384, 256], forward, Some(ScanWay::Serial))
        }),
        Line::new("selective_scan_forward_spans", "1 x 16384 x 4096, 16 states", |make| {
            scan_by(make, [1, 16_384, 256], forward, Some(ScanWay::Spans))
        }),
        Line::new("selective_scan_backward", "1 x 16384 x 4096, 16 states", |make| {
            scan(make, [1, 16_384, 256], backward)
        })
        .asked(Milliseconds(1.6))
        .peer("mamba_ssm", 5.62),
        Line::new("selective_scan_backward_serial", "1 x 16384 x 4096, 16 states", |make| {
            scan_by(make, [1, 16_384, 256], backward, Some(ScanWay::Serial))
        }),
        Line::new("selective_scan_backward_spans", "1 x 16384 x 4096, 16 states", |make| {
            scan_by(make, [1, 16_384, 256], backward, Some(ScanWay::Spans))
        }),
        // Issue: the same ratios as at 16,384.
        Line::new("selective_scan_long_forward", "1 x 65536 x 4096, 16 states", |make| {
            scan(make, [1, 65_536, 256], forward)
        })
        .asked(Milliseconds(2.04))
        .peer("mamba_ssm", 6.12),
        Line::new("selective_scan_long_forward_serial", "1 x 65536 x 4096, 16 states", |make| {
            scan_by(make, [1, 65_536, 256], forward, Some(ScanWay::Serial))
        }),
        Line::new("selective_scan_long_forward_spans", "1 x 65536 x 4096, 16 states", |make| {
            scan_by(make, [1, 65_536, 256], forward, Some(ScanWay::Spans))
        }),
        Line::new("selective_scan_long_backward", "1 x 65536 x 4096, 16 states", |make| {
            scan(make, [1, 65_536, 256], backward)
        })
        .asked(Milliseconds(6.37))
        .peer("mamba_ssm", 22.37),
        Line::new("selective_scan_long_backward_serial", "1 x 65536 x 4096, 16 states", |make| {
            scan_by(make, [1, 65_536, 256], backward, Some(ScanWay::Serial))
        }),
        Line::new("selective_scan_long_backward_spans", "1 x 65536 x 4096, 16 states", |make| {
            scan_by(make, [1, 65_536, 256], backward, Some(ScanWay::Spans))
        }),
        Line::new("selective_scan_batch_forward", "64 x 1024 x 4096, 16 states", |make| {
            scan(make, [64, 1024, 256], forward)
        })
        .asked(Milliseconds(2.0))
        .peer("mamba_ssm", 4.71),
        Line::new("selective_scan_batch_forward_serial", "64 x 1024 x 4096, 16 states", |make| {
            scan_by(make, [64, 1024, 256], forward, Some(ScanWay::Serial))
        }),
        Line::new("selective_scan_batch_forward_spans", "64 x 1024 x 4096, 16 states", |make| {
            scan_by(make, [64, 1024, 256], forward, Some(ScanWay::Spans))
        }),
        Line::new("selective_scan_batch_backward", "64 x 1024 x 4096, 16 states", |make| {
            scan(make, [64, 1024, 256], backward)
        })
        .asked(Milliseconds(6.5))
        .peer("mamba_ssm", 20.3),
        Line::new("selective_scan_batch_backward_serial", "64 x 1024 x 4096, 16 states", |make| {
            scan_by(make, [64, 1024, 256], backward, Some(ScanWay::Serial))
        }),
        Line::new("selective_scan_batch_backward_spans", "64 x 1024 x 4096, 16 states", |make| {
            scan_by(make, [64, 1024, 256], backward, Some(ScanWay::Spans))
        }),
        Line::new("selective_scan_smollm2_forward", "8 x 2048 x 576, 16 states", |make| {
            scan(make, [8, 2048, 36], forward)
        })
        .asked(Milliseconds(0.08))
        .peer("mamba_ssm", 0.206),
        Line::new("selective_scan_smollm2_forward_serial", "8 x 2048 x 576, 16 states", |make| {
            scan_by(make, [8, 2048, 36], forward, Some(ScanWay::Serial))
        }),
        Line::new("selective_scan_smollm2_forward_spans", "8 x 2048 x 576, 16 states", |make| {
            scan_by(make, [8, 2048, 36], forward, Some(ScanWay::Spans))
        }),
        Line::new("selective_scan_smollm2_backward", "8 x 2048 x 576, 16 states", |make| {
            scan(make, [8, 2048, 36], backward)
        })
        .asked(Milliseconds(0.28))
        .peer("mamba_ssm", 0.825),
        Line::new("selective_scan_smollm2_backward_serial", "8 x 2048 x 576, 16 states", |make| {
            scan_by(make, [8, 2048, 36], backward, Some(ScanWay::Serial))
        }),
        Line::new("selective_scan_smollm2_backward_spans", "8 x 2048 x 576, 16 states", |make| {
            scan_by(make, [8, 2048, 36], backward, Some(ScanWay::Spans))
        }),
        Line::new("mamba_step", "1 x 4096, 16 states", |make| mamba_step(make, 1)),
        Line::new("mamba_step_32", "32 x 4096, 16 states", |make| mamba_step(make, 32)),
        Line::new("mamba_step_64", "64 x 4096, 16 states", |make| mamba_step(make, 64)).asked(OfCopy(0.8)),
        Line::new("rms_norm_forward", "16384 x 5120", |make| rms_norm(make, forward))
            .asked(NEAR_COPY)
            .peer("torch.compile", 0.255),
        Line::new("rms_norm_backward", "16384 x 5120", |make| rms_norm(make, backward)).asked(NEAR_COPY),
        Line::new("rms_norm_residual_forward", "16384 x 5120", |make| rms_norm_residual(make, false)).asked(NEAR_COPY),
        Line::new("rms_norm_residual_backward", "16384 x 5120", |make| rms_norm_residual(make, true)).asked(NEAR_COPY),
        Line::new("rope_forward", "16384 x 32 heads of 128", |make| rope(make, forward)).asked(NEAR_COPY),
        Line::new("rope_backward", "16384 x 32 heads of 128", |make| rope(make, backward)).asked(NEAR_COPY),
        Line::new("swiglu_forward", "16384 x 14336", |make| swiglu(make, forward))
            .asked(NEAR_COPY)
            .peer("torch.compile", 0.587),
        Line::new("swiglu_backward", "16384 x 14336", |make| swiglu(make, backward)).asked(NEAR_COPY),
        Line::new("causal_conv1d_forward", "1 x 16384 x 4096, SiLU", |make| conv1d(make, forward)).asked(NEAR_COPY),
        Line::new("causal_conv1d_backward", "1 x 16384 x 4096, SiLU", |make| conv1d(make, backward)).asked(NEAR_COPY),
        Line::new("embedding_forward", "16384 of 131072 x 5120", |make| {
            embedding(make, [16_384, 131_072, 5120], Ids::Uniform, forward)
        })
        .asked(NEAR_COPY),
        Line::new("embedding_backward", "16384 of 131072 x 5120", |make| {
            embedding(make, [16_384, 131_072, 5120], Ids::Uniform, backward)
        })
        .asked(NEAR_COPY),
        Line::new("embedding_zipf_backward", "16384 of 131072 x 5120, few ids most of them", |make| {
            embedding(make, [16_384, 131_072, 5120], Ids::Zipf, backward)
        }),
        Line::new("embedding_smollm2_backward", "16384 of 49152 x 576, few ids most of them", |make| {
            embedding(make, [16_384, 49_152, 576], Ids::Zipf, backward)
        }),
        Line::new("cast_to_bf16", "16384 x 5120, from f32", |make| cast(make, DType::F32, DType::Bf16))
            .asked(NEAR_COPY),
        Line::new("cast_to_f32", "16384 x 5120, from bf16", |make| cast(make, DType::Bf16, DType::F32))
            .asked(NEAR_COPY),
        Line::new("adamw", "two layers of 5120 and 14336, 18 tensors", |make| adamw(make, &LARGE, 2)).asked(NEAR_COPY),
        Line::new("adamw_smollm2", "30 layers of 576 and 1536, 270 tensors", |make| adamw(make, &SMOLLM2, 30))
            .asked(NEAR_COPY),
        Line::new("gradient_norm", "two layers of 5120 and 14336, 18 tensors", |make| gradient_norm(make, &LARGE, 2))
            .asked(NEAR_COPY),
        Line::new("gradient_norm_smollm2", "30 layers of 576 and 1536, 270 tensors", |make| {
            gradient_norm(make, &SMOLLM2, 30)
        })
        .asked(NEAR_COPY),
        Line::new("divergence", "4096 x 131072, with gradient", divergence)
            .asked(Milliseconds(1.4))
            .peer("torch.compile", 5.44),
        Line::new("cross_entropy", "4096 x 131072, with gradient", cross_entropy),
        Line::new("head_products_8192", "4 products of 8192 x 5120 x 131072", |make| {
            head_products(make, [8192, 5120, 131_072])
        }),
        Line::new("head_loss_8192", "8192 x 5120 x 131072, reverse KL", |make| head_loss(make, [8192, 5120, 131_072]))
            .asked(products("head_products_8192"))
            .asked(ExtraMemory(1 << 30))
            .peer("torch.compile, chunked", 85.3),
        Line::new("head_products", "4 products of 16384 x 5120 x 131072", |make| {
            head_products(make, [16_384, 5120, 131_072])
        }),
        Line::new("head_loss", "16384 x 5120 x 131072, reverse KL", |make| head_loss(make, [16_384, 5120, 131_072]))
            .asked(products("head_products"))
            .asked(ExtraMemory(1 << 30)),
        Line::new("head_products_smollm2", "4 products of 16384 x 576 x 49152", |make| {
            head_products(make, [16_384, 576, 49_152])
        }),
        Line::new("head_loss_smollm2", "16384 x 576 x 49152, reverse KL", |make| {
            head_loss(make, [16_384, 576, 49_152])
        })
        .asked(products("head_products_smollm2")),
        Line::new("attention_forward", "1 x 16384, 32/8 heads of 128", |make| {
            attention(make, [1, 16_384, 32, 8, 128], forward)
        })
        .peer("cuDNN", 3.40),
        Line::new("attention_backward", "1 x 16384, 32/8 heads of 128", |make| {
            attention(make, [1, 16_384, 32, 8, 128], backward)
        })
        .peer("cuDNN", 10.7),
        Line::new("attention_smollm2_forward", "8 x 2048, 9/3 heads of 64", |make| {
            attention(make, [8, 2048, 9, 3, 64], forward)
        })
        .peer("cuDNN", 0.154),
        Line::new("attention_smollm2_backward", "8 x 2048, 9/3 heads of 64", |make| {
            attention(make, [8, 2048, 9, 3, 64], backward)
        })
        .peer("cuDNN", 0.375),
        Line::new("linear_forward", "16384 x 5120 x 14336", |make| linear(make, [16_384, 5120, 14_336], forward))
            .peer("cuBLAS", 3.47),
        Line::new("linear_backward", "16384 x 5120 x 14336", |make| linear(make, [16_384, 5120, 14_336], backward))
            .peer("cuBLAS", 6.38),
        Line::new("linear_smollm2_forward", "16384 x 576 x 1536", |make| linear(make, [16_384, 576, 1536], forward)),
        Line::new("linear_smollm2_backward", "16384 x 576 x 1536", |make| linear(make, [16_384, 576, 1536], backward)),
        Line::new("linear_head_smollm2_forward", "16384 x 576 x 49152", |make| {
            linear(make, [16_384, 576, 49_152], forward)
        }),
        Line::new("linear_head_smollm2_backward", "16384 x 576 x 49152", |make| {
            linear(make, [16_384, 576, 49_152], backward)
        }),
        Line::new("linear_row", "1 x 5120 x 14336", |make| few_rows(make, 1, 5120, 14_336)),
        Line::new("linear_row_square", "1 x 5120 x 5120", |make| few_rows(make, 1, 5120, 5120)),
        Line::new("linear_row_head", "1 x 5120 x 131072", |make| few_rows(make, 1, 5120, 131_072)),
        Line::new("linear_64_rows", "64 x 5120 x 14336", |make| few_rows(make, 64, 5120, 14_336)),
    ]
}

/// An operator with its inputs, ready to run.
pub struct Prepared {
    /// Bytes that a call must move at least.
    pub bytes: u64,
    /// Operations of a call's matrix products.
    pub operations: u64,
    /// How often the timed part calls the operator (on other buffers each time): more than once where it is too short to be
    /// timed by itself.
    pub calls: usize,
    /// Runs a repeat.
    pub run: Run,
}

/// Runs a repeat: all its calls, the timed part within [`Stopwatch::time`].
type Run = Box<dyn FnMut(&mut Stopwatch) -> Result<()>>;

/// Makes inputs: normally distributed numbers, since a GPU's clocks depend on what it computes with.
pub struct Inputs<'a> {
    device: &'a Device,
    dtype: DType,
    /// What sizes are cut down to, for tests.
    limit: usize,
    noise: Cell<u64>,
    /// Noise of which all tensors are made, and the same on the device as rows.
    values: OnceCell<Vec<f32>>,
    rows: OnceCell<Tensor>,
}

/// Elements of a row of noise, and how many rows there are.
const ROW: usize = 4096;
const ROWS: usize = 256;

impl<'a> Inputs<'a> {
    /// Inputs with activations of a type. Sizes beyond `limit` are cut down to it.
    pub fn new(device: &'a Device, dtype: DType, limit: usize) -> Self {
        Self { device, dtype, limit, noise: Cell::new(1), values: OnceCell::new(), rows: OnceCell::new() }
    }

    /// The device.
    pub fn device(&self) -> &'a Device {
        self.device
    }

    /// A size of the problem.
    fn size(&self, wanted: usize) -> usize {
        wanted.min(self.limit)
    }

    /// Uniform in 0..1.
    fn uniform(&self) -> f64 {
        self.noise
            .set(self.noise.get().wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407));
        (self.noise.get() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Nearly normally distributed, with variance 1.
    fn normal(&self) -> f32 {
        ((0..12).map(|_| self.uniform()).sum::<f64>() - 6.0) as f32
    }

    fn random(&self, shape: &[usize], dtype: DType, deviation: f32) -> Result<Tensor> {
        let count: usize = shape.iter().product();
        let values = self.values.get_or_init(|| (0..ROW * ROWS).map(|_| self.normal()).collect());
        if !count.is_multiple_of(ROW) || count < values.len() {
            let start = (self.uniform() * values.len() as f64) as usize;
            let values: Vec<f32> =
                values.iter().cycle().skip(start).take(count).map(|value| deviation * value).collect();
            return Ok(Tensor::from_slice(self.device, shape, &values)?.cast(dtype)?);
        }
        let rows = match self.rows.get() {
            Some(rows) => rows,
            None => {
                let rows = Tensor::from_slice(self.device, &[ROWS, ROW], values)?;
                self.rows.get_or_init(|| rows)
            }
        };
        let tape = Tape::inference();
        let scaled = ops::scale(&tape, &Var::constant(rows), deviation)?;
        let which = self.indices(&[1, count / ROW], ROWS)?;
        Ok(ops::embedding(&tape, &which, &scaled, dtype)?.tensor().reshape(shape)?)
    }

    fn tensor(&self, shape: &[usize], deviation: f32) -> Result<Tensor> {
        self.random(shape, self.dtype, deviation)
    }

    fn filled(&self, shape: &[usize], value: f32) -> Result<Tensor> {
        Ok(Tensor::filled(self.device, shape, DType::F32, value)?)
    }

    fn indices(&self, shape: &[usize], below: usize) -> Result<Tensor> {
        let values: Vec<u32> = (0..shape.iter().product()).map(|_| (self.uniform() * below as f64) as u32).collect();
        Ok(Tensor::from_slice(self.device, shape, &values)?)
    }
}

/// An operator of some inputs.
type Operator = Box<dyn Fn(&Tape<'_>, &[Var]) -> Result<Var>>;
/// Makes a set of its inputs.
type MakeSet<'a> = &'a dyn Fn() -> Result<Vec<Tensor>>;
/// What of an operator is measured: what makes its inputs, itself, and bytes and operations of its forward and of its backward
/// pass.
type Way = fn(&Inputs<'_>, MakeSet<'_>, Operator, [Cost; 2]) -> Result<Prepared>;

/// What a pass must do at least.
#[derive(Clone, Copy, Default)]
struct Cost {
    bytes: usize,
    operations: usize,
}

/// So many elements of two bytes each, that is, of activations in bf16.
fn elements(count: usize) -> Cost {
    Cost { bytes: 2 * count, operations: 0 }
}

/// The forward pass, with what it saves for the backward pass.
fn forward(make: &Inputs<'_>, set: MakeSet<'_>, operator: Operator, [cost, _]: [Cost; 2]) -> Result<Prepared> {
    in_a_row(make, cost, set, move |sets, watch| {
        let tape = Tape::new();
        let sets: Vec<Vec<Var>> = sets.iter().map(|inputs| leaves(&tape, inputs)).collect();
        watch.time(|| sets.iter().map(|inputs| operator(&tape, inputs)).collect::<Result<Vec<Var>>>())?;
        Ok(())
    })
}

/// The backward pass.
fn backward(make: &Inputs<'_>, set: MakeSet<'_>, operator: Operator, [_, cost]: [Cost; 2]) -> Result<Prepared> {
    let mut seeds = Vec::new();
    in_a_row(make, cost, set, move |sets, watch| {
        seeds.resize(sets.len(), None);
        let mut tapes = Vec::new();
        for (inputs, seed) in sets.iter().zip(&mut seeds) {
            let tape = Tape::new();
            let output = operator(&tape, &leaves(&tape, inputs))?;
            let seed = seed_like(seed, &output)?;
            tapes.push((tape, vec![(output, seed)]));
        }
        watch.time(|| {
            tapes.into_iter().map(|(tape, seeds)| Ok(tape.backward_from(seeds)?)).collect::<Result<Vec<_>>>()
        })?;
        Ok(())
    })
}

/// Bytes that the calls of a repeat move together, unless as many as there may be move less or a single one more: many times what the
/// L2 cache holds, whose unwritten lines are then a small part of them.
const TOGETHER: usize = 2 << 30;

/// Gives `run` as many sets of inputs as an operator of this cost is to be called with, one after the other. A single call of a
/// tenth of a millisecond would be timed together with the events around it, and with the lines that what ran before left in the L2
/// cache to be written: together a few per cent. In a row, all but the first find what they leave themselves, and begin where the one
/// before ends, as in a step.
fn in_a_row<S: 'static>(
    make: &Inputs<'_>,
    cost: Cost,
    set: impl Fn() -> Result<S>,
    mut run: impl FnMut(&[S], &mut Stopwatch) -> Result<()> + 'static,
) -> Result<Prepared> {
    let calls = calls_in_a_row(cost);
    // Elsewhere no times are of interest.
    let calls = if matches!(make.device.kind(), DeviceKind::Cuda(_)) { calls } else { calls.min(2) };
    let sets = (0..calls).map(|_| set()).collect::<Result<Vec<S>>>()?;
    let prepared = prepared(cost, move |watch| run(&sets, watch));
    Ok(Prepared { calls, ..prepared })
}

fn calls_in_a_row(cost: Cost) -> usize {
    const MOST: usize = 8;
    /// Matrix products of so many operations take a quarter of a millisecond, long enough for one call.
    const LONG: usize = 100_000_000_000;
    if cost.operations > LONG { 1 } else { (TOGETHER / cost.bytes.max(1)).clamp(1, MOST) }
}

fn leaves(tape: &Tape<'_>, inputs: &[Tensor]) -> Vec<Var> {
    inputs.iter().map(|input| tape.leaf(input)).collect()
}

/// Both passes, for operators that compute their gradient with their result.
fn both_ways(inputs: Vec<Tensor>, operator: Operator, costs: [Cost; 2]) -> Prepared {
    let mut seed = None;
    let cost = Cost { bytes: costs[0].bytes + costs[1].bytes, operations: costs[0].operations + costs[1].operations };
    prepared(cost, move |watch| {
        let tape = Tape::new();
        let leaves = leaves(&tape, &inputs);
        if seed.is_none() {
            seed_like(&mut seed, &operator(&Tape::inference(), &leaves)?)?;
        }
        watch.time(|| {
            let output = operator(&tape, &leaves)?;
            let seed = seed_like(&mut seed, &output)?;
            Ok(tape.backward_from(vec![(output, seed)])?)
        })?;
        Ok(())
    })
}

/// A gradient for a result, made once: of ones for a scalar, random otherwise.
fn seed_like(seed: &mut Option<Tensor>, output: &Var) -> Result<Tensor> {
    let made = match seed.take() {
        Some(made) => made,
        None if output.count() == 1 => Tensor::filled(output.device(), output.shape(), output.dtype(), 1.0)?,
        None => Inputs::new(output.device(), output.dtype(), usize::MAX).tensor(output.shape(), 0.1)?,
    };
    Ok(seed.insert(made).clone())
}

/// A call of a short operator.
type Call = Box<dyn FnMut() -> Result<Tensor>>;

/// A short operator, run on one set of buffers after the other: so many that no call finds its own in the L2 cache. On a GPU
/// the calls are captured in a graph, as decoding does.
fn rotating(make: &Inputs<'_>, bytes: usize, mut set: impl FnMut() -> Result<Call>) -> Result<Prepared> {
    const MOST: usize = 128;
    let calls = make.size(TOGETHER.div_ceil(bytes).clamp(2, MOST)).min(MOST);
    let mut sets = (0..calls).map(|_| set()).collect::<Result<Vec<_>>>()?;
    let device = make.device().clone();
    let mut graph = None;
    let mut prepared = prepared(Cost { bytes, operations: 0 }, move |watch| {
        let mut all = || sets.iter_mut().map(|run| run()).collect::<Result<Vec<Tensor>>>();
        if watch.takes_graphs() && graph.is_none() {
            all()?;
            graph = Some(device.capture(&mut all)?);
        }
        watch.time(|| match &graph {
            Some((graph, _)) => Ok(graph.replay()?),
            None => all().map(drop),
        })
    });
    prepared.calls = calls;
    Ok(prepared)
}

fn prepared(cost: Cost, run: impl FnMut(&mut Stopwatch) -> Result<()> + 'static) -> Prepared {
    Prepared { bytes: cost.bytes as u64, operations: cost.operations as u64, calls: 1, run: Box::new(run) }
}

/// Reads u, delta, z, B and C; backward the gradient as well, and writes one of each.
fn scan(make: &Inputs<'_>, sizes: [usize; 3], way: Way) -> Result<Prepared> {
    scan_by(make, sizes, way, None)
}

/// As [`scan`], by a given way, or the one that the operator chooses.
fn scan_by(
    make: &Inputs<'_>,
    [batch, time, groups]: [usize; 3],
    way: Way,
    scan_way: Option<ScanWay>,
) -> Result<Prepared> {
    const STATES: usize = 16;
    let [batch, time, groups] = [batch, time, groups].map(|size| make.size(size));
    let channels = groups * STATES;
    let sequence = [batch, time, channels];
    let grouped = [batch, time, groups, STATES];
    let inputs = || {
        Ok(vec![
            make.tensor(&sequence, 1.0)?,
            make.tensor(&sequence, 0.5)?,
            make.filled(&[channels, STATES], -1.0)?,
            make.tensor(&grouped, 0.5)?,
            make.tensor(&grouped, 0.5)?,
            make.filled(&[channels], 1.0)?,
            make.tensor(&sequence, 1.0)?,
            make.filled(&[channels], -3.0)?,
        ])
    };
    let operator: Operator = Box::new(move |tape, inputs| {
        let inputs = ScanInputs {
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
        };
        let scan = match scan_way {
            Some(scan_way) => ops::selective_scan_by(tape, inputs, scan_way)?,
            None => ops::selective_scan(tape, inputs)?,
        };
        Ok(scan.output)
    });
    let size = batch * time * channels;
    way(make, &inputs, operator, [elements(6 * size), elements(11 * size)])
}

/// The decoding step of a 15B hybrid's Mamba mixer: convolution's window and state are read and written.
fn mamba_step(make: &Inputs<'_>, batch: usize) -> Result<Prepared> {
    const STATES: usize = 16;
    const TAPS: usize = 4;
    let (batch, channels) = (make.size(batch), STATES * make.size(256));
    let xb = channels / 4;
    let set = || -> Result<Call> {
        let projected = make.tensor(&[batch, 2 * (channels + xb)], 0.5)?;
        let delta = make.tensor(&[batch, channels], 0.5)?;
        let (conv_weight, conv_bias) = (make.filled(&[channels, TAPS], 0.3)?, make.filled(&[channels], 0.1)?);
        let (a_log, d) = (make.filled(&[channels, STATES], 0.5)?, make.filled(&[channels], 1.0)?);
        let delta_bias = make.filled(&[channels], -3.0)?;
        let mut window = make.filled(&[batch, channels, TAPS], 0.2)?;
        let mut state = make.filled(&[batch, channels, STATES], 0.1)?;
        Ok(Box::new(move || {
            let inputs = MambaStepInputs {
                projected: &projected,
                delta: &delta,
                conv_weight: &conv_weight,
                conv_bias: Some(&conv_bias),
                a_log: &a_log,
                d: &d,
                delta_bias: Some(&delta_bias),
            };
            Ok(ops::mamba_step(&mut window, &mut state, inputs)?)
        }))
    };
    let carried = 2 * 4 * batch * channels * (TAPS + STATES);
    let activations = 2 * batch * (2 * (channels + xb) + 2 * channels);
    let weights = 4 * channels * (TAPS + STATES + 3);
    rotating(make, carried + activations + weights, set)
}

fn rms_norm(make: &Inputs<'_>, way: Way) -> Result<Prepared> {
    let (rows, width) = (make.size(16_384), make.size(5120));
    let inputs = || Ok(vec![make.tensor(&[rows, width], 1.0)?, make.filled(&[width], 1.1)?]);
    let operator: Operator = Box::new(|tape, inputs| Ok(ops::rms_norm(tape, &inputs[0], &inputs[1], 1e-5)?));
    way(make, &inputs, operator, [elements(2 * rows * width), elements(3 * rows * width)])
}

/// With the sum of a residual stream and a branch: forward reads both and writes the sum and its norm, backward reads the sum
/// and two gradients and writes one, which is that of both.
fn rms_norm_residual(make: &Inputs<'_>, backward: bool) -> Result<Prepared> {
    let (rows, width) = (make.size(16_384), make.size(5120));
    let random = || make.tensor(&[rows, width], 1.0);
    let set = || Ok(([random()?, random()?, make.filled(&[width], 1.1)?], [random()?, random()?]));
    in_a_row(make, elements(4 * rows * width), set, move |sets, watch| {
        let tapes: Vec<Tape<'_>> = sets.iter().map(|_| Tape::new()).collect();
        let forward = |(tape, (inputs, _)): (&Tape<'_>, &([Tensor; 3], [Tensor; 2]))| {
            let [input, branch, weight] = inputs.each_ref().map(|input| tape.leaf(input));
            Ok(ops::rms_norm_residual(tape, &input, &branch, &weight, 1e-5)?)
        };
        let all = || tapes.iter().zip(sets).map(forward).collect::<Result<Vec<(Var, Var)>>>();
        if !backward {
            return watch.time(all).map(drop);
        }
        let with_seeds = |((normed, sum), (_, seeds)): ((Var, Var), &(_, [Tensor; 2]))| {
            [normed, sum].into_iter().zip(seeds.iter().cloned()).collect()
        };
        let outputs: Vec<Vec<(Var, Tensor)>> = all()?.into_iter().zip(sets).map(with_seeds).collect();
        watch.time(|| {
            let each = tapes.into_iter().zip(outputs);
            each.map(|(tape, outputs)| Ok(tape.backward_from(outputs)?)).collect::<Result<Vec<_>>>()
        })?;
        Ok(())
    })
}

fn rope(make: &Inputs<'_>, way: Way) -> Result<Prepared> {
    let (time, heads, size) = (make.size(16_384), make.size(32), make.size(128));
    let positions: Vec<u32> = (0..time as u32).collect();
    let positions = Tensor::from_slice(make.device, &[1, time], &positions)?;
    let table = RotaryTable::new(size, 1e4, RotaryScaling::None)?;
    let inputs = || Ok(vec![make.tensor(&[1, time, heads, size], 1.0)?]);
    let operator: Operator = Box::new(move |tape, inputs| Ok(ops::rope(tape, &inputs[0], &positions, &table)?));
    way(make, &inputs, operator, [elements(2 * time * heads * size); 2])
}

fn swiglu(make: &Inputs<'_>, way: Way) -> Result<Prepared> {
    let shape = [make.size(16_384), make.size(14_336)];
    let inputs = || Ok(vec![make.tensor(&shape, 1.0)?, make.tensor(&shape, 1.0)?]);
    let operator: Operator = Box::new(|tape, inputs| Ok(ops::swiglu(tape, &inputs[0], &inputs[1])?));
    let count = shape[0] * shape[1];
    way(make, &inputs, operator, [elements(3 * count), elements(5 * count)])
}

fn conv1d(make: &Inputs<'_>, way: Way) -> Result<Prepared> {
    let (time, channels) = (make.size(16_384), make.size(4096));
    let inputs = || {
        let (weight, bias) = (make.filled(&[channels, 4], 0.3)?, make.filled(&[channels], 0.1)?);
        Ok(vec![make.tensor(&[1, time, channels], 1.0)?, weight, bias])
    };
    let operator: Operator = Box::new(|tape, inputs| {
        let options = ConvolutionOptions { activation: Activation::Silu, document_start: None, initial_state: None };
        Ok(ops::causal_conv1d(tape, &inputs[0], &inputs[1], Some(&inputs[2]), options)?)
    });
    way(make, &inputs, operator, [elements(2 * time * channels), elements(3 * time * channels)])
}

/// How tokens are distributed over the vocabulary.
enum Ids {
    /// All as often; hardly any occurs twice.
    Uniform,
    /// The n-th as often as 1 / n, as in text: the first is every sixteenth token or so.
    Zipf,
}

/// An id below `vocabulary` by Zipf's law, from a number uniform in 0..1: in text, a few tokens are most of all tokens.
pub(super) fn zipf(uniform: f64, vocabulary: usize) -> u32 {
    (vocabulary as f64).powf(uniform) as u32 - 1
}

/// Backward writes the gradient of the whole table, in f32.
fn embedding(make: &Inputs<'_>, sizes: [usize; 3], ids: Ids, way: Way) -> Result<Prepared> {
    let [tokens, vocabulary, width] = sizes.map(|size| make.size(size));
    let ids = match ids {
        Ids::Uniform => make.indices(&[1, tokens], vocabulary)?,
        Ids::Zipf => {
            let values: Vec<u32> = (0..tokens).map(|_| zipf(make.uniform(), vocabulary)).collect();
            Tensor::from_slice(make.device, &[1, tokens], &values)?
        }
    };
    let dtype = make.dtype;
    let inputs = || Ok(vec![make.tensor(&[vocabulary, width], 1.0)?]);
    let operator: Operator = Box::new(move |tape, inputs| Ok(ops::embedding(tape, &ids, &inputs[0], dtype)?));
    let rows = elements(tokens * width).bytes;
    let table = 4 * vocabulary * width;
    way(make, &inputs, operator, [2 * rows, rows + table].map(|bytes| Cost { bytes, operations: 0 }))
}

fn cast(make: &Inputs<'_>, from: DType, to: DType) -> Result<Prepared> {
    let shape = [make.size(16_384), make.size(5120)];
    let bytes = shape[0] * shape[1] * (from.size() + to.size());
    let inputs = || make.random(&shape, from, 1.0);
    in_a_row(make, Cost { bytes, operations: 0 }, inputs, move |inputs, watch| {
        watch.time(|| inputs.iter().map(|input| Ok(input.cast(to)?)).collect::<Result<Vec<_>>>())?;
        Ok(())
    })
}

/// Width, width of the MLP, and width of the keys of a transformer.
struct LayerSizes {
    width: usize,
    inner: usize,
    queries: usize,
    keys: usize,
}

const LARGE: LayerSizes = LayerSizes { width: 5120, inner: 14_336, queries: 4096, keys: 1024 };
const SMOLLM2: LayerSizes = LayerSizes { width: 576, inner: 1536, queries: 576, keys: 192 };

/// The shapes of the nine weights of each layer of a transformer.
fn layer_shapes(make: &Inputs<'_>, sizes: &LayerSizes, layers: usize) -> Vec<Vec<usize>> {
    let LayerSizes { width, inner, queries, keys } = LayerSizes {
        width: make.size(sizes.width),
        inner: make.size(sizes.inner),
        queries: make.size(sizes.queries),
        keys: make.size(sizes.keys),
    };
    let of_layer = [
        vec![queries, width],
        vec![keys, width],
        vec![keys, width],
        vec![width, queries],
        vec![inner, width],
        vec![inner, width],
        vec![width, inner],
        vec![width],
        vec![width],
    ];
    (0..make.size(layers)).flat_map(|_| of_layer.clone()).collect()
}

/// How many weights there are together.
fn count(shapes: &[Vec<usize>]) -> usize {
    shapes.iter().map(|shape| shape.iter().product::<usize>()).sum()
}

/// Weights of these shapes, with gradients in f32, as the operators make them.
fn weights(make: &Inputs<'_>, shapes: &[Vec<usize>]) -> Result<(Parameters, Gradients)> {
    let (mut parameters, mut gradients) = (Parameters::default(), Gradients::default());
    for (index, shape) in shapes.iter().enumerate() {
        let dtype = if shape.len() == 1 { DType::F32 } else { make.dtype };
        let value = make.random(shape, dtype, 0.02)?;
        gradients.add(&value, make.random(shape, DType::F32, 1e-3)?)?;
        parameters.push(Parameter { name: index.to_string(), value, trainable: true, decay: true, rate: 1.0 });
    }
    Ok((parameters, gradients))
}

/// Per weight: the gradient is read, in f32, and the weight written, in bf16; master and moments are read and written, in f32.
fn adamw(make: &Inputs<'_>, sizes: &LayerSizes, layers: usize) -> Result<Prepared> {
    let shapes = layer_shapes(make, sizes, layers);
    let (mut parameters, gradients) = weights(make, &shapes)?;
    let options = AdamWOptions { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.01 };
    let mut optimizer = AdamW::new(options, &parameters);
    // Without a master the weight itself is in f32, read and written.
    let per_weight = if make.dtype == DType::Bf16 { 4 + 2 + 8 + 16 } else { 4 + 8 + 16 };
    // Gradients are found by the identity of their weight, which an update keeps.
    Ok(prepared(Cost { bytes: per_weight * count(&shapes), operations: 0 }, move |watch| {
        watch.time(|| Ok(optimizer.update(&mut parameters, &gradients, 1e-5)?))
    }))
}

fn gradient_norm(make: &Inputs<'_>, sizes: &LayerSizes, layers: usize) -> Result<Prepared> {
    let shapes = layer_shapes(make, sizes, layers);
    let cost = Cost { bytes: 4 * count(&shapes), operations: 0 };
    in_a_row(
        make,
        cost,
        || weights(make, &shapes),
        move |sets, watch| {
            let each = || sets.iter().map(|(parameters, gradients)| Ok(gradient_square_sum(parameters, gradients)?));
            watch.time(|| each().collect::<Result<Vec<_>>>())?;
            Ok(())
        },
    )
}

/// Reads both models' logits, writes the gradient.
fn divergence(make: &Inputs<'_>) -> Result<Prepared> {
    let shape = [make.size(4096), make.size(131_072)];
    let teacher = make.tensor(&shape, 2.0)?;
    let operator: Operator =
        Box::new(move |tape, inputs| Ok(ops::divergence(tape, &inputs[0], &teacher, reverse_kl(shape[0]))?.loss));
    let count = shape[0] * shape[1];
    Ok(both_ways(vec![make.tensor(&shape, 2.0)?], operator, [elements(2 * count), elements(count)]))
}

fn reverse_kl(tokens: usize) -> DivergenceOptions<'static> {
    DivergenceOptions {
        divergence: Divergence::ReverseKl,
        student_temperature: 1.0,
        teacher_temperature: 1.0,
        mask: None,
        denominator: tokens as f32,
    }
}

fn cross_entropy(make: &Inputs<'_>) -> Result<Prepared> {
    let shape = [make.size(4096), make.size(131_072)];
    let labels = make.indices(&shape[..1], shape[1])?;
    let operator: Operator =
        Box::new(move |tape, inputs| Ok(ops::cross_entropy(tape, &inputs[0], &labels, shape[0] as f32)?.loss));
    Ok(both_ways(vec![make.tensor(&shape, 2.0)?], operator, [elements(shape[0] * shape[1]); 2]))
}

/// Hidden states and heads of student and teacher, and what head and loss cost: four products; hidden states and heads
/// are read, the gradients of the student's written, that of the head in f32.
fn heads(make: &Inputs<'_>, sizes: [usize; 3]) -> Result<([Tensor; 4], Cost)> {
    let [tokens, width, vocabulary] = sizes.map(|size| make.size(size));
    let hidden = || make.tensor(&[tokens, width], 1.0);
    let head = || make.tensor(&[vocabulary, width], 0.02);
    let bytes = 2 * (3 * tokens * width + 2 * vocabulary * width) + 4 * vocabulary * width;
    let cost = Cost { bytes, operations: 4 * 2 * tokens * width * vocabulary };
    Ok(([hidden()?, head()?, hidden()?, head()?], cost))
}

fn head_loss(make: &Inputs<'_>, sizes: [usize; 3]) -> Result<Prepared> {
    let ([hidden, head, teacher_hidden, teacher_head], cost) = heads(make, sizes)?;
    let operator: Operator = Box::new(move |tape, inputs| {
        let options = reverse_kl(inputs[0].rows());
        let teacher = HeadTeacher {
            source: TeacherSource::Head { hidden: &teacher_hidden, head: &teacher_head },
            options,
            weight: 1.0,
        };
        Ok(ops::head_loss(tape, &inputs[0], &inputs[1], Some(teacher), None)?.loss)
    });
    Ok(both_ways(vec![hidden, head], operator, [cost, Cost::default()]))
}

/// The four products of [`head_loss`] alone, whole.
fn head_products(make: &Inputs<'_>, sizes: [usize; 3]) -> Result<Prepared> {
    let ([hidden, head, teacher_hidden, teacher_head], cost) = heads(make, sizes)?;
    let gradient = make.tensor(&[hidden.rows(), head.rows()], 1e-3)?;
    Ok(prepared(cost, move |watch| {
        let tape = Tape::new();
        let (input, weight) = (tape.leaf(&hidden), tape.leaf(&head));
        watch.time(|| {
            let [teacher, teacher_head] = [&teacher_hidden, &teacher_head].map(Var::constant);
            ops::linear(&tape, &teacher, &teacher_head, None)?;
            let logits = ops::linear(&tape, &input, &weight, None)?;
            Ok(tape.backward_from(vec![(logits, gradient.clone())])?)
        })?;
        Ok(())
    }))
}

/// Two products over the triangle below the diagonal; backward five.
fn attention(make: &Inputs<'_>, sizes: [usize; 5], way: Way) -> Result<Prepared> {
    let [batch, time, heads, key_heads, size] = sizes;
    let (batch, time) = (make.size(batch), make.size(time));
    let queries = [batch, time, heads, size];
    let keys = [batch, time, key_heads, size];
    let inputs = || Ok(vec![make.tensor(&queries, 1.0)?, make.tensor(&keys, 1.0)?, make.tensor(&keys, 1.0)?]);
    let operator: Operator = Box::new(move |tape, inputs| {
        let options = AttentionOptions { scale: (size as f32).powf(-0.5), document_start: None, window: None };
        Ok(ops::attention(tape, &inputs[0], &inputs[1], &inputs[2], options)?)
    });
    let product = 2 * batch * heads * size * (time * (time + 1) / 2);
    let (query, key) = (2 * batch * time * heads * size, 2 * batch * time * key_heads * size);
    let forward = Cost { bytes: 2 * query + 2 * key, operations: 2 * product };
    let backward = Cost { bytes: 4 * query + 4 * key, operations: 5 * product };
    way(make, &inputs, operator, [forward, backward])
}

fn linear(make: &Inputs<'_>, sizes: [usize; 3], way: Way) -> Result<Prepared> {
    let [rows, inner, outer] = sizes.map(|size| make.size(size));
    let inputs = || Ok(vec![make.tensor(&[rows, inner], 1.0)?, make.tensor(&[outer, inner], 0.02)?]);
    let operator: Operator = Box::new(|tape, inputs| Ok(ops::linear(tape, &inputs[0], &inputs[1], None)?));
    let (input, weight, output) = (2 * rows * inner, 2 * outer * inner, 2 * rows * outer);
    // The weight's gradient is in f32.
    let operations = 2 * rows * inner * outer;
    let forward = Cost { bytes: input + weight + output, operations };
    let backward = Cost { bytes: 2 * input + 3 * weight + output, operations: 2 * operations };
    way(make, &inputs, operator, [forward, backward])
}

/// A product of few rows as decoding has it: without a way back.
fn few_rows(make: &Inputs<'_>, rows: usize, inner: usize, outer: usize) -> Result<Prepared> {
    let [rows, inner, outer] = [rows, inner, outer].map(|size| make.size(size));
    let set = || -> Result<Call> {
        let input = Var::constant(&make.tensor(&[rows, inner], 1.0)?);
        let weight = Var::constant(&make.tensor(&[outer, inner], 0.02)?);
        Ok(Box::new(move || Ok(ops::linear(&Tape::inference(), &input, &weight, None)?.tensor().clone())))
    };
    rotating(make, 2 * (rows * inner + outer * inner + rows * outer), set)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_moves_little_runs_in_a_row() {
        let calls = |bytes, operations| calls_in_a_row(Cost { bytes, operations });
        let moving = [0, 268 << 20, 403 << 20, 1 << 30, (1 << 30) + 1, 5 << 30].map(|bytes| calls(bytes, 0));
        assert_eq!(moving, [8, 7, 5, 2, 1, 1]);
        assert_eq!([29_000_000_000, 100_000_000_001].map(|operations| calls(50 << 20, operations)), [8, 1]);

        // Each call has a set of its own.
        let device = Device::cpu();
        let make = Inputs::new(&device, DType::F32, 1);
        let sets = Cell::new(0);
        let set = || Ok(sets.replace(sets.get() + 1));
        let run = |sets: &[i32], _: &mut Stopwatch| {
            assert_eq!(sets, [0, 1]);
            Ok(())
        };
        let prepared = in_a_row(&make, Cost { bytes: 7, operations: 0 }, set, run).unwrap();
        assert_eq!((prepared.calls, prepared.bytes), (2, 7));
        let mut stopwatch = Stopwatch::new(&device).unwrap();
        let mut run = prepared.run;
        run(&mut stopwatch).unwrap();
    }
}
