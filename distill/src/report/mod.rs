//! `grafter report`: a run's folder as one HTML page that needs nothing else.
//!
//! The page shows what is there: configuration, stages, curves, rankings, evaluations, throughput and samples. A run
//! that is still going on has a page, too, of what it has done so far.

mod comparison;
mod folder;
mod page;
mod plot;

use std::io::Write;
use std::path::Path;

use anyhow::Result;
use serde_json::Value;

use crate::config::{self, Task};
use crate::files;
use crate::rank::{self, Method, Ranking};
use crate::train::StepRecord;
use crate::units::{bytes, thousands};
pub use comparison::{Comparison, models as compare_models, runs as compare_runs};
use folder::{Contents, Evaluation, Stage};
use page::{Page, Table};
use plot::{Curve, Plot, Stroke, number};

/// Most points of a curve: more is not seen, and makes the page large.
const MOST_POINTS: usize = 800;
/// Updates over which the loss is averaged, at most.
const SMOOTHED: usize = 50;
/// The one quantity that is never shown by its logarithm: that falls to nothing at the end of every stage.
const RATE: &str = "Learning rate";
/// Most samples that are shown.
const MOST_SAMPLES: usize = 12;

/// Writes the page of a run's or a ranking's folder to `out`, whose folder is made where there is none.
///
/// # Errors
/// A folder that holds neither; files that are not what this version writes; a page that cannot be written.
pub fn write(run: &Path, out: &Path) -> Result<()> {
    let page = html(run)?;
    files::create_parent(out)?;
    files::write_file(out, |writer| Ok(writer.write_all(page.as_bytes())?))
}

/// The page of a run's or a ranking's folder.
///
/// # Errors
/// As [`write()`].
pub fn html(run: &Path) -> Result<String> {
    let contents = folder::read(run)?;
    let mut page = Page::new(&contents.name, &subtitle(&contents));
    if contents.config.is_some() {
        page.figures(&figures(&contents));
    }
    stages(&mut page, &contents);
    curves(&mut page, &contents)?;
    importance(&mut page, &contents)?;
    evaluations(&mut page, &contents);
    samples(&mut page, &contents);
    throughput(&mut page, &contents)?;
    if let Some(config) = &contents.config {
        page.heading("Configuration");
        page.folded("config.toml, as resolved", &config::to_toml(config)?);
    }
    if !contents.notes.is_empty() {
        page.heading("Not shown");
        for note in &contents.notes {
            page.paragraph(note);
        }
    }
    Ok(page.finish())
}

fn subtitle(contents: &Contents) -> String {
    let Some(config) = &contents.config else {
        let method = contents.rankings.first().map_or("", |(_, ranking)| ranking.settings.method.name());
        return format!("a ranking of layers ({method})");
    };
    let path = |path: &Option<std::path::PathBuf>| {
        path.as_ref().map(|path| path.display().to_string()).unwrap_or_else(|| "?".to_owned())
    };
    let what = match config.task {
        Task::Distill => format!("a hybrid of {}", path(&config.model.teacher)),
        Task::Train => format!("training of {}", path(&config.model.source)),
    };
    let (done, all) = contents.progress();
    let state = if contents.finished {
        "finished".to_owned()
    } else {
        format!("not finished: {} of {} updates so far", thousands(done), thousands(all))
    };
    format!("{what} · {state}")
}

/// What one looks for first.
fn figures(contents: &Contents) -> Vec<(String, String, String)> {
    let mut figures = Vec::new();
    let mut add = |what: &str, value: String, remark: String| figures.push((what.to_owned(), value, remark));
    if let (Some(last), Some(layers)) = (contents.stages.last(), contents.layers)
        && !last.mamba_layers.is_empty()
    {
        let mamba = last.mamba_layers.len();
        add("Mamba layers", format!("{mamba} of {layers}"), list(&last.mamba_layers));
    }
    if let Some(last) = contents.stages.iter().rev().find(|stage| !stage.validations.is_empty())
        && let Some(validation) = last.validations.last()
    {
        let first = last.validations.first().map_or(f64::NAN, |first| first.validation_loss);
        add(
            "validation loss",
            value(validation.validation_loss),
            format!("nats per token; {} before {}", value(first), last.name),
        );
    }
    let (done, all) = contents.progress();
    let tokens: u64 = contents.stages.iter().filter_map(|stage| Some(stage.updates.last()?.tokens)).sum();
    add("updates", thousands(done), format!("of {}", thousands(all)));
    add("tokens learned from", thousands(tokens), "positions that counted".to_owned());
    let seconds: f64 = contents.stages.iter().flat_map(|stage| &stage.timing).map(|timing| timing.seconds).sum();
    let speeds = contents.stages.iter().flat_map(|stage| speeds(stage).into_iter().map(|point| point.1)).collect();
    if let Some(speed) = median(speeds) {
        add("time", duration(seconds), format!("{} tokens/s in the median", thousands(speed.round() as u64)));
    }
    let passed: usize =
        contents.stages.iter().flat_map(|stage| &stage.updates).filter(|update| update.passed_over.is_some()).count();
    if passed > 0 {
        add("batches passed over", thousands(passed as u64), "their loss leapt".to_owned());
    }
    figures
}

