//! The models that a run begins with.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use autograd::Parameter;
use model::chat::ChatTemplate;
use model::config::{MixerKind, ModelConfig};
use model::initialise::{self, GraftOptions};
use model::tokenizer::Tokenizer;
use model::{Model, Precision};
use rayon::prelude::*;
use runtime::Device;

use crate::config::{Init, ModelSection, PrecisionKind, RunConfig, Task, Trainable};
use crate::data::Encoder;
use crate::files::{hash_bytes, hash_file};
use crate::interruption::Interruption;
use crate::memory;

/// Student, teacher, and how text becomes tokens for both.
pub(super) struct Models {
    pub student: Model,
    pub teacher: Option<Model>,
    /// The folder whose tokenizer, other files and element types the result gets: the student's where one is given.
    pub files_from: PathBuf,
    /// SHA-256 of each folder that was read, by role.
    pub hashes: BTreeMap<String, String>,
    /// What the user should know about how the student was made.
    pub warnings: Vec<String>,
    tokenizer: Tokenizer,
    tokenizer_hash: String,
    template: Option<ChatTemplate>,
}

impl Models {
    /// Loads, makes and checks the models.
    ///
    /// # Errors
    /// Folders that do not load; layers that cannot be replaced; teacher and student of different vocabularies; nothing
    /// to train; an interruption.
    pub fn new(config: &RunConfig, device: &Device, interruption: &Interruption) -> Result<Self> {
        let mut hashes = BTreeMap::new();
        let section = &config.model;
        let Beginning { mut student, teacher, files_from, warnings } = match config.task {
            Task::Distill => distillation(config, device, interruption, &mut hashes)?,
            Task::Train => training(config, device, interruption, &mut hashes)?,
        };
        if config.training.precision == PrecisionKind::Bf16 {
            student = student.into_bf16()?;
        }
        student.checkpoint_layers = section.recompute_layers;
        choose_trainable(&mut student, config.training.trainable)?;
        for (_, parameter) in student.parameters.iter_mut().filter(|(_, parameter)| is_of_mixer(parameter)) {
            parameter.rate = config.training.mixer_rate as f32;
        }
        if let Some(teacher) = &teacher {
            share_frozen(&mut student, teacher)?;
        }
        // What the student does not share is free again.
        let teacher = teacher.filter(|_| config.asks_teacher());
        Ok(Self {
            student,
            teacher,
            hashes,
            warnings,
            tokenizer: Tokenizer::load(&files_from)?,
            tokenizer_hash: tokenizer_hash(&files_from)?,
            template: ChatTemplate::load(&files_from)?,
            files_from,
        })
    }

    /// What is trained, in one line.
    pub fn description(&self) -> String {
        let count = |trained_only: bool| -> usize {
            let parameters = self.student.parameters.iter().map(|(_, parameter)| parameter);
            parameters
                .filter(|parameter| parameter.trainable || !trained_only)
                .map(|parameter| parameter.value.count())
                .sum()
        };
        let config = &self.student.config;
        format!(
            "model: {} attention and {} Mamba layers, {} parameters, {} of them trained; computing in {}{}",
            config.count_mixers(MixerKind::Attention),
            config.count_mixers(MixerKind::Mamba),
            count(false),
            count(true),
            self.student.activations,
            self.teacher.as_ref().map_or(String::new(), |teacher| format!(", the teacher in {}", teacher.activations))
        )
    }

    /// What turns this run's documents into tokens.
    ///
    /// # Errors
    /// When the configuration asks for a begin or end token that the model does not have.
    pub fn encoder(&self, config: &RunConfig) -> Result<Encoder<'_>> {
        encoder(
            &self.student.config,
            &self.tokenizer,
            &self.tokenizer_hash,
            self.template.as_ref(),
            config.data.begin_token,
            config.data.end_token,
        )
    }
}

