//! What is written is what was read, in every spelling.

use std::fs;
use std::path::Path;

use autograd::DType;
use model::checkpoint::{SaveOptions, WeightFiles};
use model::config::ModelConfig;
use model::import::import;
use model::{Model, Precision};
use runtime::Device;
use safetensors::Dtype;
use serde_json::json;

use crate::folders::*;

fn load(folder: &Path, precision: Precision) -> Model {
    Model::load(folder, &Device::cpu(), precision).unwrap()
}

fn narrowed(bytes: &[u8]) -> Vec<u8> {
    bytes
        .chunks_exact(4)
        .flat_map(|bytes| half::bf16::from_f32(f32::from_le_bytes(bytes.try_into().unwrap())).to_le_bytes())
        .collect()
}

/// Stores everything but `A_log` as bf16, as training in bf16 with f32 state-space parameters leaves it.
fn mixed(folder: &Path) {
    edit_tensors(folder, |tensors| {
        for (name, (dtype, _, bytes)) in tensors.iter_mut() {
            if !name.ends_with("A_log") {
                *bytes = narrowed(bytes);
                *dtype = Dtype::BF16;
            }
        }
    });
    edit_config(folder, "torch_dtype", json!("bfloat16"));
}

#[test]
fn loading_stops_when_it_is_asked_to() {
    let scratch = tempfile::tempdir().unwrap();
    let model = random_folder(scratch.path(), "model", &mistral_config());
    let mut asked = 0;
    let stopped = Model::load_while(&model, &Device::cpu(), Precision::F32, || {
        asked += 1;
        asked < 4
    });
    assert!(matches!(stopped, Err(model::Error::Stopped)));
    assert_eq!(asked, 4, "once before each tensor");
}

#[test]
fn load_and_save_keep_every_byte_of_every_tensor() {
    let scratch = tempfile::tempdir().unwrap();
    for (name, config) in [("mistral", mistral_config()), ("hybrid", hybrid_config())] {
        let source = random_folder(scratch.path(), name, &config);
        mixed(&source);
        let expected = read_tensors(&source.join("model.safetensors"));
        for precision in [Precision::F32, Precision::AsStored] {
            let copy = scratch.path().join(format!("{name} {precision:?}"));
            let options = SaveOptions { carry_from: Some(&source), ..SaveOptions::default() };
            load(&source, precision).save(&copy, &options).unwrap();
            assert!(read_tensors(&copy.join("model.safetensors")) == expected);
            assert_eq!(read_json(&copy.join("config.json")), read_json(&source.join("config.json")));
        }
        let imported = scratch.path().join(format!("{name} imported"));
        let mut last = None;
        let summary = import(&source, &imported, |progress| last = Some(progress.bytes_done)).unwrap();
        assert!(read_tensors(&imported.join("model.safetensors")) == expected);
        assert_eq!(summary.tensors, expected.len());
        assert_eq!(summary.bytes, expected.values().map(|(_, _, bytes)| bytes.len() as u64).sum::<u64>());
        assert!(last.unwrap() < summary.bytes);
    }
}

#[test]
fn the_element_type_can_be_chosen() {
    let scratch = tempfile::tempdir().unwrap();
    let source = random_folder(scratch.path(), "source", &hybrid_config());
    let wide = load(&source, Precision::F32);
    let narrow_folder = scratch.path().join("narrow");
    let options = SaveOptions { dtype: Some(DType::Bf16), ..SaveOptions::default() };
    edit_config(&source, "dtype", json!("float32"));
    load(&source, Precision::F32).save(&narrow_folder, &options).unwrap();
    assert_eq!(read_json(&narrow_folder.join("config.json"))["dtype"], "bfloat16");
    let narrow = load(&narrow_folder, Precision::AsStored);
    for ((name, wide), narrow) in values(&wide).iter().zip(values(&narrow).values()) {
        let expected: Vec<f32> = wide.iter().map(|value| half::bf16::from_f32(*value).to_f32()).collect();
        assert_eq!(narrow, &expected, "{name}");
    }
    let in_memory = |name: &str| {
        let id = narrow.parameters.find(name).unwrap();
        narrow.parameters.get(id).value.dtype()
    };
    assert_eq!(in_memory("model.layers.1.mixer.in_proj.weight"), DType::Bf16);
    assert_eq!(in_memory("model.layers.1.mixer.A_log"), DType::F32);
}

