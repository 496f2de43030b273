//! The CUDA side of the runtime.
//!
//! Most of it needs a GPU: with `TEST_DEVICE=cuda:0` those tests run, otherwise each prints that it was skipped. The rest
//! runs anywhere.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kernels_ptx::kernels::{axpy::Axpy, fill::Fill};
use kernels_ptx::{Element, Kernel, KernelSource, Target};
use runtime::cuda::{Stream, devices};
use runtime::{Argument, Buffer, Device, DeviceKind, Error, Function};

/// Around a warp, around nothing, and a prime number of elements that fills many blocks.
const SIZES: [usize; 6] = [0, 1, 31, 32, 33, 1_000_003];

/// The GPU to test on, for one test at a time: some of them measure its memory.
struct Gpu {
    device: Device,
    _alone: MutexGuard<'static, ()>,
}

fn gpu(test: &str) -> Option<Gpu> {
    static ALONE: Mutex<()> = Mutex::new(());
    let Some(name) = std::env::var("TEST_DEVICE").ok().filter(|name| name.starts_with("cuda")) else {
        println!("skipped: {test} needs a GPU; set TEST_DEVICE=cuda:0");
        return None;
    };
    // A test that failed leaves nothing behind that the next one minds.
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    Some(Gpu { device: name.parse().unwrap(), _alone: alone })
}

fn upload<T: bytemuck::Pod>(device: &Device, values: &[T]) -> Buffer {
    let mut buffer = device.allocate(size_of_val(values)).unwrap();
    buffer.copy_from_host(bytemuck::cast_slice(values)).unwrap();
    buffer
}

fn download<T: bytemuck::Pod>(buffer: &Buffer) -> Vec<T> {
    let mut values = vec![T::zeroed(); buffer.len() / size_of::<T>()];
    buffer.copy_to_host(bytemuck::cast_slice_mut(&mut values)).unwrap();
    values
}

fn fill(function: &Function, buffer: &mut Buffer, value: u32) {
    let count = (buffer.len() / 4) as u64;
    let arguments = [Argument::Write(buffer, Element::U32), Argument::U32(value), Argument::U64(count)];
    function.launch(Fill::grid(count).unwrap(), &arguments).unwrap();
}

fn fill_on(stream: &Stream, function: &Function, buffer: &mut Buffer, value: u32) {
    let count = (buffer.len() / 4) as u64;
    let arguments = [Argument::Write(buffer, Element::U32), Argument::U32(value), Argument::U64(count)];
    function.launch_on(stream, Fill::grid(count).unwrap(), &arguments).unwrap();
}

/// The process still does all that it did before.
fn assert_usable(device: &Device) {
    let mut buffer = device.allocate(4 * 1_000).unwrap();
    fill(&device.load(&Fill.build()).unwrap(), &mut buffer, 0xdead_beef);
    assert_eq!(download::<u32>(&buffer), [0xdead_beef; 1_000]);
}

#[test]
fn devices_are_listed_or_one_line_says_why_there_are_none() {
    match devices() {
        Ok(devices) => {
            for (ordinal, device) in devices.iter().enumerate() {
                println!("{device}");
                assert_eq!(device.ordinal as usize, ordinal);
                assert!(device.total_memory >= device.free_memory.unwrap_or(0) && device.total_memory > 1 << 30);
                assert!(device.cuda_version.0 >= 11 && !device.name.is_empty());
            }
        }
        Err(error) => {
            let message = error.to_string();
            println!("{message}");
            assert_eq!(message.lines().count(), 1, "{message}");
            let reasons = ["libcuda.so.1 cannot be opened", "cuInit failed with CUDA_ERROR_"];
            assert!(reasons.iter().any(|reason| message.contains(reason)), "{message}");
            assert!(matches!(Device::cuda(0), Err(Error::NoDriver { .. } | Error::Driver { .. })));
            assert!("cuda:0".parse::<Device>().unwrap_err().to_string().contains("--device cpu"));
            assert_eq!("auto".parse::<Device>().unwrap(), Device::cpu());
        }
    }
}

#[test]
fn a_device_name_that_is_none_is_refused_with_the_names_there_are() {
    for name in ["cuda:", "cuda:-1", "cuda:one", "gpu", "", "CPU", "cuda:99999999999"] {
        let message = name.parse::<Device>().unwrap_err().to_string();
        assert!(message.contains("cuda:0") && message.contains("auto"), "{name}: {message}");
    }
}

