//! From recorded lines to text.

use std::collections::HashMap;
use std::fmt::Write as _;

use super::State;

/// One line of a kernel's body.
pub(super) enum Line {
    /// An instruction, executed when the predicate holds (or does not, when negated).
    Instruction { predicate: Option<(usize, bool)>, opcode: String, pieces: Vec<Piece>, depth: usize },
    /// Where branches lead.
    Label(String),
    /// A comment of its own line.
    Comment(String),
}

/// An operand as it will be printed: registers get their names last.
#[derive(Clone)]
pub(super) enum Piece {
    Register(usize),
    /// Registers in braces.
    Vector(Vec<usize>),
    /// A register's address plus bytes, in brackets.
    Address(usize, i64),
    Text(String),
}

impl Piece {
    pub(super) fn text(text: &str) -> Self {
        Self::Text(text.to_owned())
    }

    /// The registers that the operand names.
    pub(super) fn registers(&self) -> Vec<usize> {
        match self {
            Self::Register(id) | Self::Address(id, _) => vec![*id],
            Self::Vector(ids) => ids.clone(),
            Self::Text(_) => Vec::new(),
        }
    }
}

impl Line {
    pub(super) fn instruction(opcode: impl Into<String>, pieces: Vec<Piece>) -> Self {
        Self::Instruction { predicate: None, opcode: opcode.into(), pieces, depth: 0 }
    }

    pub(super) fn when(self, register: usize, holds: bool) -> Self {
        match self {
            Self::Instruction { opcode, pieces, depth, .. } => {
                Self::Instruction { predicate: Some((register, holds)), opcode, pieces, depth }
            }
            other => other,
        }
    }

    pub(super) fn at(mut self, level: usize) -> Self {
        if let Self::Instruction { depth, .. } = &mut self {
            *depth = level;
        }
        self
    }
}

/// Register declarations and instructions: what stands between a kernel's braces.
pub(super) fn body(state: &State) -> String {
    let names = names(state);
    let mut text = String::new();
    declarations(state, &names, &mut text);
    for line in &state.lines {
        match line {
            Line::Label(label) => {
                let _ = writeln!(text, "{label}:");
            }
            Line::Comment(comment) => {
                let _ = writeln!(text, "\n    // {comment}");
            }
            Line::Instruction { predicate, opcode, pieces, depth } => {
                let _ = write!(text, "    {:1$}", "", 2 * depth);
                if let Some((register, holds)) = predicate {
                    let _ = write!(text, "@{}{} ", if *holds { "" } else { "!" }, names[*register]);
                }
                let operands: Vec<String> = pieces.iter().map(|piece| print(piece, &names)).collect();
                let _ = match operands.is_empty() {
                    true => writeln!(text, "{opcode};"),
                    false => writeln!(text, "{opcode} {};", operands.join(", ")),
                };
            }
        }
    }
    text
}

fn print(piece: &Piece, names: &[String]) -> String {
    match piece {
        Piece::Register(id) => names[*id].clone(),
        Piece::Vector(ids) => {
            let parts: Vec<&str> = ids.iter().map(|id| names[*id].as_str()).collect();
            format!("{{{}}}", parts.join(", "))
        }
        Piece::Address(id, 0) => format!("[{}]", names[*id]),
        Piece::Address(id, offset) => format!("[{}+{offset}]", names[*id]),
        Piece::Text(text) => text.clone(),
    }
}

/// A unique name per register: the one it was given, numbered when given twice, or its type's letter and a number.
fn names(state: &State) -> Vec<String> {
    let mut given: HashMap<&str, usize> = HashMap::new();
    let mut counts: HashMap<&str, usize> = HashMap::new();
    state
        .registers
        .iter()
        .map(|register| match register.name {
            _ if register.moved => String::new(),
            Some(name) => {
                let count = given.entry(name).or_default();
                *count += 1;
                if *count == 1 { format!("%{name}") } else { format!("%{name}_{count}") }
            }
            None => {
                let count = counts.entry(register.prefix).or_default();
                *count += 1;
                format!("%{}{}", register.prefix, *count - 1)
            }
        })
        .collect()
}

fn declarations(state: &State, names: &[String], text: &mut String) {
    for class in [".pred", ".b16", ".b32", ".f32", ".b64"] {
        let of_class = || {
            state.registers.iter().zip(names).filter(move |(register, _)| register.class == class && !register.moved)
        };
        let named: Vec<&str> =
            of_class().filter(|(register, _)| register.name.is_some()).map(|(_, name)| name.as_str()).collect();
        for group in named.chunks(8) {
            let _ = writeln!(text, "    .reg {class:5} {};", group.join(", "));
        }
        let unnamed = of_class().filter(|(register, _)| register.name.is_none());
        if let Some(prefix) = unnamed.clone().map(|(register, _)| register.prefix).next() {
            let _ = writeln!(text, "    .reg {class:5} %{prefix}<{}>;", unnamed.count());
        }
    }
    text.push('\n');
}
