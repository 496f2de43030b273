//! Global and shared memory, in elements.

use super::Assembler;
use super::print::{Line, Piece};
use super::value::{F32, Operand, Pred, Type, U16, U32, U64, Value};
use crate::{Element, ParameterKind};

/// Bytes to which every piece of shared memory is aligned.
const SHARED_ALIGNMENT: u32 = 128;

/// Global memory that a parameter points to.
#[derive(Clone, Copy)]
pub struct Global<'a> {
    base: Value<'a, U64>,
    element: Element,
    read_only: bool,
}

/// A table that a parameter points to: rows of numbers and of addresses of further memory.
#[derive(Clone, Copy)]
pub struct Table<'a> {
    base: Value<'a, U64>,
    row: &'static [ParameterKind],
}

/// A piece of the block's shared memory.
#[derive(Clone, Copy)]
pub struct Shared<'a> {
    base: Value<'a, U32>,
    offset: i64,
    element: Element,
    count: u32,
}

/// The place of an element, and of those after it.
#[derive(Clone, Copy)]
pub struct Address<'a> {
    assembler: &'a Assembler,
    register: usize,
    offset: i64,
    element: Element,
    space: Space,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Space {
    GlobalReadOnly,
    Global,
    Shared,
}

impl Assembler {
    /// Declares a parameter that points to global memory which is only read.
    pub fn read(&self, name: &'static str, element: Element) -> Global<'_> {
        Global { base: self.pointer(name, ParameterKind::Read(element)), element, read_only: true }
    }

    /// Declares a parameter that points to global memory which is written, and maybe read.
    pub fn write(&self, name: &'static str, element: Element) -> Global<'_> {
        Global { base: self.pointer(name, ParameterKind::Write(element)), element, read_only: false }
    }

    /// Declares a parameter that points to a table whose rows have a word for each of these kinds.
    pub fn table(&self, name: &'static str, row: &'static [ParameterKind]) -> Table<'_> {
        Table { base: self.pointer(name, ParameterKind::Table(row)), row }
    }

    fn pointer(&self, name: &'static str, kind: ParameterKind) -> Value<'_, U64> {
        let generic: Value<'_, U64> = self.parameter(name, kind, "ld.param.u64");
        self.emit_effect("cvta.to.global.u64", vec![generic.piece(), generic.piece()]);
        generic
    }

    /// `count` elements of the block's shared memory, aligned to 128 bytes. What they hold at first is unspecified.
    pub fn shared(&self, element: Element, count: u32) -> Shared<'_> {
        let bytes = count * element.bytes() as u32;
        let offset = {
            let mut state = self.state.borrow_mut();
            let offset = state.shared_bytes;
            state.shared_bytes += bytes.next_multiple_of(SHARED_ALIGNMENT);
            i64::from(offset)
        };
        let base = self.emit("mov.u32", vec![Piece::text("shared_memory")]);
        Shared { base, offset, element, count }
    }

    /// Starts copying 16 bytes from global to shared memory, past the registers. `bytes` of them (0 or 16) are read, the
    /// rest is zero. Both places are aligned to 16 bytes.
    pub fn copy_16_bytes<'a>(&'a self, target: Address<'a>, source: Address<'a>, bytes: impl Operand<'a, U32>) {
        let pieces = vec![target.piece(), source.piece(), Piece::text("16"), bytes.operand().0];
        self.emit_effect("cp.async.cg.shared.global", pieces);
    }

