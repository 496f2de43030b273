//! NVTX ranges, for NVIDIA's profilers.
//!
//! NVTX 3 has no library that a program links to. A profiler names a library of its own in the variable
//! `NVTX_INJECTION64_PATH`; whoever uses NVTX opens it, calls its `InitializeInjectionNvtx2`, and hands over tables of
//! places for functions, into which the profiler writes its own (`nvtxTypes.h` and `nvtxInit.h` of NVTX 3). Two of those
//! functions are called here: the ones that open and close a thread's range. Without the variable nothing happens.

use std::env;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

/// Opens a range on this thread.
pub(crate) fn push(label: &str) {
    let Some(profiler) = profiler() else { return };
    let label = label.split('\0').next().unwrap_or_default();
    if let Ok(label) = CString::new(label) {
        profiler.push(&label);
    }
}

/// Closes the range that was opened last on this thread.
pub(crate) fn pop() {
    if let Some(profiler) = profiler() {
        profiler.pop();
    }
}

/// The functions that a profiler wrote into the tables.
struct Profiler {
    push: Push,
    pop: Pop,
}

type Push = unsafe extern "C" fn(*const c_char) -> c_int;
type Pop = unsafe extern "C" fn() -> c_int;

impl Profiler {
    fn push(&self, label: &CStr) {
        // SAFETY: a profiler's function of NVTX's type for this place; the label ends in a nul and outlives the call.
        unsafe { (self.push)(label.as_ptr()) };
    }

    fn pop(&self) {
        // SAFETY: a profiler's function of NVTX's type for this place.
        unsafe { (self.pop)() };
    }
}

/// The profiler that the environment names, opened when first asked for.
fn profiler() -> Option<&'static Profiler> {
    static PROFILER: OnceLock<Option<Profiler>> = OnceLock::new();
    PROFILER.get_or_init(open).as_ref()
}

fn open() -> Option<Profiler> {
    let path = env::var_os("NVTX_INJECTION64_PATH")?;
    // SAFETY: whoever set the variable wants this library in the process, its initialisers included.
    let library = unsafe { libloading::Library::new(path) }.ok()?;
    // SAFETY: the library promises a function of this type under this name.
    let initialise = *unsafe { library.get::<Initialise>(c"InitializeInjectionNvtx2".to_bytes_with_nul()) }.ok()?;
    let profiler = attach(initialise);
    // Its functions are in the tables, and it may have started threads.
    std::mem::forget(library);
    profiler
}

/// `NvtxInitializeInjectionNvtxFunc_t`
type Initialise = unsafe extern "C" fn(GetExportTable) -> c_int;
/// `NvtxGetExportTableFunc_t`
type GetExportTable = extern "C" fn(u32) -> *const c_void;

/// Lets a profiler write its functions into the tables.
fn attach(initialise: Initialise) -> Option<Profiler> {
    // SAFETY: the function is a profiler's, and gets what NVTX would give it.
    if unsafe { initialise(export_table) } == 0 {
        return None;
    }
    let core = &tables().get(CORE)?.places;
    let (push, pop) = (core[RANGE_PUSH_A].load(Ordering::Acquire), core[RANGE_POP].load(Ordering::Acquire));
    if push.is_null() || pop.is_null() {
        return None;
    }
    // SAFETY: whoever writes into these two places writes functions of these types, or null.
    unsafe {
        Some(Profiler {
            push: std::mem::transmute::<*mut c_void, Push>(push),
            pop: std::mem::transmute::<*mut c_void, Pop>(pop),
        })
    }
}

/// Number of the module with the functions without domains, and of the two that are called (`NVTX_CB_MODULE_CORE`,
/// `NVTX_CBID_CORE_RangePushA`, `NVTX_CBID_CORE_RangePop`).
const CORE: usize = 1;
const RANGE_PUSH_A: usize = 9;
const RANGE_POP: usize = 11;

/// Places in the table of each module, the unused first one included: none, core, CUDA, OpenCL, CUDA runtime, core 2
/// (domains), synchronisation. Profilers ask for all of them and give up when one is missing.
const PLACES: [usize; 7] = [0, 16, 9, 15, 7, 16, 7];

/// `NVTX_ETID_CALLBACKS` and `NVTX_ETID_VERSIONINFO`
const CALLBACKS: u32 = 1;
const VERSION_INFORMATION: u32 = 3;

/// A module's functions: the places for them, and the table of the places' addresses.
struct Table {
    places: Vec<AtomicPtr<c_void>>,
    addresses: Vec<AtomicPtr<AtomicPtr<c_void>>>,
}

fn tables() -> &'static [Table] {
    static TABLES: OnceLock<Vec<Table>> = OnceLock::new();
    TABLES.get_or_init(|| {
        PLACES
            .iter()
            .map(|&count| {
                let places: Vec<AtomicPtr<c_void>> = (0..count).map(|_| AtomicPtr::default()).collect();
                let address = |place: &AtomicPtr<c_void>| AtomicPtr::new(ptr::from_ref(place).cast_mut());
                let mut addresses: Vec<_> = places.iter().map(address).collect();
                // Identifiers count from 1; and NVTX's tables end in a null.
                if let Some(unused) = addresses.first_mut() {
                    *unused = AtomicPtr::default();
                }
                addresses.push(AtomicPtr::default());
                Table { places, addresses }
            })
            .collect()
    })
}

