//! The bounds, against messages as they are encoded.
#![expect(clippy::expect_used, reason = "tests")]

use super::*;
use crate::control::{ToNode, ToSupervisor};
use volary_core::architecture::presets;
use volary_core::messages::{LaneReport, NodeCommand, NodeReport, Norm, Pass};
use volary_core::{Digest, Epoch, Lane, Step};

fn model(name: &str) -> Architecture {
    presets().into_iter().find(|preset| preset.name == name).expect("a preset").architecture
}

fn training(lanes: u32) -> TrainingOptions {
    TrainingOptions { lanes, ..TrainingOptions::new(1) }
}

/// The largest models of the paper, whose embedding alone has gradients of 8 GB.
#[test]
fn every_model_of_the_paper_fits() {
    for preset in presets() {
        check(&preset.architecture, &training(256)).expect(preset.name);
    }
}

#[test]
fn a_shard_that_fits_into_no_frame_is_named() {
    let large = Architecture { vocabulary: 1 << 22, hidden: 8_192, ..model("64b-64e") };
    let error = check(&large, &training(1)).expect_err("too large").to_string();
    assert!(error.contains("model.vocabulary") && error.contains("4194304"), "{error}");
}

/// All lanes on one node, with the largest numbers.
fn report(model: &Architecture, lanes: u32) -> Vec<u8> {
    let load = vec![vec![u32::MAX; model.experts]; model.moe_layers().count()];
    let sequence_losses = vec![1e30; training(lanes).sequences_per_lane];
    let lane = LaneReport {
        loss: 1e300,
        aux_loss: 1e300,
        gate_entropy: 1e300,
        load,
        dropped: u32::MAX,
        sequence_losses,
    };
    let norm = Norm { squared: 1e300, finite: true };
    let report = NodeReport::Prepared {
        epoch: Epoch(u64::MAX),
        step: Step(u64::MAX),
        norms: model.shards().into_iter().map(|shard| (shard, norm)).collect(),
        digests: model.shards().into_iter().map(|shard| (shard, Digest([u8::MAX; 32]))).collect(),
        lanes: (0..lanes).map(|number| (Lane(u32::MAX - number), lane.clone())).collect(),
        speed: Some(1e300),
    };
    postcard::to_stdvec(&ToSupervisor::Protocol(report)).expect("a message")
}

#[test]
fn as_many_lanes_as_are_allowed_fit_into_one_report() {
    let model = model("0.1b-64e");
    let error = check(&model, &training(u32::MAX)).expect_err("too many").to_string();
    let words = error.split_whitespace();
    let most: u32 = words.skip_while(|word| *word != "most").nth(1).expect("a number").parse().expect(&error);
    assert!(most > 1_000, "{most}");
    check(&model, &training(most)).expect("allowed");
    check(&model, &training(most + 1)).expect_err("too many");
    let bytes = report(&model, most).len();
    assert!(bytes <= CONTROL_BYTES_MAX && bytes > CONTROL_BYTES_MAX / 2, "{bytes}");
}

/// More lanes on one node than fit into a message: their tokens go ahead of the command, in order.
#[test]
fn the_tokens_of_many_lanes_are_sent_in_several_messages() {
    let tokens = |lane: u32| vec![u32::MAX - lane; 2_100];
    let begin = |lanes| NodeCommand::Begin {
        epoch: Epoch(3),
        step: Step(4),
        data: Step(4),
        pass: Pass::Train,
        lanes,
        compare: vec![ShardId::Embedding],
    };
    for lanes in [0, 1, 400, 3_000] {
        let all: Vec<(Lane, Vec<u32>)> = (0..lanes).map(|lane| (Lane(lane), tokens(lane))).collect();
        let messages = ToNode::Protocol(begin(all.clone()), None).split();
        assert_eq!(messages.len() > 1, lanes == 3_000);
        let mut ahead = Vec::new();
        for message in messages {
            let bytes = postcard::to_stdvec(&message).expect("a message");
            assert!(bytes.len() <= CONTROL_BYTES_MAX, "{}", bytes.len());
            match postcard::from_bytes(&bytes).expect("a message") {
                ToNode::Tokens(lanes) => ahead.extend(lanes),
                ToNode::Protocol(mut command, None) => {
                    command.prepend_lanes(&mut ahead);
                    assert!(command == begin(all.clone()));
                }
                other => panic!("{other:?}"),
            }
        }
        assert!(ahead.is_empty());
    }
}
