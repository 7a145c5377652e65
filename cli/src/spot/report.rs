//! The goodput of a run on a spot market.

use crate::limits::SPOT_SAMPLE;
use anyhow::{Context, anyhow};
use plotters::prelude::*;
use serde::Serialize;
use std::fmt;
use std::path::Path;
use std::time::Duration;

/// A color, and what it draws.
type Curve = (RGBColor, fn(&Sample) -> f64);

/// A moment of the replay.
#[derive(Clone, Copy, Debug, Serialize)]
struct Sample {
    /// Seconds since the trace began.
    at_s: f64,
    /// Nodes that were available.
    nodes: usize,
    /// Lane-steps committed until then.
    committed: f64,
    /// Lane-steps that an undisturbed run would have committed until then.
    undisturbed: f64,
    /// Seconds since the last commit, while there were nodes.
    stalled_s: f64,
}

/// What was committed while a trace was played, and what an undisturbed run would have.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Lane-steps that were committed; those that ran again after the run went back count once.
    pub committed: f64,
    /// The lane-steps of undisturbed runs with the nodes that were available at each time.
    pub undisturbed: f64,
    /// Seconds of available nodes.
    pub node_seconds: f64,
    /// Steps that the run went back.
    pub lost_steps: u64,
    /// The longest time without a commit while nodes were available, in seconds.
    pub worst_stall_s: f64,
    samples: Vec<Sample>,
}

impl Report {
    /// Committed lane-steps over those of an undisturbed run with the same nodes.
    #[must_use]
    pub fn goodput(&self) -> f64 {
        self.committed / self.undisturbed.max(f64::MIN_POSITIVE)
    }

    /// Some lane-steps are committed.
    pub(super) fn committed(&mut self, at: Duration, lane_steps: f64) {
        self.committed += lane_steps;
        self.sample(at, self.samples.last().map_or(0, |last| last.nodes), 0.0);
    }

    /// Time has passed, with nodes of which an undisturbed run commits `rate` lane-steps per second.
    pub(super) fn passed(
        &mut self,
        at: Duration,
        time: Duration,
        nodes: usize,
        rate: f64,
        stalled: Duration,
    ) {
        self.node_seconds += nodes as f64 * time.as_secs_f64();
        self.undisturbed += rate * time.as_secs_f64();
        self.worst_stall_s = self.worst_stall_s.max(stalled.as_secs_f64());
        let is_due =
            |last: &Sample| last.nodes != nodes || at.as_secs_f64() >= last.at_s + SPOT_SAMPLE.as_secs_f64();
        if self.samples.last().is_none_or(is_due) {
            self.sample(at, nodes, stalled.as_secs_f64());
        }
    }

    fn sample(&mut self, at: Duration, nodes: usize, stalled_s: f64) {
        let (committed, undisturbed) = (self.committed, self.undisturbed);
        self.samples.push(Sample { at_s: at.as_secs_f64(), nodes, committed, undisturbed, stalled_s });
    }

    /// Writes `spot.json` and `spot.svg` into a folder.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write(&self, folder: &Path) -> anyhow::Result<()> {
        let json = folder.join("spot.json");
        let text = serde_json::to_string_pretty(self)?;
        std::fs::write(&json, text).with_context(|| json.display().to_string())?;
        let svg = folder.join("spot.svg");
        self.draw(&svg).with_context(|| svg.display().to_string())
    }

    /// Available nodes, committed and undisturbed lane-steps, and stalls over time.
    fn draw(&self, path: &Path) -> anyhow::Result<()> {
        let area = SVGBackend::new(path, (960, 720)).into_drawing_area();
        area.fill(&WHITE).map_err(failed)?;
        let panels = area.split_evenly((3, 1));
        let lines: [(&str, &[Curve]); 3] = [
            ("available nodes", &[(BLACK, |sample| sample.nodes as f64)]),
            (
                "lane-steps: committed, and undisturbed (gray)",
                &[(RGBColor(150, 150, 150), |sample| sample.undisturbed), (BLUE, |sample| sample.committed)],
            ),
            ("seconds since the last commit", &[(RED, |sample| sample.stalled_s)]),
        ];
        let end = self.samples.last().map_or(1.0, |last| last.at_s.max(1.0));
        for (panel, (title, curves)) in panels.iter().zip(lines) {
            let values = curves.iter().flat_map(|(_, of)| self.samples.iter().map(of));
            let most = values.fold(1.0, f64::max) * 1.05;
            let mut chart = ChartBuilder::on(panel)
                .caption(title, ("sans-serif", 18))
                .margin(12)
                .x_label_area_size(28)
                .y_label_area_size(60)
                .build_cartesian_2d(0.0..end, 0.0..most)
                .map_err(failed)?;
            chart.configure_mesh().x_desc("seconds").draw().map_err(failed)?;
            for (color, of) in curves {
                let points = steps(self.samples.iter().map(|sample| (sample.at_s, of(sample))));
                chart.draw_series(LineSeries::new(points, color.stroke_width(2))).map_err(failed)?;
            }
        }
        area.present().map_err(failed)
    }
}

/// Points of a line that keeps its value until the next one.
fn steps(points: impl Iterator<Item = (f64, f64)>) -> Vec<(f64, f64)> {
    let mut line: Vec<(f64, f64)> = Vec::new();
    for (x, y) in points {
        line.extend(line.last().map(|(_, before)| (x, *before)));
        line.push((x, y));
    }
    line
}

fn failed(error: impl fmt::Display) -> anyhow::Error {
    anyhow!("the picture cannot be drawn: {error}")
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "goodput: {:.3} ({:.0} lane-steps committed, {:.0} by an undisturbed run on the same nodes, {:.0} \
             node-seconds)",
            self.goodput(),
            self.committed,
            self.undisturbed,
            self.node_seconds
        )?;
        writeln!(f, "steps lost: {}; worst stall: {:.1} s", self.lost_steps, self.worst_stall_s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_written_as_json_and_as_a_picture() {
        let mut report = Report::default();
        for second in 1..=20u64 {
            let nodes = usize::from(second < 10) + 1;
            report.passed(Duration::from_secs(second), Duration::from_secs(1), nodes, 2.0, Duration::ZERO);
            report.committed(Duration::from_secs(second), 1.0);
        }
        let folder = tempfile::tempdir().unwrap();
        report.write(folder.path()).unwrap();
        let json = std::fs::read_to_string(folder.path().join("spot.json")).unwrap();
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!((json["committed"].as_f64(), json["node_seconds"].as_f64()), (Some(20.0), Some(29.0)));
        assert!(json["samples"].as_array().is_some_and(|samples| samples.len() >= 20));
        let svg = std::fs::read_to_string(folder.path().join("spot.svg")).unwrap();
        assert!(svg.contains("available nodes") && svg.matches("<polyline").count() >= 4, "{svg}");
        assert!(report.to_string().contains("goodput: 0.500"), "{report}");
    }
}
