//! The predicted run as text, section by section.

use super::report::{BestOffer, ClusterPlan, LinkTraffic, MachineLoad, PlacedNode, StageSummary, WhatIf};
use crate::limits::PLAN_LINKS_SHOWN;
use crate::units::{bytes, seconds, short};
use std::cmp::Reverse;
use std::fmt;

impl fmt::Display for ClusterPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.fit(f)?;
        self.step(f)?;
        for (number, stage) in self.stages.iter().enumerate() {
            let StageSummary { first_layer, last_layer, nodes, zones } = stage;
            writeln!(
                f,
                "  stage {number}: layers {first_layer} to {last_layer} on {nodes} nodes in {zones} zones"
            )?;
        }
        writeln!(f, "  replicas of each expert: {}", self.replicas)?;
        self.machines(f)?;
        self.busiest_links(f)?;
        writeln!(f, "  what if")?;
        self.what_if.iter().try_for_each(|change| writeln!(f, "    {change}"))?;
        self.prices(f)
    }
}

impl ClusterPlan {
    fn fit(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (nodes, memory) = (self.nodes, bytes(self.memory_bytes));
        match self.short {
            None => writeln!(f, "fits on {nodes} nodes with {memory} of memory"),
            Some(short) => writeln!(
                f,
                "DOES NOT FIT on {nodes} nodes with {memory} of memory: {short}. The rest ignores memory"
            ),
        }
    }

    fn step(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (step, lanes, commit) = (seconds(self.step_s), seconds(self.lanes_s), seconds(self.commit_s));
        writeln!(f, "  step                  {step:>10}   {} tokens/s", short(self.tokens_per_s as u64))?;
        writeln!(f, "    lanes               {lanes:>10}   forward and backward")?;
        writeln!(f, "    commit              {commit:>10}   gradients on the network, optimizer, commit")?;
        let Some(PlacedNode { node, part, .. }) = &self.slowest else { return Ok(()) };
        writeln!(f, "  slowest node: {node}")?;
        writeln!(
            f,
            "    dense {}, experts {}, network {}, latency {}; then gradients {}, update {}",
            seconds(part.dense_s),
            seconds(part.expert_s),
            seconds(part.network_s),
            seconds(part.chain_s),
            seconds(part.exchange_s),
            seconds(part.update_s)
        )
    }

    fn machines(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "  type              nodes   lanes experts      memory   sent/step   received   (maximum of a node)"
        )?;
        self.kinds.iter().try_for_each(|machine| writeln!(f, "    {machine}"))
    }

    fn busiest_links(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut links: Vec<&LinkTraffic> = self.links.iter().collect();
        links.sort_by_key(|link| Reverse(link.bytes));
        if !links.is_empty() {
            writeln!(f, "  busiest links (all with --json)")?;
        }
        for LinkTraffic { from, to, bytes: traffic } in links.into_iter().take(PLAN_LINKS_SHOWN) {
            writeln!(f, "    {from} -> {to}: {} per step", bytes(*traffic))?;
        }
        Ok(())
    }

    fn prices(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let (Some(hour), Some(million)) = (self.price_per_hour, self.price_per_million_tokens) {
            writeln!(f, "  price: {hour:.2} per hour, {million:.4} per million tokens")?;
        }
        match &self.cheapest {
            Some(BestOffer { kind, price_per_hour, step_s, .. }) => writeln!(
                f,
                "  cheapest to add: {kind} at {price_per_hour:.2} per hour: step {}",
                seconds(*step_s)
            ),
            None if self.short.is_some() => {
                writeln!(f, "  cheapest to add: no single node with a price makes it fit")
            }
            None => writeln!(f, "  cheapest to add: nothing with a price makes the step shorter"),
        }
    }
}

impl fmt::Display for MachineLoad {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, nodes, most, .. } = self;
        let (memory, sent) = (bytes(most.memory_bytes), bytes(most.sent_bytes));
        write!(f, "{kind:<16}{nodes:>5}{:>8}{:>8}{memory:>12}{sent:>12}", most.lanes, most.experts)?;
        write!(f, "{:>11}", bytes(most.received_bytes))
    }
}

impl fmt::Display for WhatIf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { change, kind, .. } = self;
        let (step, speed) = (seconds(self.step_s), short(self.tokens_per_s as u64));
        write!(f, "{change} {kind}: step {step}, {speed} tokens/s, {} to copy", bytes(self.moved_bytes))?;
        if self.fits { Ok(()) } else { f.write_str(", DOES NOT FIT") }
    }
}
