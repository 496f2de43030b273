//! Training data: from jsonl documents to packed rows of tokens, and the order in which training sees them.
//!
//! [`pack`] reads documents, encodes them and packs whole documents into rows of one length; the rows go into a token
//! file ([`TokenFile`]), which is mapped, not read. [`prepare`] packs only when no packed file fits. [`Sampler`] gives
//! the rows in a shuffled order that is a function of one integer, the number of rows seen so far.

mod batch;
mod documents;
mod encode;
mod pack;
mod packing;
mod sampler;
mod token_file;

pub(crate) use batch::positions_that_count;
pub use batch::{Batch, PositionsThatCount};
pub use documents::{Content, Document, Documents};
pub use encode::Encoder;
pub use pack::{LongDocuments, PackOptions, pack, prepare};
pub(crate) use pack::{differences, wanted_identity};
pub use sampler::Sampler;
pub use token_file::{Identity, Sequence, Summary, TokenFile};