    /// As [`Assembler::copy_16_bytes`], and brings the 128 bytes around the source to the L2 cache: those that other blocks copy at
    /// about the same time come in one piece.
    pub fn copy_16_bytes_of_line<'a>(&'a self, target: Address<'a>, source: Address<'a>, bytes: impl Operand<'a, U32>) {
        let pieces = vec![target.piece(), source.piece(), Piece::text("16"), bytes.operand().0];
        self.emit_effect("cp.async.cg.shared.global.L2::128B", pieces);
    }

    /// As [`Assembler::copy_16_bytes`] for `size` bytes: 4, 8 or 16.
    pub fn copy_bytes<'a>(
        &'a self,
        target: Address<'a>,
        source: Address<'a>,
        size: usize,
        bytes: impl Operand<'a, U32>,
    ) {
        if size == 16 {
            return self.copy_16_bytes(target, source, bytes);
        }
        let pieces = vec![target.piece(), source.piece(), Piece::Text(size.to_string()), bytes.operand().0];
        self.emit_effect("cp.async.ca.shared.global", pieces);
    }

    /// Closes a group of the copies that this thread started since the last one.
    pub fn commit_copies(&self) {
        self.emit_effect("cp.async.commit_group", Vec::new());
    }

    /// Waits until at most `groups` of this thread's groups of copies are under way. A barrier makes them seen by others.
    pub fn wait_copies(&self, groups: u32) {
        self.emit_effect("cp.async.wait_group", vec![Piece::Text(groups.to_string())]);
    }
}

impl<'a> Table<'a> {
    /// The table from row `index` on.
    pub fn from_row(self, index: impl Operand<'a, U32>) -> Self {
        let bytes = Piece::Text((8 * self.row.len()).to_string());
        let pieces = vec![index.operand().0, bytes, self.base.piece()];
        Self { base: self.base.assembler.emit("mad.wide.u32", pieces), ..self }
    }

    /// The lower half of word `word` of the first row, which is a number.
    pub fn number(self, word: usize) -> Value<'a, U32> {
        assert!(self.row[word] == ParameterKind::U64, "word {word} of the table is {}", self.row[word]);
        let place = Piece::Address(self.base.id, 8 * word as i64);
        self.base.assembler.emit("ld.global.nc.u32", vec![place])
    }

    /// The memory whose address is word `word` of the first row.
    pub fn memory(self, word: usize) -> Global<'a> {
        let (element, read_only) = match self.row[word] {
            ParameterKind::Read(element) => (element, true),
            ParameterKind::Write(element) => (element, false),
            kind => panic!("word {word} of the table is {kind}"),
        };
        let place = Piece::Address(self.base.id, 8 * word as i64);
        Global { base: self.base.assembler.emit("ld.global.nc.u64", vec![place]), element, read_only }
    }

    /// The row that block `block` works on, where word `word` of each of the `rows` rows, ascending from 0, is the first
    /// block of the row.
    pub fn row_of_block(self, rows: Value<'a, U32>, word: usize, block: Value<'a, U32>) -> Self {
        let k = self.base.assembler;
        // The row lies in low..high.
        let (low, high) = (k.variable(0u32), k.variable(rows));
        k.while_(
            || (low.get() + 1).lt(high.get()),
            || {
                let middle = (low.get() + high.get()) >> 1;
                let before = self.from_row(middle).number(word).le(block);
                low.set(before.select(middle, low.get()));
                high.set(before.select(high.get(), middle));
            },
        );
        self.from_row(low.get())
    }
}

impl<'a> Global<'a> {
    /// The type of the elements.
    pub fn element(&self) -> Element {
        self.element
    }

    /// The same memory from element `elements` on.
    pub fn from(self, elements: impl Operand<'a, U64>) -> Self {
        let assembler = self.base.assembler;
        let size = Piece::Text(self.element.bytes().to_string());
        Self { base: assembler.emit("mad.lo.u64", vec![elements.operand().0, size, self.base.piece()]), ..self }
    }

    /// The same memory from element `rows · width` on; the product may exceed 32 bits.
    pub fn from_row(self, rows: impl Operand<'a, U32>, width: impl Operand<'a, U32>) -> Self {
        let elements: Value<'a, U64> =
            self.base.assembler.emit("mul.wide.u32", vec![rows.operand().0, width.operand().0]);
        self.from(elements)
    }

    /// The same memory from the byte address in a register on, as [`Address::global_address`] gives it.
    pub fn from_address(self, address: Value<'a, U64>) -> Self {
        Self { base: address, ..self }
    }

    /// The same memory, read as if others wrote it: the compiler does not move such reads over a barrier, as it may those of
    /// memory that is only read.
    pub fn between_barriers(self) -> Self {
        Self { read_only: false, ..self }
    }

