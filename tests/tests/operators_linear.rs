//! Linear, embedding and RMSNorm against their f64 references.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use autograd::{DType, Tape, Tensor, Var, ops};
use grafter_tests::check::{Input, Precision, Tolerance, cases, check_operator, indices, tensor, widened};
use grafter_tests::random::Random;
use grafter_tests::reference;
use proptest::prelude::*;

const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Bf16];

/// Nothing, one, odd, and around the block sizes of the operators and of their matrix products.
fn size() -> impl Strategy<Value = usize> {
    prop_oneof![2 => Just(1usize), 4 => 2..20usize, 1 => 31..=33usize, 1 => 63..=65usize, 1 => 127..=129usize]
}

/// Rows and width of a norm: any width, and those whose rows lie in a warp's or a block's registers.
fn norm_sizes() -> impl Strategy<Value = (usize, usize)> {
    let rows = || prop_oneof![1 => Just(0usize), 6 => size()];
    let held = || prop_oneof![4 => 1..=12usize, 1 => 31..=33usize, 1 => 63..=65usize, 1 => 96..=97usize];
    prop_oneof![
        4 => (rows(), size()),
        4 => (rows(), held().prop_map(|vectors| 8 * vectors)),
        1 => (0..12usize, prop_oneof![127..=130usize, 255..=257usize].prop_map(|vectors| 8 * vectors)),
        // So many that a warp of the backward pass has more rows than are on their way to it at a time.
        1 => (8449..=8460usize, Just(8)),
    ]
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn linear(rows in prop_oneof![1 => Just(0usize), 6 => size()], inner in size(), outer in size(), bias: bool, seed: u64) {
        // Rows around the limit below which another way is taken, and two dimensions of them.
        let mut random = Random::new(seed);
        let shape = if rows % 2 == 0 { vec![2, rows / 2, inner] } else { vec![rows, inner] };
        let output_shape = [&shape[..shape.len() - 1], &[outer]].concat();
        let mut inputs = vec![
            Input::normal("input", &shape, &mut random),
            Input::new("weight", &[outer, inner], random.normals(outer * inner, (inner as f64).powf(-0.5))),
        ];
        if bias {
            inputs.push(Input::normal("bias", &[outer], &mut random));
        }
        for precision in PRECISIONS {
            check_operator(
                precision, seed, Tolerance::SUM, &inputs, &[&output_shape],
                |tape, inputs| Ok(vec![ops::linear(tape, &inputs[0], &inputs[1], inputs.get(2))?]),
                |values| vec![reference::linear(
                    &values[0], &values[1], values.get(2).map(Vec::as_slice), rows, inner, outer,
                )],
            ).map_err(|message| TestCaseError::fail(format!("{precision:?}: {message}")))?;
        }
    }

    #[test]
    fn linear_residual(rows in prop_oneof![1 => Just(0usize), 6 => size()], inner in size(), outer in size(), bias: bool, seed: u64) {
        let mut random = Random::new(seed);
        let mut inputs = vec![
            Input::normal("residual", &[rows, outer], &mut random),
            Input::normal("input", &[rows, inner], &mut random),
            Input::new("weight", &[outer, inner], random.normals(outer * inner, (inner as f64).powf(-0.5))),
        ];
        if bias {
            inputs.push(Input::normal("bias", &[outer], &mut random));
        }
        for precision in PRECISIONS {
            check_operator(
                precision, seed, Tolerance::SUM, &inputs, &[&[rows, outer]],
                |tape, inputs| Ok(vec![ops::linear_residual(tape, &inputs[0], &inputs[1], &inputs[2], inputs.get(3))?]),
                |values| {
                    let bias = values.get(3).map(Vec::as_slice);
                    let product = reference::linear(&values[1], &values[2], bias, rows, inner, outer);
                    vec![product.iter().zip(&values[0]).map(|(product, residual)| product + residual).collect()]
                },
            ).map_err(|message| TestCaseError::fail(format!("{precision:?}: {message}")))?;
        }
    }

    #[test]
    fn linear_with_weights_kept_in_bf16(rows in size(), inner in size(), outer in size(), seed: u64) {
        let mut random = Random::new(seed);
        let input = tensor(DType::F32, &[rows, inner], &random.normals(rows * inner, 1.0));
        let weight = tensor(DType::Bf16, &[outer, inner], &random.normals(outer * inner, 1.0));
        let (input, weight) = (Var::constant(&input), Var::constant(&weight));
        let output = ops::linear(&Tape::inference(), &input, &weight, None).unwrap();
        prop_assert_eq!(output.dtype(), DType::F32);
        let expected = reference::linear(
            &widened(&input).unwrap(), &widened(&weight).unwrap(), None, rows, inner, outer,
        );
        grafter_tests::check::agree(
            "output", &[rows, outer], &widened(&output).unwrap(), &expected, Tolerance::SUM.output,
        ).map_err(TestCaseError::fail)?;
    }

    #[test]
    fn embedding(
        tokens in prop_oneof![1 => Just(0usize), 6 => size(), 1 => 255..=257usize, 1 => Just(2100usize)],
        vocabulary in 1..40usize,
        // The last two are several warps of a token.
        width in prop_oneof![6 => size(), 1 => Just(1028usize), 1 => Just(1032usize), 1 => Just(2056usize)],
        // Thirds of the tokens whose id is that of padding.
        padding in 0..3usize,
        seed: u64,
    ) {
        let width = if tokens > 256 { width % 40 + 1 } else { width };
        let mut random = Random::new(seed);
        // Few ids for many tokens, so that most repeat and their gradients add up.
        let ids: Vec<usize> =
            (0..tokens).map(|_| if random.below(3) < padding { 0 } else { random.below(vocabulary) }).collect();
        let id_tensor = indices(&[1, tokens], &ids);
        let inputs = [Input::normal("weight", &[vocabulary, width], &mut random)];
        for (precision, output) in [
            (Precision::F32, DType::F32), (Precision::Bf16, DType::Bf16), (Precision::Bf16, DType::F32),
        ] {
            check_operator(
                precision, seed, Tolerance::SUM, &inputs, &[&[1, tokens, width]],
                |tape, inputs| Ok(vec![ops::embedding(tape, &id_tensor, &inputs[0], output)?]),
                |values| vec![reference::embedding(&ids, &values[0], width)],
            ).map_err(|message| TestCaseError::fail(format!("{precision:?}: {message}")))?;
        }
    }

    #[test]
    fn rms_norm(
        (rows, width) in norm_sizes(),
        spread in prop_oneof![Just(1.0f64), Just(1e-3), Just(300.0)],
        seed: u64,
    ) {
        let mut random = Random::new(seed);
        let epsilon = norm_epsilon(width, spread);
        let input = Input::new("input", &[rows, width], random.normals(rows * width, spread));
        let inputs = [
            Input { gradient_terms: (spread * spread + f64::from(epsilon)).powf(-0.5), ..input },
            Input::new("weight", &[width], random.uniforms(width, 0.5, 1.5)),
        ];
        for precision in PRECISIONS {
            check_operator(
                precision, seed, Tolerance::SUM, &inputs, &[&[rows, width]],
                |tape, inputs| Ok(vec![ops::rms_norm(tape, &inputs[0], &inputs[1], epsilon)?]),
                |values| vec![reference::rms_norm(&values[0], &values[1], f64::from(epsilon))],
            ).map_err(|message| TestCaseError::fail(format!("{precision:?}: {message}")))?;
        }
    }

    #[test]
    fn rms_norm_residual((rows, width) in norm_sizes(), spread in prop_oneof![Just(1.0f64), Just(1.0 / 1024.0)], seed: u64) {
        let mut random = Random::new(seed);
        let epsilon = norm_epsilon(width, spread);
        // Sums of two are numbers of bf16, so that their rounding changes nothing.
        let part = |name, values: Vec<f64>| Input {
            gradient_terms: (spread * spread + f64::from(epsilon)).powf(-0.5).max(1.0),
            ..Input::new(
                name,
                &[rows, width],
                values.into_iter().map(|value| (16.0 * value).round().clamp(-64.0, 64.0) / 16.0 * spread).collect(),
            )
        };
        let inputs = [
            part("input", random.normals(rows * width, 1.0)),
            part("branch", random.normals(rows * width, 1.0)),
            Input::new("weight", &[width], random.uniforms(width, 0.5, 1.5)),
        ];
        for precision in PRECISIONS {
            check_operator(
                precision, seed, Tolerance::SUM, &inputs, &[&[rows, width], &[rows, width]],
                |tape, inputs| {
                    let (output, sum) = ops::rms_norm_residual(tape, &inputs[0], &inputs[1], &inputs[2], epsilon)?;
                    Ok(vec![output, sum])
                },
                |values| {
                    let sum: Vec<f64> = values[0].iter().zip(&values[1]).map(|(a, b)| a + b).collect();
                    vec![reference::rms_norm(&sum, &values[2], f64::from(epsilon)), sum]
                },
            ).map_err(|message| TestCaseError::fail(format!("{precision:?}: {message}")))?;
        }
    }
}

