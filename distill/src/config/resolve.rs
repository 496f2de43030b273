//! From a file and flags to a configuration, and back.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::de::{DeserializeOwned, Deserializer, Visitor};
use serde::forward_to_deserialize_any;
use toml::{Table, Value};

use super::{
    CheckpointSection, DataSection, EvaluationSection, Init, LossSection, ModelSection, RunConfig, StagesSection, Task,
    Trainable, TrainingSection, check,
};

/// One key set on the command line.
#[derive(Clone, Debug, PartialEq)]
pub struct Override {
    /// The key, as in `training.steps`.
    key: String,
    value: Value,
    /// What the user wrote, for messages.
    origin: String,
}

impl Override {
    /// A key set by its own flag.
    pub fn flag(flag: &str, key: &str, value: impl Into<Value>) -> Self {
        Self { key: key.to_owned(), value: value.into(), origin: flag.to_owned() }
    }

    /// `KEY=VALUE` of `--set`: the value is TOML where it can be, and a string otherwise.
    ///
    /// # Errors
    /// Without an equals sign.
    pub fn parse(assignment: &str) -> Result<Self> {
        let Some((key, text)) = assignment.split_once('=') else {
            bail!("--set {assignment}: write KEY=VALUE, as in --set training.steps=100");
        };
        let (key, text) = (key.trim(), text.trim());
        let value = match toml::from_str::<Table>(&format!("value = {text}")) {
            Ok(mut table) if table.len() == 1 => table.remove("value"),
            _ => None,
        };
        let value = value.unwrap_or_else(|| Value::String(text.to_owned()));
        Ok(Self { key: key.to_owned(), value, origin: format!("--set {key}") })
    }
}

/// Resolves a run: defaults of the task, then the file, then `overrides` in order.
///
/// # Errors
/// A file that cannot be read or is not TOML; an unknown key (with the nearest known one), a value of the wrong type or
/// out of range.
pub fn resolve(task: Task, file: Option<&Path>, overrides: &[Override]) -> Result<RunConfig> {
    let mut table = Table::try_from(RunConfig::defaults(task)).context("the defaults")?;
    let overridden = |key: &str| overrides.iter().any(|setting| setting.key == key);
    let mut rate_is_set = overridden("training.mixer_rate");
    if let Some(path) = file {
        let text = fs::read_to_string(path).with_context(|| format!("reading the run file {}", path.display()))?;
        let mut written: Table =
            toml::from_str(&text).with_context(|| format!("the run file {} is not TOML", path.display()))?;
        renew(&mut written);
        // The file's rate was chosen for the file's start and for what it trains: flags that change these ask for the default.
        let of_file = written.get("training").is_some_and(|training| training.get("mixer_rate").is_some());
        rate_is_set |= of_file && !overridden("model.init") && !overridden("training.trainable");
        merge_file(&mut table, written, task).with_context(|| format!("the run file {}", path.display()))?;
    }
    for setting in overrides {
        apply(&mut table, setting, task).with_context(|| setting.origin.clone())?;
    }
    let mut config: RunConfig = Value::Table(table).try_into().map_err(|error: toml::de::Error| {
        anyhow!("the run's configuration: {}", error.to_string().trim_end().replace('\n', " "))
    })?;
    // Whoever asks for the published start gets what was published; and mixers alone are not ahead of anything.
    if !rate_is_set {
        let one = config.model.init == Init::Paper || config.training.trainable == Trainable::Mixers;
        config.training.mixer_rate = if one { 1.0 } else { RunConfig::defaults(task).training.mixer_rate };
    }
    check::check(&config)?;
    Ok(config)
}

/// Reads a resolved configuration that [`to_toml`] wrote.
///
/// # Errors
/// When it cannot be read or is not one.
pub fn read(path: &Path) -> Result<RunConfig> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let not_one = || format!("{} is not a resolved configuration", path.display());
    let mut table: Table = toml::from_str(&text).with_context(not_one)?;
    renew(&mut table);
    Value::Table(table).try_into().with_context(not_one)
}

