//! The parity cases that the repository carries, and whether the harness notices when something is wrong.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use runtime::Device;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;
use tools::parity::{self, CaseReport, Options, Precision, Report, Status};

/// A small case with every kind of tensor that the tests below tamper with.
const SMALL: &str = "ops/rmsnorm_h80.safetensors";
/// Another, of another kind.
const OTHER: &str = "decode/causal_conv1d_w3_silu_l2.safetensors";

#[test]
fn every_case_of_the_repository_passes() {
    let folder = fixtures();
    let report = run(&folder, 1.0).unwrap();
    let bad: String =
        report.cases.iter().filter(|case| case.status != Status::Passed).map(|case| case.to_text(false)).collect();
    assert!(bad.is_empty(), "{bad}");
    let manifest = read_manifest(&folder);
    let listed = manifest["fixtures"].as_array().unwrap();
    assert_eq!(report.cases.len(), listed.len());
    let kinds: BTreeSet<&str> = listed.iter().map(|case| case["op"].as_str().unwrap()).collect();
    assert_eq!(kinds.len(), 18, "every kind of case is there: {kinds:?}");
    for (case, listed) in report.cases.iter().zip(listed) {
        assert_eq!(case.file, listed["file"].as_str().unwrap());
        let compared: BTreeSet<&str> = case.comparisons.iter().map(|comparison| comparison.tensor.as_str()).collect();
        for name in listed["tensors"].as_object().unwrap().keys().filter(|name| must_be_compared(&case.op, name)) {
            assert!(compared.contains(name.as_str()), "{}: {name} was not compared", case.file);
        }
    }
}

/// Results of a case, by their names. The gradients of an optimizer's case are inputs.
fn must_be_compared(op: &str, name: &str) -> bool {
    let drawn_at_random = op == "mil_conversion"
        && ["conv1d", "dt_proj", "dt_in_proj"].iter().any(|part| name.starts_with(&format!("out.mixer.{part}.")));
    match name.split_once('.').map(|(kind, _)| kind) {
        Some("out" | "step1" | "final" | "state" | "map") => !drawn_at_random,
        Some("grad") => op != "adamw_trajectory",
        _ => name == "gen.tokens",
    }
}

#[test]
fn an_untouched_copy_passes() {
    let copy = Copy::of(&[SMALL, OTHER]);
    let report = copy.run();
    assert!(report.passed() && report.cases.len() == 2, "{}", text(&report));
}

#[test]
fn each_wrong_expectation_fails_by_name() {
    for name in ["out.y", "grad.x", "grad.weight"] {
        for element in [0, 79] {
            let copy = Copy::of(&[SMALL, OTHER]);
            copy.edit_tensors(SMALL, |tensors| {
                let values = &mut tensors.get_mut(name).unwrap().2;
                let value = f32_at(values, element);
                set_f32(values, element, value + 1e-3);
            });
            let report = copy.run();
            assert_eq!(report.count(Status::Failed), 1, "{}", text(&report));
            let failed: Vec<&str> = failures(&report.cases[0]);
            assert_eq!(failed, [name], "{}", text(&report));
            assert!(!report.passed() && report.cases[1].status == Status::Passed);
        }
    }
}

#[test]
fn expectations_in_another_order_fail() {
    let copy = Copy::of(&[SMALL]);
    copy.edit_tensors(SMALL, |tensors| tensors.get_mut("grad.weight").unwrap().2.rotate_left(4));
    assert_eq!(failures(&copy.run().cases[0]), ["grad.weight"]);
}

#[test]
fn not_a_number_fails_in_an_expectation_and_in_an_input() {
    for (name, failing) in [("out.y", &["out.y"][..]), ("in.x", &["grad.weight", "grad.x", "out.y"])] {
        let copy = Copy::of(&[SMALL]);
        copy.edit_tensors(SMALL, |tensors| set_f32(&mut tensors.get_mut(name).unwrap().2, 5, f32::NAN));
        copy.edit_manifest(|manifest| {
            // However wide the bounds.
            for bounds in manifest["fixtures"][0]["tolerance"].as_object_mut().unwrap().values_mut() {
                bounds["fp32"] = json!({"rel_l2": 1e30, "max_abs_over_max": 1e30});
            }
        });
        let report = copy.run();
        let mut failed = failures(&report.cases[0]);
        failed.sort_unstable();
        assert_eq!(failed, failing, "{}", text(&report));
    }
}

