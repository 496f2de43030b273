//! The whole CUDA path against the made-up driver: what it does, and what it does when any call of it fails.

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};

use kernels_ptx::kernels::{axpy::Axpy, fill::Fill};
use kernels_ptx::{Element, Kernel, KernelSource, Parameter, ParameterKind};

use super::fake::{self, Fake};
use super::{CudaDevice, Stream};
use crate::{Argument, Buffer, Device, Error, Function, MemoryUsage, Result, Table, Word};

/// Bytes that differ from each other and from zero, for the most part.
fn pattern(bytes: usize, seed: usize) -> Vec<u8> {
    (0..bytes).map(|index| (index * 31 + seed * 7 + 1) as u8).collect()
}

fn upload(device: &Device, bytes: &[u8]) -> Result<Buffer> {
    let mut buffer = device.allocate(bytes.len())?;
    buffer.copy_from_host(bytes)?;
    Ok(buffer)
}

fn download(buffer: &Buffer) -> Result<Vec<u8>> {
    let mut bytes = vec![0xee; buffer.len()];
    buffer.copy_to_host(&mut bytes)?;
    Ok(bytes)
}

/// Writes `value` to every element, on the home stream or another.
fn fill(function: &Function, stream: Option<&Stream>, buffer: &mut Buffer, value: u32) -> Result<()> {
    let count = (buffer.len() / 4) as u64;
    let arguments = [Argument::Write(buffer, Element::U32), Argument::U32(value), Argument::U64(count)];
    match stream {
        None => function.launch([1, 1, 1], &arguments),
        Some(stream) => function.launch_on(stream, [1, 1, 1], &arguments),
    }
}

/// `y += 2 x`.
fn axpy(function: &Function, y: &mut Buffer, x: &Buffer) -> Result<()> {
    let count = (y.len() / 4) as u64;
    let arguments =
        [Argument::Write(y, Element::F32), Argument::Read(x, Element::F32), Argument::F32(2.0), Argument::U64(count)];
    function.launch([1, 1, 1], &arguments)
}

fn words(value: u32, count: usize) -> Vec<u8> {
    value.to_ne_bytes().repeat(count)
}

fn floats(value: f32, count: usize) -> Vec<u8> {
    value.to_ne_bytes().repeat(count)
}

/// A kernel like fill that takes the context with it when it runs.
fn faulty() -> Kernel {
    let mut kernel = Fill.build();
    kernel.text = kernel.text.replace("fill_u32", "faulty_fill");
    kernel.name = "faulty_fill".to_owned();
    kernel
}

/// A kernel that fills several buffers, which a table names with their numbers of elements.
fn filler_by_table() -> Kernel {
    const ROW: [ParameterKind; 2] = [ParameterKind::Write(Element::U32), ParameterKind::U64];
    let kinds = [("table", ParameterKind::Table(&ROW)), ("rows", ParameterKind::U32), ("value", ParameterKind::U32)];
    let mut kernel = Fill.build();
    kernel.text = kernel.text.replace("fill_u32", "fill_by_table");
    kernel.name = "fill_by_table".to_owned();
    kernel.parameters = kinds.map(|(name, kind)| Parameter { name, kind }).to_vec();
    kernel
}

/// Writes `value` to every element of every buffer.
fn fill_by_table(function: &Function, table: &Table, buffers: &mut [Buffer], value: u32) -> Result<()> {
    let rows = buffers.len() as u32;
    let words = buffers.iter_mut().flat_map(|buffer| {
        let count = (buffer.len() / 4) as u64;
        [Word::Write(buffer, Element::U32), Word::U64(count)]
    });
    let arguments = [Argument::Table(table, words.collect()), Argument::U32(rows), Argument::U32(value)];
    function.launch([1, 1, 1], &arguments)
}

fn assert_same(found: &[u8], expected: &[u8]) {
    let differing = found.iter().zip(expected).position(|(found, expected)| found != expected);
    assert!(found.len() == expected.len() && differing.is_none(), "byte {differing:?} is not what it should be");
}

