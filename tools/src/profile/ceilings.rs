//! What a device reaches: the speed of a copy and of a matrix product, and what events cost, measured before anything is
//! compared with them.

use anyhow::Result;
use autograd::ops;
use autograd::{DType, Tape, Tensor, Var};
use runtime::{Device, DeviceKind, Recording};
use serde::{Deserialize, Serialize};

/// Bytes of the copy: far beyond every cache.
const COPIED: usize = 1 << 30;
/// Rows, columns and depth of the product.
const SIDE: usize = 8192;
const REPEATS: usize = 10;
/// Launches that the host makes while so much is written.
const LAUNCHES: usize = 10;

/// Measured speeds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ceilings {
    /// Bytes read and written per second by a copy on the device.
    pub copy_bytes_per_second: f64,
    /// Operations per second of our bf16 matrix product.
    pub matrix_operations_per_second: f64,
    /// What the events around a recorded launch cost at most: the median seconds between those around launches that fill a
    /// single element.
    #[serde(default)]
    pub event_seconds: f64,
}

impl Ceilings {
    /// Measures a GPU; `None` on other devices, whose times say nothing about kernels.
    ///
    /// # Errors
    /// Driver errors, out of memory.
    pub fn measure(device: &Device) -> Result<Option<Self>> {
        if !matches!(device.kind(), DeviceKind::Cuda(_)) {
            return Ok(None);
        }
        Ok(Some(Self {
            copy_bytes_per_second: 2.0 * COPIED as f64 / copy_seconds(device)?,
            matrix_operations_per_second: 2.0 * (SIDE as f64).powi(3) / product_seconds(device)?,
            event_seconds: event_seconds(device)?,
        }))
    }
}

fn copy_seconds(device: &Device) -> Result<f64> {
    let (mut source, mut target) = (device.allocate(COPIED)?, device.allocate(COPIED)?);
    source.set_zero()?;
    let stream = device.home_stream()?;
    let mut times = Vec::new();
    for _ in 0..REPEATS {
        let start = stream.record()?;
        target.copy_from(&source)?;
        let end = stream.record()?;
        end.synchronize()?;
        times.push(end.elapsed_since(&start)?.as_secs_f64());
    }
    Ok(super::summary::median(&mut times))
}

fn product_seconds(device: &Device) -> Result<f64> {
    let matrix = |value: f32| Tensor::filled(device, &[SIDE, SIDE], DType::Bf16, value);
    // Zeros would draw less power, and clocks would rise.
    let (x, weight) = (Var::constant(&matrix(0.37)?), Var::constant(&matrix(-1.21)?));
    let recording = device.record_launches()?;
    for _ in 0..REPEATS {
        ops::linear(&Tape::inference(), &x, &weight, None)?;
    }
    median_launch(&recording)
}

fn event_seconds(device: &Device) -> Result<f64> {
    // Launches gather behind it: where the GPU waits for one, the host's time lies between its events.
    let mut before = device.allocate(COPIED)?;
    let recording = device.record_launches()?;
    for _ in 0..REPEATS {
        before.set_zero()?;
        for _ in 0..LAUNCHES {
            Tensor::filled(device, &[1], DType::F32, 1.0)?;
        }
    }
    median_launch(&recording)
}

fn median_launch(recording: &Recording) -> Result<f64> {
    let mut times: Vec<f64> = recording.take_records()?.iter().map(|launch| launch.duration.as_secs_f64()).collect();
    Ok(super::summary::median(&mut times))
}