/// More blocks with rows than a thread takes sums of at a time, and several that add them; rows of a warp and of a block. The
/// same bits every time; words that a launch left behind would count in the next one, whose sums are zero.
#[test]
fn weight_gradients_of_many_rows() {
    let mut random = Random::new(4);
    for (rows, width) in [(4_700, 40), (530, 1056)] {
        let inputs = [
            Input::normal("input", &[rows, width], &mut random),
            Input::new("weight", &[width], random.uniforms(width, 0.5, 1.5)),
        ];
        check_operator(
            Precision::F32,
            4,
            Tolerance::SUM,
            &inputs,
            &[&[rows, width]],
            |tape, inputs| Ok(vec![ops::rms_norm(tape, &inputs[0], &inputs[1], 1e-5)?]),
            |values| vec![reference::rms_norm(&values[0], &values[1], 1e-5)],
        )
        .unwrap();
        let [input, weight] = inputs.map(|input| tensor(DType::F32, &input.shape, &input.values));
        let gradient = |seed: &Tensor| {
            let tape = Tape::new();
            let leaves = [tape.leaf(&input), tape.leaf(&weight)];
            let output = ops::rms_norm(&tape, &leaves[0], &leaves[1], 1e-5).unwrap();
            widened(tape.backward_from(vec![(output, seed.clone())]).unwrap().get(&leaves[1]).unwrap()).unwrap()
        };
        assert_eq!(gradient(&input), gradient(&input));
        let zeros = tensor(DType::F32, &[rows, width], &vec![0.0; rows * width]);
        assert!(gradient(&zeros).iter().all(|&gradient| gradient == 0.0));
    }
}

