//! Frames: a small typed header and words, then raw little-endian tensors.
//!
//! ```text
//! 0   4  "VLRY"
//! 4   1  version of this layout
//! 5   1  kind
//! 6   2  number of tensors
//! 8   8  epoch
//! 16  8  step
//! 24 25  trace context: trace id 16, span id 8, flags 1
//! 49  3  zero
//! 52  4  bytes of words
//! 56     words, then per tensor: number type 1, rank 1, dimensions 8 each, bytes 8
//!        then the tensors' bytes, one after the other
//! ```
//!
//! All numbers are little-endian. Every length is checked against [`crate::limits`] and against the shape before
//! memory is reserved for it.

use crate::error::{Error, Result};
use crate::limits::{FRAME_BYTES_MAX, META_BYTES_MAX, PART_BYTES_MAX, PARTS_MAX, RANK_MAX};
use bytes::{BufMut, Bytes, BytesMut};
use volary_core::{Epoch, Step};

const MAGIC: &[u8; 4] = b"VLRY";
const VERSION: u8 = 1;
pub(crate) const FIXED: usize = 56;

/// What a frame is for. Numbers are never used again for something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FrameKind {
    /// Rows for experts, forward.
    Forward = 1,
    /// Gradients of experts' outputs.
    Backward = 2,
    /// An answer.
    Reply = 3,
    /// A refusal, with the reason in its words.
    Refusal = 4,
    /// A part of a shard's gradient, to its owner.
    Partial = 5,
    /// A shard's whole gradient, from its owner.
    Sum = 6,
    /// The wish for a shard.
    ShardRequest = 7,
    /// A shard.
    Shard = 8,
    /// A shard for a checkpoint.
    Blob = 9,
    /// A measurement.
    Probe = 10,
    /// A lane's residual stream for a stage's layers.
    StageForward = 11,
    /// The gradient of what came of it.
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

/// The number type of a tensor on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Dtype {
    /// 32-bit float.
    F32 = 1,
    /// bfloat16.
    BF16 = 2,
    /// 64-bit integer.
    I64 = 3,
    /// Byte.
    U8 = 4,
    /// 32-bit unsigned integer.
    U32 = 5,
}

impl Dtype {
    const ALL: [Self; 5] = [Self::F32, Self::BF16, Self::I64, Self::U8, Self::U32];

    /// Bytes of one number.
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
        found.ok_or_else(|| Error::malformed("frame", format!("unknown number type {number}")))
    }
}

/// W3C trace context in binary; all zero is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TraceHeader {
    /// The trace.
    pub trace_id: [u8; 16],
    /// The sender's span.
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
    /// The number type.
    pub dtype: Dtype,
    /// The shape, outermost first.
    pub shape: Vec<u64>,
    /// Row-major, little-endian.
    pub data: Bytes,
}

/// One message of the data plane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it is for.
    pub kind: FrameKind,
    /// The placement's number; receivers drop what is stale.
    pub epoch: Epoch,
    /// The step.
    pub step: Step,
    /// Where it belongs in a trace.
    pub trace: TraceHeader,
    /// The sender's words: a small serialized value.
    pub meta: Bytes,
    /// Tensors.
    pub parts: Vec<Part>,
}

/// The number of bytes that a shape takes, if it is within the bounds.
fn shape_bytes(dtype: Dtype, shape: &[u64]) -> Option<u64> {
    shape
        .iter()
        .try_fold(dtype.size(), |bytes, &n| bytes.checked_mul(n))
        .filter(|&bytes| bytes <= PART_BYTES_MAX)
}

impl Frame {
    /// The pieces that go over the wire one after the other; tensors are not copied.
    ///
    /// # Errors
    /// When the frame is over a bound, or a tensor's bytes are not as many as its shape says.
    pub fn encode(&self) -> Result<Vec<Bytes>> {
        let too_much = |reason: String| Error::TooLarge { what: "frame", reason };
        if self.meta.len() > META_BYTES_MAX || self.parts.len() > PARTS_MAX {
            return Err(too_much(format!(
                "{} bytes of words, {} tensors",
                self.meta.len(),
                self.parts.len()
            )));
        }
        let mut head =
            BytesMut::with_capacity(FIXED + self.meta.len() + self.parts.len() * (10 + 8 * RANK_MAX));
        head.put_slice(MAGIC);
        head.put_u8(VERSION);
        head.put_u8(self.kind as u8);
        head.put_u16_le(self.parts.len() as u16);
        head.put_u64_le(self.epoch.0);
        head.put_u64_le(self.step.0);
        head.put_slice(&self.trace.trace_id);
        head.put_slice(&self.trace.span_id);
        head.put_u8(self.trace.flags);
        head.put_bytes(0, 3);
        head.put_u32_le(self.meta.len() as u32);
        head.put_slice(&self.meta);
        let mut total = 0;
        for part in &self.parts {
            let bytes = shape_bytes(part.dtype, &part.shape).filter(|&bytes| bytes == part.data.len() as u64);
            if bytes.is_none() || part.shape.len() > RANK_MAX {
                return Err(too_much(format!(
                    "{} bytes for a tensor of shape {:?}",
                    part.data.len(),
                    part.shape
                )));
            }
            total += part.data.len() as u64;
            head.put_u8(part.dtype as u8);
            head.put_u8(part.shape.len() as u8);
            part.shape.iter().for_each(|&n| head.put_u64_le(n));
            head.put_u64_le(part.data.len() as u64);
        }
        if total > FRAME_BYTES_MAX {
            return Err(too_much(format!("{total} bytes of tensors")));
        }
        Ok(std::iter::once(head.freeze()).chain(self.parts.iter().map(|part| part.data.clone())).collect())
    }