#[test]
fn a_missing_tensor_fails() {
    for name in ["out.y", "grad.x", "in.x"] {
        let copy = Copy::of(&[SMALL]);
        copy.edit_tensors(SMALL, |tensors| {
            tensors.remove(name).unwrap();
        });
        let message = copy.only_failure();
        assert!(message.contains(name) && message.contains("missing"), "{message}");
    }
    // Gone from the list as well: its bounds still ask for it.
    let copy = Copy::of(&[SMALL]);
    copy.edit_tensors(SMALL, |tensors| {
        tensors.remove("grad.x").unwrap();
    });
    copy.edit_manifest(|manifest| {
        manifest["fixtures"][0]["tensors"].as_object_mut().unwrap().remove("grad.x").unwrap();
    });
    assert!(text(&copy.failed()).contains("grad.x is missing"));
}

#[test]
fn a_result_that_the_harness_does_not_compute_fails() {
    for name in ["out.second_moment", "grad.eps", "state.x", "final.x", "step1.x"] {
        let copy = Copy::of(&[SMALL]);
        copy.edit_tensors(SMALL, |tensors| {
            tensors.insert(name.to_owned(), (Dtype::F32, vec![1], vec![0; 4]));
        });
        copy.edit_manifest(|manifest| {
            manifest["fixtures"][0]["tensors"][name] = json!({"shape": [1], "dtype": "float32"});
        });
        let message = copy.only_failure();
        assert!(message.contains(name), "{message}");
    }
}

#[test]
fn a_result_without_bounds_fails() {
    let copy = Copy::of(&[SMALL]);
    copy.edit_manifest(|manifest| {
        manifest["fixtures"][0]["tolerance"].as_object_mut().unwrap().remove("grad.x").unwrap();
    });
    assert!(text(&copy.failed()).contains("grad.x"));
}

#[test]
fn an_unknown_kind_of_case_fails_and_the_others_run() {
    let copy = Copy::of(&[SMALL, OTHER]);
    copy.edit_manifest(|manifest| manifest["fixtures"][0]["op"] = json!("hyperbolic_attention"));
    let report = copy.failed();
    assert!(report.cases[0].messages.join(" ").contains("hyperbolic_attention"), "{}", text(&report));
    assert_eq!(report.cases[1].status, Status::Passed);
}

#[test]
fn an_unreadable_file_fails_and_the_others_run() {
    let truncated = Copy::of(&[SMALL, OTHER]);
    let path = truncated.path().join(SMALL);
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let absent = Copy::of(&[SMALL, OTHER]);
    fs::remove_file(absent.path().join(SMALL)).unwrap();
    let outside = Copy::of(&[SMALL, OTHER]);
    outside.edit_manifest(|manifest| manifest["fixtures"][0]["file"] = json!("../elsewhere.safetensors"));
    let other_shape = Copy::of(&[SMALL, OTHER]);
    other_shape.edit_manifest(|manifest| manifest["fixtures"][0]["tensors"]["in.x"]["shape"] = json!([21, 80]));
    for copy in [truncated, absent, outside, other_shape] {
        let report = copy.failed();
        assert!(!report.cases[0].messages.is_empty(), "{}", text(&report));
        assert_eq!(report.cases[1].status, Status::Passed);
    }
}

#[test]
fn a_scale_widens_the_bounds_and_says_so() {
    let copy = Copy::of(&[SMALL]);
    // Twice the greatest bound of the case in relative size, so that only the scale lets it pass.
    copy.edit_tensors(SMALL, |tensors| {
        let values = &mut tensors.get_mut("out.y").unwrap().2;
        let count = values.len() / 4;
        for element in 0..count {
            let value = f32_at(values, element);
            set_f32(values, element, value * (1.0 + 2.5e-6));
        }
    });
    assert!(!copy.run().passed());
    let report = run(copy.path(), 4.0).unwrap();
    assert!(report.passed(), "{}", text(&report));
    assert_eq!(report.cases[0].bounds_scaled_by, Some(4.0));
    assert!(report.summary().contains('4') && report.cases[0].to_text(false).contains("×4"));
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["fp32_scale"], json!(4.0));
    for scale in [0.5, 0.0, f64::NAN, f64::INFINITY] {
        assert!(run(copy.path(), scale).is_err(), "{scale}");
    }
}

