//! Attention on GPUs: kernels on tensor cores for bf16 and the head sizes of models, general ones for the rest.

use kernels_ptx::kernels::attention::{
    self as kernels, AttentionDelta, AttentionForward, AttentionKeyGradients, AttentionQueryGradient, CachedAttention,
    CombineParts, GeneralForward, GeneralKeyGradients, GeneralQueryGradient, QUERIES, VisibleKeys,
};
use runtime::{Argument, Device};

use super::{AttentionOptions, OPERATOR, Sizes};
use crate::gpu::{self, Output};
use crate::{DType, Result, Tensor};

/// What the backward pass needs.
pub(super) struct Saved {
    launcher: Launcher,
    /// Query, key, value (of one element type) and output.
    tensors: [Tensor; 4],
    /// The element types in which the gradients of query, key and value are wanted.
    wanted: [DType; 3],
    log_sums: Tensor,
    visible: Visible,
}

/// u32 `[batch, padded query time]` and `[batch, tiles, 2]`: the first key that each query sees, and the extremes of every
/// tile of queries.
struct Visible {
    first: Tensor,
    bounds: Tensor,
}

/// The output, and what the backward pass needs.
///
/// # Errors
/// Sizes beyond 32 bits; driver errors.
pub(super) fn forward(
    sizes: Sizes,
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    options: AttentionOptions<'_>,
) -> Result<Saved> {
    let dtype = query.dtype();
    let wanted = [dtype, key.dtype(), value.dtype()];
    let (key, value) = (key.cast(dtype)?, value.cast(dtype)?);
    let launcher = Launcher::new(sizes, query)?;
    let visible = launcher.visible(options)?;
    let (mut output, mut log_sums) = (Output::like(query)?, launcher.per_query()?);
    let mut arguments = vec![output.write(), log_sums.write()];
    arguments.extend([query, &key, &value, &visible.first, &visible.bounds].map(gpu::read));
    launcher.launch(Pass::Forward, arguments)?;
    let tensors = [query.clone(), key, value, output.tensor()];
    Ok(Saved { launcher, tensors, wanted, log_sums: log_sums.tensor(), visible })
}

impl Saved {
    pub(super) fn output(&self) -> &Tensor {
        &self.tensors[3]
    }

    /// Gradients of query, key and value.
    pub(super) fn backward(&self, gradient: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let [query, key, value, output] = &self.tensors;
        let gradient = gradient.cast(query.dtype())?;
        let delta = self.launcher.delta(&gradient, output)?;
        let inputs = || {
            let Visible { first, bounds } = &self.visible;
            [&gradient, query, key, value, &self.log_sums, &delta, first, bounds].map(gpu::read)
        };
        let mut query_gradient = Output::like(query)?;
        let arguments = [query_gradient.write()].into_iter().chain(inputs()).collect();
        self.launcher.launch(Pass::QueryGradient, arguments)?;
        let (mut key_gradient, mut value_gradient) = (Output::like(key)?, Output::like(value)?);
        let arguments = [key_gradient.write(), value_gradient.write()].into_iter().chain(inputs()).collect();
        self.launcher.launch(Pass::KeyGradients, arguments)?;
        let gradients = [query_gradient, key_gradient, value_gradient].map(Output::tensor);
        gradients.iter().zip(self.wanted).map(|(gradient, dtype)| Ok(Some(gradient.cast(dtype)?))).collect()
    }
}

#[derive(Clone, Copy)]
enum Pass {
    Forward,
    QueryGradient,
    KeyGradients,
}

/// The sizes as kernels take them.
struct Launcher {
    device: Device,
    dtype: DType,
    batch: u32,
    query_time: u32,
    key_time: u32,
    heads: u32,
    key_heads: u32,
    size: u32,
    scale: f32,
}

impl Launcher {
    fn new(sizes: Sizes, query: &Tensor) -> Result<Self> {
        let Sizes { batch, query_time, key_time, heads, key_heads, size, scale } = sizes;
        let number = |what, value| gpu::size(OPERATOR, what, value);
        number("the number of keys of all rows", batch * key_time)?;
        number("the width of a row of heads", heads * size)?;
        Ok(Self {
            device: query.device().clone(),
            dtype: query.dtype(),
            batch: number("the batch", batch)?,
            query_time: number("the queries' time", query_time)?,
            key_time: number("the keys' time", key_time)?,
            heads: number("the number of heads", heads)?,
            key_heads: number("the number of key heads", key_heads)?,
            size: number("the head size", size)?,
            scale,
        })
    }