fn stages(page: &mut Page, contents: &Contents) {
    let Some(config) = &contents.config else { return };
    page.heading("Stages");
    if contents.stages.is_empty() {
        page.paragraph("The first stage is not begun: its layers are being ranked.");
        return;
    }
    if let Some(layers) = contents.layers {
        let rows = contents
            .stages
            .iter()
            .map(|stage| (stage.name.clone(), stage.mamba_layers.clone(), stage.new_layers.clone()));
        let rows: Vec<_> = rows.filter(|(_, mamba, _)| !mamba.is_empty()).collect();
        if !rows.is_empty() {
            page.layer_map(layers, &rows);
        }
    }
    let row = |stage: &Stage| -> Vec<String> {
        let (before, after, measure) = losses(stage);
        let trained: Vec<&str> =
            stage.parts.iter().filter(|part| part.trained).map(|part| part.what.as_str()).collect();
        let trained = match (stage.parts.is_empty(), trained.len() == stage.parts.len()) {
            (true, _) => format!("{:?}", config.training.trainable).to_lowercase(),
            (false, true) => "all".to_owned(),
            (false, false) => trained.join(", "),
        };
        let state = if stage.finished { "finished" } else { "not finished" };
        vec![
            stage.name.clone(),
            list(&stage.new_layers),
            stage.mamba_layers.len().to_string(),
            stage.method.clone(),
            format!("{} / {}", thousands(stage.updates.len() as u64), thousands(stage.steps)),
            format!("{:e}", stage.learning_rate),
            trained,
            before.map_or("–".to_owned(), value),
            after.map_or("–".to_owned(), value),
            measure.to_owned(),
            state.to_owned(),
        ]
    };
    page.table(&Table {
        caption: "Loss in nats per token, before the first update and after the last".to_owned(),
        header: strings(&[
            "stage",
            "new layers",
            "Mamba layers",
            "picked by",
            "updates",
            "rate",
            "trained",
            "loss before",
            "loss after",
            "loss on",
            "state",
        ]),
        rows: contents.stages.iter().map(row).collect(),
        prose: false,
    });
    for stage in contents.stages.iter().filter(|stage| !stage.parts.is_empty()) {
        let rows = stage.parts.iter().map(|part| {
            let trained = if part.trained { "trained" } else { "frozen" };
            vec![part.what.clone(), thousands(part.parameters), part.from.clone(), trained.to_owned(), part.why.clone()]
        });
        let trained: u64 = stage.parts.iter().filter(|part| part.trained).map(|part| part.parameters).sum();
        let all: u64 = stage.parts.iter().map(|part| part.parameters).sum();
        page.folded_table(
            &format!("What {} trains, and why: {} of {} parameters", stage.name, thousands(trained), thousands(all)),
            &Table {
                caption: format!("Parameters of {}", stage.name),
                header: strings(&["part", "parameters", "starts from", "state", "why"]),
                rows: rows.collect(),
                prose: true,
            },
        );
    }
    if contents.stages.len() < contents.planned_stages {
        let left = contents.planned_stages - contents.stages.len();
        page.paragraph(&format!("{left} of {} stages are not begun.", contents.planned_stages));
    }
}