/// Says in today's words what earlier versions wrote: `model.mil_align` beside `model.init = "mil"`; and what keys that
/// resolved configurations had not yet stand for.
fn renew(written: &mut Table) {
    if let Some(Value::Table(model)) = written.get_mut("model")
        && let Some(aligned) = model.remove("mil_align")
        && aligned == Value::Boolean(true)
    {
        model.insert("init".to_owned(), "aligned".into());
    }
    // Resolved configurations say the task, and have all keys of their time.
    let resolved = written.contains_key("task")
        && written.get("training").is_some_and(|training| training.get("spike_window").is_some());
    if !resolved {
        return;
    }
    for (section, key, value) in [
        ("loss", "mixer_matching_steps", Value::Integer(0)),
        ("training", "graphs", Value::Boolean(true)),
        ("training", "mixer_rate", Value::Float(1.0)),
    ] {
        if let Some(Value::Table(section)) = written.get_mut(section) {
            section.entry(key).or_insert(value);
        }
    }
}

/// The configuration as TOML.
///
/// # Errors
/// For paths that are not UTF-8.
pub fn to_toml(config: &RunConfig) -> Result<String> {
    toml::to_string(config).context("writing the configuration as TOML")
}

/// What differs between a run's configuration and another one, a line per key; the section `[checkpoint]`, which
/// changes no number, is left out.
///
/// # Errors
/// For paths that are not UTF-8.
pub fn differences(run: &RunConfig, other: &RunConfig) -> Result<Vec<String>> {
    let flat = |config: &RunConfig| -> Result<Vec<(String, String)>> {
        let mut keys = Vec::new();
        flatten("", &Value::try_from(config)?, &mut keys);
        keys.retain(|(key, _)| !key.starts_with("checkpoint."));
        Ok(keys)
    };
    let (run, other) = (flat(run)?, flat(other)?);
    let value = |keys: &[(String, String)], wanted: &str| {
        keys.iter().find(|(key, _)| key == wanted).map_or("unset".to_owned(), |(_, value)| value.clone())
    };
    let mut keys: Vec<&String> = run.iter().chain(&other).map(|(key, _)| key).collect();
    keys.sort();
    keys.dedup();
    Ok(keys
        .into_iter()
        .filter(|key| value(&run, key) != value(&other, key))
        .map(|key| format!("{key} was {}, is now {}", value(&run, key), value(&other, key)))
        .collect())
}

fn flatten(prefix: &str, value: &Value, keys: &mut Vec<(String, String)>) {
    match value {
        Value::Table(table) => {
            for (key, value) in table {
                let name = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                flatten(&name, value, keys);
            }
        }
        leaf => keys.push((prefix.to_owned(), leaf.to_string())),
    }
}

fn merge_file(table: &mut Table, written: Table, task: Task) -> Result<()> {
    for (section, value) in written {
        match value {
            Value::Table(keys) if section_fields(&section).is_some() => {
                for (key, value) in keys {
                    set(table, &format!("{section}.{key}"), value, task)?;
                }
            }
            value => set(table, &section, value, task)?,
        }
    }
    Ok(())
}

fn apply(table: &mut Table, setting: &Override, task: Task) -> Result<()> {
    set(table, &setting.key, setting.value.clone(), task)
}

fn set(table: &mut Table, key: &str, value: Value, task: Task) -> Result<()> {
    check_known(key)?;
    if key == "task" {
        let expected = Value::try_from(task)?;
        ensure!(value == expected, "task is {value}, but the command's is {expected}");
    }
    match key.split_once('.') {
        None => {
            table.insert(key.to_owned(), value);
        }
        Some((section, name)) => {
            if let Some(Value::Table(section)) = table.get_mut(section) {
                // Where a fraction is meant a whole number may stand: `temperature = 2`.
                let value = match (section.get(name), value) {
                    (Some(Value::Float(_)), Value::Integer(whole)) => Value::Float(whole as f64),
                    (_, value) => value,
                };
                section.insert(name.to_owned(), value);
            }
        }
    }
    Ok(())
}

