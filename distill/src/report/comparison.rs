//! Several things side by side: the losses of runs, and the scores and speeds of models.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use plotters::prelude::*;
use serde_json::Value;

use super::plot::number;
use crate::train::{Record, read_metrics};
use crate::units::thousands;

/// A picture and what it shows, for people.
pub struct Comparison {
    /// SVG files by name.
    pub plots: Vec<(&'static str, String)>,
    /// The figures as a Markdown table.
    pub table: String,
}

/// Colours of curves and bars, in order.
const COLOURS: [RGBColor; 8] = [
    RGBColor(90, 90, 90),
    RGBColor(31, 119, 180),
    RGBColor(222, 110, 25),
    RGBColor(52, 150, 72),
    RGBColor(192, 57, 43),
    RGBColor(128, 90, 170),
    RGBColor(140, 86, 75),
    RGBColor(23, 160, 170),
];

/// The validation losses of runs that differ in their beginnings: folders of one name but for a number at the end
/// (`paper-1`, `paper-2`) are seeds of one variant. The first variant is what the others are held against: the table says
/// after how many tokens each reaches the loss that the first one has at its end.
///
/// # Errors
/// Folders without validation losses, or whose seeds looked at different steps.
pub fn runs(folders: &[PathBuf]) -> Result<Comparison> {
    let mut variants: Vec<Variant> = Vec::new();
    for folder in folders {
        let name = folder.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        let name = name.trim_end_matches(|c: char| c.is_ascii_digit()).trim_end_matches(['-', '_']).to_owned();
        let curve = losses(folder)?;
        match variants.iter_mut().find(|variant| variant.name == name) {
            Some(variant) => variant.seeds.push(curve),
            None => variants.push(Variant { name, seeds: vec![curve] }),
        }
    }
    let curves = variants.iter().map(|variant| Ok((variant, variant.band()?))).collect::<Result<Vec<_>>>()?;
    let (_, reference) = curves.first().context("no run to compare")?;
    let (goal, budget) = reference.last().map_or((f64::NAN, f64::NAN), |point| (point.mean, point.tokens));
    let mut table = String::from(
        "| start | seeds | loss before | loss at the end (least to most) | tokens to reach the first one's end | of its tokens |\n\
         |---|---|---|---|---|---|\n",
    );
    for (variant, band) in &curves {
        let (Some(first), Some(last)) = (band.first(), band.last()) else { continue };
        let reached = crossing(band, goal);
        let _ = writeln!(
            table,
            "| {} | {} | {:.4} | {:.4} ({:.4} to {:.4}) | {} | {} |",
            variant.name,
            variant.seeds.len(),
            first.mean,
            last.mean,
            last.least,
            last.most,
            reached.map_or_else(|| "not reached".to_owned(), |tokens| thousands(tokens.round() as u64)),
            reached.map_or_else(|| "–".to_owned(), |tokens| format!("{:.2}", tokens / budget)),
        );
    }
    let bands: Vec<(&str, &[Point])> =
        curves.iter().map(|(variant, band)| (variant.name.as_str(), band.as_slice())).collect();
    Ok(Comparison { plots: vec![("losses.svg", draw_losses(&bands)?)], table })
}

struct Variant {
    name: String,
    /// Of each seed: tokens and loss.
    seeds: Vec<Vec<(f64, f64)>>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Point {
    tokens: f64,
    mean: f64,
    least: f64,
    most: f64,
}

impl Variant {
    /// Mean and range over the seeds, as far as all of them have come.
    fn band(&self) -> Result<Vec<Point>> {
        let length = self.seeds.iter().map(Vec::len).min().unwrap_or_default();
        (0..length)
            .map(|at| {
                let losses: Vec<f64> = self.seeds.iter().map(|seed| seed[at].1).collect();
                // Seeds read the rows in another order, so that a few positions more or fewer count.
                let tokens = self.seeds.iter().map(|seed| seed[at].0).sum::<f64>() / self.seeds.len() as f64;
                let near = self.seeds.iter().all(|seed| (seed[at].0 - tokens).abs() <= 0.05 * tokens);
                ensure!(near, "the seeds of {} were not looked at after the same tokens", self.name);
                Ok(Point {
                    tokens,
                    mean: losses.iter().sum::<f64>() / losses.len() as f64,
                    least: losses.iter().copied().fold(f64::INFINITY, f64::min),
                    most: losses.iter().copied().fold(f64::NEG_INFINITY, f64::max),
                })
            })
            .collect()
    }
}

/// Tokens and validation divergence (or loss, where there is no teacher) of a run.
fn losses(folder: &Path) -> Result<Vec<(f64, f64)>> {
    let mut tokens = 0;
    let mut curve = Vec::new();
    for record in read_metrics(&folder.join("metrics.jsonl"))? {
        match record {
            Record::Step(step) => tokens = step.tokens,
            Record::Validation(validation) => {
                let loss = validation.validation_divergence.unwrap_or(validation.validation_loss);
                curve.push((tokens as f64, loss));
            }
        }
    }
    ensure!(!curve.is_empty(), "{}: metrics.jsonl has no validation losses", folder.display());
    Ok(curve)
}

/// After how many tokens a curve first reaches `goal`, between its points in a straight line.
fn crossing(band: &[Point], goal: f64) -> Option<f64> {
    let at = band.iter().position(|point| point.mean <= goal)?;
    let to = band[at];
    let Some(from) = at.checked_sub(1).map(|before| band[before]) else { return Some(to.tokens) };
    let part = (from.mean - goal) / (from.mean - to.mean);
    Some(from.tokens + part * (to.tokens - from.tokens))
}

fn draw_losses(bands: &[(&str, &[Point])]) -> Result<String> {
    let failed = |error: &dyn std::fmt::Display| anyhow!("drawing the losses: {error}");
    // The first loss, before any update, would leave the rest no room.
    let shown = |band: &[Point]| band.get(1..).unwrap_or_default().to_vec();
    let all: Vec<Point> = bands.iter().flat_map(|(_, band)| shown(band)).collect();
    let most_tokens = all.iter().map(|point| point.tokens).fold(1.0, f64::max);
    let low = all.iter().map(|point| point.least).fold(f64::INFINITY, f64::min).max(1e-9);
    let high = all.iter().map(|point| point.most).fold(low * 1.01, f64::max);
    let mut drawing = String::new();
    {
        let area = SVGBackend::with_string(&mut drawing, (860, 480)).into_drawing_area();
        area.fill(&WHITE).map_err(|error| failed(&error))?;
        let mut chart = ChartBuilder::on(&area)
            .margin(12)
            .x_label_area_size(44)
            .y_label_area_size(72)
            .build_cartesian_2d(0.0..most_tokens * 1.02, (low * 0.95..high * 1.05).log_scale())
            .map_err(|error| failed(&error))?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.12))
            .label_style(("sans-serif", 14))
            .x_desc("tokens learned from")
            .y_desc("validation divergence, nats per token")
            .x_label_formatter(&|x| number(*x))
            .y_label_formatter(&|y| number(*y))
            .draw()
            .map_err(|error| failed(&error))?;
        for (index, (name, band)) in bands.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let band = shown(band);
            let there = band.iter().map(|point| (point.tokens, point.least));
            let back = band.iter().rev().map(|point| (point.tokens, point.most));
            let outline: Vec<(f64, f64)> = there.chain(back).collect();
            if outline.len() > 2 {
                chart.draw_series([Polygon::new(outline, colour.mix(0.15))]).map_err(|error| failed(&error))?;
            }
            let line = LineSeries::new(band.iter().map(|point| (point.tokens, point.mean)), colour.stroke_width(2));
            chart
                .draw_series(line)
                .map_err(|error| failed(&error))?
                .label(*name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(3)));
        }
        legend(&mut chart).map_err(|error| failed(&error))?;
        area.present().map_err(|error| failed(&error))?;
    }
    Ok(drawing)
}