/// Loss before and after, and on what: validation data where there are any.
fn losses(stage: &Stage) -> (Option<f64>, Option<f64>, &'static str) {
    match (stage.validations.first(), stage.validations.last()) {
        (Some(first), Some(last)) => {
            let after = (stage.validations.len() > 1).then_some(last.validation_loss);
            (Some(first.validation_loss), after, "validation data")
        }
        _ => {
            let count = SMOOTHED.min(stage.updates.len() / 2);
            let mean =
                |updates: &[StepRecord]| updates.iter().map(|update| update.loss).sum::<f64>() / updates.len() as f64;
            let first = stage.updates.get(..count).filter(|updates| !updates.is_empty()).map(mean);
            let last = stage.updates.get(stage.updates.len() - count..).filter(|updates| !updates.is_empty());
            (first, last.map(mean), "training batches")
        }
    }
}

fn curves(page: &mut Page, contents: &Contents) -> Result<()> {
    if contents.stages.iter().all(|stage| stage.updates.is_empty() && stage.validations.is_empty()) {
        return Ok(());
    }
    page.heading("Curves");
    let begins = begins(contents);
    // A gap between stages: they are runs of their own.
    let along = |points: &dyn Fn(&Stage) -> Vec<(f64, f64)>| -> Vec<(f64, f64)> {
        let placed = contents.stages.iter().zip(&begins);
        let placed = placed.flat_map(|(stage, begin)| {
            let points = thinned(&points(stage)).into_iter().map(move |(x, y)| (begin + x, y));
            points.chain([(*begin, f64::NAN)])
        });
        placed.collect()
    };
    let updates = |what: &dyn Fn(&StepRecord) -> f64| {
        along(&|stage| stage.updates.iter().map(|update| (update.step as f64, what(update))).collect())
    };
    let window = SMOOTHED.min(contents.progress().0 as usize / 10).max(1);
    let smooth = along(&|stage| {
        let points: Vec<(f64, f64)> = stage.updates.iter().map(|update| (update.step as f64, update.loss)).collect();
        moving_mean(&points, window)
    });
    let validation =
        along(&|stage| stage.validations.iter().map(|record| (record.step as f64, record.validation_loss)).collect());
    let mut drawn = vec![
        curve("training", updates(&|update| update.loss), Stroke::Thin),
        curve(&format!("training, mean of {window} updates"), smooth, Stroke::Line),
    ];
    if contents.stages.iter().any(|stage| !stage.validations.is_empty()) {
        drawn.push(curve("validation", validation, Stroke::Marked));
    }
    draw(page, contents, "Loss", "nats per token", drawn)?;
    let norm = curve("all gradients together, before clipping", updates(&|update| update.gradient_norm), Stroke::Thin);
    draw(page, contents, "Gradient norm", "norm", vec![norm])?;
    let rate = curve("AdamW", updates(&|update| update.learning_rate), Stroke::Line);
    draw(page, contents, RATE, "rate", vec![rate])
}

fn importance(page: &mut Page, contents: &Contents) -> Result<()> {
    if contents.rankings.is_empty() {
        return Ok(());
    }
    page.heading("Importance of layers");
    for (name, ranking) in &contents.rankings {
        if contents.rankings.len() > 1 || contents.config.is_some() {
            page.subheading(&format!("Ranking {name}"));
        }
        page.paragraph(&ranking_in_words(ranking));
        page.drawing(&format!("Scores, {name}: high bars are layers to keep"), &rank::plot::bars(ranking)?, &[]);
        if ranking.settings.method == Method::Mmr {
            page.drawing(&format!("Change of rank, {name}"), &rank::plot::slopes(ranking), &[]);
        }
    }
    Ok(())
}

fn ranking_in_words(ranking: &Ranking) -> String {
    let settings = &ranking.settings;
    let baseline = ranking.baseline.map(|value| format!("; the whole model's metric is {value:.4}"));
    let order: Vec<String> = ranking.least_important_first.iter().map(usize::to_string).collect();
    format!(
        "By {} on {}{}. From least to most important: {}.",
        settings.method.name(),
        settings.data.display(),
        baseline.unwrap_or_default(),
        order.join(", ")
    )
}