fn check_known(key: &str) -> Result<()> {
    let known: Vec<String> = known_keys();
    if known.iter().any(|name| name == key) {
        return Ok(());
    }
    if section_fields(key).is_some() {
        bail!("`{key}` is a section: set one of its keys, as in {key}.{}", section_fields(key).unwrap_or_default()[0]);
    }
    // A key at the wrong place, such as `steps` without its section, is nearest to the same name elsewhere.
    let name = key.rsplit('.').next().unwrap_or(key);
    let nearest = known
        .iter()
        .map(|candidate| {
            let own = candidate.rsplit('.').next().unwrap_or(candidate);
            (edit_distance(key, candidate).min(1 + edit_distance(name, own)), candidate)
        })
        .min_by_key(|(distance, _)| *distance);
    match nearest {
        Some((distance, candidate)) if distance <= 1 + name.len() / 3 => {
            bail!("unknown key `{key}`: did you mean `{candidate}`?")
        }
        _ => bail!("unknown key `{key}`: the keys are {}", known.join(", ")),
    }
}

fn known_keys() -> Vec<String> {
    let mut keys = Vec::new();
    for name in fields::<RunConfig>() {
        match section_fields(name) {
            Some(section) => keys.extend(section.iter().map(|key| format!("{name}.{key}"))),
            None => keys.push((*name).to_owned()),
        }
    }
    keys
}

fn section_fields(section: &str) -> Option<&'static [&'static str]> {
    match section {
        "model" => Some(fields::<ModelSection>()),
        "data" => Some(fields::<DataSection>()),
        "training" => Some(fields::<TrainingSection>()),
        "loss" => Some(fields::<LossSection>()),
        "stages" => Some(fields::<StagesSection>()),
        "checkpoint" => Some(fields::<CheckpointSection>()),
        "evaluation" => Some(fields::<EvaluationSection>()),
        _ => None,
    }
}

/// The names of a struct's fields, as its `Deserialize` asks for them.
fn fields<T: DeserializeOwned>() -> &'static [&'static str] {
    struct Ask<'a>(&'a mut &'static [&'static str]);

    impl<'de> Deserializer<'de> for Ask<'_> {
        type Error = serde::de::value::Error;

        fn deserialize_any<V: Visitor<'de>>(self, _visitor: V) -> std::result::Result<V::Value, Self::Error> {
            Err(serde::de::Error::custom("only the names of fields are wanted"))
        }

        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _name: &'static str,
            fields: &'static [&'static str],
            visitor: V,
        ) -> std::result::Result<V::Value, Self::Error> {
            *self.0 = fields;
            self.deserialize_any(visitor)
        }

        forward_to_deserialize_any! {
            bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit unit_struct
            newtype_struct seq tuple tuple_struct map enum identifier ignored_any
        }
    }

    let mut names: &'static [&'static str] = &[];
    // It always fails; the names are what it leaves behind.
    let _ = T::deserialize(Ask(&mut names));
    names
}

