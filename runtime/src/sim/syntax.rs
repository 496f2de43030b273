//! The structure of PTX text: entries with their parameters, registers, shared arrays, and statements with names resolved.

use std::collections::HashMap;

use super::lexer::{Number, Token, TokenKind, tokens};

/// A fault of the text: the line (from 1), and what is wrong there.
pub(super) type TextFault = (usize, String);

/// An entry point.
pub(super) struct Entry<'a> {
    pub name: &'a str,
    pub line: usize,
    pub parameters: Vec<EntryParameter<'a>>,
    /// Threads per block that `.reqntid` asks for; axes that it leaves out are 1.
    pub required_block: Option<[u32; 3]>,
    /// Width of every register in declaration order.
    pub registers: Vec<Register<'a>>,
    /// Shared arrays that the entry can name, in declaration order; those of the module come first.
    pub shared: Vec<SharedArray<'a>>,
    pub instructions: Vec<Instruction<'a>>,
    /// Index of the instruction that each label stands before.
    pub labels: Vec<usize>,
}

pub(super) struct EntryParameter<'a> {
    pub name: &'a str,
    /// Bytes of its value: 1, 2, 4 or 8.
    pub bytes: u32,
}

pub(super) struct Register<'a> {
    /// The name as declared; of a range (`%r<10>`) with its number.
    pub name: RegisterName<'a>,
    pub width: Width,
}

#[derive(Clone, Copy)]
pub(super) enum RegisterName<'a> {
    Single(&'a str),
    Numbered(&'a str, u32),
}

impl std::fmt::Display for RegisterName<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Single(name) => formatter.write_str(name),
            Self::Numbered(name, number) => write!(formatter, "{name}{number}"),
        }
    }
}

/// Bits of a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Width {
    Predicate,
    B8,
    B16,
    B32,
    B64,
}

pub(super) struct SharedArray<'a> {
    pub name: &'a str,
    /// `None` for the dynamic array, whose length a launch gives.
    pub bytes: Option<u32>,
    pub alignment: u32,
}

pub(super) struct Instruction<'a> {
    pub line: usize,
    /// The predicate register under which it runs, and whether it runs where that is false.
    pub guard: Option<(usize, bool)>,
    /// The name with all qualifiers.
    pub opcode: &'a str,
    pub operands: Vec<Operand<'a>>,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Operand<'a> {
    /// A register, by its index in [`Entry::registers`].
    Register(usize),
    /// A predicate register, negated (`!%p`).
    Not(usize),
    /// Two results (`%p|%q`).
    Pair(usize, usize),
    /// A special register, such as `%tid.x`.
    Special(&'a str),
    /// A number; integers are sign-extended to 64 bits.
    Number(Number),
    /// A parameter, by its index.
    Parameter(usize),
    /// A shared array, by its index.
    Shared(usize),
    /// A label, by its index.
    Label(usize),
    /// `_`: a result that is not wanted.
    Sink,
    /// `{a, b}`.
    Vector(Vec<Operand<'a>>),
    /// `[base + offset]`.
    Memory(Box<Operand<'a>>, i64),
}

/// The entry points of a text.
///
/// # Errors
/// The first line that cannot be understood, and why.
pub(super) fn entries(text: &str) -> Result<Vec<Entry<'_>>, TextFault> {
    let tokens = tokens(text)?;
    let last_line = text.lines().count().max(1);
    let mut parser = Parser { tokens: &tokens, at: 0, last_line, module_shared: Vec::new() };
    let mut entries = Vec::new();
    while let Some(token) = parser.next() {
        match token.kind {
            TokenKind::Word(".version" | ".target" | ".address_size") => {
                let line = token.line;
                while parser.peek().is_some_and(|next| next.line == line) {
                    parser.at += 1;
                }
            }
            TokenKind::Word(".visible" | ".extern" | ".weak") => {}
            TokenKind::Word(".shared") => {
                let array = parser.shared_array()?;
                parser.module_shared.push(array);
            }
            TokenKind::Word(".entry") => entries.push(parser.entry()?),
            TokenKind::Word(".file") => parser.skip_line(token.line),
            TokenKind::Word(word) => {
                return Err((token.line, format!("the simulator does not know `{word}` outside of entries")));
            }
            _ => return Err((token.line, "a directive is expected here, such as `.visible .entry`".to_owned())),
        }
    }
    Ok(entries)
}

struct Parser<'t, 'a> {
    tokens: &'t [Token<'a>],
    at: usize,
    last_line: usize,
    module_shared: Vec<SharedArray<'a>>,
}

/// Names that a pair of braces declares.
#[derive(Default)]
struct Scope<'a> {
    registers: HashMap<&'a str, usize>,
    /// Ranges: by the part of the name before the number, the first register's index and the count.
    ranges: HashMap<&'a str, (usize, u32)>,
    shared: HashMap<&'a str, usize>,
    labels: HashMap<&'a str, usize>,
}

