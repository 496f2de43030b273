//! Bytes of weight files to numbers and back, in parallel.

use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;

/// Elements that one task converts.
const CHUNK: usize = 1 << 18;

/// Element type of weights in a file that we write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoredType {
    /// IEEE 754 single precision.
    F32,
    /// Brain floating point.
    Bf16,
    /// IEEE 754 half precision.
    F16,
}

impl StoredType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// The name that safetensors headers use.
    pub fn safetensors_name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
        }
    }

    /// The name that Hugging Face configurations use.
    pub fn torch_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
        }
    }

    /// The type of that name in a Hugging Face configuration.
    pub fn from_torch_name(name: &str) -> Option<Self> {
        [Self::F32, Self::Bf16, Self::F16]
            .into_iter()
            .find(|kind| name.trim_start_matches("torch.") == kind.torch_name())
    }

    /// The type of a stored tensor, if weights can have it.
    pub(crate) fn from_safetensors(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F32 => Some(Self::F32),
            Dtype::BF16 => Some(Self::Bf16),
            Dtype::F16 => Some(Self::F16),
            _ => None,
        }
    }
}

/// Widens `bytes`, elements of type `kind`, to f32.
pub(crate) fn to_f32(kind: StoredType, bytes: &[u8], output: &mut [f32]) {
    let convert: fn(&[u8], &mut [f32]) = match kind {
        StoredType::F32 => |bytes, output| {
            for (value, bytes) in output.iter_mut().zip(bytes.chunks_exact(4)) {
                *value = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            }
        },
        StoredType::F16 => |bytes, output| {
            for (value, bytes) in output.iter_mut().zip(bytes.chunks_exact(2)) {
                *value = f16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
            }
        },
        StoredType::Bf16 => |bytes, output| {
            for (value, bytes) in output.iter_mut().zip(bytes.chunks_exact(2)) {
                *value = f32::from_bits(u32::from(u16::from_le_bytes([bytes[0], bytes[1]])) << 16);
            }
        },
    };
    let bytes = bytes.par_chunks(CHUNK * kind.size());
    output.par_chunks_mut(CHUNK).zip(bytes).for_each(|(output, bytes)| convert(bytes, output));
}

/// Takes bf16 as it is and rounds the other types to it.
pub(super) fn to_bf16(kind: StoredType, bytes: &[u8], output: &mut [bf16]) {
    let convert: fn(&[u8], &mut [bf16]) = match kind {
        StoredType::F32 => |bytes, output| {
            for (value, bytes) in output.iter_mut().zip(bytes.chunks_exact(4)) {
                *value = bf16::from_f32(f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
            }
        },
        StoredType::F16 => |bytes, output| {
            for (value, bytes) in output.iter_mut().zip(bytes.chunks_exact(2)) {
                *value = bf16::from_f32(f16::from_le_bytes([bytes[0], bytes[1]]).to_f32());
            }
        },
        StoredType::Bf16 => |bytes, output| {
            for (value, bytes) in output.iter_mut().zip(bytes.chunks_exact(2)) {
                *value = bf16::from_le_bytes([bytes[0], bytes[1]]);
            }
        },
    };
    let bytes = bytes.par_chunks(CHUNK * kind.size());
    output.par_chunks_mut(CHUNK).zip(bytes).for_each(|(output, bytes)| convert(bytes, output));
}

/// Narrows f32 to the little-endian bytes of `kind`, rounding to nearest even.
pub(crate) fn from_f32(values: &[f32], kind: StoredType) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * kind.size()];
    match kind {
        StoredType::F32 => {
            for (bytes, value) in bytes.chunks_exact_mut(4).zip(values) {
                bytes.copy_from_slice(&value.to_le_bytes());
            }
        }
        StoredType::Bf16 => {
            for (bytes, value) in bytes.chunks_exact_mut(2).zip(values) {
                bytes.copy_from_slice(&bf16::from_f32(*value).to_le_bytes());
            }
        }
        StoredType::F16 => {
            for (bytes, value) in bytes.chunks_exact_mut(2).zip(values) {
                bytes.copy_from_slice(&f16::from_f32(*value).to_le_bytes());
            }
        }
    }
    bytes
}

/// Position of the first element in little-endian bytes that is NaN or infinite.
pub(crate) fn first_not_finite(bytes: &[u8], kind: StoredType) -> Option<usize> {
    // All exponent bits set is infinity or NaN in each of the three formats.
    let is_bad: fn(&[u8]) -> bool = match kind {
        StoredType::F32 => |bytes| {
            bytes.chunks_exact(4).fold(false, |bad, bytes| {
                bad | (u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) & 0x7f80_0000 == 0x7f80_0000)
            })
        },
        StoredType::Bf16 => |bytes| {
            bytes
                .chunks_exact(2)
                .fold(false, |bad, bytes| bad | (u16::from_le_bytes([bytes[0], bytes[1]]) & 0x7f80 == 0x7f80))
        },
        StoredType::F16 => |bytes| {
            bytes
                .chunks_exact(2)
                .fold(false, |bad, bytes| bad | (u16::from_le_bytes([bytes[0], bytes[1]]) & 0x7c00 == 0x7c00))
        },
    };
    let bytes_of_chunk = CHUNK * kind.size();
    let chunk = bytes.par_chunks(bytes_of_chunk).position_first(is_bad)?;
    let begin = chunk * bytes_of_chunk;
    let within = bytes[begin..].chunks_exact(kind.size()).position(is_bad)?;
    Some(begin / kind.size() + within)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bit_pattern_of_the_narrow_types_comes_back() {
        let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        for kind in [StoredType::Bf16, StoredType::F16] {
            let mut wide = vec![0.0; 1 << 16];
            to_f32(kind, &bytes, &mut wide);
            let back = from_f32(&wide, kind);
            for (index, (before, after)) in bytes.chunks_exact(2).zip(back.chunks_exact(2)).enumerate() {
                assert!(before == after || wide[index].is_nan(), "{kind:?} {index:#06x}");
            }
            let bad = wide.iter().position(|value| !value.is_finite());
            assert_eq!(first_not_finite(&bytes, kind), bad);
        }
    }

    #[test]
    fn the_first_value_that_is_not_finite_is_found_in_any_chunk() {
        let mut values = vec![1.0f32; 3 * CHUNK + 5];
        assert_eq!(first_not_finite(&from_f32(&values, StoredType::F32), StoredType::F32), None);
        values[3 * CHUNK + 4] = f32::NAN;
        values[2 * CHUNK + 7] = f32::NEG_INFINITY;
        assert_eq!(first_not_finite(&from_f32(&values, StoredType::F32), StoredType::F32), Some(2 * CHUNK + 7));
    }
}
