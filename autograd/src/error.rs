//! What can go wrong in an operator.

use crate::DType;

/// Result of an operator.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of a tensor, an operator or the tape. Each names the operator and the argument at fault.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A device or its memory failed.
    #[error(transparent)]
    Runtime(#[from] runtime::Error),
    /// An argument has the wrong shape.
    #[error("{operator}: {argument} has shape {found:?}, expected {expected}")]
    Shape {
        /// The operator.
        operator: &'static str,
        /// The argument.
        argument: &'static str,
        /// What would be right.
        expected: String,
        /// What was given.
        found: Vec<usize>,
    },
    /// An argument has the wrong element type.
    #[error("{operator}: {argument} has element type {found}, expected {expected}")]
    ElementType {
        /// The operator.
        operator: &'static str,
        /// The argument.
        argument: &'static str,
        /// What would be right.
        expected: &'static str,
        /// What was given.
        found: DType,
    },
    /// A value that indexes something lies outside it.
    #[error("{operator}: {argument}[{position}] is {value}, expected a value below {limit}")]
    IndexOutOfRange {
        /// The operator.
        operator: &'static str,
        /// The argument.
        argument: &'static str,
        /// Flat position in the argument.
        position: usize,
        /// The value found there.
        value: usize,
        /// The first value that is too large.
        limit: usize,
    },
    /// An option has a value that makes no sense.
    #[error("{operator}: {message}")]
    Invalid {
        /// The operator.
        operator: &'static str,
        /// What is wrong and what would be right.
        message: String,
    },
}
