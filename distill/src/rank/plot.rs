//! A ranking as pictures: bars per layer, and for MMR how ranks change while mixers learn.

use std::fmt::Write as _;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use super::{LayerScore, Method, Metric, Ranking, least_important_first};

const BLUE: RGBColor = RGBColor(31, 119, 180);
const ORANGE: RGBColor = RGBColor(214, 95, 14);

/// A bar per layer. Scores before learning, where there are any, are paler bars behind.
pub(crate) fn bars(ranking: &Ranking) -> Result<String> {
    let scores = &ranking.scores;
    let starts = scores.iter().filter_map(|score| score.score_at_start);
    let values: Vec<f64> = scores.iter().map(|score| score.score).chain(starts).collect();
    let high = values.iter().copied().fold(0.0, f64::max);
    let low = values.iter().copied().fold(0.0, f64::min);
    let room = if high > low { (high - low) * 0.05 } else { 1.0 };
    let low = if low < 0.0 { low - room } else { 0.0 };
    let first = scores.first().map_or(0, |score| score.layer) as f64;
    let last = scores.last().map_or(0, |score| score.layer) as f64;
    let mut drawing = String::new();
    {
        let failed = |error: &dyn std::fmt::Display| anyhow!("drawing the scores: {error}");
        let area = SVGBackend::with_string(&mut drawing, (860, 420)).into_drawing_area();
        area.fill(&WHITE).map_err(|error| failed(&error))?;
        let mut chart = ChartBuilder::on(&area)
            .caption(title(ranking), ("sans-serif", 20))
            .margin(12)
            .x_label_area_size(44)
            .y_label_area_size(72)
            .build_cartesian_2d(first - 0.6..last + 0.6, low..high + room)
            .map_err(|error| failed(&error))?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(RGBColor(245, 245, 245))
            .label_style(("sans-serif", 15))
            .x_labels(scores.len().min(26))
            .x_label_formatter(&|x| format!("{x:.0}"))
            .x_desc("layer")
            .y_desc(axis(ranking))
            .draw()
            .map_err(|error| failed(&error))?;
        let bar = |layer: usize, value: f64, half_width: f64, colour: RGBColor| {
            let middle = layer as f64;
            Rectangle::new([(middle - half_width, 0.0), (middle + half_width, value)], colour.filled())
        };
        let pale = RGBColor(205, 222, 236);
        let behind = scores.iter().filter_map(|score| Some(bar(score.layer, score.score_at_start?, 0.42, pale)));
        chart.draw_series(behind).map_err(|error| failed(&error))?;
        let before = scores.iter().map(|score| bar(score.layer, score.score, 0.3, BLUE));
        chart.draw_series(before).map_err(|error| failed(&error))?;
        area.present().map_err(|error| failed(&error))?;
    }
    Ok(drawing)
}

fn title(ranking: &Ranking) -> String {
    match ranking.settings.method {
        Method::Loo => "Importance by leaving layers out".to_owned(),
        Method::Mmr => format!(
            "Importance by replacement: divergence left after {} updates (pale: at the start)",
            ranking.settings.steps
        ),
        Method::Mse => "Importance by the error of new mixers".to_owned(),
    }
}

fn axis(ranking: &Ranking) -> &'static str {
    match (ranking.settings.method, ranking.settings.metric) {
        (Method::Loo, Metric::Loss) => "loss without the layer, minus with it (nats)",
        (Method::Loo, Metric::Accuracy) => "accuracy lost without the layer",
        (Method::Loo, Metric::ExactMatch) => "exact matches lost without the layer",
        (Method::Mmr, _) => "reverse KL from the teacher (nats)",
        (Method::Mse, _) => "squared error / squared output",
    }
}

/// Ranks at the start on the left, ranks after learning on the right, a line per layer; where lines cross learning
/// changed the order. Lines that move by more than a tenth of all ranks are coloured.
pub(crate) fn slopes(ranking: &Ranking) -> String {
    let start: Vec<LayerScore> = ranking
        .scores
        .iter()
        .filter_map(|score| Some(LayerScore { score: score.score_at_start?, ..score.clone() }))
        .collect();
    let before = least_important_first(&start);
    let after = &ranking.least_important_first;
    let count = after.len();
    let step = 22;
    let (top, left, right) = (70, 150, 450);
    let height = top + count.max(1) * step + 20;
    let mut drawing = String::new();
    let _ = writeln!(
        drawing,
        "<svg viewBox=\"0 0 600 {height}\" xmlns=\"http://www.w3.org/2000/svg\" font-family=\"sans-serif\" \
         font-size=\"13\">\n<rect width=\"600\" height=\"{height}\" fill=\"#ffffff\"/>\n\
         <text x=\"300\" y=\"24\" font-size=\"17\" text-anchor=\"middle\">How learning changes the order of layers</text>\n\
         <text x=\"{left}\" y=\"50\" text-anchor=\"middle\">at the start</text>\n\
         <text x=\"{right}\" y=\"50\" text-anchor=\"middle\">after {} updates</text>",
        ranking.settings.steps
    );
    for (rank, layer) in after.iter().enumerate() {
        let Some(was) = before.iter().position(|other| other == layer) else { continue };
        let (from, to) = (top + was * step, top + rank * step);
        let moved = was.abs_diff(rank) * 10 > count;
        let colour = match (moved, rank < was) {
            (false, _) => RGBColor(170, 170, 170),
            (true, true) => BLUE,
            (true, false) => ORANGE,
        };
        let RGBColor(red, green, blue) = colour;
        let width = if moved { 2.0 } else { 1.2 };
        let _ = writeln!(
            drawing,
            "<line x1=\"{left}\" y1=\"{from}\" x2=\"{right}\" y2=\"{to}\" stroke=\"#{red:02x}{green:02x}{blue:02x}\" \
             stroke-width=\"{width}\"/>\n<text x=\"{}\" y=\"{}\" text-anchor=\"end\">layer {layer}</text>\n\
             <text x=\"{}\" y=\"{}\">layer {layer}</text>",
            left - 10,
            from + 4,
            right + 10,
            to + 4
        );
    }
    let _ = writeln!(
        drawing,
        "<text x=\"300\" y=\"{}\" font-size=\"11\" text-anchor=\"middle\" fill=\"#666666\">least important at the \
         top</text>\n</svg>",
        height - 6
    );
    drawing
}

#[cfg(test)]
mod tests {
    use super::super::{Cost, RankConfig};
    use super::*;

    #[test]
    fn every_layer_has_its_bar_and_its_line() {
        let score = |layer: usize, score: f64, start: f64| LayerScore { layer, score, score_at_start: Some(start) };
        let scores = vec![score(0, 0.5, 0.9), score(2, 0.1, 2.0), score(3, 0.2, 0.3)];
        let ranking = Ranking {
            settings: RankConfig::new("m".into(), Method::Mmr, "d".into()),
            hashes: Default::default(),
            baseline: None,
            least_important_first: least_important_first(&scores),
            scores,
            cost: Cost { layer_passes: 1, naive_layer_passes: 2 },
        };
        let bars = bars(&ranking).unwrap();
        // The background, and two bars for each of three layers.
        assert!(bars.matches("<rect ").count() >= 7, "{bars}");
        let slopes = slopes(&ranking);
        assert_eq!(slopes.matches("<line ").count(), 3);
        // Layer 2 was last and is first now: its line goes up, in colour.
        assert!(slopes.contains("y1=\"114\" x2=\"450\" y2=\"70\" stroke=\"#1f77b4\""), "{slopes}");
    }
}
