#![allow(missing_docs)]
use kernels_ptx::{Element, Kernel, ParameterKind};
use runtime::{Argument, Buffer, Device, sim};
use std::time::Instant;
enum A {
    M(usize),
    U(u32),
    L(u64),
    F(f32),
}
fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let cases: Vec<(&str, [u32; 3], Vec<A>)> = vec![
        ("add_f32", [1024, 1, 1], vec![A::M(262144 * 4), A::M(262144 * 4), A::M(262144 * 4), A::U(262144)]),
        ("silu_bf16", [1024, 1, 1], vec![A::M(262144 * 2), A::M(262144 * 2), A::U(262144)]),
        (
            "matrix_product_nn_bf16_128",
            [16, 1, 1],
            vec![
                A::M(512 * 512 * 2),
                A::M(512 * 512 * 2),
                A::M(512 * 512 * 2),
                A::U(512),
                A::U(512),
                A::U(512),
                A::U(512),
            ],
        ),
        (
            "matrix_product_f32",
            [64, 1, 1],
            vec![
                A::M(512 * 512 * 4),
                A::M(512 * 512 * 4),
                A::M(512 * 512 * 4),
                A::U(512),
                A::U(512),
                A::U(512),
                A::U(512),
            ],
        ),
        (
            "rms_norm_forward_bf16_bf16",
            [128, 1, 1],
            vec![
                A::M(1024 * 512 * 2),
                A::M(1024 * 4),
                A::M(1024 * 512 * 2),
                A::M(512 * 2),
                A::F(1e-5),
                A::U(1024),
                A::U(512),
            ],
        ),
    ];
    for kernel in kernels_ptx::catalogue() {
        if wanted.iter().any(|w| w == "params") {
            println!(
                "{} {:?} block {:?}",
                kernel.name,
                kernel.parameters.iter().map(|p| (p.name, p.kind)).collect::<Vec<_>>(),
                kernel.block
            );
        }
        for (name, grid, args) in &cases {
            if kernel.name == *name && (wanted.is_empty() || wanted.iter().any(|w| w == name)) {
                go(&kernel, *grid, args);
            }
        }
    }
}
fn go(kernel: &Kernel, grid: [u32; 3], args: &[A]) {
    let device = Device::sim();
    let function = device.load(kernel).unwrap();
    let mut buffers: Vec<Option<Buffer>> = args
        .iter()
        .map(|a| match a {
            A::M(n) => {
                let b = device.upload(&vec![0u8; *n]).unwrap();
                Some(b)
            }
            _ => None,
        })
        .collect();
    let mut best = f64::MAX;
    let before: u64 = sim::statistics().get(&kernel.name).map_or(0, |s| s.instructions.values().sum());
    for _ in 0..3 {
        let mut arguments: Vec<Argument<'_>> = Vec::new();
        for ((a, b), p) in args.iter().zip(buffers.iter_mut()).zip(&kernel.parameters) {
            arguments.push(match (a, p.kind) {
                (A::U(v), _) => Argument::U32(*v),
                (A::L(v), _) => Argument::U64(*v),
                (A::F(v), _) => Argument::F32(*v),
                (A::M(_), ParameterKind::Read(e)) => Argument::Read(b.as_ref().unwrap(), e),
                (A::M(_), ParameterKind::Write(e)) => Argument::Write(b.as_mut().unwrap(), e),
                _ => panic!(),
            });
        }
        let start = Instant::now();
        function.launch(grid, &arguments).unwrap();
        best = best.min(start.elapsed().as_secs_f64());
    }
    let stats = &sim::statistics()[&kernel.name];
    let count = (stats.instructions.values().sum::<u64>() - before) / 3;
    let mut kinds: Vec<_> = stats.instructions.iter().map(|(k, c)| (c / 3, k)).collect();
    kinds.sort();
    kinds.reverse();
    println!(
        "{:32} {:9} warp instructions {:7.1} ms {:6.1} ns each  {:?}",
        kernel.name,
        count,
        best * 1e3,
        best * 1e9 / count as f64,
        &kinds[..kinds.len().min(6)]
    );
    let _ = Element::F32;
}