/// Something of everything that the runtime does with a GPU. Data are checked: what is wrong panics.
fn everything(fake: &Fake) -> Result<()> {
    static ROUND: AtomicU64 = AtomicU64::new(0);
    let round = ROUND.fetch_add(1, Ordering::Relaxed);
    let device = fake.open()?;
    // Copies and fills.
    let bytes = pattern(100_000, 1);
    let mut buffer = upload(&device, &bytes)?;
    assert_same(&download(&buffer)?, &bytes);
    buffer.set_zero()?;
    assert_same(&download(&buffer)?, &vec![0; bytes.len()]);
    // Streams and events.
    let side = device.new_stream()?;
    let start = side.record()?;
    let end = side.record()?;
    device.home_stream()?.wait(&end)?;
    assert!(end.elapsed_since(&start)?.as_nanos() > 0);
    side.synchronize()?;
    // Modules, from the compiler and from the cache. The text is new to the device every round.
    let mut kernel = Fill.build();
    kernel.text.push_str(&format!("// {round}\n"));
    let function = device.load(&kernel)?;
    kernel.shared_bytes = 100 << 10;
    let cached = device.load(&kernel)?;
    // Launches, in the order of the program whatever the stream.
    let mut sum = upload(&device, &floats(0.5, 1000))?;
    let mut ones = device.allocate(4000)?;
    fill(&function, Some(&side), &mut ones, 1.0_f32.to_bits())?;
    axpy(&device.load(&Axpy.build())?, &mut sum, &ones)?;
    fill(&cached, Some(&side), &mut ones, 7)?;
    assert_same(&download(&sum)?, &floats(2.5, 1000));
    assert_same(&download(&ones)?, &words(7, 1000));
    fill(&function, Some(&side), &mut ones, 8)?;
    drop(ones);
    // The block of `ones`, while the side stream still writes it.
    let mut next = device.allocate(4000)?;
    fill(&cached, None, &mut next, 9)?;
    assert_same(&download(&next)?, &words(9, 1000));
    // Copies on the device, and uploads beside the home stream: the second gets the memory of the first.
    let mut copy = device.allocate(4000)?;
    copy.copy_from(&next)?;
    assert_same(&download(&copy)?, &words(9, 1000));
    for number in 0..3_u8 {
        let uploaded = device.upload(&pattern(5000, number.into()))?;
        copy.set_zero()?;
        assert_same(&download(&uploaded)?, &pattern(5000, number.into()));
    }
    // A table, by itself and in the graph below.
    let by_table = device.load(&filler_by_table())?;
    let mut filled = [device.allocate(400)?, device.allocate(4000)?];
    fill_by_table(&by_table, &Table::new(), &mut filled, 5)?;
    assert_same(&download(&filled[1])?, &words(5, 1000));
    // A graph, with memory of its own and memory from before.
    let (graph, result) = device.capture(|| -> Result<Buffer> {
        let mut ones = device.allocate(4000)?;
        fill(&function, None, &mut ones, 1.0_f32.to_bits())?;
        let mut result = device.allocate(4000)?;
        result.set_zero()?;
        axpy(&device.load(&Axpy.build())?, &mut result, &ones)?;
        axpy(&device.load(&Axpy.build())?, &mut sum, &ones)?;
        fill_by_table(&by_table, &Table::new(), &mut filled, 6)?;
        Ok(result)
    })?;
    let recording = device.record_launches()?;
    graph.replay()?;
    graph.replay()?;
    fill(&function, Some(&side), &mut next, 4)?;
    assert_eq!(recording.take_records()?.len(), 3);
    drop(recording);
    assert_same(&download(&result)?, &floats(2.0, 1000));
    assert_same(&download(&sum)?, &floats(6.5, 1000));
    assert_same(&download(&filled[0])?, &words(6, 100));
    drop((buffer, sum, next, copy, filled, graph, result));
    device.free_and_total_memory()?;
    device.trim_memory()?;
    device.synchronize()
}

#[test]
fn everything_works_and_nothing_is_left() {
    let fake = Fake::attach();
    everything(&fake).unwrap();
    assert_eq!(fake.violations(), [] as [&str; 0]);
    assert_eq!(fake.compiled(), 3, "the cache was not used");
    assert_eq!(fake.pageable_copies(), 0);
    let device = fake.open().unwrap();
    assert_eq!(device.memory_usage().in_use, 0);
    println!("{:?} after {:?}", fake.census(), fake.calls());
    let after_once = left(&fake);
    for _ in 0..3 {
        everything(&fake).unwrap();
        assert_eq!(left(&fake), after_once);
    }
}

/// What is alive on the GPU, but for modules whose functions the device keeps.
fn left(fake: &Fake) -> BTreeMap<&'static str, usize> {
    let mut census = fake.census();
    let kept: usize = CudaDevice::open(fake.ordinal()).unwrap().functions().values().map(Vec::len).sum();
    if let Some(modules) = census.get_mut("modules") {
        *modules -= kept;
    }
    census
}

/// Calls that give something back: where one fails, the driver keeps what it was.
fn gives_back(call: &str) -> bool {
    ["Destroy", "Free", "Unload", "Release"].iter().any(|part| call.contains(part))
}

/// The calls of [`everything`] on a fresh GPU, and what is left on it.
fn calls_of_everything() -> (Vec<&'static str>, BTreeMap<&'static str, usize>) {
    let fake = Fake::attach();
    everything(&fake).unwrap();
    let calls = fake.calls();
    (calls, left(&fake))
}