/// An entry while it is read.
struct Body<'a> {
    entry: Entry<'a>,
    scopes: Vec<Scope<'a>>,
    /// Labels that were used before they were placed: the label's index in `entry.labels`, its name, the line of use.
    parameters: HashMap<&'a str, usize>,
    /// Uses of labels, which are resolved when their scope ends: instruction, operand, name, depth of the scope.
    jumps: Vec<Jump<'a>>,
}

struct Jump<'a> {
    instruction: usize,
    operand: usize,
    name: &'a str,
    depth: usize,
}

impl<'a> Parser<'_, 'a> {
    fn peek(&self) -> Option<Token<'a>> {
        self.tokens.get(self.at).copied()
    }

    fn next(&mut self) -> Option<Token<'a>> {
        let token = self.peek();
        self.at += 1;
        token
    }

    fn line(&self) -> usize {
        self.peek().map_or(self.last_line, |token| token.line)
    }

    fn skip_line(&mut self, line: usize) {
        while self.peek().is_some_and(|token| token.line == line) {
            self.at += 1;
        }
    }

    fn takes(&mut self, sign: char) -> bool {
        let found = self.peek().is_some_and(|token| token.kind == TokenKind::Sign(sign));
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, sign: char) -> Result<(), TextFault> {
        // What is missing belongs to the line before the token that stands in its place.
        let line = self.tokens[..self.at.min(self.tokens.len())].last().map_or(self.line(), |token| token.line);
        if self.takes(sign) { Ok(()) } else { Err((line, format!("`{sign}` is expected after this"))) }
    }

    fn word(&mut self, what: &str) -> Result<&'a str, TextFault> {
        let line = self.line();
        match self.next() {
            Some(Token { kind: TokenKind::Word(word), .. }) => Ok(word),
            _ => Err((line, format!("{what} is expected here"))),
        }
    }

    fn count(&mut self, what: &str) -> Result<u32, TextFault> {
        let line = self.line();
        match self.next() {
            Some(Token { kind: TokenKind::Number(Number::Integer(number)), .. }) => {
                u32::try_from(number).map_err(|_| (line, format!("{what} is too large")))
            }
            _ => Err((line, format!("{what} is expected here"))),
        }
    }

    /// What follows `.shared`, up to its semicolon.
    fn shared_array(&mut self) -> Result<SharedArray<'a>, TextFault> {
        let mut alignment = None;
        let mut element = None;
        loop {
            let line = self.line();
            let word = self.word("the array's type or name")?;
            match word {
                ".align" => alignment = Some(self.count("the alignment in bytes")?),
                _ if word.starts_with('.') => {
                    let bytes = type_bytes(&word[1..]).ok_or((line, format!("`{word}` is no type of an array")))?;
                    element = Some(bytes);
                }
                name => {
                    let element = element.ok_or((line, format!("the type of {name} is missing")))?;
                    let bytes = if self.takes('[') {
                        if self.takes(']') {
                            None
                        } else {
                            let count = self.count("the number of elements")?;
                            self.expect(']')?;
                            let bytes = count.checked_mul(element);
                            Some(bytes.ok_or((line, format!("{name} is larger than shared memory can be")))?)
                        }
                    } else {
                        Some(element)
                    };
                    self.expect(';')?;
                    let alignment = alignment.unwrap_or(element).max(element);
                    if !alignment.is_power_of_two() {
                        return Err((line, format!("the alignment of {name}, {alignment}, is no power of two")));
                    }
                    return Ok(SharedArray { name, bytes, alignment });
                }
            }
        }
    }

    /// What follows `.entry`, up to the end of its body.
    fn entry(&mut self) -> Result<Entry<'a>, TextFault> {
        let line = self.line();
        let name = self.word("the entry's name")?;
        let mut parameters = Vec::new();
        if self.takes('(') && !self.takes(')') {
            loop {
                parameters.push(self.parameter()?);
                if self.takes(')') {
                    break;
                }
                self.expect(',')?;
            }
        }
        let mut required_block = None;
        while !self.takes('{') {
            let line = self.line();
            match self.word("`{`, or a directive such as `.reqntid`,")? {
                ".reqntid" => required_block = Some(self.extents()?),
                ".maxntid" => {
                    self.extents()?;
                }
                ".minnctapersm" | ".maxnreg" | ".maxnctapersm" => {
                    self.count("a number")?;
                }
                word => return Err((line, format!("the simulator does not know `{word}` before an entry's body"))),
            }
        }
        let mut outer = Scope::default();
        let mut shared = Vec::new();
        for (index, array) in self.module_shared.iter().enumerate() {
            outer.shared.insert(array.name, index);
            shared.push(SharedArray { ..*array });
        }
        let by_name =
            parameters.iter().enumerate().map(|(index, parameter): (_, &EntryParameter<'a>)| (parameter.name, index));
        let mut body = Body {
            parameters: by_name.collect(),
            entry: Entry {
                name,
                line,
                parameters,
                required_block,
                registers: Vec::new(),
                shared,
                instructions: Vec::new(),
                labels: Vec::new(),
            },
            scopes: vec![outer],
            jumps: Vec::new(),
        };
        self.scope(&mut body)?;
        Ok(body.entry)
    }

    fn parameter(&mut self) -> Result<EntryParameter<'a>, TextFault> {
        let mut bytes = None;
        loop {
            let line = self.line();
            let word = self.word("a parameter")?;
            match word {
                ".param" | ".ptr" | ".global" | ".shared" | ".const" => {}
                ".align" => {
                    self.count("the alignment in bytes")?;
                }
                _ if word.starts_with('.') => {
                    let known = type_bytes(&word[1..]);
                    bytes = Some(known.ok_or((line, format!("`{word}` is no type of a parameter")))?);
                }
                name => {
                    if self.takes('[') {
                        return Err((line, format!("{name} is an array: the simulator knows single parameters only")));
                    }
                    let bytes = bytes.ok_or((line, format!("the type of {name} is missing")))?;
                    return Ok(EntryParameter { name, bytes });
                }
            }
        }
    }

    /// One to three numbers.
    fn extents(&mut self) -> Result<[u32; 3], TextFault> {
        let mut extents = [1; 3];
        for (axis, extent) in extents.iter_mut().enumerate() {
            if axis > 0 && !self.takes(',') {
                break;
            }
            *extent = self.count("the number of threads")?;
        }
        Ok(extents)
    }

    /// Statements up to the closing brace.
    fn scope(&mut self, body: &mut Body<'a>) -> Result<(), TextFault> {
        body.scopes.push(Scope::default());
        let opened = self.line();
        loop {
            let Some(token) = self.next() else {
                return Err((opened, "the `{` before this has no `}`".to_owned()));
            };
            match token.kind {
                TokenKind::Sign('}') => break,
                TokenKind::Sign('{') => self.scope(body)?,
                TokenKind::Sign(';') => {}
                TokenKind::Word(".reg") => self.registers(body)?,
                TokenKind::Word(".shared") => {
                    let array = self.shared_array()?;
                    let index = body.entry.shared.len();
                    body.declare(token.line, array.name, |scope| scope.shared.insert(array.name, index).is_some())?;
                    body.entry.shared.push(array);
                }
                TokenKind::Word(".loc") => self.skip_line(token.line),
                TokenKind::Word(".pragma") => {
                    while self.next().is_some_and(|token| token.kind != TokenKind::Sign(';')) {}
                }
                TokenKind::Word(word) if word.starts_with('.') => {
                    return Err((token.line, format!("the simulator does not know the directive `{word}`")));
                }
                TokenKind::Word(label) if self.takes(':') => {
                    let index = body.entry.labels.len();
                    body.entry.labels.push(body.entry.instructions.len());
                    body.declare(token.line, label, |scope| scope.labels.insert(label, index).is_some())?;
                }
                TokenKind::Word(opcode) => self.instruction(body, token.line, None, opcode)?,
                TokenKind::Sign('@') => {
                    let negated = self.takes('!');
                    let name = self.word("the predicate of this instruction")?;
                    let register = body.register(name).ok_or((token.line, format!("{name} is not declared")))?;
                    if body.entry.registers[register].width != Width::Predicate {
                        return Err((token.line, format!("{name} is no predicate")));
                    }
                    let line = self.line();
                    let opcode = self.word("an instruction")?;
                    self.instruction(body, line, Some((register, negated)), opcode)?;
                }
                _ => return Err((token.line, "an instruction is expected here".to_owned())),
            }
        }
        body.end_scope()
    }

    /// What follows `.reg`.
    fn registers(&mut self, body: &mut Body<'a>) -> Result<(), TextFault> {
        let line = self.line();
        let class = self.word("the registers' type")?;
        let width = match class {
            ".pred" => Width::Predicate,
            ".b8" | ".u8" | ".s8" => Width::B8,
            ".b16" | ".u16" | ".s16" | ".f16" | ".bf16" => Width::B16,
            ".b32" | ".u32" | ".s32" | ".f32" | ".f16x2" | ".bf16x2" => Width::B32,
            ".b64" | ".u64" | ".s64" | ".f64" => Width::B64,
            _ => return Err((line, format!("the simulator knows no registers of type `{class}`"))),
        };
        loop {
            let line = self.line();
            let name = self.word("a register's name")?;
            let first = body.entry.registers.len();
            if self.takes('<') {
                let count = self.count("the number of registers")?;
                self.expect('>')?;
                if count > 1 << 16 {
                    return Err((line, format!("{count} registers are more than the simulator has room for")));
                }
                let numbered = |number| Register { name: RegisterName::Numbered(name, number), width };
                body.entry.registers.extend((0..count).map(numbered));
                body.declare(line, name, |scope| scope.ranges.insert(name, (first, count)).is_some())?;
            } else {
                body.entry.registers.push(Register { name: RegisterName::Single(name), width });
                body.declare(line, name, |scope| scope.registers.insert(name, first).is_some())?;
            }
            if self.takes(';') {
                return Ok(());
            }
            self.expect(',')?;
        }
    }

    fn instruction(
        &mut self,
        body: &mut Body<'a>,
        line: usize,
        guard: Option<(usize, bool)>,
        opcode: &'a str,
    ) -> Result<(), TextFault> {
        let mut operands = Vec::new();
        if !self.takes(';') {
            loop {
                let operand = self.operand(body, operands.len())?;
                operands.push(operand);
                if self.takes(';') {
                    break;
                }
                self.expect(',')?;
            }
        }
        body.entry.instructions.push(Instruction { line, guard, opcode, operands });
        Ok(())
    }

    fn operand(&mut self, body: &mut Body<'a>, position: usize) -> Result<Operand<'a>, TextFault> {
        let line = self.line();
        let wrong = |what: &str| Err((line, what.to_owned()));
        let Some(token) = self.next() else { return wrong("the text ends within an instruction") };
        match token.kind {
            TokenKind::Word(word) => {
                let operand = body.named(word, position, line)?;
                if self.takes('|') {
                    let second = self.word("the second result")?;
                    return match (operand, body.named(second, position, line)?) {
                        (Operand::Register(first), Operand::Register(second)) => Ok(Operand::Pair(first, second)),
                        _ => wrong("`|` joins two registers"),
                    };
                }
                Ok(operand)
            }
            TokenKind::Number(number) => Ok(Operand::Number(number)),
            TokenKind::Sign('-') => match self.next().map(|token| token.kind) {
                Some(TokenKind::Number(Number::Integer(number))) => {
                    Ok(Operand::Number(Number::Integer(number.wrapping_neg())))
                }
                Some(TokenKind::Number(Number::F64(number))) => Ok(Operand::Number(Number::F64(-number))),
                Some(TokenKind::Number(Number::F32(bits))) => Ok(Operand::Number(Number::F32(bits ^ 1 << 31))),
                _ => wrong("a number is expected after `-`"),
            },
            TokenKind::Sign('!') => match body.named(self.word("a predicate")?, position, line)? {
                Operand::Register(register) => Ok(Operand::Not(register)),
                _ => wrong("`!` stands before predicates"),
            },
            TokenKind::Sign('{') => {
                let mut elements = Vec::new();
                loop {
                    elements.push(self.operand(body, position)?);
                    if self.takes('}') {
                        return Ok(Operand::Vector(elements));
                    }
                    self.expect(',')?;
                }
            }
            TokenKind::Sign('[') => {
                let base = self.operand(body, position)?;
                let mut offset = 0i64;
                while !self.takes(']') {
                    let negative = match self.next().map(|token| token.kind) {
                        Some(TokenKind::Sign('+')) => self.takes('-'),
                        Some(TokenKind::Sign('-')) => true,
                        _ => return wrong("`]`, or `+` and a number, is expected in this address"),
                    };
                    match self.next().map(|token| token.kind) {
                        Some(TokenKind::Number(Number::Integer(number))) => {
                            let number = number as i64;
                            offset = offset.wrapping_add(if negative { number.wrapping_neg() } else { number });
                        }
                        _ => return wrong("a number is expected in this address"),
                    }
                }
                Ok(Operand::Memory(Box::new(base), offset))
            }
            TokenKind::Sign('}') => {
                let before = self.tokens[..self.at - 1].last().map_or(line, |token| token.line);
                Err((before, "`;` is expected after this".to_owned()))
            }
            _ => wrong("an operand is expected here"),
        }
    }
}