#[test]
fn shards_and_links_are_followed() {
    let scratch = tempfile::tempdir().unwrap();
    let whole = random_folder(scratch.path(), "whole", &mistral_config());
    let sharded = scratch.path().join("sharded");
    let model = load(&whole, Precision::F32);
    model.save(&sharded, &SaveOptions { shard_bytes: 20_000, ..SaveOptions::default() }).unwrap();
    let index = read_json(&sharded.join("model.safetensors.index.json"));
    let mut names: Vec<&str> =
        index["weight_map"].as_object().unwrap().values().map(|name| name.as_str().unwrap()).collect();
    names.sort_unstable();
    names.dedup();
    assert!(names.len() > 2 && names[0] == format!("model-00001-of-{:05}.safetensors", names.len()));
    let total: usize = read_tensors(&whole.join("model.safetensors")).values().map(|(_, _, bytes)| bytes.len()).sum();
    assert_eq!(index["metadata"]["total_size"], total);
    for name in names {
        let bytes: usize = read_tensors(&sharded.join(name)).values().map(|(_, _, bytes)| bytes.len()).sum();
        assert!(bytes <= 20_000, "{name} has {bytes} bytes");
    }
    assert_eq!(values(&load(&sharded, Precision::F32)), values(&model));

    // The Hugging Face cache: files are links to blobs in another folder.
    #[cfg(unix)]
    {
        let (blobs, snapshot) = (scratch.path().join("cache/blobs"), scratch.path().join("cache/snapshots/1f"));
        fs::create_dir_all(&blobs).unwrap();
        fs::create_dir_all(&snapshot).unwrap();
        for (number, entry) in fs::read_dir(&sharded).unwrap().enumerate() {
            let path = entry.unwrap().path();
            fs::copy(&path, blobs.join(number.to_string())).unwrap();
            let link = snapshot.join(path.file_name().unwrap());
            std::os::unix::fs::symlink(format!("../../blobs/{number}"), link).unwrap();
        }
        assert_eq!(values(&load(&snapshot, Precision::F32)), values(&model));
        let output = scratch.path().join("imported");
        import(&snapshot, &output, |_| {}).unwrap();
        assert_eq!(read_tensors(&output.join("model.safetensors")), read_tensors(&whole.join("model.safetensors")));
    }
}

#[test]
fn a_fused_step_size_projection_is_split() {
    let scratch = tempfile::tempdir().unwrap();
    let source = random_folder(scratch.path(), "source", &hybrid_config());
    let expected = load(&source, Precision::F32);
    let tensors = read_tensors(&source.join("model.safetensors"));
    edit_tensors(&source, |tensors| {
        for layer in 1..3 {
            let (_, shape, step) = tensors.remove(&format!("model.layers.{layer}.mixer.dt_in_proj.weight")).unwrap();
            let fused = tensors.get_mut(&format!("model.layers.{layer}.mixer.in_proj.weight")).unwrap();
            fused.1[0] += shape[0];
            fused.2.extend(step);
        }
    });
    // Never trusted: the rows say 3.
    edit_config(&source, "ssm_cfg", json!({"d_state": 16, "d_inner": 64, "d_xb": 32, "dt_rank": "auto"}));
    let loaded = load(&source, Precision::F32);
    assert_eq!(loaded.config.mamba.as_ref().unwrap().dt_rank, 3);
    assert_eq!(values(&loaded), values(&expected));
    let output = scratch.path().join("imported");
    import(&source, &output, |_| {}).unwrap();
    assert!(read_tensors(&output.join("model.safetensors")) == tensors, "the import is in the current names");
    assert_eq!(read_json(&output.join("config.json"))["ssm_cfg"]["dt_rank"], 3);
}

#[test]
fn m1_names_are_understood() {
    let scratch = tempfile::tempdir().unwrap();
    let source = random_folder(scratch.path(), "source", &hybrid_config());
    let expected = values(&load(&source, Precision::F32));
    edit_tensors(&source, |tensors| {
        *tensors = std::mem::take(tensors)
            .into_iter()
            .map(|(name, tensor)| (name.replace(".mixer.", ".mamba."), tensor))
            .collect();
    });
    assert_eq!(values(&load(&source, Precision::F32)), expected);
}