#[test]
fn a_failure_of_any_call_is_one_clean_error_and_the_device_stays_usable() {
    let (calls, whole) = calls_of_everything();
    assert!(calls.len() > 40, "{calls:?}");
    for (number, call) in calls.iter().enumerate() {
        let fake = Fake::attach();
        // The first GPU's number is not this one's: the calls are the same all the same.
        fake.fail(number, 999);
        let result = everything(&fake);
        assert_eq!(fake.calls()[number], *call);
        match result {
            // A destructor has nobody to report to, and machine code that does not load is compiled again.
            Ok(()) => {
                assert!(fake.failed_in_drop() || *call == "cuModuleLoadData", "{number} {call}: nobody heard of it");
            }
            Err(error) => {
                let message = error.to_string();
                assert!(message.contains(call) && message.contains("CUDA_ERROR_UNKNOWN (999)"), "{call}: {message}");
                assert_eq!(message.lines().count(), 1, "{message}");
            }
        }
        fake.heal();
        assert_eq!(fake.violations(), [] as [&str; 0], "{number} {call}");
        everything(&fake).unwrap_or_else(|error| panic!("{number} {call}: unusable: {error}"));
        assert_eq!(fake.violations(), [] as [&str; 0], "{number} {call}");
        let device = fake.open().unwrap();
        assert_eq!(device.memory_usage(), MemoryUsage { in_use: 0, ..device.memory_usage() }, "{number} {call}");
        if !gives_back(call) {
            assert_eq!(left(&fake), whole, "{number} {call}: something leaks");
        }
    }
}

#[test]
fn a_lost_context_is_reported_with_its_first_cause_ever_after() {
    let (calls, _) = calls_of_everything();
    let opening = {
        let fake = Fake::attach();
        fake.open().unwrap();
        fake.calls().len()
    };
    for (number, call) in calls.iter().enumerate().skip(opening) {
        let fake = Fake::attach();
        fake.fail(number, fake::ILLEGAL_ADDRESS);
        // A failure while something is dropped shows at the next operation.
        let device = fake.open().unwrap();
        let error = match everything(&fake) {
            Err(error) => error,
            Ok(()) => device.synchronize().unwrap_err(),
        };
        let first = error.to_string();
        assert!(matches!(error, Error::DeviceLost { .. }), "{call}: {first}");
        assert!(first.contains(call) && first.contains("CUDA_ERROR_ILLEGAL_ADDRESS (700)"), "{call}: {first}");
        let later = [
            device.synchronize().err(),
            device.allocate(100).err(),
            device.trim_memory().err(),
            device.new_stream().err(),
            device.free_and_total_memory().err(),
            device.home_stream().unwrap().record().err(),
        ];
        for later in later {
            assert_eq!(later.unwrap().to_string(), first);
        }
        assert_eq!(fake.violations(), [] as [&str; 0], "{number} {call}");
    }
}

#[test]
fn a_device_that_cannot_be_opened_leaves_nothing_and_can_be_tried_again() {
    let opening = {
        let fake = Fake::attach();
        fake.open().unwrap();
        fake.calls()
    };
    for (number, call) in opening.iter().enumerate() {
        let fake = Fake::attach();
        fake.fail(number, 999);
        let message = fake.open().unwrap_err().to_string();
        assert!(message.contains(call), "{message}");
        assert_eq!(fake.census(), Default::default(), "{call}");
        fake.heal();
        fake.open().unwrap();
    }
}

#[test]
fn out_of_memory_is_an_error_of_its_own_and_what_is_free_is_given_up_first() {
    let fake = Fake::attach();
    fake.set_capacity(64 << 20);
    let device = fake.open().unwrap();
    drop(upload(&device, &pattern(40 << 20, 1)).unwrap());
    let held = upload(&device, &pattern(50 << 20, 2)).unwrap();
    let error = device.allocate(20 << 20).err().unwrap();
    assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
    assert!(error.to_string().contains("50 MiB") || error.to_string().contains("52428800"), "{error}");
    assert_same(&download(&held).unwrap(), &pattern(50 << 20, 2));
    drop(held);
    assert_eq!(device.allocate(60 << 20).unwrap().len(), 60 << 20);
    assert_eq!(fake.violations(), [] as [&str; 0]);
}

#[test]
fn a_second_start_compiles_nothing_and_another_gpu_or_a_damaged_file_compiles_again() {
    let first = Fake::attach();
    first.open().unwrap().load(&Fill.build()).unwrap();
    assert_eq!(first.compiled(), 1);
    let folder = first.cache().to_owned();
    let file = || fs::read_dir(folder.join("kernels")).unwrap().next().unwrap().unwrap().path();
    let start = |name| {
        let fake = Fake::attach();
        fake.set_name(name);
        CudaDevice::open_with(fake.ordinal(), || Some(folder.clone())).unwrap();
        let device = fake.open().unwrap();
        let function = device.load(&Fill.build()).unwrap();
        let mut buffer = device.allocate(400).unwrap();
        fill(&function, None, &mut buffer, 5).unwrap();
        assert_same(&download(&buffer).unwrap(), &words(5, 100));
        assert_eq!(fake.violations(), [] as [&str; 0]);
        fake.compiled()
    };
    assert_eq!(start("Made-up GPU"), 0);
    assert_eq!(start("Another GPU"), 1);
    assert_eq!(start("Another GPU"), 0);
    // A file that is damaged.
    for path in fs::read_dir(folder.join("kernels")).unwrap().map(|entry| entry.unwrap().path()) {
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x10;
        fs::write(path, bytes).unwrap();
    }
    assert_eq!(start("Made-up GPU"), 1);
    assert_eq!(start("Made-up GPU"), 0);
    // A file that is whole, but of which the driver will have nothing.
    for path in fs::read_dir(folder.join("kernels")).unwrap().map(|entry| entry.unwrap().path()) {
        fs::remove_file(path).unwrap();
    }
    let fake = Fake::attach();
    let device = CudaDevice::open_with(fake.ordinal(), || Some(folder.clone())).unwrap();
    device.cache().put(&Fill.build().overlapping_text().unwrap(), b"not what this driver calls machine code\0");
    assert_eq!(start("Made-up GPU"), 1);
    assert!(fs::read(file()).unwrap().windows(fake::MACHINE_CODE.len()).any(|part| part == fake::MACHINE_CODE));
    assert_eq!(start("Made-up GPU"), 0);
    // A folder in which nothing can be written.
    fs::remove_dir_all(folder.join("kernels")).unwrap();
    fs::write(folder.join("kernels"), "").unwrap();
    assert_eq!(start("Made-up GPU"), 1);
}

