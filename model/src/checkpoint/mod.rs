//! Weights in and out of Hugging Face folders.
//!
//! - [`WeightFiles`] maps and checks the safetensors files of a folder and gives their tensors canonical names.
//! - [`load`] fills a table of parameters from them, each destination exactly once.
//! - [`save`] writes a folder whole or not at all.

mod convert;
mod files;
mod folder;
mod header;
mod load;
mod map;
mod names;
mod save;

use autograd::DType;

pub use convert::StoredType;
pub(crate) use convert::{first_not_finite, from_f32, to_f32};
pub(crate) use files::View;
pub use files::{TensorInfo, WeightFiles};
pub(crate) use folder::{NewFolder, carry};
pub use load::load;
pub(crate) use load::{check, not_finite};
pub use map::MappedFile;
pub use save::{SaveOptions, save};
pub(crate) use save::{TensorToWrite, file_name, write_tensors};

/// A parameter that a model needs: where it comes from and what happens to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParameterSpec {
    /// Its canonical name.
    pub name: String,
    /// Its shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// Its element type in memory, f32 or bf16.
    pub dtype: DType,
    /// Whether gradients are computed and updates applied.
    pub trainable: bool,
    /// Whether weight decay applies.
    pub decay: bool,
}
