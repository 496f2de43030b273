//! Instructions that reach memory.

use super::super::program::{AtomicOp, Element, NO_SLOT, Op, Slot, Space, Unary32, Unary64};
use super::super::syntax::{Operand, Width, type_bytes};
use super::instruction::{Decoder, Qualifiers};
use super::operands::Decoded;

const SPACES: [(&str, Space); 3] =
    [("global", Space::Global), ("shared", Space::Shared), ("shared::cta", Space::Shared)];

/// Takes qualifiers of caches and of ordering; whether accesses are atomic.
fn hints(q: &mut Qualifiers<'_>) -> bool {
    let mut atomic = false;
    for order in ["volatile", "relaxed", "acquire", "release", "acq_rel"] {
        atomic |= q.takes(order);
    }
    q.ignore(&["weak", "cta", "cluster", "gpu", "sys"]);
    q.ignore_if(|qualifier| {
        ["ca", "cg", "cs", "lu", "cv", "wb", "wt", "L2::64B", "L2::128B", "L2::256B"].contains(&qualifier)
            || qualifier.starts_with("L1::")
            || qualifier.starts_with("L2::evict")
    });
    atomic
}

pub(super) fn load<'a>(decoder: &mut Decoder<'_, '_, 'a>, q: &mut Qualifiers<'a>) -> Decoded<Op> {
    if q.takes("param") {
        return load_parameter(decoder, q);
    }
    let atomic = hints(q);
    let read_only = q.takes("nc") | (q.name == "ldu");
    let space = q.choose(&SPACES).unwrap_or(Space::Generic);
    let count = q.choose(&[("v2", 2), ("v4", 4)]).unwrap_or(1);
    let kind = q.kind()?;
    let [d, address] = decoder.operands()?;
    let bytes = type_bytes(kind).ok_or_else(|| format!("`.{kind}` is no type of memory"))?;
    vector_fits(bytes, count)?;
    let address = decoder.to.address(address, space == Space::Shared)?;
    let elements = decoder.to.elements(d);
    if elements.len() != usize::from(count) {
        return Err(format!("this load fills {count} registers, not {}", elements.len()));
    }
    let mut slots = [NO_SLOT; 4];
    let mut element = None;
    for (slot, operand) in slots.iter_mut().zip(elements) {
        let (register, width) = decoder.to.result_at_least(operand, bytes)?;
        *slot = register;
        let own = loaded(kind, bytes, width);
        if element.is_some_and(|other| other != own) {
            return Err("the registers of one load differ in width".to_owned());
        }
        element = Some(own);
    }
    let element = element.ok_or("the load has no result")?;
    Ok(Op::Load { space, element, count, read_only, atomic, address, d: slots })
}

/// How an element fills a register.
fn loaded(kind: &str, bytes: u32, register: Width) -> Element {
    let signed = kind.starts_with('s');
    match (bytes, register, signed) {
        (1, Width::B64, true) => Element::S8To64,
        (1, Width::B64, false) => Element::U8To64,
        (1, Width::B16, true) => Element::S8To16,
        (1, Width::B32, true) => Element::S8,
        (1, ..) => Element::U8,
        (2, Width::B64, true) => Element::S16To64,
        (2, Width::B64, false) => Element::U16To64,
        (2, Width::B32, true) => Element::S16,
        (2, ..) => Element::U16,
        (4, Width::B64, true) => Element::S32To64,
        (4, Width::B64, false) => Element::U32To64,
        (4, ..) => Element::B32,
        _ => Element::B64,
    }
}

fn vector_fits(bytes: u32, count: u8) -> Decoded<()> {
    if bytes * u32::from(count) > 16 {
        return Err("one access moves at most 16 bytes".to_owned());
    }
    Ok(())
}

