//! What can go wrong with a model, its files and its text.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Result of a model operation.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of a model. Each names the file, key or tensor at fault, what was expected and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor, an operator or a device failed.
    #[error(transparent)]
    Autograd(#[from] autograd::Error),
    /// The operating system refused something.
    #[error("cannot {action} {}: {source}{}", path.display(), IoAdvice(source))]
    Io {
        /// What was attempted: "read", "write", …
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A file is not what its name promises.
    #[error("{}: {problem}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong, what was expected, what to do.
        problem: String,
    },
    /// A key of a configuration is missing, of the wrong kind, or has a value that is not supported.
    #[error("{}: {key}: {problem}", path.display())]
    Configuration {
        /// The file.
        path: PathBuf,
        /// The key, with the keys that lead to it.
        key: String,
        /// What is wrong, what was expected, what to do.
        problem: String,
    },
    /// A tensor in a weight file is malformed or has values that no model can have.
    #[error("{}: tensor {tensor}: {problem}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name in the file.
        tensor: String,
        /// What is wrong, what was expected, what to do.
        problem: String,
    },
    /// A tensor has another shape than the configuration says.
    #[error(
        "{}: tensor {tensor} has shape {found:?}, but {expected:?} follows from config.json: \
         the weights and the configuration belong to different models",
        path.display()
    )]
    TensorShape {
        /// The file.
        path: PathBuf,
        /// The tensor's name in the file.
        tensor: String,
        /// The shape that the configuration gives.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// The configuration needs a tensor that no file holds.
    #[error("{}: tensor {tensor} is missing: {advice}", folder.display())]
    MissingTensor {
        /// The folder.
        folder: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// What to do.
        advice: String,
    },
    /// The files hold tensors that the configuration has no place for.
    #[error(
        "{}: {} that config.json has no place for: {}; the weights and the configuration belong to different models",
        folder.display(),
        Count(names.len()),
        Listed(names)
    )]
    UnexpectedTensors {
        /// The folder.
        folder: PathBuf,
        /// The tensors' names in the files.
        names: Vec<String>,
    },
    /// The caller asked for loading to stop.
    #[error("loading was stopped")]
    Stopped,
    /// A table of parameters lacks one that the model needs.
    #[error("the parameter {name} is missing")]
    NoSuchParameter {
        /// The parameter's name.
        name: String,
    },
    /// A batch of tokens that makes no sense, or a cache of another model.
    #[error("{message}")]
    Batch {
        /// What is wrong and what would be right.
        message: String,
    },
    /// A hybrid cannot be made in the way that was asked for.
    #[error("cannot graft: {message}")]
    Graft {
        /// What is wrong and what would be right.
        message: String,
    },
    /// Models cannot be merged in the way that was asked for.
    #[error("cannot merge: {message}")]
    Merge {
        /// What is wrong and what would be right.
        message: String,
    },
    /// Sampling options that make no sense, or logits that cannot be sampled from.
    #[error("{message}")]
    Sampling {
        /// What is wrong and what would be right.
        message: String,
    },
    /// Text that the tokenizer cannot turn into tokens, or the other way around.
    #[error("tokenizer: {message}")]
    Tokenizer {
        /// What is wrong and what would be right.
        message: String,
    },
    /// A chat template that cannot be compiled or rendered.
    #[error("chat template: {message}")]
    ChatTemplate {
        /// What is wrong and what would be right.
        message: String,
    },
}

impl From<runtime::Error> for Error {
    fn from(error: runtime::Error) -> Self {
        Self::Autograd(error.into())
    }
}

impl Error {
    /// A refusal of the operating system: `action` is a verb ("read", "write", …).
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }

    /// A malformed file.
    pub(crate) fn format(path: &Path, problem: impl Into<String>) -> Self {
        Self::Format { path: path.to_owned(), problem: problem.into() }
    }

    /// A malformed tensor.
    pub(crate) fn tensor(path: &Path, tensor: &str, problem: impl Into<String>) -> Self {
        Self::Tensor { path: path.to_owned(), tensor: tensor.to_owned(), problem: problem.into() }
    }

    /// The error as one of an operator, for closures that must return those.
    pub(crate) fn into_autograd(self) -> autograd::Error {
        match self {
            Self::Autograd(error) => error,
            other => autograd::Error::Invalid { operator: "model", message: other.to_string() },
        }
    }
}

struct IoAdvice<'a>(&'a io::Error);

impl fmt::Display for IoAdvice<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self.0.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                "; free some space and try again: nothing that was complete before has been changed"
            }
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                "; choose another place or change the permissions"
            }
            _ => "",
        })
    }
}

struct Count(usize);

impl fmt::Display for Count {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 1 { formatter.write_str("1 tensor") } else { write!(formatter, "{} tensors", self.0) }
    }
}

/// The first names of a list, and how many more there are.
struct Listed<'a>(&'a [String]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 6;
        formatter.write_str(&self.0[..self.0.len().min(SHOWN)].join(", "))?;
        if self.0.len() > SHOWN { write!(formatter, " and {} more", self.0.len() - SHOWN) } else { Ok(()) }
    }
}
