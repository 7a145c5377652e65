//! Traces in the format of `chrome://tracing`, which Perfetto opens as well.

use crate::record::SpanRecord;
use crate::store::Trace;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// All traces as one file: a row group per process, a row per level of overlap, and an arrow for each parent
/// in another process.
#[must_use]
pub fn chrome(traces: &[Trace]) -> Value {
    let spans: Vec<&SpanRecord> = traces.iter().flat_map(|trace| &trace.spans).collect();
    let mut processes: BTreeMap<&str, Rows> = BTreeMap::new();
    for span in &spans {
        processes.entry(&span.process).or_default();
    }
    let numbers: BTreeMap<&str, usize> =
        processes.keys().enumerate().map(|(n, &name)| (name, n + 1)).collect();
    let mut sorted = spans.clone();
    sorted.sort_by_key(|span| (span.start_ns, u64::MAX - span.duration_ns));
    let mut places: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    let mut events: Vec<Value> = Vec::new();
    for (name, number) in &numbers {
        events.push(json!({"ph": "M", "name": "process_name", "pid": number, "args": {"name": name}}));
    }
    for span in sorted {
        let row = processes.entry(&span.process).or_default().place(span);
        let pid = numbers[span.process.as_str()];
        places.insert(&span.span, (pid, row));
        let (ts, dur) = (span.start_ns as f64 / 1e3, span.duration_ns as f64 / 1e3);
        events.push(json!({
            "ph": "X", "name": span.name, "cat": span.kind, "pid": pid, "tid": row, "ts": ts, "dur": dur,
            "args": span.attributes,
        }));
    }
    events.extend(arrows(&spans, &places));
    json!({"traceEvents": events, "displayTimeUnit": "ms"})
}

fn arrows(spans: &[&SpanRecord], places: &BTreeMap<&str, (usize, usize)>) -> Vec<Value> {
    let by_id: BTreeMap<&str, &SpanRecord> = spans.iter().map(|span| (span.span.as_str(), *span)).collect();
    let mut arrows = Vec::new();
    for span in spans {
        let parent = span.parent.as_deref().and_then(|parent| by_id.get(parent));
        let Some(parent) = parent.filter(|parent| parent.process != span.process) else { continue };
        for (phase, end, at) in [("s", parent, parent.start_ns), ("f", span, span.start_ns)] {
            let (pid, tid) = places[end.span.as_str()];
            arrows.push(json!({
                "ph": phase, "bp": "e", "name": "parent", "cat": "link", "id": span.span, "pid": pid, "tid": tid,
                "ts": at as f64 / 1e3,
            }));
        }
    }
    arrows
}

/// The rows of a process; the spans of a row are nested or consecutive.
#[derive(Default)]
struct Rows(Vec<Vec<u64>>);

impl Rows {
    /// The first row that fits a span. Spans must come in the order of their starts.
    fn place(&mut self, span: &SpanRecord) -> usize {
        for (number, open) in self.0.iter_mut().enumerate() {
            open.retain(|&end| end > span.start_ns);
            if open.iter().all(|&end| span.end_ns() <= end) {
                open.push(span.end_ns());
                return number;
            }
        }
        self.0.push(vec![span.end_ns()]);
        self.0.len() - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::testing::step;

    #[test]
    fn spans_of_a_row_are_nested_or_consecutive_and_remote_parents_are_arrows() {
        let mut trace = step();
        // Two lanes that overlap without nesting.
        let mut other = trace.spans[1].clone();
        other.span = format!("{:016x}", 9);
        other.start_ns += 40_000;
        trace.spans.push(other);
        let file = chrome(&[trace]);
        let events = file["traceEvents"].as_array().unwrap();
        let spans: Vec<&Value> = events.iter().filter(|event| event["ph"] == "X").collect();
        assert_eq!(spans.len(), 7);
        for a in &spans {
            for b in spans.iter().filter(|b| a["pid"] == b["pid"] && a["tid"] == b["tid"] && *b != a) {
                let times = |e: &Value| {
                    (e["ts"].as_f64().unwrap(), e["ts"].as_f64().unwrap() + e["dur"].as_f64().unwrap())
                };
                let ((a0, a1), (b0, b1)) = (times(a), times(b));
                assert!(a1 <= b0 || b1 <= a0 || (a0 <= b0 && b1 <= a1) || (b0 <= a0 && a1 <= b1), "{a} {b}");
            }
        }
        // supervisor -> node-1 twice, node-1 -> node-2 once.
        assert_eq!(events.iter().filter(|event| event["ph"] == "s").count(), 3);
    }
}
