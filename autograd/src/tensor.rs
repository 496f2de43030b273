//! Shape, element type and storage on one device.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use half::bf16;
use half::slice::HalfFloatSliceExt;
use kernels_ptx::kernels::{cast::Cast, fill::Fill};
use runtime::{Argument, Buffer, Device};

use crate::{Error, Result, gpu};

/// Type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE 754 single precision, 4 bytes.
    F32,
    /// Brain floating point: the upper half of an f32, 2 bytes.
    Bf16,
    /// Unsigned integer, 4 bytes: token ids, labels, positions.
    U32,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 | Self::U32 => 4,
            Self::Bf16 => 2,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::U32 => "u32",
        })
    }
}

/// A Rust type that tensors can hold.
pub trait Element: bytemuck::Pod {
    /// The matching element type.
    const DTYPE: DType;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
}
impl Element for bf16 {
    const DTYPE: DType = DType::Bf16;
}
impl Element for u32 {
    const DTYPE: DType = DType::U32;
}

/// Identity of a tensor, unique in the process. Clones share it, a reshaped view has its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TensorId(u64);

impl TensorId {
    fn fresh() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// A contiguous, row-major array on one device. Clones share storage; values never change under a shared tensor.
#[derive(Clone)]
pub struct Tensor(Arc<Inner>);

#[derive(Clone)]
struct Inner {
    id: TensorId,
    shape: Vec<usize>,
    dtype: DType,
    storage: Arc<Buffer>,
}

impl Tensor {
    /// A tensor with the given values in row-major order.
    ///
    /// # Errors
    /// [`Error::Shape`] when the number of values is not the product of `shape`; out of memory.
    pub fn from_slice<T: Element>(device: &Device, shape: &[usize], values: &[T]) -> Result<Self> {
        let count: usize = shape.iter().product();
        if count != values.len() {
            return Err(Error::Shape {
                operator: "tensor from values",
                argument: "shape",
                expected: format!("a shape of {} elements", values.len()),
                found: shape.to_vec(),
            });
        }
        let mut buffer = device.allocate(count * size_of::<T>())?;
        buffer.copy_from_host(bytemuck::cast_slice(values))?;
        Ok(Self::from_buffer(shape, T::DTYPE, buffer))
    }

    /// A tensor of zeros.
    ///
    /// # Errors
    /// Out of memory.
    pub fn zeros(device: &Device, shape: &[usize], dtype: DType) -> Result<Self> {
        Self::filled(device, shape, dtype, 0.0)
    }

    /// A tensor whose elements all have one value (for u32: the value's integer part).
    ///
    /// # Errors
    /// Out of memory.
    pub fn filled(device: &Device, shape: &[usize], dtype: DType, value: f32) -> Result<Self> {
        if !device.is_cpu() {
            return Self::filled_gpu(device, shape, dtype, value);
        }
        let count: usize = shape.iter().product();
        match dtype {
            DType::F32 => {
                let mut buffer = device.allocate(count * 4)?;
                buffer.as_mut_slice::<f32>()?.fill(value);
                Ok(Self::from_buffer(shape, dtype, buffer))
            }
            DType::Bf16 => Self::from_slice(device, shape, &vec![bf16::from_f32(value); count]),
            DType::U32 => Self::from_slice(device, shape, &vec![value as u32; count]),
        }
    }

    fn filled_gpu(device: &Device, shape: &[usize], dtype: DType, value: f32) -> Result<Self> {
        let pattern = match dtype {
            DType::F32 => value.to_bits(),
            DType::Bf16 if value == 0.0 => 0,
            DType::Bf16 => return Self::filled_gpu(device, shape, DType::F32, value)?.cast(dtype),
            DType::U32 => value as u32,
        };
        let mut output = gpu::Output::new(device, shape, dtype)?;
        if pattern == 0 {
            output.set_zero()?;
        } else {
            let count = shape.iter().product::<usize>() as u64;
            // The kernel writes patterns of 32 bits, whatever they mean.
            let arguments = [output.write_as(kernels_ptx::Element::U32), Argument::U32(pattern), Argument::U64(count)];
            gpu::launch("filling", device, &Fill, Fill::grid(count), &[count], &arguments)?;
        }
        Ok(output.tensor())
    }

    /// Computes a CPU tensor in f32: `fill` writes every element (their contents are unspecified before); the result
    /// is rounded to `dtype`.
    ///
    /// # Errors
    /// Those of `fill`; out of memory; [`Error::ElementType`] for u32.
    pub fn compute(
        device: &Device,
        shape: &[usize],
        dtype: DType,
        fill: impl FnOnce(&mut [f32]) -> Result<()>,
    ) -> Result<Self> {
        let count: usize = shape.iter().product();
        let mut buffer = device.allocate(count * 4)?;
        fill(buffer.as_mut_slice()?)?;
        let computed = Self::from_buffer(shape, DType::F32, buffer);
        if dtype == DType::F32 { Ok(computed) } else { computed.cast(dtype) }
    }