#[test]
fn the_apriel2_format_is_read_and_written() {
    let scratch = tempfile::tempdir().unwrap();
    let source = random_folder(scratch.path(), "source", &hybrid_config());
    let expected = values(&load(&source, Precision::F32));
    edit_tensors(&source, |tensors| {
        *tensors = std::mem::take(tensors)
            .into_iter()
            .map(|(name, tensor)| {
                let name = name.replace("model.layers.", "model.decoder.blocks.").replace(".self_attn.", ".mixer.");
                (name, tensor)
            })
            .collect();
    });
    let (mlp, normalization) = (
        json!({"type": "mlp", "intermediate_size": 40, "activation": "silu", "gated": true}),
        json!({"type": "rms_norm", "epsilon": 1e-5}),
    );
    let config = object(json!({
        "model_type": "apriel2_text", "architectures": ["Apriel2ForCausalLM"], "hidden_size": 24, "vocab_size": 29,
        "tie_word_embeddings": false, "embeddings": {"max_position_embeddings": 64},
        "decoder": {
            "type": "pattern", "num_blocks": 3, "pattern": ["full", "ssm", "ssm"],
            "blocks": {
                "full": {
                    "mixer": {"type": "attention", "heads": 4, "head_groups": 2, "head_size": 16,
                              "rotary": {"type": "mistral_1d", "theta": 10000.0}},
                    "mlp": mlp, "normalization": normalization,
                },
                "ssm": {
                    "mixer": {"type": "mamba", "d_inner": 64, "state_size": 16, "d_xb": 32, "dt_rank": 3,
                              "conv_bias": true, "dt_proj_bias": true},
                    "mlp": mlp, "normalization": normalization,
                },
            },
        },
    }));
    write_json(&source.join("config.json"), &config);
    let loaded = load(&source, Precision::F32);
    assert_eq!(values(&loaded), expected);
    let copy = scratch.path().join("copy");
    loaded.save(&copy, &SaveOptions::default()).unwrap();
    assert!(read_tensors(&copy.join("model.safetensors")) == read_tensors(&source.join("model.safetensors")));
    assert_eq!(read_json(&copy.join("config.json")), config);
    let output = scratch.path().join("imported");
    import(&source, &output, |_| {}).unwrap();
    assert!(read_tensors(&output.join("model.safetensors")) == read_tensors(&source.join("model.safetensors")));
}

#[test]
fn a_tied_model_may_store_its_head_and_loses_it_when_saved() {
    let scratch = tempfile::tempdir().unwrap();
    let mut config = mistral_config();
    config.insert("tie_word_embeddings".to_owned(), json!(true));
    let source = random_folder(scratch.path(), "source", &config);
    let tensors = read_tensors(&source.join("model.safetensors"));
    assert!(!tensors.contains_key("lm_head.weight"));
    edit_tensors(&source, |tensors| {
        let embedding = tensors["model.embed_tokens.weight"].clone();
        tensors.insert("lm_head.weight".to_owned(), embedding);
        tensors
            .insert("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), (Dtype::F32, vec![8], vec![0x7f; 32]));
    });
    let copy = scratch.path().join("copy");
    load(&source, Precision::F32).save(&copy, &SaveOptions::default()).unwrap();
    assert!(read_tensors(&copy.join("model.safetensors")) == tensors);
}

#[test]
fn tensors_can_be_looked_at_without_a_model() {
    let scratch = tempfile::tempdir().unwrap();
    let source = random_folder(scratch.path(), "source", &hybrid_config());
    mixed(&source);
    let files = WeightFiles::open(&source).unwrap();
    let config = ModelConfig::read(&source).unwrap();
    let specs = model::architecture::parameter_specs(&config, |name| files.stored_dtype(name));
    assert_eq!(files.names().count(), specs.len());
    for spec in &specs {
        let info = files.info(&spec.name).unwrap();
        assert_eq!(info.shape, spec.shape);
        assert_eq!(info.dtype == Dtype::F32, spec.name.ends_with("A_log"));
        let values = files.read_f32(&spec.name).unwrap();
        assert_eq!(values.len(), spec.shape.iter().product::<usize>());
        assert!(values.iter().all(|value| value.is_finite()));
    }
    assert_eq!(files.stored_dtype("model.norm.weight"), DType::Bf16);
    assert!(files.read_f32("nothing").unwrap_err().to_string().contains("tensor nothing is missing"));
}
