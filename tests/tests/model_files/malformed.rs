//! Folders with one thing wrong: each is refused with a message of its own, and nothing is written.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use model::import::import;
use model::{Model, Precision};
use runtime::Device;
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::folders::*;

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const Q: &str = "model.layers.0.self_attn.q_proj.weight";

struct Case {
    what: &'static str,
    damage: fn(&Path),
    message: &'static str,
}

/// Replaces the header and keeps the data.
fn edit_header(folder: &Path, edit: impl FnOnce(String) -> Vec<u8>) {
    let path = folder.join(WEIGHTS);
    let bytes = fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = edit(String::from_utf8(bytes[8..8 + length].to_vec()).unwrap());
    let mut output = (header.len() as u64).to_le_bytes().to_vec();
    output.extend(header);
    output.extend(&bytes[8 + length..]);
    fs::write(&path, output).unwrap();
}

fn edit_header_json(folder: &Path, edit: impl FnOnce(&mut Value)) {
    edit_header(folder, |header| {
        let mut header: Value = serde_json::from_str(&header).unwrap();
        edit(&mut header);
        header.to_string().into_bytes()
    });
}

fn cut(folder: &Path, bytes: impl FnOnce(u64) -> u64) {
    let file = fs::File::options().write(true).open(folder.join(WEIGHTS)).unwrap();
    file.set_len(bytes(file.metadata().unwrap().len())).unwrap();
}

/// Cuts the folder's only file into two with an index, and lets `edit` change the index.
fn shard(folder: &Path, edit: impl FnOnce(&mut serde_json::Map<String, Value>)) {
    let tensors = read_tensors(&folder.join(WEIGHTS));
    fs::remove_file(folder.join(WEIGHTS)).unwrap();
    let (mut first, mut second) = (Tensors::new(), Tensors::new());
    let mut weight_map = serde_json::Map::new();
    for (number, (name, tensor)) in tensors.into_iter().enumerate() {
        weight_map.insert(name.clone(), json!(if number % 2 == 0 { "a.safetensors" } else { "b.safetensors" }));
        if number % 2 == 0 {
            first.insert(name, tensor)
        } else {
            second.insert(name, tensor)
        };
    }
    write_tensors(&folder.join("a.safetensors"), &first);
    write_tensors(&folder.join("b.safetensors"), &second);
    edit(&mut weight_map);
    write_json(&folder.join(INDEX), &object(json!({ "metadata": {}, "weight_map": weight_map })));
}

fn rename_tensor(folder: &Path, from: &str, to: &str) {
    edit_tensors(folder, |tensors| {
        let tensor = tensors.remove(from).unwrap();
        tensors.insert(to.to_owned(), tensor);
    });
}

