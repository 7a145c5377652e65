//! `volary plan`: what a model costs, and what it would do on given machines, before anything starts.

mod cluster;

use crate::config::Config;
use crate::inventory::Inventory;
use cluster::{ClusterPlan, Site};
use serde::Serialize;
use std::path::PathBuf;
use volary_core::ShardId;
use volary_core::architecture::{Architecture, Preset, presets};
use volary_core::options::{ClusterOptions, Optimizer, TrainingOptions};
use volary_core::schedule::Schedule;

/// Count parameters, operations and bytes of a model, and plan it on machines that nobody has rented yet.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  volary plan examples/quickstart.toml
  volary plan --preset 1.7b-64e --json
  volary plan examples/quickstart.toml --inventory examples/cluster.toml
  volary plan --preset 64b-64e --inventory cluster.toml --lanes 2048
  volary plan --preset list")]
pub struct Args {
    /// A configuration file.
    #[arg(required_unless_present = "preset")]
    config: Option<PathBuf>,
    /// A row of the GLaM paper's table 4, or `list`.
    #[arg(long, conflicts_with = "config")]
    preset: Option<String>,
    /// Machines, as a TOML file (examples/cluster.toml): what goes where, how long a step takes, what joins and losses would do.
    #[arg(long, value_name = "FILE")]
    inventory: Option<PathBuf>,
    /// Lanes of a preset, of one sequence of 1,024 tokens each.
    #[arg(long, default_value = "1024", value_parser = clap::value_parser!(u32).range(1..=65536), conflicts_with = "config")]
    lanes: u32,
    /// One JSON object.
    #[arg(long)]
    json: bool,
    /// A value for any key of the configuration.
    #[arg(long, value_name = "KEY.PATH=VALUE", conflicts_with = "preset")]
    set: Vec<String>,
}

/// The figures of a model.
#[derive(Debug, Serialize)]
pub struct Plan {
    name: String,
    parameters: u64,
    activated_parameters: u64,
    /// Forward pass.
    flops_per_token: u64,
    /// Forward and backward.
    training_flops_per_token: u64,
    sequence_length: usize,
    shards: Vec<Kind>,
    /// Weights and optimizer state of all shards, one copy.
    state_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    paper: Option<Paper>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster: Option<ClusterPlan>,
}

#[derive(Debug, Serialize)]
struct Kind {
    kind: &'static str,
    count: usize,
    parameters: u64,
    state_bytes: u64,
}

#[derive(Debug, Serialize)]
struct Paper {
    parameters: &'static str,
    activated_parameters: &'static str,
}

/// Runs the command.
///
/// # Errors
/// When the configuration is bad or the preset unknown.
pub fn run(args: Args) -> anyhow::Result<()> {
    if args.preset.as_deref() == Some("list") {
        presets().iter().for_each(|preset| println!("{}", preset.name));
        return Ok(());
    }
    let inventory = args.inventory.as_deref().map(Inventory::load).transpose()?;
    let (mut plan, architecture, training, cluster) = match &args.config {
        Some(path) => {
            let Config { run, model, training, cluster, .. } = Config::load(path, &args.set)?;
            (Plan::new(&run.name, &model, &training), model, training, cluster)
        }
        None => {
            let training = of_lanes(args.lanes);
            let (plan, model) = of_preset(args.preset.as_deref().unwrap_or_default(), &training)?;
            (plan, model, training, ClusterOptions::default())
        }
    };
    let site = Site { architecture: &architecture, training: &training, cluster: &cluster };
    plan.cluster = inventory.map(|inventory| site.on(&inventory));
    if args.json {
        println!("{}", serde_json::to_string_pretty(&plan)?);
    } else {
        plan.print();
    }
    Ok(())
}

/// How a preset trains: sequences of 1,024 tokens (GLaM, section 5.1), one in a lane.
fn of_lanes(lanes: u32) -> TrainingOptions {
    TrainingOptions {
        steps: 1,
        lanes,
        lane_group: 4.min(lanes),
        sequences_per_lane: 1,
        sequence_length: 1024,
        optimizer: Optimizer::default(),
        schedule: Schedule::default(),
        clip_norm: None,
        aux_loss: 0.01,
        z_loss: 0.0,
    }
}

