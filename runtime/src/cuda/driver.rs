//! Reaching NVIDIA's driver without linking to it.
//!
//! `cust` expects the linker and the program loader to find `libcuda.so`. This program must build where no CUDA is
//! installed and start where no driver is. So the linker is given an empty `libcuda.so` (`runtime/cuda-stub`), and this
//! module itself defines every `cu*` symbol that `cust_raw` declares: a jump through one slot of a table. Until the driver
//! is loaded, every slot leads to a function that returns `CUDA_ERROR_NO_DEVICE`. [`load`] opens `libcuda.so.1` and fills
//! the slots by name. No signature is written twice: the arguments pass through registers and stack untouched. What the
//! bindings are too old for is declared in [`later`] and reached in the same way.
//!
//! Calls go through [`call!`], which reads the return code as a number (a driver newer than the bindings returns codes
//! that their enumeration does not have) and turns it into an error that names the call, the code and what to do. With
//! `call!(on device, ...)` the device hears of it too: a code after which its context is lost is remembered there.
//!
//! The table is also where tests take the driver's place: `fake` replaces its slots by functions of its own, so that
//! the whole path runs without a GPU and any call can be made to fail. No trait stands between the runtime and the
//! driver for that: it would write every signature once more, and the trampolines would go untested.

use std::arch::global_asm;
use std::ffi::{CStr, c_char, c_void};
use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicPtr, Ordering};

use cust::sys::{self, CUresult};

use super::device::lock;
use super::symbols::for_each_symbol;
use crate::{Error, Result};

/// The driver's library as its package installs it.
const LIBRARY: &str = "libcuda.so.1";

/// The code of `CUDA_ERROR_OUT_OF_MEMORY`.
pub(super) const OUT_OF_MEMORY: u32 = CUresult::CUDA_ERROR_OUT_OF_MEMORY as u32;

/// The code of `CUDA_ERROR_NOT_READY`: asked-for work is not done yet.
pub(super) const NOT_READY: u32 = CUresult::CUDA_ERROR_NOT_READY as u32;

/// Whether the table was filled, or why not; `None` before it was tried.
static LIBRARY_OPENED: Mutex<Option<std::result::Result<(), String>>> = Mutex::new(None);

/// Calls a driver function, `call!(cuMemFree_v2(address))`, and checks its return code. `call!(on device, ...)` is for
/// every call that a [`super::CudaDevice`]'s context takes, `call!(later ...)` for functions that the bindings lack ([`later`]).
macro_rules! call {
    (@inferred $argument:expr) => { _ };
    (on $device:expr, $name:ident($($argument:expr),* $(,)?)) => {
        $device.checked($crate::cuda::driver::call!($name($($argument),*)))
    };
    (later $name:ident($($argument:expr),* $(,)?)) => {
        $crate::cuda::driver::call!(@of ($crate::cuda::driver::later) $name($($argument),*))
    };
    ($name:ident($($argument:expr),* $(,)?)) => {
        $crate::cuda::driver::call!(@of (cust::sys) $name($($argument),*))
    };
    (@of ($($module:tt)*) $name:ident($($argument:expr),*)) => {{
        let function: unsafe extern "C" fn($($crate::cuda::driver::call!(@inferred $argument)),*) -> cust::sys::CUresult =
            $($module)*::$name;
        let code = $crate::cuda::driver::NumericResult::numeric(function)($($argument),*);
        $crate::cuda::driver::check(stringify!($name), code)
    }};
}
pub(super) use call;

/// What drivers newer than the bindings have, as CUDA's header `cuda.h` declares it.
pub(super) mod later {
    use std::ffi::c_void;
    use std::mem::offset_of;

    use cust::sys::{CUfunction, CUresult, CUstream};

    /// `CUlaunchConfig` (CUDA 11.8).
    #[repr(C)]
    pub(in crate::cuda) struct LaunchConfiguration {
        pub(in crate::cuda) grid: [u32; 3],
        pub(in crate::cuda) block: [u32; 3],
        pub(in crate::cuda) shared_bytes: u32,
        pub(in crate::cuda) stream: CUstream,
        pub(in crate::cuda) attributes: *const LaunchAttribute,
        pub(in crate::cuda) attribute_count: u32,
    }

    /// `CUlaunchAttribute` (CUDA 11.8): a number that says which, and a value of 64 bytes.
    #[repr(C)]
    pub(in crate::cuda) struct LaunchAttribute {
        pub(in crate::cuda) id: u32,
        padding: u32,
        pub(in crate::cuda) value: [u64; 8],
    }

