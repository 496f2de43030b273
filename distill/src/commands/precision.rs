//! The element type in which a model is used.

use std::path::Path;

use anyhow::Result;
use clap::Args;
use model::Precision;
use runtime::Device;

use crate::config::PrecisionKind;

/// What commands that use a model without training it share.
#[derive(Args, Clone, Copy)]
pub(super) struct PrecisionArguments {
    /// Element type of matrices and activations [default: f32 on the CPU; elsewhere bf16 if the model is stored so, or else f32]
    #[arg(long, value_enum, value_name = "TYPE")]
    precision: Option<PrecisionKind>,
}

impl PrecisionArguments {
    /// The precision for a model folder.
    ///
    /// # Errors
    /// A folder that is no model.
    pub(super) fn resolve(self, folder: &Path, device: &Device) -> Result<Precision> {
        Ok(match self.precision {
            // The CPU computes in f32 whatever matrices are kept in: widening them would only take memory.
            Some(PrecisionKind::F32) if device.is_cpu() => Precision::AsStored,
            Some(PrecisionKind::F32) => Precision::F32,
            Some(PrecisionKind::Bf16) => Precision::Bf16,
            None => Precision::for_use(folder, device)?,
        })
    }
}
