//! GGUF's ways to store numbers: plain, or quantised in blocks with shared scales.
//!
//! Every value is computed in f32 in the order of operations of ggml's reference, so that it is the same bit for bit.

use half::{bf16, f16};
use rayon::prelude::*;

/// How a tensor's elements are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(non_camel_case_types)]
pub enum BlockType {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// Brain floating point.
    BF16,
    /// 32 elements: f16 scale, i8 each.
    Q8_0,
    /// 32 elements: f16 scale, 4 bits each, offset by 8.
    Q4_0,
    /// 32 elements: f16 scale and f16 minimum, 4 bits each.
    Q4_1,
    /// 256 elements: eight groups with 6-bit scales and minima under two f16 scales, 4 bits each.
    Q4_K,
    /// 256 elements: sixteen groups with i8 scales under one f16 scale, 6 bits each.
    Q6_K,
}

/// Elements of a K block.
const K: usize = 256;

impl BlockType {
    /// The type of a number in the file, or why it is refused.
    pub(super) fn from_id(id: u32) -> Result<Self, String> {
        const OTHERS: [(u32, &str); 12] = [
            (6, "Q5_0"),
            (7, "Q5_1"),
            (9, "Q8_1"),
            (10, "Q2_K"),
            (11, "Q3_K"),
            (13, "Q5_K"),
            (15, "Q8_K"),
            (20, "IQ4_NL"),
            (23, "IQ4_XS"),
            (28, "F64"),
            (34, "TQ1_0"),
            (39, "MXFP4"),
        ];
        Ok(match id {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            8 => Self::Q8_0,
            12 => Self::Q4_K,
            14 => Self::Q6_K,
            30 => Self::BF16,
            other => {
                let name = OTHERS.iter().find(|(id, _)| *id == other).map_or("of unknown name", |(_, name)| *name);
                return Err(format!(
                    "has type {other} ({name}): supported are F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K and Q6_K"
                ));
            }
        })
    }

    /// Elements that are stored together.
    pub(super) fn block_elements(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 => 32,
            Self::Q4_K | Self::Q6_K => K,
        }
    }

    /// Bytes of [`BlockType::block_elements`].
    pub(super) fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q8_0 => 34,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q4_K => 144,
            Self::Q6_K => 210,
        }
    }

    /// The values of whole blocks.
    pub(super) fn dequantise(self, bytes: &[u8]) -> Vec<f32> {
        let (elements, size) = (self.block_elements(), self.block_bytes());
        let block: fn(&[u8], &mut [f32]) = match self {
            Self::F32 => |bytes, output| output[0] = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
            Self::F16 => |bytes, output| output[0] = half_at(bytes, 0),
            Self::BF16 => |bytes, output| output[0] = bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
            Self::Q8_0 => q8_0,
            Self::Q4_0 => q4_0,
            Self::Q4_1 => q4_1,
            Self::Q4_K => q4_k,
            Self::Q6_K => q6_k,
        };
        let mut values = vec![f32::NAN; bytes.len() / size * elements];
        // Blocks that one task takes: about 64 Ki elements.
        let blocks = (1 << 16) / elements;
        values.par_chunks_mut(blocks * elements).zip(bytes.par_chunks(blocks * size)).for_each(|(values, bytes)| {
            for (output, bytes) in values.chunks_exact_mut(elements).zip(bytes.chunks_exact(size)) {
                block(bytes, output);
            }
        });
        values
    }
}

fn half_at(bytes: &[u8], offset: usize) -> f32 {
    f16::from_le_bytes([bytes[offset], bytes[offset + 1]]).to_f32()
}

fn q8_0(bytes: &[u8], output: &mut [f32]) {
    let scale = half_at(bytes, 0);
    for (value, byte) in output.iter_mut().zip(&bytes[2..]) {
        *value = f32::from(*byte as i8) * scale;
    }
}

/// The low halves of the 16 bytes are the first 16 elements, the high halves the others.
fn q4_0(bytes: &[u8], output: &mut [f32]) {
    let scale = half_at(bytes, 0);
    for (index, byte) in bytes[2..].iter().enumerate() {
        output[index] = scale * f32::from((byte & 15) as i8 - 8);
        output[index + 16] = scale * f32::from((byte >> 4) as i8 - 8);
    }
}

fn q4_1(bytes: &[u8], output: &mut [f32]) {
    let (scale, minimum) = (half_at(bytes, 0), half_at(bytes, 2));
    for (index, byte) in bytes[4..].iter().enumerate() {
        output[index] = scale * f32::from(byte & 15) + minimum;
        output[index + 16] = scale * f32::from(byte >> 4) + minimum;
    }
}

/// `d`, `dmin`, 12 bytes of scales and minima, 128 bytes of elements: each 32 bytes hold a group in their low halves
/// and the next in their high halves.
fn q4_k(bytes: &[u8], output: &mut [f32]) {
    let (scale, minimum) = (half_at(bytes, 0), half_at(bytes, 2));
    let packed = &bytes[4..16];
    for (group, values) in output.chunks_exact_mut(32).enumerate() {
        // 6 bits each: the first four groups' are whole, the others' upper two bits sit on top of those.
        let (group_scale, group_minimum) = if group < 4 {
            (packed[group] & 63, packed[group + 4] & 63)
        } else {
            (packed[group + 4] & 15 | (packed[group - 4] >> 6) << 4, packed[group + 4] >> 4 | (packed[group] >> 6) << 4)
        };
        let (group_scale, group_minimum) = (scale * f32::from(group_scale), minimum * f32::from(group_minimum));
        let elements = &bytes[16 + group / 2 * 32..][..32];
        for (value, byte) in values.iter_mut().zip(elements) {
            let quantum = if group % 2 == 0 { byte & 15 } else { byte >> 4 };
            *value = group_scale * f32::from(quantum) - group_minimum;
        }
    }
}