    /// A frame from all of its bytes: what the stream reader does, for tests and for hostile input.
    ///
    /// # Errors
    /// When the bytes are no frame, or over a bound.
    pub fn decode(bytes: &Bytes) -> Result<Self> {
        let mut cursor = Cursor { bytes, at: 0 };
        let fixed = Fixed::decode(cursor.take(FIXED)?)?;
        let meta = bytes.slice_ref(cursor.take(fixed.meta)?);
        let mut heads = Vec::new();
        for _ in 0..fixed.parts {
            let [dtype, rank] = cursor.take(2)? else { return Err(cut()) };
            heads.push(PartHead::decode(*dtype, *rank, cursor.take(PartHead::rest(*rank)?)?)?);
        }
        check_total(&heads)?;
        let mut parts = Vec::new();
        for head in heads {
            let data = bytes.slice_ref(cursor.take(head.bytes as usize)?);
            parts.push(Part { dtype: head.dtype, shape: head.shape, data });
        }
        if cursor.at != bytes.len() {
            return Err(Error::malformed("frame", format!("{} bytes too many", bytes.len() - cursor.at)));
        }
        Ok(fixed.frame(meta, parts))
    }
}

fn cut() -> Error {
    Error::malformed("frame", "it is cut short")
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(count).ok_or_else(cut)?;
        let taken = self.bytes.get(self.at..end).ok_or_else(cut)?;
        self.at = end;
        Ok(taken)
    }
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N]> {
    bytes.get(at..at + N).and_then(|slice| slice.try_into().ok()).ok_or_else(cut)
}

/// The fixed part of a header.
pub(crate) struct Fixed {
    kind: FrameKind,
    pub(crate) parts: usize,
    epoch: Epoch,
    step: Step,
    trace: TraceHeader,
    pub(crate) meta: usize,
}

impl Fixed {
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self> {
        if bytes.get(..4) != Some(MAGIC) {
            return Err(Error::malformed("frame", "it does not begin as one"));
        }
        let [version, kind] = number(bytes, 4)?;
        if version != VERSION {
            return Err(Error::malformed("frame", format!("layout {version}, and this is {VERSION}")));
        }
        let parts = usize::from(u16::from_le_bytes(number(bytes, 6)?));
        let meta = u32::from_le_bytes(number(bytes, 52)?) as usize;
        if parts > PARTS_MAX || meta > META_BYTES_MAX {
            return Err(Error::malformed("frame", format!("{meta} bytes of words, {parts} tensors")));
        }
        let [flags] = number(bytes, 48)?;
        Ok(Self {
            kind: FrameKind::from_wire(kind)?,
            parts,
            epoch: Epoch(u64::from_le_bytes(number(bytes, 8)?)),
            step: Step(u64::from_le_bytes(number(bytes, 16)?)),
            trace: TraceHeader { trace_id: number(bytes, 24)?, span_id: number(bytes, 40)?, flags },
            meta,
        })
    }

    pub(crate) fn frame(self, meta: Bytes, parts: Vec<Part>) -> Frame {
        Frame { kind: self.kind, epoch: self.epoch, step: self.step, trace: self.trace, meta, parts }
    }
}

/// What a tensor's bytes will be.
pub(crate) struct PartHead {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<u64>,
    pub(crate) bytes: u64,
}

impl PartHead {
    /// Bytes of a part's header after its first two.
    pub(crate) fn rest(rank: u8) -> Result<usize> {
        if usize::from(rank) > RANK_MAX {
            return Err(Error::malformed("frame", format!("a tensor of rank {rank}")));
        }
        Ok(8 * usize::from(rank) + 8)
    }

    pub(crate) fn decode(dtype: u8, rank: u8, rest: &[u8]) -> Result<Self> {
        let dtype = Dtype::from_wire(dtype)?;
        let at = |index: usize| Ok(u64::from_le_bytes(number(rest, 8 * index)?));
        let shape = (0..usize::from(rank)).map(at).collect::<Result<Vec<_>>>()?;
        let bytes = at(usize::from(rank))?;
        if shape_bytes(dtype, &shape) != Some(bytes) {
            return Err(Error::malformed("frame", format!("{bytes} bytes for a tensor of shape {shape:?}")));
        }
        Ok(Self { dtype, shape, bytes })
    }
}

pub(crate) fn check_total(heads: &[PartHead]) -> Result<()> {
    let total = heads.iter().map(|head| head.bytes).sum::<u64>();
    if total > FRAME_BYTES_MAX {
        return Err(Error::malformed("frame", format!("{total} bytes of tensors")));
    }
    Ok(())
}

#[cfg(test)]
#[path = "frame_tests.rs"]
mod tests;
