//! PTX as text, written from Rust: a typed assembler.
//!
//! A kernel is written as a closure that gets an [`Assembler`]. Registers are [`Value`]s with a type; arithmetic on them
//! emits one instruction each and gives a new register, so most of a kernel reads as the formula that it computes.
//! Registers that change are [`Variable`]s. Control flow is closures ([`Assembler::if_`], [`Assembler::for_`],
//! [`Assembler::while_`]); loops that should be unrolled are plain Rust loops. Memory is reached through [`Global`]
//! (parameters) and [`Shared`] (one layout per block), in elements of a stored type; arithmetic is f32 whatever that type.
//!
//! The text that comes out is meant to be read: registers carry the names given by [`Value::named`], comments the
//! intent, and sections are set apart.
//!
//! Mistakes in a kernel (using a value that was moved into a variable, more shared memory than offsets reach) stop the
//! program with a message: a kernel's text depends on nothing but its configuration, and every configuration is built by
//! the tests.

mod control;
mod matrix;
mod memory;
mod print;
mod value;
mod warp;

use std::cell::RefCell;

pub use memory::{Address, Global, Shared, Table, unpack};
pub use value::{F32, Operand, Pred, Type, U16, U32, U64, Value, Variable};
pub use warp::LANES;

use crate::kernel::Bounds;
use crate::{Kernel, Parameter, ParameterKind, Target, Work};
use print::{Line, Piece};

/// Writes one kernel. See the [module](self).
pub struct Assembler {
    state: RefCell<State>,
}

/// What a kernel is called, and everything that a launch must know beside its text.
pub struct Description<W> {
    /// Name of the entry point: unique among all kernels and configurations.
    pub name: String,
    /// What is computed and how the work is laid out: the comment at the top of the text.
    pub summary: String,
    /// Threads per block in x, y and z.
    pub block: [u32; 3],
    /// The device that the text is written for.
    pub target: Target,
    /// What the numbers given to `work` mean, in order.
    pub sizes: &'static [&'static str],
    /// Bytes and operations of a problem of these sizes.
    pub work: W,
}

#[derive(Default)]
struct State {
    lines: Vec<Line>,
    registers: Vec<Register>,
    parameters: Vec<Parameter>,
    labels: usize,
    depth: usize,
    shared_bytes: u32,
    resident_blocks: u32,
}

struct Register {
    class: &'static str,
    prefix: &'static str,
    name: Option<&'static str>,
    /// The variable that took the value over, if one did.
    moved: bool,
}

