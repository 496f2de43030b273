//! Fill: `y[i] = value` for `0 ≤ i < count`.
//!
//! - Layout: one thread per element, 256 threads per block; the 32 lanes of a warp write 128 neighbouring bytes.
//! - Traffic: 4 bytes written per element, nothing read. Bound by memory.

use crate::{Element, Kernel, Parameter, ParameterKind, Target, Work};

const THREADS: u32 = 256;

/// Writes one pattern of 32 bits into every element of a buffer.
///
/// Parameters: `y` (u32, `count` elements, written), `value` (the pattern), `count` (u64).
pub struct Fill;

impl Fill {
    /// The kernel's description and text.
    pub fn build(&self) -> Kernel {
        Kernel::new(
            "fill_u32",
            "y[i] = value for 0 <= i < count; one thread per element",
            vec![
                Parameter { name: "y", kind: ParameterKind::Write(Element::U32) },
                Parameter { name: "value", kind: ParameterKind::U32 },
                Parameter { name: "count", kind: ParameterKind::U64 },
            ],
            [THREADS, 1, 1],
            Target::Sm80,
            &format!(
                "
    .reg .pred %beyond;
    .reg .b32  %block, %thread, %value;
    .reg .b64  %index, %lane, %count, %y;

    // index = block * {THREADS} + thread; threads past the end leave
    mov.u32         %block, %ctaid.x;
    mov.u32         %thread, %tid.x;
    cvt.u64.u32     %lane, %thread;
    mad.wide.u32    %index, %block, {THREADS}, %lane;
    ld.param.u64    %count, [count];
    setp.ge.u64     %beyond, %index, %count;
    @%beyond bra    done;

    // y[index] = value
    ld.param.u32    %value, [value];
    ld.param.u64    %y, [y];
    cvta.to.global.u64 %y, %y;
    mad.lo.u64      %y, %index, 4, %y;
    st.global.u32   [%y], %value;
done:
    ret;"
            ),
            &["count"],
            |sizes| Work { bytes: 4 * sizes[0], operations: 0 },
        )
    }

    /// Blocks for `count` elements; `None` when one launch cannot cover them.
    pub fn grid(count: u64) -> Option<[u32; 3]> {
        super::one_thread_per_element(count, THREADS)
    }
}
