//! Operands made into slots of the register file.

use std::collections::HashMap;

use super::super::lexer::Number;
use super::super::program::{Address, FileSizes, NO_SLOT, Preset, Slot, Special};
use super::super::syntax::{Entry, Operand, Width};

/// Where in the 64-bit address space shared memory is seen by generic addresses.
pub(in super::super) const SHARED_WINDOW: u64 = 0x4000_0000_0000_0000;

/// Hands out slots, and notes which registers an instruction reads and writes.
pub(super) struct Operands<'e, 'a> {
    entry: &'e Entry<'a>,
    /// The slot of each register.
    registers: &'e [Slot],
    /// Places of the entry's shared arrays.
    shared: &'e [u32],
    pub sizes: FileSizes,
    pub presets: Vec<Preset>,
    words: HashMap<u32, Slot>,
    doubles: HashMap<u64, Slot>,
    predicates: HashMap<u32, Slot>,
    parameters: HashMap<(usize, bool), Slot>,
    specials: HashMap<Special, Slot>,
    /// What results that are not wanted are written to.
    unwanted: [Option<Slot>; 3],
    /// Registers that the instruction at hand reads and writes.
    pub reads: Vec<usize>,
    pub writes: Vec<usize>,
    pub wide: Vec<[Slot; 16]>,
}

/// A result or fault that names what is wrong with an instruction.
pub(super) type Decoded<T> = Result<T, String>;

impl<'e, 'a> Operands<'e, 'a> {
    /// `sizes`: the slots that registers have.
    pub fn new(entry: &'e Entry<'a>, registers: &'e [Slot], shared: &'e [u32], sizes: FileSizes) -> Self {
        Self {
            entry,
            registers,
            shared,
            sizes,
            presets: Vec::new(),
            words: HashMap::new(),
            doubles: HashMap::new(),
            predicates: HashMap::new(),
            parameters: HashMap::new(),
            specials: HashMap::new(),
            unwanted: [None; 3],
            reads: Vec::new(),
            writes: Vec::new(),
            wide: Vec::new(),
        }
    }

    pub fn entry(&self) -> &'e Entry<'a> {
        self.entry
    }

    /// The operand as one for messages.
    fn name(&self, operand: &Operand<'a>) -> String {
        match operand {
            Operand::Register(register) | Operand::Not(register) => self.entry.registers[*register].name.to_string(),
            Operand::Pair(first, second) => {
                format!("{}|{}", self.entry.registers[*first].name, self.entry.registers[*second].name)
            }
            Operand::Special(name) => (*name).to_owned(),
            Operand::Parameter(parameter) => format!("the parameter {}", self.entry.parameters[*parameter].name),
            Operand::Shared(array) => format!("the shared array {}", self.entry.shared[*array].name),
            Operand::Number(_) => "a number".to_owned(),
            Operand::Label(_) => "a label".to_owned(),
            Operand::Sink => "_".to_owned(),
            Operand::Vector(_) => "a vector".to_owned(),
            Operand::Memory(..) => "an address".to_owned(),
        }
    }

    fn wants<T>(&self, operand: &Operand<'a>, what: &str) -> Decoded<T> {
        let width = match operand {
            Operand::Register(register) => match self.entry.registers[*register].width {
                Width::Predicate => " (a predicate)",
                Width::B8 => " (8 bits)",
                Width::B16 => " (16 bits)",
                Width::B32 => " (32 bits)",
                Width::B64 => " (64 bits)",
            },
            _ => "",
        };
        Err(format!("{}{width} stands where {what} is wanted", self.name(operand)))
    }

    fn read(&mut self, register: usize) -> Slot {
        self.reads.push(register);
        self.registers[register]
    }

    fn write(&mut self, register: usize) -> Slot {
        self.writes.push(register);
        self.registers[register]
    }

    /// A slot that holds a constant.
    pub fn constant(&mut self, value: u32) -> Slot {
        let sizes = &mut self.sizes;
        let presets = &mut self.presets;
        *self.words.entry(value).or_insert_with(|| {
            let slot = take(&mut sizes.words);
            presets.push(Preset::Word(slot, value));
            slot
        })
    }

