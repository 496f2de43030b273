//! Operators on the caches of decoding. None is recorded: decoding has no backward.

use kernels_ptx::kernels::decoding::{Advance, ConvolutionState, ExtendCache};
use rayon::prelude::*;
use runtime::Argument;
use runtime::matrix::{Matrix, MatrixMut, Threads, multiply};

use super::attention::{Last, softmax};
use super::layout::{Columns, copy_columns};
use super::rope::{RotaryTable, frequencies_on, rope};
use crate::gpu::{self, Output};
use crate::{DType, Error, Result, Tape, Tensor, Var, check};

/// A copy of `cache` (f32 `[batch, room, …]`) with room for `room` steps of time; the new steps are unspecified.
///
/// # Errors
/// A shape error when `room` is less than there is; out of memory.
pub fn with_room(cache: &Tensor, room: usize) -> Result<Tensor> {
    const OPERATOR: &str = "with_room";
    check::is_float(OPERATOR, "cache", cache)?;
    let (batch, old, width) = batch_time_width(OPERATOR, "cache", cache)?;
    if room < old {
        return Err(Error::Invalid { operator: OPERATOR, message: format!("{room} steps of room for {old} steps") });
    }
    let mut shape = cache.shape().to_vec();
    shape[1] = room;
    if !cache.device().is_cpu() {
        let mut target = Output::new(cache.device(), &shape, cache.dtype())?;
        let columns = Columns { rows: batch, count: old * width, from: (0, old * width), to: (0, room * width) };
        copy_columns(OPERATOR, target.write(), cache, &columns)?;
        return Ok(target.tensor());
    }
    let source = cache.host_slice::<f32>()?;
    Tensor::compute(cache.device(), &shape, cache.dtype(), |target| {
        for row in 0..batch {
            let kept = &source[row * old * width..][..old * width];
            let (copied, rest) = target[row * room * width..][..room * width].split_at_mut(kept.len());
            copied.copy_from_slice(kept);
            rest.fill(0.0);
        }
        Ok(())
    })
}

/// Writes `step` (f32 `[batch, steps, …]`) into `cache` (f32 `[batch, room, …]`) from time `time` on, in place.
///
/// # Errors
/// Shape errors; steps that do not fit the room.
pub fn write_time(cache: &mut Tensor, step: &Tensor, time: usize) -> Result<()> {
    const OPERATOR: &str = "write_time";
    check::is_float(OPERATOR, "cache", cache)?;
    let (batch, room, width) = batch_time_width(OPERATOR, "cache", cache)?;
    let (step_batch, steps, step_width) = batch_time_width(OPERATOR, "step", step)?;
    if step_batch != batch || step_width != width || time + steps > room {
        return Err(Error::Shape {
            operator: OPERATOR,
            argument: "step",
            expected: format!("[{batch}, at most {} steps, …] of {width} elements each", room.saturating_sub(time)),
            found: step.shape().to_vec(),
        });
    }
    if !cache.device().is_cpu() {
        let step = step.cast(cache.dtype())?;
        let (element, count) = (gpu::element(cache.dtype()), steps * width);
        let columns = Columns { rows: batch, count, from: (0, count), to: (time * width, room * width) };
        return copy_columns(OPERATOR, Argument::Write(cache.make_unique()?, element), &step, &columns);
    }
    let source = step.host_slice::<f32>()?;
    let target = cache.make_mut::<f32>()?;
    for row in 0..batch {
        target[(row * room + time) * width..][..steps * width]
            .copy_from_slice(&source[row * steps * width..][..steps * width]);
    }
    Ok(())
}

/// The last step of every row: `[batch, time, …]` to `[batch, …]`.
///
/// # Errors
/// A shape error when there is no step.
pub fn last_step(input: &Tensor) -> Result<Tensor> {
    const OPERATOR: &str = "last_step";
    check::is_float(OPERATOR, "input", input)?;
    let (batch, time, width) = batch_time_width(OPERATOR, "input", input)?;
    if time == 0 {
        return Err(Error::Shape {
            operator: OPERATOR,
            argument: "input",
            expected: "at least one step of time".to_owned(),
            found: input.shape().to_vec(),
        });
    }
    let mut shape = input.shape().to_vec();
    shape.remove(1);
    if !input.device().is_cpu() {
        let mut output = Output::new(input.device(), &shape, input.dtype())?;
        let from = ((time - 1) * width, time * width);
        copy_columns(OPERATOR, output.write(), input, &Columns { rows: batch, count: width, from, to: (0, width) })?;
        return Ok(output.tensor());
    }
    let source = input.host_f32()?;
    Tensor::compute(input.device(), &shape, input.dtype(), |output| {
        for row in 0..batch {
            output[row * width..][..width].copy_from_slice(&source[((row + 1) * time - 1) * width..][..width]);
        }
        Ok(())
    })
}

