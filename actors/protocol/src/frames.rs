//! Tensor frames: the header of each kind, and how frames are built and read.
//!
//! A frame has a kind, the epoch and step that it belongs to, a trace header, a typed header (the structs
//! here, in postcard) and parts: tensors as raw little-endian bytes, or one stored shard.

use crate::error::{Error, Result};
use crate::refusal::FrameRefusal;
use crate::trace::SampledToken;
use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use volary_core::compute::{Compute, HostDtype, HostTensor};
use volary_core::tree::LeafSpan;
use volary_core::{Epoch, ExpertId, Lane, LayerId, LayerRange, ShardId, Step};
use volary_telemetry::SpanIdentity;
use volary_transport::{Dtype, Frame, FrameKind, Part, TraceHeader};

/// Rows of one lane for the experts of one node; the rows are the frame's only part, `[rows, hidden]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExpertRequest {
    /// The MoE layer.
    pub layer: LayerId,
    /// The lane.
    pub lane: Lane,
    /// Whether a backward pass follows.
    pub train: bool,
    /// Experts and their numbers of rows, in the order of the rows.
    pub experts: Vec<(ExpertId, u32)>,
}

/// The answer to an [`ExpertRequest`]; its part has as many rows in the same order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpertReply {
    /// The lane.
    pub lane: Lane,
    /// Microseconds between arrival and answer; the rest of the round trip is wire time.
    pub remote_us: u64,
}

/// One lane's residual stream, or its gradient, for the layers of a pipeline stage; the frame's only part,
/// `[sequences, sequence_length, hidden]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StageRequest {
    /// The lane.
    pub lane: Lane,
    /// The stage's layers.
    pub layers: LayerRange,
    /// Whether a backward pass follows.
    pub train: bool,
    /// Sampled tokens of the lane.
    pub sampled_tokens: Vec<SampledToken>,
    /// In the backward pass, the lane's assignments to each expert over all MoE layers; otherwise empty.
    pub load: Vec<u32>,
}

/// The answer to a [`StageRequest`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StageReply {
    /// The lane.
    pub lane: Lane,
    /// Microseconds between arrival and answer.
    pub remote_us: u64,
    /// Statistics of the stage's MoE layers; empty in the backward pass.
    pub stats: StageStats,
}

/// Statistics of a stage's MoE layers, in the order of the layers.
pub type StageStats = Vec<MoeLayerStats>;

/// Statistics of one MoE layer and lane, from the forward pass.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MoeLayerStats {
    /// The load-balancing loss (GShard, arXiv 2006.16668, section 2.2); 1 when the load is even.
    pub aux_loss: f64,
    /// Mean entropy of the gate's probabilities, in nats.
    pub entropy: f64,
    /// Kept assignments per expert.
    pub load: Vec<u32>,
    /// Assignments dropped for lack of capacity.
    pub dropped: u32,
}

/// A sum over some leaves of a shard's gradient. No parts mean that no token reached the expert.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GradientSum {
    /// The shard.
    pub shard: ShardId,
    /// The leaves that are summed.
    pub span: LeafSpan,
}

/// A request for a shard, at a version or at the holder's present version.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShardRequest {
    /// The shard.
    pub shard: ShardId,
    /// The version.
    pub version: Option<Step>,
}

/// The header of a frame with a stored shard.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StoredShard {
    /// The shard.
    pub shard: ShardId,
    /// Its version.
    pub version: Step,
}

/// The trace header of a span.
#[must_use]
pub fn trace_header(SpanIdentity { trace_id, span_id, flags }: SpanIdentity) -> TraceHeader {
    TraceHeader { trace_id, span_id, flags }
}

/// The span that sent a frame.
#[must_use]
pub fn origin(frame: &Frame) -> SpanIdentity {
    let TraceHeader { trace_id, span_id, flags } = frame.trace;
    SpanIdentity { trace_id, span_id, flags }
}