    impl LaunchAttribute {
        /// `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`: the launch may begin as soon as all blocks of the one before
        /// it on the stream allow it.
        pub(in crate::cuda) const MAY_OVERLAP: Self = Self { id: 6, padding: 0, value: [1, 0, 0, 0, 0, 0, 0, 0] };
    }

    unsafe extern "C" {
        pub(in crate::cuda) fn cuLaunchKernelEx(
            configuration: *const LaunchConfiguration,
            function: CUfunction,
            parameters: *mut *mut c_void,
            extra: *mut *mut c_void,
        ) -> CUresult;
    }

    const _: () = assert!(size_of::<LaunchConfiguration>() == 56 && size_of::<LaunchAttribute>() == 72);
    const _: () =
        assert!(offset_of!(LaunchConfiguration, stream) == 32 && offset_of!(LaunchConfiguration, attributes) == 40);
    const _: () =
        assert!(offset_of!(LaunchConfiguration, attribute_count) == 48 && offset_of!(LaunchAttribute, value) == 8);
}

/// Opens the driver's library, once per process, and initialises it.
///
/// # Errors
/// [`Error::NoDriver`] when the library is not there, [`Error::Driver`] when it refuses to start.
pub(super) fn load() -> Result<()> {
    lock(&LIBRARY_OPENED)
        .get_or_insert_with(fill_table)
        .clone()
        .map_err(|reason| Error::NoDriver { library: LIBRARY, reason })?;
    // SAFETY: cuInit takes flags by value (0 is the only valid value) and may be called any number of times.
    unsafe { call!(cuInit(0)) }
}

/// An error for every code but success.
pub(super) fn check(call: &'static str, code: u32) -> Result<()> {
    if code == CUresult::CUDA_SUCCESS as u32 {
        return Ok(());
    }
    Err(Error::Driver { call, code, name: code_name(code), advice: advice(code) })
}

/// The code's name as the driver knows it, such as `CUDA_ERROR_INVALID_VALUE`.
fn code_name(code: u32) -> String {
    type GetErrorName = unsafe extern "C" fn(u32, *mut *const c_char) -> u32;
    // SAFETY: the bindings' function takes a `repr(u32)` enumeration where this type takes a u32: same size and same
    // passing. As a u32 the argument may be a code that the enumeration lacks.
    let name_of = unsafe {
        std::mem::transmute::<unsafe extern "C" fn(CUresult, *mut *const c_char) -> CUresult, GetErrorName>(
            sys::cuGetErrorName,
        )
    };
    let mut name = ptr::null();
    // SAFETY: `name` is a valid place for one pointer; the function writes a pointer to a static string or null.
    let found = unsafe { name_of(code, &mut name) };
    if found != 0 || name.is_null() {
        let no_device = code == CUresult::CUDA_ERROR_NO_DEVICE as u32;
        return if no_device { "CUDA_ERROR_NO_DEVICE" } else { "a code without a name" }.to_owned();
    }
    // SAFETY: the driver returned a pointer to a nul-terminated string that lives as long as the library.
    unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
}

/// What the user can do about a code.
fn advice(code: u32) -> &'static str {
    match code {
        1 | 400 => "this is a defect of the program: please report it with the command that led here",
        2 => "free memory on the GPU: a smaller batch or sequence, or end other processes that nvidia-smi shows",
        100 => "no GPU is visible: see nvidia-smi and the variable CUDA_VISIBLE_DEVICES, or use --device cpu",
        101 => "`grafter devices` lists the GPUs that there are",
        46 | 201 | 708 => "the GPU is taken or was reset by another process: see nvidia-smi, then start again",
        209 | 222 | 223 => "the kernels need a GPU of compute capability 8.0 or newer and a driver of CUDA 12 or newer",
        218 => "the kernel's text is wrong, or newer than the driver: the compiler's log says which",
        214 | 220 => "the GPU's hardware reports a fault: see nvidia-smi -q and the kernel log, then reset the GPU",
        500 => "the module, or a driver older than the program expects, has nothing of this name",
        700 | 702 | 710 | 714..=719 => {
            "a kernel faulted and the GPU's context is lost: start the process again; compute-sanitizer names the kernel, \
             and with CUDA_LAUNCH_BLOCKING=1 its launch is what fails"
        }
        701 | 720 => "the launch needs more registers or shared memory than the GPU has: use smaller blocks",
        802 => "the system is not ready: on machines with NVSwitch, start nvidia-fabricmanager",
        803 | 804 => {
            "the driver's library and the kernel module do not match: restart the machine or install one driver"
        }
        3 | 4 | 304 | 999 => "the driver does not run properly: see nvidia-smi and the kernel log",
        _ => "the CUDA driver API's documentation explains the code",
    }
}