/// The convolution state after a whole sequence: the last `width` inputs of every channel, oldest first, zero where
/// the sequence is shorter. `input` `[batch, time, channels]` gives f32 `[batch, channels, width]`.
///
/// # Errors
/// Shape errors that name the argument.
pub fn convolution_state(input: &Tensor, width: usize) -> Result<Tensor> {
    const OPERATOR: &str = "convolution_state";
    check::is_float(OPERATOR, "input", input)?;
    check::rank(OPERATOR, "input", input, 3, "[batch, time, channels]")?;
    let [batch, time, channels] = [input.shape()[0], input.shape()[1], input.shape()[2]];
    if !input.device().is_cpu() {
        let mut state = Output::new(input.device(), &[batch, channels, width], DType::F32)?;
        let size = |what: &str, size: usize| gpu::size(OPERATOR, what, size);
        let count = size("the number of elements", batch * channels * width)?;
        let [time, channels, width] = [size("time", time)?, size("channels", channels)?, size("width", width)?];
        let sizes = [count, time, channels, width].map(Argument::U32);
        let arguments: Vec<_> = [state.write(), gpu::read(input)].into_iter().chain(sizes).collect();
        let kernel = ConvolutionState { element: gpu::element(input.dtype()) };
        let grid = ConvolutionState::grid(count.into());
        gpu::launch(OPERATOR, input.device(), &kernel, grid, &[count.into()], &arguments)?;
        return Ok(state.tensor());
    }
    let source = input.host_f32()?;
    Tensor::compute(input.device(), &[batch, channels, width], DType::F32, |state| {
        for (index, value) in state.iter_mut().enumerate() {
            let (column, channel, row) = (index % width, index / width % channels, index / width / channels);
            *value = match (time + column).checked_sub(width) {
                Some(step) => source[(row * time + step) * channels + channel],
                None => 0.0,
            };
        }
        Ok(())
    })
}

/// One token per row on its way into the caches of attention.
#[derive(Clone, Copy, Debug)]
pub struct CacheStep<'a> {
    /// `[batch, 1, query heads, head size]`.
    pub query: &'a Tensor,
    /// `[batch, 1, key heads, head size]`.
    pub key: &'a Tensor,
    /// Like `key`.
    pub value: &'a Tensor,
    /// u32 `[batch, 1]`: where each row's token stands, below the caches' room.
    pub positions: &'a Tensor,
    /// The rotation of query and key.
    pub rotary: &'a RotaryTable,
}

/// Writes the rotated keys and the values of one token per row into their caches (`[batch, room, key heads, head size]`, of the
/// step's element type) in place, and returns the rotated queries.
///
/// On GPUs, where reading the positions would make the host wait, a position beyond the room writes nothing.
///
/// # Errors
/// Shape errors that name the argument; a table of another head size; on the CPU, a position beyond the room.
pub fn extend_cache(keys: &mut Tensor, values: &mut Tensor, step: CacheStep<'_>) -> Result<Tensor> {
    const OPERATOR: &str = "extend_cache";
    let CacheStep { query, key, value, positions, rotary } = step;
    check::is_float(OPERATOR, "query", query)?;
    check::rank(OPERATOR, "query", query, 4, "[batch, 1, query heads, head size]")?;
    check::rank(OPERATOR, "key", key, 4, "[batch, 1, key heads, head size]")?;
    check::rank(OPERATOR, "keys", keys, 4, "[batch, room, key heads, head size]")?;
    let ([batch, _, heads, size], [_, _, key_heads, _]) = (four(query), four(key));
    let room = keys.shape()[1];
    check::shape(OPERATOR, "query", query, &[batch, 1, heads, size])?;
    for (name, tensor) in [("key", key), ("value", value)] {
        check::shape(OPERATOR, name, tensor, &[batch, 1, key_heads, size])?;
    }
    for (name, cache) in [("keys", &*keys), ("values", &*values)] {
        check::is_float(OPERATOR, name, cache)?;
        check::shape(OPERATOR, name, cache, &[batch, room, key_heads, size])?;
    }
    check::is_u32(OPERATOR, "positions", positions)?;
    check::shape(OPERATOR, "positions", positions, &[batch, 1])?;
    if rotary.inverse_frequencies.len() * 2 != size {
        let message = format!(
            "heads of {size} dimensions and a table of {} frequencies: expected one for each pair",
            rotary.inverse_frequencies.len()
        );
        return Err(Error::Invalid { operator: OPERATOR, message });
    }
    if !query.device().is_cpu() {
        return extend_cache_gpu(OPERATOR, keys, values, step);
    }
    let tape = Tape::inference();
    let rotate = |tensor: &Tensor| rope(&tape, &Var::constant(tensor), positions, rotary);
    let (query, key) = (rotate(query)?, rotate(key)?);
    let width = key_heads * size;
    for (cache, new) in [(keys, key.tensor()), (values, value)] {
        let new = new.host_f32()?;
        let target = cache.make_mut::<f32>()?;
        for (row, &position) in positions.host_slice::<u32>()?.iter().enumerate() {
            let position = position as usize;
            if position >= room {
                let message = format!("position {position} in a cache with room for {room}");
                return Err(Error::Invalid { operator: OPERATOR, message });
            }
            target[(row * room + position) * width..][..width].copy_from_slice(&new[row * width..][..width]);
        }
    }
    Ok(query.tensor().clone())
}

