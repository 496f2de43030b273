//! Faults on purpose, one per tool of compute-sanitizer: `.ci/sanitize` runs them to prove that it would see real ones.
//!
//! Ignored otherwise: a GPU's context may be lost by them.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use kernels_ptx::kernels::axpy::Axpy;
use kernels_ptx::kernels::matrix_product_f32::MatrixProductF32;
use kernels_ptx::{Element, Kernel, KernelSource};
use runtime::{Argument, Buffer, Device};

fn device() -> Device {
    grafter_tests::device()
}

fn ones(device: &Device, count: usize) -> Buffer {
    let mut buffer = device.allocate(4 * count).unwrap();
    buffer.copy_from_host(bytemuck::cast_slice(&vec![1.0f32; count])).unwrap();
    buffer
}

fn axpy(device: &Device, y: &mut Buffer, x: &Buffer, count: u64) {
    let arguments =
        [Argument::Write(y, Element::F32), Argument::Read(x, Element::F32), Argument::F32(2.0), Argument::U64(count)];
    // The simulator and a lost context refuse; the sanitizer has seen the fault either way.
    let _ = device.load(&Axpy.build()).unwrap().launch(Axpy::grid(count).unwrap(), &arguments);
    let _ = device.synchronize();
}

/// A product of 64 × 64 × 64 by a kernel whose text was changed.
fn product(device: &Device, change: impl Fn(&mut Kernel)) {
    let mut kernel = MatrixProductF32 { bias: false, residual: false }.build();
    let before = kernel.text.clone();
    change(&mut kernel);
    assert_ne!(kernel.text, before, "nothing was planted");
    let (a, b) = (ones(device, 64 * 64), ones(device, 64 * 64));
    let mut c = ones(device, 64 * 64);
    let mut arguments =
        vec![Argument::Write(&mut c, Element::F32), Argument::Read(&a, Element::F32), Argument::Read(&b, Element::F32)];
    arguments.extend([64, 64, 64, 64, 64, 1, 64, 1].map(Argument::U32));
    let _ = device.load(&kernel).unwrap().launch([1, 1, 1], &arguments);
    let _ = device.synchronize();
}

#[test]
#[ignore = "a planted fault"]
fn memcheck_sees_an_access_out_of_bounds() {
    let device = device();
    let x = ones(&device, 1 << 10);
    axpy(&device, &mut ones(&device, 1 << 10), &x, 1 << 24);
}

#[test]
#[ignore = "a planted fault"]
fn initcheck_sees_a_read_of_what_nothing_wrote() {
    let device = device();
    let x = device.allocate(64 << 20).unwrap();
    axpy(&device, &mut ones(&device, 1 << 10), &x, 1 << 10);
}

#[test]
#[ignore = "a planted fault"]
fn racecheck_sees_a_missing_barrier() {
    product(&device(), |kernel| kernel.text = kernel.text.replace("bar.sync 0;", ""));
}

#[test]
#[ignore = "a planted fault"]
fn synccheck_sees_a_barrier_that_some_threads_miss() {
    product(&device(), |kernel| {
        let barrier = "bar.sync 0;";
        let diverged = "{ .reg .pred %even; .reg .b32 %parity; mov.u32 %parity, %tid.x; and.b32 %parity, %parity, 1; \
                        setp.eq.u32 %even, %parity, 0; @%even bar.sync 0; }";
        kernel.text = kernel.text.replacen(barrier, diverged, 1);
    });
}
