//! Causal depthwise convolution.

use super::silu;

/// Sizes and options.
#[derive(Clone, Debug)]
pub struct Convolution {
    /// Rows.
    pub batch: usize,
    /// Steps of a row.
    pub time: usize,
    /// Channels.
    pub channels: usize,
    /// Taps.
    pub width: usize,
    /// Whether SiLU follows.
    pub silu: bool,
    /// `[batch, time]`: where each token's document begins.
    pub document_start: Option<Vec<usize>>,
}

/// `activation(bias[d] + Σ_w weight[d, w] · x[b, t - (width - 1) + w, d])`; `before` `[batch, width - 1, channels]` holds
/// the inputs before the first.
pub fn causal_conv1d(
    sizes: &Convolution,
    x: &[f64],
    weight: &[f64],
    bias: Option<&[f64]>,
    before: Option<&[f64]>,
) -> Vec<f64> {
    let Convolution { batch, time, channels, width, .. } = *sizes;
    let mut result = vec![0.0; batch * time * channels];
    for row in 0..batch {
        for step in 0..time {
            let start = sizes.document_start.as_ref().map_or(0, |starts| starts[row * time + step]);
            for channel in 0..channels {
                let mut sum = bias.map_or(0.0, |bias| bias[channel]);
                for tap in 0..width {
                    // Which input the tap lies on: negative before the first.
                    let source = step as isize - (width as isize - 1) + tap as isize;
                    let value = if source >= start as isize {
                        x[(row * time + source as usize) * channels + channel]
                    } else if let (Some(before), true) = (before, source < 0) {
                        let index = (source + width as isize - 1) as usize;
                        before[(row * (width - 1) + index) * channels + channel]
                    } else {
                        0.0
                    };
                    sum += weight[channel * width + tap] * value;
                }
                result[(row * time + step) * channels + channel] = if sizes.silu { silu(sum) } else { sum };
            }
        }
    }
    result
}