#[test]
fn a_text_that_does_not_compile_is_an_error_with_the_log_and_leaves_nothing() {
    let fake = Fake::attach();
    let device = fake.open().unwrap();
    device.load(&Fill.build()).unwrap();
    let before = fake.census();
    let broken = |change: &dyn Fn(&mut Kernel)| {
        let mut kernel = Fill.build();
        change(&mut kernel);
        device.load(&kernel).err().unwrap().to_string()
    };
    let message = broken(&|kernel| kernel.text = kernel.text.replace("global", "globule"));
    assert!(message.contains("cuLinkAddData_v2") && message.contains("not an instruction: globule"), "{message}");
    let message = broken(&|kernel| kernel.name = "absent".to_owned());
    assert!(message.contains("no entry of this name"), "{message}");
    let message = broken(&|kernel| kernel.text.push('\0'));
    assert!(message.contains("nul"), "{message}");
    assert_eq!(fake.census(), before);
    assert_eq!(fake.violations(), [] as [&str; 0]);
}

#[test]
fn a_kernel_that_faults_is_named_when_something_waits_for_it() {
    let fake = Fake::attach();
    let device = fake.open().unwrap();
    let good = device.load(&Fill.build()).unwrap();
    let bad = device.load(&faulty()).unwrap();
    let mut buffer = device.allocate(400).unwrap();
    fill(&good, None, &mut buffer, 1).unwrap();
    device.synchronize().unwrap();
    fill(&bad, None, &mut buffer, 2).unwrap();
    fill(&bad, None, &mut buffer, 2).unwrap();
    let first = download(&buffer).unwrap_err().to_string();
    assert!(first.contains("CUDA_ERROR_ILLEGAL_ADDRESS (700)"), "{first}");
    assert!(first.ends_with("finished, the last one first: faulty_fill (2 times)"), "{first}");
    assert_eq!(fill(&good, None, &mut buffer, 1).unwrap_err().to_string(), first);
    assert_eq!(device.load(&Axpy.build()).err().unwrap().to_string(), first);
    assert_eq!(device.synchronize().unwrap_err().to_string(), first);
    assert_eq!(buffer.set_zero().unwrap_err().to_string(), first);
    drop((buffer, good, bad));
    assert_eq!(fake.violations(), [] as [&str; 0]);

    // With CUDA_LAUNCH_BLOCKING=1 the launch itself fails.
    let fake = Fake::attach();
    let device = fake.open().unwrap();
    let good = device.load(&Fill.build()).unwrap();
    let mut buffer = device.allocate(400).unwrap();
    fake.fail_next("cuLaunchKernelEx", fake::LAUNCH_FAILED);
    let first = fill(&good, None, &mut buffer, 1).unwrap_err().to_string();
    assert!(first.contains("launching kernel fill_u32: CUDA driver call cuLaunchKernelEx"), "{first}");
    assert_eq!(device.synchronize().unwrap_err().to_string(), first);
}

#[test]
fn launches_overlap_where_the_gpu_and_its_driver_can() {
    let (plain, overlapping) = ("cuLaunchKernel", "cuLaunchKernelEx");
    for (capability, cuda, launch) in [
        ((8, 0), 12_040, plain),
        ((8, 9), 12_040, plain),
        ((9, 0), 12_020, plain),
        ((9, 0), 12_030, overlapping),
        ((10, 0), 13_000, overlapping),
    ] {
        let fake = Fake::with_versions(capability, cuda);
        let device = fake.open().unwrap();
        let function = device.load(&Fill.build()).unwrap();
        let mut buffer = device.allocate(400).unwrap();
        fill(&function, None, &mut buffer, 7).unwrap();
        assert_same(&download(&buffer).unwrap(), &words(7, 100));
        assert_eq!(
            fake.calls().iter().filter(|call| call.starts_with("cuLaunchKernel")).collect::<Vec<_>>(),
            [&launch]
        );
        // A text that would not wait never overlaps.
        let mut kernel = Fill.build();
        kernel.text = kernel.text.replace(".target sm_80", ".target sm_86");
        fill(&device.load(&kernel).unwrap(), None, &mut buffer, 8).unwrap();
        assert_eq!(fake.calls().last(), Some(&"cuLaunchKernel"));
        assert_eq!(fake.violations(), [] as [&str; 0]);
    }
}

