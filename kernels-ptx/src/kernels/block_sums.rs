//! How the blocks of one launch tell later ones their sums, so that no other launch has to add them up.
//!
//! - A sum is its own flag: memory that is zero holds none yet (a sum of zero is written as −0), and is zero again when the
//!   sum has been taken. No order of accesses is needed beyond each word's own.
//! - Who waits comes after whom it waits for. This needs blocks to begin in the order of their numbers, as GPUs are seen to
//!   do, and as the simulator does. Blocks of the launch that follows take no room from any of these: they begin when all of these
//!   have begun ([`Kernel::overlapping_text`](crate::Kernel::overlapping_text)).

use crate::asm::{Address, Assembler, F32, Value};

/// Leaves a sum at a place (u32) for the block that takes it.
pub(crate) fn tell<'a>(place: Address<'a>, sum: Value<'a, F32>) {
    place.store_flag(sum.eq(0.0).select(-0.0, sum).bits());
}

/// Takes the sums at these places (u32) as soon as all are there. No other thread takes any of them; a place may occur twice.
pub(crate) fn take<'a>(k: &'a Assembler, places: &[Address<'a>]) -> Vec<Value<'a, F32>> {
    let words: Vec<_> = places.iter().map(|_| k.variable(0u32)).collect();
    let missing = || {
        for (place, word) in places.iter().zip(&words) {
            word.set(place.load_flag());
        }
        let least = words.iter().map(|word| word.get()).reduce(|least, word| least.min(word));
        least.unwrap_or_else(|| k.constant(1u32)).eq(0)
    };
    k.while_(missing, || ());
    places.iter().for_each(|place| place.store_flag(0u32));
    words.iter().map(|word| word.get().as_f32()).collect()
}