    /// The problem's sizes as the kernels' descriptions name them.
    fn sizes(&self) -> [u64; 6] {
        [self.batch, self.query_time, self.key_time, self.heads, self.key_heads, self.size].map(u64::from)
    }

    /// Memory for a value per query and head, f32 `[batch, heads, padded query time]`.
    fn per_query(&self) -> Result<Output> {
        let shape = [self.batch, self.heads, kernels::padded(self.query_time)].map(|size| size as usize);
        Output::new(&self.device, &shape, DType::F32)
    }

    fn visible(&self, options: AttentionOptions<'_>) -> Result<Visible> {
        let (batch, padded) = (self.batch as usize, kernels::padded(self.query_time) as usize);
        let mut first = Output::new(&self.device, &[batch, padded], DType::U32)?;
        let mut bounds = Output::new(&self.device, &[batch, padded / QUERIES as usize, 2], DType::U32)?;
        // A window as long as the time is none.
        let window = options.window.map_or(0, |window| window.min(self.key_time as usize) as u32);
        let mut arguments = vec![first.write(), bounds.write()];
        arguments.extend(options.document_start.map(gpu::read));
        arguments.extend([self.query_time, self.key_time, window].map(Argument::U32));
        let kernel = VisibleKeys { documents: options.document_start.is_some() };
        let grid = VisibleKeys::grid(self.batch, self.query_time);
        gpu::launch(OPERATOR, &self.device, &kernel, grid, &self.sizes()[..2], &arguments)?;
        Ok(Visible { first: first.tensor(), bounds: bounds.tensor() })
    }

    /// `Σ gradient · output` of every query and head.
    fn delta(&self, gradient: &Tensor, output: &Tensor) -> Result<Tensor> {
        let mut delta = self.per_query()?;
        let rows = self.batch as usize * self.heads as usize * kernels::padded(self.query_time) as usize;
        let rows = gpu::size(OPERATOR, "the number of queries of all heads", rows)?;
        let mut arguments = vec![delta.write(), gpu::read(gradient), gpu::read(output)];
        arguments.extend([rows, self.query_time, self.heads, self.size].map(Argument::U32));
        let kernel = AttentionDelta::new(gpu::element(self.dtype), self.size);
        gpu::launch(OPERATOR, &self.device, &kernel, AttentionDelta::grid(rows), &self.sizes(), &arguments)?;
        Ok(delta.tensor())
    }

    /// Queues a pass with its tensors; the numbers follow them.
    fn launch(&self, pass: Pass, mut arguments: Vec<Argument<'_>>) -> Result<()> {
        let Self { batch, query_time, key_time, heads, key_heads, size, .. } = *self;
        arguments.extend([query_time, key_time, heads, key_heads].map(Argument::U32));
        let tensor_cores = self.dtype == DType::Bf16 && kernels::forward::HEAD_SIZES.contains(&size);
        if !tensor_cores {
            arguments.push(Argument::U32(size));
        }
        arguments.push(Argument::F32(self.scale));
        let (device, sizes) = (&self.device, self.sizes());
        if tensor_cores {
            let of_queries = kernels::forward::grid(batch, heads, query_time);
            let of_keys = kernels::forward::grid(batch, key_heads, key_time);
            return match pass {
                Pass::Forward => {
                    gpu::launch(OPERATOR, device, &AttentionForward { size }, of_queries, &sizes, &arguments)
                }
                Pass::QueryGradient => {
                    gpu::launch(OPERATOR, device, &AttentionQueryGradient { size }, of_queries, &sizes, &arguments)
                }
                Pass::KeyGradients => {
                    gpu::launch(OPERATOR, device, &AttentionKeyGradients { size }, of_keys, &sizes, &arguments)
                }
            };
        }
        let element = gpu::element(self.dtype);
        let of_queries = kernels::general::grid(batch, heads, query_time, size);
        let of_keys = kernels::general::grid(batch, key_heads, key_time, size);
        match pass {
            Pass::Forward => gpu::launch(OPERATOR, device, &GeneralForward { element }, of_queries, &sizes, &arguments),
            Pass::QueryGradient => {
                gpu::launch(OPERATOR, device, &GeneralQueryGradient { element }, of_queries, &sizes, &arguments)
            }
            Pass::KeyGradients => {
                gpu::launch(OPERATOR, device, &GeneralKeyGradients { element }, of_keys, &sizes, &arguments)
            }
        }
    }
}

