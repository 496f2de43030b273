//! Launches on a GPU.

use std::ffi::c_void;
use std::ptr;
use std::sync::Arc;

use kernels_ptx::Kernel;

use super::driver::call;
use super::driver::later::{LaunchAttribute, LaunchConfiguration};
use super::graph;
use super::module::Loaded;
use super::recorder::Description;
use super::stream::Queue;
use crate::launch::{Argument, check_launch};
use crate::{Buffer, Device, Error, Result, Word, nvtx};

/// Checks a launch and queues it. The kernel is loaded on the stream's device; `sizes` are those of the problem, for the
/// record.
pub(super) fn launch(
    loaded: &Loaded,
    queue: &Arc<Queue>,
    grid: [u32; 3],
    arguments: &[Argument<'_>],
    sizes: Option<&[u64]>,
) -> Result<()> {
    let kernel = loaded.kernel();
    let device = queue.device();
    check_launch(kernel, grid, arguments, device.limits())?;
    // Every value as 64 bits in memory. Both architectures are little-endian: the first four bytes are those of a
    // 32-bit value.
    let mut values = Vec::with_capacity(arguments.len());
    // Copies of tables on the device, which a launch uses like the buffers of its arguments.
    let mut tables: Vec<Arc<Buffer>> = Vec::new();
    for (parameter, argument) in kernel.parameters.iter().zip(arguments) {
        let address = |buffer: &Buffer| match buffer.cuda_block() {
            Some(block) if ptr::eq(block.device(), device) => Ok(block.address()),
            _ => Err(elsewhere(kernel, parameter.name, buffer, &device.to_string())),
        };
        values.push(match argument {
            Argument::U32(value) => u64::from(*value),
            Argument::U64(value) => *value,
            Argument::F32(value) => u64::from(value.to_bits()),
            Argument::Read(buffer, _) => address(buffer)?,
            Argument::Write(buffer, _) => address(buffer)?,
            Argument::Table(table, words) => {
                let words = words.iter().map(|word| match word {
                    Word::U64(value) => Ok(*value),
                    Word::Read(buffer, _) => address(buffer),
                    Word::Write(buffer, _) => address(buffer),
                });
                let words = words.collect::<Result<Vec<u64>>>()?;
                if grid.contains(&0) {
                    continue;
                }
                let home = Device::of_cuda(device);
                let upload = |bytes: &[u8]| Ok(Buffer::cuda(home.clone(), device.upload_now(bytes)?));
                let copy = table.on(&home, words, upload)?;
                let place = address(&copy)?;
                tables.push(copy);
                place
            }
        });
    }
    if grid.contains(&0) {
        return Ok(());
    }
    device.activate()?;
    let capture = graph::current(device);
    if capture.as_ref().is_some_and(|capture| !queue.is(capture.queue())) {
        return Err(Error::Capturing { operation: "a launch on another stream" });
    }
    if queue.is_beside_home() {
        // Memory that the pool handed on, and what was copied into it, is in order on the home stream.
        queue.after(device.home().queue())?;
    }
    let given = arguments.iter().flat_map(Argument::buffers).map(|(buffer, _)| buffer);
    for buffer in given.chain(tables.iter().map(|table| &**table)) {
        if let Some(block) = buffer.cuda_block() {
            block.use_on(queue)?;
        }
    }
    let Some(capture) = capture else {
        let describe = || Description {
            kernel: Arc::clone(loaded.name()),
            grid,
            block: kernel.block,
            work: sizes.and_then(|sizes| kernel.work(sizes)),
        };
        device.recorder().around(queue, describe, || queue_kernel(loaded, queue, grid, &mut values))?;
        device.health().launched(loaded.name(), queue.raw().addr());
        return Ok(());
    };
    queue_kernel(loaded, queue, grid, &mut values)?;
    capture.launched();
    Ok(())
}

/// Hands a launch to the driver. `values` has one value per parameter, each in 64 bits.
fn queue_kernel(loaded: &Loaded, queue: &Queue, grid: [u32; 3], values: &mut [u64]) -> Result<()> {
    let kernel = loaded.kernel();
    let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|value| ptr::from_mut(value).cast()).collect();
    let [grid_x, grid_y, grid_z] = grid;
    let [block_x, block_y, block_z] = kernel.block;
    // Profilers show the kernel's name around its launch, within the ranges that are open.
    nvtx::push(&kernel.name);
    let launched = match loaded.overlaps() {
        true => {
            let may_overlap = LaunchAttribute::MAY_OVERLAP;
            let configuration = LaunchConfiguration {
                grid,
                block: kernel.block,
                shared_bytes: kernel.shared_bytes,
                stream: queue.raw(),
                attributes: &raw const may_overlap,
                attribute_count: 1,
            };
            // SAFETY: as for the other way, below; configuration and attribute outlive the call. The launch may begin before
            // the one queued before it has ended: the text of a function that overlaps waits for that end before anything else.
            unsafe {
                call!(later cuLaunchKernelEx(&configuration, loaded.raw(), pointers.as_mut_ptr(), ptr::null_mut()))
            }
        }
        // SAFETY: the function is loaded; there is one pointer per parameter of the entry (`launch` has checked), each to a
        // value of its kind, which the driver copies before it returns. What the kernel does with its buffers stays on the
        // device, where no Rust reference points; the borrows of the arguments end before anything else can be queued.
        false => unsafe {
            call!(cuLaunchKernel(
                loaded.raw(),
                grid_x,
                grid_y,
                grid_z,
                block_x,
                block_y,
                block_z,
                kernel.shared_bytes,
                queue.raw(),
                pointers.as_mut_ptr(),
                ptr::null_mut()
            ))
        },
    };
    nvtx::pop();
    queue.device().health().judge(queue.device(), launched, Some(&kernel.name))
}

fn elsewhere(kernel: &Kernel, parameter: &str, buffer: &Buffer, device: &str) -> Error {
    Error::Launch {
        kernel: kernel.name.clone(),
        reason: format!("the buffer for {parameter} lives on {}, the kernel runs on {device}", buffer.device()),
    }
}