/// An encoder for a model's data.
///
/// # Errors
/// When a begin or end token is asked for that the model does not have.
pub(crate) fn encoder<'a>(
    config: &ModelConfig,
    tokenizer: &'a Tokenizer,
    tokenizer_hash: &'a str,
    template: Option<&'a ChatTemplate>,
    begin_token: bool,
    end_token: bool,
) -> Result<Encoder<'a>> {
    if begin_token && config.bos_token.is_none() {
        bail!("data.begin_token: the model's config.json names no bos_token_id");
    }
    if end_token && config.eos_tokens.is_empty() {
        bail!("data.end_token: the model's config.json names no eos_token_id; set data.end_token = false");
    }
    Ok(Encoder {
        tokenizer,
        tokenizer_hash,
        template,
        vocabulary_size: config.vocabulary_size,
        begin_token: config.bos_token.filter(|_| begin_token),
        end_token: config.eos_tokens.first().copied().filter(|_| end_token),
    })
}

/// SHA-256 of everything that decides how a folder's model turns documents into tokens.
///
/// # Errors
/// When a file cannot be read.
pub(crate) fn tokenizer_hash(folder: &Path) -> Result<String> {
    let mut hashes = String::new();
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        let path = folder.join(name);
        if path.exists() {
            hashes += &format!("{name} {}\n", hash_file(&path, &Interruption::new())?);
        }
    }
    Ok(hash_bytes(hashes.as_bytes()))
}

/// The models as they are read or made.
struct Beginning {
    student: Model,
    teacher: Option<Model>,
    files_from: PathBuf,
    warnings: Vec<String>,
}

fn distillation(
    config: &RunConfig,
    device: &Device,
    interruption: &Interruption,
    hashes: &mut BTreeMap<String, String>,
) -> Result<Beginning> {
    let section = &config.model;
    let teacher_folder = given(section.teacher.as_ref(), "model.teacher")?;
    let teacher_config = ModelConfig::read(teacher_folder)?;
    check_layers(section, &teacher_config)?;
    let options = GraftOptions { seed: config.training.seed, start: section.init.start().unwrap_or_default() };
    if !section.layers.is_empty() {
        let base = section.student.as_deref().map(ModelConfig::read).transpose()?;
        initialise::check_states(base.as_ref().unwrap_or(&teacher_config), options.start, device)?;
    }
    memory::check(config, &teacher_config, device)?;
    if let Some(student_folder) = &section.student {
        check_vocabularies(teacher_folder, student_folder)?;
    }
    let precision = match config.training.precision {
        PrecisionKind::F32 => Precision::AsStored,
        PrecisionKind::Bf16 => Precision::Bf16,
    };
    let teacher = load(teacher_folder, device, precision, "teacher", interruption)?;
    hashes.insert("teacher".to_owned(), model_hash(teacher_folder, interruption)?);
    interruption.check()?;
    let student = match &section.student {
        None => initialise::graft(&teacher, &teacher, &section.layers, &options)?,
        Some(folder) => {
            hashes.insert("student".to_owned(), model_hash(folder, interruption)?);
            let base = load(folder, device, Precision::F32, "student", interruption)?;
            if section.layers.is_empty() {
                base
            } else {
                initialise::graft(&base, &teacher, &section.layers, &options)?
            }
        }
    };
    // What goes on from a student stays in its form: element types, chat template, code.
    let files_from = section.student.as_ref().unwrap_or(teacher_folder);
    let warnings = lost_biases(&teacher, &section.layers)?;
    Ok(Beginning { student, teacher: Some(teacher), files_from: files_from.clone(), warnings })
}

fn training(
    config: &RunConfig,
    device: &Device,
    interruption: &Interruption,
    hashes: &mut BTreeMap<String, String>,
) -> Result<Beginning> {
    let section = &config.model;
    let folder = given(section.source.as_ref(), "model.source")?;
    let model_config = ModelConfig::read(folder)?;
    memory::check(config, &model_config, device).with_context(|| format!("the model {}", folder.display()))?;
    let student = if section.init == Init::Weights {
        hashes.insert("source".to_owned(), model_hash(folder, interruption)?);
        load(folder, device, Precision::F32, "source", interruption)?
    } else {
        hashes.insert("source".to_owned(), hash_file(&folder.join("config.json"), interruption)?);
        Model::random(model_config, config.training.seed, device)?
    };
    Ok(Beginning { student, teacher: None, files_from: folder.clone(), warnings: Vec::new() })
}