/// A frame of tensors.
///
/// # Errors
/// When the header cannot be encoded.
pub fn frame(
    kind: FrameKind,
    epoch: Epoch,
    step: Step,
    header: &impl Serialize,
    tensors: Vec<HostTensor>,
) -> Result<Frame> {
    let parts = tensors.into_iter().map(part).collect();
    with_parts(kind, epoch, step, header, parts)
}

/// A frame around stored bytes.
///
/// # Errors
/// When the header cannot be encoded.
pub fn blob(
    kind: FrameKind,
    epoch: Epoch,
    step: Step,
    header: &impl Serialize,
    data: Vec<u8>,
) -> Result<Frame> {
    let part = Part { dtype: Dtype::U8, shape: vec![data.len() as u64], data: data.into() };
    with_parts(kind, epoch, step, header, vec![part])
}

fn with_parts(
    kind: FrameKind,
    epoch: Epoch,
    step: Step,
    header: &impl Serialize,
    parts: Vec<Part>,
) -> Result<Frame> {
    let encoded = postcard::to_stdvec(header);
    let meta = encoded.map_err(|error| Error::Encode { kind, reason: error.to_string() })?.into();
    Ok(Frame { kind, epoch, step, trace: TraceHeader::default(), meta, parts })
}

/// The refusal of a frame of this epoch and step.
#[must_use]
pub fn refused(epoch: Epoch, step: Step, refusal: &FrameRefusal) -> Frame {
    let meta = postcard::to_stdvec(refusal).unwrap_or_default().into();
    Frame { kind: FrameKind::Refusal, epoch, step, trace: TraceHeader::default(), meta, parts: Vec::new() }
}

/// Reads the typed header of a frame.
///
/// # Errors
/// When the bytes are not such a header.
pub fn decode<T: DeserializeOwned>(frame: &Frame) -> Result<T> {
    postcard::from_bytes(&frame.meta).map_err(|error| Error::malformed(frame.kind, error.to_string()))
}

fn part(tensor: HostTensor) -> Part {
    let dtype = match tensor.dtype {
        HostDtype::F32 => Dtype::F32,
        HostDtype::Bf16 => Dtype::BF16,
    };
    Part { dtype, shape: tensor.shape.iter().map(|&n| n as u64).collect(), data: tensor.data.into() }
}

/// The dtype, shape and bytes of a part of floats.
///
/// # Errors
/// When the part holds something else.
pub fn floats(kind: FrameKind, part: &Part) -> Result<(HostDtype, Vec<usize>, &[u8])> {
    let dtype = match part.dtype {
        Dtype::F32 => HostDtype::F32,
        Dtype::BF16 => HostDtype::Bf16,
        other => return Err(Error::malformed(kind, format!("a tensor of {other:?}, expected floats"))),
    };
    Ok((dtype, part.shape.iter().map(|&n| n as usize).collect(), &part.data))
}

/// The only tensor of a frame, imported into the device.
///
/// # Errors
/// When the frame does not have exactly one tensor of floats, or the device does not take it.
pub fn import_one<B: Compute>(backend: &B, frame: &Frame) -> Result<B::Tensor> {
    let [part] = frame.parts.as_slice() else {
        return Err(Error::malformed(frame.kind, format!("{} tensors, expected 1", frame.parts.len())));
    };
    let (dtype, shape, data) = floats(frame.kind, part)?;
    Ok(backend.import(dtype, &shape, data)?)
}

/// The only part of a frame that carries stored bytes.
///
/// # Errors
/// When the frame does not have exactly one such part.
pub fn only_blob(frame: Frame) -> Result<Bytes> {
    let kind = frame.kind;
    match <[Part; 1]>::try_from(frame.parts) {
        Ok([part]) if part.dtype == Dtype::U8 => Ok(part.data),
        _ => Err(Error::malformed(kind, "expected one part of bytes")),
    }
}
