//! The manifest of a fixture folder, format `grafter-parity/1`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::compare::Bounds;

/// The format that this harness reads.
const SCHEMA: &str = "grafter-parity/1";

/// A folder's list of cases.
#[derive(Debug, Deserialize)]
pub struct Manifest {
    schema: String,
    /// The cases in the order they are run.
    pub fixtures: Vec<Fixture>,
}

/// One case: a file of tensors, what was computed, and how close a result must come.
#[derive(Debug, Deserialize)]
pub struct Fixture {
    /// Path of the tensors, relative to the manifest.
    pub file: String,
    /// What was computed; a key of the harness's table.
    pub op: String,
    /// Flags and sizes.
    #[serde(default)]
    pub scalars: Map<String, Value>,
    /// Shape of every tensor in the file.
    pub tensors: BTreeMap<String, TensorSpec>,
    /// Bounds by tensor and precision.
    #[serde(default)]
    pub tolerance: Map<String, Value>,
    /// Tensors that stay f32 in a bf16 run.
    #[serde(default)]
    pub bf16_keeps_fp32: Vec<String>,
    /// Model folder of a whole-model case, relative to the manifest.
    pub model_dir: Option<String>,
    /// Model folders of a training run, relative to the folder of `file`; the keys are their names.
    #[serde(default)]
    pub dirs: Map<String, Value>,
}

/// What the manifest says of one tensor.
#[derive(Debug, Deserialize)]
pub struct TensorSpec {
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
}

/// The element type that a case computes in, and whose bounds it must meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Precision {
    /// f32 throughout.
    Fp32,
    /// bf16 inputs and weights, but for those that the case keeps in f32.
    Bf16,
}

impl Precision {
    /// Its key in a tolerance.
    pub fn key(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
            Self::Bf16 => "bf16",
        }
    }
}

impl Manifest {
    /// Reads `manifest.json` of a fixture folder.
    ///
    /// # Errors
    /// A file that is missing, is no JSON, or has another format.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("manifest.json");
        let text = fs::read_to_string(&path)
            .with_context(|| format!("{}: expected a fixture folder with a manifest.json", path.display()))?;
        let manifest: Self = serde_json::from_str(&text).with_context(|| format!("{}", path.display()))?;
        if manifest.schema != SCHEMA {
            bail!("{}: schema is {:?}, this harness reads {SCHEMA:?}", path.display(), manifest.schema);
        }
        Ok(manifest)
    }
}

impl Fixture {
    /// The bounds of a tensor at a precision; `None` where the manifest gives none.
    ///
    /// # Errors
    /// A tolerance of another form.
    pub fn bounds(&self, tensor: &str, precision: Precision) -> Result<Option<Bounds>> {
        let Some(bounds) = self.tolerance.get(tensor).and_then(|by_precision| by_precision.get(precision.key())) else {
            return Ok(None);
        };
        let number = |key: &str| match bounds.get(key) {
            None => Ok(None),
            Some(bound) => match bound.as_f64() {
                Some(bound) => Ok(Some(bound)),
                None => bail!("tolerance.{tensor}.{}.{key} is {bound}, expected a number", precision.key()),
            },
        };
        let bounds = Bounds { relative_l2: number("rel_l2")?, relative_max: number("max_abs_over_max")? };
        if bounds == Bounds::default() {
            bail!("tolerance.{tensor}.{} has neither rel_l2 nor max_abs_over_max", precision.key());
        }
        Ok(Some(bounds))
    }

    /// Whether any tensor has bounds at a precision.
    pub fn has_bounds(&self, precision: Precision) -> bool {
        self.tolerance.values().any(|by_precision| by_precision.get(precision.key()).is_some())
    }
}