fn extend_cache_gpu(
    operator: &'static str,
    keys: &mut Tensor,
    values: &mut Tensor,
    step: CacheStep<'_>,
) -> Result<Tensor> {
    let CacheStep { query, key, value, positions, rotary } = step;
    let (device, dtype) = (query.device(), query.dtype());
    let ([batch, _, heads, size], [_, room, key_heads, _]) = (four(query), four(keys));
    let pairs = (batch * (heads + 2 * key_heads) * size / 2) as u64;
    let number = |what, size| gpu::size(operator, what, size);
    number("the number of steps of all caches", batch * room * key_heads)?;
    let [batch, room, heads] = [number("the batch", batch)?, number("the room", room)?, number("the heads", heads)?];
    let [key_heads, half] = [number("the key heads", key_heads)?, number("half the head size", size / 2)?];
    let (key, value) = (key.cast(dtype)?, value.cast(dtype)?);
    for cache in [&mut *keys, &mut *values] {
        if cache.dtype() != dtype {
            *cache = cache.cast(dtype)?;
        }
    }
    let (element, frequencies) = (gpu::element(dtype), frequencies_on(device, rotary)?);
    let mut rotated = Output::like(query)?;
    let mut arguments = vec![
        rotated.write(),
        Argument::Write(keys.make_unique()?, element),
        Argument::Write(values.make_unique()?, element),
    ];
    arguments.extend([query, &key, &value, positions, &frequencies].map(gpu::read));
    arguments.push(Argument::F32(rotary.attention_factor));
    arguments.extend([batch, room, heads, key_heads, half].map(Argument::U32));
    gpu::launch(operator, device, &ExtendCache { element }, ExtendCache::grid(pairs), &[pairs], &arguments)?;
    drop(arguments);
    Ok(rotated.tensor())
}

/// Adds 1 to every position (u32), in place.
///
/// # Errors
/// Element-type errors; driver errors.
pub fn advance(positions: &mut Tensor) -> Result<()> {
    const OPERATOR: &str = "advance";
    check::is_u32(OPERATOR, "positions", positions)?;
    if positions.device().is_cpu() {
        positions.make_mut::<u32>()?.iter_mut().for_each(|position| *position += 1);
        return Ok(());
    }
    let (device, count) = (positions.device().clone(), positions.count());
    let sizes = [count as u64];
    let count = gpu::size(OPERATOR, "the number of positions", count)?;
    let target = Argument::Write(positions.make_unique()?, kernels_ptx::Element::U32);
    gpu::launch(OPERATOR, &device, &Advance, Advance::grid(count.into()), &sizes, &[target, Argument::U32(count)])
}

/// Attention of the last `query time` positions over the first `length` positions of a cache.
///
/// - `query` `[batch, query time, query heads, head size]`
/// - `keys`, `values` `[batch, room, key heads, head size]` (f32 on the CPU), `length` of `room` filled, the queries' own included
/// - `scale` and `window` as in [`super::AttentionOptions`]; result like `query`
///
/// # Errors
/// Shape errors that name the argument; heads or times that do not fit each other; a window of 0.
pub fn attention_cached(
    query: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    length: usize,
    scale: f32,
    window: Option<usize>,
) -> Result<Tensor> {
    const OPERATOR: &str = "attention_cached";
    let [_, query_time, heads, _] = check_cached(OPERATOR, query, keys, values, window)?;
    let (room, key_heads) = (keys.shape()[1], keys.shape()[2]);
    if length > room || query_time > length {
        return Err(Error::Invalid {
            operator: OPERATOR,
            message: format!(
                "{query_time} queries of {heads} heads over {length} of {room} positions of {key_heads} heads: queries \
                 must be the last positions and key heads must divide query heads"
            ),
        });
    }
    if !query.device().is_cpu() {
        return super::attention::cached(OPERATOR, query, keys, values, Last::Length(length), scale, window);
    }
    attention_cpu(query, keys, values, scale, window, |_, step| length - query_time + step + 1)
}