/// Squares whose mean is beyond f32, and below it where no epsilon is added.
#[test]
fn extreme_rows_give_the_limits() {
    for width in [8, 7, 1056] {
        let norm = |value: f64, epsilon| {
            let row = tensor(DType::F32, &[1, width], &vec![value; width]);
            let weight = tensor(DType::F32, &[width], &vec![1.0; width]);
            let tape = Tape::inference();
            widened(ops::rms_norm(&tape, &Var::constant(&row), &Var::constant(&weight), epsilon).unwrap().tensor())
                .unwrap()
        };
        assert!(norm(1e25, 1e-5).iter().all(|&value| value == 0.0), "{width}");
        assert!(norm(1e-25, 0.0).iter().all(|&value| value == f64::INFINITY), "{width}");
        assert!(norm(f64::NAN, 1e-5).iter().all(|value| value.is_nan()), "{width}");
    }
}

/// Finite differences have a step of 1e-5, which must be small against the root; and without an epsilon that counts, a
/// row of one or two elements has hardly any gradient, only rounding errors.
fn norm_epsilon(width: usize, spread: f64) -> f32 {
    if width < 4 || spread < 0.1 { f64::max(0.1 * spread * spread, 0.01) as f32 } else { 1e-5 }
}

/// Weights of more rows than are widened from bf16 at once, tables of more numbers than one task clears.
#[test]
fn large_weights() {
    let mut random = Random::new(8);
    let (rows, inner, outer) = (9, 7, 2051);
    let inputs = [
        Input::normal("input", &[rows, inner], &mut random),
        Input::new("weight", &[outer, inner], random.normals(outer * inner, 0.1)),
        Input::normal("bias", &[outer], &mut random),
    ];
    let (vocabulary, width) = (1031, 67);
    let ids: Vec<usize> = (0..50).map(|_| random.below(vocabulary)).collect();
    let id_tensor = indices(&[50], &ids);
    let table = [Input::normal("weight", &[vocabulary, width], &mut random)];
    for precision in PRECISIONS {
        check_operator(
            precision,
            8,
            Tolerance::SUM,
            &inputs,
            &[&[rows, outer]],
            |tape, inputs| Ok(vec![ops::linear(tape, &inputs[0], &inputs[1], Some(&inputs[2]))?]),
            |values| vec![reference::linear(&values[0], &values[1], Some(&values[2]), rows, inner, outer)],
        )
        .unwrap_or_else(|message| panic!("linear in {precision:?}: {message}"));
        check_operator(
            precision,
            8,
            Tolerance::SUM,
            &table,
            &[&[50, width]],
            |tape, inputs| {
                let output = ops::embedding(tape, &id_tensor, &inputs[0], inputs[0].dtype())?;
                // The memory that the gradient will get: what is not cleared shows.
                drop(tensor(DType::F32, &[vocabulary, width], &vec![f64::NAN; vocabulary * width]));
                Ok(vec![output])
            },
            |values| vec![reference::embedding(&ids, &values[0], width)],
        )
        .unwrap_or_else(|message| panic!("embedding in {precision:?}: {message}"));
    }
}

