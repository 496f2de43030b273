//! A text that says how it is to be run and what comes out: a test of one instruction, or an experiment.
//!
//! Lines that begin with `//:` are directives; the rest of the text is the PTX.
//!
//! ```text
//! //: block 4                                threads in x, y, z (1 where left out)
//! //: grid 1                                 blocks in x, y, z
//! //: shared 256                             bytes of dynamic shared memory
//! //: entry add                              where the text has more than one
//! //: budget 1000                            instructions that a warp may run
//! //: parameter a read u32 = 1 2 3 0xffffffff
//! //: parameter out write u32[4]             four elements that nothing has written
//! //: parameter sums write f32 = 0*8         eight elements that hold 0
//! //: parameter count u32 = 4                a number
//! //: expect out = 2 4 6 0
//! //: expect sums within 1 = 0.5*8           at most one unit in the last place away
//! //: fault out of bounds                    the run ends with a fault whose message contains this
//! ```
//!
//! Parameters stand in the order of the entry's. Types are `u8` to `u64`, `s8` to `s64`, `f16`, `bf16`, `f32` and `f64`.
//! Values are decimal or hexadecimal whole numbers; of floating-point types decimal numbers, `nan`, `inf`, `-inf`, or the
//! bits in hexadecimal (`0x7f800000`). `7*32` is 7 thirty-two times, `0..32` counts from 0 to 31, `?` is an element that
//! nothing wrote. A directive that begins with `+` goes on with the values of the one before.

use std::collections::BTreeMap;

use super::Fault;
use super::numbers::{BF16, F16, bf16_of, f16_bits, f16_value, f32_of_bf16, round};
use super::program::Rounding;
use super::text::{TextArgument, TextLaunch, TextMemory, run_text};

/// A text's directives: see the [module](self).
#[derive(Clone, Debug)]
pub struct Case {
    /// How it is launched.
    pub launch: TextLaunch,
    /// Its parameters in order.
    pub parameters: Vec<CaseParameter>,
    expectations: Vec<Expectation>,
    /// What the message of the fault that ends the run contains; without any, the run must end well.
    pub faults: Vec<String>,
}

/// A parameter of a [`Case`].
#[derive(Clone, Debug)]
pub struct CaseParameter {
    /// Its name.
    pub name: String,
    /// The type of its elements, as written.
    pub kind: String,
    /// What is passed.
    pub argument: TextArgument,
}

#[derive(Clone, Debug)]
struct Expectation {
    parameter: usize,
    /// Units in the last place that a result may be away.
    within: u64,
    /// The bits of each element; `None` where nothing is to be written.
    values: Vec<Option<u64>>,
}

/// What came of running a [`Case`].
#[derive(Clone, Debug)]
pub struct CaseReport {
    /// The fault that ended the run, if one did.
    pub fault: Option<Box<Fault>>,
    /// What is not as expected; empty when the case holds.
    pub differences: Vec<String>,
    /// The contents of memory afterwards, by parameter, as text.
    pub memory: Vec<(String, Vec<String>)>,
    /// How many instructions ran, by their names without qualifiers.
    pub instructions: BTreeMap<String, u64>,
}