#[test]
fn copies_of_any_size_go_through_page_locked_memory_in_order() {
    let fake = Fake::attach();
    let device = fake.open().unwrap();
    let mut held: Vec<(usize, Buffer)> = Vec::new();
    // Below, at and above the chunk (1 MiB) and the ring (4 MiB), from changing places in it; nothing waits in between.
    for (seed, bytes) in [0, 1, 63, 4096, 1 << 20, (1 << 20) + 1, 3, (4 << 20) - 1, 4 << 20, (9 << 20) + 5, 70_000]
        .into_iter()
        .enumerate()
    {
        held.push((seed, upload(&device, &pattern(bytes, seed)).unwrap()));
        held.push((seed + 1, device.upload(&pattern(bytes, seed + 1)).unwrap()));
    }
    for (seed, buffer) in &held {
        assert_same(&download(buffer).unwrap(), &pattern(buffer.len(), *seed));
    }
    // Hundreds of small copies overtake nothing.
    let mut small = device.allocate(1000).unwrap();
    let mut copies: Vec<Buffer> = Vec::new();
    for seed in 0..300 {
        small.copy_from_host(&pattern(1000, seed)).unwrap();
        let mut copy = device.allocate(1000).unwrap();
        copy.copy_from(&small).unwrap();
        copies.push(copy);
    }
    for (seed, copy) in copies.iter().enumerate() {
        assert_same(&download(copy).unwrap(), &pattern(1000, seed));
    }
    assert_eq!(fake.pageable_copies(), 0);
    assert_eq!(fake.violations(), [] as [&str; 0]);
    assert_eq!(fake.census()["pinned"], 3);
    assert!(fake.census()["events"] <= 2 * 64, "{:?}", fake.census());
}

#[test]
fn an_upload_waits_for_nothing_but_the_last_use_of_its_memory() {
    let fake = Fake::attach();
    let device = fake.open().unwrap();
    let function = device.load(&Fill.build()).unwrap();
    let mut sum = upload(&device, &floats(0.0, 1000)).unwrap();
    let add = device.load(&Axpy.build()).unwrap();
    // Two batches are alive at a time, as when the next is uploaded while this one is used.
    let mut next = device.upload(&floats(1.0, 1000)).unwrap();
    for step in 1..20 {
        let batch = std::mem::replace(&mut next, device.upload(&floats(1.0 + step as f32, 1000)).unwrap());
        axpy(&add, &mut sum, &batch).unwrap();
    }
    // 2 (1 + 2 + ... + 19)
    assert_same(&download(&sum).unwrap(), &floats(380.0, 1000));
    // The pending pieces of the upload ring, and little else.
    assert!(fake.census()["events"] < 30, "{:?}", fake.census());

    // The upload is done although a kernel that is queued on the home stream has not run.
    let mut slow = device.allocate(4000).unwrap();
    drop(next);
    fill(&function, None, &mut slow, 3).unwrap();
    let before = fake.kernels_run();
    let uploaded = device.upload(&floats(5.0, 1000)).unwrap();
    let gpu = CudaDevice::open(fake.ordinal()).unwrap();
    let stream = gpu.uploads().stream(gpu).unwrap();
    stream.synchronize().unwrap();
    assert_eq!(fake.kernels_run(), before, "the upload waited for the home stream's work");
    assert_same(&download(&uploaded).unwrap(), &floats(5.0, 1000));
    assert_same(&download(&slow).unwrap(), &words(3, 1000));
    assert_eq!(fake.violations(), [] as [&str; 0]);
}

#[test]
fn memory_of_uploads_is_given_up_when_it_is_needed() {
    let fake = Fake::attach();
    fake.set_capacity(100 << 20);
    let device = fake.open().unwrap();
    for bytes in [30 << 20, 20 << 20, 40 << 20] {
        drop(device.upload(&pattern(bytes, 1)).unwrap());
        assert_eq!(device.memory_usage().in_use, 0);
    }
    assert_eq!(device.allocate(90 << 20).unwrap().len(), 90 << 20);
    // Ever new sizes do not pile up.
    for bytes in (1 << 20..80 << 20).step_by(11 << 20) {
        drop(device.upload(&vec![1; bytes]).unwrap());
    }
    device.trim_memory().unwrap();
    assert_eq!(device.memory_usage().reserved, 0);
    assert_eq!(fake.violations(), [] as [&str; 0]);
}

