//! Arrays of f64 that the harness rearranges: every stored element type fits without loss.

use anyhow::{Context as _, Result, bail};
use autograd::{DType, Tensor};
use half::{bf16, f16};
use safetensors::tensor::{Dtype, TensorView};

/// A shape and its values in row-major order.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Row-major.
    pub values: Vec<f64>,
}

impl Array {
    /// An array of the given shape.
    ///
    /// # Errors
    /// When the number of values is not that of the shape.
    pub fn new(shape: &[usize], values: Vec<f64>) -> Result<Self> {
        if values.len() != shape.iter().product::<usize>() {
            bail!("{} values for shape {shape:?}", values.len());
        }
        Ok(Self { shape: shape.to_vec(), values })
    }

    /// A scalar.
    pub fn scalar(value: f64) -> Self {
        Self { shape: Vec::new(), values: vec![value] }
    }

    /// The values of a tensor.
    ///
    /// # Errors
    /// Those of reading a device.
    pub fn read(tensor: &Tensor) -> Result<Self> {
        let values = match tensor.dtype() {
            DType::U32 => tensor.to_vec::<u32>()?.into_iter().map(f64::from).collect(),
            _ => tensor.to_f32_vec()?.into_iter().map(f64::from).collect(),
        };
        Self::new(tensor.shape(), values)
    }

    /// The values of a stored tensor.
    ///
    /// # Errors
    /// An element type that no fixture has.
    pub fn decode(view: &TensorView<'_>) -> Result<Self> {
        fn convert<const N: usize>(bytes: &[u8], one: impl Fn([u8; N]) -> f64) -> Vec<f64> {
            bytes.as_chunks::<N>().0.iter().map(|bytes| one(*bytes)).collect()
        }
        let bytes = view.data();
        let values = match view.dtype() {
            Dtype::F64 => convert(bytes, f64::from_le_bytes),
            Dtype::F32 => convert(bytes, |bytes| f64::from(f32::from_le_bytes(bytes))),
            Dtype::BF16 => convert(bytes, |bytes| bf16::from_le_bytes(bytes).to_f64()),
            Dtype::F16 => convert(bytes, |bytes| f16::from_le_bytes(bytes).to_f64()),
            Dtype::I32 => convert(bytes, |bytes| f64::from(i32::from_le_bytes(bytes))),
            Dtype::I64 => convert(bytes, |bytes| i64::from_le_bytes(bytes) as f64),
            Dtype::U8 | Dtype::BOOL => bytes.iter().map(|byte| f64::from(*byte)).collect(),
            other => bail!("element type {other:?} is not supported"),
        };
        Self::new(view.shape(), values)
    }

    /// Number of values.
    pub fn count(&self) -> usize {
        self.values.len()
    }

    /// The same values under another shape.
    ///
    /// # Errors
    /// When the counts differ.
    pub fn reshaped(&self, shape: &[usize]) -> Result<Self> {
        Self::new(shape, self.values.clone()).with_context(|| format!("reshaping {:?}", self.shape))
    }

    /// Dimension `i` of the result is dimension `axes[i]` of this one.
    ///
    /// # Errors
    /// When `axes` is not a permutation of the dimensions.
    pub fn permuted(&self, axes: &[usize]) -> Result<Self> {
        let mut sorted = axes.to_vec();
        sorted.sort_unstable();
        if !sorted.into_iter().eq(0..self.shape.len()) {
            bail!("axes {axes:?} are no order of the dimensions of {:?}", self.shape);
        }
        let mut strides = vec![1; self.shape.len()];
        for axis in (1..self.shape.len()).rev() {
            strides[axis - 1] = strides[axis] * self.shape[axis];
        }
        let shape: Vec<usize> = axes.iter().map(|&axis| self.shape[axis]).collect();
        let mut index = vec![0; axes.len()];
        let mut values = Vec::with_capacity(self.values.len());
        for _ in 0..self.values.len() {
            values.push(self.values[index.iter().zip(axes).map(|(index, &axis)| index * strides[axis]).sum::<usize>()]);
            for (index, &size) in index.iter_mut().zip(&shape).rev() {
                *index += 1;
                if *index < size {
                    break;
                }
                *index = 0;
            }
        }
        Self::new(&shape, values)
    }