impl Case {
    /// Reads the directives of a text.
    ///
    /// # Errors
    /// The line, and what is wrong there.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut case = Self {
            launch: TextLaunch::default(),
            parameters: Vec::new(),
            expectations: Vec::new(),
            faults: Vec::new(),
        };
        let mut directives: Vec<(usize, String)> = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let Some(directive) = line.trim_start().strip_prefix("//:") else { continue };
            match (directive.trim().strip_prefix('+'), directives.last_mut()) {
                (Some(more), Some((_, before))) => *before += &format!(" {}", more.trim()),
                _ => directives.push((index + 1, directive.trim().to_owned())),
            }
        }
        for (line, directive) in directives {
            case.directive(&directive).map_err(|problem| format!("line {line}: {problem}"))?;
        }
        Ok(case)
    }

    fn directive(&mut self, directive: &str) -> Result<(), String> {
        let (name, rest) = directive.split_once(' ').unwrap_or((directive, ""));
        let rest = rest.trim();
        match name {
            "entry" => self.launch.entry = Some(rest.to_owned()),
            "grid" => self.launch.grid = extents(rest)?,
            "block" => self.launch.block = Some(extents(rest)?),
            "shared" => {
                self.launch.shared_bytes = rest.parse().map_err(|_| format!("`{rest}` is no number of bytes"))?
            }
            "budget" => {
                self.launch.budget = Some(rest.parse().map_err(|_| format!("`{rest}` is no number of instructions"))?);
            }
            "parameter" => self.parameter(rest)?,
            "expect" => self.expect(rest)?,
            "fault" => self.faults.push(rest.to_owned()),
            _ => {
                return Err(format!(
                    "`{name}` is no directive: entry, grid, block, shared, budget, parameter, expect and fault are"
                ));
            }
        }
        Ok(())
    }

    /// `NAME TYPE = VALUE`, `NAME read TYPE = VALUES`, `NAME write TYPE = VALUES` or `NAME write TYPE[COUNT]`.
    fn parameter(&mut self, text: &str) -> Result<(), String> {
        let (declaration, values) = match text.split_once('=') {
            Some((declaration, values)) => (declaration.trim(), Some(values)),
            None => (text, None),
        };
        let words: Vec<&str> = declaration.split_whitespace().collect();
        let (name, access, kind) = match words.as_slice() {
            [name, kind] => (*name, None, *kind),
            [name, access @ ("read" | "write"), kind] => (*name, Some(*access), *kind),
            _ => return Err(format!("`{declaration}` is no `NAME TYPE`, `NAME read TYPE` or `NAME write TYPE`")),
        };
        let (kind, count) = match kind.strip_suffix(']').and_then(|kind| kind.split_once('[')) {
            Some((kind, count)) => (kind, Some(count.parse::<usize>().map_err(|_| format!("`{count}` is no count"))?)),
            None => (kind, None),
        };
        let bytes = Kind::of(kind)?.bytes;
        let memory = match (values, count) {
            (Some(values), None) => encode(kind, &parse_values(kind, values)?)?,
            (None, Some(count)) => TextMemory::unwritten(count * bytes),
            _ => return Err(format!("{name} wants either values after `=` or a count in brackets")),
        };
        let argument = match access {
            Some("read") => TextArgument::Read(memory),
            Some(_) => TextArgument::Write(memory),
            None if memory.bytes.len() == bytes => TextArgument::Number(little_endian(&memory.bytes)),
            None => return Err(format!("{name} is a number: one value is wanted")),
        };
        self.parameters.push(CaseParameter { name: name.to_owned(), kind: kind.to_owned(), argument });
        Ok(())
    }

    /// `NAME = VALUES` or `NAME within UNITS = VALUES`.
    fn expect(&mut self, text: &str) -> Result<(), String> {
        let (left, values) = text.split_once('=').ok_or("`=` is missing")?;
        let words: Vec<&str> = left.split_whitespace().collect();
        let (name, within) = match words.as_slice() {
            [name] => (*name, 0),
            [name, "within", units] => (*name, units.parse().map_err(|_| format!("`{units}` is no number of units"))?),
            _ => return Err(format!("`{left}` is no name of a parameter")),
        };
        let parameter = self.parameters.iter().position(|parameter| parameter.name == name);
        let parameter = parameter.ok_or_else(|| format!("no parameter before this is called {name}"))?;
        let values = parse_values(&self.parameters[parameter].kind, values)?;
        self.expectations.push(Expectation { parameter, within, values });
        Ok(())
    }

    /// Runs the text, whose directives these are, and compares.
    pub fn run(&self, text: &str) -> CaseReport {
        let mut arguments: Vec<(String, TextArgument)> =
            self.parameters.iter().map(|parameter| (parameter.name.clone(), parameter.argument.clone())).collect();
        let outcome = run_text(text, &self.launch, &mut arguments);
        let mut differences = Vec::new();
        let (fault, instructions) = match outcome {
            Ok(instructions) => (None, instructions),
            Err(fault) => (Some(fault), BTreeMap::new()),
        };
        match &fault {
            None if !self.faults.is_empty() => {
                differences.push(format!("no fault was found, but one with \"{}\" was expected", self.faults[0]));
            }
            Some(fault) if self.faults.is_empty() => differences.push(fault.to_string()),
            Some(fault) => {
                let message = fault.to_string();
                for part in self.faults.iter().filter(|part| !message.contains(part.as_str())) {
                    differences.push(format!("the fault does not say \"{part}\": {message}"));
                }
            }
            None => {}
        }
        for expectation in &self.expectations {
            let parameter = &self.parameters[expectation.parameter];
            let (TextArgument::Read(memory) | TextArgument::Write(memory)) = &arguments[expectation.parameter].1 else {
                differences.push(format!("{} is no memory", parameter.name));
                continue;
            };
            compare(parameter, memory, expectation, &mut differences);
        }
        let memory =
            self.parameters.iter().zip(&arguments).filter_map(|(parameter, (name, argument))| match argument {
                TextArgument::Write(memory) => Some((name.clone(), show(&parameter.kind, memory))),
                _ => None,
            });
        CaseReport { fault, differences, memory: memory.collect(), instructions }
    }
}