    /// Dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.0.shape
    }

    /// Type of the elements.
    pub fn dtype(&self) -> DType {
        self.0.dtype
    }

    /// The device that holds the values.
    pub fn device(&self) -> &Device {
        self.0.storage.device()
    }

    /// Identity of this tensor.
    pub fn id(&self) -> TensorId {
        self.0.id
    }

    /// Number of elements.
    pub fn count(&self) -> usize {
        self.0.shape.iter().product()
    }

    /// Size of the innermost dimension; 1 for a scalar.
    pub fn last_dimension(&self) -> usize {
        self.0.shape.last().copied().unwrap_or(1)
    }

    /// Number of innermost rows: the product of all dimensions but the last.
    pub fn rows(&self) -> usize {
        let leading = self.0.shape.len().saturating_sub(1);
        self.0.shape[..leading].iter().product()
    }

    /// The same values under another shape of equal element count. Shares storage.
    ///
    /// # Errors
    /// [`Error::Shape`] when the counts differ.
    pub fn reshape(&self, shape: &[usize]) -> Result<Self> {
        if shape.iter().product::<usize>() != self.count() {
            return Err(Error::Shape {
                operator: "reshape",
                argument: "shape",
                expected: format!("{} elements as in {:?}", self.count(), self.shape()),
                found: shape.to_vec(),
            });
        }
        Ok(Self(Arc::new(Inner {
            id: TensorId::fresh(),
            shape: shape.to_vec(),
            dtype: self.dtype(),
            storage: Arc::clone(&self.0.storage),
        })))
    }

    /// The values as another floating-point type, rounded to nearest even; the same tensor when nothing changes.
    ///
    /// # Errors
    /// [`Error::ElementType`] between integers and floats; out of memory.
    pub fn cast(&self, dtype: DType) -> Result<Self> {
        if dtype == self.dtype() {
            return Ok(self.clone());
        }
        if !self.device().is_cpu() {
            return self.cast_gpu(dtype);
        }
        let mut buffer = self.device().allocate(self.count() * dtype.size())?;
        match (self.dtype(), dtype) {
            (DType::F32, DType::Bf16) => {
                buffer.as_mut_slice::<bf16>()?.convert_from_f32_slice(self.host_slice::<f32>()?);
            }
            (DType::Bf16, DType::F32) => crate::cpu::widen(self.host_slice::<bf16>()?, buffer.as_mut_slice::<f32>()?),
            _ => return Err(self.not_castable()),
        }
        Ok(Self::from_buffer(self.shape(), dtype, buffer))
    }

    fn cast_gpu(&self, dtype: DType) -> Result<Self> {
        if self.dtype() == DType::U32 || dtype == DType::U32 {
            return Err(self.not_castable());
        }
        let count = gpu::size("cast", "the number of elements", self.count())?;
        let kernel = Cast { from: gpu::element(self.dtype()), to: gpu::element(dtype) };
        let mut output = gpu::Output::new(self.device(), self.shape(), dtype)?;
        let arguments = [output.write(), gpu::read(self), Argument::U32(count)];
        gpu::launch("cast", self.device(), &kernel, Cast::grid(count.into()), &[count.into()], &arguments)?;
        Ok(output.tensor())
    }

    fn not_castable(&self) -> Error {
        Error::ElementType {
            operator: "cast",
            argument: "input",
            expected: "f32 or bf16 on both sides",
            found: self.dtype(),
        }
    }

    /// The values in host memory, without a copy.
    ///
    /// # Errors
    /// [`Error::ElementType`] when `T` is not the element type; a runtime error off the CPU.
    pub fn host_slice<T: Element>(&self) -> Result<&[T]> {
        self.expect_dtype(T::DTYPE)?;
        Ok(self.0.storage.as_slice()?)
    }

