//! A made-up driver for tests: the complete CUDA path without a GPU, and a fault from every call in turn.
//!
//! The driver is reached through one table ([`super::driver`]), so a driver of our own needs no trait beside it: its
//! functions take the place of the table's slots. What is tested is the very path that reaches a GPU, trampolines
//! included.
//!
//! - A thread that [attaches](Fake::attach) gets a GPU with a number of its own; every other thread finds what it would
//!   find without a driver. Tests run beside each other and share nothing.
//! - Device memory is host memory. Of kernels, `fill_u32`, `fill_by_table` and `axpy_f32` do what they say, one whose name begins with
//!   `faulty` loses the context when it runs, all others do nothing.
//! - Work runs as late as the rules allow: a stream's queue stands still until something waits for it, and then only what
//!   that must wait for is run. A missing dependency therefore shows as wrong data, every time.
//! - Copies to and from pageable host memory are as the driver does them: the first reads its source before it returns, the
//!   second returns when it is done.
//! - Use of memory, streams, events, modules or graphs that are not there (any more), and accesses out of bounds are
//!   [violations](Fake::violations); what is alive can be [counted](Fake::census).
//! - [`Fake::fail`] makes one call return a code of the test's choice without doing anything.

use std::backtrace::Backtrace;
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::path::Path;
use std::rc::Rc;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use cust::sys::{self, CUdevice_attribute as Attribute, CUjit_option as Option_};

use super::driver::later::LaunchConfiguration;
use super::{CudaDevice, driver};
use crate::Device;

/// What the calls of this module return.
type Done = Result<(), u32>;

pub(super) const INVALID_VALUE: u32 = 1;
pub(super) const OUT_OF_MEMORY: u32 = 2;
const NO_DEVICE: u32 = 100;
const INVALID_CONTEXT: u32 = 201;
const INVALID_IMAGE: u32 = 200;
const INVALID_PTX: u32 = 218;
pub(super) const INVALID_HANDLE: u32 = 400;
const NOT_FOUND: u32 = 500;
const NOT_READY: u32 = 600;
pub(super) const ILLEGAL_ADDRESS: u32 = 700;
/// What a lost context answers after its first answer: never the first cause again, so that a follow-up is told from it.
pub(super) const LAUNCH_FAILED: u32 = 719;
const CAPTURE_UNSUPPORTED: u32 = 900;
const CAPTURE_INVALIDATED: u32 = 901;

/// What machine code of this driver begins with.
pub(super) const MACHINE_CODE: &[u8] = b"\x7fmachine code\n";

/// Calls that only explain other calls' codes: they are not counted and never fail.
const EXPLAINS: &str = "cuGetErrorName";

/// A thread's hold of a GPU of its own. Dropping it detaches the thread.
pub(super) struct Fake {
    ordinal: u32,
    thread: Rc<RefCell<Thread>>,
    /// A folder for machine code.
    cache: tempfile::TempDir,
    /// Whether the GPU was made for this.
    owner: bool,
}

#[derive(Default)]
struct Thread {
    /// The GPU whose context is current, if one is.
    current: Option<u32>,
    /// Contexts under the current one.
    below: Vec<Option<u32>>,
    calls: Vec<&'static str>,
    /// The call to fail, counted from the first, and its code.
    fail: Option<(usize, u32)>,
    /// Whether that call came while something was dropped, once it came.
    failed_in_drop: Option<bool>,
    /// CUDA 12.4, unless a test wants another.
    cuda_version: Option<c_int>,
}

thread_local! {
    static THREAD: RefCell<Option<Rc<RefCell<Thread>>>> = const { RefCell::new(None) };
}

impl Fake {
    /// A new GPU, for this thread.
    pub(super) fn attach() -> Self {
        install();
        let ordinal = {
            let mut gpus = gpus();
            let ordinal = gpus.len() as u32;
            gpus.push(Gpu::new(ordinal));
            ordinal
        };
        let mut fake = Self::of(ordinal);
        fake.owner = true;
        fake
    }

    /// A new GPU of this compute capability, with a driver of this CUDA version (1000 major + 10 minor).
    pub(super) fn with_versions(compute_capability: (c_int, c_int), cuda_version: c_int) -> Self {
        let fake = Self::attach();
        fake.with(|gpu| gpu.compute_capability = compute_capability);
        fake.thread.borrow_mut().cuda_version = Some(cuda_version);
        fake
    }

    /// The GPU of this number on another thread, with calls and faults of that thread's own.
    pub(super) fn of(ordinal: u32) -> Self {
        let thread = Rc::default();
        THREAD.with(|here| *here.borrow_mut() = Some(Rc::clone(&thread)));
        Self { ordinal, thread, cache: tempfile::tempdir().unwrap(), owner: false }
    }

    /// The device, with a cache folder of its own.
    pub(super) fn open(&self) -> crate::Result<Device> {
        CudaDevice::open_with(self.ordinal, || Some(self.cache.path().to_owned()))?;
        Device::cuda(self.ordinal)
    }

    /// The folder for machine code.
    pub(super) fn cache(&self) -> &Path {
        self.cache.path()
    }