fn compare(parameter: &CaseParameter, memory: &TextMemory, expectation: &Expectation, differences: &mut Vec<String>) {
    let name = &parameter.name;
    let elements = elements(&parameter.kind, memory);
    if elements.len() != expectation.values.len() {
        differences.push(format!("{name} has {} elements, not {}", elements.len(), expectation.values.len()));
    }
    for (index, (&own, &expected)) in elements.iter().zip(&expectation.values).enumerate() {
        let equal = match (own, expected) {
            (Some(own), Some(expected)) => units_between(&parameter.kind, own, expected) <= expectation.within,
            (own, expected) => own == expected,
        };
        if !equal {
            let text = |value| show_value(&parameter.kind, value);
            differences.push(format!("{name}[{index}] is {}, not {}", text(own), text(expected)));
        }
    }
}

/// A type of elements.
#[derive(Clone, Copy)]
struct Kind {
    bytes: usize,
    float: bool,
    signed: bool,
}

impl Kind {
    fn of(name: &str) -> Result<Self, String> {
        let bytes = match name {
            "u8" | "s8" => 1,
            "u16" | "s16" | "f16" | "bf16" => 2,
            "u32" | "s32" | "f32" => 4,
            "u64" | "s64" | "f64" => 8,
            _ => return Err(format!("`{name}` is no type: u8 to u64, s8 to s64, f16, bf16, f32 and f64 are")),
        };
        Ok(Self { bytes, float: name.contains('f'), signed: name.starts_with('s') })
    }
}

fn extents(text: &str) -> Result<[u32; 3], String> {
    let mut extents = [1; 3];
    let words: Vec<&str> = text.split_whitespace().collect();
    if words.is_empty() || words.len() > 3 {
        return Err(format!("`{text}` is not one to three numbers"));
    }
    for (extent, word) in extents.iter_mut().zip(words) {
        *extent = word.parse().map_err(|_| format!("`{word}` is no number"))?;
    }
    Ok(extents)
}

