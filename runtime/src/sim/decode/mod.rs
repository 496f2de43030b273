//! From the structure of the text to a [`Program`].

mod instruction;
mod memory;
mod operands;

pub(super) use operands::SHARED_WINDOW;

use super::Fault;
use super::control_flow::{Flow, Graph, Step};
use super::program::{
    Check, FileSizes, Instruction, NO_SLOT, Op, Place, Program, ProgramParameter, SharedPlace, Space,
};
use super::syntax::{Entry, Operand, SharedArray, Width, entries};
use operands::Operands;

/// Where shared memory begins: 0 is no address of anything.
const SHARED_START: u32 = 1024;
/// Bytes between shared arrays that belong to none, so that running past one is noticed.
const SHARED_GAP: u32 = 1024;

/// The entry of this name in the text, decoded; without a name, the only entry.
///
/// # Errors
/// The line that the simulator does not understand, and why.
pub(super) fn decode(text: &str, name: Option<&str>) -> Result<Program, Box<Fault>> {
    let fault = |kernel: &str, line: usize, problem: String| {
        let source = text.lines().nth(line.wrapping_sub(1)).unwrap_or_default().trim().to_owned();
        Box::new(Fault { kernel: kernel.to_owned(), line, source, place: None, problem })
    };
    let known = name.unwrap_or_default();
    let entries = entries(text).map_err(|(line, problem)| fault(known, line, problem))?;
    let names: Vec<&str> = entries.iter().map(|entry| entry.name).collect();
    let found = match name {
        Some(name) => entries.iter().find(|entry| entry.name == name),
        None => entries.first().filter(|_| entries.len() == 1),
    };
    let Some(entry) = found else {
        let problem = match name {
            Some(_) if names.is_empty() => "the text has no entry".to_owned(),
            Some(_) => format!("the text has no entry of this name, only {}", names.join(", ")),
            None => format!("the text has {} entries ({}): which one is meant?", names.len(), names.join(", ")),
        };
        return Err(fault(known, 0, problem));
    };
    program(entry, text).map_err(|(line, problem)| fault(entry.name, line, problem))
}

fn program(entry: &Entry<'_>, text: &str) -> Result<Program, (usize, String)> {
    let shared = shared_places(&entry.shared);
    let offsets: Vec<u32> = shared.iter().map(|place| place.offset).collect();
    let widths: Vec<Width> = entry.registers.iter().map(|register| register.width).collect();

    // Once to learn which registers each instruction reads and writes, and once more when registers have their slots.
    let unplaced = vec![0; widths.len()];
    let mut steps = Vec::with_capacity(entry.instructions.len() + 1);
    instructions(entry, Operands::new(entry, &unplaced, &offsets, FileSizes::default()), |_, step| steps.push(step))?;
    steps.push(Step { reads: Vec::new(), writes: Vec::new(), guarded: false, flow: Flow::Exit });
    let graph = Graph::new(&steps);
    let tracked = graph.maybe_unwritten(widths.len());
    let (slots, sizes) = graph.slots(&widths, &tracked);
    let meetings = graph.meetings();

    let mut ops = Vec::with_capacity(steps.len());
    let operands = instructions(entry, Operands::new(entry, &slots, &offsets, sizes), |op, _| ops.push(op))?;
    let sizes = operands.sizes;
    if [sizes.predicates, sizes.words, sizes.doubles].iter().any(|&size| size >= usize::from(NO_SLOT)) {
        return Err((entry.line, "the entry has more registers than the simulator has room for".to_owned()));
    }
    let checks = Checks::new(entry, &tracked);
    let (checks, tracked, indices) = checks.of(&steps);
    let mut granules = (16, 16);
    let mut placed = Vec::with_capacity(steps.len());
    for (index, op) in ops.into_iter().enumerate() {
        let guard = entry.instructions[index].guard;
        let op = match (op, steps[index].flow) {
            (Op::Branch { .. }, Flow::Branch(target)) => Op::Branch { target: target as u32, meet: meetings[index] },
            (op, _) => op,
        };
        narrow_granules(&op, &mut granules);
        placed.push(Instruction {
            op,
            guard: guard.map_or(NO_SLOT, |(register, _)| slots[register]),
            negated: guard.is_some_and(|(_, negated)| negated),
            check: indices[index],
        });
    }
    placed.push(Instruction { op: Op::Exit, guard: NO_SLOT, negated: false, check: 0 });
    let mut places: Vec<Place> = entry
        .instructions
        .iter()
        .map(|instruction| Place {
            line: instruction.line as u32,
            kind: instruction.opcode.split('.').next().unwrap_or_default().to_owned(),
        })
        .collect();
    places.push(Place { line: entry.line as u32, kind: "exit".to_owned() });
    Ok(Program {
        name: entry.name.to_owned(),
        instructions: placed,
        places,
        text: text.to_owned(),
        parameters: entry
            .parameters
            .iter()
            .map(|parameter| ProgramParameter { name: parameter.name.to_owned(), bytes: parameter.bytes })
            .collect(),
        required_block: entry.required_block,
        shared,
        files: sizes,
        presets: operands.presets,
        checks,
        tracked,
        global_granule: granules.0,
        shared_granule: granules.1,
        wide: operands.wide,
    })
}

