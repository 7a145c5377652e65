//! `volary plan`: the costs of a model, and its run on a planned cluster, before anything starts.

mod cluster;
mod model;

use crate::config::Config;
use crate::inventory::Inventory;
use crate::output;
use cluster::{ClusterPlan, Workload};
use model::ModelCosts;
use serde::Serialize;
use std::fmt;
use std::path::PathBuf;
use volary_core::architecture::{Architecture, presets};
use volary_core::options::{ClusterOptions, TrainingOptions};

/// Count parameters, operations and bytes of a model, and predict a run on a planned cluster.
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
    /// A model of table 4 of the GLaM paper, or `list`.
    #[arg(long, conflicts_with = "config")]
    preset: Option<String>,
    /// Machines, as a TOML file (examples/cluster.toml): predicts the placement, the duration of a step, and
    /// the effect of more or fewer nodes.
    #[arg(long, value_name = "FILE")]
    inventory: Option<PathBuf>,
    /// Lanes (micro-batches) of a preset, with one sequence of 1,024 tokens each.
    #[arg(long, default_value = "1024", value_parser = clap::value_parser!(u32).range(1..=65536), conflicts_with = "config")]
    lanes: u32,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// A TOML value for any key of the configuration.
    #[arg(long, value_name = "KEY.PATH=VALUE", conflicts_with = "preset")]
    set: Vec<String>,
}

/// The costs of a model, and its run on an inventory.
#[derive(Debug, Serialize)]
struct Report {
    #[serde(flatten)]
    model: ModelCosts,
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster: Option<ClusterPlan>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.model.fmt(f)?;
        self.cluster.iter().try_for_each(|cluster| write!(f, "\n{cluster}"))
    }
}

/// Runs the command.
///
/// # Errors
/// When the configuration or the inventory is invalid, or the preset is unknown.
pub fn run(args: Args) -> anyhow::Result<()> {
    if args.preset.as_deref() == Some("list") {
        for preset in presets() {
            output::line(preset.name)?;
        }
        return Ok(());
    }
    let inventory = args.inventory.as_deref().map(Inventory::load).transpose()?;
    let (model, architecture, training, cluster) = match &args.config {
        Some(path) => {
            let Config { run, model, training, cluster, .. } = Config::load(path, &args.set)?;
            (ModelCosts::new(&run.name, &model, &training), model, training, cluster)
        }
        None => {
            let training = preset_training(args.lanes);
            let (costs, model) = preset(args.preset.as_deref().unwrap_or_default(), &training)?;
            (costs, model, training, ClusterOptions::default())
        }
    };
    let workload = Workload { architecture: &architecture, training: &training, cluster: &cluster };
    let cluster = inventory.map(|inventory| workload.plan_on(&inventory));
    let report = Report { model, cluster };
    if args.json {
        output::line(serde_json::to_string_pretty(&report)?)?;
    } else {
        output::text(report)?;
    }
    Ok(())
}

/// The training of a preset: sequences of 1,024 tokens (GLaM, section 5.1), one per lane.
fn preset_training(lanes: u32) -> TrainingOptions {
    TrainingOptions {
        lanes,
        lane_group: 4.min(lanes),
        sequences_per_lane: 1,
        sequence_length: 1024,
        ..TrainingOptions::new(1)
    }
}

fn preset(name: &str, training: &TrainingOptions) -> anyhow::Result<(ModelCosts, Architecture)> {
    let all = presets();
    let Some(preset) = all.iter().find(|preset| preset.name == name) else {
        let names: Vec<&str> = all.iter().map(|preset| preset.name).collect();
        anyhow::bail!("--preset {name}: expected one of {}", names.join(", "));
    };
    Ok((ModelCosts::of_preset(preset, training), preset.architecture.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example inventory and the smallest preset, as text and as JSON.
    #[test]
    fn a_plan_has_all_its_sections_as_text_and_the_same_numbers_as_json() {
        let training = preset_training(64);
        let (model, architecture) = preset("0.1b", &training).expect("a preset");
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/cluster.toml");
        let inventory = Inventory::load(&path).expect("the example");
        let cluster = ClusterOptions::default();
        let workload = Workload { architecture: &architecture, training: &training, cluster: &cluster };
        let report = Report { model, cluster: Some(workload.plan_on(&inventory)) };
        let text = report.to_string();
        for part in [
            "0.1b\n  parameters",
            "(the paper prints ",
            "  shards\n",
            " on ",
            "  step     ",
            "  slowest node: ",
            "  stage 0: layers 0 to ",
            "  replicas of each expert: ",
            "  what if\n    one more ",
            "  cheapest to add: ",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
        let json = serde_json::to_value(&report).expect("JSON");
        assert_eq!(json["name"], "0.1b");
        assert_eq!(json["cluster"]["what_if"][0]["change"], "one more");
        let stages = json["cluster"]["stages"].as_array().expect("stages");
        assert_eq!(text.matches("  stage ").count(), stages.len());
    }
}
