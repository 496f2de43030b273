//! The simulator as a device: buffers, launches, and what happens after a fault.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use kernels_ptx::kernels::{axpy::Axpy, fill::Fill};
use kernels_ptx::{Element, Kernel, KernelSource, Parameter, ParameterKind};
use runtime::{Argument, Buffer, Device, DeviceKind, Error, Table, Word, sim};

fn buffer(values: &[f32]) -> Buffer {
    Device::sim().upload(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>()).unwrap()
}

fn values(buffer: &Buffer) -> Vec<f32> {
    let mut bytes = vec![0; buffer.len()];
    buffer.copy_to_host(&mut bytes).unwrap();
    bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

/// A kernel of one thread with these parameters (u64 for memory) and this body; registers %r<8>, %rd<8>.
fn kernel(name: &str, parameters: &[(&'static str, ParameterKind)], body: &str) -> Kernel {
    let mut kernel = Fill.build();
    let declared: Vec<String> = parameters.iter().map(|(name, _)| format!(".param .u64 {name}")).collect();
    kernel.name = name.to_owned();
    kernel.text = format!(
        ".version 7.0\n.target sm_80\n.address_size 64\n.visible .entry {name}({})\n{{\n.reg .b32 %r<8>;\n.reg .b64 %rd<8>;\n\
         {body}\nret;\n}}\n",
        declared.join(", ")
    );
    kernel.parameters = parameters.iter().map(|&(name, kind)| Parameter { name, kind }).collect();
    kernel.block = [1, 1, 1];
    kernel
}

fn fault(error: Error) -> sim::Fault {
    match error {
        Error::Simulator(fault) => *fault,
        error => panic!("no fault of the simulator: {error}"),
    }
}

#[test]
fn the_device_has_a_name_and_memory() {
    let device: Device = "sim".parse().unwrap();
    assert_eq!((device.kind(), device.to_string()), (DeviceKind::Sim, "sim".to_owned()));
    assert!(device.is_gpu() && !device.is_cpu() && device == Device::sim());
    device.synchronize().unwrap();
    let mut a = buffer(&[1.0, 2.0]);
    let mut b = device.allocate(8).unwrap();
    assert!(device.memory_usage().in_use >= 16);
    assert!(values(&b)[0].is_nan(), "nothing has written it");
    b.copy_from(&a).unwrap();
    a.set_zero().unwrap();
    assert_eq!((values(&a), values(&b)), (vec![0.0, 0.0], vec![1.0, 2.0]));
    assert!(matches!(a.as_slice::<f32>(), Err(Error::NotOnHost { .. })));
    assert!(matches!(device.home_stream(), Err(Error::NotAGpu { .. })));
    assert!(matches!(b.copy_from(&buffer(&[1.0])), Err(Error::SizeMismatch { .. })));
}

#[test]
fn a_kernel_runs_and_is_counted() {
    let axpy = Device::sim().load(&Axpy.build()).unwrap();
    let count = 1000;
    let x = buffer(&(0..count).map(|i| i as f32).collect::<Vec<_>>());
    let mut y = buffer(&vec![1.0; count]);
    let arguments = [
        Argument::Write(&mut y, Element::F32),
        Argument::Read(&x, Element::F32),
        Argument::F32(2.0),
        Argument::U64(count as u64),
    ];
    axpy.launch([4, 1, 1], &arguments).unwrap();
    assert_eq!(values(&y), (0..count).map(|i| 2.0 * i as f32 + 1.0).collect::<Vec<_>>());
    let statistics = &sim::statistics()["axpy_f32"];
    assert!(statistics.launches >= 1);
    assert!(statistics.instructions["ld"] > 0 && statistics.instructions["st"] > 0, "{statistics:?}");
}

#[test]
fn a_text_for_launches_that_overlap_does_what_the_plain_one_does() {
    let mut kernel = Axpy.build();
    kernel.text = kernel.overlapping_text().unwrap();
    let (mut y, x) = (buffer(&[1.0, 2.0, 3.0]), buffer(&[10.0, 20.0, 30.0]));
    let arguments =
        [Argument::Write(&mut y, Element::F32), Argument::Read(&x, Element::F32), Argument::F32(0.5), Argument::U64(3)];
    Device::sim().load(&kernel).unwrap().launch(Axpy::grid(3).unwrap(), &arguments).unwrap();
    assert_eq!(values(&y), [6.0, 12.0, 18.0]);
}

#[test]
fn a_fault_leaves_the_device_usable() {
    let axpy = Device::sim().load(&Axpy.build()).unwrap();
    let x = buffer(&[1.0; 32]);
    let mut y = buffer(&[1.0; 16]);
    let count = Argument::U64(32);
    let arguments =
        [Argument::Write(&mut y, Element::F32), Argument::Read(&x, Element::F32), Argument::F32(2.0), count];
    let fault = fault(axpy.launch([1, 1, 1], &arguments).unwrap_err());
    assert_eq!((fault.kernel.as_str(), fault.place), ("axpy_f32", Some(([0; 3], [16, 0, 0]))));
    assert!(fault.problem.contains("4 bytes at byte 64 of y, which has 64 bytes: out of bounds"), "{fault}");
    assert!(fault.line > 0 && fault.source.contains("global"), "{fault}");
    let arguments = [
        Argument::Write(&mut y, Element::F32),
        Argument::Read(&x, Element::F32),
        Argument::F32(2.0),
        Argument::U64(16),
    ];
    axpy.launch([1, 1, 1], &arguments).unwrap();
    assert_eq!(values(&y), [3.0; 16]);
}

#[test]
fn launches_are_checked_before_they_run() {
    let fill = Device::sim().load(&Fill.build()).unwrap();
    let mut y = buffer(&[1.0]);
    let arguments = [Argument::Write(&mut y, Element::F32), Argument::U32(7), Argument::U64(1)];
    assert!(matches!(fill.launch([1, 1, 1], &arguments), Err(Error::Launch { .. })));
    let mut elsewhere = Device::cpu().allocate(4).unwrap();
    let arguments = [Argument::Write(&mut elsewhere, Element::U32), Argument::U32(7), Argument::U64(1)];
    let message = fill.launch([1, 1, 1], &arguments).unwrap_err().to_string();
    assert!(message.contains("the buffer for y lives on cpu, the kernel runs on sim"), "{message}");
    let arguments = [Argument::Write(&mut y, Element::U32), Argument::U32(7), Argument::U64(1)];
    fill.launch([0, 1, 1], &arguments).unwrap();
    assert_eq!(values(&y), [1.0], "no blocks, no work");
}

#[test]
fn freed_and_foreign_buffers_are_told_apart() {
    let write = ParameterKind::Write(Element::U32);
    let read = ParameterKind::Read(Element::U32);
    let device = Device::sim();
    let keep = device
        .load(&kernel(
            "keep",
            &[("place", write), ("memory", read)],
            "ld.param.u64 %rd0, [place];\nld.param.u64 %rd1, [memory];\nst.global.u64 [%rd0], %rd1;",
        ))
        .unwrap();
    let follow = device
        .load(&kernel(
            "follow",
            &[("place", read)],
            "ld.param.u64 %rd0, [place];\nld.global.u64 %rd1, [%rd0];\nld.global.u32 %r0, [%rd1+4];",
        ))
        .unwrap();
    let mut place = buffer(&[0.0; 2]);
    let memory = buffer(&[1.0; 10]);
    keep.launch([1, 1, 1], &[Argument::Write(&mut place, Element::U32), Argument::Read(&memory, Element::U32)])
        .unwrap();
    let foreign = fault(follow.launch([1, 1, 1], &[Argument::Read(&place, Element::U32)]).unwrap_err());
    let expected = "byte 4 of a buffer of 40 bytes that this launch was not given";
    assert!(foreign.problem.contains(expected), "{foreign}");
    assert_eq!((foreign.line, foreign.source.as_str()), (10, "ld.global.u32 %r0, [%rd1+4];"));
    drop(memory);
    let freed = fault(follow.launch([1, 1, 1], &[Argument::Read(&place, Element::U32)]).unwrap_err());
    assert!(freed.problem.contains("byte 4 of a buffer of 40 bytes that was freed"), "{freed}");
}

#[test]
fn what_a_table_names_is_given_to_the_launch() {
    const ROW: [ParameterKind; 3] =
        [ParameterKind::Read(Element::U32), ParameterKind::U64, ParameterKind::Write(Element::U32)];
    let copy = Device::sim()
        .load(&kernel(
            "copy_by_table",
            &[("table", ParameterKind::Table(&ROW))],
            "ld.param.u64 %rd0, [table];\nld.global.nc.u64 %rd1, [%rd0+24];\nld.global.nc.u32 %r0, [%rd0+32];\n\
             ld.global.nc.u64 %rd2, [%rd0+40];\nmul.wide.u32 %rd3, %r0, 4;\nadd.u64 %rd4, %rd1, %rd3;\n\
             ld.global.nc.u32 %r1, [%rd4];\nst.global.u32 [%rd2], %r1;",
        ))
        .unwrap();
    let (x, mut outputs) = (buffer(&[1.0, 2.0, 3.0]), [buffer(&[0.0]), buffer(&[0.0])]);
    let table = Table::new();
    let mut run = |place: u64| {
        let words = outputs
            .iter_mut()
            .flat_map(|output| [Word::Read(&x, Element::U32), Word::U64(place), Word::Write(output, Element::U32)]);
        copy.launch([1, 1, 1], &[Argument::Table(&table, words.collect())])
    };
    run(1).unwrap();
    let outside = fault(run(3).unwrap_err());
    assert!(outside.problem.contains("byte 12 of word 0 of table, which has 12 bytes: out of bounds"), "{outside}");
    run(2).unwrap();
    assert_eq!((values(&outputs[0]), values(&outputs[1])), (vec![0.0], vec![3.0]));
    let [mut output, _] = outputs;
    let words =
        vec![Word::Read(&x, Element::U32), Word::Read(&x, Element::U32), Word::Write(&mut output, Element::U32)];
    let message = copy.launch([1, 1, 1], &[Argument::Table(&table, words)]).unwrap_err().to_string();
    assert!(message.contains("argument 1 (table): word 1 of row 0 must be a u64 number"), "{message}");
    let message = copy.launch([1, 1, 1], &[Argument::Table(&table, vec![Word::U64(1)])]).unwrap_err().to_string();
    assert!(message.contains("argument 1 (table) has 1 words, no whole number of rows of 3"), "{message}");
    let message = copy.launch([1, 1, 1], &[Argument::U64(1)]).unwrap_err().to_string();
    assert!(message.contains("must be a table of rows of 3 words, but a u64 number was given"), "{message}");
}

#[test]
fn what_a_launch_wrote_the_next_may_read() {
    let fill = Device::sim().load(&Fill.build()).unwrap();
    let axpy = Device::sim().load(&Axpy.build()).unwrap();
    let x = buffer(&[1.0; 8]);
    let mut y = Device::sim().allocate(32).unwrap();
    let unwritten = {
        let arguments = [
            Argument::Write(&mut y, Element::F32),
            Argument::Read(&x, Element::F32),
            Argument::F32(1.0),
            Argument::U64(8),
        ];
        fault(axpy.launch([1, 1, 1], &arguments).unwrap_err())
    };
    assert!(unwritten.problem.contains("reads 4 bytes at byte 0 of y, which nothing has written"), "{unwritten}");
    let arguments = [Argument::Write(&mut y, Element::U32), Argument::U32(0), Argument::U64(8)];
    fill.launch([1, 1, 1], &arguments).unwrap();
    let arguments =
        [Argument::Write(&mut y, Element::F32), Argument::Read(&x, Element::F32), Argument::F32(1.0), Argument::U64(8)];
    axpy.launch([1, 1, 1], &arguments).unwrap();
    assert_eq!(values(&y), [1.0; 8]);
}

#[test]
fn a_text_that_is_not_the_description_is_refused() {
    let mut wrong = Fill.build();
    wrong.block = [32, 1, 1];
    let error = Device::sim().load(&wrong).err().unwrap().to_string();
    assert!(error.contains("it requires blocks of"), "{error}");
    let mut wrong = Fill.build();
    wrong.parameters.pop();
    let error = Device::sim().load(&wrong).err().unwrap().to_string();
    assert!(error.contains("it has 3 parameters, not 2"), "{error}");
    let mut wrong = Fill.build();
    wrong.text = wrong.text.replace("setp", "sett");
    let fault = fault(Device::sim().load(&wrong).err().unwrap());
    assert!(fault.line > 0 && fault.problem.contains("does not know the instruction sett"), "{fault}");
}

#[test]
fn many_threads_launch_at_once() {
    let axpy = Device::sim().load(&Axpy.build()).unwrap();
    let x = buffer(&[1.0; 500]);
    let launch = |a: f32| {
        let mut y = buffer(&[0.0; 500]);
        for _ in 0..20 {
            let arguments = [
                Argument::Write(&mut y, Element::F32),
                Argument::Read(&x, Element::F32),
                Argument::F32(a),
                Argument::U64(500),
            ];
            axpy.launch([2, 1, 1], &arguments).unwrap();
        }
        values(&y)
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (1..=4).map(|a| scope.spawn(move || launch(a as f32))).collect();
        for (a, thread) in (1..=4).zip(threads) {
            assert_eq!(thread.join().unwrap(), vec![20.0 * a as f32; 500]);
        }
    });
}
