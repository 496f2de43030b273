//! What the operators' GPU ways share: loading kernels, arguments, outputs.
//!
//! "GPU" means every device that runs kernels: a CUDA device, or the simulator.

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::sync::{Mutex, OnceLock, PoisonError};

use kernels_ptx::KernelSource;
use kernels_ptx::kernels::column_sums::ColumnSums;
use kernels_ptx::kernels::sum_parts::SumParts;
use runtime::{Argument, Buffer, Device, DeviceKind, Function};

use crate::{DType, Error, Result, Tensor};

/// Queues a kernel. `grid` is `None` when the problem is larger than one launch can cover. `sizes` are the problem's, as
/// the kernel's description names them: they are recorded for the profiler.
///
/// # Errors
/// [`Error::Invalid`] for a problem that is too large; runtime errors.
pub(crate) fn launch<K: KernelSource>(
    operator: &'static str,
    device: &Device,
    kernel: &K,
    grid: Option<[u32; 3]>,
    sizes: &[u64],
    arguments: &[Argument<'_>],
) -> Result<()> {
    let Some(grid) = grid else {
        let message = format!("sizes {sizes:?} are too large for one launch on {device}: use smaller batches");
        return Err(Error::Invalid { operator, message });
    };
    Ok(function(device, kernel)?.launch_sized(grid, arguments, sizes)?)
}

/// A grid of so many blocks in x; `None` when one launch cannot have them.
pub(crate) fn line(blocks: u64) -> Option<[u32; 3]> {
    i32::try_from(blocks).ok().map(|blocks| [blocks.unsigned_abs(), 1, 1])
}

/// The kernel, loaded on the device. Its text is written once per configuration, not at every launch.
fn function<K: KernelSource>(device: &Device, kernel: &K) -> Result<Function> {
    let key = (device.kind(), kernel.clone());
    if let Some(function) = loaded(|functions| functions.get(&key).cloned()) {
        return Ok(function);
    }
    // Others go on while a driver compiles. Two threads may load the same kernel; the first stays.
    let function = device.load(&kernel.build())?;
    Ok(loaded(|functions| functions.entry(key).or_insert(function).clone()))
}

/// Kernels of one source that were loaded, by device.
type Loaded<K> = HashMap<(DeviceKind, K), Function>;

/// Calls `function` with the kernels of one source that were loaded so far.
fn loaded<K: KernelSource, R>(function: impl FnOnce(&mut Loaded<K>) -> R) -> R {
    static LOADED: OnceLock<Mutex<HashMap<TypeId, Box<dyn Any + Send>>>> = OnceLock::new();
    let mut all = LOADED.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    let of_source = all.entry(TypeId::of::<K>()).or_insert_with(|| Box::new(Loaded::<K>::new()));
    let Some(functions) = of_source.downcast_mut() else { unreachable!("the entry is of this type") };
    function(functions)
}

/// The kernels' name of an element type.
pub(crate) fn element(dtype: DType) -> kernels_ptx::Element {
    match dtype {
        DType::F32 => kernels_ptx::Element::F32,
        DType::Bf16 => kernels_ptx::Element::Bf16,
        DType::U32 => kernels_ptx::Element::U32,
    }
}

/// A tensor as an argument that the kernel only reads.
pub(crate) fn read(tensor: &Tensor) -> Argument<'_> {
    Argument::Read(tensor.buffer(), element(tensor.dtype()))
}

/// A tensor that a kernel is about to write.
pub(crate) struct Output {
    shape: Vec<usize>,
    dtype: DType,
    buffer: Buffer,
}

impl Output {
    /// Memory for the tensor; what it holds is unspecified.
    ///
    /// # Errors
    /// Out of memory.
    pub(crate) fn new(device: &Device, shape: &[usize], dtype: DType) -> Result<Self> {
        let count: usize = shape.iter().product();
        Ok(Self { shape: shape.to_vec(), dtype, buffer: device.allocate(count * dtype.size())? })
    }

    /// Memory for a tensor like another one.
    ///
    /// # Errors
    /// Out of memory.
    pub(crate) fn like(tensor: &Tensor) -> Result<Self> {
        Self::new(tensor.device(), tensor.shape(), tensor.dtype())
    }

    /// The memory as an argument that the kernel writes.
    pub(crate) fn write(&mut self) -> Argument<'_> {
        Argument::Write(&mut self.buffer, element(self.dtype))
    }

    /// The same for a kernel that writes patterns of another type of as many bytes.
    pub(crate) fn write_as(&mut self, element: kernels_ptx::Element) -> Argument<'_> {
        Argument::Write(&mut self.buffer, element)
    }

    /// Sets every byte to zero.
    ///
    /// # Errors
    /// Driver errors.
    pub(crate) fn set_zero(&mut self) -> Result<()> {
        Ok(self.buffer.set_zero()?)
    }

    /// The tensor, when everything that writes it is queued.
    pub(crate) fn tensor(self) -> Tensor {
        Tensor::from_buffer(&self.shape, self.dtype, self.buffer)
    }
}