/// 128 bytes of lower halves, 64 bytes of upper two bits, 16 scales, `d`; two times 128 elements.
fn q6_k(bytes: &[u8], output: &mut [f32]) {
    let (low, high, scales) = (&bytes[..128], &bytes[128..192], &bytes[192..208]);
    let scale = half_at(bytes, 208);
    for (index, value) in output.iter_mut().enumerate() {
        let (half, quarter, position) = (index / 128, index % 128 / 32, index % 32);
        // Quarters 0 and 1 lie in the low halves of the half's 64 bytes, 2 and 3 in the high ones.
        let nibble = low[half * 64 + quarter % 2 * 32 + position] >> (quarter / 2 * 4) & 15;
        let top = high[half * 32 + position] >> (quarter * 2) & 3;
        let quantum = (nibble | top << 4) as i8 - 32;
        *value = (scale * f32::from(scales[index / 16] as i8)) * f32::from(quantum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A block with the bytes 0, step, 2 step, … and the given f16 numbers over them.
    fn block(kind: BlockType, step: u8, halves: &[(usize, f32)]) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..kind.block_bytes()).map(|index| (index as u8).wrapping_mul(step)).collect();
        for (offset, value) in halves {
            bytes[*offset..offset + 2].copy_from_slice(&f16::from_f32(*value).to_le_bytes());
        }
        bytes
    }

    #[test]
    fn blocks_of_32_by_hand() {
        let mut bytes = block(BlockType::Q8_0, 0, &[(0, 0.5)]);
        bytes[2] = 127;
        bytes[33] = 0x80;
        let values = BlockType::Q8_0.dequantise(&bytes);
        assert_eq!((values.len(), values[0], values[1], values[31]), (32, 63.5, 0.0, -64.0));

        let mut bytes = block(BlockType::Q4_0, 0, &[(0, 2.0)]);
        bytes[2] = 0x1f;
        let values = BlockType::Q4_0.dequantise(&bytes);
        assert_eq!((values[0], values[16], values[1]), (14.0, -14.0, -16.0));

        let mut bytes = block(BlockType::Q4_1, 0, &[(0, 2.0), (2, -3.0)]);
        bytes[4 + 15] = 0xa3;
        let values = BlockType::Q4_1.dequantise(&bytes);
        assert_eq!((values[15], values[31], values[0]), (3.0, 17.0, -3.0));
    }

    #[test]
    fn blocks_of_256_by_hand() {
        // Scales 1..8 and minima 8..15 in groups 0..7: the last four need no upper bits.
        let mut bytes = block(BlockType::Q4_K, 0, &[(0, 1.0), (2, 0.5)]);
        for group in 0..4u8 {
            bytes[4 + usize::from(group)] = group + 1;
            bytes[8 + usize::from(group)] = group + 8;
            bytes[12 + usize::from(group)] = (group + 5) | ((group + 12) << 4);
        }
        // Group 6's scale gets its upper bits from byte 2 (2 << 6): 7 + 2·16 = 39.
        bytes[4 + 2] |= 2 << 6;
        bytes[16 + 32 + 3] = 0x94;
        bytes[16 + 96] = 0x07;
        let values = BlockType::Q4_K.dequantise(&bytes);
        assert_eq!(values[2 * 32 + 3], 3.0 * 4.0 - 5.0);
        assert_eq!(values[3 * 32 + 3], 4.0 * 9.0 - 5.5);
        assert_eq!(values[6 * 32], 39.0 * 7.0 - 7.0);
        assert_eq!(values[7 * 32], -7.5);

        // Element 200 = half 1, quarter 2, position 8: high half of low[64 + 8], bits 4-5 of high[32 + 8], scale 12.
        let mut bytes = block(BlockType::Q6_K, 0, &[(208, 0.25)]);
        bytes[64 + 8] = 0xb0;
        bytes[128 + 32 + 8] = 2 << 4;
        bytes[192 + 12] = (-3i8) as u8;
        let values = BlockType::Q6_K.dequantise(&bytes);
        assert_eq!(values[200], -0.75 * (0x2b - 32) as f32);
        assert_eq!(values[201], -0.75 * -32.0);
        assert_eq!(values[0], 0.0);
    }

    #[test]
    fn plain_types_and_many_blocks() {
        let values: Vec<f32> = (0..100_000).map(|index| index as f32 * 0.25 - 7.0).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        assert_eq!(BlockType::F32.dequantise(&bytes), values);
        let bytes: Vec<u8> = values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect();
        let expected: Vec<f32> = values.iter().map(|value| f16::from_f32(*value).to_f32()).collect();
        assert_eq!(BlockType::F16.dequantise(&bytes), expected);
        let bytes: Vec<u8> = values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect();
        let expected: Vec<f32> = values.iter().map(|value| bf16::from_f32(*value).to_f32()).collect();
        assert_eq!(BlockType::BF16.dequantise(&bytes), expected);
        let one = block(BlockType::Q4_1, 7, &[(0, 0.5), (2, 1.0)]);
        let many = BlockType::Q4_1.dequantise(&one.repeat(5000));
        assert!(many.chunks_exact(32).all(|values| values == &BlockType::Q4_1.dequantise(&one)[..]));
    }

    #[test]
    fn other_types_are_refused_by_name() {
        assert!(BlockType::from_id(13).unwrap_err().starts_with("has type 13 (Q5_K): supported are F32"));
        assert!(BlockType::from_id(99).unwrap_err().contains("of unknown name"));
    }
}
