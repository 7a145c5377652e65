//! Traces as text.

use super::{duration, plain};
use crate::record::SpanRecord;
use crate::store::Trace;
use std::fmt::Write;

/// Attributes with columns of their own, and those that every span of a lane repeats.
const OMITTED: [&str; 5] =
    ["volary.queue_us", "volary.compute_us", "volary.wire_us", "volary.step", "messaging.system"];

/// One line per trace.
#[must_use]
pub fn list(traces: &[Trace]) -> String {
    let mut text =
        format!("{:>8}  {:<22} {:>10}  {:>5}  {}\n", "step", "trace", "duration", "spans", "attributes");
    for trace in traces {
        let Some(root) = trace.root() else { continue };
        let step = trace.step().map_or_else(|| "-".to_owned(), |step| step.to_string());
        let duration = duration(root.duration_ns);
        let about = about(root);
        // Writing to a string cannot fail.
        let _ =
            writeln!(text, "{step:>8}  {:<22} {duration:>10}  {:>5}  {about}", root.name, trace.spans.len());
    }
    text
}

/// A trace as a tree: each span with its process and duration, and the parts of it in which it was queued for
/// the device, computed, and in transit on the network.
#[must_use]
pub fn tree(trace: &Trace) -> String {
    let mut text = format!("{:>10} {:>10} {:>10} {:>10}\n", "duration", "queue", "compute", "network");
    for top in trace.tops() {
        branch(trace, top, "", "", &mut text);
    }
    text
}

fn branch(trace: &Trace, span: &SpanRecord, first: &str, rest: &str, text: &mut String) {
    let us = |key: &str| span.number(key).map(|us| duration(us * 1000)).unwrap_or_default();
    let line = format!(
        "{:>10} {:>10} {:>10} {:>10}  {first}{}  {}  {}",
        duration(span.duration_ns),
        us("volary.queue_us"),
        us("volary.compute_us"),
        us("volary.wire_us"),
        span.name,
        span.process,
        about(span)
    );
    text.push_str(line.trim_end());
    text.push('\n');
    for event in &span.events {
        let about: Vec<String> = event.attributes.iter().map(|(key, value)| pair(key, value)).collect();
        let _ = writeln!(text, "{:>43}  {rest}· {}  {}", "", event.name, about.join(" "));
    }
    let children: Vec<&SpanRecord> = trace.children(span).collect();
    for (index, child) in children.iter().enumerate() {
        let last = index + 1 == children.len();
        let (turn, line) = if last { ("└─ ", "   ") } else { ("├─ ", "│  ") };
        branch(trace, child, &format!("{rest}{turn}"), &format!("{rest}{line}"), text);
    }
}

fn pair(key: &str, value: &serde_json::Value) -> String {
    let value = plain(value);
    let quoted = value.is_empty() || value.contains(char::is_whitespace);
    let key = key.strip_prefix("volary.").unwrap_or(key);
    if quoted { format!("{key}={value:?}") } else { format!("{key}={value}") }
}

/// The attributes of a span and its failure in one line.
fn about(span: &SpanRecord) -> String {
    let shown = span.attributes.iter().filter(|(key, _)| !OMITTED.contains(&key.as_str()));
    let mut parts: Vec<String> = shown.map(|(key, value)| pair(key, value)).collect();
    parts.extend(span.error.iter().map(|reason| format!("FAILED: {reason}")));
    parts.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::testing::step;

    #[test]
    fn a_tree_shows_the_process_and_the_times_of_each_span() {
        let text = tree(&step());
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[1].ends_with("step  supervisor  epoch=2"), "{text}");
        assert!(lines[2].ends_with("└─ lane  node-1  lane=0"), "{text}");
        assert!(lines[4].ends_with("   │  └─ expert.forward  node-2  layer=0"), "{text}");
        assert!(
            lines[4].contains("10.0 µs") && lines[4].contains("1.0 µs") && lines[4].contains("9.0 µs"),
            "{text}"
        );
        assert!(lines[5].contains("token.text=\" the\""), "{text}");
        assert_eq!(lines.len(), 7);
    }

    #[test]
    fn spans_without_a_stored_parent_are_shown() {
        let mut trace = step();
        trace.spans.remove(1);
        assert_eq!(tree(&trace).lines().count(), 6);
    }
}
