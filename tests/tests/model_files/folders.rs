//! Small model folders, taken apart and put together with the reference implementation of safetensors.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use model::Model;
use model::checkpoint::SaveOptions;
use model::config::ModelConfig;
use runtime::Device;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};

/// Name to element type, shape and bytes.
pub type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// A Mistral of two layers.
pub fn mistral_config() -> Map<String, Value> {
    object(json!({
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 24, "head_dim": 16,
        "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
        "vocab_size": 29, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 64,
        "sliding_window": null, "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": 2,
    }))
}

/// A hybrid of three layers, of which the last two are Mamba.
pub fn hybrid_config() -> Map<String, Value> {
    let mut config = mistral_config();
    config.insert("model_type".to_owned(), json!("apriel_ssm_thinker_hybrid"));
    config.insert("architectures".to_owned(), json!(["AprielThinkerSSMHybridForCausalLM"]));
    config.insert("num_hidden_layers".to_owned(), json!(3));
    config.insert("hybrid_block_layout".to_owned(), json!(["t", "m2", "m2"]));
    config.insert("ssm_cfg".to_owned(), json!({"d_state": 16, "d_inner": 64, "d_xb": 32, "dt_rank": 3}));
    config
}

pub fn object(value: Value) -> Map<String, Value> {
    value.as_object().unwrap().clone()
}

pub fn random_model(config: &Map<String, Value>) -> Model {
    Model::random(ModelConfig::from_json(config).unwrap(), 17, &Device::cpu()).unwrap()
}

/// Writes a random model of that configuration into `parent/name`.
pub fn random_folder(parent: &Path, name: &str, config: &Map<String, Value>) -> PathBuf {
    let folder = parent.join(name);
    random_model(config).save(&folder, &SaveOptions::default()).unwrap();
    folder
}

pub fn read_tensors(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    tensors
        .iter()
        .map(|(name, view)| (name.to_owned(), (view.dtype(), view.shape().to_vec(), view.data().to_vec())))
        .collect()
}

pub fn write_tensors(path: &Path, tensors: &Tensors) {
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, bytes))| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// Changes the tensors of a folder with one file.
pub fn edit_tensors(folder: &Path, edit: impl FnOnce(&mut Tensors)) {
    let path = folder.join("model.safetensors");
    let mut tensors = read_tensors(&path);
    edit(&mut tensors);
    write_tensors(&path, &tensors);
}

pub fn read_json(path: &Path) -> Map<String, Value> {
    object(serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap())
}

pub fn write_json(path: &Path, value: &Map<String, Value>) {
    fs::write(path, serde_json::to_string_pretty(value).unwrap()).unwrap();
}

pub fn edit_config(folder: &Path, key: &str, value: Value) {
    let path = folder.join("config.json");
    let mut config = read_json(&path);
    config.insert(key.to_owned(), value);
    write_json(&path, &config);
}

/// Every file under a folder with its contents.
pub fn snapshot(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.insert(path.clone(), Vec::new());
            files.extend(snapshot(&path));
        } else {
            files.insert(path.clone(), fs::read(&path).unwrap_or_default());
        }
    }
    files
}

/// All parameters as name and f32 values.
pub fn values(model: &Model) -> BTreeMap<String, Vec<f32>> {
    model
        .parameters
        .iter()
        .map(|(_, parameter)| (parameter.name.clone(), parameter.value.to_f32_vec().unwrap()))
        .collect()
}