#[test]
fn a_folder_that_is_no_fixture_folder_is_an_error() {
    let empty = tempfile::tempdir().unwrap();
    assert!(run(empty.path(), 1.0).unwrap_err().to_string().contains("manifest.json"));
    let copy = Copy::of(&[SMALL]);
    copy.edit_manifest(|manifest| manifest["schema"] = json!("grafter-parity/2"));
    let message = format!("{:#}", run(copy.path(), 1.0).unwrap_err());
    assert!(message.contains("grafter-parity/2"), "{message}");
    copy.edit_manifest(|manifest| *manifest = json!({"schema": "grafter-parity/1", "fixtures": []}));
    assert!(run(copy.path(), 1.0).is_err(), "a folder without cases proves nothing");
}

/// A scratch folder with some of the repository's cases.
struct Copy(TempDir);

/// Element type, shape and little-endian bytes by name.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

impl Copy {
    fn of(files: &[&str]) -> Self {
        let (source, copy) = (fixtures(), Self(tempfile::tempdir().unwrap()));
        let mut manifest = read_manifest(&source);
        manifest["fixtures"].as_array_mut().unwrap().retain(|case| files.contains(&case["file"].as_str().unwrap()));
        // In the order asked for.
        manifest["fixtures"]
            .as_array_mut()
            .unwrap()
            .sort_by_key(|case| files.iter().position(|file| case["file"] == json!(file)));
        assert_eq!(manifest["fixtures"].as_array().unwrap().len(), files.len(), "{files:?}");
        copy.write_manifest(&manifest);
        for file in files {
            let target = copy.path().join(file);
            fs::create_dir_all(target.parent().unwrap()).unwrap();
            fs::copy(source.join(file), target).unwrap();
        }
        copy
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn write_manifest(&self, manifest: &Value) {
        fs::write(self.path().join("manifest.json"), manifest.to_string()).unwrap();
    }

    fn edit_manifest(&self, edit: impl FnOnce(&mut Value)) {
        let mut manifest = read_manifest(self.path());
        edit(&mut manifest);
        self.write_manifest(&manifest);
    }

    fn edit_tensors(&self, file: &str, edit: impl FnOnce(&mut Tensors)) {
        let path = self.path().join(file);
        let bytes = fs::read(&path).unwrap();
        let mut tensors: Tensors = SafeTensors::deserialize(&bytes)
            .unwrap()
            .iter()
            .map(|(name, view)| (name.to_owned(), (view.dtype(), view.shape().to_vec(), view.data().to_vec())))
            .collect();
        edit(&mut tensors);
        let views: Vec<(&str, TensorView<'_>)> = tensors
            .iter()
            .map(|(name, (dtype, shape, data))| (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap()))
            .collect();
        fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
    }

    fn run(&self) -> Report {
        run(self.path(), 1.0).unwrap()
    }

    /// The report of a run in which the first case fails.
    fn failed(&self) -> Report {
        let report = self.run();
        assert!(!report.passed() && report.cases[0].status == Status::Failed, "{}", text(&report));
        report
    }

    /// The messages of the first case, which fails, although no comparison of it does.
    fn only_failure(&self) -> String {
        let report = self.failed();
        assert!(failures(&report.cases[0]).is_empty(), "{}", text(&report));
        report.cases[0].messages.join("; ")
    }
}

fn run(folder: &Path, fp32_scale: f64) -> anyhow::Result<Report> {
    let options = Options { device: Device::cpu(), precision: Precision::Fp32, filter: None, fp32_scale };
    parity::run(folder, &options, |_| {})
}

/// Tensors of a case that are outside their bounds.
fn failures(case: &CaseReport) -> Vec<&str> {
    case.comparisons
        .iter()
        .filter(|comparison| !comparison.passed)
        .map(|comparison| comparison.tensor.as_str())
        .collect()
}

fn text(report: &Report) -> String {
    report.cases.iter().map(|case| case.to_text(false)).collect()
}

fn f32_at(bytes: &[u8], element: usize) -> f32 {
    f32::from_le_bytes(bytes[element * 4..][..4].try_into().unwrap())
}

fn set_f32(bytes: &mut [u8], element: usize, value: f32) {
    bytes[element * 4..][..4].copy_from_slice(&value.to_le_bytes());
}

fn read_manifest(folder: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(folder.join("manifest.json")).unwrap()).unwrap()
}

/// The repository's parity folder, from wherever in the repository the tests are run.
fn fixtures() -> PathBuf {
    let start = std::env::current_dir().unwrap();
    let found = start.ancestors().map(|folder| folder.join("tests/fixtures/parity")).find(|folder| folder.is_dir());
    found.unwrap_or_else(|| panic!("no folder above {} has tests/fixtures/parity", start.display()))
}
