//! Kernels on the simulated device.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLockReadGuard, RwLockWriteGuard};

use kernels_ptx::{Kernel, ParameterKind};

use super::block::{BUDGET, Running};
use super::decode::decode;
use super::memory::Contents;
use super::program::Program;
use super::shadow::{Clock, Shadow};
use super::spaces::{Allocation, AllocationContents, Global, Memory, Shared};
use super::{Block, Fault, GlobalMemory};
use crate::launch::{check_kernel, check_launch};
use crate::{Argument, Buffer, Device, Error, Limits, Result, Word};

/// What the simulated device can launch: as much as a GPU of compute capability 8.0.
pub(crate) const LIMITS: Limits = Limits {
    compute_capability: (8, 0),
    threads_per_block: 1024,
    block: [1024, 1024, 64],
    grid: [i32::MAX as u32, 65_535, 65_535],
    shared_bytes: 163 << 10,
};

/// A kernel that is loaded in the simulator. Clones are the same function.
#[derive(Clone)]
pub(crate) struct Function {
    kernel: Arc<Kernel>,
    program: Arc<Program>,
    memory: Arc<GlobalMemory>,
}

impl Function {
    /// The kernel in the simulator: its text is decoded the first time, and remembered after that.
    ///
    /// # Errors
    /// [`Error::Launch`] for a kernel that no such device runs, [`Error::Simulator`] for a text that the simulator does not
    /// understand, or that is not what the kernel's description says.
    pub(crate) fn load(memory: &Arc<GlobalMemory>, kernel: &Kernel) -> Result<Self> {
        check_kernel(kernel, &LIMITS)?;
        let program = program(kernel)?;
        check_description(kernel, &program)?;
        Ok(Self { kernel: Arc::new(kernel.clone()), program, memory: Arc::clone(memory) })
    }

    /// What the function was loaded from.
    pub(crate) fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    /// The memory of a buffer for the parameter of this name.
    fn block<'b>(&self, parameter: &str, buffer: &'b Buffer) -> Result<&'b Block> {
        buffer.sim_block().ok_or_else(|| Error::Launch {
            kernel: self.kernel.name.clone(),
            reason: format!("the buffer for {parameter} lives on {}, the kernel runs on sim", buffer.device()),
        })
    }

    /// Runs the function.
    ///
    /// # Errors
    /// [`Error::Launch`] when arguments or grid do not fit the kernel's description, [`Error::Simulator`] with the first
    /// fault that the run found. The buffers then hold what was written up to there.
    pub(crate) fn launch(&self, grid: [u32; 3], arguments: &[Argument<'_>]) -> Result<()> {
        check_launch(&self.kernel, grid, arguments, &LIMITS)?;
        let mut values = Vec::with_capacity(arguments.len());
        // Copies of tables, which are held like the buffers of the arguments.
        let mut tables = Vec::new();
        for (parameter, argument) in self.kernel.parameters.iter().zip(arguments) {
            let address = |buffer: &Buffer| Ok(self.block(parameter.name, buffer)?.address());
            values.push(match argument {
                Argument::U32(value) => u64::from(*value),
                Argument::U64(value) => *value,
                Argument::F32(value) => u64::from(value.to_bits()),
                Argument::Read(buffer, _) => address(buffer)?,
                Argument::Write(buffer, _) => address(buffer)?,
                Argument::Table(table, words) => {
                    let words = words.iter().map(|word| match word {
                        Word::U64(value) => Ok(*value),
                        Word::Read(buffer, _) => address(buffer),
                        Word::Write(buffer, _) => address(buffer),
                    });
                    let device = Device::sim();
                    let copy = table.on(&device, words.collect::<Result<_>>()?, |bytes| device.upload(bytes))?;
                    let place = address(&copy)?;
                    tables.push((parameter.name, copy));
                    place
                }
            });
        }
        let mut held = Holding::default();
        for (parameter, argument) in self.kernel.parameters.iter().zip(arguments) {
            let name = parameter.name;
            match argument {
                Argument::U32(_) | Argument::U64(_) | Argument::F32(_) => {}
                Argument::Read(buffer, _) => held.hold(|| name.to_owned(), self.block(name, buffer)?, false),
                Argument::Write(buffer, _) => held.hold(|| name.to_owned(), self.block(name, buffer)?, true),
                Argument::Table(_, words) => {
                    for (at, word) in words.iter().enumerate() {
                        let write = matches!(word, Word::Write(..));
                        if let Some((buffer, _)) = word.buffer() {
                            held.hold(|| format!("word {at} of {name}"), self.block(name, buffer)?, write);
                        }
                    }
                }
            }
        }
        for (name, copy) in &tables {
            held.hold(|| (*name).to_owned(), self.block(name, copy)?, false);
        }
        let mut held = held.all;
        if grid.contains(&0) {
            return Ok(());
        }
        let mut scratch = Scratch::take();
        let allocations = held.iter_mut().map(|held| held.allocation(&mut scratch)).collect();
        let launch = Launch {
            program: &self.program,
            memory: Some(&self.memory),
            grid,
            block: self.kernel.block,
            shared_bytes: self.kernel.shared_bytes,
            values: &values,
            budget: BUDGET,
        };
        let outcome = launch.run(scratch, allocations);
        for held in &mut held {
            if let Guard::Write(contents) = &mut held.guard {
                contents.written.settle();
            }
        }
        note(&self.kernel.name, &self.program, &outcome.counts);
        outcome.result.map_err(Error::Simulator)
    }
}