fn load_parameter<'a>(decoder: &mut Decoder<'_, '_, 'a>, q: &mut Qualifiers<'a>) -> Decoded<Op> {
    let kind = q.kind()?;
    let bytes = type_bytes(kind).ok_or_else(|| format!("`.{kind}` is no type of a parameter"))?;
    let [d, address] = decoder.operands()?;
    let Operand::Memory(base, 0) = address else {
        return Err("a parameter is read as a whole: `[name]`".to_owned());
    };
    let Operand::Parameter(parameter) = **base else {
        return Err("ld.param wants the name of a parameter in brackets".to_owned());
    };
    let declared = &decoder.to.entry().parameters[parameter];
    if bytes > declared.bytes {
        return Err(format!("the parameter {} has {} bytes, not {bytes}", declared.name, declared.bytes));
    }
    let (d, width) = decoder.to.result_at_least(d, bytes)?;
    if width == Width::B64 {
        if bytes != 8 {
            return Err(format!("a register of {bytes} bytes is wanted for `.{kind}`"));
        }
        return Ok(Op::Unary64 { op: Unary64::Move, d, a: decoder.to.parameter(parameter, true) });
    }
    let op = match (kind, bytes) {
        ("s8", _) => Unary32::SignExtend8,
        ("s16", _) => Unary32::SignExtend16,
        (_, 1) => Unary32::ZeroExtend8,
        (_, 2) => Unary32::ZeroExtend16,
        _ => Unary32::Move,
    };
    Ok(Op::Unary32 { op, d, a: decoder.to.parameter(parameter, false) })
}

pub(super) fn store<'a>(decoder: &mut Decoder<'_, '_, 'a>, q: &mut Qualifiers<'a>) -> Decoded<Op> {
    let atomic = hints(q);
    let space = q.choose(&SPACES).unwrap_or(Space::Generic);
    let count = q.choose(&[("v2", 2), ("v4", 4)]).unwrap_or(1);
    let kind = q.kind()?;
    let [address, a] = decoder.operands()?;
    let bytes = type_bytes(kind).ok_or_else(|| format!("`.{kind}` is no type of memory"))?;
    vector_fits(bytes, count)?;
    let address = decoder.to.address(address, space == Space::Shared)?;
    let elements = decoder.to.elements(a);
    if elements.len() != usize::from(count) {
        return Err(format!("this store takes {count} registers, not {}", elements.len()));
    }
    let mut slots: [Slot; 4] = [NO_SLOT; 4];
    let mut wide = None;
    for (slot, operand) in slots.iter_mut().zip(elements) {
        let (register, own) = decoder.to.at_least(operand, bytes, kind.starts_with('f'))?;
        *slot = register;
        if wide.is_some_and(|other| other != own) {
            return Err("the registers of one store differ in width".to_owned());
        }
        wide = Some(own);
    }
    let element = match (bytes, wide) {
        (1, Some(true)) => Element::U8To64,
        (1, _) => Element::U8,
        (2, Some(true)) => Element::U16To64,
        (2, _) => Element::U16,
        (4, Some(true)) => Element::U32To64,
        (4, _) => Element::B32,
        _ => Element::B64,
    };
    Ok(Op::Store { space, element, count, atomic, address, a: slots })
}

pub(super) fn atomic<'a>(decoder: &mut Decoder<'_, '_, 'a>, q: &mut Qualifiers<'a>) -> Decoded<Op> {
    hints(q);
    let space = q.choose(&SPACES).unwrap_or(Space::Generic);
    let kind = q.kind()?;
    let name = q.first().unwrap_or_default();
    let wide = match kind {
        "u32" | "s32" | "b32" => false,
        "u64" | "s64" | "b64" => true,
        _ if kind.contains('f') => {
            return Err(format!(
                "{} of {kind} is refused: the order of such additions, and with it the result, changes from run to run",
                q.name
            ));
        }
        _ => return Err(format!("the simulator does not know {} of `.{kind}`", q.name)),
    };
    let signed = kind.starts_with('s');
    let op = match (name, signed) {
        ("add", _) => AtomicOp::Add,
        ("min", false) => AtomicOp::MinU,
        ("min", true) => AtomicOp::MinS,
        ("max", false) => AtomicOp::MaxU,
        ("max", true) => AtomicOp::MaxS,
        ("and", _) => AtomicOp::And,
        ("or", _) => AtomicOp::Or,
        ("xor", _) => AtomicOp::Xor,
        ("exch", _) => AtomicOp::Exchange,
        ("cas", _) => AtomicOp::CompareAndSwap,
        ("inc", _) => AtomicOp::Increment,
        ("dec", _) => AtomicOp::Decrement,
        _ => return Err(format!("the simulator does not know {}.{name}", q.name)),
    };
    let (d, rest) = match (q.name, decoder.from.operands.split_first()) {
        ("atom", Some((d, rest))) => (Some(d), rest),
        _ => (None, decoder.from.operands.as_slice()),
    };
    let (address, b, c) = match (op, rest) {
        (AtomicOp::CompareAndSwap, [address, b, c]) => (address, b, c),
        (AtomicOp::CompareAndSwap, _) => return Err("cas wants an address and two values".to_owned()),
        (_, [address, b]) => (address, b, b),
        _ => return Err(format!("{} wants an address and a value", q.name)),
    };
    let address = decoder.to.address(address, space == Space::Shared)?;
    let (b, c) =
        if wide { (decoder.to.double(b)?, decoder.to.double(c)?) } else { (decoder.to.word(b)?, decoder.to.word(c)?) };
    let d = match (d, wide) {
        (None, _) => NO_SLOT,
        (Some(d), true) => decoder.to.double_result(d)?,
        (Some(d), false) => decoder.to.word_result(d)?,
    };
    Ok(Op::Atomic { space, op, wide, d, address, b, c })
}

