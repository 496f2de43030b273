//! Small kernels that decoding alone needs. All are bound by their launch.
//!
//! - [`ConvolutionState`]: the state that a causal convolution leaves after a whole sequence, its last inputs. One thread per
//!   element of the state, which is read once, as an input, and written once.
//! - [`ExtendCache`]: one token's query and key rotated, its key and value put into their caches. One thread per pair of
//!   elements, with the arithmetic of [`Rope`](super::rope::Rope).
//! - [`Advance`]: counters of positions go on by one.

use crate::asm::{Assembler, Description, Global};
use crate::{Element, Kernel, KernelSource, Target, Work};

const THREADS: u32 = 256;

/// The last `width` inputs of every channel, oldest first, zero where the sequence is shorter.
///
/// Parameters: `state` (f32 `[batch, channels, width]`, written), `input` (`[batch, time, channels]`), `count` (u32: elements
/// of the state), `time`, `channels`, `width` (u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ConvolutionState {
    /// Type of the input.
    pub element: Element,
}

impl KernelSource for ConvolutionState {
    fn build(&self) -> Kernel {
        let element = self.element;
        let bytes = 4 + element.bytes() as u64;
        let description = Description {
            name: format!("convolution_state_{element}"),
            summary: "state[b, c, w] = input[b, time - width + w, c], zero before the first; one thread per element"
                .to_owned(),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["count"],
            work: move |sizes: &[u64]| Work { bytes: bytes * sizes[0], operations: 0 },
        };
        Assembler::assemble(description, |k| {
            let (state, input) = (k.write("state", Element::F32), k.read("input", element));
            let (count, time, channels, width) = (k.u32("count"), k.u32("time"), k.u32("channels"), k.u32("width"));
            let index = k.global_thread(THREADS).named("index");
            k.return_if(index.ge(count));
            let series = index.div(width).named("series");
            let column = index - series * width;
            let row = series.div(channels).named("row");
            let channel = series - row * channels;
            let past_width = time + column;
            let step = row.mad(time, past_width - width);
            let value = input.from_row(step, channels).at(channel).load_if(past_width.ge(width), 0.0);
            state.at(index).store(value);
        })
    }

    fn configurations() -> Vec<Self> {
        super::float_elements(|element| Self { element })
    }
}

/// A token's query and key rotated, its key and value put into their caches at the row's position. A position beyond the room
/// writes nothing.
///
/// Parameters: `rotated` (`[batch, heads, 2 half]`), `keys`, `values` (`[batch, room, key heads, 2 half]`; all three written),
/// `query` (like `rotated`), `key`, `value` (`[batch, key heads, 2 half]`), `positions` (u32 `[batch]`), `frequencies` (f32 `[half]`,
/// radians per position), `factor` (f32: on cosine and sine), `batch`, `room`, `heads`, `key_heads`, `half` (u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ExtendCache {
    /// Type of everything but positions and frequencies.
    pub element: Element,
}

impl ExtendCache {
    /// Blocks for so many pairs of query, key and value heads together; `None` when one launch cannot cover them.
    pub fn grid(pairs: u64) -> Option<[u32; 3]> {
        super::one_thread_per_element(pairs, THREADS).filter(|_| pairs <= u64::from(u32::MAX - THREADS))
    }
}

impl KernelSource for ExtendCache {
    fn build(&self) -> Kernel {
        let element = self.element;
        let bytes = element.bytes() as u64;
        let description = Description {
            name: format!("extend_cache_{element}"),
            summary: "rotates a token's query and key and puts key and value into their caches; one thread per pair"
                .to_owned(),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["pairs"],
            work: move |sizes: &[u64]| Work { bytes: 4 * bytes * sizes[0], operations: 6 * sizes[0] },
        };
        Assembler::assemble(description, |k| {
            let [rotated, keys, values] = ["rotated", "keys", "values"].map(|name| k.write(name, element));
            let [query, key, value] = ["query", "key", "value"].map(|name| k.read(name, element));
            let (positions, frequencies) = (k.read("positions", Element::U32), k.read("frequencies", Element::F32));
            let factor = k.f32("factor");
            let (batch, room, heads) = (k.u32("batch"), k.u32("room"), k.u32("heads"));
            let (key_heads, half) = (k.u32("key_heads"), k.u32("half"));
            let index = k.global_thread(THREADS).named("index");
            let item = index.div(half).named("item");
            let pair = index - item * half;
            let all_heads = heads + key_heads * 2;
            let row = item.div(all_heads).named("row");
            k.return_if(row.ge(batch));
            let head = item - row * all_heads;
            let width = half * 2;
            let position = positions.at(row).load_u32().named("position");

            k.comment("cosine and sine");
            let angle = position.to_f32() * frequencies.at(pair).load();
            let (cosine, sine) = super::rope::cosine_sine(angle);
            let (cosine, sine) = (cosine * factor, sine * factor);
            let rotate = |source: Global<'_>, target: Global<'_>| {
                let (a, b) = (source.at(pair).load(), source.at(pair + half).load());
                target.at(pair).store(a.fma(cosine, -(b * sine)));
                target.at(pair + half).store(b.fma(cosine, a * sine));
            };

            k.comment("query, key or value");
            k.if_else(
                head.lt(heads),
                || {
                    let row = row.mad(heads, head);
                    rotate(query.from_row(row, width), rotated.from_row(row, width));
                },
                || {
                    k.if_(position.lt(room), || {
                        let place = row.mad(room, position);
                        let of_key = head - heads;
                        k.if_else(
                            of_key.lt(key_heads),
                            || {
                                let source = key.from_row(row.mad(key_heads, of_key), width);
                                rotate(source, keys.from_row(place.mad(key_heads, of_key), width));
                            },
                            || {
                                let head = of_key - key_heads;
                                let source = value.from_row(row.mad(key_heads, head), width);
                                let target = values.from_row(place.mad(key_heads, head), width);
                                for element in [pair, pair + half] {
                                    target.at(element).store(source.at(element).load());
                                }
                            },
                        );
                    });
                },
            );
        })
    }

    fn configurations() -> Vec<Self> {
        super::float_elements(|element| Self { element })
    }
}

/// `positions[i] += 1`.
///
/// Parameters: `positions` (u32, written), `count` (u32).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Advance;

impl Advance {
    /// Blocks for so many positions; `None` when one launch cannot cover them.
    pub fn grid(count: u64) -> Option<[u32; 3]> {
        super::one_thread_per_element(count, THREADS)
    }
}

impl KernelSource for Advance {
    fn build(&self) -> Kernel {
        let description = Description {
            name: "advance".to_owned(),
            summary: "positions[i] += 1; one thread per position".to_owned(),
            block: [THREADS, 1, 1],
            target: Target::Sm80,
            sizes: &["count"],
            work: |sizes: &[u64]| Work { bytes: 8 * sizes[0], operations: sizes[0] },
        };
        Assembler::assemble(description, |k| {
            let (positions, count) = (k.write("positions", Element::U32), k.u32("count"));
            let index = k.global_thread(THREADS).named("index");
            k.return_if(index.ge(count));
            let place = positions.at(index);
            place.store_u32(place.load_u32() + 1);
        })
    }

    fn configurations() -> Vec<Self> {
        vec![Self]
    }
}

impl ConvolutionState {
    /// Blocks for `count` elements of the state; `None` when one launch cannot cover them.
    pub fn grid(count: u64) -> Option<[u32; 3]> {
        super::one_thread_per_element(count, THREADS)
    }
}