impl<'a> Body<'a> {
    /// Runs `insert` on the innermost scope; it returns whether the name was there already.
    fn declare(
        &mut self,
        line: usize,
        name: &str,
        insert: impl FnOnce(&mut Scope<'a>) -> bool,
    ) -> Result<(), TextFault> {
        match self.scopes.last_mut().map(insert) {
            Some(false) => Ok(()),
            _ => Err((line, format!("{name} is declared twice"))),
        }
    }

    fn register(&self, name: &str) -> Option<usize> {
        let digits = name.len() - name.bytes().rev().take_while(u8::is_ascii_digit).count();
        let (stem, digits) = name.split_at(digits);
        let number: Option<u32> = digits.parse().ok().filter(|_| digits.len() == 1 || !digits.starts_with('0'));
        self.scopes.iter().rev().find_map(|scope| {
            let in_range = || {
                let &(first, count) = scope.ranges.get(stem)?;
                Some(first + number.filter(|&number| number < count)? as usize)
            };
            scope.registers.get(name).copied().or_else(in_range)
        })
    }

    /// What a name stands for. Names that nothing declares are labels, which may come later.
    fn named(&mut self, name: &'a str, position: usize, line: usize) -> Result<Operand<'a>, TextFault> {
        if name == "_" {
            return Ok(Operand::Sink);
        }
        if let Some(register) = self.register(name) {
            return Ok(Operand::Register(register));
        }
        if let Some(array) = self.scopes.iter().rev().find_map(|scope| scope.shared.get(name)) {
            return Ok(Operand::Shared(*array));
        }
        if let Some(parameter) = self.parameters.get(name) {
            return Ok(Operand::Parameter(*parameter));
        }
        if super::program::SPECIAL_REGISTERS.contains(&name) {
            return Ok(Operand::Special(name));
        }
        if name.starts_with('%') {
            return Err((line, format!("{name} is not declared, and no special register that the simulator knows")));
        }
        self.jumps.push(Jump {
            instruction: self.entry.instructions.len(),
            operand: position,
            name,
            depth: self.scopes.len(),
        });
        Ok(Operand::Label(usize::MAX))
    }

    /// Resolves the labels that the innermost scope placed, and forgets its names.
    fn end_scope(&mut self) -> Result<(), TextFault> {
        let depth = self.scopes.len();
        let Some(scope) = self.scopes.pop() else { return Ok(()) };
        for jump in std::mem::take(&mut self.jumps) {
            let instruction = &mut self.entry.instructions[jump.instruction];
            match scope.labels.get(jump.name) {
                Some(&label) if jump.depth >= depth => match &mut instruction.operands[jump.operand] {
                    operand @ Operand::Label(_) => *operand = Operand::Label(label),
                    _ => return Err((instruction.line, format!("the label {} cannot stand here", jump.name))),
                },
                _ if self.scopes.len() == 1 => {
                    return Err((instruction.line, format!("{} is not declared", jump.name)));
                }
                _ => self.jumps.push(Jump { depth: jump.depth.min(depth - 1), ..jump }),
            }
        }
        Ok(())
    }
}

/// Bytes of a type's values.
pub(super) fn type_bytes(name: &str) -> Option<u32> {
    match name {
        "b8" | "u8" | "s8" => Some(1),
        "b16" | "u16" | "s16" | "f16" | "bf16" => Some(2),
        "b32" | "u32" | "s32" | "f32" | "f16x2" | "bf16x2" => Some(4),
        "b64" | "u64" | "s64" | "f64" => Some(8),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = "\
.version 7.0
.target sm_80
.address_size 64
.extern .shared .align 128 .b8 memory[];
.visible .entry small(
    .param .u64 .ptr .global .align 4 out,
    .param .u32 count
)
.reqntid 64, 2
{
    .reg .b32 %r<3>, %row;
    .reg .pred %p;
    .shared .f32 tile[16];
    bra END;
    {
        .reg .b64 %row;
        @!%p mov.b64 %row, -1;
AGAIN:  bra AGAIN;
    }
END:
    ld.shared.f32 %r1, [tile+8];
    ret;
}";

    #[test]
    fn names_are_resolved_in_their_scopes() {
        let entries = entries(SMALL).unwrap();
        let [entry] = entries.as_slice() else { panic!("one entry") };
        assert_eq!((entry.name, entry.line, entry.required_block), ("small", 5, Some([64, 2, 1])));
        assert_eq!(
            entry.parameters.iter().map(|one| (one.name, one.bytes)).collect::<Vec<_>>(),
            [("out", 8), ("count", 4)]
        );
        let names: Vec<String> = entry.registers.iter().map(|register| register.name.to_string()).collect();
        assert_eq!(names, ["%r0", "%r1", "%r2", "%row", "%p", "%row"]);
        assert_eq!(entry.shared.iter().map(|one| one.bytes).collect::<Vec<_>>(), [None, Some(64)]);
        let target = |instruction: usize| match entry.instructions[instruction].operands[0] {
            Operand::Label(label) => entry.labels[label],
            _ => panic!("a label"),
        };
        assert_eq!((target(0), target(2)), (3, 2));
        assert_eq!(entry.instructions[1].guard, Some((4, true)));
        assert_eq!(entry.instructions[1].operands[1], Operand::Number(Number::Integer(u64::MAX)));
        assert_eq!(entry.instructions[3].operands[1], Operand::Memory(Box::new(Operand::Shared(1)), 8));
        assert_eq!(entry.instructions[3].line, 21);
    }

    #[test]
    fn faults_of_the_text_name_the_line() {
        let fault = |from: &str, to: &str| {
            assert!(SMALL.contains(from));
            entries(&SMALL.replacen(from, to, 1)).err().unwrap()
        };
        assert_eq!(fault("bra END", "bra ENDE"), (14, "ENDE is not declared".to_owned()));
        assert_eq!(fault("bra END", "bra AGAIN"), (14, "AGAIN is not declared".to_owned()));
        assert_eq!(fault("%r1,", "%r7,").0, 21);
        assert_eq!(fault("%p;", "%row;"), (12, "%row is declared twice".to_owned()));
        assert_eq!(fault("@!%p", "@!%row").1, "%row is no predicate");
        assert_eq!(fault("ret;", "ret").0, 22);
        assert_eq!(fault(".reg .pred", ".reg .b128").1, "the simulator knows no registers of type `.b128`");
        assert!(fault("    ret;\n}", "").1.contains("has no `}`"));
    }
}