/// The gradients of one id are added in the order of their tokens: in f32, 1 is lost beside 10⁸, so every other order of
/// these shows.
#[test]
fn gradients_of_an_id_are_added_in_order() {
    // More of the others than are added at a time, and tokens of another id between them.
    let ids = [1, 0, 1, 1, 0, 1, 1, 1, 1, 1];
    let values = [1.0, 5.0, 1e8, -1e8, 5.0, 1.0, 1e8, -1e8, 1.0, 0.5];
    // Of the last one, a token has five warps forward, an id three backward.
    for width in [1, 8, 2056] {
        let weight = tensor(DType::F32, &[2, width], &vec![0.0; 2 * width]);
        let tape = Tape::new();
        let output = ops::embedding(&tape, &indices(&[10], &ids), &tape.leaf(&weight), DType::F32).unwrap();
        let seed: Vec<f64> = values.iter().flat_map(|value| vec![*value; width]).collect();
        let gradients = tape.backward_from(vec![(output, tensor(DType::F32, &[10, width], &seed))]).unwrap();
        let expected = [vec![10.0; width], vec![1.5; width]].concat();
        assert_eq!(gradients.get(&weight).unwrap().to_f32_vec().unwrap(), expected);
    }
}

/// More tokens and ids than a block of the sort takes at a time, one id with a third of the tokens, and on GPUs ids outside
/// the vocabulary. Sums of whole numbers are exact, and those of the last id show the order of its tokens, which lie far
/// apart.
#[test]
fn many_tokens_of_many_ids() {
    let (tokens, vocabulary, width) = (9001, 1100, 1);
    let mut random = Random::new(9);
    let last = vocabulary - 1;
    let mut ids: Vec<usize> =
        (0..tokens).map(|token| if token % 3 == 0 { 700 } else { random.below(vocabulary - 1) }).collect();
    let mut gradients: Vec<f64> = (0..tokens).map(|_| random.below(9) as f64).collect();
    for (token, gradient) in [(10, 1.0), (3000, 1e8), (6001, -1e8), (9000, 0.5)] {
        (ids[token], gradients[token]) = (last, gradient);
    }
    if !grafter_tests::device().is_cpu() {
        for (token, id) in [(0, vocabulary), (1, 1536), (4097, vocabulary), (8999, u32::MAX as usize)] {
            ids[token] = id;
        }
    }
    let expected = check_embedding_gradient(DType::F32, [vocabulary, width], &ids, &gradients);
    assert_eq!(expected[last], 0.5);
}

/// Compares the gradient of a table with sums of whole numbers, which are exact, in the tokens' order; gives it back.
fn check_embedding_gradient(dtype: DType, shape: [usize; 2], ids: &[usize], gradients: &[f64]) -> Vec<f32> {
    let ([vocabulary, width], tokens) = (shape, ids.len());
    let mut expected = vec![0.0f32; vocabulary * width];
    for (index, gradient) in gradients.iter().enumerate() {
        if let Some(sum) = expected.get_mut(ids[index / width] * width + index % width) {
            *sum += *gradient as f32;
        }
    }
    let weight = tensor(dtype, &shape, &vec![0.0; vocabulary * width]);
    let tape = Tape::new();
    let output = ops::embedding(&tape, &indices(&[tokens], ids), &tape.leaf(&weight), dtype).unwrap();
    let seed = tensor(dtype, &[tokens, width], gradients);
    // The memory that the gradient gets: a row that nobody writes shows.
    drop(tensor(DType::F32, &shape, &vec![f64::NAN; vocabulary * width]));
    let found = tape.backward_from(vec![(output, seed)]).unwrap();
    assert_eq!(
        found.get(&weight).unwrap().to_f32_vec().unwrap(),
        expected,
        "{dtype:?}, {tokens} tokens, {width} columns"
    );
    expected
}

