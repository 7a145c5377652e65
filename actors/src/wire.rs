//! The words that nodes say to each other, and how they become frames. Messages with reply ports never cross the wire.

use crate::stage::MoeLayerStats;
use crate::trace::{SampledToken, TraceRequest};
use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use volary_core::architecture::Architecture;
use volary_core::compute::{Compute, ComputeError, Computed, HostDtype, HostTensor};
use volary_core::messages::{NodeCommand, NodeReport, ResidentState};
use volary_core::options::{TelemetryOptions, TrainingOptions};
use volary_core::profile::Profile;
use volary_core::tree::LeafSpan;
use volary_core::{Epoch, Lane, ShardId, Step};
use volary_telemetry::SpanIdentity;
use volary_transport::{CanaryKey, Dtype, Frame, Issued, Kind, Part, TraceHeader};

/// What a node tells the supervisor about itself when it joins.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeInfo {
    /// Its process.
    pub pid: u32,
    /// Its device, as `cpu` or `cuda:0`.
    pub device: String,
    /// Threads of its device executor.
    pub threads: usize,
    /// What it can do; nothing before it has measured itself, for which it must know the run.
    pub profile: Option<Profile>,
    /// Where its peers reach it.
    pub address: String,
    /// Where its figures are served, if they are.
    pub http: Option<String>,
    /// A number that its process drew when it started: a process that comes back is told from another of its name.
    pub instance: u64,
}

/// What a node knows of its link to another one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkReport {
    /// The other node.
    pub peer: String,
    /// The round trip, in milliseconds.
    pub round_trip_ms: f64,
    /// Bytes sent since the link was made.
    pub sent_bytes: u64,
    /// Bytes received since the link was made.
    pub received_bytes: u64,
    /// Bytes per second in one direction, as measured once; nothing before.
    pub bandwidth: Option<f64>,
}

/// What a node must know of the run before it can do anything.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunInfo {
    /// The run's name.
    pub run: String,
    /// The run's seed.
    pub seed: u64,
    /// The model.
    pub architecture: Architecture,
    /// The training.
    pub training: TrainingOptions,
    /// How long a silent peer is believed alive, in milliseconds.
    pub node_timeout_ms: u64,
    /// How long a node keeps its state and waits for a supervisor that is gone, in milliseconds.
    pub supervisor_timeout_ms: u64,
    /// Whether nodes measure themselves before they are placed.
    pub measure: bool,
    /// What is traced, and where to.
    pub telemetry: TelemetryOptions,
}

impl RunInfo {
    /// Whether state of one is state of the other.
    pub(crate) fn same_model(&self, other: &Self) -> bool {
        (&self.run, self.seed, &self.architecture) == (&other.run, other.seed, &other.architecture)
    }
}

/// Supervisor to node, on the control stream.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum ToNode {
    /// The answer to [`ToSupervisor::Hello`].
    Welcome(Box<Welcome>),
    /// The name is taken by a living process: try again later, or under another name.
    NameInUse,
    /// The answer to [`ToSupervisor::Renew`].
    Renewed(Issued),
    /// Hashes of certificates that are not good any more, between nodes either.
    Revoked(Vec<[u8; 32]>),
    /// The protocol, and the trace that it belongs to.
    Protocol(NodeCommand, Option<TraceRequest>),
}

/// Node to supervisor, on the control stream.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum ToSupervisor {
    /// The first words: what it is, and what it has in memory.
    Hello(NodeInfo, ResidentState),
    /// The protocol.
    Protocol(NodeReport),
    /// What it measured of itself: now it can be placed.
    Profile(Box<Profile>),
    /// A request for another certificate, for a new key, before the present one ends.
    Renew(Vec<u8>),
    /// Now and then: the links to other nodes.
    Links(Vec<LinkReport>),
    /// Spans that have ended, as JSON: the run keeps them.
    Spans(Vec<String>),
}

