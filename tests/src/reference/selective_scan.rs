//! The selective scan.

use super::{silu, softplus};

/// Sizes, inputs and options of a scan.
#[derive(Clone, Debug)]
pub struct Scan<'a> {
    /// Rows.
    pub batch: usize,
    /// Steps of a row.
    pub time: usize,
    /// Channels.
    pub channels: usize,
    /// States of a channel.
    pub states: usize,
    /// Groups of B.
    pub b_groups: usize,
    /// Groups of C.
    pub c_groups: usize,
    /// u `[batch, time, channels]`.
    pub input: &'a [f64],
    /// `[batch, time, channels]`.
    pub delta: &'a [f64],
    /// `[channels, states]`.
    pub a: &'a [f64],
    /// `[batch, time, groups of B, states]`.
    pub b: &'a [f64],
    /// `[batch, time, groups of C, states]`.
    pub c: &'a [f64],
    /// `[channels]`.
    pub d: Option<&'a [f64]>,
    /// `[batch, time, channels]`.
    pub gate: Option<&'a [f64]>,
    /// `[channels]`.
    pub delta_bias: Option<&'a [f64]>,
    /// Whether softplus is applied.
    pub softplus: bool,
    /// `[batch, channels, states]`.
    pub initial_state: Option<&'a [f64]>,
    /// `[batch, time]`: where each token's document begins.
    pub document_start: Option<&'a [usize]>,
}

/// What a scan gives.
#[derive(Clone, Debug)]
pub struct ScanResult {
    /// `[batch, time, channels]`.
    pub output: Vec<f64>,
    /// `[batch, channels, states]`.
    pub last_state: Vec<f64>,
}

/// `h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t`, `y_t = C_t · h_t + D u_t`, `output_t = y_t · silu(z_t)`.
pub fn selective_scan(scan: &Scan<'_>) -> ScanResult {
    let Scan { batch, time, channels, states, b_groups, c_groups, .. } = *scan;
    let mut output = vec![0.0; batch * time * channels];
    let mut last_state = vec![0.0; batch * channels * states];
    for row in 0..batch {
        for channel in 0..channels {
            let b_group = channel / (channels / b_groups);
            let c_group = channel / (channels / c_groups);
            let state_at = (row * channels + channel) * states;
            let mut state = match scan.initial_state {
                Some(initial) => initial[state_at..state_at + states].to_vec(),
                None => vec![0.0; states],
            };
            for step in 0..time {
                let token = row * time + step;
                if scan.document_start.is_some_and(|starts| starts[token] == step) {
                    state = vec![0.0; states];
                }
                let at = token * channels + channel;
                let mut delta = scan.delta[at] + scan.delta_bias.map_or(0.0, |bias| bias[channel]);
                if scan.softplus {
                    delta = softplus(delta);
                }
                let mut y = scan.d.map_or(0.0, |d| d[channel] * scan.input[at]);
                for n in 0..states {
                    let b = scan.b[(token * b_groups + b_group) * states + n];
                    let c = scan.c[(token * c_groups + c_group) * states + n];
                    state[n] = (delta * scan.a[channel * states + n]).exp() * state[n] + delta * b * scan.input[at];
                    y += c * state[n];
                }
                output[at] = y * scan.gate.map_or(1.0, |gate| silu(gate[at]));
            }
            last_state[state_at..state_at + states].copy_from_slice(&state);
        }
    }
    ScanResult { output, last_state }
}
