//! What the simulator reports.

use std::fmt;

/// A fault of a kernel: what went wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The kernel's name; empty when the text has none.
    pub kernel: String,
    /// The line of the text, from 1; 0 when the fault is of no single line.
    pub line: usize,
    /// That line itself, without the space around it.
    pub source: String,
    /// The block's place in the grid and the thread's place in the block, each in x, y and z; `None` for a fault of the
    /// text.
    pub place: Option<([u32; 3], [u32; 3])>,
    /// What went wrong: what was done, to what, and what was expected.
    pub problem: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("sim: ")?;
        if !self.kernel.is_empty() {
            write!(formatter, "kernel {}", self.kernel)?;
        }
        if self.line > 0 {
            write!(formatter, "{}line {}", if self.kernel.is_empty() { "" } else { ", " }, self.line)?;
        }
        if let Some((block, thread)) = self.place {
            write!(formatter, ", block {}, thread {}", Place(block), Place(thread))?;
        }
        write!(formatter, ": {}", self.problem)?;
        if self.line > 0 {
            write!(formatter, "\n{:>6} | {}", self.line, self.source)?;
        }
        Ok(())
    }
}

/// A place in a grid or block, printed as `(x, y, z)`.
pub(super) struct Place(pub [u32; 3]);

impl fmt::Display for Place {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [x, y, z] = self.0;
        write!(formatter, "({x}, {y}, {z})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_names_kernel_line_block_and_thread_and_shows_the_line() {
        let fault = Fault {
            kernel: "axpy".to_owned(),
            line: 12,
            source: "ld.global.f32 %f0, [%rd1];".to_owned(),
            place: Some(([1, 0, 0], [31, 2, 0])),
            problem: "it is wrong".to_owned(),
        };
        let text = "sim: kernel axpy, line 12, block (1, 0, 0), thread (31, 2, 0): it is wrong\n    12 | ld.global.f32 %f0, [%rd1];";
        assert_eq!(fault.to_string(), text);
    }
}
