//! One self-contained HTML page: text, tables and curves, nothing fetched from anywhere.

use std::fmt::Write as _;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

/// A line of a plot.
#[derive(Clone, Debug)]
pub struct Curve {
    /// Its name in the legend.
    pub name: String,
    /// (x, y) in order of x. Points that are not finite are left out.
    pub points: Vec<(f64, f64)>,
}

/// A plot with one or more curves.
#[derive(Clone, Debug)]
pub struct Plot {
    /// Above the plot.
    pub title: String,
    /// Under the x axis.
    pub x_label: String,
    /// Beside the y axis.
    pub y_label: String,
    /// Whether y is logarithmic; values that are not positive are left out.
    pub logarithmic: bool,
    /// The curves.
    pub curves: Vec<Curve>,
}

/// A table: a header and rows of the same number of cells.
#[derive(Clone, Debug)]
pub struct Table {
    /// Names of the columns.
    pub header: Vec<String>,
    /// Cells, row by row.
    pub rows: Vec<Vec<String>>,
}

/// A page under construction.
#[derive(Debug)]
pub struct Page {
    title: String,
    body: String,
}

const COLOURS: [RGBColor; 6] = [
    RGBColor(31, 119, 180),
    RGBColor(214, 95, 14),
    RGBColor(44, 140, 60),
    RGBColor(148, 60, 160),
    RGBColor(120, 90, 60),
    RGBColor(90, 90, 90),
];

impl Page {
    /// A page with a heading.
    pub fn new(title: &str) -> Self {
        Self { title: title.to_owned(), body: format!("<h1>{}</h1>\n", escape(title)) }
    }

    /// A section's heading.
    pub fn heading(&mut self, text: &str) {
        let _ = writeln!(self.body, "<h2>{}</h2>", escape(text));
    }

    /// A paragraph of plain text.
    pub fn paragraph(&mut self, text: &str) {
        let _ = writeln!(self.body, "<p>{}</p>", escape(text));
    }

    /// Text as it is, in a fixed-width face: configurations, samples.
    pub fn preformatted(&mut self, text: &str) {
        let _ = writeln!(self.body, "<pre>{}</pre>", escape(text));
    }

    /// A table; numbers are aligned to the right from the second column on.
    pub fn table(&mut self, table: &Table) {
        let cells = |tag: &str, row: &[String]| -> String {
            row.iter().map(|cell| format!("<{tag}>{}</{tag}>", escape(cell))).collect()
        };
        let rows: String = table.rows.iter().map(|row| format!("<tr>{}</tr>\n", cells("td", row))).collect();
        let _ = writeln!(
            self.body,
            "<div class=\"wide\"><table><thead><tr>{}</tr></thead><tbody>\n{rows}</tbody></table></div>",
            cells("th", &table.header)
        );
    }

    /// A plot as inline SVG.
    ///
    /// # Errors
    /// When the plot cannot be drawn.
    pub fn plot(&mut self, plot: &Plot) -> Result<()> {
        let drawing = draw(plot)?;
        let _ = writeln!(self.body, "<figure>{drawing}</figure>");
        Ok(())
    }