/// Whether a code says that the context is lost: all its memory is, and every later call fails.
///
/// The codes are those of the driver API's documentation that leave "the process in an inconsistent state": errors of the
/// hardware (214, 220, 226), faults of kernels (700, 702, 710, 714 to 719, 721) and a context that was destroyed (709).
pub(super) fn loses_context(code: u32) -> bool {
    matches!(code, 214 | 220 | 226 | 700 | 702 | 709 | 710 | 714..=719 | 721)
}

/// Opens the library and points every slot at the function of its name.
fn fill_table() -> std::result::Result<(), String> {
    // SAFETY: loading the driver runs its initialisers, which NVIDIA intends for any process.
    let library = unsafe { libloading::Library::new(LIBRARY) }.map_err(|error| error.to_string())?;
    for (name, slot) in NAMES.iter().zip(table()) {
        // SAFETY: the symbol is only taken as an address; it is called with the signature that `cust_raw`, or `later`,
        // declares for this very name.
        let function = unsafe { library.get::<*mut c_void>(name.to_bytes_with_nul()) };
        let address = function.map_or(missing as *mut c_void, |symbol| *symbol);
        slot.store(address, Ordering::Release);
    }
    // The slots point into the library for as long as the process lives.
    std::mem::forget(library);
    Ok(())
}

/// Where every slot points until the driver is loaded. Whatever the arguments, the caller cleans them up (System V and
/// AAPCS64 calling conventions), so one function stands for all.
extern "C" fn no_device() -> u32 {
    CUresult::CUDA_ERROR_NO_DEVICE as u32
}

/// Where slots point whose function the installed driver lacks.
extern "C" fn missing() -> u32 {
    CUresult::CUDA_ERROR_NOT_FOUND as u32
}

/// A driver function with its return code as a number. The bindings' enumeration has the codes of CUDA 11.4 only, and
/// an enumeration must never hold a value that it lacks.
pub(super) trait NumericResult {
    /// The same function type, returning u32.
    type Function;
    /// The same function, returning u32.
    fn numeric(self) -> Self::Function;
}

macro_rules! numeric_result {
    ($($parameter:ident)*) => {
        impl<$($parameter),*> NumericResult for unsafe extern "C" fn($($parameter),*) -> CUresult {
            type Function = unsafe extern "C" fn($($parameter),*) -> u32;

            fn numeric(self) -> Self::Function {
                // SAFETY: the two types differ in the result alone, and `CUresult` is `repr(u32)`: it is returned in the
                // same register.
                unsafe { std::mem::transmute::<Self, Self::Function>(self) }
            }
        }
    };
}
numeric_result!();
numeric_result!(A);
numeric_result!(A B);
numeric_result!(A B C);
numeric_result!(A B C D);
numeric_result!(A B C D E);
numeric_result!(A B C D E F G H);
numeric_result!(A B C D E F G H I J K);

macro_rules! trampolines {
    ($($name:ident)*) => {
        trampolines!(@all $($name)* cuLaunchKernelEx);
    };
    (@all $($name:ident)*) => {
        /// The names in the order of the table.
        const NAMES: &[&CStr] = &[$(symbol_name(concat!(stringify!($name), "\0"))),*];

        // Each symbol is one jump through its slot. `.hidden`: the linker resolves the bindings' references here, but
        // the driver's own library never sees these symbols in place of its own.
        #[cfg(target_arch = "x86_64")]
        global_asm!(
            ".pushsection .data.grafter_cuda, \"aw\", @progbits",
            ".balign 8",
            ".globl grafter_cuda_table",
            ".hidden grafter_cuda_table",
            "grafter_cuda_table:",
            $(concat!(".Lslot_", stringify!($name), ": .quad {no_device}"),)*
            ".popsection",
            ".pushsection .text.grafter_cuda, \"ax\", @progbits",
            $(concat!(
                ".globl ", stringify!($name), "\n",
                ".hidden ", stringify!($name), "\n",
                ".type ", stringify!($name), ", @function\n",
                stringify!($name), ": jmp qword ptr [rip + .Lslot_", stringify!($name), "]"
            ),)*
            ".popsection",
            no_device = sym no_device,
        );

        #[cfg(target_arch = "aarch64")]
        global_asm!(
            ".pushsection .data.grafter_cuda, \"aw\", @progbits",
            ".balign 8",
            ".globl grafter_cuda_table",
            ".hidden grafter_cuda_table",
            "grafter_cuda_table:",
            $(concat!(".Lslot_", stringify!($name), ": .quad {no_device}"),)*
            ".popsection",
            ".pushsection .text.grafter_cuda, \"ax\", @progbits",
            ".balign 4",
            // x16 is the register that the calling convention leaves to such veneers.
            $(concat!(
                ".globl ", stringify!($name), "\n",
                ".hidden ", stringify!($name), "\n",
                ".type ", stringify!($name), ", @function\n",
                stringify!($name), ":\n",
                "adrp x16, .Lslot_", stringify!($name), "\n",
                "ldr x16, [x16, :lo12:.Lslot_", stringify!($name), "]\n",
                "br x16"
            ),)*
            ".popsection",
            no_device = sym no_device,
        );
    };
}
for_each_symbol!(trampolines);

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!("the CUDA driver exists for x86-64 and aarch64; add a trampoline here for another architecture");