    /// A 64-bit slot that holds a constant.
    pub fn constant64(&mut self, value: u64) -> Slot {
        let sizes = &mut self.sizes;
        let presets = &mut self.presets;
        *self.doubles.entry(value).or_insert_with(|| {
            let slot = take(&mut sizes.doubles);
            presets.push(Preset::Double(slot, value));
            slot
        })
    }

    fn constant_predicate(&mut self, value: bool) -> Slot {
        let lanes = if value { u32::MAX } else { 0 };
        let sizes = &mut self.sizes;
        let presets = &mut self.presets;
        *self.predicates.entry(lanes).or_insert_with(|| {
            let slot = take(&mut sizes.predicates);
            presets.push(Preset::Predicate(slot, lanes));
            slot
        })
    }

    /// A slot that holds a parameter's first four bytes, or all eight.
    pub fn parameter(&mut self, parameter: usize, double: bool) -> Slot {
        let sizes = &mut self.sizes;
        let presets = &mut self.presets;
        *self.parameters.entry((parameter, double)).or_insert_with(|| {
            if double {
                let slot = take(&mut sizes.doubles);
                presets.push(Preset::ParameterDouble(slot, parameter as u16));
                slot
            } else {
                let slot = take(&mut sizes.words);
                presets.push(Preset::ParameterWord(slot, parameter as u16));
                slot
            }
        })
    }

    /// A special register of 32 bits.
    pub fn special(&mut self, name: &str) -> Decoded<Slot> {
        let axis = match name.as_bytes().last() {
            Some(b'x') => 0,
            Some(b'y') => 1,
            _ => 2,
        };
        let special = match name.split('.').next().unwrap_or_default() {
            "%tid" => Special::Thread(axis),
            "%ntid" => Special::BlockExtent(axis),
            "%ctaid" => Special::Block(axis),
            "%nctaid" => Special::GridExtent(axis),
            "%laneid" => Special::Lane,
            "%warpid" => Special::Warp,
            "%nwarpid" => Special::WarpCount,
            "%lanemask_eq" => Special::LaneMaskEqual,
            "%lanemask_lt" => Special::LaneMaskLess,
            "%lanemask_le" => Special::LaneMaskLessEqual,
            "%lanemask_gt" => Special::LaneMaskGreater,
            "%lanemask_ge" => Special::LaneMaskGreaterEqual,
            "%smid" => Special::Processor,
            "%nsmid" => Special::ProcessorCount,
            _ => return Err(format!("{name} cannot be read as a number of 32 bits")),
        };
        let sizes = &mut self.sizes;
        let presets = &mut self.presets;
        Ok(*self.specials.entry(special).or_insert_with(|| {
            let slot = take(&mut sizes.words);
            presets.push(Preset::Special(slot, special));
            slot
        }))
    }

    /// A source of 32 bits.
    pub fn word(&mut self, operand: &Operand<'a>) -> Decoded<Slot> {
        match operand {
            Operand::Register(register) if self.entry.registers[*register].width == Width::B32 => {
                Ok(self.read(*register))
            }
            Operand::Number(Number::Integer(value)) => {
                // Positive or negative, the number must be one of 32 bits.
                if *value <= u64::from(u32::MAX) || (*value as i64) >= i64::from(i32::MIN) && (*value as i64) < 0 {
                    Ok(self.constant(*value as u32))
                } else {
                    Err(format!("{value} has more than 32 bits"))
                }
            }
            Operand::Number(Number::F32(bits)) => Ok(self.constant(*bits)),
            Operand::Special(name) => Err(format!("{name} can only be read by mov")),
            Operand::Shared(array) => Ok(self.constant(self.shared[*array])),
            _ => self.wants(operand, "a register of 32 bits or a number"),
        }
    }

    /// A source that is an f32.
    pub fn float(&mut self, operand: &Operand<'a>) -> Decoded<Slot> {
        match operand {
            Operand::Number(Number::F64(value)) => Ok(self.constant((*value as f32).to_bits())),
            Operand::Number(Number::Integer(_)) => {
                Err("numbers of type f32 are written as 0f and eight hexadecimal digits".to_owned())
            }
            _ => self.word(operand),
        }
    }

