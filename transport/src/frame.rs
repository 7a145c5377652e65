//! Frames: a small typed header and metadata, then raw little-endian tensors. The layout is in
//! `frame/codec.rs`.

mod codec;

pub(crate) use codec::{FIXED, Fixed, PartHead, check_total};

use crate::error::{Error, Result};
use bytes::Bytes;
use volary_core::{Epoch, Step};

/// The purpose of a frame. Numbers are never reused for something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FrameKind {
    /// Input rows of experts, `[tokens, hidden]`: the forward pass.
    Forward = 1,
    /// Gradients of experts' outputs, `[tokens, hidden]`: the backward pass.
    Backward = 2,
    /// A reply.
    Reply = 3,
    /// A refusal, with the reason in its metadata.
    Refusal = 4,
    /// A partial sum of a shard's gradient, on its way to the owner.
    Partial = 5,
    /// A shard's total gradient, from its owner.
    Sum = 6,
    /// A request for a shard.
    ShardRequest = 7,
    /// A shard.
    Shard = 8,
    /// A shard for a checkpoint blob.
    Blob = 9,
    /// A link probe.
    Probe = 10,
    /// A lane's residual stream, `[tokens, hidden]`, for a pipeline stage.
    StageForward = 11,
    /// The gradient of the stage's output.
    StageBackward = 12,
}

impl FrameKind {
    const ALL: [Self; 12] = [
        Self::Forward,
        Self::Backward,
        Self::Reply,
        Self::Refusal,
        Self::Partial,
        Self::Sum,
        Self::ShardRequest,
        Self::Shard,
        Self::Blob,
        Self::Probe,
        Self::StageForward,
        Self::StageBackward,
    ];

    fn from_wire(number: u8) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|kind| *kind as u8 == number);
        found.ok_or_else(|| Error::malformed("frame", format!("unknown kind {number}")))
    }
}

/// The dtype of a tensor on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Dtype {
    /// 32-bit float.
    F32 = 1,
    /// bfloat16.
    BF16 = 2,
    /// 64-bit signed integer.
    I64 = 3,
    /// 8-bit unsigned integer.
    U8 = 4,
    /// 32-bit unsigned integer.
    U32 = 5,
}

impl Dtype {
    const ALL: [Self; 5] = [Self::F32, Self::BF16, Self::I64, Self::U8, Self::U32];

    /// Bytes of one element.
    #[must_use]
    pub fn size(self) -> u64 {
        match self {
            Self::U8 => 1,
            Self::BF16 => 2,
            Self::F32 | Self::U32 => 4,
            Self::I64 => 8,
        }
    }

    fn from_wire(number: u8) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|dtype| *dtype as u8 == number);
        found.ok_or_else(|| Error::malformed("frame", format!("unknown dtype {number}")))
    }
}

/// W3C trace context in binary; all zeros are no context.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TraceHeader {
    /// The trace identifier.
    pub trace_id: [u8; 16],
    /// The sender's span identifier.
    pub span_id: [u8; 8],
    /// Bit 0: sampled.
    pub flags: u8,
}

impl TraceHeader {
    /// Whether the trace is recorded.
    #[must_use]
    pub fn sampled(&self) -> bool {
        self.flags & 1 == 1
    }
}

/// A tensor as it crosses the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The dtype.
    pub dtype: Dtype,
    /// The shape, outermost first.
    pub shape: Vec<u64>,
    /// The elements, row-major, little-endian.
    pub data: Bytes,
}

/// One message of the data plane.
///
/// ```
/// use volary_core::{Epoch, Step};
/// use volary_transport::{Dtype, Frame, FrameKind, Part, TraceHeader};
///
/// let data = [1.0f32, 2.0].iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>().into();
/// let part = Part { dtype: Dtype::F32, shape: vec![1, 2], data };
/// let (trace, meta) = (TraceHeader::default(), "meta".into());
/// let (kind, epoch, step) = (FrameKind::Forward, Epoch(3), Step(4));
/// let frame = Frame { kind, epoch, step, trace, meta, parts: vec![part] };
/// let bytes = frame.encode()?.concat().into();
/// assert_eq!(Frame::decode(&bytes)?, frame);
/// # Ok::<(), volary_transport::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The purpose.
    pub kind: FrameKind,
    /// The placement epoch; receivers drop frames of other epochs.
    pub epoch: Epoch,
    /// The training step.
    pub step: Step,
    /// The trace context.
    pub trace: TraceHeader,
    /// A small serialized value.
    pub meta: Bytes,
    /// Tensors.
    pub parts: Vec<Part>,
}

#[cfg(test)]
mod tests;