/// The last key that each query of a cache sees.
#[derive(Clone, Copy)]
pub(in crate::ops) enum Last<'a> {
    /// Queries are the last positions of so many.
    Length(usize),
    /// u32 `[batch, query time]`, on the device.
    Positions(&'a Tensor),
}

/// Attention of a few queries over a cache, whose shapes were checked; result like `query`.
///
/// # Errors
/// Sizes beyond 32 bits; driver errors.
pub(in crate::ops) fn cached(
    operator: &'static str,
    query: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    last: Last<'_>,
    scale: f32,
    window: Option<usize>,
) -> Result<Tensor> {
    let (query_shape, device) = (query.shape(), query.device());
    let number = |what, value| gpu::size(operator, what, value);
    number("the number of steps of all caches", keys.shape()[..2].iter().product())?;
    number("the width of a row of key heads", keys.shape()[2..].iter().product())?;
    let count = number("the number of elements", query.count())?;
    let rows = number("the number of queries of all heads", query_shape[..3].iter().product())?;
    let [query_time, heads, size] = [query_shape[1], query_shape[2], query_shape[3]];
    let [query_time, heads, size] =
        [number("the queries' time", query_time)?, number("the heads", heads)?, number("the head size", size)?];
    let [room, key_heads] = [number("the room", keys.shape()[1])?, number("the key heads", keys.shape()[2])?];
    let length = match last {
        Last::Length(length) => number("the length", length)?,
        Last::Positions(_) => room,
    };
    // A window as long as the length is none.
    let window = window.map_or(0, |window| window.min(length as usize) as u32);
    let parts = CachedAttention::parts(length);

    let (keys, values) = (keys.cast(query.dtype())?, values.cast(query.dtype())?);
    let element = gpu::element(query.dtype());
    let kernel = CachedAttention::new(element, size, parts, matches!(last, Last::Positions(_)));
    let part_shape = [rows as usize, parts as usize, size as usize];
    let mut outputs = match kernel.whole {
        true => Output::like(query)?,
        false => Output::new(device, &part_shape, DType::F32)?,
    };
    let mut log_sums = (!kernel.whole).then(|| Output::new(device, &part_shape[..2], DType::F32)).transpose()?;
    let mut arguments = vec![outputs.write()];
    arguments.extend(log_sums.as_mut().map(Output::write));
    arguments.extend([query, &keys, &values].map(gpu::read));
    if let Last::Positions(positions) = last {
        arguments.push(gpu::read(positions));
    }
    arguments.extend([query_time, room].map(Argument::U32));
    if let Last::Length(_) = last {
        arguments.push(Argument::U32(length));
    }
    arguments.extend([heads, key_heads, size, window].map(Argument::U32));
    arguments.push(Argument::F32(scale));
    let sizes = [query_shape[0] as u64, query_time.into(), length.into(), heads.into(), key_heads.into(), size.into()];
    let grid = CachedAttention::grid(rows, length, size);
    gpu::launch(operator, device, &kernel, grid, &sizes, &arguments)?;
    drop(arguments);
    let Some(log_sums) = log_sums else { return Ok(outputs.tensor()) };
    let (outputs, log_sums) = (outputs.tensor(), log_sums.tensor());
    let mut output = Output::like(query)?;
    let mut arguments = vec![output.write(), gpu::read(&outputs), gpu::read(&log_sums)];
    arguments.extend([count, parts, size].map(Argument::U32));
    let sizes = [count.into(), parts.into()];
    gpu::launch(operator, device, &CombineParts { element }, CombineParts::grid(count), &sizes, &arguments)?;
    drop(arguments);
    Ok(output.tensor())
}