const CASES: &[Case] = &[
    Case {
        what: "no configuration",
        damage: |folder| fs::remove_file(folder.join("config.json")).unwrap(),
        message: "config.json: No such file",
    },
    Case {
        what: "configuration that is no JSON",
        damage: |folder| fs::write(folder.join("config.json"), "{\"model_type\": ").unwrap(),
        message: "config.json: not valid JSON: EOF while parsing",
    },
    Case {
        what: "configuration that is no text",
        damage: |folder| fs::write(folder.join("config.json"), [b'{', 0xff, b'}']).unwrap(),
        message: "config.json: not UTF-8 text: byte 1 is not",
    },
    Case {
        what: "configuration that is a list",
        damage: |folder| fs::write(folder.join("config.json"), "[]").unwrap(),
        message: "config.json: expected a JSON object",
    },
    Case {
        what: "unknown model type",
        damage: |folder| edit_config(folder, "model_type", json!("gpt_neox")),
        message: "config.json: model_type: \"gpt_neox\" is not supported; supported are \"llama\"",
    },
    Case {
        what: "damaged generation settings",
        damage: |folder| fs::write(folder.join("generation_config.json"), "{\"eos_token_id\": \"x\"}").unwrap(),
        message: "generation_config.json: eos_token_id: expected a token id",
    },
    Case {
        what: "an end of generation that is no token",
        damage: |folder| fs::write(folder.join("generation_config.json"), "{\"eos_token_id\": [2, 70000]}").unwrap(),
        message: "generation_config.json: eos_token_id: 70000 is outside the vocabulary of",
    },
    Case {
        what: "no weights",
        damage: |folder| fs::remove_file(folder.join(WEIGHTS)).unwrap(),
        message: "no weights here: expected model.safetensors or model.safetensors.index.json",
    },
    Case {
        what: "weights of another format",
        damage: |folder| fs::rename(folder.join(WEIGHTS), folder.join("pytorch_model.bin")).unwrap(),
        message: "no weights here: expected model.safetensors or model.safetensors.index.json; convert the PyTorch",
    },
    Case {
        what: "a folder in place of the weights",
        damage: |folder| {
            fs::remove_file(folder.join(WEIGHTS)).unwrap();
            fs::create_dir(folder.join(WEIGHTS)).unwrap();
        },
        message: "model.safetensors: expected a file, found something else",
    },
    Case {
        what: "empty weights",
        damage: |folder| cut(folder, |_| 0),
        message: "0 bytes are too few for a safetensors file",
    },
    Case {
        what: "cut off within the header",
        damage: |folder| cut(folder, |_| 100),
        message: "truncated: the header takes",
    },
    Case {
        what: "cut off within the data",
        damage: |folder| cut(folder, |length| length - 1),
        message: "it is truncated, download it again",
    },
    Case {
        what: "bytes after the data",
        damage: |folder| cut(folder, |length| length + 12),
        message: "12 bytes at the end belong to no tensor",
    },
    Case {
        what: "a header of exabytes",
        damage: |folder| {
            let path = folder.join(WEIGHTS);
            let mut bytes = fs::read(&path).unwrap();
            bytes[..8].fill(0xff);
            fs::write(&path, bytes).unwrap();
        },
        message: "the header would be 18446744073709551615 bytes",
    },
    Case {
        what: "a header that is no text",
        damage: |folder| {
            edit_header(folder, |header| {
                let mut header = header.into_bytes();
                header[3] = 0xfe;
                header
            });
        },
        message: "the header is not UTF-8 text",
    },
    Case {
        what: "a header that is no JSON",
        damage: |folder| edit_header(folder, |header| header.replacen(':', "=", 1).into_bytes()),
        message: "the header is not valid JSON",
    },
    Case {
        what: "a name twice in a header",
        damage: |folder| {
            let name = "\"model.layers.0.self_attn.k_proj.weight\":";
            edit_header(folder, |header| {
                header.replacen(name, "\"model.layers.0.self_attn.v_proj.weight\":", 1).into_bytes()
            });
        },
        message: "tensor model.layers.0.self_attn.v_proj.weight: the header has this name twice",
    },
    Case {
        what: "overlapping data",
        damage: |folder| {
            edit_header_json(folder, |header| {
                header["model.norm.weight"]["data_offsets"] =
                    header["model.layers.0.input_layernorm.weight"]["data_offsets"].clone();
            });
        },
        message: "its data overlap with those of model.layers.0.input_layernorm.weight",
    },
    Case {
        what: "data that belong to no tensor",
        damage: |folder| edit_header_json(folder, |header| drop(header.as_object_mut().unwrap().remove(Q))),
        message: "6144 bytes before its data belong to no tensor",
    },
    Case {
        what: "offsets beyond the file",
        damage: |folder| {
            edit_header_json(folder, |header| header[Q]["data_offsets"] = json!([1_000_000, 1_000_000 + 64 * 24 * 4]));
        },
        message: "its data end at byte 10",
    },
    Case {
        what: "offsets that overflow",
        damage: |folder| {
            edit_header_json(folder, |header| {
                header[Q]["shape"] = json!([1u64 << 62]);
                header[Q]["dtype"] = json!("U8");
                header[Q]["data_offsets"] = json!([u64::MAX - (1 << 62), u64::MAX]);
            });
        },
        message: "shape [4611686018427387904] is larger than any memory",
    },
    Case {
        what: "offsets that run backwards",
        damage: |folder| edit_header_json(folder, |header| header[Q]["data_offsets"] = json!([8, 4])),
        message: "data_offsets run backwards, from 8 to 4",
    },
    Case {
        what: "three offsets",
        damage: |folder| edit_header_json(folder, |header| header[Q]["data_offsets"] = json!([0, 4, 8])),
        message: "data_offsets in the header has 3 numbers: expected 2",
    },
    Case {
        what: "no offsets",
        damage: |folder| edit_header_json(folder, |header| header[Q] = json!({"dtype": "F32", "shape": [1]})),
        message: "the header gives no data_offsets",
    },
    Case {
        what: "a negative dimension",
        damage: |folder| edit_header_json(folder, |header| header[Q]["shape"] = json!([-64, 24])),
        message: "shape in the header is no list of whole numbers",
    },
    Case {
        what: "a shape that does not fit its data",
        damage: |folder| edit_header_json(folder, |header| header[Q]["shape"] = json!([64, 25])),
        message: "F32 of shape [64, 25] takes 6400 bytes, but data_offsets give 6144",
    },
    Case {
        what: "an unknown element type",
        damage: |folder| edit_header_json(folder, |header| header[Q]["dtype"] = json!("F7")),
        message: "unknown element type \"F7\" in the header",
    },
    Case {
        what: "integers as weights",
        damage: |folder| edit_header_json(folder, |header| header[Q]["dtype"] = json!("I32")),
        message: "has element type I32: expected F32, BF16 or F16",
    },
    Case {
        what: "weights of another model",
        damage: |folder| edit_config(folder, "intermediate_size", json!(48)),
        message: "mlp.gate_proj.weight has shape [40, 24], but [48, 24] follows from config.json",
    },
    Case {
        what: "a missing tensor",
        damage: |folder| edit_tensors(folder, |tensors| drop(tensors.remove(Q))),
        message: "tensor model.layers.0.self_attn.q_proj.weight is missing: config.json needs it",
    },
    Case {
        what: "more layers than weights",
        damage: |folder| edit_config(folder, "num_hidden_layers", json!(3)),
        message: "tensor model.layers.2.self_attn.q_proj.weight is missing",
    },
    Case {
        what: "fewer layers than weights",
        damage: |folder| edit_config(folder, "num_hidden_layers", json!(1)),
        message: "9 tensors that config.json has no place for: model.layers.1.input_layernorm.weight, ",
    },
    Case {
        what: "a tensor too many",
        damage: |folder| {
            edit_tensors(folder, |tensors| {
                tensors.insert("model.extra.weight".to_owned(), (Dtype::F32, vec![1], vec![0; 4]));
            });
        },
        message: "1 tensor that config.json has no place for: model.extra.weight;",
    },
    Case {
        what: "a tensor in two spellings",
        damage: |folder| {
            edit_tensors(folder, |tensors| {
                let copy = tensors[Q].clone();
                tensors.insert("model.decoder.blocks.0.mixer.q_proj.weight".to_owned(), copy);
            });
        },
        message: "stored twice: model.",
    },
    Case {
        what: "a weight that is NaN",
        damage: |folder| {
            edit_tensors(folder, |tensors| {
                tensors.get_mut(Q).unwrap().2[4 * (24 * 7 + 5)..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
            });
        },
        message: "tensor model.layers.0.self_attn.q_proj.weight: the element at [7, 5] is NaN or infinite",
    },
    Case {
        what: "a narrow weight that is infinite",
        damage: |folder| {
            edit_tensors(folder, |tensors| {
                let norm = tensors.get_mut("model.norm.weight").unwrap();
                *norm = (Dtype::F16, vec![24], half::f16::INFINITY.to_le_bytes().repeat(24));
            });
        },
        message: "tensor model.norm.weight: the element at [0] is NaN or infinite",
    },
    Case {
        what: "a tied model without its embedding",
        damage: |folder| {
            edit_config(folder, "tie_word_embeddings", json!(true));
            edit_tensors(folder, |tensors| drop(tensors.remove("model.embed_tokens.weight")));
        },
        message: "tensor model.embed_tokens.weight is missing: only lm_head.weight is stored",
    },
    Case {
        what: "a tied model with another head",
        damage: |folder| edit_config(folder, "tie_word_embeddings", json!(true)),
        message: "tensor lm_head.weight: differs from model.embed_tokens.weight, but tie_word_embeddings is true",
    },
    Case {
        what: "an untied model without a head",
        damage: |folder| edit_tensors(folder, |tensors| drop(tensors.remove("lm_head.weight"))),
        message: "tensor lm_head.weight is missing: tie_word_embeddings is false in config.json",
    },
    Case {
        what: "an index that leads out of the folder",
        damage: |folder| shard(folder, |map| drop(map.insert(Q.to_owned(), json!("../a.safetensors")))),
        message: "its file \"../a.safetensors\" is refused: expected the plain name",
    },
    Case {
        what: "an index with an absolute path",
        damage: |folder| shard(folder, |map| drop(map.insert(Q.to_owned(), json!("/etc/a.safetensors")))),
        message: "its file \"/etc/a.safetensors\" is refused",
    },
    Case {
        what: "an index that names another kind of file",
        damage: |folder| shard(folder, |map| drop(map.insert(Q.to_owned(), json!("a.bin")))),
        message: "its file \"a.bin\" is refused",
    },
    Case {
        what: "a shard that is missing",
        damage: |folder| {
            shard(folder, |_| {});
            fs::remove_file(folder.join("b.safetensors")).unwrap();
        },
        message: "b.safetensors: this file is missing, but model.safetensors.index.json names it",
    },
    Case {
        what: "a shard whose link leads nowhere",
        damage: |folder| {
            shard(folder, |_| {});
            fs::remove_file(folder.join("a.safetensors")).unwrap();
            #[cfg(unix)]
            std::os::unix::fs::symlink("../gone", folder.join("a.safetensors")).unwrap();
        },
        message: "a.safetensors: this file is missing, but model.safetensors.index.json names it",
    },
    Case {
        what: "an index that mentions too much",
        damage: |folder| shard(folder, |map| drop(map.insert("more".to_owned(), json!("a.safetensors")))),
        message: "index.json: tensor more: a.safetensors does not hold it",
    },
    Case {
        what: "an index that mentions too little",
        damage: |folder| shard(folder, |map| drop(map.remove(Q))),
        message: "q_proj.weight: model.safetensors.index.json does not mention it",
    },
    Case {
        what: "an index that mixes up two shards",
        damage: |folder| {
            shard(folder, |map| {
                let other = if map[Q] == "a.safetensors" { "b.safetensors" } else { "a.safetensors" };
                map.insert(Q.to_owned(), json!(other));
            });
        },
        message: "q_proj.weight: model.safetensors.index.json says that it is in ",
    },
    Case {
        what: "a tensor in two shards",
        damage: |folder| {
            shard(folder, |_| {});
            let path = folder.join("b.safetensors");
            let mut second = read_tensors(&path);
            second.extend(read_tensors(&folder.join("a.safetensors")).into_iter().take(1));
            write_tensors(&path, &second);
        },
        message: "stored twice: lm_head.weight is in",
    },
    Case {
        what: "an index that names a tensor twice",
        damage: |folder| {
            shard(folder, |_| {});
            let path = folder.join(INDEX);
            let text = fs::read_to_string(&path).unwrap();
            fs::write(&path, text.replace("model.norm.weight", "lm_head.weight")).unwrap();
        },
        message: "tensor lm_head.weight: weight_map has this name twice",
    },
    Case {
        what: "an index without a map",
        damage: |folder| {
            shard(folder, |_| {});
            fs::write(folder.join(INDEX), "{\"metadata\": {}}").unwrap();
        },
        message: "index.json: not a valid index {\"weight_map\": {tensor: file}}: missing field `weight_map`",
    },
    Case {
        what: "an index whose file is a number",
        damage: |folder| shard(folder, |map| drop(map.insert(Q.to_owned(), json!(7)))),
        message: "its file is 7: expected a string",
    },
];

/// Damage to a hybrid.
const HYBRID_CASES: &[Case] = &[
    Case {
        what: "step-size ranks that differ",
        damage: |folder| {
            edit_tensors(folder, |tensors| {
                let tensor = tensors.get_mut("model.layers.2.mixer.dt_in_proj.weight").unwrap();
                *tensor = (Dtype::F32, vec![5, 24], vec![0; 5 * 24 * 4]);
            });
        },
        message: "the step-size projection has rank 5, that of model.layers.1.mixer.dt_in_proj.weight has 3",
    },
    Case {
        what: "a step-size projection that is missing",
        damage: |folder| {
            edit_tensors(folder, |tensors| drop(tensors.remove("model.layers.1.mixer.dt_in_proj.weight")));
        },
        message: "tensor model.layers.1.mixer.dt_in_proj.weight is missing",
    },
    Case {
        what: "another number of states",
        damage: |folder| {
            edit_config(folder, "ssm_cfg", json!({"d_state": 8, "d_inner": 64, "d_xb": 32, "dt_rank": 3}));
        },
        message: "mixer.A_log has shape [64, 16], but [64, 8] follows from config.json",
    },
    Case {
        what: "an unknown mixer",
        damage: |folder| edit_config(folder, "hybrid_block_layout", json!(["t", "m2", "kl"])),
        message: "hybrid_block_layout: entry 2 is \"kl\"",
    },
    Case {
        what: "attention where the layout says Mamba",
        damage: |folder| {
            rename_tensor(folder, "model.layers.1.mixer.A_log", "model.layers.1.self_attn.A_log");
        },
        message: "tensor model.layers.1.mixer.A_log is missing",
    },
];

#[test]
fn every_kind_of_damage_has_its_own_message_and_nothing_is_written() {
    let scratch = tempfile::tempdir().unwrap();
    let mut messages = HashSet::new();
    let cases = CASES.iter().map(|case| (case, mistral_config()));
    for (number, (case, config)) in cases.chain(HYBRID_CASES.iter().map(|case| (case, hybrid_config()))).enumerate() {
        let place = scratch.path().join(number.to_string());
        fs::create_dir(&place).unwrap();
        let folder = random_folder(&place, "source", &config);
        Model::load(&folder, &Device::cpu(), Precision::F32).unwrap();
        (case.damage)(&folder);
        let before = snapshot(&place);
        let loaded = Model::load(&folder, &Device::cpu(), Precision::AsStored).unwrap_err().to_string();
        assert!(loaded.contains(case.message), "{}: expected «{}» in «{loaded}»", case.what, case.message);
        let imported = import(&folder, &place.join("output"), |_| {}).unwrap_err().to_string();
        assert!(imported.contains(case.message), "{}: expected «{}» in «{imported}»", case.what, case.message);
        assert!(imported.contains("source"), "{}: the folder is not named in «{imported}»", case.what);
        assert!(snapshot(&place) == before, "{}: something was written", case.what);
        assert!(messages.insert(case.message), "{}: another case has the same message", case.what);
    }
    assert!(messages.len() >= 25);
}

#[test]
fn bytes_changed_at_random_never_panic() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = random_folder(scratch.path(), "source", &mistral_config());
    let path = folder.join(WEIGHTS);
    let whole = fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let mut state = 1u64;
    let mut random = |limit: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % limit
    };
    let mut refused = 0;
    for _ in 0..700 {
        let mut bytes = whole.clone();
        for _ in 0..=random(4) {
            // Mostly digits and punctuation of the header, where the meaning is.
            bytes[random(header)] = b"0123456789,:[]{}\"\xff"[random(18)];
        }
        fs::write(&path, &bytes).unwrap();
        refused += usize::from(Model::load(&folder, &Device::cpu(), Precision::AsStored).is_err());
    }
    assert!(refused > 450, "only {refused} of 700 damaged files were refused");
}