    pub(super) fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// The calls that this thread made so far.
    pub(super) fn calls(&self) -> Vec<&'static str> {
        self.thread.borrow().calls.clone()
    }

    /// Makes this thread's call of this number (the first is 0) return `code` and do nothing.
    pub(super) fn fail(&self, call: usize, code: u32) {
        self.thread.borrow_mut().fail = Some((call, code));
    }

    /// Whether the call that [`Fake::fail`] chose came while something was dropped, where nobody hears of it.
    pub(super) fn failed_in_drop(&self) -> bool {
        self.thread.borrow().failed_in_drop.expect("the call has come")
    }

    /// Makes the GPU's next call of this name return `code` and do nothing.
    pub(super) fn fail_next(&self, name: &'static str, code: u32) {
        self.with(|gpu| gpu.fail_next = Some((name, code)));
    }

    /// Makes no call fail any more.
    pub(super) fn heal(&self) {
        self.thread.borrow_mut().fail = None;
        self.with(|gpu| gpu.fail_next = None);
    }

    /// How many objects of each kind are alive on the GPU.
    pub(super) fn census(&self) -> BTreeMap<&'static str, usize> {
        self.with(|gpu| {
            let counts = [
                ("contexts", gpu.retained),
                ("allocations", gpu.memory.len()),
                ("pinned", gpu.pinned.len()),
                ("streams", gpu.streams.len()),
                ("events", gpu.events.values().filter(|event| event.alive).count()),
                ("links", gpu.links.len()),
                ("modules", gpu.modules.len()),
                ("graphs", gpu.graphs.len()),
                ("executable graphs", gpu.executables.len()),
            ];
            counts.into_iter().filter(|(_, count)| *count > 0).collect()
        })
    }

    /// What was done that must not be done.
    pub(super) fn violations(&self) -> Vec<String> {
        self.with(|gpu| gpu.violations.clone())
    }

    /// Bytes of memory that the GPU has from now on.
    pub(super) fn set_capacity(&self, bytes: usize) {
        self.with(|gpu| gpu.capacity = bytes);
    }

    /// The name by which the GPU calls itself from now on.
    pub(super) fn set_name(&self, name: &'static str) {
        self.with(|gpu| gpu.name = name);
    }

    /// How many copies went from or to memory that is not page-locked.
    pub(super) fn pageable_copies(&self) -> usize {
        self.with(|gpu| gpu.pageable)
    }

    /// How many kernels ran.
    pub(super) fn kernels_run(&self) -> usize {
        self.with(|gpu| gpu.kernels_run)
    }

    /// How many texts were compiled.
    pub(super) fn compiled(&self) -> usize {
        self.with(|gpu| gpu.compiled)
    }

    fn with<T>(&self, action: impl FnOnce(&mut Gpu) -> T) -> T {
        action(&mut gpus()[self.ordinal as usize])
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        if self.owner {
            // The device stays opened as long as the process, but nobody uses it any more.
            self.with(|gpu| {
                gpu.memory.clear();
                gpu.pinned.clear();
            });
        }
        THREAD.with(|here| *here.borrow_mut() = None);
    }
}

/// Every GPU that a test made.
fn gpus() -> MutexGuard<'static, Vec<Gpu>> {
    static GPUS: Mutex<Vec<Gpu>> = Mutex::new(Vec::new());
    GPUS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| driver::replace(&functions()));
}

struct Gpu {
    ordinal: u32,
    name: &'static str,
    compute_capability: (c_int, c_int),
    capacity: usize,
    retained: usize,
    /// The code that the next call returns, once the context is lost.
    lost: Option<u32>,
    fail_next: Option<(&'static str, u32)>,
    memory: BTreeMap<u64, Vec<u8>>,
    pinned: BTreeMap<u64, Vec<u8>>,
    streams: BTreeMap<u64, Stream>,
    events: BTreeMap<u64, Event>,
    links: BTreeMap<u64, Link>,
    modules: BTreeMap<u64, String>,
    functions: BTreeMap<u64, Function>,
    graphs: BTreeMap<u64, Vec<Work>>,
    executables: BTreeMap<u64, Vec<Work>>,
    violations: Vec<String>,
    compiled: usize,
    /// Copies from or to memory that is not page-locked.
    pageable: usize,
    kernels_run: usize,
    handles: u64,
    /// Microseconds: every piece of work takes one.
    clock: u64,
}

#[derive(Clone)]
struct Function {
    entry: String,
    /// How many there are.
    parameters: usize,
    /// It waits for the launch before.
    waits: bool,
}

#[derive(Default)]
struct Stream {
    queue: VecDeque<Work>,
    capture: Option<Vec<Work>>,
    invalidated: bool,
}

struct Event {
    alive: bool,
    timed: bool,
    /// The stream of each time that the event was recorded.
    records: Vec<u64>,
    /// How many of those are done, and when the last was.
    done: usize,
    time: u64,
}

struct Link {
    text: Option<String>,
    code: Vec<u8>,
    log: Option<(u64, usize)>,
}

#[derive(Clone)]
enum Work {
    Upload { from: u64, to: u64, bytes: usize },
    Store { data: Vec<u8>, to: u64 },
    Download { from: u64, to: u64, bytes: usize },
    Copy { from: u64, to: u64, bytes: usize },
    Set { to: u64, byte: u8, bytes: usize },
    Kernel { name: String, values: Vec<u64> },
    Record { event: u64, number: usize },
    Wait { event: u64, number: usize },
}

impl Gpu {
    fn new(ordinal: u32) -> Self {
        Self {
            ordinal,
            name: "Made-up GPU",
            compute_capability: (9, 0),
            capacity: 1 << 30,
            retained: 0,
            lost: None,
            fail_next: None,
            memory: BTreeMap::new(),
            pinned: BTreeMap::new(),
            streams: BTreeMap::new(),
            events: BTreeMap::new(),
            links: BTreeMap::new(),
            modules: BTreeMap::new(),
            functions: BTreeMap::new(),
            graphs: BTreeMap::new(),
            executables: BTreeMap::new(),
            violations: Vec::new(),
            compiled: 0,
            pageable: 0,
            kernels_run: 0,
            handles: 0,
            clock: 0,
        }
    }

