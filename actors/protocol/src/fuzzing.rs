//! Entry points for the fuzz targets.

use crate::control::{RunInfo, ToNode, ToSupervisor};
use crate::frames::{
    ExpertReply, ExpertRequest, GradientSum, ShardRequest, StageReply, StageRequest, StoredShard,
};
use crate::layout::{LayoutReceiver, LayoutSender};
use crate::operator::{OperatorReply, OperatorRequest};
use crate::refusal::FrameRefusal;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::sync::Arc;
use volary_core::messages::{Assignment, NodeCommand, NodeReport, Source};
use volary_core::profile::Profile;
use volary_core::shared::Shared;
use volary_core::{Epoch, ExpertId, Lane, LayerId, ShardId, Step, Timeline};

/// Reads bytes as every type that crosses a link.
#[doc(hidden)]
pub fn fuzz_messages(bytes: &[u8]) {
    fn read<T: DeserializeOwned>(bytes: &[u8]) {
        drop(postcard::from_bytes::<T>(bytes));
    }
    read::<ToSupervisor>(bytes);
    read::<ToNode>(bytes);
    if let Ok(ToNode::Layout(patch)) = postcard::from_bytes(bytes) {
        drop(LayoutReceiver::default().receive(&patch));
    }
    read::<ExpertRequest>(bytes);
    read::<ExpertReply>(bytes);
    read::<StageRequest>(bytes);
    read::<StageReply>(bytes);
    read::<GradientSum>(bytes);
    read::<ShardRequest>(bytes);
    read::<StoredShard>(bytes);
    read::<FrameRefusal>(bytes);
    read::<OperatorRequest>(bytes);
    read::<OperatorReply>(bytes);
    drop(serde_json::from_slice::<RunInfo>(bytes));
    drop(serde_json::from_slice::<volary_telemetry::SpanRecord>(bytes));
}

/// Encoded messages of several kinds.
#[doc(hidden)]
#[must_use]
pub fn fuzz_message_seeds() -> Vec<Vec<u8>> {
    fn encode(message: &impl Serialize) -> Option<Vec<u8>> {
        postcard::to_stdvec(message).ok()
    }
    let shard = ShardId::Expert { layer: LayerId(1), expert: ExpertId(2) };
    let epoch = Epoch(3);
    let to_supervisor = [
        ToSupervisor::Protocol(NodeReport::Ready { epoch }),
        ToSupervisor::Protocol(NodeReport::Learned {
            epoch,
            version: Step(7),
            shards: vec![shard, ShardId::Embedding],
        }),
        ToSupervisor::Profile(Box::new(Profile::relative(2.0))),
        ToSupervisor::Renew(vec![48, 1, 0]),
        ToSupervisor::Spans(vec!["{}".into()]),
    ];
    let assignment = Assignment {
        layout: Shared::default(),
        timeline: Timeline(1),
        version: Step(7),
        last: None,
        shards: vec![(shard, Source::Held)],
        learn: Vec::new(),
    };
    let layout = LayoutSender::new(Arc::default()).patch(&assignment).ok().map(ToNode::Layout);
    let assign = ToNode::Protocol(NodeCommand::Assign(Box::new(assignment)), None);
    let abort = ToNode::Protocol(NodeCommand::Abort { epoch }, None);
    let to_node = [Some(ToNode::NameInUse), Some(abort), layout, Some(assign)];
    let experts = vec![(ExpertId(0), 3), (ExpertId(5), 1)];
    let rows = ExpertRequest { layer: LayerId(0), lane: Lane(1), train: true, experts };
    let stage = StageRequest {
        lane: Lane(1),
        layers: LayerId::range(2..4),
        train: true,
        sampled_tokens: Vec::new(),
        load: vec![3, 1],
    };
    let wanted = ShardRequest { shard, version: Some(Step(7)) };
    let mut seeds: Vec<Vec<u8>> = to_supervisor.iter().filter_map(encode).collect();
    seeds.extend(to_node.iter().flatten().filter_map(encode));
    seeds.extend([encode(&rows), encode(&stage), encode(&wanted)].into_iter().flatten());
    seeds
}