unsafe extern "C" {
    #[link_name = "grafter_cuda_table"]
    static TABLE: [AtomicPtr<c_void>; NAMES.len()];
}

fn table() -> &'static [AtomicPtr<c_void>] {
    // SAFETY: the assembler above lays out one aligned, initialised pointer per name under this symbol; it lives as long
    // as the process, and is written through atomics alone.
    unsafe { &TABLE }
}

/// Puts functions of a test in place of the driver's, for as long as the process lives. The library is not opened after.
#[cfg(test)]
pub(super) fn replace(functions: &[(&'static str, *mut c_void)]) {
    let mut opened = lock(&LIBRARY_OPENED);
    *opened = Some(Ok(()));
    for (name, function) in functions {
        let position = NAMES.iter().position(|own| own.to_bytes() == name.as_bytes());
        table()[position.unwrap()].store(*function, Ordering::Release);
    }
}

const fn symbol_name(name: &'static str) -> &'static CStr {
    match CStr::from_bytes_with_nul(name.as_bytes()) {
        Ok(name) => name,
        Err(_) => panic!("evaluated at compile time: the macro ends every name in one nul"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn before_the_driver_every_entry_says_that_there_is_no_device() {
        // Without a driver the slots never change, so this holds whatever other tests did before.
        if load().is_ok() {
            return;
        }
        let mut count = -1;
        // SAFETY: `count` is a valid place for the result.
        let error = unsafe { call!(cuDeviceGetCount(&mut count)) }.unwrap_err();
        let message = error.to_string();
        assert!(message.contains("cuDeviceGetCount") && message.contains("CUDA_ERROR_NO_DEVICE (100)"), "{message}");
        assert_eq!(count, -1);
        // SAFETY: eleven arguments, some of them on the stack, reach a function that reads none.
        let result = unsafe {
            call!(cuLaunchKernel(
                ptr::null_mut(),
                1,
                1,
                1,
                1,
                1,
                1,
                0,
                ptr::null_mut(),
                ptr::null_mut(),
                ptr::null_mut()
            ))
        };
        assert!(result.unwrap_err().to_string().contains("cuLaunchKernel"));
    }

    #[test]
    fn a_trampoline_passes_arguments_and_result_through() {
        /// Stands for `cuCtxGetStreamPriorityRange`, which nothing calls otherwise.
        extern "C" fn stand_in(least: *mut i32, greatest: *mut i32) -> u32 {
            // SAFETY: the caller below passes two valid places.
            unsafe {
                *least = 3;
                *greatest = 7;
            }
            721
        }
        let position = NAMES.iter().position(|name| name.to_bytes() == b"cuCtxGetStreamPriorityRange").unwrap();
        let before = table()[position].swap(stand_in as *mut c_void, Ordering::AcqRel);
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: both places are valid.
        let result = unsafe { call!(cuCtxGetStreamPriorityRange(&mut least, &mut greatest)) };
        table()[position].store(before, Ordering::Release);
        assert_eq!((least, greatest), (3, 7));
        // A code that the bindings do not know is reported, not undefined behaviour.
        assert!(result.unwrap_err().to_string().contains("(721)"));
    }

    #[test]
    fn every_name_is_a_function_of_the_bindings_and_links() {
        macro_rules! addresses {
            ($($name:ident)*) => { [$(sys::$name as *const c_void),*] };
        }
        let mut addresses = for_each_symbol!(addresses).to_vec();
        addresses.sort();
        addresses.dedup();
        assert_eq!(addresses.len() + 1, NAMES.len());
        assert!(!addresses.contains(&(later::cuLaunchKernelEx as *const c_void)));
    }

    #[test]
    fn a_missing_driver_is_one_line_that_names_the_library() {
        if let Err(error) = load() {
            let message = error.to_string();
            assert!(message.contains(LIBRARY) || message.contains("cuInit"), "{message}");
            assert_eq!(message.lines().count(), 1, "{message}");
        }
    }
}