    /// A handle that no other object of any GPU has.
    fn handle(&mut self) -> u64 {
        self.handles += 1;
        (u64::from(self.ordinal) + 1) << 32 | self.handles
    }

    fn violation<T>(&mut self, what: String) -> Result<T, u32> {
        self.violations.push(what);
        Err(INVALID_HANDLE)
    }

    fn stream(&mut self, stream: u64, call: &str) -> Result<&mut Stream, u32> {
        if !self.streams.contains_key(&stream) {
            return self.violation(format!("{call}: stream {stream:#x} is not alive"));
        }
        self.streams.get_mut(&stream).ok_or(INVALID_HANDLE)
    }

    fn event(&mut self, event: u64, call: &str) -> Result<&mut Event, u32> {
        if !self.events.get(&event).is_some_and(|event| event.alive) {
            return self.violation(format!("{call}: event {event:#x} is not alive"));
        }
        self.events.get_mut(&event).ok_or(INVALID_HANDLE)
    }

    fn queue(&mut self, stream: u64, work: Work, call: &str) -> Done {
        let stream = self.stream(stream, call)?;
        match (&mut stream.capture, &work) {
            (None, _) => stream.queue.push_back(work),
            // Order between a captured stream and others is more than this driver knows.
            (Some(_), Work::Record { .. } | Work::Wait { .. }) => {
                stream.invalidated = true;
                return Err(CAPTURE_UNSUPPORTED);
            }
            (Some(captured), _) => captured.push(work),
        }
        Ok(())
    }

    fn launch(
        &mut self,
        call: &str,
        function: sys::CUfunction,
        stream: sys::CUstream,
        parameters: *mut *mut c_void,
    ) -> Done {
        let Some(Function { entry, parameters: count, .. }) = self.functions.get(&(function as u64)).cloned() else {
            return self.violation(format!("{call} of a function that is not there"));
        };
        // SAFETY: the runtime passes one pointer per parameter, each to eight bytes.
        let value = |index: usize| unsafe { (*parameters.add(index)).cast::<u64>().read() };
        let values = (0..count).map(value).collect();
        self.queue(stream as u64, Work::Kernel { name: entry, values }, call)
    }

    fn wait_for_stream(&mut self, stream: u64, call: &str) -> Done {
        let state = self.stream(stream, call)?;
        if state.capture.is_some() {
            state.invalidated = true;
            return Err(CAPTURE_UNSUPPORTED);
        }
        self.run(stream, None);
        self.alive()
    }

    fn wait_for_all(&mut self) -> Done {
        if let Some(stream) = self.streams.values_mut().find(|stream| stream.capture.is_some()) {
            stream.invalidated = true;
            return Err(CAPTURE_UNSUPPORTED);
        }
        let streams: Vec<u64> = self.streams.keys().copied().collect();
        for stream in streams {
            self.run(stream, None);
        }
        self.alive()
    }

    /// Runs a stream's queue to its end, or until an event was recorded this many times.
    fn run(&mut self, stream: u64, until: Option<(u64, usize)>) {
        loop {
            if self.lost.is_some() || until.is_some_and(|(event, number)| self.is_done(event, number)) {
                return;
            }
            let Some(work) = self.streams.get_mut(&stream).and_then(|stream| stream.queue.pop_front()) else { return };
            self.clock += 1;
            match work {
                Work::Upload { from, to, bytes } => match inside(&self.pinned, from, bytes).map(<[u8]>::to_vec) {
                    Some(data) => self.write(to, &data, "a copy to the device"),
                    None => self.violations.push(format!("a copy from {bytes} bytes of host memory that are freed")),
                },
                Work::Store { data, to } => self.write(to, &data, "a copy to the device"),
                Work::Download { from, to, bytes } => {
                    let data = self.read(from, bytes, "a copy from the device");
                    match inside_mut(&mut self.pinned, to, bytes) {
                        Some(place) => place.copy_from_slice(&data),
                        None => self.violations.push(format!("a copy to {bytes} bytes of host memory that are freed")),
                    }
                }
                Work::Copy { from, to, bytes } => {
                    let data = self.read(from, bytes, "a copy on the device");
                    self.write(to, &data, "a copy on the device");
                }
                Work::Set { to, byte, bytes } => self.write(to, &vec![byte; bytes], "a fill"),
                Work::Kernel { name, values } => self.kernel(&name, &values),
                Work::Record { event, number } => {
                    let clock = self.clock;
                    if let Some(event) = self.events.get_mut(&event) {
                        event.done = event.done.max(number);
                        event.time = clock;
                    }
                }
                Work::Wait { event, number } => {
                    if let Some(&other) = self.events.get(&event).and_then(|event| event.records.get(number - 1)) {
                        self.run(other, Some((event, number)));
                    }
                }
            }
        }
    }