    /// A source of 16 bits.
    pub fn half(&mut self, operand: &Operand<'a>) -> Decoded<Slot> {
        match operand {
            Operand::Register(register) if self.entry.registers[*register].width == Width::B16 => {
                Ok(self.read(*register))
            }
            Operand::Number(Number::Integer(value)) => Ok(self.constant(*value as u32 & 0xffff)),
            _ => self.wants(operand, "a register of 16 bits or a number"),
        }
    }

    /// A source of 64 bits.
    pub fn double(&mut self, operand: &Operand<'a>) -> Decoded<Slot> {
        match operand {
            Operand::Register(register) if self.entry.registers[*register].width == Width::B64 => {
                Ok(self.read(*register))
            }
            Operand::Number(Number::Integer(value)) => Ok(self.constant64(*value)),
            Operand::Number(Number::F64(value)) => Ok(self.constant64(value.to_bits())),
            Operand::Shared(array) => Ok(self.constant64(u64::from(self.shared[*array]))),
            _ => self.wants(operand, "a register of 64 bits or a number"),
        }
    }

    /// A source that is an f64.
    pub fn double_float(&mut self, operand: &Operand<'a>) -> Decoded<Slot> {
        match operand {
            Operand::Number(Number::Integer(_)) => {
                Err("numbers of type f64 are written as 0d and sixteen hexadecimal digits".to_owned())
            }
            _ => self.double(operand),
        }
    }

    /// A source of at least `bytes` bytes, and whether it is in a 64-bit slot: conversions and stores take the lower bits
    /// of a wider register.
    pub fn at_least(&mut self, operand: &Operand<'a>, bytes: u32, float: bool) -> Decoded<(Slot, bool)> {
        match operand {
            Operand::Register(register) => {
                let held = match self.entry.registers[*register].width {
                    Width::Predicate => 0,
                    Width::B8 => 1,
                    Width::B16 => 2,
                    Width::B32 => 4,
                    Width::B64 => 8,
                };
                if held < bytes {
                    return self.wants(operand, &format!("a register of {} bits", 8 * bytes));
                }
                Ok((self.read(*register), held == 8))
            }
            _ if bytes == 8 && float => Ok((self.double_float(operand)?, true)),
            _ if bytes == 8 => Ok((self.double(operand)?, true)),
            _ if float => Ok((self.float(operand)?, false)),
            _ => Ok((self.word(operand)?, false)),
        }
    }

    /// A predicate source, and whether it is negated.
    pub fn predicate(&mut self, operand: &Operand<'a>) -> Decoded<(Slot, bool)> {
        match operand {
            Operand::Register(register) | Operand::Not(register)
                if self.entry.registers[*register].width == Width::Predicate =>
            {
                Ok((self.read(*register), matches!(operand, Operand::Not(_))))
            }
            Operand::Number(Number::Integer(value)) => Ok((self.constant_predicate(*value != 0), false)),
            _ => self.wants(operand, "a predicate"),
        }
    }

    /// A predicate source that is not negated.
    pub fn plain_predicate(&mut self, operand: &Operand<'a>) -> Decoded<Slot> {
        match self.predicate(operand)? {
            (slot, false) => Ok(slot),
            _ => Err(format!("{} cannot be negated here", self.name(operand))),
        }
    }

    fn result(&mut self, operand: &Operand<'a>, width: Width, what: &str) -> Decoded<Slot> {
        match operand {
            Operand::Register(register) if self.entry.registers[*register].width == width => Ok(self.write(*register)),
            Operand::Sink => Ok(self.unwanted(width)),
            _ => self.wants(operand, what),
        }
    }

    /// A slot for a result that is not wanted.
    pub fn unwanted(&mut self, width: Width) -> Slot {
        let (part, size) = match width {
            Width::Predicate => (0, &mut self.sizes.predicates),
            Width::B64 => (2, &mut self.sizes.doubles),
            _ => (1, &mut self.sizes.words),
        };
        *self.unwanted[part].get_or_insert_with(|| take(size))
    }