#[test]
fn the_cpu_says_that_kernels_and_streams_need_a_gpu() {
    let device = Device::cpu();
    device.synchronize().unwrap();
    let message = device.load(&Fill.build()).err().unwrap().to_string();
    assert_eq!(message, "loading a kernel needs a GPU, but the device is cpu: `grafter devices` lists the GPUs");
    assert!(matches!(device.new_stream(), Err(Error::NotAGpu { .. })));
    assert!(matches!(device.home_stream(), Err(Error::NotAGpu { .. })));
}

#[test]
fn bytes_come_back_as_they_went() {
    let Some(gpu) = gpu("copying to the GPU and back") else { return };
    assert_eq!(gpu.device.kind(), DeviceKind::Cuda(0));
    for size in SIZES {
        let bytes: Vec<u8> = (0..size).map(|index| (index * 31 % 251) as u8).collect();
        let mut buffer = upload(&gpu.device, &bytes);
        assert_eq!(download::<u8>(&buffer), bytes);
        buffer.set_zero().unwrap();
        assert_eq!(download::<u8>(&buffer), vec![0; size]);
    }
    let mut buffer = gpu.device.allocate(8).unwrap();
    assert!(matches!(buffer.copy_from_host(&[0; 7]), Err(Error::SizeMismatch { .. })));
    assert!(matches!(buffer.as_slice::<u8>(), Err(Error::NotOnHost { .. })));
    assert!(matches!(buffer.as_mut_slice::<u8>(), Err(Error::NotOnHost { .. })));
}

#[test]
fn fill_writes_the_pattern_everywhere_and_nowhere_else() {
    let Some(gpu) = gpu("fill") else { return };
    let function = gpu.device.load(&Fill.build()).unwrap();
    for size in SIZES {
        // The kernel is told of fewer elements than the buffer has: those behind must stay.
        let mut buffer = upload(&gpu.device, &vec![7_u32; size + 100]);
        let arguments =
            [Argument::Write(&mut buffer, Element::U32), Argument::U32(0x8000_0001), Argument::U64(size as u64)];
        function.launch(Fill::grid(size as u64).unwrap(), &arguments).unwrap();
        let values = download::<u32>(&buffer);
        assert!(values[..size].iter().all(|&value| value == 0x8000_0001), "{size}");
        assert!(values[size..].iter().all(|&value| value == 7), "{size}");
    }
}

#[test]
fn axpy_is_a_fused_multiply_add_to_the_bit() {
    let Some(gpu) = gpu("axpy") else { return };
    let function = gpu.device.load(&Axpy.build()).unwrap();
    for size in SIZES {
        let x: Vec<f32> = (0..size).map(|index| (index as f32 * 0.37).sin() * 3.0).collect();
        let y: Vec<f32> = (0..size).map(|index| (index as f32 * 0.11).cos() - 0.5).collect();
        let a = -1.7_f32;
        let x_buffer = upload(&gpu.device, &x);
        let mut y_buffer = upload(&gpu.device, &y);
        let arguments = [
            Argument::Write(&mut y_buffer, Element::F32),
            Argument::Read(&x_buffer, Element::F32),
            Argument::F32(a),
            Argument::U64(size as u64),
        ];
        function.launch(Axpy::grid(size as u64).unwrap(), &arguments).unwrap();
        // One rounding on both sides: no tolerance is needed.
        let expected: Vec<u32> = x.iter().zip(&y).map(|(x, y)| a.mul_add(*x, *y).to_bits()).collect();
        assert_eq!(download::<u32>(&y_buffer), expected, "{size} elements");
        assert_eq!(download::<f32>(&x_buffer), x, "x was written");
    }
}