    /// Elements `start..end` of one dimension.
    ///
    /// # Errors
    /// A range outside the dimension.
    pub fn slice(&self, axis: usize, start: usize, end: usize) -> Result<Self> {
        if axis >= self.shape.len() || start > end || end > self.shape[axis] {
            bail!("{start}..{end} of dimension {axis} lies outside shape {:?}", self.shape);
        }
        let inner: usize = self.shape[axis + 1..].iter().product();
        let values = self
            .values
            .chunks_exact((self.shape[axis] * inner).max(1))
            .flat_map(|chunk| chunk[start * inner..end * inner].iter().copied())
            .collect();
        let mut shape = self.shape.clone();
        shape[axis] = end - start;
        Self::new(&shape, values)
    }

    /// Element `position` of the outermost dimension, without that dimension.
    ///
    /// # Errors
    /// A position outside it.
    pub fn at(&self, position: usize) -> Result<Self> {
        self.slice(0, position, position + 1)?.reshaped(&self.shape[1..])
    }

    /// Arrays one after another along one dimension.
    ///
    /// # Errors
    /// No array; arrays that differ in another dimension.
    pub fn concatenated(parts: &[Self], axis: usize) -> Result<Self> {
        let Some(first) = parts.first() else { bail!("nothing to concatenate") };
        let mut shape = first.shape.clone();
        let same = |part: &Self| part.shape[..axis] == shape[..axis] && part.shape[axis + 1..] == shape[axis + 1..];
        if axis >= shape.len() || parts.iter().any(|part| part.shape.len() != shape.len() || !same(part)) {
            bail!("shapes differ outside dimension {axis}");
        }
        let outer: usize = shape[..axis].iter().product();
        let mut values = Vec::new();
        for row in 0..outer {
            for part in parts {
                let length = part.count() / outer;
                values.extend_from_slice(&part.values[row * length..][..length]);
            }
        }
        shape[axis] = parts.iter().map(|part| part.shape[axis]).sum();
        Self::new(&shape, values)
    }

    /// Arrays of equal shape as the entries of a new outermost dimension.
    ///
    /// # Errors
    /// No array; arrays of different shapes.
    pub fn stacked(parts: &[Self]) -> Result<Self> {
        let rows =
            parts.iter().map(|part| part.reshaped(&[&[1], &part.shape[..]].concat())).collect::<Result<Vec<_>>>()?;
        Self::concatenated(&rows, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counting(shape: &[usize]) -> Array {
        Array::new(shape, (0..shape.iter().product()).map(|value: usize| value as f64).collect()).unwrap()
    }

    #[test]
    fn permuting_there_and_back_changes_nothing() {
        let array = counting(&[2, 3, 4]);
        let turned = array.permuted(&[2, 0, 1]).unwrap();
        assert_eq!(turned.shape, [4, 2, 3]);
        assert_eq!(turned.values[..6], [0.0, 4.0, 8.0, 12.0, 16.0, 20.0]);
        assert_eq!(turned.permuted(&[1, 2, 0]).unwrap(), array);
        assert!(array.permuted(&[0, 1, 1]).is_err());
    }

    #[test]
    fn slices_put_together_are_the_whole() {
        let array = counting(&[2, 5, 3]);
        let parts = [array.slice(1, 0, 2).unwrap(), array.slice(1, 2, 5).unwrap()];
        assert_eq!(Array::concatenated(&parts, 1).unwrap(), array);
        assert_eq!(Array::stacked(&[array.at(0).unwrap(), array.at(1).unwrap()]).unwrap(), array);
        assert!(array.slice(1, 2, 6).is_err());
    }
}