/// The buffers that a launch uses.
#[derive(Default)]
struct Holding<'a> {
    all: Vec<Held<'a>>,
    /// Addresses of those in `all`.
    addresses: HashSet<u64>,
}

impl<'a> Holding<'a> {
    /// Holds a buffer under a name.
    fn hold(&mut self, name: impl FnOnce() -> String, block: &'a Block, write: bool) {
        // A buffer that is only read may be given more than once.
        if self.addresses.insert(block.address()) || write {
            let guard = if write { Guard::Write(block.write()) } else { Guard::Read(block.read()) };
            self.all.push(Held { name: name(), block, guard });
        }
    }
}

/// A buffer that a launch uses.
struct Held<'a> {
    name: String,
    block: &'a Block,
    guard: Guard<'a>,
}

enum Guard<'a> {
    Read(RwLockReadGuard<'a, Contents>),
    Write(RwLockWriteGuard<'a, Contents>),
}

impl Held<'_> {
    fn allocation(&mut self, scratch: &mut Scratch) -> Allocation<'_> {
        let (contents, shadow) = match &mut self.guard {
            Guard::Read(contents) => {
                (AllocationContents::Read(contents.data.bytes(), &contents.written), Shadow::default())
            }
            Guard::Write(contents) => {
                let Contents { data, written } = &mut **contents;
                (AllocationContents::Write(data.bytes_mut(), written), scratch.shadows.pop().unwrap_or_default())
            }
        };
        Allocation {
            name: self.name.clone(),
            address: self.block.address(),
            bytes: self.block.bytes() as u64,
            contents,
            shadow,
        }
    }
}

/// A launch whose memory is at hand.
pub(super) struct Launch<'x> {
    pub program: &'x Program,
    /// Knows the allocations that the launch was not given.
    pub memory: Option<&'x GlobalMemory>,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub shared_bytes: u32,
    pub values: &'x [u64],
    pub budget: u64,
}

/// What came of a launch.
pub(super) struct Outcome {
    pub result: std::result::Result<(), Box<Fault>>,
    /// How often each instruction ran.
    pub counts: Vec<u64>,
}

impl Launch<'_> {
    pub fn run(&self, scratch: Scratch, allocations: Vec<Allocation<'_>>) -> Outcome {
        let Scratch { mut clock, mut shared, mut shadows } = scratch;
        let mut allocations = allocations;
        let again = clock.begin_launch();
        if again {
            shadows.iter_mut().for_each(Shadow::clear);
            allocations.iter_mut().for_each(|allocation| allocation.shadow.clear());
        }
        shared.prepare(self.program, self.shared_bytes, again);
        let memory = Memory { global: Global::new(self.program, self.memory, allocations), shared, clock };
        let mut running = Running::new(self.program, memory, self.block, self.values, self.budget);
        let result = running.grid(self.grid, self.block);
        let Running { memory, counts, .. } = running;
        shadows.extend(memory.global.into_allocations().into_iter().map(|allocation| allocation.shadow));
        if result.is_ok() {
            // After a fault, copies under way would look as if they were of the next launch.
            Scratch { clock: memory.clock, shared: memory.shared, shadows }.put_back();
        }
        Outcome { result, counts }
    }
}

/// Records of accesses, which launches hand on to each other: nothing needs to be cleared between them.
#[derive(Default)]
pub(super) struct Scratch {
    clock: Clock,
    shared: Shared,
    shadows: Vec<Shadow>,
}

