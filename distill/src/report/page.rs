//! One self-contained HTML page: text, tables and drawings, nothing fetched from anywhere.

use std::fmt::Write as _;

use super::plot::COLOURS;

/// A table: a header and rows of the same number of cells.
#[derive(Clone, Debug)]
pub(super) struct Table {
    /// What it shows.
    pub caption: String,
    /// Names of the columns.
    pub header: Vec<String>,
    /// Cells, row by row.
    pub rows: Vec<Vec<String>>,
    /// Whether cells hold text, which wraps, and not numbers, which line up at the right.
    pub prose: bool,
}

/// A page under construction.
#[derive(Debug)]
pub(super) struct Page {
    title: String,
    body: String,
}

impl Page {
    /// A page with a heading and a line under it.
    pub fn new(title: &str, subtitle: &str) -> Self {
        let body = format!("<header><h1>{}</h1><p>{}</p></header>\n", escape(title), escape(subtitle));
        Self { title: title.to_owned(), body }
    }

    /// A section's heading.
    pub fn heading(&mut self, text: &str) {
        let _ = writeln!(self.body, "<h2>{}</h2>", escape(text));
    }

    /// A heading in a section.
    pub fn subheading(&mut self, text: &str) {
        let _ = writeln!(self.body, "<h3>{}</h3>", escape(text));
    }

    /// A paragraph of plain text.
    pub fn paragraph(&mut self, text: &str) {
        let _ = writeln!(self.body, "<p>{}</p>", escape(text));
    }

    /// Text as it is, in a fixed-width face, to be opened.
    pub fn folded(&mut self, summary: &str, text: &str) {
        let _ = writeln!(
            self.body,
            "<details><summary>{}</summary><pre tabindex=\"0\">{}</pre></details>",
            escape(summary),
            escape(text)
        );
    }

    /// A table, to be opened.
    pub fn folded_table(&mut self, summary: &str, table: &Table) {
        let _ = writeln!(self.body, "<details><summary>{}</summary>", escape(summary));
        self.table(table);
        let _ = writeln!(self.body, "</details>");
    }

    /// The few numbers that one looks for first: what, value, and a word on it.
    pub fn figures(&mut self, figures: &[(String, String, String)]) {
        let _ = writeln!(self.body, "<dl class=\"figures\">");
        for (what, value, remark) in figures {
            let (what, value, remark) = (escape(what), escape(value), escape(remark));
            let _ = writeln!(self.body, "<div><dt>{what}</dt><dd><b>{value}</b><span>{remark}</span></dd></div>");
        }
        let _ = writeln!(self.body, "</dl>");
    }

    /// A row of boxes for every row, a box per layer: attention, Mamba since this row, Mamba since an earlier one.
    pub fn layer_map(&mut self, layers: usize, rows: &[(String, Vec<usize>, Vec<usize>)]) {
        let _ = writeln!(
            self.body,
            "<figure><div class=\"scroll\" tabindex=\"0\" role=\"group\" aria-label=\"Mixers by layer\"><table \
             class=\"layers\"><caption>Mixers by layer</caption><tbody>"
        );
        for (name, mamba, new) in rows {
            let _ = write!(self.body, "<tr><th scope=\"row\">{}</th>", escape(name));
            for layer in 0..layers {
                let (class, what) = if new.contains(&layer) {
                    ("new", "Mamba, new")
                } else if mamba.contains(&layer) {
                    ("mamba", "Mamba")
                } else {
                    ("attention", "attention")
                };
                let _ = write!(self.body, "<td class=\"{class}\" title=\"layer {layer}: {what}\">{layer}</td>");
            }
            let _ = writeln!(self.body, "</tr>");
        }
        let _ = writeln!(
            self.body,
            "</tbody></table></div><figcaption class=\"layers\"><span class=\"attention\">attention</span><span \
             class=\"new\">becomes Mamba</span><span class=\"mamba\">Mamba before</span></figcaption></figure>"
        );
    }