fn evaluations(page: &mut Page, contents: &Contents) {
    if contents.evaluations.is_empty() {
        return;
    }
    page.heading("Evaluation");
    for (task, evaluations) in contents.tasks() {
        let mut columns: Vec<&str> = Vec::new();
        for (name, _) in evaluations.iter().flat_map(|evaluation| &evaluation.metrics) {
            if !columns.contains(&name.as_str()) {
                columns.push(name);
            }
        }
        let row = |evaluation: &&Evaluation| -> Vec<String> {
            let cell = |column: &&str| {
                let found = evaluation.metrics.iter().find(|(name, _)| name == column);
                found.map_or("–".to_owned(), |(_, measure)| match measure.standard_error {
                    Some(error) => format!("{} ± {}", value(measure.value), value(error)),
                    None => value(measure.value),
                })
            };
            [evaluation.name.clone()].into_iter().chain(columns.iter().map(cell)).collect()
        };
        page.table(&Table {
            caption: format!("Task: {task}"),
            header: ["model"].iter().chain(&columns).map(|name| name.replace('_', " ")).collect(),
            rows: evaluations.iter().map(row).collect(),
            prose: false,
        });
    }
}

/// What models answered to the same questions, side by side.
fn samples(page: &mut Page, contents: &Contents) {
    let tasks = contents.tasks();
    let asked = |evaluations: &[&Evaluation]| evaluations.iter().any(|evaluation| !evaluation.samples.is_empty());
    if !tasks.values().any(|evaluations| asked(evaluations)) {
        return;
    }
    page.heading("Samples");
    for (task, evaluations) in tasks {
        let answering: Vec<&&Evaluation> =
            evaluations.iter().filter(|evaluation| !evaluation.samples.is_empty()).collect();
        let Some(first) = answering.first() else { continue };
        let row = |sample: &folder::Sample| -> Vec<String> {
            let expected = sample.expected.as_ref().map_or("–".to_owned(), text);
            let answers = answering.iter().map(|evaluation| {
                let same = evaluation.samples.iter().find(|other| other.prompt == sample.prompt);
                same.map_or("–".to_owned(), |same| {
                    let mark = match same.right {
                        Some(true) => "✓ ",
                        Some(false) => "✗ ",
                        None => "",
                    };
                    format!("{mark}{}", text(&same.answer))
                })
            });
            [sample.prompt.clone(), expected].into_iter().chain(answers).collect()
        };
        let shown = first.samples.len().min(MOST_SAMPLES);
        page.table(&Table {
            caption: format!("Task: {task}; {shown} of {} questions", first.samples.len()),
            header: strings(&["question", "right answer"])
                .into_iter()
                .chain(answering.iter().map(|evaluation| evaluation.name.clone()))
                .collect(),
            rows: first.samples.iter().take(MOST_SAMPLES).map(row).collect(),
            prose: true,
        });
    }
}

fn throughput(page: &mut Page, contents: &Contents) -> Result<()> {
    if contents.stages.iter().all(|stage| stage.timing.is_empty()) {
        return Ok(());
    }
    page.heading("Throughput");
    let placed = contents.stages.iter().zip(begins(contents));
    let placed = placed.flat_map(|(stage, begin)| {
        let points = thinned(&speeds(stage)).into_iter().map(move |(x, y)| (begin + x, y));
        points.chain([(begin, f64::NAN)])
    });
    draw(
        page,
        contents,
        "Tokens per second, padding included",
        "tokens/s",
        vec![curve("training", placed.collect(), Stroke::Thin)],
    )?;
    let row = |stage: &Stage| -> Vec<String> {
        let of = |what: &str| -> f64 {
            stage.timing.iter().filter(|timing| timing.what == what).map(|timing| timing.seconds).sum()
        };
        let memory = stage.timing.iter().map(|timing| timing.peak_memory_bytes).max();
        let speed = median(speeds(stage).into_iter().map(|point| point.1).collect());
        vec![
            stage.name.clone(),
            duration(of("step")),
            duration(of("validation")),
            duration(of("checkpoint")),
            speed.map_or("–".to_owned(), |speed| thousands(speed.round() as u64)),
            memory.map_or("–".to_owned(), bytes),
        ]
    };
    page.table(&Table {
        caption: "Where the time went".to_owned(),
        header: strings(&["stage", "updates", "validation", "checkpoints", "tokens/s, median", "device memory, peak"]),
        rows: contents.stages.iter().map(row).collect(),
        prose: false,
    });
    Ok(())
}

fn draw(page: &mut Page, contents: &Contents, title: &str, y_label: &str, curves: Vec<Curve>) -> Result<()> {
    let names: Vec<String> = curves.iter().map(|curve| curve.name.clone()).collect();
    let several = contents.stages.len() > 1;
    let named = contents.stages.iter().map(|stage| stage.name.clone()).zip(begins(contents));
    let plot = Plot {
        title: title.to_owned(),
        x_label: "update".to_owned(),
        y_label: y_label.to_owned(),
        may_be_logarithmic: title != RATE,
        curves,
        parts: if several { named.collect() } else { Vec::new() },
    };
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    page.drawing(title, &plot::draw(&plot)?, &names);
    Ok(())
}

