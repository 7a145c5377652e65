//! An inventory: the machines of a cluster that exists or is planned, as a TOML file. See
//! `examples/cluster.toml`.

use crate::document;
use crate::limits::INVENTORY_NODES_MAX;
use crate::output;
use crate::units::Size;
use serde::Deserialize;
use std::collections::BTreeSet;
use std::path::Path;
use volary_core::planner::Member;
use volary_core::profile::{Profile, Rate, ZONE_MAX};
use volary_core::{InvalidValue, NodeId};

/// Bytes of gradients and parameters that a device updates in a second, where the file gives none: the memory
/// bandwidth of a CPU.
const UPDATE_BYTES_PER_S: f64 = 2e9;

/// Machines.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Inventory {
    /// The machines of the cluster.
    #[serde(rename = "node")]
    pub nodes: Vec<MachineType>,
    /// Machines that could be added.
    #[serde(rename = "offer", default)]
    pub offers: Vec<MachineType>,
}

/// One or more equal machines.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineType {
    /// The name; nodes are `NAME-1`, `NAME-2` and so on if there are several.
    pub name: String,
    /// The number of machines.
    #[serde(default = "one")]
    pub count: usize,
    /// Failure domains, assigned round-robin.
    #[serde(default)]
    pub zones: Vec<String>,
    /// Memory for the run.
    pub memory: Size,
    /// 10^12 floating-point operations per second that the device reaches in training, which is less than its
    /// peak.
    pub tflops: f64,
    /// The same for products in experts, where it differs.
    pub expert_tflops: Option<f64>,
    /// Bytes per second of the optimizer.
    pub update: Option<Size>,
    /// Concurrent computations: the threads of a CPU, 1 on a GPU.
    #[serde(default = "one")]
    pub threads: usize,
    /// Network bandwidth in one direction, in bytes per second.
    pub bandwidth: Size,
    /// Network round trip to another node, in milliseconds.
    #[serde(default)]
    pub round_trip_ms: f64,
    /// The price, in any currency.
    pub price_per_hour: Option<f64>,
}

fn one() -> usize {
    1
}

impl Inventory {
    /// Reads a file.
    ///
    /// # Errors
    /// One line that names the file, the line, the key and the expected value.
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        let name = path.display().to_string();
        let text =
            std::fs::read_to_string(path).map_err(|error| anyhow::anyhow!("inventory {name}: {error}"))?;
        let inventory: Self = document::parse(&text, &name)?;
        inventory.check().map_err(|error| anyhow::anyhow!("{name}: {}", output::with_causes(&error)))?;
        Ok(inventory)
    }

    fn check(&self) -> anyhow::Result<()> {
        if self.nodes.is_empty() {
            anyhow::bail!("no [[node]]: expected at least one");
        }
        let mut names = BTreeSet::new();
        for machine in self.nodes.iter().chain(&self.offers) {
            volary_transport::check_name(&machine.name)?;
            machine.check().map_err(|error| anyhow::anyhow!("{}: {error}", machine.name))?;
            if !names.insert(&machine.name) {
                anyhow::bail!("name = {:?}: expected every name once", machine.name);
            }
        }
        let count = self.nodes.iter().map(|machine| machine.count).fold(0usize, usize::saturating_add);
        if count > INVENTORY_NODES_MAX {
            anyhow::bail!("{count} nodes: expected at most {INVENTORY_NODES_MAX}");
        }
        Ok(())
    }

    /// All nodes of the cluster, each with the index of its machine type.
    #[must_use]
    pub fn members(&self) -> Vec<(usize, Member)> {
        let of_type = |(index, machine): (usize, &MachineType)| {
            (0..machine.count).map(|number| (index, machine.member(number))).collect::<Vec<_>>()
        };
        self.nodes.iter().enumerate().flat_map(of_type).collect()
    }

    /// A machine type by its name, among nodes and offers.
    pub(crate) fn machine(&self, name: &str) -> Option<&MachineType> {
        self.nodes.iter().chain(&self.offers).find(|machine| machine.name == name)
    }

    /// The price of the cluster for one hour, if every machine has one.
    #[must_use]
    pub fn price_per_hour(&self) -> Option<f64> {
        self.nodes.iter().map(|machine| Some(machine.price_per_hour? * machine.count as f64)).sum()
    }
}

impl MachineType {
    fn check(&self) -> Result<(), InvalidValue> {
        if self.count == 0 || self.count > INVENTORY_NODES_MAX {
            return Err(InvalidValue::new("count", self.count, format!("1 to {INVENTORY_NODES_MAX}")));
        }
        if let Some(zone) = self.zones.iter().find(|zone| zone.len() > ZONE_MAX) {
            let (found, expected) =
                (format!("a name of {} bytes", zone.len()), format!("at most {ZONE_MAX} bytes"));
            return Err(InvalidValue::new("zones", found, expected));
        }
        let price = self.price_per_hour.unwrap_or(1.0);
        if !(price.is_finite() && price >= 0.0) {
            return Err(InvalidValue::new("price_per_hour", price, "a number that is not negative"));
        }
        self.profile(0).check()
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
            arithmetic: None,
        }
    }

    /// The node with a number, from 0.
    #[must_use]
    pub fn member(&self, number: usize) -> Member {
        let name = if self.count == 1 { self.name.clone() } else { format!("{}-{}", self.name, number + 1) };
        Member { node: NodeId::new(name), profile: self.profile(number) }
    }
}
