//! What a launch of a kernel takes, and the checks before it.

use kernels_ptx::{Element, Kernel, ParameterKind};

use crate::{Buffer, Error, Result, Table, Word};

/// What is passed for one parameter of a kernel.
pub enum Argument<'a> {
    /// A 32-bit unsigned number, or a pattern of 32 bits.
    U32(u32),
    /// A 64-bit unsigned number.
    U64(u64),
    /// A 32-bit floating-point number.
    F32(f32),
    /// A buffer with elements of this type, which the kernel reads.
    Read(&'a Buffer, Element),
    /// A buffer with elements of this type, which the kernel writes and may read.
    Write(&'a mut Buffer, Element),
    /// A table's rows, one after another, and where they are kept on the device. They are not empty.
    Table(&'a Table, Vec<Word<'a>>),
}

/// What a device can launch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Compute capability (major, minor).
    pub compute_capability: (u32, u32),
    /// Threads per block in all.
    pub threads_per_block: u32,
    /// Threads per block in x, y and z.
    pub block: [u32; 3],
    /// Blocks per grid in x, y and z.
    pub grid: [u32; 3],
    /// Bytes of shared memory per block, for a kernel that asks for them.
    pub shared_bytes: u32,
}

impl Argument<'_> {
    /// Whether the argument is of the kind that a parameter takes.
    fn fits(&self, kind: ParameterKind) -> bool {
        match (self, kind) {
            (Self::U32(_), ParameterKind::U32)
            | (Self::U64(_), ParameterKind::U64)
            | (Self::F32(_), ParameterKind::F32)
            | (Self::Table(..), ParameterKind::Table(_)) => true,
            (Self::Read(_, given), ParameterKind::Read(taken))
            | (Self::Write(_, given), ParameterKind::Write(taken)) => *given == taken,
            _ => false,
        }
    }

    fn described(&self) -> String {
        match self {
            Self::U32(_) => ParameterKind::U32.to_string(),
            Self::U64(_) => ParameterKind::U64.to_string(),
            Self::F32(_) => ParameterKind::F32.to_string(),
            Self::Read(_, element) => ParameterKind::Read(*element).to_string(),
            Self::Write(_, element) => ParameterKind::Write(*element).to_string(),
            Self::Table(_, words) => format!("a table of {} words", words.len()),
        }
    }

    /// The buffers that the kernel reaches by the argument.
    pub(crate) fn buffers(&self) -> impl Iterator<Item = (&Buffer, Element)> {
        let (own, words) = match self {
            Self::U32(_) | Self::U64(_) | Self::F32(_) => (None, &[][..]),
            Self::Read(buffer, element) => (Some((*buffer, *element)), &[][..]),
            Self::Write(buffer, element) => (Some((&**buffer, *element)), &[][..]),
            Self::Table(_, words) => (None, words.as_slice()),
        };
        own.into_iter().chain(words.iter().filter_map(Word::buffer))
    }
}

