//! One file per kernel, or per family of kernels that belong together.

use crate::Element;
use crate::asm::{Address, Assembler, F32, Global, U32, Value};

mod block_sums;

/// Declares the files and collects every configuration that models use.
macro_rules! kernels {
    ($($file:ident: $($kernel:ident),+;)*) => {
        $(pub mod $file;)*

        /// Every kernel in every configuration that models use, for tools that print, assemble or list all of them.
        pub fn catalogue() -> Vec<crate::Kernel> {
            let mut all = Vec::new();
            $($(all.extend(
                <$file::$kernel as crate::KernelSource>::configurations().iter().map(crate::KernelSource::build),
            );)+)*
            all
        }
    };
}
kernels! {
    adamw: AdamW;
    attention: VisibleKeys, AttentionForward, AttentionDelta, AttentionQueryGradient, AttentionKeyGradients, GeneralForward,
        GeneralQueryGradient, GeneralKeyGradients, CachedAttention, CombineParts;
    axpy: Axpy;
    cast: Cast;
    causal_conv1d: ConvolutionForward, ConvolutionBackward, ConvolutionStep;
    column_sums: ColumnSums;
    cross_entropy: CrossEntropyForward, CrossEntropyBackward;
    decoding: ConvolutionState, ExtendCache, Advance;
    divergence: DivergenceForward, DivergenceBackward;
    elementwise: Elementwise;
    embedding: EmbeddingForward, EmbeddingOrder, EmbeddingBackward, EmbeddingRepeated;
    few_rows_product: FewRowsProduct;
    fill: Fill;
    layout: CopyColumns, RepeatChunks, SumChunks;
    loss_total: LossTotal;
    mamba_step: MambaStep;
    matrix_product: MatrixProduct;
    matrix_product_f32: MatrixProductF32;
    rms_norm: RmsNormForward, RmsNormBackward;
    rms_norm_any_width: RmsNormAnyWidthForward, RmsNormAnyWidthInputGradient, RmsNormAnyWidthWeightGradient;
    rope: Rope;
    sampling: ArgMax, Sample;
    scale_by: ScaleBy;
    square_sums: SquareSums;
    sum: Sum, Broadcast;
    selective_scan: SpanStates, ScanForward, SerialForward, SpanCarries, ScanBackward, SerialBackward, CombineSpans, GroupSums, ScanStep;
    sum_parts: SumParts;
    swiglu: SwigluForward, SwigluBackward;
    top_log_probabilities: TeacherLogits;
    vocabulary_loss: VocabularyLoss;
}

/// Blocks of `threads` threads in x so that each of `count` elements has its own; `None` beyond the 2³¹ − 1 blocks that
/// every device takes.
pub fn one_thread_per_element(count: u64, threads: u32) -> Option<[u32; 3]> {
    let blocks = count.div_ceil(u64::from(threads));
    (blocks <= i32::MAX as u64).then_some([blocks as u32, 1, 1])
}

/// Neighbouring elements of bf16 that lie in 16 bytes.
pub const VECTOR: u32 = 8;

/// Neighbouring elements that one thread of an elementwise kernel takes: 16 bytes of its widest operands. What the threads of
/// a warp write together then has no gaps: with two accesses of 16 bytes for each, writing took a tenth longer.
pub(crate) fn lanes_of(widest: Element) -> u32 {
    16 / widest.bytes() as u32
}

/// The blocks of an elementwise kernel whose body is `vectors`; `None` when one launch cannot cover the elements.
fn vectors_grid(count: u64, threads: u32, widest: Element) -> Option<[u32; 3]> {
    let lanes = lanes_of(widest);
    // Indices are 32 bits wide.
    (count <= u64::from(u32::MAX) - u64::from(lanes * threads))
        .then(|| one_thread_per_element(count.div_ceil(u64::from(lanes)), threads))
        .flatten()
}

/// The body of an elementwise kernel: `outputs[i] = function(inputs[i])` for `0 ≤ i < count`. A thread takes
/// [`lanes_of`] neighbouring elements; the last one takes what is left one by one.
pub(crate) fn vectors<'a, const I: usize, const O: usize>(
    k: &'a Assembler,
    threads: u32,
    count: Value<'a, U32>,
    inputs: &[Global<'a>; I],
    outputs: &[Global<'a>; O],
    function: impl Fn([Value<'a, F32>; I]) -> [Value<'a, F32>; O],
) {
    let f32s = inputs.iter().chain(outputs).any(|memory| memory.element() == Element::F32);
    let lanes = lanes_of(if f32s { Element::F32 } else { Element::Bf16 });
    let first = (k.global_thread(threads) * lanes).named("first");
    let whole = (first + lanes).le(count);
    k.if_else(
        whole,
        || {
            let values = inputs.map(|input| input.at(first).load_values(lanes as usize));
            let mut results: [Vec<Value<'a, F32>>; O] = std::array::from_fn(|_| Vec::new());
            for lane in 0..lanes as usize {
                let computed = function(values.each_ref().map(|vector| vector[lane]));
                for (result, value) in results.iter_mut().zip(computed) {
                    result.push(value);
                }
            }
            for (output, values) in outputs.iter().zip(&results) {
                output.at(first).store_vector(values);
            }
        },
        || {
            k.for_(first, count, 1, |index| {
                let computed = function(inputs.map(|input| input.at(index).load()));
                for (output, value) in outputs.iter().zip(computed) {
                    output.at(index).store(value);
                }
            });
        },
    );
}

/// The elements that a thread takes at a time where rows are vectors: [`VECTOR`] neighbours by wide accesses, or else one.
pub(crate) fn load_part<'a>(place: Address<'a>, vector: bool) -> Vec<Value<'a, F32>> {
    if vector { place.load_vector::<{ VECTOR as usize }>().to_vec() } else { vec![place.load()] }
}

/// Writes what [`load_part`] reads.
pub(crate) fn store_part<'a>(place: Address<'a>, values: &[Value<'a, F32>]) {
    match values {
        [value] => place.store(*value),
        _ => place.store_vector(values),
    }
}

/// A configuration for each type that floating-point tensors have.
pub(crate) fn float_elements<K>(configuration: impl Fn(Element) -> K) -> Vec<K> {
    [Element::F32, Element::Bf16].into_iter().map(configuration).collect()
}

#[cfg(test)]
mod tests {
    use super::one_thread_per_element;

    #[test]
    fn the_grid_covers_every_element() {
        assert_eq!(one_thread_per_element(0, 256), Some([0, 1, 1]));
        assert_eq!(one_thread_per_element(1, 256), Some([1, 1, 1]));
        assert_eq!(one_thread_per_element(256, 256), Some([1, 1, 1]));
        assert_eq!(one_thread_per_element(257, 256), Some([2, 1, 1]));
        assert_eq!(one_thread_per_element(u64::MAX, 256), None);
    }
}