fn of_preset(name: &str, training: &TrainingOptions) -> anyhow::Result<(Plan, Architecture)> {
    let all = presets();
    let names: Vec<&str> = all.iter().map(|preset| preset.name).collect();
    let Some(Preset { architecture, paper_parameters, paper_activated, .. }) =
        all.iter().find(|p| p.name == name)
    else {
        anyhow::bail!("--preset {name}: expected one of {}", names.join(", "));
    };
    let mut plan = Plan::new(name, architecture, training);
    plan.paper = Some(Paper { parameters: paper_parameters, activated_parameters: paper_activated });
    Ok((plan, architecture.clone()))
}

impl Plan {
    fn new(name: &str, a: &Architecture, training: &TrainingOptions) -> Self {
        let (optimizer, sequence_length) = (&training.optimizer, training.sequence_length);
        let mut shards: Vec<Kind> = Vec::new();
        for shard in a.shards() {
            let kind = match shard {
                ShardId::Embedding => "embedding",
                ShardId::Dense { layer } if a.is_moe(layer.into()) => "attention",
                ShardId::Dense { .. } => "attention and feed-forward",
                ShardId::Router { .. } => "router",
                ShardId::Expert { .. } => "expert",
            };
            match shards.iter_mut().find(|known| known.kind == kind) {
                Some(known) => known.count += 1,
                None => shards.push(Kind {
                    kind,
                    count: 1,
                    parameters: a.shard_parameters(shard),
                    state_bytes: volary_model::shard_bytes(a, optimizer, shard),
                }),
            }
        }
        let flops_per_token = a.flops_per_token(sequence_length);
        Self {
            name: name.into(),
            parameters: a.parameters(),
            activated_parameters: a.activated_parameters(),
            flops_per_token,
            training_flops_per_token: 3 * flops_per_token,
            sequence_length,
            state_bytes: shards.iter().map(|kind| kind.state_bytes * kind.count as u64).sum(),
            shards,
            paper: None,
            cluster: None,
        }
    }

    fn print(&self) {
        let paper = |of: fn(&Paper) -> &'static str| {
            self.paper
                .as_ref()
                .map_or_else(String::new, |paper| format!("   (the paper prints {})", of(paper)))
        };
        println!("{}", self.name);
        println!("  parameters            {:>10}{}", short(self.parameters), paper(|p| p.parameters));
        println!(
            "  activated per token   {:>10}{}",
            short(self.activated_parameters),
            paper(|p| p.activated_parameters)
        );
        println!(
            "  FLOPs per token       {:>10}   forward, sequences of {}",
            short(self.flops_per_token),
            self.sequence_length
        );
        println!(
            "                        {:>10}   forward and backward",
            short(self.training_flops_per_token)
        );
        println!("  state, one copy       {:>10}", bytes(self.state_bytes));
        println!("  shards");
        for kind in &self.shards {
            let (parameters, state) = (short(kind.parameters), bytes(kind.state_bytes));
            println!("    {:>6} x {:<27}{parameters:>10}   {state:>10} of state each", kind.count, kind.kind);
        }
        self.cluster.iter().for_each(ClusterPlan::print);
    }
}

/// Four significant digits with a decimal unit.
fn short(number: u64) -> String {
    let (value, unit) = match number {
        n if n >= 1_000_000_000_000 => (n as f64 / 1e12, "T"),
        n if n >= 1_000_000_000 => (n as f64 / 1e9, "B"),
        n if n >= 1_000_000 => (n as f64 / 1e6, "M"),
        n if n >= 1_000 => (n as f64 / 1e3, "k"),
        n => return n.to_string(),
    };
    format!("{value:.3}{unit}")
}

/// A size with a binary unit.
pub(crate) fn bytes(number: u64) -> String {
    let mut value = number as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return format!("{value:.1} {unit}");
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}
