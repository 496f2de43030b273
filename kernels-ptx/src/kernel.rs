//! What describes a kernel.

use std::fmt::{self, Write as _};
use std::sync::Arc;

/// A kernel: its text and everything that a launch must know of it.
#[derive(Clone)]
pub struct Kernel {
    /// Name of the entry point in [`Kernel::text`].
    pub name: String,
    /// The complete PTX module.
    pub text: String,
    /// Declared parameters in order. A launch is checked against them.
    pub parameters: Vec<Parameter>,
    /// Threads per block in x, y and z. The text requires exactly these.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory per block.
    pub shared_bytes: u32,
    /// The device that the text is written for.
    pub target: Target,
    /// What the sizes given to [`Kernel::work`] mean, in order.
    pub sizes: &'static [&'static str],
    work: WorkOfSizes,
}

/// What a block takes of a multiprocessor.
#[derive(Clone, Copy)]
pub(crate) struct Bounds {
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared_bytes: u32,
    /// Blocks that must fit a multiprocessor by their registers; 0 where the compiler decides.
    pub resident_blocks: u32,
}

/// From a problem's sizes to the roofline's numbers.
type WorkOfSizes = Arc<dyn Fn(&[u64]) -> Work + Send + Sync>;

/// A kernel's compile-time choices: a plain struct, from which its text is written.
pub trait KernelSource: Clone + Eq + std::hash::Hash + Send + Sync + 'static {
    /// The kernel's description and text. Its name tells the choices apart.
    fn build(&self) -> Kernel;

    /// The choices that models use: those that are assembled, listed and compared.
    fn configurations() -> Vec<Self>;
}

/// One declared parameter of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Name in the text.
    pub name: &'static str,
    /// What must be passed.
    pub kind: ParameterKind,
}

/// What a kernel's parameter takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParameterKind {
    /// A 32-bit unsigned number, or a pattern of 32 bits.
    U32,
    /// A 64-bit unsigned number.
    U64,
    /// A 32-bit floating-point number.
    F32,
    /// Global memory with elements of one type that the kernel only reads.
    Read(Element),
    /// Global memory with elements of one type that the kernel writes; it may read it too.
    Write(Element),
    /// Rows of 64-bit words in global memory, which the kernel only reads. A row has a word for each of these kinds: a
    /// number ([`ParameterKind::U64`]), or the address of further memory ([`ParameterKind::Read`],
    /// [`ParameterKind::Write`]).
    Table(&'static [ParameterKind]),
}

/// The type of the elements in global memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// 32-bit floating point.
    F32,
    /// bfloat16.
    Bf16,
    /// 32-bit unsigned integer.
    U32,
}

/// The device that a kernel's text is written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Compute capability 8.0 and everything newer.
    Sm80,
    /// Compute capability 9.0 only, with its own instructions (`wgmma`, bulk tensor copies).
    Sm90a,
}

/// What a problem of one size asks of an ideal device: the two numbers of the roofline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Bytes moved to and from global memory when nothing is moved twice.
    pub bytes: u64,
    /// Arithmetic operations; a fused multiply-add counts as two.
    pub operations: u64,
}

impl Kernel {
    /// A kernel of one entry point whose header is written from `parameters`, `block` and `target`; `body` is what
    /// stands between the braces. `summary` becomes the comment at the top. `work` maps the problem's sizes, named by
    /// `sizes`, to the roofline's numbers.
    pub(crate) fn new(
        name: &str,
        summary: &str,
        parameters: Vec<Parameter>,
        bounds: Bounds,
        target: Target,
        body: &str,
        sizes: &'static [&'static str],
        work: impl Fn(&[u64]) -> Work + Send + Sync + 'static,
    ) -> Self {
        let text = text(name, summary, &parameters, bounds, target, body);
        let Bounds { block, shared_bytes, .. } = bounds;
        let work = Arc::new(work);
        Self { name: name.to_owned(), text, parameters, block, shared_bytes, target, sizes, work }
    }

    /// Bytes and operations for a problem of these sizes; `None` when there are not as many as [`Kernel::sizes`] names.
    pub fn work(&self, sizes: &[u64]) -> Option<Work> {
        (sizes.len() == self.sizes.len()).then(|| (self.work)(sizes))
    }

    /// The text for devices of compute capability 9.0 and newer on which the launch may begin while the one before it on the
    /// stream still runs (programmatic dependent launch). Every block first allows the launch that follows to begin, which it
    /// does when all blocks have, and then waits until the launch before has ended and what it wrote can be seen. So launches
    /// do what they do one after the other, but the blocks of the next are in place when the last of this one are through.
    ///
    /// Memory that a kernel only reads may still be written while its blocks wait: it is constant from the wait's end on, and
    /// nothing, not even by `ld.global.nc`, is read before.
    ///
    /// `None` for a text that was written for one such device alone or is not of the usual form: one entry and no other function.
    ///
    /// Source: PTX ISA 7.8, `griddepcontrol`.
    pub fn overlapping_text(&self) -> Option<String> {
        const WAIT: &str = "    griddepcontrol.launch_dependents;\n    griddepcontrol.wait;\n";
        let header = |version: &str, target: &str| format!("\n.version {version}\n.target {target}\n");
        let (before, after) = self.text.split_once(&header(Target::Sm80.version(), Target::Sm80.name()))?;
        let (declaration, body) = after.split_once("\n{\n")?;
        let entries = self.text.matches(".entry").count();
        if entries != 1 || !declaration.contains(&format!(".entry {}(", self.name)) || self.text.contains(".func") {
            return None;
        }
        Some(format!("{before}{}{declaration}\n{{\n{WAIT}{body}", header("7.8", "sm_90")))
    }

    /// Threads per block.
    pub fn threads_per_block(&self) -> u64 {
        self.block.iter().map(|&extent| u64::from(extent)).product()
    }
}