/// What a node is told when it is let in.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Welcome {
    /// A [`RunInfo`] as JSON, since its tagged options need a format that describes itself.
    pub(crate) run: String,
    /// Whether it may keep what it has in memory.
    pub(crate) keep: bool,
    /// The port of the canary on the supervisor's host and the key to show there, if there is one.
    pub(crate) canary: Option<(u16, CanaryKey)>,
    /// Hashes of certificates that are not good any more.
    pub(crate) revoked: Vec<[u8; 32]>,
}

/// The words with a batch of rows to or from experts; the rows are the frame's only part.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Batch {
    pub(crate) layer: u16,
    pub(crate) lane: Lane,
    pub(crate) train: bool,
    /// Experts and their rows, in the order of the rows.
    pub(crate) experts: Vec<(u16, u32)>,
}

/// The words with the answer to a [`Batch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Answered {
    pub(crate) lane: Lane,
    /// How long the rows were here: what the asker waited beyond that, they were on the wire.
    pub(crate) here_us: u64,
}

/// The words with a lane's residual stream, or its gradient, for the layers of a stage; the stream is the frame's only part.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct StageRequest {
    pub(crate) lane: Lane,
    pub(crate) layers: std::ops::Range<u16>,
    pub(crate) train: bool,
    /// Tokens of the lane that are sampled_tokens.
    pub(crate) sampled_tokens: Vec<SampledToken>,
}

/// The words with the answer to a [`StageRequest`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct StageReply {
    pub(crate) lane: Lane,
    /// How long the stream was here.
    pub(crate) here_us: u64,
    /// What the layers with experts found; nothing on the way back.
    pub(crate) found: Vec<MoeLayerStats>,
}

/// The words with a sum over some leaves of a shard's gradient; no parts mean that no token met the expert.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct SumOf {
    pub(crate) shard: ShardId,
    pub(crate) span: LeafSpan,
}

/// The words with the wish for a shard, at a version or at whatever version it has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ShardWish {
    pub(crate) shard: ShardId,
    pub(crate) version: Option<Step>,
}

/// The words with a shard.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ShardAt {
    pub(crate) shard: ShardId,
    pub(crate) version: Step,
}

/// The trace context of a frame's header.
pub(crate) fn trace(SpanIdentity { trace_id, span_id, flags }: SpanIdentity) -> TraceHeader {
    TraceHeader { trace_id, span_id, flags }
}

/// The span that a frame came from.
pub(crate) fn origin(frame: &Frame) -> SpanIdentity {
    let TraceHeader { trace_id, span_id, flags } = frame.trace;
    SpanIdentity { trace_id, span_id, flags }
}

pub(crate) fn frame(
    kind: Kind,
    epoch: Epoch,
    step: Step,
    meta: &impl Serialize,
    tensors: Vec<HostTensor>,
) -> Computed<Frame> {
    let parts = tensors.into_iter().map(part).collect();
    Ok(Frame { kind, epoch, step, trace: TraceHeader::default(), meta: encode(meta)?, parts })
}

/// A frame around stored bytes.
pub(crate) fn blob(
    kind: Kind,
    epoch: Epoch,
    step: Step,
    meta: &impl Serialize,
    data: Vec<u8>,
) -> Computed<Frame> {
    let part = Part { dtype: Dtype::U8, shape: vec![data.len() as u64], data: data.into() };
    Ok(Frame { kind, epoch, step, trace: TraceHeader::default(), meta: encode(meta)?, parts: vec![part] })
}

pub(crate) fn refusal(epoch: Epoch, step: Step, reason: &str) -> Frame {
    let meta = encode(&reason).unwrap_or_default();
    Frame { kind: Kind::Refusal, epoch, step, trace: TraceHeader::default(), meta, parts: Vec::new() }
}

fn encode(meta: &impl Serialize) -> Computed<Bytes> {
    postcard::to_stdvec(meta)
        .map(Bytes::from)
        .map_err(|error| ComputeError(format!("words for the wire: {error}")))
}

pub(crate) fn decode<T: DeserializeOwned>(frame: &Frame) -> Computed<T> {
    postcard::from_bytes(&frame.meta)
        .map_err(|error| ComputeError(format!("the words of a {:?} frame: {error}", frame.kind)))
}