#[test]
fn a_graph_does_again_what_was_captured_and_nothing_before() {
    let fake = Fake::attach();
    let device = fake.open().unwrap();
    let (set, add) = (device.load(&Fill.build()).unwrap(), device.load(&Axpy.build()).unwrap());
    let side = device.new_stream().unwrap();
    let mut input = upload(&device, &floats(1.0, 100)).unwrap();
    // Work on another stream that the capture must not wait for, and the replay must.
    fill(&set, Some(&side), &mut input, 3.0_f32.to_bits()).unwrap();
    let (graph, output) = device
        .capture(|| -> Result<Buffer> {
            let mut output = device.allocate(400)?;
            output.set_zero()?;
            for _ in 0..3 {
                // A temporary, whose memory serves the next one.
                let mut doubled = device.allocate(400)?;
                doubled.set_zero()?;
                axpy(&add, &mut doubled, &input)?;
                axpy(&add, &mut output, &doubled)?;
            }
            Ok(output)
        })
        .unwrap();
    assert_eq!(graph.launches(), 6);
    assert_eq!(fake.kernels_run(), 0);
    graph.replay().unwrap();
    assert_same(&download(&output).unwrap(), &floats(3.0 * 12.0, 100));
    input.copy_from_host(&floats(0.5, 100)).unwrap();
    graph.replay().unwrap();
    assert_same(&download(&output).unwrap(), &floats(0.5 * 12.0, 100));
    // Another stream reads the output while the next replay waits for it.
    let mut seen = device.allocate(400).unwrap();
    seen.set_zero().unwrap();
    let arguments = [
        Argument::Write(&mut seen, Element::F32),
        Argument::Read(&output, Element::F32),
        Argument::F32(1.0),
        Argument::U64(100),
    ];
    add.launch_on(&side, [1, 1, 1], &arguments).unwrap();
    input.copy_from_host(&floats(9.0, 100)).unwrap();
    graph.replay().unwrap();
    assert_same(&download(&output).unwrap(), &floats(9.0 * 12.0, 100));
    assert_same(&download(&seen).unwrap(), &floats(0.5 * 12.0, 100));
    assert_eq!(fake.violations(), [] as [&str; 0]);
}

#[test]
fn a_kernel_reaches_what_its_table_names_and_a_graph_keeps_the_table() {
    let fake = Fake::attach();
    let device = fake.open().unwrap();
    let set = device.load(&filler_by_table()).unwrap();
    let buffers = |counts: &[usize]| -> Vec<Buffer> {
        counts.iter().map(|&count| upload(&device, &words(7, count)).unwrap()).collect()
    };
    let check = |buffers: &[Buffer], value: u32| {
        for buffer in buffers {
            assert_same(&download(buffer).unwrap(), &words(value, buffer.len() / 4));
        }
    };
    let (mut first, mut second) = (buffers(&[100, 1, 5000]), buffers(&[3, 90]));
    let table = Table::new();
    let uploaded = || fake.calls().iter().filter(|&&call| call == "cuMemcpyHtoDAsync_v2").count();
    fill_by_table(&set, &table, &mut first, 1).unwrap();
    let before = uploaded();
    fill_by_table(&set, &table, &mut first, 2).unwrap();
    assert_eq!(uploaded(), before, "the words are there already");
    check(&first, 2);
    fill_by_table(&set, &table, &mut second, 3).unwrap();
    assert_eq!(uploaded(), before + 1);
    check(&first, 2);
    check(&second, 3);
    // A capture may need words that are not there: they are copied at once, and the graph keeps them.
    let mut third = buffers(&[8; 9]);
    let (graph, own) = device
        .capture(|| -> Result<Vec<Buffer>> {
            let mut own = vec![device.allocate(400)?, device.allocate(4)?];
            fill_by_table(&set, &table, &mut own, 4)?;
            fill_by_table(&set, &table, &mut third, 5)?;
            Ok(own)
        })
        .unwrap();
    check(&third, 7);
    fill_by_table(&set, &table, &mut first, 6).unwrap();
    drop(table);
    // Whatever is uploaded now does not take the place of the graph's tables.
    let others: Vec<Buffer> = (0..100).map(|at| device.upload(&vec![9; [32, 144][at % 2]]).unwrap()).collect();
    graph.replay().unwrap();
    check(&own, 4);
    check(&third, 5);
    check(&first, 6);
    for other in &others {
        assert_same(&download(other).unwrap(), &vec![9; other.len()]);
    }
    drop((graph, own, first, second, third, others));
    assert_eq!(device.memory_usage().in_use, 0);
    assert_eq!(fake.violations(), [] as [&str; 0]);
}