fn legend<'a, DB: DrawingBackend + 'a, CT: CoordTranslate>(
    chart: &mut ChartContext<'a, DB, CT>,
) -> std::result::Result<(), DrawingAreaErrorKind<DB::ErrorType>> {
    let mut labels = chart.configure_series_labels();
    labels.position(SeriesLabelPosition::UpperRight).background_style(WHITE.mix(0.85)).border_style(BLACK.mix(0.3));
    labels.label_font(("sans-serif", 14)).draw()
}

/// The scores and speeds of models: every folder in `folder` (in the order of their names, of which a number and a dash at the
/// beginning are not shown) holds `exam.json`, what `grafter eval --task generation --out` wrote, and perhaps `bench.json`, what
/// `grafter bench --json` printed. The first is what the others are held against.
///
/// # Errors
/// Files that are missing, or are not what those commands write.
pub fn models(folder: &Path) -> Result<Comparison> {
    let mut entries: Vec<PathBuf> = fs::read_dir(folder)
        .with_context(|| format!("reading the folder {}", folder.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.join("exam.json").is_file())
        .collect();
    entries.sort();
    ensure!(!entries.is_empty(), "{} has no folder with an exam.json", folder.display());
    let models = entries.iter().map(|path| Examined::read(path)).collect::<Result<Vec<_>>>()?;
    let mut tasks: Vec<&String> = models.iter().flat_map(|model| model.by_task.keys()).collect();
    tasks.sort();
    tasks.dedup();
    let mut table = String::from("| model | all |");
    for task in &tasks {
        let _ = write!(table, " {task} |");
    }
    table.push_str(" decoding, tokens/s | of the first |\n|---|---|");
    table.push_str(&"---|".repeat(tasks.len() + 2));
    table.push('\n');
    for model in &models {
        let _ = write!(table, "| {} | {:.1} % |", model.name, 100.0 * model.score);
        for task in &tasks {
            let score =
                model.by_task.get(*task).map_or_else(|| "–".to_owned(), |score| format!("{:.1} %", 100.0 * score));
            let _ = write!(table, " {score} |");
        }
        let speed = model.speed.map_or_else(|| "–".to_owned(), |speed| thousands(speed.round() as u64));
        let ratio = model.speed.zip(models[0].speed).map(|(speed, first)| format!("{:.2}", speed / first));
        let _ = writeln!(table, " {speed} | {} |", ratio.unwrap_or_else(|| "–".to_owned()));
    }
    let mut plots = vec![("scores.svg", draw_scores(&models, &tasks)?)];
    if models.iter().filter(|model| model.speed.is_some()).count() > 1 {
        plots.push(("score-against-speed.svg", draw_speeds(&models)?));
    }
    Ok(Comparison { plots, table })
}

struct Examined {
    name: String,
    score: f64,
    by_task: BTreeMap<String, f64>,
    /// Tokens per second of decoding, of the largest batch that was timed.
    speed: Option<f64>,
}

impl Examined {
    fn read(folder: &Path) -> Result<Self> {
        let name = folder.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        let name = match name.split_once('-') {
            Some((number, rest)) if number.bytes().all(|byte| byte.is_ascii_digit()) => rest.to_owned(),
            _ => name,
        };
        let json = |file: &str| -> Result<Value> {
            let path = folder.join(file);
            let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            serde_json::from_str(&text).with_context(|| format!("{} is not JSON", path.display()))
        };
        let exam = json("exam.json")?;
        let score = |of: &Value| of["exact_match"].as_f64();
        let all = score(&exam["metrics"]).with_context(|| {
            format!(
                "{}: exam.json has no metrics.exact_match: write it with `grafter eval --task generation`",
                folder.display()
            )
        })?;
        let tasks = exam["by_task"].as_object().into_iter().flatten();
        let by_task = tasks.filter_map(|(task, figures)| Some((task.clone(), score(figures)?))).collect();
        let speed = if folder.join("bench.json").exists() {
            let bench = json("bench.json")?;
            let lines = bench.as_array().into_iter().flatten();
            let decoding = lines.filter(|line| line["name"].as_str().is_some_and(|name| name.starts_with("decode")));
            decoding.filter_map(|line| line["tokens_per_second"].as_f64()).next_back()
        } else {
            None
        };
        Ok(Self { name, score: all, by_task, speed })
    }
}

fn draw_scores(models: &[Examined], tasks: &[&String]) -> Result<String> {
    let failed = |error: &dyn std::fmt::Display| anyhow!("drawing the scores: {error}");
    let groups: Vec<&str> = tasks.iter().map(|task| task.as_str()).chain(["all"]).collect();
    let mut drawing = String::new();
    {
        let area = SVGBackend::with_string(&mut drawing, (960, 440)).into_drawing_area();
        area.fill(&WHITE).map_err(|error| failed(&error))?;
        let mut chart = ChartBuilder::on(&area)
            .margin(12)
            .x_label_area_size(44)
            .y_label_area_size(64)
            // Room for the legend on the right.
            .build_cartesian_2d(-0.5..groups.len() as f64 * 1.33, 0.0..100.0)
            .map_err(|error| failed(&error))?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .label_style(("sans-serif", 14))
            .x_labels(groups.len() * 2 + 3)
            .x_label_formatter(&|x| {
                let whole = (x - x.round()).abs() < 1e-6 && *x > -0.25;
                whole.then(|| groups.get(x.round() as usize).copied()).flatten().unwrap_or_default().to_owned()
            })
            .y_desc("right answers, %")
            .draw()
            .map_err(|error| failed(&error))?;
        let width = 0.8 / models.len() as f64;
        for (index, model) in models.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let bars = groups.iter().enumerate().filter_map(|(group, task)| {
                let score = if *task == "all" { Some(model.score) } else { model.by_task.get(*task).copied() }?;
                let left = group as f64 - 0.4 + index as f64 * width;
                Some(Rectangle::new([(left, 0.0), (left + width * 0.92, 100.0 * score)], colour.filled()))
            });
            chart
                .draw_series(bars)
                .map_err(|error| failed(&error))?
                .label(model.name.clone())
                .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 14, y + 5)], colour.filled()));
        }
        legend(&mut chart).map_err(|error| failed(&error))?;
        area.present().map_err(|error| failed(&error))?;
    }
    Ok(drawing)
}