/// How many updates were made before each stage.
fn begins(contents: &Contents) -> Vec<f64> {
    let mut before = 0;
    let begin = |stage: &Stage| {
        let begin = before;
        before += stage.updates.len();
        begin as f64
    };
    contents.stages.iter().map(begin).collect()
}

/// Update and tokens per second.
fn speeds(stage: &Stage) -> Vec<(f64, f64)> {
    let updates = stage.timing.iter().filter(|timing| timing.what == "step");
    updates.filter_map(|timing| Some((timing.step as f64, timing.tokens_per_second?))).collect()
}

fn curve(name: &str, points: Vec<(f64, f64)>, stroke: Stroke) -> Curve {
    Curve { name: name.to_owned(), points, stroke }
}

/// At most [`MOST_POINTS`] points: means of as many neighbours as that takes.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let each = points.len().div_ceil(MOST_POINTS).max(1);
    let mean = |chunk: &[(f64, f64)]| {
        let (x, y) = chunk.iter().fold((0.0, 0.0), |(x, y), point| (x + point.0, y + point.1));
        (x / chunk.len() as f64, y / chunk.len() as f64)
    };
    points.chunks(each).map(mean).collect()
}

/// The mean of every point's y with those before it, at most `count` in all.
fn moving_mean(points: &[(f64, f64)], count: usize) -> Vec<(f64, f64)> {
    let mean = |index: usize| {
        let window = &points[(index + 1).saturating_sub(count)..=index];
        (points[index].0, window.iter().map(|point| point.1).sum::<f64>() / window.len() as f64)
    };
    (0..points.len()).map(mean).collect()
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// Layers, runs of neighbours as ranges.
fn list(layers: &[usize]) -> String {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for &layer in layers {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == layer => *last = layer,
            _ => ranges.push((layer, layer)),
        }
    }
    let range = |(first, last): (usize, usize)| match last - first {
        0 => first.to_string(),
        1 => format!("{first}, {last}"),
        _ => format!("{first}–{last}"),
    };
    if ranges.is_empty() { "–".to_owned() } else { ranges.into_iter().map(range).collect::<Vec<_>>().join(", ") }
}

/// A number as it stands in a table.
fn value(value: f64) -> String {
    let size = value.abs();
    if !value.is_finite() {
        value.to_string()
    } else if value.fract() == 0.0 && (1e4..1e15).contains(&value) {
        thousands(value as u64)
    } else if size >= 1e6 {
        number(value)
    } else if value.fract() == 0.0 {
        format!("{value}")
    } else if size >= 100.0 {
        format!("{value:.1}")
    } else if size >= 1e-3 {
        format!("{value:.4}")
    } else {
        format!("{value:.2e}")
    }
}

/// Seconds for people.
fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        0..60 => format!("{seconds:.1} s"),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

/// A JSON value as one reads it.
fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn strings(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_points_become_few_and_keep_their_mean() {
        let points: Vec<(f64, f64)> = (0..10_400).map(|x| (f64::from(x), f64::from(x % 2))).collect();
        let few = thinned(&points);
        assert!(few.len() <= MOST_POINTS && few.iter().all(|point| (point.1 - 0.5).abs() < 0.04), "{}", few.len());
        assert_eq!(thinned(&points[..5]), points[..5]);
        assert_eq!(moving_mean(&[(1.0, 2.0), (2.0, 4.0), (3.0, 9.0)], 2), [(1.0, 2.0), (2.0, 3.0), (3.0, 6.5)]);
    }

    #[test]
    fn quantities_are_readable() {
        assert_eq!(list(&[]), "–");
        assert_eq!(list(&[0, 2, 3, 5, 6, 7]), "0, 2, 3, 5–7");
        assert_eq!(
            [0.0, 0.98123, 1e-5, 512.25, 4194304.0, f64::NAN].map(value),
            ["0", "0.9812", "1.00e-5", "512.2", "4 194 304", "NaN"]
        );
        assert_eq!([0.25, 75.0, 7300.0].map(duration), ["0.2 s", "1 min 15 s", "2 h 01 min"]);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(Vec::new()), None);
    }
}