#[test]
fn memory_that_is_left_zero_is_kept_but_what_a_capture_allocates_is_not() {
    let fake = Fake::attach();
    let device = fake.open().unwrap();
    let set = device.load(&Fill.build()).unwrap();
    // What a capture allocates is zero only once its graph has run.
    let (graph, ()) = device.capture(|| -> Result<()> { device.zeroed(4000)?.keep() }).unwrap();
    drop(graph);
    assert_eq!(device.memory_usage().in_use, 0);

    let mut dirty = device.zeroed(4000).unwrap();
    assert_same(&download(dirty.buffer()).unwrap(), &vec![0; dirty.buffer().len()]);
    let bytes = dirty.buffer().len();
    fill(&set, None, dirty.buffer(), 7).unwrap();
    // Not kept: a launch failed, say.
    drop(dirty);
    assert_eq!(device.memory_usage().in_use, 0);
    let mut clean = device.zeroed(4000).unwrap();
    assert_same(&download(clean.buffer()).unwrap(), &vec![0; bytes]);
    clean.keep().unwrap();
    assert_eq!(device.memory_usage().in_use, bytes);

    // A capture takes what is kept, and so do others while its graph lives: they run one after the other.
    let before = fake.census();
    let (graph, ()) = device.capture(|| -> Result<()> { device.zeroed(bytes)?.keep() }).unwrap();
    graph.replay().unwrap();
    assert_eq!(device.memory_usage().in_use, bytes);
    drop(graph);
    assert_eq!(fake.census(), before);
    // More than there is takes its place.
    device.zeroed(bytes + 1).unwrap().keep().unwrap();
    assert_eq!(device.memory_usage().in_use, 2 * bytes);
    device.trim_memory().unwrap();
    assert_eq!(device.memory_usage(), MemoryUsage { in_use: 0, reserved: 0, ..device.memory_usage() });
    assert_eq!(fake.violations(), [] as [&str; 0]);
}

#[test]
fn memory_that_a_graph_uses_is_nobody_elses_while_it_lives() {
    let fake = Fake::attach();
    let device = fake.open().unwrap();
    let set = device.load(&Fill.build()).unwrap();
    let mut before = device.allocate(4000).unwrap();
    let (graph, kept) = device
        .capture(|| -> Result<Buffer> {
            let mut temporary = device.allocate(8000)?;
            fill(&set, None, &mut temporary, 1)?;
            fill(&set, None, &mut before, 2)?;
            let mut kept = device.allocate(4000)?;
            fill(&set, None, &mut kept, 3)?;
            Ok(kept)
        })
        .unwrap();
    drop(before);
    // Whatever is allocated now, the replay leaves it alone.
    let others: Vec<Buffer> = (0..1000).map(|_| upload(&device, &words(7, 500)).unwrap()).collect();
    graph.replay().unwrap();
    for other in &others {
        assert_same(&download(other).unwrap(), &words(7, 500));
    }
    drop(others);
    let with_graph = device.memory_usage().in_use;
    assert!(with_graph > 0);
    graph.replay().unwrap();
    drop(graph);
    // A block of the graph's that somebody holds keeps its memory.
    let others: Vec<Buffer> = (0..1000).map(|_| upload(&device, &words(7, 500)).unwrap()).collect();
    assert_same(&download(&kept).unwrap(), &words(3, 1000));
    drop((others, kept));
    assert_eq!(device.memory_usage().in_use, 0);
    device.trim_memory().unwrap();
    assert_eq!(device.memory_usage().reserved, 0);
    assert_eq!(fake.violations(), [] as [&str; 0]);
    let census = fake.census();
    assert!(!census.contains_key("graphs") && !census.contains_key("executable graphs"), "{census:?}");
}

#[test]
fn an_error_or_a_panic_while_capturing_ends_the_capture_cleanly() {
    let fake = Fake::attach();
    let device = fake.open().unwrap();
    let set = device.load(&Fill.build()).unwrap();
    let mut buffer = upload(&device, &words(7, 100)).unwrap();
    device.trim_memory().unwrap();
    let before = fake.census();
    let side = device.new_stream().unwrap();
    let mut refusals = Vec::new();
    let error = device
        .capture(|| -> Result<()> {
            fill(&set, None, &mut buffer, 1)?;
            refusals.push(buffer.copy_from_host(&words(0, 100)).unwrap_err());
            refusals.push(buffer.copy_to_host(&mut [0; 400]).unwrap_err());
            refusals.push(device.upload(&[1, 2, 3]).err().unwrap());
            refusals.push(device.synchronize().unwrap_err());
            refusals.push(fill(&set, Some(&side), &mut buffer, 1).unwrap_err());
            refusals.push(device.capture(|| -> Result<()> { Ok(()) }).err().unwrap());
            set.launch([1, 1, 1], &[])
        })
        .err()
        .unwrap();
    assert!(matches!(error, Error::Launch { .. }), "{error}");
    for refusal in refusals {
        assert!(matches!(refusal, Error::Capturing { .. }), "{refusal}");
    }
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        device.capture(|| -> Result<()> {
            let _temporary = device.allocate(100)?;
            panic!("as the test wants it")
        })
    }));
    assert!(panicked.is_err());
    drop(side);
    device.trim_memory().unwrap();
    assert_eq!(fake.census(), before);
    // Nothing of it ran, and the device works.
    assert_same(&download(&buffer).unwrap(), &words(7, 100));
    fill(&set, None, &mut buffer, 9).unwrap();
    assert_same(&download(&buffer).unwrap(), &words(9, 100));
    assert_eq!(fake.violations(), [] as [&str; 0]);
    // An empty graph is a graph.
    device.capture(|| -> Result<()> { Ok(()) }).unwrap().0.replay().unwrap();
    assert!(matches!(Device::cpu().capture(|| -> Result<()> { Ok(()) }), Err(Error::NotAGpu { .. })));
}

