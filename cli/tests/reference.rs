//! The actors in processes over QUIC, compared with the whole model in one process and one autograd graph.
#![expect(clippy::unwrap_used, reason = "tests")]

mod common;

use common::World;
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use volary_cli::config::Config;
use volary_core::{Lane, ShardId, Step};
use volary_data::Dataset;
use volary_model::device::{self, Device};
use volary_model::reference::Reference;
use volary_storage::{CheckpointReader, RunDir};

/// AdamW's first moment after one step is 0.1 times the mean gradient, so the checkpoint of step 1 has every
/// gradient that the actors computed, sent and summed.
const FIRST_MOMENT: f32 = 0.1;

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// The mean loss and gradients of step 1 from the reference model, lane by lane.
fn by_reference(config: &Config, dir: &RunDir) -> (f64, BTreeMap<ShardId, Vec<Vec<f32>>>) {
    let t = &config.training;
    let dataset =
        Dataset::open(&dir.data(), t.sequence_length, t.sequences_per_lane, t.lanes, config.run.seed)
            .unwrap();
    let model = Reference::initial(&config.model, t, config.run.seed, Device::Cpu).unwrap();
    let (mut loss, mut sums) = (0.0, BTreeMap::<ShardId, Vec<Vec<f32>>>::new());
    for lane in 0..t.lanes {
        let lane = Lane(lane);
        let outcome = model.lane(&dataset.lane(Step(1), lane).unwrap(), (Step(1), lane), true).unwrap();
        loss += outcome.loss / f64::from(t.lanes);
        for (shard, gradients) in outcome.gradient_values().unwrap() {
            let sum =
                sums.entry(shard).or_insert_with(|| gradients.iter().map(|g| vec![0.0; g.len()]).collect());
            for (sum, gradient) in sum.iter_mut().zip(&gradients) {
                sum.iter_mut().zip(gradient).for_each(|(sum, g)| *sum += g / t.lanes as f32);
            }
        }
    }
    (loss, sums)
}

/// The loss and all gradients of three node processes. The tolerance is 5e-5 of a gradient's norm: the same
/// f32 sums in another order, through four layers and six lanes.
#[test]
fn three_processes_compute_the_loss_and_every_gradient_of_the_whole_model() {
    let sparse = ["--set", "model.capacity={ factor = 1.0 }", "--set", "model.second_expert=\"random\""];
    compare(&[]);
    compare(&sparse);
}

fn compare(model: &[&str]) {
    device::single_thread();
    let world = World::new();
    let set = ["--set", "training.steps=1", "--set", "training.optimizer={ kind = \"adamw\" }", "--quiet"];
    world.run_train(&[&["--nodes", "3", "--dir", "runs/r"], &set[..], model].concat());
    let dir = RunDir::find(world.path("runs/r")).unwrap();
    let config = Config::load(&dir.config(), &[]).unwrap();
    let (loss, expected) = by_reference(&config, &dir);
    let actors = world.metrics("r")[0]["loss"].as_f64().unwrap();
    assert!((actors - loss).abs() < 1e-5, "{actors} and {loss}");

    let reader = CheckpointReader::open(&dir).unwrap();
    for (shard, gradients) in expected {
        let bytes = reader.read(Step(1), shard).unwrap();
        let stored = SafeTensors::deserialize(&bytes).unwrap();
        for (name, expected) in parameter_names(&config, shard).into_iter().zip(gradients) {
            let moment = floats(stored.tensor(&format!("{name}.first")).unwrap().data());
            let norm = |values: &mut dyn Iterator<Item = f32>| {
                values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt()
            };
            let apart = norm(&mut moment.iter().zip(&expected).map(|(m, g)| m / FIRST_MOMENT - g));
            let size = norm(&mut expected.iter().copied());
            assert_eq!(moment.len(), expected.len());
            assert!(apart <= 5e-5 * size.max(1e-6), "{shard} {name}: {apart} of {size}");
        }
    }
}

/// The parameters of a shard in the order of the model.
fn parameter_names(config: &Config, shard: ShardId) -> Vec<&'static str> {
    let attention = ["attention.norm", "attention.qkv", "attention.output", "attention.position"];
    let feed_forward = ["feed_forward.norm", "feed_forward.gate", "feed_forward.up", "feed_forward.down"];
    match shard {
        ShardId::Embedding => vec!["tokens", "norm"],
        ShardId::Dense { layer } if config.model.is_moe(layer) => attention.to_vec(),
        ShardId::Dense { .. } => [attention, feed_forward].concat(),
        ShardId::Router { .. } => vec!["norm", "gate"],
        ShardId::Expert { .. } => vec!["up", "down"],
    }
}
