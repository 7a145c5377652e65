//! Renders stored traces: as a tree for terminals, as a file for Perfetto, as a web page.

mod chrome;
mod html;
mod text;
mod token;

pub use chrome::chrome;
pub use html::html;
pub use text::{list, tree};
pub use token::{LayerVisit, RoutedExpert, TokenPath, paths_as_text, token_paths};

/// A duration with three digits: `950 ns`, `12.3 µs`, `4.56 ms`, `1.23 s`.
#[must_use]
pub fn duration(nanoseconds: u64) -> String {
    let n = nanoseconds as f64;
    match nanoseconds {
        0..1_000 => format!("{nanoseconds} ns"),
        1_000..1_000_000 => format!("{:.1} µs", n / 1e3),
        1_000_000..1_000_000_000 => format!("{:.2} ms", n / 1e6),
        _ => format!("{:.2} s", n / 1e9),
    }
}

/// A value without the quotes of JSON.
fn plain(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::String(text) => text.clone(),
        serde_json::Value::Number(number) if number.is_f64() => {
            format!("{:.4}", number.as_f64().unwrap_or_default())
        }
        serde_json::Value::Array(values) => values.iter().map(plain).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use crate::record::{Attributes, SpanRecord};
    use crate::store::Trace;
    use serde_json::{Value, json};

    fn span(
        id: u8,
        parent: Option<u8>,
        name: &str,
        process: &str,
        times: (u64, u64),
        attributes: Value,
    ) -> SpanRecord {
        let attributes: Attributes = serde_json::from_value(attributes).unwrap();
        SpanRecord {
            trace: format!("{:032x}", 1),
            span: format!("{id:016x}"),
            parent: parent.map(|parent| format!("{parent:016x}")),
            name: name.into(),
            kind: "internal".into(),
            process: process.into(),
            start_ns: 1_000_000 + times.0 * 1000,
            duration_ns: times.1 * 1000,
            attributes,
            events: Vec::new(),
            links: Vec::new(),
            error: None,
        }
    }

    /// A step with one lane on `node-1`, whose sampled token goes to experts on both nodes.
    pub(crate) fn step() -> Trace {
        let visit = |layer, experts: [i64; 2], nodes: [&str; 2], weights: [f64; 2], dropped: Value| {
            json!({
                "volary.lane": 0, "volary.layer": layer, "volary.token.text": " the", "volary.token.id": 262,
                "volary.token.position": 5, "volary.expert.first": experts[0], "volary.expert.second": experts[1],
                "volary.expert.first_node": nodes[0], "volary.expert.second_node": nodes[1],
                "volary.gate.first": weights[0], "volary.gate.second": weights[1], "volary.token.dropped": dropped,
            })
        };
        let lane = json!({"volary.step": 50, "volary.lane": 0});
        let dispatch = json!({"volary.layer": 0, "volary.node": "node-2", "volary.wire_us": 7});
        let expert = json!({"volary.layer": 0, "volary.queue_us": 1, "volary.compute_us": 9});
        Trace {
            spans: vec![
                span(0, None, "step", "supervisor", (0, 100), json!({"volary.step": 50, "volary.epoch": 2})),
                span(1, Some(0), "lane", "node-1", (5, 80), lane),
                span(2, Some(1), "router.dispatch", "node-1", (10, 30), dispatch),
                span(3, Some(2), "expert.forward", "node-2", (15, 10), expert),
                span(
                    4,
                    Some(1),
                    "token",
                    "node-1",
                    (10, 1),
                    visit(0, [3, 1], ["node-1", "node-2"], [0.75, 0.25], json!([])),
                ),
                span(
                    5,
                    Some(1),
                    "token",
                    "node-1",
                    (50, 1),
                    visit(2, [0, 2], ["node-2", "node-1"], [0.5, 0.5], json!(["second"])),
                ),
            ],
        }
    }
}