/// A size as kernels take it.
///
/// # Errors
/// [`Error::Invalid`] beyond 32 bits.
pub(crate) fn size(operator: &'static str, what: &str, size: usize) -> Result<u32> {
    u32::try_from(size)
        .map_err(|_| Error::Invalid { operator, message: format!("{what} is {size}: kernels take sizes below 2^32") })
}

/// The ordered sum of `splits` equal parts that lie one after another in `parts` (f32), under the shape of one part.
///
/// Many parts are added in two passes, so that a thread adds few one after another.
///
/// # Errors
/// [`Error::Invalid`] for a problem that is too large; runtime errors.
pub(crate) fn sum_parts(operator: &'static str, parts: &Tensor, splits: u32, shape: &[usize]) -> Result<Tensor> {
    /// Parts that a thread may as well add one after another.
    const FEW: u32 = 16;
    let count: usize = shape.iter().product();
    let second = (1..=splits.isqrt()).rev().find(|divisor| splits.is_multiple_of(*divisor)).unwrap_or(1);
    match splits {
        1 => parts.reshape(shape),
        _ if splits > FEW && second > 1 => {
            let sums = sum_pass(operator, parts, splits / second, &[second as usize, count])?;
            sum_pass(operator, &sums, second, shape)
        }
        _ => sum_pass(operator, parts, splits, shape),
    }
}

fn sum_pass(operator: &'static str, parts: &Tensor, splits: u32, shape: &[usize]) -> Result<Tensor> {
    let count = size(operator, "the number of elements", shape.iter().product())?;
    let mut sum = Output::new(parts.device(), shape, DType::F32)?;
    let arguments = [sum.write(), read(parts), Argument::U32(count), Argument::U32(splits)];
    let sizes = [u64::from(count), u64::from(splits)];
    launch(operator, parts.device(), &SumParts, SumParts::grid(count.into()), &sizes, &arguments)?;
    Ok(sum.tensor())
}

/// Equal parts to be added: f32 `[splits, …]`, and the shape of one of them.
pub(crate) type Parts<'a> = (&'a Tensor, &'a [usize]);

/// The sum of `splits` equal parts as [`sum_parts`], in one launch whose blocks take the parts in turn: for many parts.
///
/// # Errors
/// [`Error::Invalid`] for a problem that is too large; runtime errors.
pub(crate) fn column_sums(operator: &'static str, parts: Parts<'_>, splits: u32) -> Result<Tensor> {
    Ok(column_sums_with(operator, parts, [], splits)?.0)
}

/// [`column_sums`] of one tensor's parts, and of up to two more tensors' as many parts, in one launch.
///
/// # Errors
/// [`Error::Invalid`] for a problem that is too large; runtime errors.
pub(crate) fn column_sums_with<const N: usize>(
    operator: &'static str,
    (parts, shape): Parts<'_>,
    more: [Option<Parts<'_>>; N],
    splits: u32,
) -> Result<(Tensor, [Option<Tensor>; N])> {
    const { assert!(N < ColumnSums::MOST_MATRICES) };
    if splits == 1 {
        let mut alone = [const { None }; N];
        for (sum, (parts, shape)) in alone.iter_mut().zip(more).filter_map(|(sum, parts)| Some((sum, parts?))) {
            *sum = Some(parts.reshape(shape)?);
        }
        return Ok((parts.reshape(shape)?, alone));
    }
    let count = |shape: &[usize]| size(operator, "the number of elements", shape.iter().product());
    let device = parts.device();
    let output = |(_, shape): Parts<'_>| Output::new(device, shape, DType::F32);
    let mut sum = output((parts, shape))?;
    let mut counts = vec![count(shape)?];
    let mut arguments = vec![sum.write(), read(parts)];
    arguments.extend([splits, counts[0], splits].map(Argument::U32));
    let mut more_sums = [const { None }; N];
    for (sum, (parts, shape)) in more_sums.iter_mut().zip(more).filter_map(|(sum, parts)| Some((sum, parts?))) {
        counts.push(count(shape)?);
        let sum: &mut Output = sum.insert(output((parts, shape))?);
        arguments.extend([sum.write(), read(parts), Argument::U32(counts[counts.len() - 1])]);
    }
    let kernel = ColumnSums { element: kernels_ptx::Element::F32, matrices: counts.len() };
    let sizes = [u64::from(splits), counts.iter().map(|count| u64::from(*count)).sum()];
    launch(operator, device, &kernel, ColumnSums::grid(&counts, 1), &sizes, &arguments)?;
    drop(arguments);
    Ok((sum.tensor(), more_sums.map(|sum| sum.map(Output::tensor))))
}
