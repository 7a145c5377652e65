//! `volary init`: a commented configuration that fits this machine, or the machines of an inventory.

mod shape;
mod text;

use crate::config::Config;
use crate::inventory::{Inventory, MachineType};
use crate::memory;
use crate::output;
use crate::units::{InvalidQuantity, Size, bytes, short};
use std::collections::BTreeMap;
use std::path::PathBuf;
use text::{Layout, Text};
use volary_core::Epoch;
use volary_core::architecture::{Architecture, presets};
use volary_core::options::TrainingOptions;
use volary_core::planner::{self, Member, Request, Shortage};
use volary_model::device::{self, Device};

/// The duration of a step, in seconds, that the largest model has for which no size is asked.
const STEP_S_MAX: f64 = 2.0;
/// The share of a processor's speed in large products that training reaches.
const REACHED: f64 = 0.5;
/// Bytes per second and seconds of a round trip between two nodes of this machine.
const LOCAL_BANDWIDTH: u64 = 1_000_000_000;
const LOCAL_ROUND_TRIP_MS: f64 = 0.2;
/// Node processes on this machine: with two, every expert has a copy.
const LOCAL_NODES: usize = 2;

/// Write a configuration that fits this machine.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  volary init --data ~/notes > my.toml && volary train my.toml
  volary init --size 100m --data 'web/*.jsonl.gz' --data books/ > my.toml
  volary init --preset 1.7b-64e --inventory cluster.toml > my.toml")]
pub struct Args {
    /// A model of the GLaM paper (`volary plan --preset list`).
    #[arg(long, conflicts_with = "size")]
    preset: Option<String>,
    /// The number of parameters, such as 100m or 1.9b; by default as many as fit the machine at a step of two
    /// seconds.
    #[arg(long, value_parser = size)]
    size: Option<u64>,
    /// Text: a file, a folder or a glob; may be given several times.
    #[arg(long, value_name = "PATH")]
    data: Vec<String>,
    /// The machines (TOML, see examples/cluster.toml) instead of this one.
    #[arg(long)]
    inventory: Option<PathBuf>,
}

fn size(text: &str) -> Result<u64, InvalidQuantity> {
    shape::parameters(text)
}

/// Runs the command.
///
/// # Errors
/// When the inventory is invalid, the preset is unknown, or no model fits the machines.
pub fn run(args: Args) -> anyhow::Result<()> {
    let inventory = args.inventory.as_deref().map(Inventory::load).transpose()?;
    let is_local = inventory.is_none();
    let inventory = inventory.map_or_else(this_machine, Ok)?;
    let members: Vec<Member> = inventory.members().into_iter().map(|(_, member)| member).collect();
    let (preset, architecture) = choose(&args, &members)?;
    let (layout, step_s) = fit(&architecture, &members).map_err(|short| {
        anyhow::anyhow!(
            "a model of {} parameters does not fit: {short}; choose a smaller --size",
            short_parameters(&architecture)
        )
    })?;
    let text = Text {
        preset: preset.as_deref(),
        architecture: &architecture,
        layout: &layout,
        data: &args.data,
        local_threads: is_local.then(|| members[0].profile.threads),
        members: &members,
        step_s,
    };
    let text = text.to_string();
    // What is written must be a configuration.
    Config::parse(&text, "the new configuration", &[])?;
    output::text(&text)?;
    output::note(format_args!(
        "{} parameters, {} machines with {} of memory, about {} per step",
        short_parameters(&architecture),
        members.len(),
        bytes(members.iter().map(|member| member.profile.memory_bytes).sum()),
        text::seconds(step_s)
    ));
    Ok(())
}

fn short_parameters(architecture: &Architecture) -> String {
    short(architecture.parameters())
}

/// The model that is asked for, or the largest one with short steps.
fn choose(args: &Args, members: &[Member]) -> anyhow::Result<(Option<String>, Architecture)> {
    if let Some(name) = &args.preset {
        let all = presets();
        let names: Vec<&str> = all.iter().map(|preset| preset.name).collect();
        let expected = format!("--preset {name}: expected one of {}", names.join(", "));
        let preset =
            all.iter().find(|preset| preset.name == name).ok_or_else(|| anyhow::anyhow!(expected))?;
        return Ok((Some(name.clone()), preset.architecture.clone()));
    }
    if let Some(parameters) = args.size {
        let shape = shape::of_size(parameters);
        return Ok((None, shape.ok_or_else(|| anyhow::anyhow!("no model has {parameters} parameters"))?));
    }
    let is_quick = |shape: &Architecture| fit(shape, members).is_ok_and(|(_, step_s)| step_s <= STEP_S_MAX);
    let ladder = shape::ladder();
    // On a slow machine even the smallest takes longer.
    let largest = ladder.iter().rev().find(|shape| is_quick(shape)).or_else(|| ladder.first());
    let shape = largest.ok_or_else(|| anyhow::anyhow!("no model is known"))?;
    Ok((None, shape.clone()))
}

/// The first layout that fits, and the duration of its step in seconds; or the memory that is missing for the
/// last.
fn fit(architecture: &Architecture, members: &[Member]) -> Result<(Layout, f64), Shortage> {
    let [with_copies, alone, small] = Layout::candidates(architecture, members);
    let attempt = |layout: Layout| plan(architecture, &layout, members).map(|step_s| (layout, step_s));
    attempt(with_copies).or_else(|_| attempt(alone)).or_else(|_| attempt(small))
}

/// The predicted duration of a step, in seconds, or the memory that is missing.
fn plan(architecture: &Architecture, layout: &Layout, members: &[Member]) -> Result<f64, Shortage> {
    let training: &TrainingOptions = &layout.training;
    let request = Request {
        epoch: Epoch(1),
        members,
        architecture,
        training,
        replication: layout.replication,
        fan_in: volary_core::options::ClusterOptions::default().fan_in,
        extra_replicas: &BTreeMap::new(),
        moves_max: usize::MAX,
        previous: None,
    };
    planner::plan(&request).map(|plan| plan.prediction.step_s)
}

/// This machine as two nodes that share its processors and memory, or as one node on a GPU.
fn this_machine() -> anyhow::Result<Inventory> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let nodes = LOCAL_NODES.min(cores);
    let threads = cores / nodes;
    let memory = memory::usable_bytes(Device::Cpu)? / nodes as u64;
    let tflops = device::measure_products()? * threads as f64 * REACHED / 1e3;
    let machine = MachineType {
        name: "node".into(),
        count: nodes,
        zones: Vec::new(),
        memory: Size(memory),
        tflops,
        expert_tflops: None,
        update: None,
        threads,
        bandwidth: Size(LOCAL_BANDWIDTH),
        round_trip_ms: LOCAL_ROUND_TRIP_MS,
        price_per_hour: None,
    };
    Ok(Inventory { nodes: vec![machine], offers: Vec::new() })
}