impl Scratch {
    /// One that no launch uses.
    pub fn take() -> Self {
        lock(&SCRATCH).pop().unwrap_or_default()
    }

    fn put_back(mut self) {
        // Those of allocations that are only read are empty.
        self.shadows.retain(|shadow| !shadow.is_empty());
        lock(&SCRATCH).push(self);
    }
}

static SCRATCH: Mutex<Vec<Scratch>> = Mutex::new(Vec::new());

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The kernel's program, decoded once per text.
fn program(kernel: &Kernel) -> Result<Arc<Program>> {
    static PROGRAMS: OnceLock<Mutex<HashMap<String, Vec<Arc<Program>>>>> = OnceLock::new();
    let programs = PROGRAMS.get_or_init(Mutex::default);
    let known = |programs: &HashMap<String, Vec<Arc<Program>>>| {
        programs
            .get(&kernel.text)
            .and_then(|programs| programs.iter().find(|program| program.name == kernel.name))
            .cloned()
    };
    if let Some(program) = known(&lock(programs)) {
        return Ok(program);
    }
    let program = Arc::new(decode(&kernel.text, Some(&kernel.name)).map_err(Error::Simulator)?);
    lock(programs).entry(kernel.text.clone()).or_default().push(Arc::clone(&program));
    Ok(program)
}

/// Whether the text is of the kernel that the description describes.
fn check_description(kernel: &Kernel, program: &Program) -> Result<()> {
    let differs = |problem: String| {
        Err(Error::Simulator(Box::new(Fault {
            kernel: kernel.name.clone(),
            line: 0,
            source: String::new(),
            place: None,
            problem: format!("the text is not what the kernel's description says: {problem}"),
        })))
    };
    if let Some(required) = program.required_block
        && required != kernel.block
    {
        return differs(format!("it requires blocks of {required:?} threads, the description says {:?}", kernel.block));
    }
    if program.parameters.len() != kernel.parameters.len() {
        return differs(format!("it has {} parameters, not {}", program.parameters.len(), kernel.parameters.len()));
    }
    for (own, described) in program.parameters.iter().zip(&kernel.parameters) {
        let bytes = match described.kind {
            ParameterKind::U32 | ParameterKind::F32 => 4,
            ParameterKind::U64 | ParameterKind::Read(_) | ParameterKind::Write(_) | ParameterKind::Table(_) => 8,
        };
        if own.bytes != bytes {
            return differs(format!("its parameter {} has {} bytes, not {bytes}", own.name, own.bytes));
        }
    }
    Ok(())
}

/// What a kernel's launches on the simulator ran so far in this process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// How often the kernel was launched.
    pub launches: u64,
    /// Instructions that its warps ran, by their names without qualifiers.
    pub instructions: BTreeMap<String, u64>,
}

static STATISTICS: Mutex<BTreeMap<String, Statistics>> = Mutex::new(BTreeMap::new());

fn note(kernel: &str, program: &Program, counts: &[u64]) {
    let mut all = lock(&STATISTICS);
    if !all.contains_key(kernel) {
        all.insert(kernel.to_owned(), Statistics::default());
    }
    let Some(own) = all.get_mut(kernel) else { return };
    own.launches += 1;
    for (kind, count) in by_kind(program, counts) {
        match own.instructions.get_mut(kind) {
            Some(total) => *total += count,
            None => drop(own.instructions.insert(kind.to_owned(), count)),
        }
    }
}

/// How often instructions of each name ran.
pub(super) fn by_kind<'p>(program: &'p Program, counts: &[u64]) -> BTreeMap<&'p str, u64> {
    let mut kinds = BTreeMap::new();
    for (place, &count) in program.places.iter().zip(counts).filter(|&(_, &count)| count > 0) {
        *kinds.entry(place.kind.as_str()).or_default() += count;
    }
    kinds
}

/// What every kernel's launches on the simulator ran so far in this process, by the kernel's name.
pub fn statistics() -> BTreeMap<String, Statistics> {
    lock(&STATISTICS).clone()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_of_the_catalogue_is_understood() {
        // Some ask for more shared memory than the simulated device has.
        for mut kernel in kernels_ptx::catalogue() {
            check_description(&kernel, &program(&kernel).unwrap()).unwrap();
            kernel.text = kernel.overlapping_text().unwrap();
            check_description(&kernel, &program(&kernel).unwrap()).unwrap();
        }
    }
}