/// Attention of one token per row over a cache: each sees the positions up to its own.
///
/// As [`attention_cached`] with a query time of 1; `positions` u32 `[batch, 1]`, below the room (greater ones count as the last on
/// GPUs, where reading them would make the host wait).
///
/// # Errors
/// As [`attention_cached`]; on the CPU, a position beyond the room.
pub fn attention_step(
    query: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    positions: &Tensor,
    scale: f32,
    window: Option<usize>,
) -> Result<Tensor> {
    const OPERATOR: &str = "attention_step";
    let [batch, query_time, ..] = check_cached(OPERATOR, query, keys, values, window)?;
    check::is_u32(OPERATOR, "positions", positions)?;
    check::shape(OPERATOR, "positions", positions, &[batch, 1])?;
    if query_time != 1 {
        let message = format!("{query_time} queries of each row: expected one");
        return Err(Error::Invalid { operator: OPERATOR, message });
    }
    if !query.device().is_cpu() {
        return super::attention::cached(OPERATOR, query, keys, values, Last::Positions(positions), scale, window);
    }
    let (positions, room) = (positions.host_slice::<u32>()?, keys.shape()[1]);
    if let Some(position) = positions.iter().find(|&&position| position as usize >= room) {
        let message = format!("position {position} in a cache with room for {room}");
        return Err(Error::Invalid { operator: OPERATOR, message });
    }
    attention_cpu(query, keys, values, scale, window, |row, _| positions[row] as usize + 1)
}

/// The query's shape, which fits those of the caches.
fn check_cached(
    operator: &'static str,
    query: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    window: Option<usize>,
) -> Result<[usize; 4]> {
    check::is_float(operator, "query", query)?;
    check::is_float(operator, "keys", keys)?;
    check::is_float(operator, "values", values)?;
    check::rank(operator, "query", query, 4, "[batch, query time, query heads, head size]")?;
    check::rank(operator, "keys", keys, 4, "[batch, room, key heads, head size]")?;
    check::shape(operator, "values", values, keys.shape())?;
    let ([batch, query_time, heads, head_size], [_, room, key_heads, _]) = (four(query), four(keys));
    check::shape(operator, "keys", keys, &[batch, room, key_heads, head_size])?;
    if key_heads == 0 || !heads.is_multiple_of(key_heads) {
        let message = format!("{heads} query heads and {key_heads} key heads: key heads must divide query heads");
        return Err(Error::Invalid { operator, message });
    }
    if window == Some(0) {
        let message = "a window of 0 keys: a query sees at least itself".to_owned();
        return Err(Error::Invalid { operator, message });
    }
    Ok([batch, query_time, heads, head_size])
}

/// `end` gives, for a row and a step of its queries, where the keys that the query sees end.
fn attention_cpu(
    query: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    scale: f32,
    window: Option<usize>,
    end: impl Fn(usize, usize) -> usize + Sync,
) -> Result<Tensor> {
    let ([_, query_time, heads, head_size], [_, room, key_heads, _]) = (four(query), four(keys));
    let (query_values, key_values) = (query.host_f32()?, keys.host_f32()?);
    let value_values = values.host_f32()?;
    // The query heads of one key head lie side by side: together they read its keys and values once.
    let group = heads / key_heads;
    let (group_width, stride) = (group * head_size, key_heads * head_size);
    Tensor::compute(query.device(), query.shape(), query.dtype(), |output| {
        let queries = query_values.par_chunks(group_width.max(1));
        output.par_chunks_mut(group_width.max(1)).zip(queries).enumerate().for_each(|(index, (output, query))| {
            let (key_head, step) = (index % key_heads, index / key_heads % query_time);
            let row = index / key_heads / query_time;
            let end = end(row, step);
            let first = window.map_or(0, |window| end.saturating_sub(window));
            let count = end - first;
            let start = (row * room + first) * stride + key_head * head_size;
            let keys = Matrix::strided(&key_values[start..], count, head_size, stride);
            let values = Matrix::strided(&value_values[start..], count, head_size, stride);
            let mut scores = vec![0.0; group * count];
            let target = MatrixMut::row_major(&mut scores, group, count);
            let query = Matrix::row_major(query, group, head_size);
            multiply(target, 0.0, query, keys.transposed(), scale, Threads::One);
            for scores in scores.chunks_exact_mut(count) {
                softmax(scores, 0..count);
            }
            let target = MatrixMut::row_major(output, group, head_size);
            multiply(target, 0.0, Matrix::row_major(&scores, group, count), values, 1.0, Threads::One);
        });
        Ok(())
    })
}

