//! What decoding alone uses: products of few rows, steps on caches, against their references and against the operators on
//! whole sequences.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use autograd::{DType, Tape, Tensor, Var, ops};
use grafter_tests::check::{agree, cases, tensor, widened};
use grafter_tests::random::Random;
use grafter_tests::reference;
use proptest::prelude::*;
use tools::compare::Bounds;

/// Results in bf16: their own rounding, and that of the residual's sum before.
const ROUNDED: Bounds = Bounds { relative_l2: Some(4e-3), relative_max: Some(8e-3) };

/// `[rows, width]` of normal numbers.
fn matrix(dtype: DType, rows: usize, width: usize, random: &mut Random) -> Tensor {
    tensor(dtype, &[rows, width], &random.normals(rows * width, 1.0))
}

/// Rows around what tensor cores take at a time and around the most that the way for few rows takes.
fn few_rows() -> impl Strategy<Value = usize> {
    prop_oneof![2 => Just(1usize), 2 => 2..=9usize, 1 => 15..=17usize, 1 => 31..=33usize, 1 => 63..=65usize]
}

/// Depths around a lane's words, a warp's part, all warps' parts and the parts on their way.
fn depth() -> impl Strategy<Value = usize> {
    prop_oneof![
        1 => Just(0usize),
        4 => (1..=17usize).prop_map(|eighths| 8 * eighths),
        1 => (63..=65usize).prop_map(|eighths| 8 * eighths),
        1 => (255..=257usize).prop_map(|eighths| 8 * eighths),
        1 => (383..=385usize).prop_map(|eighths| 8 * eighths),
        1 => 1..40usize,
    ]
}

proptest! {
    #![proptest_config(cases(128))]

    #[test]
    fn products_of_few_rows(
        rows in few_rows(), depth in depth(), outer in prop_oneof![1..=20usize, 1..=3usize], bias: bool, residual: bool, seed: u64,
    ) {
        let mut random = Random::new(seed);
        let scale = (depth.max(1) as f64).powf(-0.5);
        let input = matrix(DType::Bf16, rows, depth, &mut random);
        let weight = tensor(DType::Bf16, &[outer, depth], &random.normals(outer * depth, scale));
        let added = matrix(DType::Bf16, rows, outer, &mut random);
        let bias = bias.then(|| tensor(DType::F32, &[outer], &random.normals(outer, 1.0)));
        let product = |input: &Tensor, added: &Tensor| {
            let [input, added] = [input, added].map(Var::constant);
            let (weight, bias) = (Var::constant(&weight), bias.as_ref().map(Var::constant));
            let tape = Tape::inference();
            let output = match residual {
                true => ops::linear_residual(&tape, &added, &input, &weight, bias.as_ref()),
                false => ops::linear(&tape, &input, &weight, bias.as_ref()),
            };
            output.unwrap().tensor().clone()
        };
        let output = product(&input, &added);
        let bias_values = bias.as_ref().map(|bias| widened(bias).unwrap());
        let mut expected = reference::linear(
            &widened(&input).unwrap(), &widened(&weight).unwrap(), bias_values.as_deref(), rows, depth, outer,
        );
        if residual {
            expected.iter_mut().zip(widened(&added).unwrap()).for_each(|(expected, added)| *expected += added);
        }
        prop_assert_eq!(output.dtype(), DType::Bf16);
        let values = widened(&output).unwrap();
        agree("output", &[rows, outer], &values, &expected, ROUNDED).map_err(TestCaseError::fail)?;

        // A row's result does not depend on the others, wherever one way takes both.
        if rows <= 64 && depth % 8 == 0 && !grafter_tests::device().is_cpu() {
            let last = |tensor: &Tensor| {
                let width = tensor.shape()[1];
                let values = widened(tensor).unwrap();
                self::tensor(DType::Bf16, &[1, width], &values[(rows - 1) * width..])
            };
            let alone = product(&last(&input), &last(&added));
            prop_assert_eq!(widened(&alone).unwrap(), values[(rows - 1) * outer..].to_vec());
        }
    }
}
