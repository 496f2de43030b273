//! Tables: what a kernel finds its memory by when that is more than it has parameters for.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use kernels_ptx::{Element, ParameterKind};

use crate::{Buffer, Device, Result};

/// A word of a table's row.
pub enum Word<'a> {
    /// A number.
    U64(u64),
    /// The address of a buffer with elements of this type, which the kernel reads.
    Read(&'a Buffer, Element),
    /// The address of a buffer with elements of this type, which the kernel writes and may read.
    Write(&'a mut Buffer, Element),
}

impl Word<'_> {
    /// What kind of word this is.
    pub fn kind(&self) -> ParameterKind {
        match self {
            Self::U64(_) => ParameterKind::U64,
            Self::Read(_, element) => ParameterKind::Read(*element),
            Self::Write(_, element) => ParameterKind::Write(*element),
        }
    }

    pub(crate) fn buffer(&self) -> Option<(&Buffer, Element)> {
        match self {
            Self::U64(_) => None,
            Self::Read(buffer, element) => Some((buffer, *element)),
            Self::Write(buffer, element) => Some((buffer, *element)),
        }
    }
}

/// Where the words of a table are kept in a device's memory from one launch to the next: they are copied there only when they
/// differ from those of the launch before. It holds no buffer that the words name: every launch names them anew.
#[derive(Default)]
pub struct Table {
    kept: Mutex<Option<Kept>>,
}

struct Kept {
    words: Vec<u64>,
    /// The device's copy. A graph may hold it, too, when it is no longer kept here.
    copy: Arc<Buffer>,
}

impl Table {
    /// A table that nothing was launched with.
    pub fn new() -> Self {
        Self::default()
    }

    /// The words in the memory of `device`; `upload` copies them there when others are kept.
    pub(crate) fn on(
        &self,
        device: &Device,
        words: Vec<u64>,
        upload: impl FnOnce(&[u8]) -> Result<Buffer>,
    ) -> Result<Arc<Buffer>> {
        // Words and copy are replaced together: a panic elsewhere cannot leave them different.
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kept) = &*kept
            && kept.words == words
            && kept.copy.device() == device
        {
            return Ok(Arc::clone(&kept.copy));
        }
        let copy = Arc::new(upload(bytemuck::cast_slice(&words))?);
        *kept = Some(Kept { words, copy: Arc::clone(&copy) });
        Ok(copy)
    }
}

impl fmt::Debug for Table {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Table")
    }
}
