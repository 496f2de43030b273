//! Operators at the sizes of SmolLM2-135M: hidden 576, 9 query and 3 key heads of 64, MLP 1536, vocabulary 49,152, one
//! sequence of 512 tokens. `cargo bench -p grafter-autograd` runs them; throughput is operations (matrix products and
//! attention) or bytes read and written (the others).

use autograd::ops::{
    self, Activation, AttentionOptions, ConvolutionOptions, Divergence, DivergenceOptions, ScanInputs, ScanStepInputs,
};
use autograd::optimizer::{AdamW, AdamWOptions};
use autograd::{DType, Parameter, Parameters, Tape, Tensor, Var};
use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use runtime::Device;

const TIME: usize = 512;
const HIDDEN: usize = 576;
const MLP: usize = 1536;
const VOCABULARY: usize = 49_152;

fn main() {
    divan::main();
}

/// Values in [-1, 1) that look like nothing in particular.
fn noise(shape: &[usize]) -> Tensor {
    let mut state = shape.iter().fold(0x9e37_79b9u64, |state, size| state.wrapping_mul(31).wrapping_add(*size as u64));
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|_: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect();
    Tensor::from_slice(&Device::cpu(), shape, &values).expect("memory for the input")
}

/// Times `function` forward.
fn forward(bencher: Bencher<'_, '_>, inputs: &[Tensor], function: impl Fn(&Tape<'_>, &[Var]) -> Var + Sync) {
    let variables: Vec<Var> = inputs.iter().map(Var::constant).collect();
    bencher.bench_local(|| function(&Tape::inference(), &variables));
}

/// Times the backward pass of `function` alone, all inputs needing gradients.
fn backward(bencher: Bencher<'_, '_>, inputs: &[Tensor], function: impl Fn(&Tape<'_>, &[Var]) -> Var + Sync) {
    bencher
        .with_inputs(|| {
            let tape = Tape::new();
            let variables: Vec<Var> = inputs.iter().map(|input| tape.leaf(input)).collect();
            let output = function(&tape, &variables);
            let seed = noise(output.shape());
            (tape, output, seed)
        })
        .bench_local_values(|(tape, output, seed)| tape.backward_from(vec![(output, seed)]));
}

fn linear(tape: &Tape<'_>, inputs: &[Var]) -> Var {
    ops::linear(tape, &inputs[0], &inputs[1], None).expect("shapes agree")
}

/// Rows and outputs: a prompt, one decoding step, and batches of steps on both sides of where dot products give way.
const LINEAR_SIZES: [(usize, usize); 7] =
    [(512, MLP), (512, VOCABULARY), (1, MLP), (1, VOCABULARY), (4, VOCABULARY), (5, VOCABULARY), (8, VOCABULARY)];

#[divan::bench(args = LINEAR_SIZES)]
fn linear_forward(bencher: Bencher<'_, '_>, (rows, out): (usize, usize)) {
    let bencher = bencher.counter(ItemsCount::new(2 * rows * out * HIDDEN));
    forward(bencher, &[noise(&[rows, HIDDEN]), noise(&[out, HIDDEN])], linear);
}

#[divan::bench(args = LINEAR_SIZES)]
fn linear_forward_bf16_weight(bencher: Bencher<'_, '_>, (rows, out): (usize, usize)) {
    let bencher = bencher.counter(ItemsCount::new(2 * rows * out * HIDDEN));
    let weight = noise(&[out, HIDDEN]).cast(DType::Bf16).expect("memory for the weight");
    forward(bencher, &[noise(&[rows, HIDDEN]), weight], linear);
}

#[divan::bench(args = [MLP, VOCABULARY])]
fn linear_backward(bencher: Bencher<'_, '_>, out: usize) {
    let bencher = bencher.counter(ItemsCount::new(4 * TIME * out * HIDDEN));
    backward(bencher, &[noise(&[TIME, HIDDEN]), noise(&[out, HIDDEN])], linear);
}

#[divan::bench(args = [MLP, VOCABULARY])]
fn linear_backward_bf16_weight(bencher: Bencher<'_, '_>, out: usize) {
    let bencher = bencher.counter(ItemsCount::new(4 * TIME * out * HIDDEN));
    let weight = noise(&[out, HIDDEN]).cast(DType::Bf16).expect("memory for the weight");
    backward(bencher, &[noise(&[TIME, HIDDEN]), weight], linear);
}

fn attention(tape: &Tape<'_>, inputs: &[Var]) -> Var {
    let options = AttentionOptions { scale: 0.125, document_start: None, window: None };
    ops::attention(tape, &inputs[0], &inputs[1], &inputs[2], options).expect("shapes agree")
}

fn attention_inputs() -> [Tensor; 3] {
    [noise(&[1, TIME, 9, 64]), noise(&[1, TIME, 3, 64]), noise(&[1, TIME, 3, 64])]
}

#[divan::bench]
fn attention_forward(bencher: Bencher<'_, '_>) {
    forward(bencher.counter(ItemsCount::new(2 * 9 * TIME * TIME * 64)), &attention_inputs(), attention);
}

#[divan::bench]
fn attention_backward(bencher: Bencher<'_, '_>) {
    backward(bencher.counter(ItemsCount::new(5 * 9 * TIME * TIME * 64)), &attention_inputs(), attention);
}

/// One query over a long past, through the operator that training uses.
#[divan::bench(args = [512, 2048])]
fn attention_forward_one_query(bencher: Bencher<'_, '_>, length: usize) {
    let inputs = [noise(&[1, 1, 9, 64]), noise(&[1, length, 3, 64]), noise(&[1, length, 3, 64])];
    forward(bencher.counter(BytesCount::new(2 * length * 3 * 64 * 4)), &inputs, attention);
}

/// The same over the caches of decoding.
#[divan::bench(args = [512, 2048])]
fn attention_cached(bencher: Bencher<'_, '_>, length: usize) {
    let query = noise(&[1, 1, 9, 64]);
    let (keys, values) = (noise(&[1, length, 3, 64]), noise(&[1, length, 3, 64]));
    bencher
        .counter(BytesCount::new(2 * length * 3 * 64 * 4))
        .bench_local(|| ops::attention_cached(&query, &keys, &values, length, 0.125, None));
}

fn rms_norm(tape: &Tape<'_>, inputs: &[Var]) -> Var {
    ops::rms_norm(tape, &inputs[0], &inputs[1], 1e-5).expect("shapes agree")
}

#[divan::bench]
fn rms_norm_forward(bencher: Bencher<'_, '_>) {
    let bencher = bencher.counter(BytesCount::new(2 * TIME * HIDDEN * 4));
    forward(bencher, &[noise(&[TIME, HIDDEN]), noise(&[HIDDEN])], rms_norm);
}

#[divan::bench]
fn rms_norm_backward(bencher: Bencher<'_, '_>) {
    let bencher = bencher.counter(BytesCount::new(3 * TIME * HIDDEN * 4));
    backward(bencher, &[noise(&[TIME, HIDDEN]), noise(&[HIDDEN])], rms_norm);
}

fn swiglu(tape: &Tape<'_>, inputs: &[Var]) -> Var {
    ops::swiglu(tape, &inputs[0], &inputs[1]).expect("shapes agree")
}

#[divan::bench]
fn swiglu_forward(bencher: Bencher<'_, '_>) {
    let bencher = bencher.counter(BytesCount::new(3 * TIME * MLP * 4));
    forward(bencher, &[noise(&[TIME, MLP]), noise(&[TIME, MLP])], swiglu);
}

#[divan::bench]
fn swiglu_backward(bencher: Bencher<'_, '_>) {
    let bencher = bencher.counter(BytesCount::new(5 * TIME * MLP * 4));
    backward(bencher, &[noise(&[TIME, MLP]), noise(&[TIME, MLP])], swiglu);
}

fn rope(tape: &Tape<'_>, inputs: &[Var]) -> Var {
    let table = ops::RotaryTable::new(64, 1e5, ops::RotaryScaling::None).expect("an even head size");
    let positions: Vec<u32> = (0..TIME as u32).collect();
    let positions = Tensor::from_slice(&Device::cpu(), &[1, TIME], &positions).expect("memory for positions");
    ops::rope(tape, &inputs[0], &positions, &table).expect("shapes agree")
}

#[divan::bench]
fn rope_forward(bencher: Bencher<'_, '_>) {
    forward(bencher.counter(BytesCount::new(2 * TIME * HIDDEN * 4)), &[noise(&[1, TIME, 9, 64])], rope);
}

#[divan::bench]
fn rope_backward(bencher: Bencher<'_, '_>) {
    backward(bencher.counter(BytesCount::new(2 * TIME * HIDDEN * 4)), &[noise(&[1, TIME, 9, 64])], rope);
}

fn embedding(tape: &Tape<'_>, inputs: &[Var]) -> Var {
    let ids: Vec<u32> = (0..TIME).map(|i| (i * 7919 % VOCABULARY) as u32).collect();
    let ids = Tensor::from_slice(&Device::cpu(), &[1, TIME], &ids).expect("memory for ids");
    ops::embedding(tape, &ids, &inputs[0], DType::F32).expect("ids lie in the vocabulary")
}

#[divan::bench]
fn embedding_forward(bencher: Bencher<'_, '_>) {
    forward(bencher.counter(BytesCount::new(2 * TIME * HIDDEN * 4)), &[noise(&[VOCABULARY, HIDDEN])], embedding);
}

/// The gradient is dense: writing its zeros is most of the work.
#[divan::bench]
fn embedding_backward(bencher: Bencher<'_, '_>) {
    let bencher = bencher.counter(BytesCount::new((VOCABULARY + 2 * TIME) * HIDDEN * 4));
    backward(bencher, &[noise(&[VOCABULARY, HIDDEN])], embedding);
}

/// Elementwise operators of one input, by name.
const OF_ONE: [(&str, OfOne); 4] = [
    ("scale", |tape, x| ops::scale(tape, x, 0.5)),
    ("negative_exp", ops::negative_exp),
    ("silu", ops::silu),
    ("softplus", ops::softplus),
];
type OfOne = fn(&Tape<'_>, &Var) -> autograd::Result<Var>;

/// Elementwise operators of two inputs, by name.
const OF_TWO: [(&str, OfTwo); 3] = [("add", ops::add), ("sub", ops::sub), ("mul", ops::mul)];
type OfTwo = fn(&Tape<'_>, &Var, &Var) -> autograd::Result<Var>;

fn named<T: Copy>(operators: &[(&str, T)], name: &str) -> T {
    operators.iter().find(|(known, _)| *known == name).expect("the arguments are the table's names").1
}

#[divan::bench(args = OF_ONE.map(|(name, _)| name))]
fn elementwise_of_one_forward(bencher: Bencher<'_, '_>, name: &str) {
    let operator = named(&OF_ONE, name);
    let bencher = bencher.counter(BytesCount::new(2 * TIME * MLP * 4));
    forward(bencher, &[noise(&[TIME, MLP])], |tape, inputs| operator(tape, &inputs[0]).expect("one input"));
}

#[divan::bench(args = OF_ONE.map(|(name, _)| name))]
fn elementwise_of_one_backward(bencher: Bencher<'_, '_>, name: &str) {
    let operator = named(&OF_ONE, name);
    // All but `scale` read what the forward pass saved.
    let moved = if name == "scale" { 2 } else { 3 };
    let bencher = bencher.counter(BytesCount::new(moved * TIME * MLP * 4));
    backward(bencher, &[noise(&[TIME, MLP])], |tape, inputs| operator(tape, &inputs[0]).expect("one input"));
}

#[divan::bench(args = OF_TWO.map(|(name, _)| name))]
fn elementwise_of_two_forward(bencher: Bencher<'_, '_>, name: &str) {
    let operator = named(&OF_TWO, name);
    let inputs = [noise(&[TIME, MLP]), noise(&[TIME, MLP])];
    let bencher = bencher.counter(BytesCount::new(3 * TIME * MLP * 4));
    forward(bencher, &inputs, |tape, inputs| operator(tape, &inputs[0], &inputs[1]).expect("equal shapes"));
}

#[divan::bench]
fn mul_backward(bencher: Bencher<'_, '_>) {
    let inputs = [noise(&[TIME, MLP]), noise(&[MLP, TIME]).reshape(&[TIME, MLP]).expect("equal counts")];
    let bencher = bencher.counter(BytesCount::new(6 * TIME * MLP * 4));
    backward(bencher, &inputs, |tape, inputs| ops::mul(tape, &inputs[0], &inputs[1]).expect("equal shapes"));
}

#[divan::bench]
fn sum(bencher: Bencher<'_, '_>) {
    let bencher = bencher.counter(BytesCount::new(TIME * MLP * 4));
    forward(bencher, &[noise(&[TIME, MLP])], |tape, inputs| ops::sum(tape, &inputs[0]).expect("floats"));
}

#[divan::bench]
fn add_in_place(bencher: Bencher<'_, '_>) {
    let (mut sum, addend) = (noise(&[TIME, MLP]), noise(&[TIME, MLP]));
    bencher.counter(BytesCount::new(3 * TIME * MLP * 4)).bench_local(|| ops::add_in_place(&mut sum, &addend));
}

#[divan::bench]
fn scale_in_place(bencher: Bencher<'_, '_>) {
    let mut x = noise(&[TIME, MLP]);
    // A factor of 1 costs what any other does and keeps the numbers from growing into denormals or infinity.
    bencher.counter(BytesCount::new(2 * TIME * MLP * 4)).bench_local(|| ops::scale_in_place(&mut x, 1.0));
}

/// The mixer's input projection, cut into its gate, values, keys and queries.
#[divan::bench]
fn split(bencher: Bencher<'_, '_>) {
    let sizes = [HIDDEN, 192, 192, HIDDEN];
    let width: usize = sizes.iter().sum();
    let input = Var::constant(&noise(&[1, TIME, width]));
    bencher
        .counter(BytesCount::new(2 * TIME * width * 4))
        .bench_local(|| ops::split(&Tape::inference(), &input, &sizes));
}

fn repeat_chunks(tape: &Tape<'_>, inputs: &[Var]) -> Var {
    ops::repeat_chunks(tape, &inputs[0], 16, 3).expect("whole chunks")
}

#[divan::bench]
fn repeat_chunks_forward(bencher: Bencher<'_, '_>) {
    forward(bencher.counter(BytesCount::new(4 * TIME * 192 * 4)), &[noise(&[1, TIME, 192])], repeat_chunks);
}

#[divan::bench]
fn repeat_chunks_backward(bencher: Bencher<'_, '_>) {
    backward(bencher.counter(BytesCount::new(4 * TIME * 192 * 4)), &[noise(&[1, TIME, 192])], repeat_chunks);
}

fn convolution(tape: &Tape<'_>, inputs: &[Var]) -> Var {
    let options = ConvolutionOptions { activation: Activation::Silu, document_start: None, initial_state: None };
    ops::causal_conv1d(tape, &inputs[0], &inputs[1], Some(&inputs[2]), options).expect("shapes agree")
}

fn convolution_inputs() -> [Tensor; 3] {
    [noise(&[1, TIME, HIDDEN]), noise(&[HIDDEN, 4]), noise(&[HIDDEN])]
}

#[divan::bench]
fn causal_conv1d_forward(bencher: Bencher<'_, '_>) {
    forward(bencher.counter(BytesCount::new(2 * TIME * HIDDEN * 4)), &convolution_inputs(), convolution);
}

#[divan::bench]
fn causal_conv1d_backward(bencher: Bencher<'_, '_>) {
    backward(bencher.counter(BytesCount::new(3 * TIME * HIDDEN * 4)), &convolution_inputs(), convolution);
}

fn scan(tape: &Tape<'_>, inputs: &[Var]) -> Var {
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
    ops::selective_scan(tape, inputs).expect("shapes agree").output
}

fn scan_inputs() -> [Tensor; 8] {
    let mut a = noise(&[HIDDEN, 16]);
    for value in a.make_mut::<f32>().expect("host memory") {
        *value = -1.5 - *value;
    }
    let sequence = || noise(&[1, TIME, HIDDEN]);
    let (b, c) = (noise(&[1, TIME, 12, 16]), noise(&[1, TIME, 36, 16]));
    [sequence(), sequence(), a, b, c, noise(&[HIDDEN]), sequence(), noise(&[HIDDEN])]
}

#[divan::bench]
fn selective_scan_forward(bencher: Bencher<'_, '_>) {
    forward(bencher.counter(ItemsCount::new(TIME * HIDDEN * 16)), &scan_inputs(), scan);
}

#[divan::bench]
fn selective_scan_backward(bencher: Bencher<'_, '_>) {
    backward(bencher.counter(ItemsCount::new(TIME * HIDDEN * 16)), &scan_inputs(), scan);
}

#[divan::bench]
fn selective_scan_step(bencher: Bencher<'_, '_>) {
    let inputs = scan_inputs();
    let rows = |width: usize| noise(&[1, width]);
    let (u, delta, gate) = (rows(HIDDEN), rows(HIDDEN), rows(HIDDEN));
    let (b, c) = (noise(&[1, 12, 16]), noise(&[1, 36, 16]));
    let mut state = noise(&[1, HIDDEN, 16]);
    bencher.counter(ItemsCount::new(HIDDEN * 16)).bench_local(|| {
        let inputs = ScanStepInputs {
            input: &u,
            delta: &delta,
            a: &inputs[2],
            b: &b,
            c: &c,
            d: Some(&inputs[5]),
            gate: Some(&gate),
            delta_bias: Some(&inputs[7]),
            delta_softplus: true,
        };
        ops::selective_scan_step(&mut state, inputs)
    });
}

fn reverse_kl(tape: &Tape<'_>, inputs: &[Var]) -> Var {
    let options = DivergenceOptions {
        divergence: Divergence::ReverseKl,
        student_temperature: 1.0,
        teacher_temperature: 1.0,
        mask: None,
        denominator: TIME as f32,
    };
    ops::divergence(tape, &inputs[0], &inputs[1], options).expect("shapes agree").loss
}

#[divan::bench]
fn reverse_kl_forward(bencher: Bencher<'_, '_>) {
    let bencher = bencher.counter(BytesCount::new(2 * TIME * VOCABULARY * 4));
    forward(bencher, &[noise(&[TIME, VOCABULARY]), noise(&[TIME, VOCABULARY])], reverse_kl);
}

#[divan::bench]
fn reverse_kl_backward(bencher: Bencher<'_, '_>) {
    let bencher = bencher.counter(BytesCount::new(3 * TIME * VOCABULARY * 4));
    backward(bencher, &[noise(&[TIME, VOCABULARY]), noise(&[TIME, VOCABULARY])], reverse_kl);
}

fn cross_entropy(tape: &Tape<'_>, inputs: &[Var]) -> Var {
    let labels: Vec<u32> = (0..TIME).map(|i| (i * 7919 % VOCABULARY) as u32).collect();
    let labels = Tensor::from_slice(&Device::cpu(), &[TIME], &labels).expect("memory for labels");
    ops::cross_entropy(tape, &inputs[0], &labels, TIME as f32).expect("labels lie in the vocabulary").loss
}

#[divan::bench]
fn cross_entropy_forward(bencher: Bencher<'_, '_>) {
    forward(bencher.counter(BytesCount::new(TIME * VOCABULARY * 4)), &[noise(&[TIME, VOCABULARY])], cross_entropy);
}

#[divan::bench]
fn cross_entropy_backward(bencher: Bencher<'_, '_>) {
    backward(bencher.counter(BytesCount::new(2 * TIME * VOCABULARY * 4)), &[noise(&[TIME, VOCABULARY])], cross_entropy);
}

#[divan::bench]
fn adamw(bencher: Bencher<'_, '_>) {
    let mut parameters = Parameters::default();
    let value = noise(&[MLP, 4 * HIDDEN]);
    let count = value.count();
    parameters.push(Parameter { name: "weight".to_owned(), value, trainable: true, decay: true, rate: 1.0 });
    let options = AdamWOptions { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 };
    let mut optimizer = AdamW::new(options, &parameters);
    let gradient = noise(&[MLP, 4 * HIDDEN]);
    bencher.counter(BytesCount::new(7 * count * 4)).bench_local(|| {
        let mut gradients = autograd::Gradients::default();
        let (id, _) = parameters.iter().next().expect("one parameter");
        gradients.add(&parameters.get(id).value, gradient.clone()).expect("a first gradient");
        optimizer.update(&mut parameters, &gradients, 1e-4).expect("shapes agree");
    });
}
