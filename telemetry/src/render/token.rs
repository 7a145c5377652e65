//! The paths of sampled tokens through a step.

use crate::record::SpanRecord;
use crate::store::Trace;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;

/// The path of one token through the MoE layers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TokenPath {
    /// The lane.
    pub lane: u64,
    /// The position among the lane's tokens.
    pub position: u64,
    /// The text.
    pub text: String,
    /// The node that drove the lane.
    pub node: String,
    /// The MoE layers in order.
    pub visits: Vec<LayerVisit>,
}

/// One MoE layer on the path of a token.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerVisit {
    /// The layer.
    pub layer: u64,
    /// The first and, if there was one, the second expert.
    pub choices: Vec<RoutedExpert>,
}

/// An expert to which the gate routed a token.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RoutedExpert {
    /// The expert.
    pub expert: u64,
    /// The node that ran it.
    pub node: String,
    /// The weight of its output, from the gate.
    pub weight: f64,
    /// Whether the token was dropped because the expert was at capacity.
    pub dropped: bool,
}

fn choice(span: &SpanRecord, which: &str) -> Option<RoutedExpert> {
    let dropped = span.attributes.get("volary.token.dropped").and_then(|value| value.as_array());
    Some(RoutedExpert {
        expert: span.number(&format!("volary.expert.{which}"))?,
        node: span.text(&format!("volary.expert.{which}_node")).unwrap_or_default().to_owned(),
        weight: span.attributes.get(&format!("volary.gate.{which}")).and_then(serde_json::Value::as_f64)?,
        dropped: dropped.is_some_and(|all| all.iter().any(|one| one == which)),
    })
}

/// The paths of all sampled tokens, by lane and position.
#[must_use]
pub fn token_paths(trace: &Trace) -> Vec<TokenPath> {
    let mut paths: BTreeMap<(u64, u64), TokenPath> = BTreeMap::new();
    for span in trace.spans.iter().filter(|span| span.name == "token") {
        let (Some(lane), Some(position), Some(layer)) =
            (span.number("volary.lane"), span.number("volary.token.position"), span.number("volary.layer"))
        else {
            continue;
        };
        let path = paths.entry((lane, position)).or_insert_with(|| TokenPath {
            lane,
            position,
            text: span.text("volary.token.text").unwrap_or_default().to_owned(),
            node: span.process.clone(),
            visits: Vec::new(),
        });
        let choices = ["first", "second"].into_iter().filter_map(|which| choice(span, which)).collect();
        path.visits.push(LayerVisit { layer, choices });
    }
    let mut paths: Vec<TokenPath> = paths.into_values().collect();
    paths.iter_mut().for_each(|path| path.visits.sort_by_key(|visit| visit.layer));
    paths
}

/// Paths as text: a paragraph per token, a line per layer.
#[must_use]
pub fn paths_as_text(paths: &[TokenPath]) -> String {
    let mut text = String::new();
    for path in paths {
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{:?}  position {} of lane {}, driven by {}",
            path.text, path.position, path.lane, path.node
        );
        for visit in &path.visits {
            let choice = |choice: &RoutedExpert| {
                let outcome = if choice.dropped { " (dropped: at capacity)" } else { "" };
                format!("expert {} on {} × {:.3}{outcome}", choice.expert, choice.node, choice.weight)
            };
            let choices: Vec<String> = visit.choices.iter().map(choice).collect();
            let _ = writeln!(text, "  layer {:>3}   {}", visit.layer, choices.join("  +  "));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::testing::step;

    #[test]
    fn a_token_path_has_every_layer() {
        let paths = token_paths(&step());
        assert_eq!(paths.len(), 1);
        assert_eq!(
            paths_as_text(&paths),
            "\" the\"  position 5 of lane 0, driven by node-1\n\
             \x20 layer   0   expert 3 on node-1 × 0.750  +  expert 1 on node-2 × 0.250\n\
             \x20 layer   2   expert 0 on node-2 × 0.500  +  expert 2 on node-1 × 0.500 (dropped: at capacity)\n"
        );
    }
}