/// The bits of each value; `None` for `?`.
fn parse_values(kind: &str, text: &str) -> Result<Vec<Option<u64>>, String> {
    let mut values = Vec::new();
    for word in text.split_whitespace() {
        let (word, count) = match word.split_once('*') {
            Some((word, count)) => (word, count.parse::<usize>().map_err(|_| format!("`{count}` is no count"))?),
            None => (word, 1),
        };
        if let Some((first, end)) = word.split_once("..") {
            let bound = |text: &str| text.parse::<i64>().map_err(|_| format!("`{text}` is no whole number"));
            for value in bound(first)?..bound(end)? {
                values.push(Some(parse_value(kind, &value.to_string())?));
            }
            continue;
        }
        let value = if word == "?" { None } else { Some(parse_value(kind, word)?) };
        values.extend(std::iter::repeat_n(value, count));
    }
    Ok(values)
}

fn parse_value(name: &str, word: &str) -> Result<u64, String> {
    let kind = Kind::of(name)?;
    let wrong = || format!("`{word}` is no value of type {name}");
    let bits = 8 * kind.bytes as u32;
    if let Some(digits) = word.strip_prefix("0x") {
        let value = u64::from_str_radix(digits, 16).map_err(|_| wrong())?;
        return if bits == 64 || value >> bits == 0 { Ok(value) } else { Err(wrong()) };
    }
    if kind.float {
        let value: f64 = word.parse().map_err(|_| wrong())?;
        return Ok(match name {
            "f16" => u64::from(f16_bits(round(value, F16, Rounding::NearestEven))),
            "bf16" => u64::from(bf16_of((round(value, BF16, Rounding::NearestEven) as f32).to_bits())),
            "f32" => u64::from(word.parse::<f32>().map_err(|_| wrong())?.to_bits()),
            _ => value.to_bits(),
        });
    }
    let value: i128 = word.parse().map_err(|_| wrong())?;
    let (least, greatest) =
        if kind.signed { (-(1i128 << (bits - 1)), (1i128 << (bits - 1)) - 1) } else { (0, (1i128 << bits) - 1) };
    if value < least || value > greatest {
        return Err(wrong());
    }
    Ok((value & ((1i128 << bits) - 1)) as u64)
}

fn encode(kind: &str, values: &[Option<u64>]) -> Result<TextMemory, String> {
    let bytes = Kind::of(kind)?.bytes;
    let mut memory = TextMemory::unwritten(values.len() * bytes);
    for (index, value) in values.iter().enumerate() {
        if let Some(value) = value {
            let place = index * bytes..(index + 1) * bytes;
            memory.bytes[place.clone()].copy_from_slice(&value.to_le_bytes()[..bytes]);
            memory.written[place].fill(true);
        }
    }
    Ok(memory)
}

