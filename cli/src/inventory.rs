//! An inventory: the machines that a cluster has, or could have, as a TOML file. See `examples/cluster.toml`.

use crate::config::explain;
use crate::units::Size;
use serde::Deserialize;
use std::path::Path;
use volary_core::NodeId;
use volary_core::planner::Member;
use volary_core::profile::{Profile, Rate, ZONE_MAX};

/// The most nodes of an inventory.
const NODES_MAX: usize = 100_000;
/// Bytes per second of gradients and parameters that a device gets through, where none are given: a CPU's memory.
const UPDATE_BYTES_PER_S: f64 = 2e9;

/// Machines.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Inventory {
    /// What is there.
    #[serde(rename = "node")]
    pub nodes: Vec<Kind>,
    /// What could be added.
    #[serde(rename = "offer", default)]
    pub offers: Vec<Kind>,
}

/// One machine, or several of one kind.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kind {
    /// Its name; `NAME-1`, `NAME-2` and so on where there are several.
    pub name: String,
    /// How many.
    #[serde(default = "one")]
    pub count: usize,
    /// What fails together; several zones are taken by turns.
    #[serde(default)]
    pub zones: Vec<String>,
    /// Memory that the run may use.
    pub memory: Size,
    /// 10^12 operations per second that its device reaches in training, which is less than its maker's figure.
    pub tflops: f64,
    /// The same in experts' products, where it differs.
    pub expert_tflops: Option<f64>,
    /// Bytes per second through the optimizer.
    pub update: Option<Size>,
    /// Calls at the same time: the threads of a CPU, 1 of a GPU.
    #[serde(default = "one")]
    pub threads: usize,
    /// Bytes per second in one direction of its network.
    pub bandwidth: Size,
    /// Milliseconds to another node and back.
    #[serde(default)]
    pub round_trip_ms: f64,
    /// Its price, in any currency.
    pub price_per_hour: Option<f64>,
}

fn one() -> usize {
    1
}

impl Inventory {
    /// Reads a file.
    ///
    /// # Errors
    /// One line that names the file, the line, the key and what was expected.
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        let name = path.display().to_string();
        let text =
            std::fs::read_to_string(path).map_err(|error| anyhow::anyhow!("inventory {name}: {error}"))?;
        let read: Self =
            toml::from_str(&text).map_err(|error| anyhow::anyhow!("{}", explain(&name, &text, &error)))?;
        read.check().map_err(|reason| anyhow::anyhow!("{name}: {reason}"))?;
        Ok(read)
    }

    fn check(&self) -> Result<(), String> {
        if self.nodes.is_empty() {
            return Err("no [[node]]: expected at least one".into());
        }
        let mut names = std::collections::BTreeSet::new();
        for kind in self.nodes.iter().chain(&self.offers) {
            kind.check()?;
            if !names.insert(&kind.name) {
                return Err(format!("name = {:?}: expected every name once", kind.name));
            }
        }
        let count = self.nodes.iter().map(|kind| kind.count).fold(0usize, usize::saturating_add);
        if count > NODES_MAX {
            return Err(format!("{count} nodes: expected at most {NODES_MAX}"));
        }
        Ok(())
    }

    /// All nodes that are there, each with the place of its kind.
    #[must_use]
    pub fn members(&self) -> Vec<(usize, Member)> {
        let of_kind = |(place, kind): (usize, &Kind)| {
            (0..kind.count).map(|number| (place, kind.member(number))).collect::<Vec<_>>()
        };
        self.nodes.iter().enumerate().flat_map(of_kind).collect()
    }

    /// What all nodes cost in an hour, if every kind has a price.
    #[must_use]
    pub fn price(&self) -> Option<f64> {
        self.nodes.iter().map(|kind| Some(kind.price_per_hour? * kind.count as f64)).sum()
    }
}

impl Kind {
    fn check(&self) -> Result<(), String> {
        let name = &self.name;
        volary_transport::check_name(name).map_err(|error| error.to_string())?;
        if self.count == 0 || self.count > NODES_MAX {
            return Err(format!("{name}: count = {}: expected 1 to {NODES_MAX}", self.count));
        }
        if self.zones.iter().any(|zone| zone.len() > ZONE_MAX) {
            return Err(format!("{name}: zones: expected names of at most {ZONE_MAX} bytes"));
        }
        let price = self.price_per_hour.unwrap_or(1.0);
        if !(price.is_finite() && price >= 0.0) {
            return Err(format!("{name}: price_per_hour = {price}: expected a number that is not negative"));
        }
        self.profile(0).check().map_err(|reason| format!("{name}: {reason}"))
    }

    fn profile(&self, number: usize) -> Profile {
        let zone = self.zones.get(number % self.zones.len().max(1)).cloned().unwrap_or_default();
        Profile {
            dense: Rate::even(self.tflops * 1e12),
            expert: Rate::even(self.expert_tflops.unwrap_or(self.tflops) * 1e12),
            update_bytes_per_s: self.update.map_or(UPDATE_BYTES_PER_S, |size| size.0 as f64),
            threads: self.threads,
            memory_bytes: self.memory.0,
            zone,
            bandwidth: self.bandwidth.0 as f64,
            round_trip_s: self.round_trip_ms / 1e3,
            network_s_per_byte: 0.0,
        }
    }

    /// One of its nodes, from 0.
    #[must_use]
    pub fn member(&self, number: usize) -> Member {
        let name = if self.count == 1 { self.name.clone() } else { format!("{}-{}", self.name, number + 1) };
        Member { node: NodeId::new(name), profile: self.profile(number) }
    }
}
