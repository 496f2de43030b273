//! Launches as a trace that Perfetto (ui.perfetto.dev) and chrome://tracing open.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use runtime::LaunchRecord;
use serde_json::json;

/// Writes the launches as trace events: one track for kernels, and one above it per depth of the ranges around them.
///
/// # Errors
/// When the file cannot be written.
pub fn write_trace(path: &Path, launches: &[LaunchRecord]) -> Result<()> {
    let microseconds = |duration: std::time::Duration| duration.as_secs_f64() * 1e6;
    let mut events = Vec::new();
    let depth = launches.iter().map(|launch| launch.ranges.len()).max().unwrap_or(0);
    for track in 0..=depth {
        let name = if track == depth { "kernels".to_owned() } else { format!("ranges, level {track}") };
        events.push(json!({"ph": "M", "name": "thread_name", "pid": 0, "tid": track, "args": {"name": name}}));
    }
    for level in 0..depth {
        // Neighbouring launches with the same names up to this level belong to one range.
        let mut open: Option<(&LaunchRecord, &LaunchRecord)> = None;
        let close = |open: Option<(&LaunchRecord, &LaunchRecord)>, events: &mut Vec<serde_json::Value>| {
            if let Some((first, last)) = open {
                events.push(json!({
                    "ph": "X", "name": &*first.ranges[level], "pid": 0, "tid": level,
                    "ts": microseconds(first.start), "dur": microseconds(last.end().saturating_sub(first.start)),
                }));
            }
        };
        for launch in launches {
            let same = open.is_some_and(|(first, _)| {
                launch.ranges.len() > level && first.ranges[..=level] == launch.ranges[..=level]
            });
            if same {
                open = open.map(|(first, _)| (first, launch));
                continue;
            }
            close(open.take(), &mut events);
            if launch.ranges.len() > level {
                open = Some((launch, launch));
            }
        }
        close(open, &mut events);
    }
    events.extend(launches.iter().map(|launch| {
        json!({
            "ph": "X", "name": &*launch.kernel, "pid": 0, "tid": depth,
            "ts": microseconds(launch.start), "dur": microseconds(launch.duration),
            "args": {
                "grid": launch.grid, "block": launch.block,
                "bytes": launch.work.map(|work| work.bytes), "operations": launch.work.map(|work| work.operations),
            },
        })
    }));
    let text = serde_json::to_string(&json!({ "traceEvents": events, "displayTimeUnit": "ms" }))?;
    fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}