    fn is_done(&self, event: u64, number: usize) -> bool {
        self.events.get(&event).is_none_or(|event| event.done >= number)
    }

    fn kernel(&mut self, name: &str, values: &[u64]) {
        self.kernels_run += 1;
        match (name, values) {
            ("fill_u32", &[y, value, count]) => {
                let data: Vec<u8> = (0..count).flat_map(|_| (value as u32).to_ne_bytes()).collect();
                self.write(y, &data, name);
            }
            ("fill_by_table", &[table, rows, value]) => {
                for row in 0..rows {
                    let words = self.read(table + 16 * row, 16, name);
                    let word = |at: usize| {
                        words[8 * at..][..8].iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte))
                    };
                    self.kernel("fill_u32", &[word(0), value, word(1)]);
                }
            }
            ("axpy_f32", &[y, x, a, count]) => {
                let bytes = 4 * count as usize;
                let (mut sum, x) = (self.read(y, bytes, name), self.read(x, bytes, name));
                let a = f32::from_bits(a as u32);
                for (y, x) in sum.chunks_exact_mut(4).zip(x.chunks_exact(4)) {
                    let number = |bytes: &[u8]| f32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                    y.copy_from_slice(&a.mul_add(number(x), number(y)).to_ne_bytes());
                }
                self.write(y, &sum, name);
            }
            _ if name.starts_with("faulty") => self.lost = Some(ILLEGAL_ADDRESS),
            _ => {}
        }
    }

    fn read(&mut self, from: u64, bytes: usize, what: &str) -> Vec<u8> {
        if let Some(data) = inside(&self.memory, from, bytes) {
            return data.to_vec();
        }
        self.violations.push(format!("{what} reads {bytes} bytes of device memory that are not there"));
        vec![0; bytes]
    }

    fn write(&mut self, to: u64, data: &[u8], what: &str) {
        match inside_mut(&mut self.memory, to, data.len()) {
            Some(place) => place.copy_from_slice(data),
            None => {
                self.violations.push(format!("{what} writes {} bytes of device memory that are not there", data.len()));
            }
        }
    }

    /// Whether the context still works. Says why not, once.
    fn alive(&mut self) -> Done {
        match self.lost {
            None => Ok(()),
            Some(code) => {
                self.lost = Some(LAUNCH_FAILED);
                Err(code)
            }
        }
    }
}

/// `bytes` bytes at an address, if they lie in one block.
fn inside(blocks: &BTreeMap<u64, Vec<u8>>, address: u64, bytes: usize) -> Option<&[u8]> {
    let (start, block) = blocks.range(..=address).next_back()?;
    let offset = (address - start) as usize;
    block.get(offset..offset.checked_add(bytes)?)
}

fn inside_mut(blocks: &mut BTreeMap<u64, Vec<u8>>, address: u64, bytes: usize) -> Option<&mut [u8]> {
    let (start, block) = blocks.range_mut(..=address).next_back()?;
    let offset = (address - start) as usize;
    block.get_mut(offset..offset.checked_add(bytes)?)
}

/// What a call may use: the thread, and the GPU whose context is current.
struct Call<'a> {
    thread: &'a mut Thread,
    gpus: &'a mut [Gpu],
    name: &'static str,
}

impl Call<'_> {
    /// The GPU whose context is current and works.
    fn current(&mut self) -> Result<&mut Gpu, u32> {
        let gpu = self.gpus.get_mut(self.thread.current.ok_or(INVALID_CONTEXT)? as usize).ok_or(INVALID_CONTEXT)?;
        if gpu.retained == 0 {
            return gpu.violation(format!("{}: the current context is not retained", self.name));
        }
        gpu.alive()?;
        Ok(gpu)
    }

    fn gpu(&mut self, device: sys::CUdevice) -> Result<&mut Gpu, u32> {
        self.gpus.get_mut(device as usize).ok_or(101)
    }
}

/// A call: refused where no driver is, counted, failed if the test says so, done otherwise.
fn enter(name: &'static str, action: impl FnOnce(Call<'_>) -> Done) -> u32 {
    let Some(thread) = THREAD.with(|here| here.borrow().clone()) else { return NO_DEVICE };
    let mut thread = thread.borrow_mut();
    let mut gpus = gpus();
    if name != EXPLAINS {
        let number = thread.calls.len();
        thread.calls.push(name);
        let current = thread.current.and_then(|ordinal| gpus.get_mut(ordinal as usize));
        let mut chosen = thread.fail.filter(|(call, _)| *call == number).map(|(_, code)| code);
        if chosen.is_some() {
            let frames = Backtrace::force_capture().to_string();
            thread.failed_in_drop = Some(frames.contains("::drop") || frames.contains("drop_in_place"));
        }
        if let Some(gpu) = current {
            if gpu.fail_next.is_some_and(|(call, _)| call == name) {
                chosen = gpu.fail_next.take().map(|(_, code)| code);
            }
            if chosen.is_some_and(driver::loses_context) {
                gpu.lost = Some(LAUNCH_FAILED);
            }
        }
        if let Some(code) = chosen {
            return code;
        }
    }
    action(Call { thread: &mut thread, gpus: &mut gpus, name }).err().unwrap_or(0)
}

/// Writes a result where the caller wants it.
fn put<T>(place: *mut T, value: T) {
    // SAFETY: the runtime's calls pass valid places, or tests of the runtime are worth nothing.
    unsafe { place.write(value) }
}

