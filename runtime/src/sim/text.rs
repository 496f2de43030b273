//! Running a text on its own, without buffers and kernel descriptions: for tests of single instructions, and for tools.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::block::BUDGET;
use super::decode::decode;
use super::launch::{LIMITS, Launch, Scratch, by_kind};
use super::memory::{Contents, Written};
use super::shadow::Shadow;
use super::spaces::{Allocation, AllocationContents};
use super::{Fault, GlobalMemory};

/// How a text is launched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextLaunch {
    /// The entry's name; without one, the text has only one entry.
    pub entry: Option<String>,
    /// Blocks of the grid in x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block in x, y and z; without them, as many as `.reqntid` says, or one.
    pub block: Option<[u32; 3]>,
    /// Bytes of dynamic shared memory per block.
    pub shared_bytes: u32,
    /// Instructions that a warp may run in one block before it is taken to run without end; without a number, a great many.
    pub budget: Option<u64>,
}

impl Default for TextLaunch {
    fn default() -> Self {
        Self { entry: None, grid: [1; 3], block: None, shared_bytes: 0, budget: None }
    }
}

/// What is passed for a parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TextArgument {
    /// A number, by its bits.
    Number(u64),
    /// Memory that the kernel may only read.
    Read(TextMemory),
    /// Memory that the kernel may read and write; it is changed by the launch.
    Write(TextMemory),
}

/// Global memory: its bytes, and which of them anything has written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextMemory {
    /// The contents.
    pub bytes: Vec<u8>,
    /// Per byte, whether it was written; reading another is a fault.
    pub written: Vec<bool>,
}

impl TextMemory {
    /// Memory that holds these bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { written: vec![true; bytes.len()], bytes }
    }

    /// Memory of so many bytes that nothing has written.
    pub fn unwritten(bytes: usize) -> Self {
        Self { bytes: vec![0xff; bytes], written: vec![false; bytes] }
    }
}

/// Runs a text; `arguments` are named as faults are to call them. Returns how many instructions its warps ran, by their
/// names without qualifiers.
///
/// # Errors
/// The first fault, of the text or of the run. `arguments` then hold what was written up to there.
pub fn run_text(
    text: &str,
    launch: &TextLaunch,
    arguments: &mut [(String, TextArgument)],
) -> Result<BTreeMap<String, u64>, Box<Fault>> {
    let program = decode(text, launch.entry.as_deref())?;
    let refused = |problem: String| {
        Box::new(Fault { kernel: program.name.clone(), line: 0, source: String::new(), place: None, problem })
    };
    if program.parameters.len() != arguments.len() {
        let names: Vec<&str> = program.parameters.iter().map(|parameter| parameter.name.as_str()).collect();
        let problem =
            format!("it takes {} arguments ({}), {} were given", names.len(), names.join(", "), arguments.len());
        return Err(refused(problem));
    }
    let block = launch.block.or(program.required_block).unwrap_or([1; 3]);
    if program.required_block.is_some_and(|required| required != block) {
        return Err(refused(format!(
            "the text requires blocks of {:?} threads, not {block:?}",
            program.required_block
        )));
    }
    let threads: u64 = block.iter().map(|&extent| u64::from(extent)).product();
    if threads == 0 || threads > u64::from(LIMITS.threads_per_block) {
        return Err(refused(format!("a block of {threads} threads: there must be 1 to {}", LIMITS.threads_per_block)));
    }
    if launch.shared_bytes > LIMITS.shared_bytes {
        let limit = LIMITS.shared_bytes;
        return Err(refused(format!("{} bytes of shared memory: there are {limit}", launch.shared_bytes)));
    }
    let memory: Arc<GlobalMemory> = Arc::default();
    let mut values = Vec::new();
    let mut blocks = Vec::new();
    for ((name, argument), parameter) in arguments.iter().zip(&program.parameters) {
        let (held, write) = match argument {
            TextArgument::Number(bits) => {
                values.push(*bits);
                continue;
            }
            TextArgument::Read(held) => (held, false),
            TextArgument::Write(held) => (held, true),
        };
        if parameter.bytes != 8 {
            return Err(refused(format!("{name} is memory, but the parameter has {} bytes, not 8", parameter.bytes)));
        }
        let block = memory.allocate(held.bytes.len()).map_err(|error| refused(error.to_string()))?;
        {
            let mut contents = block.write();
            contents.data.bytes_mut().copy_from_slice(&held.bytes);
            contents.written = Written::these(&held.written);
        }
        values.push(block.address());
        blocks.push((name.clone(), block, write));
    }
    let mut held: Vec<_> = blocks.iter().map(|(name, block, write)| (name, block, *write, block.write())).collect();
    let allocations = held.iter_mut().map(|(name, block, write, contents)| {
        let Contents { data, written } = &mut **contents;
        let contents = if *write {
            AllocationContents::Write(data.bytes_mut(), written)
        } else {
            AllocationContents::Read(data.bytes(), written)
        };
        let bytes = block.bytes() as u64;
        Allocation { name: (*name).clone(), address: block.address(), bytes, contents, shadow: Shadow::default() }
    });
    let allocations = allocations.collect();
    let running = Launch {
        program: &program,
        memory: Some(&memory),
        grid: launch.grid,
        block,
        shared_bytes: launch.shared_bytes,
        values: &values,
        budget: launch.budget.unwrap_or(BUDGET),
    };
    let outcome = running.run(Scratch::take(), allocations);
    drop(held);
    let memories = arguments.iter_mut().filter_map(|(_, argument)| match argument {
        TextArgument::Number(_) => None,
        TextArgument::Read(held) | TextArgument::Write(held) => Some(held),
    });
    for (held, (_, block, _)) in memories.zip(&blocks) {
        let contents = block.read();
        held.bytes.copy_from_slice(contents.data.bytes());
        for (byte, written) in held.written.iter_mut().enumerate() {
            *written = contents.written.has(byte);
        }
    }
    outcome.result?;
    Ok(by_kind(&program, &outcome.counts).into_iter().map(|(kind, count)| (kind.to_owned(), count)).collect())
}