fn little_endian(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

/// The bits of each element; `None` where any of its bytes was not written.
fn elements(kind: &str, memory: &TextMemory) -> Vec<Option<u64>> {
    let bytes = Kind::of(kind).map_or(1, |kind| kind.bytes);
    let elements = memory.bytes.chunks_exact(bytes).zip(memory.written.chunks_exact(bytes));
    elements.map(|(bytes, written)| written.iter().all(|&one| one).then(|| little_endian(bytes))).collect()
}

fn show(kind: &str, memory: &TextMemory) -> Vec<String> {
    elements(kind, memory).into_iter().map(|value| show_value(kind, value)).collect()
}

fn show_value(name: &str, value: Option<u64>) -> String {
    let Some(bits) = value else { return "?".to_owned() };
    match name {
        "s8" => (bits as i8).to_string(),
        "s16" => (bits as i16).to_string(),
        "s32" => (bits as i32).to_string(),
        "s64" => (bits as i64).to_string(),
        "f16" => format!("{} ({bits:#06x})", f16_value(bits as u32)),
        "bf16" => format!("{} ({bits:#06x})", f32_of_bf16(bits as u32)),
        "f32" => format!("{} ({bits:#010x})", f32::from_bits(bits as u32)),
        "f64" => format!("{} ({bits:#018x})", f64::from_bits(bits)),
        _ if bits > 0xffff => format!("{bits} ({bits:#x})"),
        _ => bits.to_string(),
    }
}

/// Units in the last place between two floating-point numbers; other types differ by 0 or infinitely many. A NaN is equal
/// to every NaN, and 0 differs from -0.
fn units_between(name: &str, own: u64, expected: u64) -> u64 {
    let bits = 8 * Kind::of(name).map_or(8, |kind| kind.bytes as u32);
    if own == expected {
        return 0;
    }
    let nan = |value: u64| match name {
        "f16" => f16_value(value as u32).is_nan(),
        "bf16" => f32_of_bf16(value as u32).is_nan(),
        "f32" => f32::from_bits(value as u32).is_nan(),
        "f64" => f64::from_bits(value).is_nan(),
        _ => false,
    };
    if nan(own) || nan(expected) {
        return if nan(own) && nan(expected) { 0 } else { u64::MAX };
    }
    let negative = |value: u64| value >> (bits - 1) & 1 == 1;
    if !name.contains('f') || negative(own) != negative(expected) {
        return u64::MAX;
    }
    own.abs_diff(expected)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWICE: &str = "\
//: block 4
//: parameter a read u32 = 1 2
//: + 0x10 ?
//: parameter out write f32[4]
//: parameter count u32 = 3
//: expect out within 1 = 2 4 32.000004 ?
.version 7.0
.target sm_80
.address_size 64
.visible .entry twice(.param .u64 a, .param .u64 out, .param .u32 count)
{
    .reg .pred %p;
    .reg .b32 %r<4>;
    .reg .f32 %f;
    .reg .b64 %rd<4>;
    ld.param.u64 %rd0, [a];
    ld.param.u64 %rd1, [out];
    ld.param.u32 %r0, [count];
    mov.u32 %r1, %tid.x;
    setp.ge.u32 %p, %r1, %r0;
    @%p ret;
    mad.wide.u32 %rd2, %r1, 4, %rd0;
    ld.global.u32 %r2, [%rd2];
    add.u32 %r3, %r2, %r2;
    cvt.rn.f32.u32 %f, %r3;
    mad.wide.u32 %rd3, %r1, 4, %rd1;
    st.global.f32 [%rd3], %f;
    ret;
}";

    #[test]
    fn a_case_runs_and_is_compared() {
        let report = Case::parse(TWICE).unwrap().run(TWICE);
        assert!(report.differences.is_empty() && report.fault.is_none(), "{:?}", report.differences);
        assert_eq!(report.memory[0].0, "out");
        assert_eq!(report.memory[0].1[2..], ["32 (0x42000000)", "?"]);
        assert_eq!(report.instructions["st"], 1);
    }

    #[test]
    fn what_differs_is_said() {
        let text = TWICE.replace("32.000004", "32.00001");
        let report = Case::parse(&text).unwrap().run(&text);
        assert_eq!(report.differences, ["out[2] is 32 (0x42000000), not 32.00001 (0x42000003)"]);
        let text = TWICE.replace("count u32 = 3", "count u32 = 4");
        let report = Case::parse(&text).unwrap().run(&text);
        assert!(report.differences[0].contains("byte 12 of a, which nothing has written"), "{:?}", report.differences);
        let text = text.replace("//: expect", "//: fault thread (3, 0, 0)\n//: fault\n//: expect");
        let report = Case::parse(&text).unwrap().run(&text);
        assert_eq!(report.differences.len(), 3, "what was expected of `out` does not hold: {:?}", report.differences);
    }

    #[test]
    fn wrong_directives_are_refused() {
        let refusal = |from: &str, to: &str| Case::parse(&TWICE.replacen(from, to, 1)).unwrap_err();
        assert_eq!(refusal("block 4", "blocks 4").split(':').next(), Some("line 1"));
        assert!(refusal("0x10", "0x100000000").contains("no value of type u32"));
        assert!(refusal("read u32", "read u128").contains("`u128` is no type"));
        assert!(refusal("expect out", "expect output").contains("no parameter before this is called output"));
        assert!(refusal("count u32 = 3", "count u32 = 3 4").contains("one value is wanted"));
    }
}