impl Element {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 | Self::U32 => 4,
            Self::Bf16 => 2,
        }
    }
}

impl Target {
    /// The name that PTX and its assembler know the target by.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sm80 => "sm_80",
            Self::Sm90a => "sm_90a",
        }
    }

    /// The oldest PTX version that knows the target and what kernels for it use: the text loads in drivers of that age.
    fn version(self) -> &'static str {
        match self {
            Self::Sm80 => "7.4",
            Self::Sm90a => "8.0",
        }
    }

    /// Whether a device of this compute capability runs the text.
    pub fn runs_on(self, (major, minor): (u32, u32)) -> bool {
        match self {
            Self::Sm80 => major >= 8,
            Self::Sm90a => (major, minor) == (9, 0),
        }
    }
}

impl ParameterKind {
    /// How the parameter is declared in the text.
    fn declaration(self) -> String {
        match self {
            Self::U32 => ".param .u32".to_owned(),
            Self::U64 => ".param .u64".to_owned(),
            Self::F32 => ".param .f32".to_owned(),
            Self::Read(element) | Self::Write(element) => {
                format!(".param .u64 .ptr .global .align {}", element.bytes())
            }
            Self::Table(_) => ".param .u64 .ptr .global .align 8".to_owned(),
        }
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Kernel({} for {})", self.name, self.target)
    }
}

impl fmt::Display for Element {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::U32 => "u32",
        })
    }
}

impl fmt::Display for ParameterKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::U32 => formatter.write_str("a u32 number"),
            Self::U64 => formatter.write_str("a u64 number"),
            Self::F32 => formatter.write_str("an f32 number"),
            Self::Read(element) => write!(formatter, "memory of {element} to read"),
            Self::Write(element) => write!(formatter, "memory of {element} to write"),
            Self::Table(row) => write!(formatter, "a table of rows of {} words", row.len()),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// The module's text: the header from the description, then the body.
fn text(name: &str, summary: &str, parameters: &[Parameter], bounds: Bounds, target: Target, body: &str) -> String {
    let mut text = String::new();
    for line in summary.lines() {
        let _ = writeln!(text, "// {line}");
    }
    let declarations: Vec<String> =
        parameters.iter().map(|parameter| format!("    {} {}", parameter.kind.declaration(), parameter.name)).collect();
    let [x, y, z] = bounds.block;
    let resident = match bounds.resident_blocks {
        0 => String::new(),
        blocks => format!(".minnctapersm {blocks}\n"),
    };
    let shared = match bounds.shared_bytes {
        0 => String::new(),
        bytes => format!("// {bytes} bytes\n.extern .shared .align 128 .b8 shared_memory[];\n\n"),
    };
    let _ = write!(
        text,
        "\n.version {}\n.target {}\n.address_size 64\n\n{shared}.visible .entry {name}(\n{}\n)\n.reqntid {x}, {y}, {z}\n{resident}{{\n{}\n}}\n",
        target.version(),
        target.name(),
        declarations.join(",\n"),
        body.trim_matches('\n'),
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_declares_its_entry_and_its_parameters_once() {
        for kernel in crate::catalogue() {
            assert_eq!(kernel.text.matches(&format!(".entry {}(", kernel.name)).count(), 1, "{}", kernel.text);
            assert_eq!(kernel.text.matches(".param .").count(), kernel.parameters.len(), "{}", kernel.text);
            for parameter in &kernel.parameters {
                assert_eq!(kernel.text.matches(&format!("[{}]", parameter.name)).count(), 1, "{}", kernel.text);
            }
        }
    }

    #[test]
    fn names_in_the_catalogue_are_unique() {
        let mut names: Vec<String> = crate::catalogue().into_iter().map(|kernel| kernel.name).collect();
        names.sort();
        let all = names.len();
        names.dedup();
        assert_eq!(names.len(), all);
    }

    #[test]
    fn every_overlapping_text_waits_before_anything_else() {
        for kernel in crate::catalogue() {
            let text = kernel.overlapping_text().unwrap();
            assert!(text.contains("\n.version 7.8\n.target sm_90\n") && !text.contains("sm_80"), "{text}");
            let body = text.split_once("\n{\n").unwrap().1;
            let beginning: Vec<&str> = body.lines().take(2).map(str::trim).collect();
            assert_eq!(beginning, ["griddepcontrol.launch_dependents;", "griddepcontrol.wait;"], "{text}");
            assert!(kernel.text.ends_with(body.split_once("wait;\n").unwrap().1), "{text}");
        }
    }

    #[test]
    fn work_wants_the_named_sizes() {
        let kernel = crate::KernelSource::build(&crate::kernels::axpy::Axpy);
        assert_eq!(kernel.work(&[10]), Some(Work { bytes: 120, operations: 20 }));
        assert_eq!(kernel.work(&[]), None);
        assert_eq!(kernel.work(&[1, 2]), None);
    }

    #[test]
    fn a_target_runs_where_its_instructions_exist() {
        assert!(Target::Sm80.runs_on((8, 0)) && Target::Sm80.runs_on((9, 0)) && Target::Sm80.runs_on((12, 0)));
        assert!(!Target::Sm80.runs_on((7, 5)));
        assert!(Target::Sm90a.runs_on((9, 0)) && !Target::Sm90a.runs_on((10, 0)) && !Target::Sm90a.runs_on((8, 9)));
    }
}