    /// A result of 32 bits.
    pub fn word_result(&mut self, operand: &Operand<'a>) -> Decoded<Slot> {
        self.result(operand, Width::B32, "a register of 32 bits")
    }

    /// A result of 16 bits.
    pub fn half_result(&mut self, operand: &Operand<'a>) -> Decoded<Slot> {
        self.result(operand, Width::B16, "a register of 16 bits")
    }

    /// A result of 64 bits.
    pub fn double_result(&mut self, operand: &Operand<'a>) -> Decoded<Slot> {
        self.result(operand, Width::B64, "a register of 64 bits")
    }

    /// A predicate result.
    pub fn predicate_result(&mut self, operand: &Operand<'a>) -> Decoded<Slot> {
        self.result(operand, Width::Predicate, "a predicate")
    }

    /// One or two predicate results (`%p` or `%p|%q`).
    pub fn predicate_results(&mut self, operand: &Operand<'a>) -> Decoded<(Slot, Slot)> {
        match operand {
            Operand::Pair(first, second) => {
                let first = self.predicate_result(&Operand::Register(*first))?;
                Ok((first, self.predicate_result(&Operand::Register(*second))?))
            }
            _ => Ok((self.predicate_result(operand)?, NO_SLOT)),
        }
    }

    /// A result of at least `bytes` bytes, with the register's width: loads and conversions fill wider registers.
    pub fn result_at_least(&mut self, operand: &Operand<'a>, bytes: u32) -> Decoded<(Slot, Width)> {
        let Operand::Register(register) = operand else {
            return match operand {
                Operand::Sink if bytes == 8 => Ok((self.unwanted(Width::B64), Width::B64)),
                Operand::Sink => Ok((self.unwanted(Width::B32), Width::B32)),
                _ => self.wants(operand, "a register"),
            };
        };
        let width = self.entry.registers[*register].width;
        let held = match width {
            Width::Predicate => 0,
            Width::B8 => 1,
            Width::B16 => 2,
            Width::B32 => 4,
            Width::B64 => 8,
        };
        if held < bytes {
            return self.wants(operand, &format!("a register of {} bits", 8 * bytes));
        }
        Ok((self.write(*register), width))
    }

    /// The elements of a vector; an operand that is none is its only element.
    pub fn elements<'o>(&self, operand: &'o Operand<'a>) -> &'o [Operand<'a>] {
        match operand {
            Operand::Vector(elements) => elements,
            _ => std::slice::from_ref(operand),
        }
    }

    /// An address of global memory (`shared` false), shared memory, or both.
    pub fn address(&mut self, operand: &Operand<'a>, shared: bool) -> Decoded<Address> {
        let Operand::Memory(base, offset) = operand else { return self.wants(operand, "an address in brackets") };
        let offset = i32::try_from(*offset).map_err(|_| format!("the offset {offset} has more than 32 bits"))?;
        let (base, wide) = match &**base {
            Operand::Register(register) => match self.entry.registers[*register].width {
                Width::B64 => (self.read(*register), true),
                Width::B32 if shared => (self.read(*register), false),
                _ if shared => return self.wants(base, "an address of 32 or 64 bits"),
                _ => return self.wants(base, "an address of 64 bits"),
            },
            Operand::Shared(array) if shared => (self.constant(self.shared[*array]), false),
            Operand::Number(Number::Integer(value)) if shared => (self.constant(*value as u32), false),
            Operand::Number(Number::Integer(value)) => (self.constant64(*value), true),
            _ => return self.wants(base, "a register that holds an address"),
        };
        Ok(Address { base, wide, offset })
    }

    /// Keeps operands that do not fit into an instruction.
    pub fn keep(&mut self, slots: &[Slot]) -> u32 {
        let mut list = [NO_SLOT; 16];
        list[..slots.len()].copy_from_slice(slots);
        self.wide.push(list);
        self.wide.len() as u32 - 1
    }
}

/// The next free slot.
fn take(size: &mut usize) -> Slot {
    let slot = *size;
    *size += 1;
    slot.min(usize::from(NO_SLOT)) as Slot
}
