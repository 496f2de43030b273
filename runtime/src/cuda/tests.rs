//! The whole CUDA path against the made-up driver: what it does, and what it does when any call of it fails.

use super::fake::{self, Fake};
use crate::{Buffer, Device, Error, MemoryUsage, Result};

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

fn assert_same(found: &[u8], expected: &[u8]) {
    let differing = found.iter().zip(expected).position(|(found, expected)| found != expected);
    assert!(found.len() == expected.len() && differing.is_none(), "byte {differing:?} is not what it should be");
}

/// Something of everything that the runtime does with a GPU. Data are checked: what is wrong panics.
fn everything(ordinal: u32) -> Result<()> {
    let device = Device::cuda(ordinal)?;
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
    drop(buffer);
    device.free_and_total_memory()?;
    device.trim_memory()?;
    device.synchronize()
}

#[test]
fn everything_works_and_nothing_is_left() {
    let fake = Fake::attach();
    everything(fake.ordinal()).unwrap();
    assert_eq!(fake.violations(), [] as [&str; 0]);
    let device = Device::cuda(fake.ordinal()).unwrap();
    assert_eq!(device.memory_usage().in_use, 0);
    let after_once = fake.census();
    for _ in 0..3 {
        everything(fake.ordinal()).unwrap();
        assert_eq!(fake.census(), after_once);
    }
    println!("{after_once:?} after {:?}", fake.calls());
}

/// Calls that give something back: where one fails, the driver keeps what it was.
fn gives_back(call: &str) -> bool {
    ["Destroy", "Free", "Unload", "Release"].iter().any(|part| call.contains(part))
}

/// The calls of [`everything`] on a fresh GPU, and what is left on it.
fn calls_of_everything() -> (Vec<&'static str>, std::collections::BTreeMap<&'static str, usize>) {
    let fake = Fake::attach();
    everything(fake.ordinal()).unwrap();
    let calls = fake.calls();
    (calls, fake.census())
}

#[test]
fn a_failure_of_any_call_is_one_clean_error_and_the_device_stays_usable() {
    let (calls, left) = calls_of_everything();
    assert!(calls.len() > 40, "{calls:?}");
    let mut reported = 0;
    for (number, call) in calls.iter().enumerate() {
        let fake = Fake::attach();
        // The first GPU's number is not this one's: the calls are the same all the same.
        fake.fail(number, 999);
        let result = everything(fake.ordinal());
        assert_eq!(fake.calls()[number], *call);
        match result {
            // What is given back when something is dropped has nobody to report to, and some failures can be mended.
            Ok(()) => println!("{number} {call}: not reported"),
            Err(error) => {
                reported += 1;
                let message = error.to_string();
                assert!(message.contains(call) && message.contains("CUDA_ERROR_UNKNOWN (999)"), "{call}: {message}");
                assert_eq!(message.lines().count(), 1, "{message}");
            }
        }
        fake.heal();
        assert_eq!(fake.violations(), [] as [&str; 0], "{number} {call}");
        everything(fake.ordinal()).unwrap_or_else(|error| panic!("{number} {call}: unusable: {error}"));
        assert_eq!(fake.violations(), [] as [&str; 0], "{number} {call}");
        let device = Device::cuda(fake.ordinal()).unwrap();
        assert_eq!(device.memory_usage(), MemoryUsage { in_use: 0, ..device.memory_usage() }, "{number} {call}");
        if !gives_back(call) {
            assert_eq!(fake.census(), left, "{number} {call}: something leaks");
        }
    }
    println!("{reported} of {} failures were reported", calls.len());
    assert!(reported * 10 > calls.len() * 7);
}

#[test]
fn a_lost_context_is_reported_with_its_first_cause_ever_after() {
    let (calls, _) = calls_of_everything();
    let opening = {
        let fake = Fake::attach();
        Device::cuda(fake.ordinal()).unwrap();
        fake.calls().len()
    };
    for (number, call) in calls.iter().enumerate().skip(opening) {
        let fake = Fake::attach();
        fake.fail(number, fake::ILLEGAL_ADDRESS);
        // A failure while something is dropped shows at the next operation.
        let device = Device::cuda(fake.ordinal()).unwrap();
        let error = match everything(fake.ordinal()) {
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
        Device::cuda(fake.ordinal()).unwrap();
        fake.calls()
    };
    for (number, call) in opening.iter().enumerate() {
        let fake = Fake::attach();
        fake.fail(number, 999);
        let message = Device::cuda(fake.ordinal()).unwrap_err().to_string();
        assert!(message.contains(call), "{message}");
        assert_eq!(fake.census(), Default::default(), "{call}");
        fake.heal();
        Device::cuda(fake.ordinal()).unwrap();
    }
}

#[test]
fn out_of_memory_is_an_error_of_its_own_and_what_is_free_is_given_up_first() {
    let fake = Fake::attach();
    fake.set_capacity(64 << 20);
    let device = Device::cuda(fake.ordinal()).unwrap();
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