    /// The place of element `index`.
    pub fn at(self, index: impl Operand<'a, U32>) -> Address<'a> {
        let assembler = self.base.assembler;
        let size = Piece::Text(self.element.bytes().to_string());
        let address: Value<'a, U64> = assembler.emit("mad.wide.u32", vec![index.operand().0, size, self.base.piece()]);
        self.address(address.id)
    }

    /// The place of the first element.
    pub fn first(self) -> Address<'a> {
        self.address(self.base.id)
    }

    /// The place of the first element of the row that lies `rows` rows of `width` elements further.
    pub fn row_after(self, width: impl Operand<'a, U32>, rows: u32) -> Address<'a> {
        let bytes = Piece::Text((rows as usize * self.element.bytes()).to_string());
        let pieces = vec![width.operand().0, bytes, self.base.piece()];
        let address: Value<'a, U64> = self.base.assembler.emit("mad.wide.u32", pieces);
        self.address(address.id)
    }

    fn address(self, register: usize) -> Address<'a> {
        let space = if self.read_only { Space::GlobalReadOnly } else { Space::Global };
        Address { assembler: self.base.assembler, register, offset: 0, element: self.element, space }
    }
}

impl<'a> Shared<'a> {
    /// The type of the elements.
    pub fn element(&self) -> Element {
        self.element
    }

    /// The number of elements.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// The place of element `index`.
    pub fn at(self, index: impl Operand<'a, U32>) -> Address<'a> {
        let assembler = self.base.assembler;
        let size = Piece::Text(self.element.bytes().to_string());
        let address: Value<'a, U32> = assembler.emit("mad.lo.u32", vec![index.operand().0, size, self.base.piece()]);
        Address { register: address.id, ..self.first() }
    }

    /// The place of the first element.
    pub fn first(self) -> Address<'a> {
        Address {
            assembler: self.base.assembler,
            register: self.base.id,
            offset: self.offset,
            element: self.element,
            space: Space::Shared,
        }
    }
}

impl<'a> Address<'a> {
    /// The place `elements` further.
    pub fn plus(self, elements: i64) -> Self {
        Self { offset: self.offset + elements * self.element.bytes() as i64, ..self }
    }

    /// The place `bytes` bytes further in shared memory, by a register.
    pub fn moved(self, bytes: impl Operand<'a, U32>) -> Self {
        assert!(self.space == Space::Shared, "only places in shared memory move by a register");
        let base: Value<'a, U32> = Value::new(self.assembler, self.register);
        Self { register: (base + bytes).id, ..self }
    }