/// `cp.async` and what belongs to it.
pub(super) fn copy<'a>(decoder: &mut Decoder<'_, '_, 'a>, q: &mut Qualifiers<'a>) -> Decoded<Op> {
    if !q.takes("async") {
        return Err("the simulator knows cp.async only".to_owned());
    }
    if q.takes("commit_group") {
        let [] = decoder.operands()?;
        return Ok(Op::CommitCopies);
    }
    if q.takes("wait_all") {
        let [] = decoder.operands()?;
        return Ok(Op::WaitCopies { groups: u32::MAX });
    }
    if q.takes("wait_group") {
        let [groups] = decoder.operands()?;
        return match groups {
            Operand::Number(super::super::lexer::Number::Integer(groups)) => {
                Ok(Op::WaitCopies { groups: (*groups).min(u64::from(u32::MAX - 1)) as u32 })
            }
            _ => Err("cp.async.wait_group wants a number".to_owned()),
        };
    }
    let only_16 = q.takes("cg");
    q.ignore(&["ca", "L2::64B", "L2::128B", "L2::256B"]);
    if !(q.takes("shared") | q.takes("shared::cta")) || !q.takes("global") {
        return Err("the simulator knows cp.async from global to shared memory only".to_owned());
    }
    let (target, source, bytes, source_bytes) = match decoder.from.operands.as_slice() {
        [target, source, bytes] => (target, source, bytes, None),
        [target, source, bytes, source_bytes] => (target, source, bytes, Some(source_bytes)),
        _ => return Err("cp.async wants two addresses and a number of bytes".to_owned()),
    };
    let bytes = match bytes {
        Operand::Number(super::super::lexer::Number::Integer(bytes @ (4 | 8 | 16))) if *bytes == 16 || !only_16 => {
            *bytes as u8
        }
        _ if only_16 => return Err("cp.async.cg copies 16 bytes".to_owned()),
        _ => return Err("cp.async copies 4, 8 or 16 bytes".to_owned()),
    };
    let target = decoder.to.address(target, true)?;
    let source = decoder.to.address(source, false)?;
    let source_bytes = source_bytes.map_or(Ok(NO_SLOT), |operand| decoder.to.word(operand))?;
    Ok(Op::CopyAsync { bytes, target, source, source_bytes })
}

/// `ldmatrix` and `stmatrix`.
pub(super) fn matrix<'a>(decoder: &mut Decoder<'_, '_, 'a>, q: &mut Qualifiers<'a>) -> Decoded<Op> {
    q.ignore(&["sync", "aligned", "shared", "shared::cta"]);
    if !q.takes("m8n8") || !q.takes("b16") {
        return Err(format!("the simulator knows {} of m8n8 and b16 only", q.name));
    }
    let count: u8 = q.choose(&[("x1", 1), ("x2", 2), ("x4", 4)]).ok_or("`.x1`, `.x2` or `.x4` is missing")?;
    let transposed = q.takes("trans");
    let load = q.name == "ldmatrix";
    let [first, second] = decoder.operands()?;
    let (registers, address) = if load { (first, second) } else { (second, first) };
    let address = decoder.to.address(address, true)?;
    let elements = decoder.to.elements(registers);
    if elements.len() != usize::from(count) {
        return Err(format!("{count} registers are wanted, not {}", elements.len()));
    }
    let mut slots: [Slot; 4] = [NO_SLOT; 4];
    for (slot, operand) in slots.iter_mut().zip(elements) {
        *slot = if load { decoder.to.word_result(operand)? } else { decoder.to.word(operand)? };
    }
    Ok(if load {
        Op::LoadMatrix { count, transposed, address, d: slots }
    } else {
        Op::StoreMatrix { count, transposed, address, a: slots }
    })
}