    /// A table.
    pub fn table(&mut self, table: &Table) {
        let header: String =
            table.header.iter().map(|cell| format!("<th scope=\"col\">{}</th>", escape(cell))).collect();
        let row = |row: &Vec<String>| -> String {
            let cells = row.iter().enumerate().map(|(column, cell)| match column {
                0 => format!("<th scope=\"row\">{}</th>", escape(cell)),
                _ => format!("<td>{}</td>", escape(cell)),
            });
            format!("<tr>{}</tr>\n", cells.collect::<String>())
        };
        let rows: String = table.rows.iter().map(row).collect();
        let class = if table.prose { " class=\"prose\"" } else { "" };
        let caption = escape(&table.caption);
        let _ = writeln!(
            self.body,
            "<div class=\"scroll\" tabindex=\"0\" role=\"group\" aria-label=\"{caption}\"><table{class}><caption>{caption}\
             </caption><thead><tr>{header}</tr></thead><tbody>\n{rows}</tbody></table></div>"
        );
    }

    /// A drawing of ours (SVG, written into the page as it is) with what it shows and the names of its curves.
    pub fn drawing(&mut self, title: &str, svg: &str, legend: &[&str]) {
        let title = escape(title);
        // A width and a height would keep it from shrinking; a name is what those hear who do not see it.
        let (tag, rest) = svg.split_once('>').unwrap_or(("<svg", ""));
        let attributes = tag.split(" viewBox=").nth(1).unwrap_or_default();
        let _ = write!(
            self.body,
            "<figure><figcaption>{title}</figcaption><div class=\"scroll\" tabindex=\"0\" role=\"group\" \
             aria-label=\"{title}\">\n<svg role=\"img\" aria-label=\"{title}\" viewBox={attributes}><title>{title}\
             </title>{rest}</div>"
        );
        if !legend.is_empty() {
            let _ = write!(self.body, "<ul class=\"legend\">");
            for (index, name) in legend.iter().enumerate() {
                let plotters::style::RGBColor(red, green, blue) = COLOURS[index % COLOURS.len()];
                let _ = write!(
                    self.body,
                    "<li><span style=\"background:#{red:02x}{green:02x}{blue:02x}\"></span>{}</li>",
                    escape(name)
                );
            }
            let _ = write!(self.body, "</ul>");
        }
        let _ = writeln!(self.body, "</figure>");
    }

    /// The finished page. Its policy forbids scripts and the network, whatever a file that it shows may hold.
    pub fn finish(self) -> String {
        format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
             <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <meta name=\"color-scheme\" content=\"light dark\">\n<title>{}</title>\n\
             <style>\n{STYLE}</style></head>\n<body><main>\n{}</main></body></html>\n",
            escape(&self.title),
            self.body
        )
    }
}

const STYLE: &str = include_str!("style.css");

/// Text as HTML that shows it.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            // Control characters have no place in HTML.
            other if other.is_control() && !matches!(other, '\n' | '\t') => escaped.push('\u{fffd}'),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_comes_in_is_shown_and_not_obeyed() {
        let bad = "</title><script>alert('x')</script>\" onload=\"x\" & \u{0}";
        let cell = || bad.to_owned();
        let mut page = Page::new(bad, bad);
        page.heading(bad);
        page.subheading(bad);
        page.paragraph(bad);
        page.folded(bad, bad);
        page.figures(&[(cell(), cell(), cell())]);
        page.layer_map(1, &[(cell(), Vec::new(), Vec::new())]);
        let table = Table { caption: cell(), header: vec![cell()], rows: vec![vec![cell(), cell()]], prose: true };
        page.table(&table);
        page.folded_table(bad, &table);
        page.drawing(bad, "<svg width=\"1\" height=\"1\" viewBox=\"0 0 1 1\"><rect/></svg>", &[bad]);
        let html = page.finish();
        assert!(!html.contains("<script") && !html.contains("\" onload") && !html.contains('\u{0}'), "{html}");
        assert_eq!(html.matches("&lt;script&gt;").count(), 28, "every place shows it");
        assert!(html.contains("<svg role=\"img\"") && html.contains("viewBox=\"0 0 1 1\"><title>"), "{html}");
    }
}