/// Text that the caller passes.
fn text(pointer: *const c_void) -> Vec<u8> {
    // SAFETY: the runtime passes texts and names that end in a nul.
    unsafe { CStr::from_ptr(pointer.cast()) }.to_bytes().to_vec()
}

fn pointer<T>(handle: u64) -> *mut T {
    std::ptr::without_provenance_mut(handle as usize)
}

macro_rules! driver_functions {
    ($(fn $name:ident($call:ident $(, $argument:ident: $kind:ty)* $(,)?) $body:block)*) => {
        $(
            #[allow(non_snake_case)]
            unsafe extern "C" fn $name($($argument: $kind),*) -> u32 {
                #[allow(unused_mut)]
                enter(stringify!($name), |mut $call: Call<'_>| -> Done { let _ = &mut $call; $body })
            }
        )*

        /// Every function of the made-up driver, by its name.
        fn functions() -> Vec<(&'static str, *mut c_void)> {
            vec![$((stringify!($name), $name as *mut c_void)),*]
        }
    };
}

driver_functions! {
    fn cuInit(_call, _flags: c_uint) { Ok(()) }

    fn cuGetErrorName(_call, code: u32, name: *mut *const c_char) {
        let found = match code {
            1 => c"CUDA_ERROR_INVALID_VALUE",
            2 => c"CUDA_ERROR_OUT_OF_MEMORY",
            218 => c"CUDA_ERROR_INVALID_PTX",
            700 => c"CUDA_ERROR_ILLEGAL_ADDRESS",
            719 => c"CUDA_ERROR_LAUNCH_FAILED",
            999 => c"CUDA_ERROR_UNKNOWN",
            _ => return Err(INVALID_VALUE),
        };
        put(name, found.as_ptr());
        Ok(())
    }

    fn cuDriverGetVersion(call, version: *mut c_int) {
        put(version, call.thread.cuda_version.unwrap_or(12_040));
        Ok(())
    }

    fn cuDeviceGetCount(call, count: *mut c_int) {
        put(count, call.gpus.len() as c_int);
        Ok(())
    }

    fn cuDeviceGet(call, device: *mut sys::CUdevice, ordinal: c_int) {
        call.gpu(ordinal)?;
        put(device, ordinal);
        Ok(())
    }

    fn cuDeviceGetName(call, name: *mut c_char, length: c_int, device: sys::CUdevice) {
        let own = CString::new(call.gpu(device)?.name).map_err(|_| INVALID_VALUE)?;
        if own.as_bytes_with_nul().len() > length as usize {
            return Err(INVALID_VALUE);
        }
        // SAFETY: the caller's buffer has `length` bytes, and the name fits.
        unsafe { std::ptr::copy_nonoverlapping(own.as_ptr(), name, own.as_bytes_with_nul().len()) };
        Ok(())
    }

    fn cuDeviceTotalMem_v2(call, bytes: *mut usize, device: sys::CUdevice) {
        put(bytes, call.gpu(device)?.capacity);
        Ok(())
    }

    fn cuDeviceGetAttribute(call, value: *mut c_int, attribute: u32, device: sys::CUdevice) {
        let (major, minor) = call.gpu(device)?.compute_capability;
        const MAJOR: u32 = Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as u32;
        const MINOR: u32 = Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as u32;
        const SHARED: u32 = Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN as u32;
        put(value, match attribute {
            MAJOR => major,
            MINOR => minor,
            SHARED => 232_448,
            // Threads and blocks.
            _ => 1024,
        });
        Ok(())
    }

    fn cuDevicePrimaryCtxRetain(call, context: *mut sys::CUcontext, device: sys::CUdevice) {
        let gpu = call.gpu(device)?;
        gpu.retained += 1;
        put(context, pointer(u64::from(gpu.ordinal) + 1));
        Ok(())
    }

    fn cuDevicePrimaryCtxRelease_v2(call, device: sys::CUdevice) {
        let gpu = call.gpu(device)?;
        if gpu.retained == 0 {
            return gpu.violation("a context is released that is not retained".to_owned());
        }
        gpu.retained -= 1;
        Ok(())
    }

    fn cuCtxSetCurrent(call, context: sys::CUcontext) {
        call.thread.current = (context as u32).checked_sub(1);
        Ok(())
    }

    fn cuCtxPushCurrent_v2(call, context: sys::CUcontext) {
        let before = call.thread.current;
        call.thread.below.push(before);
        call.thread.current = (context as u32).checked_sub(1);
        Ok(())
    }

    fn cuCtxPopCurrent_v2(call, _context: *mut sys::CUcontext) {
        call.thread.current = call.thread.below.pop().ok_or(INVALID_CONTEXT)?;
        Ok(())
    }

    fn cuCtxSynchronize(call) { call.current()?.wait_for_all() }

    fn cuMemGetInfo_v2(call, free: *mut usize, total: *mut usize) {
        let gpu = call.current()?;
        let held: usize = gpu.memory.values().map(Vec::len).sum();
        put(free, gpu.capacity.saturating_sub(held));
        put(total, gpu.capacity);
        Ok(())
    }

    fn cuMemAlloc_v2(call, address: *mut u64, bytes: usize) {
        let gpu = call.current()?;
        let held: usize = gpu.memory.values().map(Vec::len).sum();
        if held.checked_add(bytes).is_none_or(|bytes| bytes > gpu.capacity) {
            return Err(OUT_OF_MEMORY);
        }
        let block = vec![0; bytes];
        put(address, block.as_ptr() as u64);
        gpu.memory.insert(block.as_ptr() as u64, block);
        Ok(())
    }

    fn cuMemFree_v2(call, address: u64) {
        let gpu = call.current()?;
        match gpu.memory.remove(&address) {
            Some(_) => Ok(()),
            None => gpu.violation(format!("cuMemFree of {address:#x}, which is not allocated")),
        }
    }

    fn cuMemHostAlloc(call, place: *mut *mut c_void, bytes: usize, _flags: c_uint) {
        let gpu = call.current()?;
        let mut block = vec![0_u8; bytes];
        put(place, block.as_mut_ptr().cast());
        gpu.pinned.insert(block.as_ptr() as u64, block);
        Ok(())
    }

    fn cuMemFreeHost(call, place: *mut c_void) {
        let gpu = call.current()?;
        match gpu.pinned.remove(&(place as u64)) {
            Some(_) => Ok(()),
            None => gpu.violation("cuMemFreeHost of memory that is not page-locked".to_owned()),
        }
    }

    fn cuMemcpyHtoDAsync_v2(call, to: u64, from: *const c_void, bytes: usize, stream: sys::CUstream) {
        let name = call.name;
        let gpu = call.current()?;
        if inside(&gpu.pinned, from as u64, bytes).is_some() {
            return gpu.queue(stream as u64, Work::Upload { from: from as u64, to, bytes }, name);
        }
        gpu.pageable += 1;
        // SAFETY: the caller's memory has `bytes` bytes.
        let data = unsafe { std::slice::from_raw_parts(from.cast::<u8>(), bytes) }.to_vec();
        gpu.queue(stream as u64, Work::Store { data, to }, name)
    }

    fn cuMemcpyDtoHAsync_v2(call, to: *mut c_void, from: u64, bytes: usize, stream: sys::CUstream) {
        let name = call.name;
        let gpu = call.current()?;
        if inside(&gpu.pinned, to as u64, bytes).is_some() {
            return gpu.queue(stream as u64, Work::Download { from, to: to as u64, bytes }, name);
        }
        gpu.pageable += 1;
        gpu.wait_for_stream(stream as u64, name)?;
        let data = gpu.read(from, bytes, "a copy from the device");
        // SAFETY: the caller's memory has `bytes` bytes.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), to.cast(), bytes) };
        Ok(())
    }

    fn cuMemcpyDtoDAsync_v2(call, to: u64, from: u64, bytes: usize, stream: sys::CUstream) {
        let name = call.name;
        call.current()?.queue(stream as u64, Work::Copy { from, to, bytes }, name)
    }

    fn cuMemsetD8Async(call, to: u64, byte: u8, bytes: usize, stream: sys::CUstream) {
        let name = call.name;
        call.current()?.queue(stream as u64, Work::Set { to, byte, bytes }, name)
    }

    fn cuStreamCreate(call, stream: *mut sys::CUstream, _flags: c_uint) {
        let gpu = call.current()?;
        let handle = gpu.handle();
        gpu.streams.insert(handle, Stream::default());
        put(stream, pointer(handle));
        Ok(())
    }

    fn cuStreamDestroy_v2(call, stream: sys::CUstream) {
        let name = call.name;
        let gpu = call.current()?;
        if gpu.stream(stream as u64, name)?.capture.is_some() {
            return gpu.violation("a stream is destroyed while its work is captured".to_owned());
        }
        gpu.run(stream as u64, None);
        gpu.streams.remove(&(stream as u64));
        Ok(())
    }

    fn cuStreamSynchronize(call, stream: sys::CUstream) {
        let name = call.name;
        call.current()?.wait_for_stream(stream as u64, name)
    }

    fn cuStreamWaitEvent(call, stream: sys::CUstream, event: sys::CUevent, _flags: c_uint) {
        let name = call.name;
        let gpu = call.current()?;
        let number = gpu.event(event as u64, name)?.records.len();
        if number == 0 {
            return Ok(());
        }
        gpu.queue(stream as u64, Work::Wait { event: event as u64, number }, name)
    }

    fn cuStreamBeginCapture_v2(call, stream: sys::CUstream, _mode: u32) {
        let name = call.name;
        let stream = call.current()?.stream(stream as u64, name)?;
        if stream.capture.is_some() {
            return Err(INVALID_VALUE);
        }
        stream.capture = Some(Vec::new());
        stream.invalidated = false;
        Ok(())
    }

    fn cuStreamEndCapture(call, stream: sys::CUstream, graph: *mut sys::CUgraph) {
        let name = call.name;
        let gpu = call.current()?;
        let stream = gpu.stream(stream as u64, name)?;
        let work = stream.capture.take().ok_or(INVALID_VALUE)?;
        if stream.invalidated {
            return Err(CAPTURE_INVALIDATED);
        }
        let handle = gpu.handle();
        gpu.graphs.insert(handle, work);
        put(graph, pointer(handle));
        Ok(())
    }

    fn cuEventCreate(call, event: *mut sys::CUevent, flags: c_uint) {
        let gpu = call.current()?;
        let handle = gpu.handle();
        let timed = flags & sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32 == 0;
        gpu.events.insert(handle, Event { alive: true, timed, records: Vec::new(), done: 0, time: 0 });
        put(event, pointer(handle));
        Ok(())
    }

    fn cuEventDestroy_v2(call, event: sys::CUevent) {
        let name = call.name;
        call.current()?.event(event as u64, name)?.alive = false;
        Ok(())
    }

    fn cuEventRecord(call, event: sys::CUevent, stream: sys::CUstream) {
        let name = call.name;
        let gpu = call.current()?;
        gpu.stream(stream as u64, name)?;
        let records = &mut gpu.event(event as u64, name)?.records;
        records.push(stream as u64);
        let number = records.len();
        gpu.queue(stream as u64, Work::Record { event: event as u64, number }, name)
    }

    fn cuEventSynchronize(call, event: sys::CUevent) {
        let name = call.name;
        let gpu = call.current()?;
        let state = gpu.event(event as u64, name)?;
        let number = state.records.len();
        if let Some(&stream) = state.records.last() {
            gpu.run(stream, Some((event as u64, number)));
        }
        gpu.alive()
    }

    fn cuEventQuery(call, event: sys::CUevent) {
        let name = call.name;
        let state = call.current()?.event(event as u64, name)?;
        if state.done < state.records.len() { Err(NOT_READY) } else { Ok(()) }
    }

    fn cuEventElapsedTime(call, milliseconds: *mut f32, start: sys::CUevent, end: sys::CUevent) {
        let name = call.name;
        let gpu = call.current()?;
        let mut time = |event: sys::CUevent| -> Result<i64, u32> {
            let event = gpu.event(event as u64, name)?;
            match event.timed && !event.records.is_empty() {
                true if event.done < event.records.len() => Err(NOT_READY),
                true => Ok(event.time as i64),
                false => Err(INVALID_HANDLE),
            }
        };
        put(milliseconds, (time(end)? - time(start)?) as f32 / 1e3);
        Ok(())
    }

    fn cuLinkCreate_v2(call, count: c_uint, options: *mut u32, values: *mut *mut c_void, link: *mut sys::CUlinkState) {
        let gpu = call.current()?;
        // SAFETY: both arrays have `count` entries.
        let given = |index: usize| unsafe { (*options.add(index), *values.add(index)) };
        let given: BTreeMap<u32, *mut c_void> = (0..count as usize).map(given).collect();
        let log = given.get(&(Option_::CU_JIT_ERROR_LOG_BUFFER as u32)).copied();
        let bytes = given.get(&(Option_::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES as u32)).copied();
        let log = log.zip(bytes).map(|(log, bytes)| (log as u64, bytes as usize));
        let handle = gpu.handle();
        gpu.links.insert(handle, Link { text: None, code: Vec::new(), log });
        put(link, pointer(handle));
        Ok(())
    }

    fn cuLinkAddData_v2(
        call,
        link: sys::CUlinkState,
        _kind: u32,
        data: *mut c_void,
        bytes: usize,
        _name: *const c_char,
        _count: c_uint,
        _options: *mut u32,
        _values: *mut *mut c_void,
    ) {
        let gpu = call.current()?;
        let Some(link) = gpu.links.get_mut(&(link as u64)) else {
            return gpu.violation("cuLinkAddData to a link that is not there".to_owned());
        };
        let source = text(data);
        if source.len() + 1 != bytes {
            return Err(INVALID_VALUE);
        }
        let source = String::from_utf8(source).map_err(|_| INVALID_PTX)?;
        if !source.contains(".entry") || source.contains("globule") {
            if let Some((log, bytes)) = link.log {
                let message = c"ptxas made-up, line 1; error: not an instruction: globule";
                let length = message.to_bytes_with_nul().len().min(bytes);
                // SAFETY: the caller's log has `bytes` bytes.
                unsafe { std::ptr::copy_nonoverlapping(message.as_ptr(), pointer(log), length) };
            }
            return Err(INVALID_PTX);
        }
        link.text = Some(source);
        Ok(())
    }

    fn cuLinkComplete(call, link: sys::CUlinkState, code: *mut *mut c_void, bytes: *mut usize) {
        let gpu = call.current()?;
        let Some(link) = gpu.links.get_mut(&(link as u64)) else {
            return gpu.violation("cuLinkComplete of a link that is not there".to_owned());
        };
        link.code = [MACHINE_CODE, link.text.as_ref().ok_or(INVALID_VALUE)?.as_bytes(), b"\0"].concat();
        put(code, link.code.as_mut_ptr().cast());
        put(bytes, link.code.len());
        gpu.compiled += 1;
        Ok(())
    }

    fn cuLinkDestroy(call, link: sys::CUlinkState) {
        let gpu = call.current()?;
        match gpu.links.remove(&(link as u64)) {
            Some(_) => Ok(()),
            None => gpu.violation("cuLinkDestroy of a link that is not there".to_owned()),
        }
    }

    fn cuModuleLoadData(call, module: *mut sys::CUmodule, image: *const c_void) {
        let gpu = call.current()?;
        let image = text(image);
        let source = image.strip_prefix(MACHINE_CODE).ok_or(INVALID_IMAGE)?;
        let source = String::from_utf8(source.to_vec()).map_err(|_| INVALID_IMAGE)?;
        let handle = gpu.handle();
        gpu.modules.insert(handle, source);
        put(module, pointer(handle));
        Ok(())
    }

    fn cuModuleUnload(call, module: sys::CUmodule) {
        let gpu = call.current()?;
        match gpu.modules.remove(&(module as u64)) {
            Some(_) => Ok(()),
            None => gpu.violation("cuModuleUnload of a module that is not there".to_owned()),
        }
    }

    fn cuModuleGetFunction(call, function: *mut sys::CUfunction, module: sys::CUmodule, name: *const c_char) {
        let gpu = call.current()?;
        let Some(source) = gpu.modules.get(&(module as u64)) else {
            return gpu.violation("cuModuleGetFunction of a module that is not there".to_owned());
        };
        let name = String::from_utf8(text(name.cast())).map_err(|_| NOT_FOUND)?;
        let (_, entry) = source.split_once(&format!(".entry {name}(")).ok_or(NOT_FOUND)?;
        let parameters = entry.split(')').next().unwrap_or_default().matches(".param").count();
        let waits = entry.contains("griddepcontrol.wait;");
        let handle = gpu.handle();
        gpu.functions.insert(handle, Function { entry: name, parameters, waits });
        put(function, pointer(handle));
        Ok(())
    }

    fn cuFuncGetAttribute(call, value: *mut c_int, _attribute: u32, function: sys::CUfunction) {
        let gpu = call.current()?;
        if !gpu.functions.contains_key(&(function as u64)) {
            return gpu.violation("cuFuncGetAttribute of a function that is not there".to_owned());
        }
        put(value, 1024);
        Ok(())
    }

    fn cuFuncSetAttribute(call, function: sys::CUfunction, _attribute: u32, _value: c_int) {
        let gpu = call.current()?;
        if !gpu.functions.contains_key(&(function as u64)) {
            return gpu.violation("cuFuncSetAttribute of a function that is not there".to_owned());
        }
        Ok(())
    }

    fn cuLaunchKernel(
        call,
        function: sys::CUfunction,
        _grid_x: c_uint,
        _grid_y: c_uint,
        _grid_z: c_uint,
        _block_x: c_uint,
        _block_y: c_uint,
        _block_z: c_uint,
        _shared: c_uint,
        stream: sys::CUstream,
        parameters: *mut *mut c_void,
        _extra: *mut *mut c_void,
    ) {
        let name = call.name;
        call.current()?.launch(name, function, stream, parameters)
    }

    fn cuLaunchKernelEx(
        call,
        configuration: *const LaunchConfiguration,
        function: sys::CUfunction,
        parameters: *mut *mut c_void,
        _extra: *mut *mut c_void,
    ) {
        let name = call.name;
        // SAFETY: the runtime passes a configuration, and as many attributes as it says.
        let (configuration, attributes) = unsafe {
            let configuration = &*configuration;
            (configuration, std::slice::from_raw_parts(configuration.attributes, configuration.attribute_count as usize))
        };
        let gpu = call.current()?;
        if !attributes.iter().any(|attribute| attribute.id == 6 && attribute.value[0] == 1) {
            return gpu.violation("a launch that may not overlap".to_owned());
        }
        if configuration.grid.contains(&0) || configuration.block.contains(&0) {
            return Err(INVALID_VALUE);
        }
        let waits = gpu.functions.get(&(function as u64)).is_some_and(|function| function.waits);
        if !waits {
            return gpu.violation("a launch that may overlap, of a text that does not wait".to_owned());
        }
        gpu.launch(name, function, configuration.stream, parameters)
    }

    fn cuGraphInstantiateWithFlags(
        call,
        executable: *mut sys::CUgraphExec,
        graph: sys::CUgraph,
        _flags: c_ulonglong,
    ) {
        let gpu = call.current()?;
        let Some(work) = gpu.graphs.get(&(graph as u64)).cloned() else {
            return gpu.violation("cuGraphInstantiate of a graph that is not there".to_owned());
        };
        let handle = gpu.handle();
        gpu.executables.insert(handle, work);
        put(executable, pointer(handle));
        Ok(())
    }

    fn cuGraphGetNodes(call, graph: sys::CUgraph, _nodes: *mut sys::CUgraphNode, count: *mut usize) {
        let gpu = call.current()?;
        let Some(work) = gpu.graphs.get(&(graph as u64)) else {
            return gpu.violation("cuGraphGetNodes of a graph that is not there".to_owned());
        };
        put(count, work.len());
        Ok(())
    }

    fn cuGraphLaunch(call, executable: sys::CUgraphExec, stream: sys::CUstream) {
        let name = call.name;
        let gpu = call.current()?;
        let Some(work) = gpu.executables.get(&(executable as u64)).cloned() else {
            return gpu.violation("cuGraphLaunch of a graph that is not there".to_owned());
        };
        work.into_iter().try_for_each(|work| gpu.queue(stream as u64, work, name))
    }

    fn cuGraphDestroy(call, graph: sys::CUgraph) {
        let gpu = call.current()?;
        match gpu.graphs.remove(&(graph as u64)) {
            Some(_) => Ok(()),
            None => gpu.violation("cuGraphDestroy of a graph that is not there".to_owned()),
        }
    }

    fn cuGraphExecDestroy(call, executable: sys::CUgraphExec) {
        let gpu = call.current()?;
        match gpu.executables.remove(&(executable as u64)) {
            Some(_) => Ok(()),
            None => gpu.violation("cuGraphExecDestroy of a graph that is not there".to_owned()),
        }
    }
}