/// Whether a launch of `kernel` with `grid` blocks and these arguments is one that a GPU with these limits can run.
///
/// # Errors
/// [`Error::Launch`] that names the kernel, the parameter, what was expected and what was given.
pub fn check_launch(kernel: &Kernel, grid: [u32; 3], arguments: &[Argument<'_>], limits: &Limits) -> Result<()> {
    check_kernel(kernel, limits)?;
    let refused = |reason| Err(Error::Launch { kernel: kernel.name.clone(), reason });
    for (axis, (&blocks, &limit)) in ["x", "y", "z"].iter().zip(grid.iter().zip(&limits.grid)) {
        if blocks > limit {
            return refused(format!("the grid has {blocks} blocks in {axis}, the GPU allows {limit}"));
        }
    }
    if arguments.len() != kernel.parameters.len() {
        let names: Vec<&str> = kernel.parameters.iter().map(|parameter| parameter.name).collect();
        return refused(format!(
            "it takes {} arguments ({}), {} were given",
            kernel.parameters.len(),
            names.join(", "),
            arguments.len()
        ));
    }
    for (position, (parameter, argument)) in kernel.parameters.iter().zip(arguments).enumerate() {
        let place = format!("argument {} ({})", position + 1, parameter.name);
        if !argument.fits(parameter.kind) {
            return refused(format!("{place} must be {}, but {} was given", parameter.kind, argument.described()));
        }
        if let (ParameterKind::Table(row), Argument::Table(_, words)) = (parameter.kind, argument) {
            if words.is_empty() || words.len() % row.len() != 0 {
                return refused(format!("{place} has {} words, no whole number of rows of {}", words.len(), row.len()));
            }
            for (at, (word, &kind)) in words.iter().zip(row.iter().cycle()).enumerate() {
                if word.kind() != kind {
                    let (row, at) = (at / row.len(), at % row.len());
                    return refused(format!("{place}: word {at} of row {row} must be {kind}, but is {}", word.kind()));
                }
            }
        }
        for (buffer, element) in argument.buffers() {
            if buffer.len() % element.bytes() != 0 {
                return refused(format!("{place} has {} bytes, no whole number of {element} elements", buffer.len()));
            }
        }
    }
    Ok(())
}

/// Whether a GPU with these limits can run the kernel at all.
pub(crate) fn check_kernel(kernel: &Kernel, limits: &Limits) -> Result<()> {
    let refused = |reason| Err(Error::Launch { kernel: kernel.name.clone(), reason });
    let (major, minor) = limits.compute_capability;
    if !kernel.target.runs_on(limits.compute_capability) {
        return refused(format!("it is written for {}, the GPU has compute capability {major}.{minor}", kernel.target));
    }
    for (axis, (&threads, &limit)) in ["x", "y", "z"].iter().zip(kernel.block.iter().zip(&limits.block)) {
        if threads == 0 || threads > limit {
            return refused(format!("its blocks have {threads} threads in {axis}, the GPU allows 1 to {limit}"));
        }
    }
    if kernel.threads_per_block() > u64::from(limits.threads_per_block) {
        return refused(format!(
            "its blocks have {} threads, the GPU allows {}",
            kernel.threads_per_block(),
            limits.threads_per_block
        ));
    }
    if kernel.shared_bytes > limits.shared_bytes {
        return refused(format!(
            "it needs {} bytes of shared memory per block, the GPU has {}",
            kernel.shared_bytes, limits.shared_bytes
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use kernels_ptx::KernelSource;
    use kernels_ptx::kernels::{axpy::Axpy, fill::Fill};

    use super::*;
    use crate::Device;

    const H100: Limits = Limits {
        compute_capability: (9, 0),
        threads_per_block: 1024,
        block: [1024, 1024, 64],
        grid: [i32::MAX as u32, 65_535, 65_535],
        shared_bytes: 232_448,
    };

    fn refusal(kernel: &Kernel, grid: [u32; 3], arguments: &[Argument<'_>], limits: &Limits) -> String {
        check_launch(kernel, grid, arguments, limits).unwrap_err().to_string()
    }

    #[test]
    fn arguments_as_declared_are_accepted() {
        let device = Device::cpu();
        let x = device.allocate(40).unwrap();
        let mut y = device.allocate(40).unwrap();
        let arguments = [
            Argument::Write(&mut y, Element::F32),
            Argument::Read(&x, Element::F32),
            Argument::F32(2.0),
            Argument::U64(10),
        ];
        check_launch(&Axpy.build(), [1, 1, 1], &arguments, &H100).unwrap();
        check_launch(&Axpy.build(), [0, 1, 1], &arguments, &H100).unwrap();
    }

    #[test]
    fn a_wrong_count_is_refused() {
        let message = refusal(&Fill.build(), [1, 1, 1], &[Argument::U32(7)], &H100);
        assert_eq!(message, "kernel fill_u32 was not launched: it takes 3 arguments (y, value, count), 1 were given");
    }

    #[test]
    fn a_wrong_kind_is_refused() {
        let mut y = Device::cpu().allocate(4).unwrap();
        let arguments = [Argument::Write(&mut y, Element::U32), Argument::F32(7.0), Argument::U64(1)];
        let message = refusal(&Fill.build(), [1, 1, 1], &arguments, &H100);
        assert!(message.contains("argument 2 (value) must be a u32 number, but an f32 number was given"), "{message}");
    }

    #[test]
    fn a_wrong_element_or_access_is_refused() {
        let mut y = Device::cpu().allocate(4).unwrap();
        let arguments = [Argument::Write(&mut y, Element::F32), Argument::U32(7), Argument::U64(1)];
        let message = refusal(&Fill.build(), [1, 1, 1], &arguments, &H100);
        assert!(message.contains("must be memory of u32 to write, but memory of f32 to write"), "{message}");
        let arguments = [Argument::Read(&y, Element::U32), Argument::U32(7), Argument::U64(1)];
        let message = refusal(&Fill.build(), [1, 1, 1], &arguments, &H100);
        assert!(message.contains("memory of u32 to write, but memory of u32 to read was given"), "{message}");
    }

    #[test]
    fn a_buffer_of_broken_elements_is_refused() {
        let mut y = Device::cpu().allocate(6).unwrap();
        let arguments = [Argument::Write(&mut y, Element::U32), Argument::U32(7), Argument::U64(1)];
        let message = refusal(&Fill.build(), [1, 1, 1], &arguments, &H100);
        assert!(message.contains("argument 1 (y) has 6 bytes"), "{message}");
    }

    #[test]
    fn grid_block_shared_memory_and_target_have_limits() {
        let mut y = Device::cpu().allocate(4).unwrap();
        let arguments = [Argument::Write(&mut y, Element::U32), Argument::U32(7), Argument::U64(1)];
        let message = refusal(&Fill.build(), [1, 65_536, 1], &arguments, &H100);
        assert!(message.contains("65536 blocks in y, the GPU allows 65535"), "{message}");

        let mut kernel = Fill.build();
        kernel.block = [2048, 1, 1];
        assert!(refusal(&kernel, [1, 1, 1], &arguments, &H100).contains("2048 threads in x"));
        kernel.block = [64, 32, 1];
        assert!(refusal(&kernel, [1, 1, 1], &arguments, &H100).contains("2048 threads, the GPU allows 1024"));
        kernel.block = [0, 1, 1];
        assert!(refusal(&kernel, [1, 1, 1], &arguments, &H100).contains("0 threads in x"));

        let mut kernel = Fill.build();
        kernel.shared_bytes = 300_000;
        assert!(refusal(&kernel, [1, 1, 1], &arguments, &H100).contains("300000 bytes of shared memory"));

        let old = Limits { compute_capability: (7, 5), ..H100 };
        assert!(refusal(&Fill.build(), [1, 1, 1], &arguments, &old).contains("written for sm_80"));
    }
}
