//! The ways of the tokens that were followed through a step.

use crate::record::SpanRecord;
use crate::store::Trace;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;

/// The way of one token through the MoE layers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TokenWay {
    /// Its lane.
    pub lane: u64,
    /// Its place among the lane's tokens.
    pub position: u64,
    /// What it says.
    pub text: String,
    /// The node that ran its lane.
    pub node: String,
    /// Layer by layer.
    pub visits: Vec<Visit>,
}

/// One MoE layer on the way of a token.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Visit {
    /// The layer.
    pub layer: u64,
    /// First and second choice; the second may be none.
    pub choices: Vec<Choice>,
}

/// An expert that a token was sent to, or was to be sent to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Choice {
    /// The expert.
    pub expert: u64,
    /// Where it lives.
    pub node: String,
    /// What its output was multiplied by.
    pub weight: f64,
    /// Whether the expert had no room for it.
    pub dropped: bool,
}

fn choice(span: &SpanRecord, which: &str) -> Option<Choice> {
    let dropped = span.attributes.get("volary.token.dropped").and_then(|value| value.as_array());
    Some(Choice {
        expert: span.number(&format!("volary.expert.{which}"))?,
        node: span.text(&format!("volary.expert.{which}.node")).unwrap_or_default().to_owned(),
        weight: span.attributes.get(&format!("volary.gate.{which}")).and_then(serde_json::Value::as_f64)?,
        dropped: dropped.is_some_and(|all| all.iter().any(|one| one == which)),
    })
}

/// The ways of all tokens that were followed, by lane and position.
#[must_use]
pub fn token_ways(trace: &Trace) -> Vec<TokenWay> {
    let mut ways: BTreeMap<(u64, u64), TokenWay> = BTreeMap::new();
    for span in trace.spans.iter().filter(|span| span.name == "token") {
        let (Some(lane), Some(position), Some(layer)) =
            (span.number("volary.lane"), span.number("volary.token.position"), span.number("volary.layer"))
        else {
            continue;
        };
        let way = ways.entry((lane, position)).or_insert_with(|| TokenWay {
            lane,
            position,
            text: span.text("volary.token.text").unwrap_or_default().to_owned(),
            node: span.process.clone(),
            visits: Vec::new(),
        });
        let choices = ["first", "second"].into_iter().filter_map(|which| choice(span, which)).collect();
        way.visits.push(Visit { layer, choices });
    }
    let mut ways: Vec<TokenWay> = ways.into_values().collect();
    ways.iter_mut().for_each(|way| way.visits.sort_by_key(|visit| visit.layer));
    ways
}

/// Ways as text: a paragraph per token, a line per layer.
#[must_use]
pub fn ways_as_text(ways: &[TokenWay]) -> String {
    let mut text = String::new();
    for way in ways {
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{:?}  position {} of lane {}, run by {}",
            way.text, way.position, way.lane, way.node
        );
        for visit in &way.visits {
            let choice = |choice: &Choice| {
                let fate = if choice.dropped { " (dropped: no room)" } else { "" };
                format!("expert {} on {} × {:.3}{fate}", choice.expert, choice.node, choice.weight)
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
    fn a_token_is_followed_from_layer_to_layer() {
        let ways = token_ways(&step());
        assert_eq!(ways.len(), 1);
        assert_eq!(
            ways_as_text(&ways),
            "\" the\"  position 5 of lane 0, run by node-1\n\
             \x20 layer   0   expert 3 on node-1 × 0.750  +  expert 1 on node-2 × 0.250\n\
             \x20 layer   2   expert 0 on node-2 × 0.500  +  expert 2 on node-1 × 0.500 (dropped: no room)\n"
        );
    }
}