    /// The values as f32 in host memory: borrowed when they are f32 already, widened when bf16.
    ///
    /// # Errors
    /// [`Error::ElementType`] for u32; a runtime error off the CPU.
    pub fn host_f32(&self) -> Result<Cow<'_, [f32]>> {
        match self.dtype() {
            DType::F32 => Ok(Cow::Borrowed(self.host_slice()?)),
            DType::Bf16 => {
                let mut wide = vec![0.0; self.count()];
                crate::cpu::widen(self.host_slice::<bf16>()?, &mut wide);
                Ok(Cow::Owned(wide))
            }
            DType::U32 => Err(Error::ElementType {
                operator: "reading values",
                argument: "tensor",
                expected: "f32 or bf16",
                found: DType::U32,
            }),
        }
    }

    /// A copy of the values, from any device.
    ///
    /// # Errors
    /// [`Error::ElementType`] when `T` is not the element type; driver errors.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        self.expect_dtype(T::DTYPE)?;
        let mut values = vec![T::zeroed(); self.count()];
        self.0.storage.copy_to_host(bytemuck::cast_slice_mut(&mut values))?;
        Ok(values)
    }

    /// A copy of the values as f32, from any device; bf16 is widened.
    ///
    /// # Errors
    /// [`Error::ElementType`] for u32; driver errors.
    pub fn to_f32_vec(&self) -> Result<Vec<f32>> {
        match self.dtype() {
            DType::Bf16 => Ok(self.to_vec::<bf16>()?.iter().map(|value| value.to_f32()).collect()),
            _ => self.to_vec(),
        }
    }

    /// The value of a tensor with one element.
    ///
    /// # Errors
    /// [`Error::Shape`] when there is not exactly one.
    pub fn item(&self) -> Result<f32> {
        if self.count() != 1 {
            return Err(Error::Shape {
                operator: "item",
                argument: "tensor",
                expected: "one element".to_owned(),
                found: self.shape().to_vec(),
            });
        }
        Ok(self.to_f32_vec()?[0])
    }

    /// The values for writing in host memory. Copies first when anything else shares them, so that no other holder of
    /// the tensor sees a change.
    ///
    /// # Errors
    /// [`Error::ElementType`] when `T` is not the element type; a runtime error off the CPU; out of memory.
    pub fn make_mut<T: Element>(&mut self) -> Result<&mut [T]> {
        self.expect_dtype(T::DTYPE)?;
        Ok(self.make_unique()?.as_mut_slice()?)
    }

    /// Overwrites the values with as many from host memory, in place unless anything else shares them.
    ///
    /// # Errors
    /// [`Error::ElementType`] when `T` is not the element type; a runtime error for another number of values; driver errors.
    pub fn overwrite<T: Element>(&mut self, values: &[T]) -> Result<()> {
        self.expect_dtype(T::DTYPE)?;
        Ok(self.make_unique()?.copy_from_host(bytemuck::cast_slice(values))?)
    }

    /// Whether anything else holds the memory, so that it must not be written.
    pub(crate) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1 || Arc::strong_count(&self.0.storage) > 1
    }

    /// The memory for writing, on any device. Copies first when anything else shares it.
    ///
    /// # Errors
    /// Driver errors; out of memory.
    pub(crate) fn make_unique(&mut self) -> Result<&mut Buffer> {
        if Arc::get_mut(&mut self.0).is_none_or(|inner| Arc::get_mut(&mut inner.storage).is_none()) {
            let mut copy = self.device().allocate(self.0.storage.len())?;
            copy.copy_from(&self.0.storage)?;
            *self = Self::from_buffer(self.shape(), self.dtype(), copy);
        }
        match Arc::get_mut(&mut self.0).and_then(|inner| Arc::get_mut(&mut inner.storage)) {
            Some(buffer) => Ok(buffer),
            None => unreachable!("the storage was made unique just above"),
        }
    }

    /// The memory that holds the values.
    pub(crate) fn buffer(&self) -> &Buffer {
        &self.0.storage
    }

    pub(crate) fn from_buffer(shape: &[usize], dtype: DType, buffer: Buffer) -> Self {
        Self(Arc::new(Inner { id: TensorId::fresh(), shape: shape.to_vec(), dtype, storage: Arc::new(buffer) }))
    }

    fn expect_dtype(&self, expected: DType) -> Result<()> {
        if self.dtype() == expected {
            return Ok(());
        }
        let expected = match expected {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::U32 => "u32",
        };
        Err(Error::ElementType { operator: "reading values", argument: "tensor", expected, found: self.dtype() })
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Tensor({:?} {} on {})", self.shape(), self.dtype(), self.device())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writing_to_a_shared_tensor_leaves_the_other_holder_alone() {
        let first = Tensor::from_slice(&Device::cpu(), &[2], &[1.0f32, 2.0]).unwrap();
        let mut second = first.clone();
        second.make_mut::<f32>().unwrap()[0] = 9.0;
        assert_eq!(first.to_vec::<f32>().unwrap(), [1.0, 2.0]);
        assert_eq!(second.to_vec::<f32>().unwrap(), [9.0, 2.0]);
        assert_ne!(first.id(), second.id());
        let view = second.reshape(&[2, 1]).unwrap();
        second.make_mut::<f32>().unwrap()[1] = 7.0;
        assert_eq!(view.to_vec::<f32>().unwrap(), [9.0, 2.0]);
    }

    #[test]
    fn an_owned_tensor_is_written_in_place() {
        let mut tensor = Tensor::zeros(&Device::cpu(), &[3], DType::F32).unwrap();
        let id = tensor.id();
        tensor.make_mut::<f32>().unwrap().fill(1.0);
        assert_eq!(tensor.id(), id);
    }

    #[test]
    fn casting_rounds_to_nearest_even() {
        let tensor = Tensor::from_slice(&Device::cpu(), &[3], &[1.003_906_3f32, 1.011_718_8, f32::NAN]).unwrap();
        let narrow = tensor.cast(DType::Bf16).unwrap();
        let back = narrow.to_f32_vec().unwrap();
        assert_eq!(back[..2], [1.0, 1.015625]);
        assert!(back[2].is_nan());
    }
}