#[test]
fn wrong_arguments_are_refused_before_the_launch() {
    let Some(gpu) = gpu("argument checks") else { return };
    let function = gpu.device.load(&Fill.build()).unwrap();
    let mut buffer = upload(&gpu.device, &[7_u32; 64]);
    let mut elsewhere = Device::cpu().allocate(256).unwrap();
    let refused = |grid: [u32; 3], arguments: &[Argument<'_>], expected: &str| {
        let error = function.launch(grid, arguments).unwrap_err();
        assert!(matches!(error, Error::Launch { .. }), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    };
    refused([1, 1, 1], &[], "takes 3 arguments (y, value, count), 0 were given");
    refused(
        [1, 1, 1],
        &[Argument::Write(&mut buffer, Element::U32), Argument::U64(1), Argument::U64(64)],
        "argument 2 (value) must be a u32 number, but a u64 number was given",
    );
    refused(
        [1, 1, 1],
        &[Argument::Write(&mut buffer, Element::Bf16), Argument::U32(1), Argument::U64(64)],
        "must be memory of u32 to write, but memory of bf16 to write was given",
    );
    refused(
        [1, 1, 1],
        &[Argument::Read(&buffer, Element::U32), Argument::U32(1), Argument::U64(64)],
        "must be memory of u32 to write",
    );
    refused(
        [1, 1, 1],
        &[Argument::Write(&mut elsewhere, Element::U32), Argument::U32(1), Argument::U64(64)],
        "the buffer for y lives on cpu, the kernel runs on cuda:0",
    );
    refused(
        [1, 1_000_000, 1],
        &[Argument::Write(&mut buffer, Element::U32), Argument::U32(1), Argument::U64(64)],
        "1000000 blocks in y",
    );
    let mut kernel = Fill.build();
    kernel.shared_bytes = 100 << 20;
    let error = gpu.device.load(&kernel).err().unwrap();
    assert!(matches!(error, Error::Launch { .. }) && error.to_string().contains("shared memory"), "{error}");
    assert_eq!(download::<u32>(&buffer), [7; 64]);
    assert_usable(&gpu.device);
}

#[test]
fn a_text_that_does_not_assemble_is_an_error_with_the_log() {
    let Some(gpu) = gpu("bad PTX") else { return };
    let broken = |change: &dyn Fn(&mut Kernel)| {
        let mut kernel = Fill.build();
        change(&mut kernel);
        gpu.device.load(&kernel).err().unwrap().to_string()
    };
    let message = broken(&|kernel| kernel.text = kernel.text.replace("st.global.b32", "st.globule.b32"));
    println!("{message}");
    assert!(message.contains("kernel fill_u32 cannot be loaded"), "{message}");
    assert!(message.contains("cuLinkAddData_v2") && message.contains("CUDA_ERROR_INVALID_PTX"), "{message}");
    assert!(message.contains("globule") && message.contains("line"), "the compiler's log is missing: {message}");
    let message = broken(&|kernel| kernel.name = "empty".to_owned());
    assert!(message.contains("no entry of this name") && message.contains("CUDA_ERROR_NOT_FOUND"), "{message}");
    let message = broken(&|kernel| kernel.text.push('\0'));
    assert!(message.contains("nul"), "{message}");
    assert_usable(&gpu.device);
}

#[test]
fn out_of_memory_names_sizes_and_leaves_the_process_usable() {
    let Some(gpu) = gpu("out of memory") else { return };
    // What earlier tests left in the pool would count as free once the pool gives it back.
    gpu.device.trim_memory().unwrap();
    let (free, total) = gpu.device.free_and_total_memory().unwrap();
    let held = upload(&gpu.device, &vec![5_u8; 3 << 20]);
    for bytes in [1 << 40, free + (1 << 30), usize::MAX] {
        let error = gpu.device.allocate(bytes).err().unwrap();
        let message = error.to_string();
        println!("{message}");
        assert!(matches!(error, Error::OutOfMemory { .. }), "{message}");
        let in_use = gpu.device.memory_usage().in_use;
        for part in [
            "out of memory on cuda:0",
            &format!("{bytes} bytes were requested"),
            &format!("{in_use} bytes are in use"),
            &format!("{total} bytes"),
            "reserved",
            "nvidia-smi",
        ] {
            assert!(message.contains(part), "\"{part}\" is missing: {message}");
        }
        assert_usable(&gpu.device);
    }

    // Until nothing is left.
    let mut blocks = Vec::new();
    let error = loop {
        match gpu.device.allocate(2 << 30) {
            Ok(block) => blocks.push(block),
            Err(error) => break error,
        }
        assert!(blocks.len() * (2 << 30) <= total, "more memory than there is");
    };
    assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
    assert!(gpu.device.memory_usage().in_use >= blocks.len() * (2 << 30));
    blocks.clear();
    assert_usable(&gpu.device);
    assert!(download::<u8>(&held).iter().all(|&byte| byte == 5), "memory in use was touched");
    drop(held);

    gpu.device.trim_memory().unwrap();
    assert_eq!(gpu.device.memory_usage().in_use, 0);
    assert_eq!(gpu.device.memory_usage().reserved, 0);
    assert_usable(&gpu.device);
}

#[test]
fn ten_thousand_iterations_leave_memory_flat() {
    let Some(gpu) = gpu("flat memory") else { return };
    let function = gpu.device.load(&Fill.build()).unwrap();
    let side = gpu.device.new_stream().unwrap();
    let iteration = |index: u32| {
        // 4 bytes to 4 MiB: small blocks, large blocks, splits and merges.
        let elements = 1 + (index as usize).wrapping_mul(2_654_435_761) % (1 << (index % 21));
        let mut first = gpu.device.allocate(4 * elements).unwrap();
        let mut second = gpu.device.allocate(4 * (elements / 2 + 1)).unwrap();
        fill(&function, &mut first, index);
        fill_on(&side, &function, &mut second, !index);
        let done = side.record().unwrap();
        if index.is_multiple_of(100) {
            done.synchronize().unwrap();
            assert!(download::<u32>(&first).iter().all(|&value| value == index), "iteration {index}");
            assert!(download::<u32>(&second).iter().all(|&value| value == !index), "iteration {index}");
        }
    };
    (0..1_000).for_each(iteration);
    gpu.device.synchronize().unwrap();
    let usage = gpu.device.memory_usage();
    let (free, _) = gpu.device.free_and_total_memory().unwrap();
    let clock = Instant::now();
    (1_000..11_000).for_each(iteration);
    gpu.device.synchronize().unwrap();
    println!("10,000 iterations of two blocks, two launches and an event: {:?}", clock.elapsed());
    assert_eq!(gpu.device.memory_usage().in_use, usage.in_use);
    assert_eq!(gpu.device.memory_usage().reserved, usage.reserved);
    let (free_after, _) = gpu.device.free_and_total_memory().unwrap();
    println!("free before {free} and after {free_after}; {usage:?}");
    // The smallest block has 512 bytes: were even one per iteration lost to the driver, it would be 5 MB.
    assert!(free.saturating_sub(free_after) <= 2 << 20, "{free} bytes were free before, {free_after} after");
}

#[test]
fn events_measure_the_time_of_the_work_between_them() {
    let Some(gpu) = gpu("events") else { return };
    let function = gpu.device.load(&Fill.build()).unwrap();
    let stream = gpu.device.home_stream().unwrap();
    let mut buffer = gpu.device.allocate(256 << 20).unwrap();
    let mut measure = |launches: u32| {
        gpu.device.synchronize().unwrap();
        let clock = Instant::now();
        let start = stream.record().unwrap();
        for value in 0..launches {
            fill(&function, &mut buffer, value);
        }
        let end = stream.record().unwrap();
        let elapsed = end.elapsed_since(&start).unwrap();
        (elapsed, clock.elapsed())
    };
    measure(3);
    let (long, wall) = measure(100);
    println!("100 fills of 256 MiB: {long:?} on the GPU, {wall:?} on the clock");
    // No memory writes 20 TB/s, and the host saw the start before and the end after.
    assert!(long > Duration::from_secs_f64(100.0 * f64::from(256 << 20) / 20e12), "{long:?}");
    assert!(long <= wall + Duration::from_millis(1), "{long:?} on the GPU, {wall:?} on the clock");
    let (short, _) = measure(10);
    assert!(short < long / 2, "{short:?} for a tenth of {long:?}");
}

#[test]
fn a_buffer_is_in_order_whatever_stream_it_is_used_on() {
    let Some(gpu) = gpu("streams") else { return };
    let function = gpu.device.load(&Fill.build()).unwrap();
    let side = gpu.device.new_stream().unwrap();
    let elements = 64 << 20;
    for round in 0..20_u32 {
        // Slow work on the side stream writes 1, then the home stream writes 2: the read must see 2.
        let mut buffer = gpu.device.allocate(4 * elements).unwrap();
        for _ in 0..5 {
            fill_on(&side, &function, &mut buffer, 1);
        }
        fill(&function, &mut buffer, round + 2);
        assert!(download::<u32>(&buffer).iter().all(|&value| value == round + 2), "round {round}");

        // A block that goes back while the side stream still writes it must not be handed on before.
        for _ in 0..5 {
            fill_on(&side, &function, &mut buffer, 1);
        }
        drop(buffer);
        let mut next = gpu.device.allocate(4 * elements).unwrap();
        fill(&function, &mut next, round + 3);
        assert!(download::<u32>(&next).iter().all(|&value| value == round + 3), "round {round}");

        // And the side stream sees what the home stream wrote.
        let mut sum = upload(&gpu.device, &vec![0.5_f32; 1_000]);
        let x = upload(&gpu.device, &vec![2.0_f32; 1_000]);
        let arguments = [
            Argument::Write(&mut sum, Element::F32),
            Argument::Read(&x, Element::F32),
            Argument::F32(3.0),
            Argument::U64(1_000),
        ];
        let axpy = gpu.device.load(&Axpy.build()).unwrap();
        axpy.launch_on(&side, Axpy::grid(1_000).unwrap(), &arguments).unwrap();
        assert_eq!(download::<f32>(&sum), vec![6.5; 1_000]);
    }
    let event = gpu.device.home_stream().unwrap().record().unwrap();
    side.wait(&event).unwrap();
    side.synchronize().unwrap();
}

#[test]
fn any_thread_may_use_the_device() {
    let Some(gpu) = gpu("threads") else { return };
    std::thread::scope(|scope| {
        for thread in 0..8_u32 {
            let device = gpu.device.clone();
            scope.spawn(move || {
                for round in 0..200_u32 {
                    let value = thread * 1_000 + round;
                    let mut buffer = device.allocate(4 * (1_000 + 37 * value as usize)).unwrap();
                    fill(&device.load(&Fill.build()).unwrap(), &mut buffer, value);
                    assert!(download::<u32>(&buffer).iter().all(|&found| found == value));
                }
            });
        }
    });
}

/// The environment variable that tells a child process which test's part to play.
const CHILD: &str = "GRAFTER_TEST_CUDA_CHILD";

/// Whether this process is the child of this test.
fn is_child(test: &str) -> bool {
    std::env::var(CHILD).is_ok_and(|name| name == test)
}

/// Runs one test of this file in a process of its own, with these variables; what it prints.
fn child(test: &str, variables: &[(&str, &str)]) -> String {
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(CHILD, test)
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    println!("{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success());
    text
}

#[test]
fn a_kernel_that_faults_is_an_error_with_advice_and_nothing_panics() {
    let test = "a_kernel_that_faults_is_an_error_with_advice_and_nothing_panics";
    if is_child(test) {
        let device: Device = std::env::var("TEST_DEVICE").unwrap().parse().unwrap();
        let function = device.load(&Fill.build()).unwrap();
        let stream = device.new_stream().unwrap();
        let mut buffer = device.allocate(4096).unwrap();
        // The argument claims 4 TiB behind a buffer of 4 KiB.
        let arguments = [Argument::Write(&mut buffer, Element::U32), Argument::U32(1), Argument::U64(1 << 40)];
        match function.launch_on(&stream, [1 << 30, 1, 1], &arguments) {
            Ok(()) => println!("reported: {}", device.synchronize().unwrap_err()),
            // CUDA_LAUNCH_BLOCKING.
            Err(error) => println!("reported: {error}"),
        }
        println!("again: {}", buffer.copy_to_host(&mut [0; 4096]).unwrap_err());
        println!("allocation: {}", device.allocate(1 << 30).err().unwrap());
        println!("loading: {}", device.load(&Axpy.build()).err().unwrap());
        drop((buffer, stream));
        println!("dropped");
        return;
    }
    let Some(_gpu) = gpu("a faulting kernel") else { return };
    // The fault takes the whole process's context with it: a process of its own.
    // The second way to launch is that of GPUs on which launches overlap.
    for (blocking, calls) in [
        ("0", ["cuCtxSynchronize"; 2].map(|call| format!("CUDA driver call {call}"))),
        (
            "1",
            ["cuLaunchKernel", "cuLaunchKernelEx"]
                .map(|call| format!("launching kernel fill_u32: CUDA driver call {call}")),
        ),
    ] {
        let text = child(test, &[("CUDA_LAUNCH_BLOCKING", blocking)]);
        for line in ["reported", "again", "allocation", "loading"] {
            let cause =
                |call: &str| format!("{line}: cuda:0 is lost: {call} failed with CUDA_ERROR_ILLEGAL_ADDRESS (700)");
            assert!(calls.iter().any(|call| text.contains(&cause(call))), "{line}");
        }
        assert!(text.contains("start the process again") && text.contains("dropped"));
        assert!(blocking == "1" || text.contains("not known to be finished, the last one first: fill_u32"));
    }
}

#[test]
fn a_second_start_reads_machine_code_and_a_damaged_file_is_compiled_again() {
    let test = "a_second_start_reads_machine_code_and_a_damaged_file_is_compiled_again";
    if is_child(test) {
        let device: Device = std::env::var("TEST_DEVICE").unwrap().parse().unwrap();
        let clock = Instant::now();
        device.load(&Axpy.build()).unwrap();
        println!("loaded in {:?}", clock.elapsed());
        assert_usable(&device);
        return;
    }
    let Some(_gpu) = gpu("the cache of machine code") else { return };
    let folder = tempfile::tempdir().unwrap();
    // The driver has a cache of its own, which must not answer for ours.
    let start = |cache: &str| child(test, &[("GRAFTER_CACHE", cache), ("CUDA_CACHE_DISABLE", "1")]);
    let files = || {
        let entries = std::fs::read_dir(folder.path().join("kernels")).unwrap();
        let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        files.sort();
        let whole = files.iter().map(|path| (path.clone(), std::fs::read(path).unwrap()));
        whole.collect::<Vec<(std::path::PathBuf, Vec<u8>)>>()
    };
    let modified = || files().iter().map(|(path, _)| path.metadata().unwrap().modified().unwrap()).collect::<Vec<_>>();
    let name = folder.path().to_str().unwrap();
    start(name);
    let (before, times) = (files(), modified());
    assert_eq!(before.len(), 2, "one file per kernel");
    start(name);
    assert_eq!(modified(), times, "a second start compiled again");
    for (path, bytes) in &before {
        let mut damaged = bytes.clone();
        damaged[bytes.len() / 2] ^= 1;
        std::fs::write(path, damaged).unwrap();
    }
    start(name);
    let names = |files: Vec<(std::path::PathBuf, Vec<u8>)>| files.into_iter().map(|(path, _)| path).collect::<Vec<_>>();
    for (path, bytes) in files() {
        let header = |bytes: &[u8]| bytes.split(|&byte| byte == b'\n').take(2).map(<[u8]>::to_vec).collect::<Vec<_>>();
        let damaged = before.iter().find(|(own, _)| *own == path).unwrap();
        assert_eq!(header(&bytes), header(&damaged.1));
    }
    let repaired = modified();
    start(name);
    assert_eq!(modified(), repaired, "the damaged files were not replaced by whole ones");
    assert_eq!(names(files()), names(before));
    start("off");
    // A file where the folder should be: a warning, no error.
    std::fs::remove_dir_all(folder.path().join("kernels")).unwrap();
    std::fs::write(folder.path().join("kernels"), "").unwrap();
    start(name);
}

#[test]
fn uploads_overlap_with_work_and_arrive_in_order() {
    let Some(gpu) = gpu("uploads") else { return };
    let function = gpu.device.load(&Fill.build()).unwrap();
    // Sizes around the chunks and the ring of the staging memory.
    for size in [0, 1, 1 << 20, (1 << 20) + 1, (4 << 20) - 1, (50 << 20) + 3] {
        let bytes: Vec<u8> = (0..size).map(|index| (index * 31 % 251) as u8).collect();
        let uploaded = gpu.device.upload(&bytes).unwrap();
        assert!(download::<u8>(&uploaded) == bytes, "{size} bytes");
    }
    // Batches that change every step, uploaded a step ahead of their use.
    let add = gpu.device.load(&Axpy.build()).unwrap();
    let count = 1 << 20;
    let mut sum = upload(&gpu.device, &vec![0.0_f32; count]);
    let batch = |step: usize| gpu.device.upload(bytemuck::cast_slice(&vec![step as f32; count])).unwrap();
    let mut next = batch(1);
    let mut usage = Vec::new();
    for step in 1..=100 {
        let this = std::mem::replace(&mut next, batch(step + 1));
        let arguments = [
            Argument::Write(&mut sum, Element::F32),
            Argument::Read(&this, Element::F32),
            Argument::F32(1.0),
            Argument::U64(count as u64),
        ];
        add.launch(Axpy::grid(count as u64).unwrap(), &arguments).unwrap();
        usage.push(gpu.device.memory_usage().reserved);
    }
    assert_eq!(usage[10], usage[99], "uploads take ever more memory");
    assert_eq!(download::<f32>(&sum), vec![5050.0; count]);
    drop(next);

    let mut target = gpu.device.allocate(1 << 30).unwrap();
    let source = vec![1_u8; 64 << 20];
    drop(gpu.device.upload(&source).unwrap());
    gpu.device.synchronize().unwrap();
    let mut measure = |launches: u32, uploads: u32| {
        let clock = Instant::now();
        (0..launches).for_each(|value| fill(&function, &mut target, value));
        for _ in 0..uploads {
            let uploaded = gpu.device.upload(&source).unwrap();
            drop(uploaded);
        }
        gpu.device.synchronize().unwrap();
        clock.elapsed()
    };
    measure(10, 1);
    let (work, copies, both) = (measure(100, 0), measure(0, 1), measure(100, 1));
    println!("100 fills of 1 GiB: {work:?}; an upload of 64 MiB: {copies:?}; both: {both:?}");
    assert!(both < work + copies * 3 / 4, "no overlap: {work:?} and {copies:?} apart, {both:?} together");
}

#[test]
fn copies_run_at_the_speed_of_the_bus() {
    let Some(gpu) = gpu("the speed of copies") else { return };
    let mut bytes = vec![1_u8; 1 << 30];
    let mut buffer = upload(&gpu.device, &bytes);
    gpu.device.synchronize().unwrap();
    let clock = Instant::now();
    buffer.copy_from_host(&bytes).unwrap();
    gpu.device.synchronize().unwrap();
    let to_device = clock.elapsed().as_secs_f64();
    let clock = Instant::now();
    buffer.copy_to_host(&mut bytes).unwrap();
    let to_host = clock.elapsed().as_secs_f64();
    println!("1 GiB: {:.1} GB/s to the device, {:.1} GB/s to the host", 1.073 / to_device, 1.073 / to_host);
    // One core copies memory at some 5 GB/s at the least; PCIe moves 12 to 60.
    assert!(to_device < 0.5 && to_host < 0.5);
}

/// `y = y + a x` on the home stream.
fn axpy(function: &Function, y: &mut Buffer, x: &Buffer, a: f32) -> runtime::Result<()> {
    let count = (x.len() / 4) as u64;
    let arguments =
        [Argument::Write(y, Element::F32), Argument::Read(x, Element::F32), Argument::F32(a), Argument::U64(count)];
    function.launch_sized(Axpy::grid(count).unwrap(), &arguments, &[count])
}

/// Each launch reads what the one before it wrote from other multiprocessors, over what those before had read.
#[test]
fn launches_see_what_those_before_wrote() {
    const COUNT: usize = 40_000;
    const ROUNDS: u32 = 200;
    let Some(gpu) = gpu("launches one behind the other") else { return };
    let [filler, adder] = [Fill.build(), Axpy.build()].map(|kernel| gpu.device.load(&kernel).unwrap());
    let mut x = gpu.device.allocate(4 * COUNT).unwrap();
    let mut y = upload(&gpu.device, &[0.0_f32; COUNT]);
    let mut rounds = || {
        for round in 0..ROUNDS {
            fill(&filler, &mut x, (round as f32).to_bits());
            axpy(&adder, &mut y, &x, 1.0)?;
        }
        runtime::Result::Ok(())
    };
    rounds().unwrap();
    let (graph, ()) = gpu.device.capture(&mut rounds).unwrap();
    (0..10).for_each(|_| graph.replay().unwrap());
    let expected = (11 * ROUNDS * (ROUNDS - 1) / 2) as f32;
    assert_eq!(download::<f32>(&y), [expected; COUNT]);
}

#[test]
fn a_graph_replays_what_was_captured_on_its_own_memory() {
    let Some(gpu) = gpu("graphs") else { return };
    let device = &gpu.device;
    let add = device.load(&Axpy.build()).unwrap();
    let in_use = device.memory_usage().in_use;
    let count = 10_000;
    let mut input = upload(device, &vec![1.0_f32; count]);
    let captured = device.capture(|| -> runtime::Result<Buffer> {
        let mut output = device.allocate(4 * count)?;
        output.set_zero()?;
        for step in 0..500 {
            let mut temporary = device.allocate(4 * (count + step))?;
            temporary.set_zero()?;
            axpy(&add, &mut temporary, &input, 1.0)?;
            axpy(&add, &mut output, &temporary, 1.0)?;
        }
        Ok(output)
    });
    let (graph, output) = captured.unwrap();
    assert_eq!(graph.launches(), 1000);
    // 500 temporaries of 40 kB share a few blocks.
    assert!(device.memory_usage().in_use - in_use < 4 << 20, "{:?}", device.memory_usage());
    for value in [1.0, 2.0, 0.25_f32] {
        input.copy_from_host(bytemuck::cast_slice(&vec![value; count])).unwrap();
        graph.replay().unwrap();
        assert_eq!(download::<f32>(&output), vec![500.0 * value; count]);
    }
    // Whatever else is allocated, a replay leaves it alone; the dropped input stays the graph's.
    drop(input);
    let others: Vec<Buffer> = (0..200).map(|index| upload(device, &vec![index as u32; count])).collect();
    for _ in 0..3 {
        graph.replay().unwrap();
    }
    for (index, other) in others.iter().enumerate() {
        assert!(download::<u32>(other).iter().all(|&value| value == index as u32), "block {index}");
    }
    drop(others);

    let mut output = output;
    let mut temporary = device.allocate(4 * count).unwrap();
    let mut launches = || {
        for _ in 0..500 {
            temporary.set_zero().unwrap();
            axpy(&add, &mut temporary, &output, 0.0).unwrap();
            axpy(&add, &mut output, &temporary, 0.0).unwrap();
        }
        device.synchronize().unwrap();
    };
    let replays = || {
        graph.replay().unwrap();
        device.synchronize().unwrap();
    };
    launches();
    replays();
    let clock = Instant::now();
    launches();
    let one_by_one = clock.elapsed();
    let clock = Instant::now();
    replays();
    println!("1,500 nodes: {one_by_one:?} one by one, {:?} as a graph", clock.elapsed());
    drop((graph, output, temporary));
    device.synchronize().unwrap();
    assert_eq!(device.memory_usage().in_use, in_use);
    assert_usable(device);
}

#[test]
fn what_a_graph_cannot_hold_is_refused_and_the_capture_ends_cleanly() {
    let Some(gpu) = gpu("captures that fail") else { return };
    let device = &gpu.device;
    let mut buffer = upload(device, &[7_u32; 64]);
    let function = device.load(&Fill.build()).unwrap();
    let side = device.new_stream().unwrap();
    let captured = device.capture(|| -> runtime::Result<()> {
        fill(&function, &mut buffer, 1);
        for refused in [
            buffer.copy_from_host(&[0; 256]),
            buffer.copy_to_host(&mut [0; 256]),
            device.upload(&[0]).map(drop),
            device.synchronize(),
            device.capture(|| -> runtime::Result<()> { Ok(()) }).map(drop),
        ] {
            assert!(matches!(refused, Err(Error::Capturing { .. })), "{refused:?}");
        }
        // Loading and allocating is no part of the graph, and allowed.
        device.load(&Axpy.build())?;
        drop(device.allocate(300 << 20)?);
        // Another stream goes on beside the capture.
        side.record()?.synchronize()?;
        function.launch([1, 1, 1], &[])
    });
    let error = captured.err().unwrap();
    assert!(matches!(error, Error::Launch { .. }), "{error}");
    assert_eq!(download::<u32>(&buffer), [7; 64]);
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        device.capture(|| -> runtime::Result<()> { panic!("as the test wants it") })
    }));
    assert!(panicked.is_err());
    device.capture(|| -> runtime::Result<()> { Ok(()) }).unwrap().0.replay().unwrap();
    // Other threads launch, allocate and wait for their work while this one captures.
    let ((graph, ()), elsewhere) = std::thread::scope(|scope| {
        let captured = device.capture(|| -> runtime::Result<_> {
            fill(&function, &mut buffer, 3);
            scope.spawn(|| assert_usable(device)).join().unwrap();
            Ok(())
        });
        (captured.unwrap(), scope.spawn(|| device.synchronize()).join().unwrap())
    });
    elsewhere.unwrap();
    assert_eq!(download::<u32>(&buffer), [7; 64]);
    graph.replay().unwrap();
    assert_eq!(download::<u32>(&buffer), [3; 64]);
    assert_usable(device);
}