/// Padding: the sort has one id in every one of its warps' steps.
#[test]
fn tokens_that_all_have_one_id() {
    for tokens in [64, 65, 2049] {
        let gradients: Vec<f64> = (0..tokens * 5).map(|index| (index % 7) as f64).collect();
        check_embedding_gradient(DType::F32, [600, 5], &vec![513; tokens], &gradients);
    }
}

/// Ids of more than 64 tokens: several whose runs' first multiples of 64 one block looks at, others that further blocks do; ids of
/// 64 and of 65; and on GPUs as many tokens outside the vocabulary.
#[test]
fn many_ids_of_many_tokens() {
    // The first multiples of 64, in 64s: 0, 3, 4, 7; 8, 9, 13, 15; 17, 18 and, outside the vocabulary, 19.
    let counts = [65, 64, 66, 200, 70, 1, 0, 65, 300, 129, 65, 65, 65];
    let other = if grafter_tests::device().is_cpu() { 6 } else { counts.len() };
    let runs = counts.into_iter().enumerate().chain([(other, 100)]);
    let sorted: Vec<usize> = runs.flat_map(|(id, count)| vec![id; count]).collect();
    let tokens = sorted.len();
    assert_eq!(tokens, 1255);
    // 13 and 1255 have no common factor.
    let ids: Vec<usize> = (0..tokens).map(|token| sorted[token * 13 % tokens]).collect();
    // Columns of one part and of two, one by one and four at a time.
    for (dtype, width) in [(DType::F32, 33), (DType::F32, 132), (DType::Bf16, 5), (DType::Bf16, 132)] {
        let gradients: Vec<f64> = (0..tokens * width).map(|index| (index % 7) as f64).collect();
        check_embedding_gradient(dtype, [counts.len(), width], &ids, &gradients);
    }
}

/// On GPUs, where the host does not see the ids, such a row is NaN and its gradient goes nowhere.
#[test]
fn an_id_outside_the_vocabulary_is_named() {
    // Rows of one warp and of five.
    for width in [2, 2056] {
        let weight = tensor(DType::F32, &[3, width], &vec![1.0; 3 * width]);
        let tape = Tape::new();
        let output = ops::embedding(&tape, &indices(&[2], &[1, 3]), &tape.leaf(&weight), DType::F32);
        if weight.device().is_cpu() {
            let message = output.unwrap_err().to_string();
            assert!(message.contains("ids[1] is 3") && message.contains("below 3"), "{message}");
            continue;
        }
        let output = output.unwrap();
        let values = output.to_f32_vec().unwrap();
        let (known, unknown) = values.split_at(width);
        assert!(known.iter().all(|&value| value == 1.0) && unknown.iter().all(|value| value.is_nan()), "{values:?}");
        let seed = tensor(DType::F32, &[2, width], &vec![2.0; 2 * width]);
        let gradients = tape.backward_from(vec![(output, seed)]).unwrap();
        let expected = [0.0, 2.0, 0.0].map(|gradient| vec![gradient; width]).concat();
        assert_eq!(gradients.get(&weight).unwrap().to_f32_vec().unwrap(), expected);
    }
}

#[test]
fn arguments_of_wrong_shape_are_named() {
    let tape = Tape::inference();
    let zeros = |shape: &[usize]| Var::constant(&tensor(DType::F32, shape, &vec![0.0; shape.iter().product()]));
    let message = ops::linear(&tape, &zeros(&[2, 3]), &zeros(&[4, 5]), None).unwrap_err().to_string();
    assert!(message.contains("linear"), "{message}");
    let message = ops::linear(&tape, &zeros(&[2, 3]), &zeros(&[4, 3]), Some(&zeros(&[3]))).unwrap_err().to_string();
    assert!(message.contains("bias"), "{message}");
    let message = ops::rms_norm(&tape, &zeros(&[2, 3]), &zeros(&[2]), 1e-5).unwrap_err().to_string();
    assert!(message.contains("rms_norm: weight has shape [2]"), "{message}");
}
