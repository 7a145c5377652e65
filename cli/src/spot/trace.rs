//! A trace of available instances: `time,instances` lines, in which a number holds until the next line.

use crate::limits::SPOT_POINTS_MAX;
use anyhow::{Context, bail};
use std::path::Path;
use std::time::Duration;

/// The unit of a trace's times.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Unit {
    /// Seconds.
    #[default]
    Seconds,
    /// Hours.
    Hours,
}

/// The nodes over time, from the first instance on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// Each change: the time since the start, and the nodes from then on. The first is at 0.
    changes: Vec<(Duration, usize)>,
    /// The time of the last line.
    end: Duration,
}

impl Trace {
    /// Reads a trace, `speedup` times as fast, with its largest number as `nodes_max` nodes.
    ///
    /// # Errors
    /// One line that names the file, the line and what was expected.
    pub fn load(path: &Path, unit: Unit, speedup: f64, nodes_max: usize) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("trace {}", path.display()))?;
        Self::parse(&text, unit, speedup, nodes_max).with_context(|| format!("trace {}", path.display()))
    }

    fn parse(text: &str, unit: Unit, speedup: f64, nodes_max: usize) -> anyhow::Result<Self> {
        let second = match unit {
            Unit::Seconds => 1.0,
            Unit::Hours => 3_600.0,
        } / speedup;
        let mut reader = csv::ReaderBuilder::new().has_headers(false).from_reader(text.as_bytes());
        let mut points: Vec<(f64, usize)> = Vec::new();
        for (number, line) in reader.deserialize().enumerate() {
            let number = number + 1;
            let (time, instances): (f64, usize) =
                line.with_context(|| format!("line {number}: expected a time and a number of instances"))?;
            let before = points.last().map_or(0.0, |(time, _)| *time);
            if !(time.is_finite() && time >= before) {
                bail!("line {number}: time {time}: expected a number that is not below {before}");
            }
            if number > SPOT_POINTS_MAX {
                bail!("line {number}: expected at most {SPOT_POINTS_MAX} lines");
            }
            points.push((time, instances));
        }
        let most = points.iter().map(|(_, instances)| *instances).max().unwrap_or(0);
        let Some(start) = points.iter().find(|(_, instances)| *instances > 0).map(|(time, _)| *time) else {
            bail!("expected a line with at least one instance");
        };
        // What there is stays at least one node.
        let scaled = |instances: usize| (instances * nodes_max).div_ceil(most);
        let at = |time: f64| Duration::from_secs_f64((time - start).max(0.0) * second);
        let mut changes: Vec<(Duration, usize)> = Vec::new();
        for (time, instances) in points.iter().filter(|(time, _)| *time >= start) {
            let (time, nodes) = (at(*time), scaled(*instances));
            // Of several lines at one time the last one holds.
            changes.pop_if(|(before, _)| *before == time);
            if changes.last().is_none_or(|(_, before)| *before != nodes) {
                changes.push((time, nodes));
            }
        }
        let end = points.last().map_or(Duration::ZERO, |(time, _)| at(*time));
        Ok(Self { changes, end })
    }

    /// The nodes at a time.
    #[must_use]
    pub fn nodes_at(&self, time: Duration) -> usize {
        self.changes.iter().take_while(|(at, _)| *at <= time).last().map_or(0, |(_, nodes)| *nodes)
    }

    /// The least number of nodes within a time and `notice` later: what stays is not noticed.
    #[must_use]
    pub fn nodes_until(&self, time: Duration, notice: Duration) -> usize {
        let soon = self.changes.iter().filter(|(at, _)| (time..=time + notice).contains(at));
        soon.map(|(_, nodes)| *nodes).chain([self.nodes_at(time)]).min().unwrap_or(0)
    }

    /// The time of its last line.
    #[must_use]
    pub fn end(&self) -> Duration {
        self.end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_trace_begins_with_its_first_instance_and_is_scaled_in_time_and_number() {
        let text = "0,0\n100,0\n100,4\n120,12\n140,1\n160,0\n180,7\n";
        let trace = Trace::parse(text, Unit::Seconds, 10.0, 3).unwrap();
        let nodes: Vec<usize> = (0..10).map(|second| trace.nodes_at(seconds(second))).collect();
        assert_eq!(nodes, [1, 1, 3, 3, 1, 1, 0, 0, 2, 2]);
        assert_eq!(trace.end(), seconds(8));
        assert_eq!(trace.nodes_until(seconds(2), seconds(1)), 3);
        assert_eq!(trace.nodes_until(seconds(2), seconds(2)), 1);
        assert_eq!(trace.nodes_until(seconds(2), seconds(20)), 0);
        let hours = Trace::parse("0.0,1\n0.5,2", Unit::Hours, 100.0, 2).unwrap();
        assert_eq!((hours.nodes_at(seconds(17)), hours.nodes_at(seconds(18))), (1, 2));
    }

    #[test]
    fn a_trace_that_cannot_be_names_the_line() {
        for (text, expected) in [
            ("", "at least one instance"),
            ("0,0\n5,0", "at least one instance"),
            ("0,1\nfive,2", "line 2: expected a time"),
            ("0,1\n1,-2", "line 2: expected a time"),
            ("0,1\n1", "line 2: expected a time"),
            ("3,1\n1,2", "line 2: time 1: expected a number that is not below 3"),
            ("NaN,1", "line 1: time NaN"),
        ] {
            let error = Trace::parse(text, Unit::Seconds, 1.0, 2).unwrap_err();
            assert!(format!("{error:#}").contains(expected), "{text:?}: {error:#}");
        }
    }
}
