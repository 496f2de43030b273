//! The same bits every time, whatever the number of threads.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use autograd::ops::{
    self, Activation, AttentionOptions, ConvolutionOptions, Divergence, DivergenceOptions, RotaryScaling, RotaryTable,
    ScanInputs,
};
use autograd::optimizer::gradient_norm;
use autograd::{DType, Parameter, Parameters, Tape, Tensor, Var};
use grafter_tests::check::{indices, tensor};
use grafter_tests::random::Random;
use rayon::ThreadPoolBuilder;

/// Sizes beyond every block of the operators, and no multiples of them.
const TIME: usize = 203;
const WIDTH: usize = 96;
const INNER: usize = 131;
const VOCABULARY: usize = 1057;

/// Bits of a result and of all gradients of a small hybrid layer that uses every operator.
fn hybrid(dtype: DType) -> Vec<Vec<u32>> {
    let mut random = Random::new(11);
    let mut parameters = Parameters::default();
    let mut weight = |shape: &[usize], deviation: f64| {
        let value = tensor(DType::F32, shape, &random.normals(shape.iter().product(), deviation));
        parameters.push(Parameter { name: String::new(), value, trainable: true, decay: true, rate: 1.0 })
    };
    let embedding = weight(&[VOCABULARY, WIDTH], 1.0);
    let norm = weight(&[WIDTH], 1.0);
    let [query, output] = [0; 2].map(|_| weight(&[WIDTH, WIDTH], 0.1));
    let [key, value] = [0; 2].map(|_| weight(&[WIDTH / 2, WIDTH], 0.1));
    let [gate, up] = [0; 2].map(|_| weight(&[INNER, WIDTH], 0.1));
    let down = weight(&[WIDTH, INNER], 0.1);
    let bias = weight(&[WIDTH], 0.1);
    let conv = weight(&[WIDTH, 4], 0.5);
    let a_log = weight(&[WIDTH, 16], 0.5);
    let d = weight(&[WIDTH], 1.0);
    let tokens: Vec<usize> = (0..2 * TIME).map(|_| random.below(VOCABULARY)).collect();
    let starts: Vec<usize> = (0..2).flat_map(|_| random.document_starts(TIME)).collect();
    let shape = [2, TIME];
    let (tokens, starts) = (indices(&shape, &tokens), indices(&shape, &starts));
    let positions = indices(&shape, &(0..2 * TIME).map(|index| index % TIME).collect::<Vec<_>>());
    let teacher = tensor(DType::F32, &[2, TIME, VOCABULARY], &random.normals(2 * TIME * VOCABULARY, 1.0));

    let tape = Tape::new();
    let var = |id| parameters.var(&tape, id);
    let linear = |x: &Var, id| ops::linear(&tape, x, &var(id), None).unwrap();
    let heads = |x: &Var, heads: usize| x.reshape(&tape, &[2, TIME, heads, 16]).unwrap();
    let table = RotaryTable::new(16, 1e4, RotaryScaling::None).unwrap();
    let rope = |x: &Var| ops::rope(&tape, x, &positions, &table).unwrap();
    let add = |a: &Var, b: &Var| ops::add(&tape, a, b).unwrap();

    let stream = ops::embedding(&tape, &tokens, &var(embedding), dtype).unwrap();
    let normed = ops::rms_norm(&tape, &stream, &var(norm), 1e-5).unwrap();
    let options = AttentionOptions { scale: 0.25, document_start: Some(&starts), window: None };
    let (q, k, v) =
        (heads(&linear(&normed, query), 6), heads(&linear(&normed, key), 3), heads(&linear(&normed, value), 3));
    let mixed = ops::attention(&tape, &rope(&q), &rope(&k), &v, options).unwrap();
    let mixed = linear(&mixed.reshape(&tape, &[2, TIME, WIDTH]).unwrap(), output);
    let stream = add(&stream, &mixed);
    let options =
        ConvolutionOptions { activation: Activation::Silu, document_start: Some(&starts), initial_state: None };
    let convolved = ops::causal_conv1d(&tape, &stream, &var(conv), Some(&var(bias)), options).unwrap();
    let repeated = ops::repeat_chunks(&tape, &linear(&stream, key), 16, 2).unwrap();
    let scanned = ops::selective_scan(
        &tape,
        ScanInputs {
            input: &convolved,
            delta: &ops::softplus(&tape, &linear(&stream, output)).unwrap(),
            a: &ops::negative_exp(&tape, &var(a_log)).unwrap(),
            b: &linear(&stream, value).reshape(&tape, &[2, TIME, 3, 16]).unwrap(),
            c: &linear(&stream, query).reshape(&tape, &[2, TIME, 6, 16]).unwrap(),
            d: Some(&var(d)),
            gate: Some(&repeated),
            delta_bias: Some(&var(bias)),
            delta_softplus: true,
            initial_state: None,
            document_start: Some(&starts),
        },
    )
    .unwrap();
    let stream = add(&stream, &scanned.output);
    let activated = ops::swiglu(&tape, &linear(&stream, gate), &linear(&stream, up)).unwrap();
    let stream = add(&stream, &linear(&activated, down));
    let logits = linear(&stream, embedding);
    let options = DivergenceOptions {
        divergence: Divergence::ReverseKl,
        student_temperature: 1.0,
        teacher_temperature: 1.0,
        mask: None,
        denominator: 2.0 * TIME as f32,
    };
    let kl = ops::divergence(&tape, &logits, &teacher, options).unwrap().loss;
    let cross_entropy = ops::cross_entropy(&tape, &logits, &tokens, 2.0 * TIME as f32).unwrap().loss;
    let loss = add(&kl, &cross_entropy);
    let mut results = vec![bits(&loss), bits(&logits)];
    let gradients = tape.backward(&loss).unwrap();
    for (_, parameter) in parameters.iter() {
        results.push(bits(gradients.get(&parameter.value).unwrap()));
    }
    let norm = gradient_norm(&parameters, &gradients).unwrap().to_bits();
    results.push(vec![(norm >> 32) as u32, norm as u32]);
    results
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.to_f32_vec().unwrap().into_iter().map(f32::to_bits).collect()
}

#[test]
fn threads_and_runs_change_no_bit() {
    for dtype in [DType::F32, DType::Bf16] {
        let with_threads =
            |threads: usize| ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| hybrid(dtype));
        let one = with_threads(1);
        assert!(one.iter().flatten().all(|bits| f32::from_bits(*bits).is_finite()));
        for threads in [1, 2, 2, 3] {
            let other = with_threads(threads);
            for (index, (one, other)) in one.iter().zip(&other).enumerate() {
                assert!(one == other, "{dtype}, {threads} threads: result {index} differs");
            }
        }
        assert!(one == hybrid(dtype), "{dtype}: the global pool gives other bits");
    }
}