/// Decodes every instruction; `each` gets the operation and its step.
fn instructions<'e, 'a>(
    entry: &'e Entry<'a>,
    mut operands: Operands<'e, 'a>,
    mut each: impl FnMut(Op, Step),
) -> Result<Operands<'e, 'a>, (usize, String)> {
    for instruction in &entry.instructions {
        operands.reads.clear();
        operands.writes.clear();
        if let Some((register, _)) = instruction.guard {
            operands.reads.push(register);
        }
        let op = instruction::decode(instruction, &mut operands).map_err(|problem| (instruction.line, problem))?;
        let flow = match (&op, instruction.operands.first()) {
            (Op::Branch { .. }, Some(Operand::Label(label))) => Flow::Branch(entry.labels[*label]),
            (Op::Exit | Op::Trap, _) => Flow::Exit,
            _ => Flow::Next,
        };
        let step = Step {
            reads: operands.reads.clone(),
            writes: operands.writes.clone(),
            guarded: instruction.guard.is_some(),
            flow,
        };
        each(op, step);
    }
    Ok(operands)
}

/// Places for shared arrays. Dynamic arrays all begin behind the others.
fn shared_places(arrays: &[SharedArray<'_>]) -> Vec<SharedPlace> {
    let mut end = SHARED_START;
    let mut places: Vec<SharedPlace> = Vec::with_capacity(arrays.len());
    for array in arrays {
        let mut offset = 0;
        if let Some(bytes) = array.bytes {
            offset = end.next_multiple_of(array.alignment);
            end = offset.saturating_add(bytes).saturating_add(SHARED_GAP).next_multiple_of(16);
        }
        places.push(SharedPlace { name: array.name.to_owned(), offset, bytes: array.bytes });
    }
    let alignment = arrays.iter().filter(|array| array.bytes.is_none()).map(|array| array.alignment).max();
    let dynamic = end.next_multiple_of(alignment.unwrap_or(16).max(16));
    for place in places.iter_mut().filter(|place| place.bytes.is_none()) {
        place.offset = dynamic;
    }
    places
}

/// Registers whose being written is watched.
struct Checks {
    /// The index of each watched register.
    watched: Vec<Option<u16>>,
    names: Vec<String>,
}

impl Checks {
    fn new(entry: &Entry<'_>, tracked: &[bool]) -> Self {
        let mut names = Vec::new();
        let watched = tracked.iter().zip(&entry.registers).map(|(&tracked, register)| {
            tracked.then(|| {
                names.push(register.name.to_string());
                names.len() as u16 - 1
            })
        });
        Self { watched: watched.collect(), names }
    }

    /// The checks, the watched registers' names, and per instruction the index of its check plus one.
    fn of(self, steps: &[Step]) -> (Vec<Check>, Vec<String>, Vec<u32>) {
        let mut checks = Vec::new();
        let watched = |registers: &[usize]| registers.iter().filter_map(|&register| self.watched[register]).collect();
        let indices = steps.iter().map(|step| {
            let (guard, reads) = step.reads.split_at(usize::from(step.guarded));
            let guard = guard.first().and_then(|&register| self.watched[register]);
            let check = Check { guard, reads: watched(reads), writes: watched(&step.writes) };
            if check.guard.is_none() && check.reads.is_empty() && check.writes.is_empty() {
                return 0;
            }
            checks.push(check);
            checks.len() as u32
        });
        let indices = indices.collect();
        (checks, self.names, indices)
    }
}

/// Accesses are watched in pieces as small as the smallest access.
fn narrow_granules(op: &Op, (global, shared): &mut (u32, u32)) {
    let mut access = |space: Space, bytes: u32| {
        if space != Space::Shared {
            *global = (*global).min(bytes);
        }
        if space != Space::Global {
            *shared = (*shared).min(bytes);
        }
    };
    match *op {
        Op::Load { space, element, count, .. } | Op::Store { space, element, count, .. } => {
            access(space, (element.bytes() * u32::from(count)).min(16));
        }
        Op::Atomic { space, wide, .. } => access(space, if wide { 8 } else { 4 }),
        Op::CopyAsync { bytes, .. } => {
            access(Space::Shared, u32::from(bytes));
            access(Space::Global, 4);
        }
        Op::LoadMatrix { .. } | Op::StoreMatrix { .. } => access(Space::Shared, 16),
        _ => {}
    }
}
