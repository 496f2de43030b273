//! The head's loss takes memory for its chunks only. Alone in its file: memory is counted for the whole process.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use autograd::ops::{self, Divergence, DivergenceOptions, HeadChunks, HeadTeacher, TeacherSource};
use autograd::{DType, Tape, Var};
use grafter_tests::check::tensor;
use grafter_tests::random::Random;

#[test]
fn neither_models_logits_exist_whole() {
    const POSITIONS: usize = 96;
    const WIDTH: usize = 64;
    const VOCABULARY: usize = 4096;
    let device = grafter_tests::device();
    if device.is_cpu() {
        // There matrices are widened to f32 in passing.
        return;
    }
    let mut random = Random::new(1);
    let mut make = |shape: [usize; 2]| tensor(DType::Bf16, &shape, &random.normals(shape[0] * shape[1], 0.3));
    let (hidden, teacher_hidden) = (make([POSITIONS, WIDTH]), make([POSITIONS, WIDTH]));
    let (head, teacher_head) = (make([VOCABULARY, WIDTH]), make([VOCABULARY, WIDTH]));
    let options = DivergenceOptions {
        divergence: Divergence::ReverseKl,
        student_temperature: 1.0,
        teacher_temperature: 1.0,
        mask: None,
        denominator: 1.0,
    };
    let teacher = HeadTeacher {
        source: TeacherSource::Head { hidden: &teacher_hidden, head: &teacher_head },
        options,
        weight: 1.0,
    };
    let chunks = HeadChunks { logits: 8, gradients: 16 };
    let logits = |positions: usize| positions * VOCABULARY * DType::Bf16.size();
    for trained in [false, true] {
        device.synchronize().unwrap();
        device.reset_peak_memory();
        let before = device.memory_usage().in_use;
        let tape = Tape::new();
        let head = if trained { tape.leaf(&head) } else { Var::constant(&head) };
        let loss = ops::head_loss_in_chunks(&tape, &tape.leaf(&hidden), &head, Some(teacher), None, chunks).unwrap();
        let taken = device.memory_usage().peak - before;
        assert!(loss.loss.item().unwrap().is_finite());
        let head_gradient = if trained { VOCABULARY * WIDTH * DType::F32.size() } else { 0 };
        // States and losses beside the logits are small.
        let allowed = logits(2 * chunks.logits + chunks.gradients) + head_gradient + logits(8);
        assert!(taken <= allowed, "{taken} bytes, expected at most {allowed}");
        assert!(allowed - head_gradient < logits(POSITIONS));
    }
}
