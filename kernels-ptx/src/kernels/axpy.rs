//! Axpy: `y[i] = a · x[i] + y[i]` for `0 ≤ i < count`, in f32 with one rounding (fused multiply-add).
//!
//! - Layout: one thread per element, 256 threads per block; the 32 lanes of a warp touch 128 neighbouring bytes of each
//!   operand.
//! - Traffic: 12 bytes per element (x and y read, y written) for two operations. Bound by memory.
//! - Source: BLAS level 1, `saxpy`.

use crate::{Element, Kernel, Parameter, ParameterKind, Target, Work};

const THREADS: u32 = 256;

/// Adds a multiple of one vector to another.
///
/// Parameters: `y` (f32, `count` elements, read and written), `x` (f32, `count` elements), `a` (f32), `count` (u64).
pub struct Axpy;

impl Axpy {
    /// The kernel's description and text.
    pub fn build(&self) -> Kernel {
        Kernel::new(
            "axpy_f32",
            "y[i] = a * x[i] + y[i] for 0 <= i < count; one thread per element, one rounding",
            vec![
                Parameter { name: "y", kind: ParameterKind::Write(Element::F32) },
                Parameter { name: "x", kind: ParameterKind::Read(Element::F32) },
                Parameter { name: "a", kind: ParameterKind::F32 },
                Parameter { name: "count", kind: ParameterKind::U64 },
            ],
            [THREADS, 1, 1],
            Target::Sm80,
            &format!(
                "
    .reg .pred %beyond;
    .reg .b32  %block, %thread;
    .reg .f32  %a, %x_value, %y_value;
    .reg .b64  %index, %lane, %count, %x, %y;

    // index = block * {THREADS} + thread; threads past the end leave
    mov.u32         %block, %ctaid.x;
    mov.u32         %thread, %tid.x;
    cvt.u64.u32     %lane, %thread;
    mad.wide.u32    %index, %block, {THREADS}, %lane;
    ld.param.u64    %count, [count];
    setp.ge.u64     %beyond, %index, %count;
    @%beyond bra    done;

    // addresses of x[index] and y[index]
    ld.param.u64    %x, [x];
    cvta.to.global.u64 %x, %x;
    mad.lo.u64      %x, %index, 4, %x;
    ld.param.u64    %y, [y];
    cvta.to.global.u64 %y, %y;
    mad.lo.u64      %y, %index, 4, %y;

    // y[index] = a * x[index] + y[index]
    ld.param.f32    %a, [a];
    ld.global.f32   %x_value, [%x];
    ld.global.f32   %y_value, [%y];
    fma.rn.f32      %y_value, %a, %x_value, %y_value;
    st.global.f32   [%y], %y_value;
done:
    ret;"
            ),
            &["count"],
            |sizes| Work { bytes: 12 * sizes[0], operations: 2 * sizes[0] },
        )
    }

    /// Blocks for `count` elements; `None` when one launch cannot cover them.
    pub fn grid(count: u64) -> Option<[u32; 3]> {
        super::one_thread_per_element(count, THREADS)
    }
}