fn lost_biases(teacher: &Model, layers: &[usize]) -> Result<Vec<String>> {
    let losing = initialise::layers_losing_biases(teacher, layers)?;
    if losing.is_empty() {
        return Ok(Vec::new());
    }
    let names: Vec<String> = losing.iter().map(usize::to_string).collect();
    Ok(vec![format!(
        "warning: the teacher's attention has biases (q, k, v or o) in layers {} that Mamba mixers have no place for: \
         they are left out, and the hybrid has to learn without them",
        names.join(", ")
    )])
}

fn given<'a>(folder: Option<&'a PathBuf>, key: &str) -> Result<&'a PathBuf> {
    folder.with_context(|| format!("{key} is missing"))
}

fn load(
    folder: &Path,
    device: &Device,
    precision: Precision,
    role: &str,
    interruption: &Interruption,
) -> Result<Model> {
    let loaded = Model::load_while(folder, device, precision, || interruption.requested().is_none());
    if let Err(model::Error::Stopped) = &loaded {
        interruption.check()?;
    }
    loaded.with_context(|| format!("loading the {role}"))
}

/// Layers are checked before gigabytes are read.
fn check_layers(section: &ModelSection, teacher: &ModelConfig) -> Result<()> {
    let count = teacher.mixers.len();
    if let Some(layer) = section.layers.iter().find(|&&layer| layer >= count) {
        bail!("model.layers names layer {layer}, but the teacher has layers 0 to {}", count.saturating_sub(1));
    }
    Ok(())
}

/// Logits can be compared only where every id means the same token.
fn check_vocabularies(teacher: &Path, student: &Path) -> Result<()> {
    let size = |folder: &Path| -> Result<usize> { Ok(ModelConfig::read(folder)?.vocabulary_size) };
    let (teacher_size, student_size) = (size(teacher)?, size(student)?);
    ensure!(
        teacher_size == student_size,
        "the vocabularies differ: the teacher {} has {teacher_size} tokens, the student {} has {student_size}; \
         distillation compares their logits token by token",
        teacher.display(),
        student.display()
    );
    ensure!(
        Tokenizer::load(teacher)?.fingerprint() == Tokenizer::load(student)?.fingerprint(),
        "the vocabularies differ: the tokenizers of the teacher {} and the student {} give different meanings to token ids",
        teacher.display(),
        student.display()
    );
    Ok(())
}

fn is_of_mixer(parameter: &Parameter) -> bool {
    parameter.name.contains(".mixer.")
}

fn choose_trainable(student: &mut Model, trainable: Trainable) -> Result<()> {
    if trainable == Trainable::Mixers {
        for (_, parameter) in student.parameters.iter_mut() {
            parameter.trainable = is_of_mixer(parameter);
        }
        ensure!(
            student.parameters.iter().any(|(_, parameter)| parameter.trainable),
            "training.trainable is \"mixers\", but the model has no Mamba mixer"
        );
    }
    Ok(())
}

/// Lets the student use the teacher's own memory for what is frozen and equal.
fn share_frozen(student: &mut Model, teacher: &Model) -> Result<()> {
    for (_, parameter) in student.parameters.iter_mut().filter(|(_, parameter)| !parameter.trainable) {
        let Some(id) = teacher.parameters.find(&parameter.name) else { continue };
        let original = &teacher.parameters.get(id).value;
        if original.shape() == parameter.value.shape() && original.to_f32_vec()? == parameter.value.to_f32_vec()? {
            parameter.value = original.clone();
        }
    }
    Ok(())
}

/// SHA-256 of a model's configuration and weights.
///
/// # Errors
/// When a file cannot be read; an interruption.
pub(crate) fn model_hash(folder: &Path, interruption: &Interruption) -> Result<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .with_context(|| format!("reading {}", folder.display()))?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name == "config.json" || name.ends_with(".safetensors"))
        .collect();
    names.sort();
    let hashes: Vec<String> = names
        .par_iter()
        .map(|name| Ok(format!("{name} {}\n", hash_file(&folder.join(name), interruption)?)))
        .collect::<Result<_>>()?;
    Ok(hash_bytes(hashes.concat().as_bytes()))
}