    /// The place as a byte address of its space in a register: 64 bits for global memory.
    pub fn global_address(self) -> Value<'a, U64> {
        assert!(self.space != Space::Shared, "the address is one of shared memory");
        let base: Value<'a, U64> = Value::new(self.assembler, self.register);
        base + self.offset as u64
    }

    /// The place as a byte address of shared memory.
    pub fn shared_address(self) -> Value<'a, U32> {
        assert!(self.space == Space::Shared, "the address is one of global memory");
        let base: Value<'a, U32> = Value::new(self.assembler, self.register);
        base + self.offset as u32
    }

    /// The same bytes as elements of another type.
    pub fn cast(self, element: Element) -> Self {
        Self { element, ..self }
    }

    /// The element as f32.
    pub fn load(self) -> Value<'a, F32> {
        match self.element {
            Element::F32 => self.assembler.emit(self.opcode("ld", "f32"), vec![self.piece()]),
            Element::Bf16 => {
                let bits: Value<'a, U32> = self.assembler.emit(self.opcode("ld", "u16"), vec![self.piece()]);
                bits.low_bf16()
            }
            Element::U32 => panic!("u32 elements are read by load_u32"),
        }
    }

    /// The element as f32 where the condition holds, `otherwise` elsewhere; memory is not touched there.
    pub fn load_if(self, condition: Value<'a, Pred>, otherwise: f32) -> Value<'a, F32> {
        match self.element {
            Element::F32 => self.guarded(condition, "f32", otherwise),
            Element::Bf16 => {
                let bits: Value<'a, U32> = self.guarded(condition, "u16", otherwise.to_bits() >> 16);
                bits.low_bf16()
            }
            Element::U32 => panic!("u32 elements are read by load_u32_if"),
        }
    }

    /// The u32 element.
    pub fn load_u32(self) -> Value<'a, U32> {
        assert!(self.element == Element::U32, "elements of {} are not u32", self.element);
        self.assembler.emit(self.opcode("ld", "u32"), vec![self.piece()])
    }

    /// The u32 element where the condition holds, `otherwise` elsewhere; memory is not touched there.
    pub fn load_u32_if(self, condition: Value<'a, Pred>, otherwise: u32) -> Value<'a, U32> {
        assert!(self.element == Element::U32, "elements of {} are not u32", self.element);
        self.guarded(condition, "u32", otherwise)
    }

    /// `N` neighbouring elements as f32, in as few accesses as possible. The place is aligned to all of them, or to 16
    /// bytes where they are more.
    pub fn load_vector<const N: usize>(self) -> [Value<'a, F32>; N] {
        exactly(self.load_values(N))
    }

    /// `count` neighbouring elements as f32; aligned as for [`Address::load_vector`].
    pub fn load_values(self, count: usize) -> Vec<Value<'a, F32>> {
        unpack(self.element, &self.load_words(count * self.element.bytes() / 4))
    }

    /// `count` neighbouring 32-bit words, in as few accesses as possible; aligned as for [`Address::load_vector`].
    pub fn load_words(self, count: usize) -> Vec<Value<'a, U32>> {
        self.parts(count)
            .flat_map(|(address, width)| {
                let words: Vec<Value<'a, U32>> = (0..width).map(|_| self.assembler.register()).collect();
                let opcode = address.opcode("ld", &vector("b32", width));
                self.assembler.emit_effect(opcode, vec![words_piece(&words), address.piece()]);
                words
            })
            .collect()
    }

    /// As [`Address::load_words`] where the condition holds, zeros elsewhere; memory is not touched there.
    pub fn load_words_if(self, condition: Value<'a, Pred>, count: usize) -> Vec<Value<'a, U32>> {
        self.parts(count)
            .flat_map(|(address, width)| {
                let words: Vec<Value<'a, U32>> = (0..width).map(|_| self.assembler.constant(0u32)).collect();
                let opcode = address.opcode("ld", &vector("b32", width));
                let line = Line::instruction(opcode, vec![words_piece(&words), address.piece()]);
                self.assembler.push(line.when(condition.id, true));
                words
            })
            .collect()
    }

    /// Writes the element, rounded to its type.
    pub fn store(self, value: impl Operand<'a, F32>) {
        self.assembler.push(self.store_line(value));
    }

    /// Writes the element where the condition holds.
    pub fn store_if(self, condition: Value<'a, Pred>, value: impl Operand<'a, F32>) {
        let line = self.store_line(value);
        self.assembler.push(line.when(condition.id, true));
    }

    /// Writes the u32 element.
    pub fn store_u32(self, value: impl Operand<'a, U32>) {
        assert!(self.element == Element::U32, "elements of {} are not u32", self.element);
        self.assembler.emit_effect(self.opcode("st", "b32"), vec![self.piece(), value.operand().0]);
    }

    /// Writes the u32 element where the condition holds.
    pub fn store_u32_if(self, condition: Value<'a, Pred>, value: impl Operand<'a, U32>) {
        assert!(self.element == Element::U32, "elements of {} are not u32", self.element);
        let line = Line::instruction(self.opcode("st", "b32"), vec![self.piece(), value.operand().0]);
        self.assembler.push(line.when(condition.id, true));
    }

    /// The u32 element of global memory by which blocks tell each other something, as it is now.
    pub fn load_flag(self) -> Value<'a, U32> {
        self.check_flag();
        self.assembler.emit("ld.relaxed.gpu.global.u32", vec![self.piece()])
    }

    /// Writes such an element.
    pub fn store_flag(self, value: impl Operand<'a, U32>) {
        self.check_flag();
        self.assembler.emit_effect("st.relaxed.gpu.global.u32", vec![self.piece(), value.operand().0]);
    }

    fn check_flag(self) {
        let writable = self.element == Element::U32 && self.space == Space::Global;
        assert!(writable, "a flag is a u32 of global memory that is written");
    }

    /// Writes neighbouring elements in as few accesses as possible; aligned as for [`Address::load_vector`].
    pub fn store_vector(self, values: &[Value<'a, F32>]) {
        let words: Vec<Value<'a, U32>> = match self.element {
            Element::F32 => values.iter().map(|value| value.bits()).collect(),
            Element::Bf16 => values.chunks_exact(2).map(|pair| pair[0].pack_bf16(pair[1])).collect(),
            Element::U32 => panic!("u32 elements are written by store_words"),
        };
        assert!(words.len() * 4 == values.len() * self.element.bytes(), "an odd number of bf16");
        self.store_words(&words);
    }

    /// Writes neighbouring 32-bit words; aligned as for [`Address::load_vector`].
    pub fn store_words(self, words: &[Value<'a, U32>]) {
        let mut rest = words;
        for (address, width) in self.parts(words.len()) {
            let (now, later) = rest.split_at(width);
            let opcode = address.opcode("st", &vector("b32", width));
            self.assembler.emit_effect(opcode, vec![address.piece(), words_piece(now)]);
            rest = later;
        }
    }

    /// The widest accesses that together cover `count` words: (place, words).
    fn parts(self, count: usize) -> impl Iterator<Item = (Self, usize)> {
        let width = match count {
            0 => panic!("an access of no words"),
            1 | 2 => count,
            _ => 4,
        };
        assert!(count.is_multiple_of(width), "{count} words are no whole number of accesses");
        (0..count / width).map(move |part| (Self { offset: self.offset + (part * width * 4) as i64, ..self }, width))
    }

    pub(super) fn piece(self) -> Piece {
        Piece::Address(self.register, self.offset)
    }

    pub(super) fn is_shared(self) -> bool {
        self.space == Space::Shared
    }

    fn opcode(self, access: &str, kind: &str) -> String {
        match self.space {
            Space::GlobalReadOnly if access == "st" => panic!("the parameter was declared as only read"),
            Space::GlobalReadOnly => format!("{access}.global.nc.{kind}"),
            Space::Global => format!("{access}.global.{kind}"),
            Space::Shared => format!("{access}.shared.{kind}"),
        }
    }

    fn guarded<T: Type>(self, condition: Value<'a, Pred>, kind: &str, otherwise: impl Operand<'a, T>) -> Value<'a, T> {
        let value: Value<'a, T> = self.assembler.constant(otherwise);
        let line = Line::instruction(self.opcode("ld", kind), vec![value.piece(), self.piece()]);
        self.assembler.push(line.when(condition.id, true));
        value
    }

    fn store_line(self, value: impl Operand<'a, F32>) -> Line {
        match self.element {
            Element::F32 => Line::instruction(self.opcode("st", "f32"), vec![self.piece(), value.operand().0]),
            Element::Bf16 => {
                let rounded: Value<'a, U16> = self.assembler.emit("cvt.rn.bf16.f32", vec![value.operand().0]);
                Line::instruction(self.opcode("st", "b16"), vec![self.piece(), rounded.piece()])
            }
            Element::U32 => panic!("u32 elements are written by store_u32"),
        }
    }
}

fn vector(kind: &str, width: usize) -> String {
    if width == 1 { kind.to_owned() } else { format!("v{width}.{kind}") }
}

fn words_piece(words: &[Value<'_, U32>]) -> Piece {
    match words {
        [word] => word.piece(),
        _ => Piece::Vector(words.iter().map(|word| word.id).collect()),
    }
}

/// The values of neighbouring elements of a floating-point type, from the words that hold them.
///
/// # Panics
/// For u32, whose elements are the words.
pub fn unpack<'a>(element: Element, words: &[Value<'a, U32>]) -> Vec<Value<'a, F32>> {
    match element {
        Element::F32 => words.iter().map(|word| word.as_f32()).collect(),
        Element::Bf16 => words.iter().flat_map(|word| word.unpack_bf16()).collect(),
        Element::U32 => panic!("u32 elements are read by load_words"),
    }
}

fn exactly<T, const N: usize>(values: Vec<T>) -> [T; N] {
    match values.try_into() {
        Ok(values) => values,
        Err(_) => panic!("a vector of another length than asked for"),
    }
}
