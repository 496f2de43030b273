//! Curves as inline SVG.

use anyhow::{Result, anyhow};
use plotters::prelude::*;

/// A line of a plot.
#[derive(Clone, Debug)]
pub(super) struct Curve {
    /// Its name in the legend.
    pub name: String,
    /// (x, y) in order of x. Points that are not finite are gaps.
    pub points: Vec<(f64, f64)>,
    /// How it is drawn.
    pub stroke: Stroke,
}

/// How a curve is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stroke {
    /// What others stand before.
    Thin,
    /// A line.
    Line,
    /// A line with a mark at every point: there are few.
    Marked,
}

/// A plot with one or more curves.
#[derive(Clone, Debug)]
pub(super) struct Plot {
    /// What it shows.
    pub title: String,
    /// Under the x axis.
    pub x_label: String,
    /// Beside the y axis.
    pub y_label: String,
    /// Whether the y axis may be logarithmic, where that shows more.
    pub may_be_logarithmic: bool,
    /// The curves.
    pub curves: Vec<Curve>,
    /// Names of parts of the x axis and where they begin, in order; none for an axis in one piece.
    pub parts: Vec<(String, f64)>,
}

/// Colours of curves, in order: readable on white and on black.
pub(super) const COLOURS: [RGBColor; 4] =
    [RGBColor(122, 162, 200), RGBColor(31, 119, 180), RGBColor(222, 110, 25), RGBColor(52, 150, 72)];

const SIZE: (u32, u32) = (760, 340);
/// So much between the greatest and the least value, and a logarithmic axis shows more.
const LOGARITHMIC_FROM: f64 = 20.0;

/// Draws a plot. The y axis is logarithmic where that shows more: values that are all positive, and far apart.
///
/// # Errors
/// When it cannot be drawn.
pub(super) fn draw(plot: &Plot) -> Result<String> {
    let finite = |point: &(f64, f64)| point.0.is_finite() && point.1.is_finite();
    let values = || plot.curves.iter().flat_map(|curve| &curve.points).copied().filter(finite);
    let (least, most) = values().fold((f64::INFINITY, 0.0), |(low, high), (_, y)| (y.min(low), y.max(high)));
    let logarithmic = plot.may_be_logarithmic && least > 0.0 && most > LOGARITHMIC_FROM * least;
    let place = |y: f64| if logarithmic { y.log10() } else { y };
    let value = move |y: f64| if logarithmic { 10f64.powf(y) } else { y };
    let (x_low, x_high) = span(values().map(|point| point.0));
    let (y_low, y_high) = span(values().map(|point| place(point.1)));
    // The names of the parts stand above the curves.
    let y_high = if plot.parts.is_empty() { y_high } else { y_high + 0.1 * (y_high - y_low) };
    let mut drawing = String::new();
    {
        let area = SVGBackend::with_string(&mut drawing, SIZE).into_drawing_area();
        let failed = |error: &dyn std::fmt::Display| anyhow!("drawing \"{}\": {error}", plot.title);
        let mut chart = ChartBuilder::on(&area)
            .margin(10)
            .x_label_area_size(44)
            .y_label_area_size(70)
            .build_cartesian_2d(x_low..x_high, y_low..y_high)
            .map_err(|error| failed(&error))?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.12))
            .axis_style(BLACK.mix(0.5))
            .label_style(("sans-serif", 14))
            .x_desc(&plot.x_label)
            .y_desc(&plot.y_label)
            .y_labels(6)
            .x_label_formatter(&|x| number(*x))
            .y_label_formatter(&|y| number(value(*y)))
            .draw()
            .map_err(|error| failed(&error))?;
        for (index, (name, begin)) in plot.parts.iter().enumerate() {
            if index > 0 {
                let line = [(*begin, y_low), (*begin, y_high)];
                let dashes = DashedLineSeries::new(line, 4, 4, BLACK.mix(0.6).stroke_width(1));
                chart.draw_series(dashes).map_err(|error| failed(&error))?;
            }
            let height = y_high - (y_high - y_low) * 0.02;
            let left = begin.max(x_low) + (x_high - x_low) * 0.008;
            let label = Text::new(name.clone(), (left, height), ("sans-serif", 13));
            chart.draw_series([label]).map_err(|error| failed(&error))?;
        }
        for (index, curve) in plot.curves.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let width = if curve.stroke == Stroke::Thin { 1 } else { 2 };
            for piece in curve.points.split(|point| !finite(point)).filter(|piece| !piece.is_empty()) {
                let points: Vec<(f64, f64)> = piece.iter().map(|&(x, y)| (x, place(y))).collect();
                if curve.stroke == Stroke::Marked || points.len() == 1 {
                    let marks = points.iter().map(|&point| Circle::new(point, 3, colour.filled()));
                    chart.draw_series(marks).map_err(|error| failed(&error))?;
                }
                chart
                    .draw_series(LineSeries::new(points, colour.stroke_width(width)))
                    .map_err(|error| failed(&error))?;
            }
        }
        area.present().map_err(|error| failed(&error))?;
    }
    Ok(drawing)
}

/// Least and greatest value with a little room; something sensible when there is none.
fn span(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) =
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
    if low > high {
        return (0.0, 1.0);
    }
    let room = if high > low { (high - low) * 0.03 } else { high.abs().max(1.0) * 0.1 };
    (low - room, high + room)
}

/// A number as short as its size allows.
pub(super) fn number(value: f64) -> String {
    let size = value.abs();
    // Axis marks that should be zero carry the rounding of their neighbours.
    if size < 1e-15 || (0.01..1e5).contains(&size) {
        let text = format!("{value:.3}");
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        format!("{value:.1e}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot(curves: Vec<Curve>) -> Plot {
        let part = |name: &str, begin: f64| (name.to_owned(), begin);
        let parts = vec![part("stage 1", 0.0), part("stage 2", 2.0)];
        let (title, x_label, y_label) = ("loss".to_owned(), "x".to_owned(), "y".to_owned());
        Plot { title, x_label, y_label, may_be_logarithmic: true, curves, parts }
    }

    #[test]
    fn curves_have_points_that_are_numbers_and_stages_their_boundaries() {
        let points = vec![(1.0, 10.0), (2.0, f64::NAN), (3.0, 0.1)];
        let drawn = draw(&plot(vec![Curve { name: "run".into(), points, stroke: Stroke::Marked }])).unwrap();
        assert!(drawn.contains("<polyline") && drawn.contains("viewBox"), "{drawn}");
        assert_eq!(drawn.matches("<circle").count(), 2);
        assert!(drawn.contains("stage 1") && drawn.contains("stage 2") && !drawn.contains("NaN"), "{drawn}");
    }

    #[test]
    fn nothing_to_draw_is_an_empty_plot() {
        assert!(draw(&plot(Vec::new())).unwrap().contains("<svg "));
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(
            ["0", "2.5", "1200", "1.0e-4", "2.0e6"],
            [0.0, 2.5, 1200.0, 1e-4, 2e6].map(number).each_ref().map(String::as_str)
        );
    }
}