fn part(tensor: HostTensor) -> Part {
    let dtype = match tensor.dtype {
        HostDtype::F32 => Dtype::F32,
        HostDtype::Bf16 => Dtype::BF16,
    };
    Part { dtype, shape: tensor.shape.iter().map(|&n| n as u64).collect(), data: tensor.data.into() }
}

/// A part's number type, shape and bytes, if it holds floats.
pub(crate) fn floats(part: &Part) -> Computed<(HostDtype, Vec<usize>, &[u8])> {
    let dtype = match part.dtype {
        Dtype::F32 => HostDtype::F32,
        Dtype::BF16 => HostDtype::Bf16,
        other => return Err(ComputeError(format!("a tensor of {other:?} came where floats were expected"))),
    };
    Ok((dtype, part.shape.iter().map(|&n| n as usize).collect(), &part.data))
}

/// The only tensor of a frame.
pub(crate) fn import_one<B: Compute>(backend: &B, frame: &Frame) -> Computed<B::Tensor> {
    let [part] = frame.parts.as_slice() else {
        return Err(ComputeError(format!(
            "a {:?} frame came with {} tensors, not 1",
            frame.kind,
            frame.parts.len()
        )));
    };
    let (dtype, shape, data) = floats(part)?;
    backend.import(dtype, &shape, data)
}

/// The only blob of a frame.
pub(crate) fn only_blob(frame: Frame) -> Computed<Bytes> {
    let kind = frame.kind;
    match <[Part; 1]>::try_from(frame.parts) {
        Ok([part]) if part.dtype == Dtype::U8 => Ok(part.data),
        _ => Err(ComputeError(format!("a {kind:?} frame came without its one blob"))),
    }
}

/// Reads bytes as each kind of words.
pub(crate) fn fuzz(bytes: &[u8]) {
    fn read<T: DeserializeOwned>(bytes: &[u8]) {
        drop(postcard::from_bytes::<T>(bytes));
    }
    read::<ToSupervisor>(bytes);
    read::<ToNode>(bytes);
    read::<Batch>(bytes);
    read::<StageRequest>(bytes);
    read::<StageReply>(bytes);
    read::<SumOf>(bytes);
    read::<ShardWish>(bytes);
    read::<ShardAt>(bytes);
    read::<crate::operator::OperatorRequest>(bytes);
    read::<crate::operator::OperatorReply>(bytes);
    drop(serde_json::from_slice::<RunInfo>(bytes));
    drop(serde_json::from_slice::<volary_telemetry::SpanRecord>(bytes));
}

pub(crate) fn fuzz_seeds() -> Vec<Vec<u8>> {
    let shard = ShardId::Expert { layer: 1, expert: 2 };
    let up = [
        ToSupervisor::Protocol(NodeReport::Ready { epoch: 3 }),
        ToSupervisor::Protocol(NodeReport::Learned { epoch: 3, shards: vec![shard, ShardId::Embedding] }),
        ToSupervisor::Profile(Box::new(Profile::relative(2.0))),
        ToSupervisor::Renew(vec![48, 1, 0]),
        ToSupervisor::Spans(vec!["{}".into()]),
    ];
    let down = [ToNode::NameInUse, ToNode::Protocol(NodeCommand::Abort { epoch: 3 }, None)];
    let batch = Batch { layer: 0, lane: 1, train: true, experts: vec![(0, 3), (5, 1)] };
    let stage = StageRequest { lane: 1, layers: 2..4, train: true, sampled_tokens: Vec::new() };
    let mut seeds: Vec<Vec<u8>> = up.iter().filter_map(|word| postcard::to_stdvec(word).ok()).collect();
    seeds.extend(down.iter().filter_map(|word| postcard::to_stdvec(word).ok()));
    seeds.extend(postcard::to_stdvec(&batch).ok());
    seeds.extend(postcard::to_stdvec(&stage).ok());
    seeds.extend(postcard::to_stdvec(&ShardWish { shard, version: Some(7) }).ok());
    seeds
}