/// `NvtxExportTableCallbacks`
#[repr(C)]
struct Callbacks {
    bytes: usize,
    module_table: extern "C" fn(u32, *mut *const c_void, *mut c_uint) -> c_int,
}

/// `NvtxExportTableVersionInfo`
#[repr(C)]
struct VersionInformation {
    bytes: usize,
    version: u32,
    reserved: u32,
    set_profilers_version: extern "C" fn(u32),
}

extern "C" fn export_table(number: u32) -> *const c_void {
    static TABLE: Callbacks = Callbacks { bytes: size_of::<Callbacks>(), module_table };
    static VERSION: VersionInformation =
        VersionInformation { bytes: size_of::<VersionInformation>(), version: 3, reserved: 0, set_profilers_version };
    match number {
        CALLBACKS => ptr::from_ref(&TABLE).cast(),
        VERSION_INFORMATION => ptr::from_ref(&VERSION).cast(),
        _ => ptr::null(),
    }
}

extern "C" fn set_profilers_version(_version: u32) {}

extern "C" fn module_table(module: u32, table: *mut *const c_void, count: *mut c_uint) -> c_int {
    let Some(found) = tables().get(module as usize).filter(|found| !found.places.is_empty()) else { return 0 };
    // SAFETY: the profiler passes places for the results, or null for what it does not want.
    unsafe {
        if let Some(table) = table.as_mut() {
            // An atomic pointer is laid out as a pointer.
            *table = found.addresses.as_ptr().cast();
        }
        if let Some(count) = count.as_mut() {
            *count = found.places.len() as c_uint;
        }
    }
    1
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, PoisonError};

    use super::*;

    static HEARD: Mutex<Vec<String>> = Mutex::new(Vec::new());

    fn hear(what: String) {
        HEARD.lock().unwrap_or_else(PoisonError::into_inner).push(what);
    }

    unsafe extern "C" fn heard_push(label: *const c_char) -> c_int {
        // SAFETY: labels end in a nul.
        hear(format!("push {}", unsafe { CStr::from_ptr(label) }.to_str().unwrap()));
        0
    }

    unsafe extern "C" fn heard_pop() -> c_int {
        hear("pop".to_owned());
        0
    }

    /// What a profiler does: asks for tables the way NVTX's header describes them, and writes through them.
    unsafe extern "C" fn profiler(export_table: GetExportTable) -> c_int {
        assert!(export_table(2).is_null());
        // SAFETY: NVTX promises these layouts for these numbers.
        let (callbacks, version) =
            unsafe { (&*export_table(1).cast::<Callbacks>(), &*export_table(3).cast::<VersionInformation>()) };
        assert_eq!((callbacks.bytes, version.bytes, version.version), (16, 24, 3));
        (version.set_profilers_version)(3);
        for (module, places) in [(1, 16), (2, 9), (3, 15), (4, 7), (5, 16), (6, 7)] {
            let (mut table, mut count) = (ptr::null(), 0);
            assert_eq!((callbacks.module_table)(module, &mut table, &mut count), 1);
            assert_eq!(count, places);
            let table = table.cast::<*mut *const c_void>();
            for place in 1..places as usize {
                // SAFETY: the table has `count` entries, all but the first addresses of places for functions.
                unsafe { **table.add(place) = ptr::null() };
            }
            // SAFETY: as above; the table's first entry and the one behind its last are null.
            unsafe {
                assert!((*table).is_null() && (*table.add(places as usize)).is_null());
                if module == 1 {
                    **table.add(9) = heard_push as *const c_void;
                    **table.add(11) = heard_pop as *const c_void;
                }
            }
        }
        assert_eq!((callbacks.module_table)(0, ptr::null_mut(), ptr::null_mut()), 0);
        assert_eq!((callbacks.module_table)(7, ptr::null_mut(), ptr::null_mut()), 0);
        1
    }

    unsafe extern "C" fn unwilling(_: GetExportTable) -> c_int {
        0
    }

    #[test]
    fn a_profiler_that_is_attached_hears_ranges() {
        assert!(attach(unwilling).is_none());
        let profiler = attach(profiler).unwrap();
        profiler.push(c"layer 3");
        profiler.push(c"mixer");
        profiler.pop();
        profiler.pop();
        assert_eq!(*HEARD.lock().unwrap(), ["push layer 3", "push mixer", "pop", "pop"]);
    }

    #[test]
    fn without_a_profiler_ranges_are_nothing() {
        // Tests run without the variable.
        if env::var_os("NVTX_INJECTION64_PATH").is_none() {
            push("layer\0 3");
            pop();
            assert!(super::profiler().is_none());
        }
    }
}
