//! Asking for memory before it is needed.

/// Starts loading the cache line that holds the element `ahead` places after the start of `values`. It may lie beyond the
/// end: nothing is read then. No effect where the processor has no such instruction.
#[inline(always)]
pub fn prefetch<T>(values: &[T], ahead: usize) {
    let address = values.as_ptr().wrapping_add(ahead);
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: the instruction is part of every x86-64 processor, reads no value and never faults, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}