#[test]
fn other_threads_go_on_while_one_captures() {
    let fake = Fake::attach();
    let device = fake.open().unwrap();
    let set = device.load(&Fill.build()).unwrap();
    let mut buffer = upload(&device, &words(7, 100)).unwrap();
    let ordinal = fake.ordinal();
    let (graph, ()) = device
        .capture(|| -> Result<()> {
            fill(&set, None, &mut buffer, 1)?;
            std::thread::scope(|scope| {
                let elsewhere = scope.spawn(|| {
                    let other = Fake::of(ordinal);
                    let mut own = device.allocate(400).unwrap();
                    fill(&set, None, &mut own, 5).unwrap();
                    assert_same(&download(&own).unwrap(), &words(5, 100));
                    drop(own);
                    drop(other);
                });
                elsewhere.join().unwrap();
            });
            fill(&set, None, &mut buffer, 2)
        })
        .unwrap();
    assert_eq!(graph.launches(), 2);
    assert_same(&download(&buffer).unwrap(), &words(7, 100));
    graph.replay().unwrap();
    assert_same(&download(&buffer).unwrap(), &words(2, 100));
    assert_eq!(fake.violations(), [] as [&str; 0]);
}

#[test]
fn launches_are_recorded_with_times_work_and_ranges() {
    let fake = Fake::attach();
    let device = fake.open().unwrap();
    let set = device.load(&Fill.build()).unwrap();
    let mut buffer = device.allocate(400).unwrap();
    fill(&set, None, &mut buffer, 1).unwrap();
    let recording = device.record_launches().unwrap();
    assert!(matches!(device.record_launches(), Err(Error::AlreadyRecording { .. })));
    let _layer = crate::range("layer 3");
    {
        let _mixer = crate::range("mixer");
        let arguments = [Argument::Write(&mut buffer, Element::U32), Argument::U32(7), Argument::U64(100)];
        set.launch_sized([1, 1, 1], &arguments, &[100]).unwrap();
    }
    let (graph, ()) = device.capture(|| fill(&set, None, &mut buffer, 2)).unwrap();
    graph.replay().unwrap();
    fill(&set, Some(&device.new_stream().unwrap()), &mut buffer, 3).unwrap();
    let records = recording.take_records().unwrap();
    let names: Vec<&str> = records.iter().map(|record| &*record.kernel).collect();
    assert_eq!(names, ["fill_u32", "a graph (launches: 1)", "fill_u32"]);
    assert_eq!(records[0].ranges, ["layer 3".into(), "mixer".into()]);
    assert_eq!(records[1].ranges, ["layer 3".into()]);
    assert_eq!((records[0].grid, records[0].block), ([1, 1, 1], Fill.build().block));
    assert_eq!(records[0].work, Fill.build().work(&[100]));
    assert_eq!(records[2].work, None);
    for (one, next) in records.iter().zip(&records[1..]) {
        assert!(one.duration.as_nanos() > 0 && next.start >= one.end(), "{records:?}");
    }
    assert!(recording.take_records().unwrap().is_empty());
    let events = || fake.census().get("events").copied().unwrap_or_default();
    // That from which times are counted.
    assert_eq!(events(), 1);
    drop(recording);
    assert_eq!(events(), 0);
    // Nothing is recorded any more, and a new recording begins with nothing.
    fill(&set, None, &mut buffer, 1).unwrap();
    assert_eq!(events(), 0);
    assert!(device.record_launches().unwrap().take_records().unwrap().is_empty());
    assert!(Device::cpu().record_launches().unwrap().take_records().unwrap().is_empty());
    assert_eq!(fake.violations(), [] as [&str; 0]);
}

#[test]
fn any_thread_may_use_the_device() {
    let fake = Fake::attach();
    let device = fake.open().unwrap();
    let ordinal = fake.ordinal();
    std::thread::scope(|scope| {
        for thread in 0..6_u32 {
            let device = device.clone();
            scope.spawn(move || {
                let _here = Fake::of(ordinal);
                let function = device.load(&Fill.build()).unwrap();
                let side = device.new_stream().unwrap();
                for round in 0..40_u32 {
                    let value = thread * 1000 + round;
                    let stream = value.is_multiple_of(3).then_some(&side);
                    let mut buffer = device.upload(&words(7, 10 + value as usize)).unwrap();
                    fill(&function, stream, &mut buffer, value).unwrap();
                    if round % 8 == thread {
                        let (graph, ()) = device.capture(|| fill(&function, None, &mut buffer, value + 1)).unwrap();
                        assert_same(&download(&buffer).unwrap(), &words(value, buffer.len() / 4));
                        graph.replay().unwrap();
                        assert_same(&download(&buffer).unwrap(), &words(value + 1, buffer.len() / 4));
                        device.synchronize().unwrap();
                    } else {
                        assert_same(&download(&buffer).unwrap(), &words(value, buffer.len() / 4));
                    }
                }
            });
        }
    });
    assert_eq!(device.memory_usage().in_use, 0);
    assert_eq!(fake.violations(), [] as [&str; 0]);
}
