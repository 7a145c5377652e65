//! The curves and events of a run so far, thinned out for the dashboard.

use crate::limits::{DASHBOARD_EVENTS_MAX, DASHBOARD_POINTS_MAX};
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use volary_storage::RunDir;

/// The curves and events of a run.
pub(super) fn history(dir: &RunDir) -> Value {
    serde_json::json!({
        "steps": thinned(&dir.metrics()),
        "validation": thinned(&dir.validation()),
        "events": last(&dir.events(), DASHBOARD_EVENTS_MAX),
    })
}

fn lines(path: &Path) -> impl Iterator<Item = String> {
    File::open(path).ok().into_iter().flat_map(|file| BufReader::new(file).lines().map_while(Result::ok))
}

fn parsed<'a>(lines: impl Iterator<Item = &'a String>) -> Vec<Value> {
    lines.filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Every n-th line and the last one, with the smallest power of two n that leaves at most
/// [`DASHBOARD_POINTS_MAX`].
fn thinned(path: &Path) -> Vec<Value> {
    let (mut kept, mut every, mut newest) = (Vec::new(), 1, None);
    for (index, line) in lines(path).enumerate() {
        if index % every == 0 {
            kept.push(line);
            newest = None;
        } else {
            newest = Some(line);
        }
        if kept.len() > DASHBOARD_POINTS_MAX {
            every *= 2;
            let mut index = 0;
            kept.retain(|_| {
                index += 1;
                index % 2 == 1
            });
        }
    }
    kept.extend(newest);
    parsed(kept.iter())
}

fn last(path: &Path, most: usize) -> Vec<Value> {
    let mut kept = std::collections::VecDeque::new();
    for line in lines(path) {
        kept.push_back(line);
        if kept.len() > most {
            kept.pop_front();
        }
    }
    parsed(kept.iter())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_curve_is_thinned_evenly_and_keeps_its_ends() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("metrics.jsonl");
        let text: String = (1..=10_001).map(|step| format!("{{\"step\":{step}}}\n")).collect();
        std::fs::write(&path, text).unwrap();
        let steps: Vec<u64> = thinned(&path).iter().map(|line| line["step"].as_u64().unwrap()).collect();
        assert!(
            steps.len() <= DASHBOARD_POINTS_MAX + 1 && steps.len() > DASHBOARD_POINTS_MAX / 2,
            "{}",
            steps.len()
        );
        assert_eq!((steps[0], *steps.last().unwrap()), (1, 10_001));
        assert!(steps.windows(2).take(steps.len() - 2).all(|pair| pair[1] - pair[0] == 8));
        assert_eq!(last(&path, 3).len(), 3);
    }
}