/// The dimensions of a tensor of rank 4.
fn four(tensor: &Tensor) -> [usize; 4] {
    let [a, b, c, d] = *tensor.shape() else { unreachable!("the rank was checked") };
    [a, b, c, d]
}

fn batch_time_width(operator: &'static str, argument: &'static str, tensor: &Tensor) -> Result<(usize, usize, usize)> {
    match tensor.shape() {
        [batch, time, rest @ ..] => Ok((*batch, *time, rest.iter().product())),
        _ => Err(Error::Shape {
            operator,
            argument,
            expected: "[batch, time, …]".to_owned(),
            found: tensor.shape().to_vec(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use runtime::Device;

    use super::*;
    use crate::ops::{AttentionOptions, attention};
    use crate::{Tape, Var};

    fn ramp(shape: &[usize], factor: f32) -> Tensor {
        let values: Vec<f32> =
            (0..shape.iter().product()).map(|i: usize| ((i * 37 % 101) as f32 - 50.0) * factor).collect();
        Tensor::from_slice(&Device::cpu(), shape, &values).unwrap()
    }

    #[test]
    fn attention_over_a_cache_with_room_is_attention_over_its_filled_part() {
        for window in [None, Some(3)] {
            let (keys, values, query) =
                (ramp(&[2, 7, 2, 4], 0.02), ramp(&[2, 7, 2, 4], 0.01), ramp(&[2, 3, 6, 4], 0.03));
            let options = AttentionOptions { scale: 0.5, document_start: None, window };
            let constant = Var::constant;
            let expected =
                attention(&Tape::inference(), &constant(&query), &constant(&keys), &constant(&values), options)
                    .unwrap();
            let (keys, values) = (with_room(&keys, 11).unwrap(), with_room(&values, 11).unwrap());
            let found = attention_cached(&query, &keys, &values, 7, 0.5, window).unwrap();
            for (found, expected) in found.to_f32_vec().unwrap().iter().zip(expected.to_f32_vec().unwrap()) {
                assert!((found - expected).abs() <= 1e-6, "{found} {expected}");
            }
        }
    }

    #[test]
    fn queries_before_the_cache_and_empty_windows_are_refused() {
        let (query, cache) = (ramp(&[1, 3, 6, 4], 0.1), ramp(&[1, 5, 2, 4], 0.1));
        let refusal =
            |length, window| attention_cached(&query, &cache, &cache, length, 0.5, window).unwrap_err().to_string();
        assert!(refusal(2, None).contains("3 queries of 6 heads over 2 of 5 positions of 2 heads"));
        assert!(refusal(6, None).contains("over 6 of 5 positions"));
        assert_eq!(refusal(5, Some(0)), "attention_cached: a window of 0 keys: a query sees at least itself");
        let none = attention_cached(
            &ramp(&[0, 1, 6, 4], 0.1),
            &ramp(&[0, 5, 2, 4], 0.1),
            &ramp(&[0, 5, 2, 4], 0.1),
            5,
            0.5,
            None,
        );
        assert_eq!(none.unwrap().shape(), [0, 1, 6, 4]);
    }

    #[test]
    fn steps_are_written_where_they_belong() {
        let mut cache = with_room(&ramp(&[2, 1, 3], 1.0), 3).unwrap();
        write_time(&mut cache, &Tensor::from_slice(&Device::cpu(), &[2, 1, 3], &[1.0f32; 6]).unwrap(), 2).unwrap();
        let values = cache.to_vec::<f32>().unwrap();
        assert_eq!(values[..3], [-50.0, -13.0, 24.0]);
        assert_eq!(values[6..9], [1.0; 3]);
        assert!(write_time(&mut cache, &ramp(&[2, 2, 3], 1.0), 2).is_err());
    }

    #[test]
    fn a_short_sequence_leaves_zeros_in_front() {
        let input = Tensor::from_slice(&Device::cpu(), &[1, 2, 2], &[1.0f32, 10.0, 2.0, 20.0]).unwrap();
        let state = convolution_state(&input, 3).unwrap();
        assert_eq!(state.to_vec::<f32>().unwrap(), [0.0, 1.0, 2.0, 0.0, 10.0, 20.0]);
    }
}