    /// The finished page.
    pub fn finish(self) -> String {
        format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{}</title>\n\
             <style>{STYLE}</style></head>\n<body><main>\n{}</main></body></html>\n",
            escape(&self.title),
            self.body
        )
    }
}

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;margin:0;color:#222;background:#fff}\
main{max-width:52rem;margin:0 auto;padding:1rem}h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2rem}\
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%}th,td{padding:.35rem .6rem;border-bottom:1px solid #ddd;\
text-align:right;white-space:nowrap}th{white-space:normal;vertical-align:bottom}th:first-child,td:first-child{text-align:left}\
pre{background:#f5f5f5;padding:.8rem;overflow-x:auto;font-size:.85rem}figure{margin:1rem 0}\
svg{width:100%;height:auto}";

fn draw(plot: &Plot) -> Result<String> {
    let shown =
        |point: &&(f64, f64)| point.0.is_finite() && point.1.is_finite() && (!plot.logarithmic || point.1 > 0.0);
    let place = |y: f64| if plot.logarithmic { y.log10() } else { y };
    let curves: Vec<(&str, Vec<(f64, f64)>)> = plot
        .curves
        .iter()
        .map(|curve| {
            let points = curve.points.iter().filter(shown).map(|&(x, y)| (x, place(y))).collect();
            (curve.name.as_str(), points)
        })
        .collect();
    let all = || curves.iter().flat_map(|(_, points)| points);
    let (x_low, x_high) = span(all().map(|point| point.0));
    let (y_low, y_high) = span(all().map(|point| point.1));
    let mut drawing = String::new();
    {
        let area = SVGBackend::with_string(&mut drawing, (860, 420)).into_drawing_area();
        let failed = |error: &dyn std::fmt::Display| anyhow!("drawing \"{}\": {error}", plot.title);
        area.fill(&WHITE).map_err(|error| failed(&error))?;
        let mut chart = ChartBuilder::on(&area)
            .caption(&plot.title, ("sans-serif", 20))
            .margin(12)
            .x_label_area_size(44)
            .y_label_area_size(64)
            .build_cartesian_2d(x_low..x_high, y_low..y_high)
            .map_err(|error| failed(&error))?;
        let logarithmic = plot.logarithmic;
        chart
            .configure_mesh()
            .light_line_style(RGBColor(240, 240, 240))
            .x_desc(&plot.x_label)
            .y_desc(&plot.y_label)
            .x_label_formatter(&|x| number(*x))
            .y_label_formatter(&move |y| number(if logarithmic { 10f64.powf(*y) } else { *y }))
            .draw()
            .map_err(|error| failed(&error))?;
        for (index, (name, points)) in curves.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            chart
                .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))
                .map_err(|error| failed(&error))?
                .label(*name)
                .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 18, y)], colour.stroke_width(2)));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerLeft)
            .background_style(WHITE.mix(0.85))
            .border_style(RGBColor(200, 200, 200))
            .draw()
            .map_err(|error| failed(&error))?;
        area.present().map_err(|error| failed(&error))?;
    }
    // Fixed width and height would keep the drawing from shrinking on a phone.
    Ok(drawing.replacen("<svg width=\"860\" height=\"420\" ", "<svg ", 1))
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
fn number(value: f64) -> String {
    let size = value.abs();
    // Axis marks that should be zero carry the rounding of their neighbours.
    if size < 1e-15 || (0.01..1e5).contains(&size) {
        let text = format!("{value:.3}");
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        format!("{value:.1e}")
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_holds_its_plot_and_escapes_its_text() {
        let mut page = Page::new("a < b");
        page.table(&Table { header: vec!["x".into()], rows: vec![vec!["<script>".into()]] });
        let points = vec![(1.0, 10.0), (2.0, f64::NAN), (3.0, 0.1)];
        page.plot(&Plot {
            title: "loss".into(),
            x_label: "step".into(),
            y_label: "nats".into(),
            logarithmic: true,
            curves: vec![Curve { name: "run".into(), points }],
        })
        .unwrap();
        let html = page.finish();
        assert!(html.contains("<svg ") && html.contains("<polyline") && html.contains("viewBox"), "{html}");
        assert!(html.contains("a &lt; b") && !html.contains("<script>"));
        assert!(!html.contains("NaN") && !html.contains("http://www.example") && !html.contains("src="));
    }

    #[test]
    fn nothing_to_draw_is_an_empty_plot() {
        let plot = Plot {
            title: String::new(),
            x_label: String::new(),
            y_label: String::new(),
            logarithmic: false,
            curves: Vec::new(),
        };
        assert!(draw(&plot).unwrap().contains("<svg "));
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(
            ["0", "2.5", "1200", "1.0e-4", "2.0e6"],
            [0.0, 2.5, 1200.0, 1e-4, 2e6].map(number).each_ref().map(String::as_str)
        );
    }
}
