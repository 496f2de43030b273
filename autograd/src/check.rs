//! Argument checks shared by the operators, so that each reads as one line and every message has the same form.

use crate::{DType, Error, Result, Tensor};

/// The tensor has exactly this shape.
pub(crate) fn shape(operator: &'static str, argument: &'static str, tensor: &Tensor, expected: &[usize]) -> Result<()> {
    if tensor.shape() == expected {
        return Ok(());
    }
    Err(Error::Shape { operator, argument, expected: format!("{expected:?}"), found: tensor.shape().to_vec() })
}

/// The tensor has this many dimensions; `form` names them for the message, as in "[batch, time, channels]".
pub(crate) fn rank(
    operator: &'static str,
    argument: &'static str,
    tensor: &Tensor,
    rank: usize,
    form: &str,
) -> Result<()> {
    if tensor.shape().len() == rank {
        return Ok(());
    }
    Err(Error::Shape { operator, argument, expected: form.to_owned(), found: tensor.shape().to_vec() })
}

/// The tensor holds u32 values.
pub(crate) fn is_u32(operator: &'static str, argument: &'static str, tensor: &Tensor) -> Result<()> {
    if tensor.dtype() == DType::U32 {
        return Ok(());
    }
    Err(Error::ElementType { operator, argument, expected: "u32", found: tensor.dtype() })
}

/// The tensor holds f32 values.
pub(crate) fn is_f32(operator: &'static str, argument: &'static str, tensor: &Tensor) -> Result<()> {
    if tensor.dtype() == DType::F32 {
        return Ok(());
    }
    Err(Error::ElementType { operator, argument, expected: "f32", found: tensor.dtype() })
}

/// The tensor holds floating-point values.
pub(crate) fn is_float(operator: &'static str, argument: &'static str, tensor: &Tensor) -> Result<()> {
    if tensor.dtype() != DType::U32 {
        return Ok(());
    }
    Err(Error::ElementType { operator, argument, expected: "f32 or bf16", found: tensor.dtype() })
}

/// The option is a positive, finite number.
pub(crate) fn positive(operator: &'static str, option: &str, value: f32) -> Result<()> {
    if value > 0.0 && value.is_finite() {
        return Ok(());
    }
    Err(Error::Invalid { operator, message: format!("{option} is {value}: expected a positive number") })
}