impl Assembler {
    /// The kernel whose body `body` writes. Parameters are declared by `body`, in the order of their declaration.
    pub fn assemble<W>(description: Description<W>, body: impl for<'a> FnOnce(&'a Self)) -> Kernel
    where
        W: Fn(&[u64]) -> Work + Send + Sync + 'static,
    {
        let assembler = Self { state: RefCell::default() };
        body(&assembler);
        assembler.push(Line::instruction("ret", Vec::new()));
        let state = assembler.state.into_inner();
        let body = print::body(&state);
        let Description { name, summary, block, target, sizes, work } = description;
        let bounds = Bounds { block, shared_bytes: state.shared_bytes, resident_blocks: state.resident_blocks };
        Kernel::new(&name, &summary, state.parameters, bounds, target, &body, sizes, work)
    }

    /// Bounds the registers of a thread so that this many blocks fit a multiprocessor, where shared memory allows. Compilers
    /// differ in how many they take: what must not be lost with one of them is asked for here.
    pub fn resident_blocks(&self, count: u32) {
        self.state.borrow_mut().resident_blocks = count;
    }

    /// A line of comment before what follows.
    pub fn comment(&self, text: impl Into<String>) {
        self.push(Line::Comment(text.into()));
    }

    /// Declares a parameter that is a 32-bit number, and reads it.
    pub fn u32(&self, name: &'static str) -> Value<'_, U32> {
        self.parameter(name, ParameterKind::U32, "ld.param.u32")
    }

    /// Declares a parameter that is a 64-bit number, and reads it.
    pub fn u64(&self, name: &'static str) -> Value<'_, U64> {
        self.parameter(name, ParameterKind::U64, "ld.param.u64")
    }

    /// Declares a parameter that is an f32 number, and reads it.
    pub fn f32(&self, name: &'static str) -> Value<'_, F32> {
        self.parameter(name, ParameterKind::F32, "ld.param.f32")
    }

    /// The thread's index in its block, in x.
    pub fn thread(&self) -> Value<'_, U32> {
        self.special("%tid.x")
    }

    /// The thread's index in its block, in y.
    pub fn thread_y(&self) -> Value<'_, U32> {
        self.special("%tid.y")
    }

    /// The block's index in the grid, in x.
    pub fn block(&self) -> Value<'_, U32> {
        self.special("%ctaid.x")
    }

    /// The block's index in the grid, in y.
    pub fn block_y(&self) -> Value<'_, U32> {
        self.special("%ctaid.y")
    }

    /// The block's index in the grid, in z.
    pub fn block_z(&self) -> Value<'_, U32> {
        self.special("%ctaid.z")
    }

    /// Blocks of the grid in x.
    pub fn blocks(&self) -> Value<'_, U32> {
        self.special("%nctaid.x")
    }

    /// Blocks of the grid in y.
    pub fn blocks_y(&self) -> Value<'_, U32> {
        self.special("%nctaid.y")
    }

    /// Blocks of the grid in z.
    pub fn blocks_z(&self) -> Value<'_, U32> {
        self.special("%nctaid.z")
    }

    /// The index of the thread in the whole grid, in x, for blocks of `threads` threads.
    pub fn global_thread(&self, threads: u32) -> Value<'_, U32> {
        let thread = self.thread();
        self.block().mad(threads, thread)
    }

    /// A special register.
    fn special(&self, name: &'static str) -> Value<'_, U32> {
        let result = self.register();
        self.push(Line::instruction("mov.u32", vec![result.piece(), Piece::text(name)]));
        result
    }

    fn parameter<T: Type>(&self, name: &'static str, kind: ParameterKind, opcode: &'static str) -> Value<'_, T> {
        self.state.borrow_mut().parameters.push(Parameter { name, kind });
        let result = self.register::<T>().named(name);
        self.push(Line::instruction(opcode, vec![result.piece(), Piece::Text(format!("[{name}]"))]));
        result
    }

    /// A new register without a value.
    fn register<T: Type>(&self) -> Value<'_, T> {
        let mut state = self.state.borrow_mut();
        state.registers.push(Register { class: T::CLASS, prefix: T::PREFIX, name: None, moved: false });
        let id = state.registers.len() - 1;
        drop(state);
        Value::new(self, id)
    }

    /// Emits an instruction with one result.
    fn emit<T: Type>(&self, opcode: impl Into<String>, operands: Vec<Piece>) -> Value<'_, T> {
        let result = self.register();
        let mut pieces = vec![result.piece()];
        pieces.extend(operands);
        self.push(Line::instruction(opcode, pieces));
        result
    }

    /// Emits an instruction without a result.
    fn emit_effect(&self, opcode: impl Into<String>, operands: Vec<Piece>) {
        self.push(Line::instruction(opcode, operands));
    }

    fn push(&self, line: Line) {
        let mut state = self.state.borrow_mut();
        if let Line::Instruction { pieces, .. } = &line {
            for id in pieces.iter().flat_map(Piece::registers) {
                assert!(!state.registers[id].moved, "a value is used after it was moved into a variable");
            }
        }
        let depth = state.depth;
        state.lines.push(line.at(depth));
    }

    fn label(&self) -> String {
        let mut state = self.state.borrow_mut();
        state.labels += 1;
        format!("L{}", state.labels)
    }

    fn indented<R>(&self, body: impl FnOnce() -> R) -> R {
        self.state.borrow_mut().depth += 1;
        let result = body();
        self.state.borrow_mut().depth -= 1;
        result
    }
}