/// Levenshtein: insertions, deletions and substitutions.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::super::{DivergenceKind, Init, Trainable};
    use super::*;

    fn flags() -> Vec<Override> {
        vec![
            Override::flag("--teacher", "model.teacher", "teacher"),
            Override::flag("--layers", "model.layers", vec![1, 3]),
            Override::flag("--train", "data.train", "train.jsonl"),
            Override::flag("--steps", "training.steps", 10),
        ]
    }

    fn with(assignments: &[&str]) -> Result<RunConfig> {
        let mut overrides = flags();
        for assignment in assignments {
            overrides.push(Override::parse(assignment)?);
        }
        resolve(Task::Distill, None, &overrides)
    }

    fn message(assignments: &[&str]) -> String {
        format!("{:#}", with(assignments).unwrap_err())
    }

    #[test]
    fn mixers_learn_faster_but_after_the_published_start() {
        let rate = |assignments: &[&str]| with(assignments).unwrap().training.mixer_rate;
        assert_eq!(rate(&[]), 4.0);
        assert_eq!(rate(&["model.init=paper"]), 1.0);
        assert_eq!(rate(&["model.init=paper", "training.mixer_rate=2"]), 2.0);
        assert_eq!(rate(&["training.mixer_rate=1"]), 1.0);
        assert_eq!(rate(&["training.trainable=mixers"]), 1.0);
        // A resolved configuration keeps its rate, until another start is asked for.
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.toml");
        for chosen in ["training.mixer_rate=1", "training.mixer_rate=3"] {
            let config = with(&[chosen]).unwrap();
            fs::write(&path, to_toml(&config).unwrap()).unwrap();
            assert_eq!(resolve(Task::Distill, Some(&path), &[]).unwrap(), config);
            let published = [Override::flag("--init", "model.init", "paper")];
            assert_eq!(resolve(Task::Distill, Some(&path), &published).unwrap().training.mixer_rate, 1.0);
            let mixers = [Override::flag("--trainable", "training.trainable", "mixers")];
            assert_eq!(resolve(Task::Distill, Some(&path), &mixers).unwrap().training.mixer_rate, 1.0);
        }
        assert!(message(&["training.mixer_rate=0"]).contains("training.mixer_rate is 0: it must be above 0"));
    }

    #[test]
    fn flags_override_the_file_and_the_file_the_defaults() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.toml");
        fs::write(
            &path,
            "device = \"cpu\"\n[model]\nteacher = \"file\"\n[training]\nsteps = 5\nlearning_rate = 1\n\
             trainable = \"mixers\"\n[loss]\ndivergence = \"forward_kl\"\n",
        )
        .unwrap();
        let config = resolve(Task::Distill, Some(&path), &flags()).unwrap();
        assert_eq!(config.model.teacher.as_deref(), Some(Path::new("teacher")));
        assert_eq!((config.training.steps, config.training.learning_rate), (10, 1.0));
        assert_eq!((config.training.trainable, config.loss.divergence), (Trainable::Mixers, DivergenceKind::ForwardKl));
        assert_eq!(config.training.batch_size, 8);
        let resolved = folder.path().join("config.toml");
        fs::write(&resolved, to_toml(&config).unwrap()).unwrap();
        assert_eq!(read(&resolved).unwrap(), config);
        // A resolved configuration is a run file, too.
        assert_eq!(resolve(Task::Distill, Some(&resolved), &[]).unwrap(), config);
    }

    #[test]
    fn set_takes_toml_and_bare_strings() {
        let config = with(&["training.trainable=mixers", "model.layers=[0, 2]", "loss.temperature = 2"]).unwrap();
        assert_eq!(config.training.trainable, Trainable::Mixers);
        assert_eq!((config.model.layers, config.loss.temperature), (vec![0, 2], 2.0));
        assert!(message(&["training.steps"]).contains("write KEY=VALUE"));
    }

    #[test]
    fn what_earlier_versions_wrote_is_read() {
        let mut config = RunConfig::defaults(Task::Distill);
        config.model.layers = vec![1];
        config.model.init = Init::Paper;
        config.training.mixer_rate = 1.0;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.toml");
        for (aligned, init) in [("false", Init::Paper), ("true", Init::Aligned)] {
            let newer = ["mixer_matching_steps", "graphs", "mixer_rate"];
            let today = to_toml(&config).unwrap();
            let lines = today.lines().filter(|line| !newer.iter().any(|key| line.starts_with(key)));
            let old = lines.collect::<Vec<_>>().join("\n");
            let old = old.replace("init = \"paper\"", &format!("init = \"mil\"\nmil_align = {aligned}"));
            assert!(old.contains("mil_align"), "{old}");
            fs::write(&path, old).unwrap();
            config.model.init = init;
            assert_eq!(read(&path).unwrap(), config);
            config.model.init = Init::Paper;
        }
    }

    #[test]
    fn unknown_keys_name_the_nearest_known_one() {
        let near = message(&["training.lerning_rate=1"]);
        assert!(near.contains("unknown key `training.lerning_rate`: did you mean `training.learning_rate`?"), "{near}");
        let elsewhere = message(&["batch_size=1"]);
        assert!(elsewhere.contains("did you mean `training.batch_size`?"), "{elsewhere}");
        let far = message(&["training.quantisation=1"]);
        assert!(far.contains("the keys are task, device, model.teacher"), "{far}");
        assert!(message(&["training=1"]).contains("`training` is a section"));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.toml");
        fs::write(&path, "[traning]\nsteps = 5\n").unwrap();
        let file = format!("{:#}", resolve(Task::Distill, Some(&path), &flags()).unwrap_err());
        assert!(file.contains("run.toml") && file.contains("unknown key `traning`"), "{file}");
        fs::write(&path, "[training]\nstep = 5\n").unwrap();
        let file = format!("{:#}", resolve(Task::Distill, Some(&path), &flags()).unwrap_err());
        assert!(file.contains("unknown key `training.step`: did you mean `training.steps`?"), "{file}");
    }

    #[test]
    fn values_out_of_range_are_named() {
        for (assignment, expected) in [
            ("training.steps=0", "training.steps is missing or 0"),
            ("training.steps=-1", "training.steps"),
            ("training.batch_size=0", "training.batch_size is 0"),
            ("training.batch_size=10000000000", "training.batch_size is 10000000000: it must be from 1 to 1048576"),
            ("data.sequence_length=20000000", "data.sequence_length is 20000000: it must be from 2 to 16777216"),
            (
                "training.micro_batch=9",
                "training.micro_batch is 9: it must be from 1 to training.batch_size, which is 8",
            ),
            ("training.learning_rate=0", "training.learning_rate is 0: it must be above 0"),
            ("training.learning_rate=nan", "training.learning_rate is NaN"),
            ("training.minimum_learning_rate=1", "from 0 to training.learning_rate"),
            ("training.warmup_steps=11", "training.warmup_steps is 11, more than training.steps, which is 10"),
            ("training.decay_steps=0", "decay must end after the warm-up"),
            ("training.beta2=1", "training.beta2 is 1: it must be at least 0 and below 1"),
            ("training.epsilon=0", "training.epsilon is 0"),
            ("training.trainable=some", "unknown variant `some`, expected `all` or `mixers`"),
            ("data.sequence_length=1", "data.sequence_length is 1"),
            ("loss.temperature=0", "loss.temperature is 0: it must be from 0.000001 to 1000000"),
            ("loss.temperature=1e-46", "it must be from 0.000001 to 1000000"),
            ("training.learning_rate=1e-46", "which is 0 in float32: it must be above 0"),
            ("training.epsilon=1e-46", "which is 0 in float32: it must be above 0 and at most 1"),
            ("loss.divergence_weight=0", "nothing would be learned"),
            ("loss.divergence_weight=1e-46", "nothing would be learned"),
            ("model.layers=[1, 2, 1]", "model.layers names layer 1 twice"),
            ("model.layers=[]", "model.layers is empty"),
            ("stages.schedule=[2, 3]", "model.layers and stages.schedule are both given"),
            (
                "training.spike_threshold=-1",
                "training.spike_threshold is -1: it must be 0 (none is passed over) or above",
            ),
            ("training.spike_window=3", "training.spike_window is 3"),
            ("model.source=x", "model.source is for `grafter train`"),
            ("model.init=random", "\"random\" and \"weights\" are for `grafter train`; use paper,"),
            ("checkpoint.keep=0", "checkpoint.keep is 0"),
            ("task=train", "task is \"train\", but the command's is \"distill\""),
            ("training.steps=many", "training.steps"),
        ] {
            let message = message(&[assignment]);
            assert!(message.contains(expected), "{assignment}: {message}");
        }
    }

    #[test]
    fn training_has_no_teacher() {
        let base = [
            Override::flag("--source", "model.source", "source"),
            Override::flag("--train", "data.train", "train.jsonl"),
            Override::flag("--steps", "training.steps", 10),
        ];
        assert!(resolve(Task::Train, None, &base).is_ok());
        let with_layers: Vec<Override> =
            base.iter().cloned().chain([Override::parse("model.layers=[1]").unwrap()]).collect();
        let message = format!("{:#}", resolve(Task::Train, None, &with_layers).unwrap_err());
        assert!(message.contains("model.layers is for `grafter distill`"), "{message}");
    }

    #[test]
    fn differences_name_the_keys_but_not_of_checkpoints() {
        let run = with(&[]).unwrap();
        let other = with(&["training.seed=4", "checkpoint.every=7", "data.validation=v.jsonl"]).unwrap();
        assert_eq!(
            differences(&run, &other).unwrap(),
            ["data.validation was unset, is now \"v.jsonl\"", "training.seed was 0, is now 4"]
        );
        assert!(differences(&run, &run).unwrap().is_empty());
    }
}