#[test]
fn the_record_of_launches_has_plausible_times() {
    let Some(gpu) = gpu("the record of launches") else { return };
    let device = &gpu.device;
    let add = device.load(&Axpy.build()).unwrap();
    let count = 64 << 20;
    let x = upload(device, &vec![1.0_f32; count]);
    let mut y = upload(device, &vec![1.0_f32; count]);
    axpy(&add, &mut y, &x, 1.0).unwrap();
    device.synchronize().unwrap();
    let clock = Instant::now();
    let recording = device.record_launches().unwrap();
    let _layer = runtime::range("layer 3");
    for _ in 0..20 {
        axpy(&add, &mut y, &x, 1.0).unwrap();
    }
    let records = recording.take_records().unwrap();
    let wall = clock.elapsed();
    assert_eq!(records.len(), 20);
    let bytes = 12.0 * count as f64;
    for (record, next) in records.iter().zip(records.iter().skip(1)) {
        assert_eq!((&*record.kernel, &*record.ranges[0]), ("axpy_f32", "layer 3"));
        assert_eq!(record.work.unwrap().bytes as f64, bytes);
        let speed = bytes / record.duration.as_secs_f64();
        assert!((1e10..2e13).contains(&speed), "{speed:.3e} bytes/s");
        assert!(next.start + Duration::from_micros(2) >= record.end(), "{record:?} {next:?}");
    }
    let whole: Duration = records.iter().map(|record| record.duration).sum();
    println!("20 axpy of {bytes:.2e} bytes: {whole:?} of {wall:?}; {:.2e} bytes/s", 20.0 * bytes / whole.as_secs_f64());
    assert!(whole <= wall);
    drop(recording);
    axpy(&add, &mut y, &x, 1.0).unwrap();
    assert!(device.record_launches().unwrap().take_records().unwrap().is_empty());
}

#[test]
fn a_text_for_sm_90a_compiles_where_it_runs() {
    let Some(gpu) = gpu("sm_90a") else { return };
    let mut kernel = Fill.build();
    let version = kernel.text.lines().find(|line| line.starts_with(".version")).unwrap().to_owned();
    kernel.text = kernel.text.replace(&version, ".version 8.0").replace(".target sm_80", ".target sm_90a");
    // An instruction that only sm_90a has.
    let end = kernel.text.rfind('}').unwrap();
    kernel.text.insert_str(end, "wgmma.fence.sync.aligned;\n    ret;\n");
    kernel.target = Target::Sm90a;
    match gpu.device.load(&kernel) {
        Ok(_) => {}
        Err(Error::Launch { reason, .. }) => println!("skipped: {reason}"),
        Err(error) => panic!("{error}"),
    }
    assert_usable(&gpu.device);
}