fn draw_speeds(models: &[Examined]) -> Result<String> {
    let failed = |error: &dyn std::fmt::Display| anyhow!("drawing scores against speeds: {error}");
    let most = models.iter().filter_map(|model| model.speed).fold(1.0, f64::max);
    let mut drawing = String::new();
    {
        let area = SVGBackend::with_string(&mut drawing, (860, 440)).into_drawing_area();
        area.fill(&WHITE).map_err(|error| failed(&error))?;
        let mut chart = ChartBuilder::on(&area)
            .margin(12)
            .x_label_area_size(44)
            .y_label_area_size(64)
            // Room for the legend on the right: names beside points would lie on each other.
            .build_cartesian_2d(0.0..most * 1.5, 0.0..105.0)
            .map_err(|error| failed(&error))?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.12))
            .label_style(("sans-serif", 14))
            .x_desc("decoding, tokens per second")
            .y_desc("right answers, %")
            .x_label_formatter(&|x| thousands(x.round() as u64))
            .draw()
            .map_err(|error| failed(&error))?;
        for (index, model) in models.iter().enumerate() {
            let Some(speed) = model.speed else { continue };
            let (colour, place) = (COLOURS[index % COLOURS.len()], (speed, 100.0 * model.score));
            chart
                .draw_series([Circle::new(place, 5, colour.filled())])
                .map_err(|error| failed(&error))?
                .label(model.name.clone())
                .legend(move |(x, y)| Circle::new((x + 7, y), 5, colour.filled()));
        }
        legend(&mut chart).map_err(|error| failed(&error))?;
        area.present().map_err(|error| failed(&error))?;
    }
    Ok(drawing)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(folder: &Path, name: &str, losses: &[(u64, f64)]) -> PathBuf {
        let run = folder.join(name);
        fs::create_dir(&run).unwrap();
        let mut text = String::new();
        for (index, (tokens, loss)) in losses.iter().enumerate() {
            if index > 0 {
                let _ = writeln!(
                    text,
                    r#"{{"step":{index},"loss":1.0,"gradient_norm":1.0,"learning_rate":0.1,"tokens":{tokens}}}"#
                );
            }
            let _ = writeln!(
                text,
                r#"{{"step":{index},"validation_loss":9.0,"validation_divergence":{loss},"validation_cross_entropy":1.0,"validation_tokens":5}}"#
            );
        }
        fs::write(run.join("metrics.jsonl"), text).unwrap();
        run
    }

    #[test]
    fn the_table_says_after_how_many_tokens_the_first_ones_loss_is_reached() {
        let folder = tempfile::tempdir().unwrap();
        let runs = [
            run(folder.path(), "paper-1", &[(0, 2.0), (100, 1.0), (200, 0.5)]),
            run(folder.path(), "paper-2", &[(0, 2.0), (100, 1.2), (200, 0.7)]),
            run(folder.path(), "better-1", &[(0, 2.0), (100, 0.2), (200, 0.1)]),
            run(folder.path(), "worse-1", &[(0, 2.0), (100, 1.9), (200, 1.8)]),
        ];
        let compared = super::runs(&runs).unwrap();
        let lines: Vec<&str> = compared.table.lines().skip(2).collect();
        // From 2.0 to 0.2 in 100 tokens, 0.6 is reached after 77.8.
        assert_eq!(lines[0], "| paper | 2 | 2.0000 | 0.6000 (0.5000 to 0.7000) | 200 | 1.00 |");
        assert_eq!(lines[1], "| better | 1 | 2.0000 | 0.1000 (0.1000 to 0.1000) | 78 | 0.39 |");
        assert_eq!(lines[2], "| worse | 1 | 2.0000 | 1.8000 (1.8000 to 1.8000) | not reached | – |");
        assert!(compared.plots[0].1.contains("better") && !compared.plots[0].1.contains("NaN"));
        let odd = run(folder.path(), "paper-3", &[(0, 2.0), (150, 1.0), (200, 0.5)]);
        let error = super::runs(&[runs[0].clone(), odd]).err().unwrap().to_string();
        assert!(error.contains("the seeds of paper were not looked at"), "{error}");
    }

    #[test]
    fn models_are_held_against_the_first() {
        let folder = tempfile::tempdir().unwrap();
        for (name, score, speed) in [("1-teacher", 1.0, 100.0), ("2-hybrid", 0.75, 250.0)] {
            let model = folder.path().join(name);
            fs::create_dir(&model).unwrap();
            let exam = serde_json::json!({
                "metrics": { "exact_match": score }, "by_task": { "level 1": { "exact_match": score } },
            });
            fs::write(model.join("exam.json"), exam.to_string()).unwrap();
            let bench = serde_json::json!([
                { "name": "prefill, last logits", "tokens_per_second": 9e9 },
                { "name": "decode, batch 1", "tokens_per_second": 1.0 },
                { "name": "decode, batch 64", "tokens_per_second": speed },
            ]);
            fs::write(model.join("bench.json"), bench.to_string()).unwrap();
        }
        let compared = models(folder.path()).unwrap();
        assert!(compared.table.contains("| teacher | 100.0 % | 100.0 % | 100 | 1.00 |"), "{}", compared.table);
        assert!(compared.table.contains("| hybrid | 75.0 % | 75.0 % | 250 | 2.50 |"), "{}", compared.table);
        assert_eq!(compared.plots.len(), 2);
        assert!(compared.plots[1].1.contains("hybrid"));
        fs::write(folder.path().join("2-hybrid/exam.json"), "{}").unwrap();
        let error = models(folder.path()).err().unwrap().to_string();
        assert!(error.contains("2-hybrid: exam.json has no metrics.exact_match"), "{error}");
    }
}
