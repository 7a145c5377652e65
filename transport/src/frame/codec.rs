//! The layout of frames on the wire.
//!
//! ```text
//! 0   4  "VLRY"
//! 4   1  layout version
//! 5   1  kind
//! 6   2  number of tensors
//! 8   8  epoch
//! 16  8  step
//! 24 25  trace context: trace id 16, span id 8, flags 1
//! 49  3  zero
//! 52  4  bytes of metadata
//! 56     metadata, then per tensor: dtype 1, rank 1, dimensions 8 each, bytes 8
//!        then the tensors' data, one after the other
//! ```
//!
//! All numbers are little-endian. Every length is checked against [`crate::limits`] and against the shape
//! before memory is reserved for it.

use super::{Dtype, Frame, FrameKind, Part, TraceHeader};
use crate::error::{Error, Result};
use crate::limits::{FRAME_BYTES_MAX, META_BYTES_MAX, PART_BYTES_MAX, PARTS_MAX, RANK_MAX};
use bytes::{BufMut, Bytes, BytesMut};
use volary_core::{Epoch, Step};

const MAGIC: &[u8; 4] = b"VLRY";
const VERSION: u8 = 1;
/// Bytes of the fixed part of a header.
pub(crate) const FIXED: usize = 56;

/// The bytes of a tensor, if they are within the bounds.
pub(super) fn shape_bytes(dtype: Dtype, shape: &[u64]) -> Option<u64> {
    shape
        .iter()
        .try_fold(dtype.size(), |bytes, &n| bytes.checked_mul(n))
        .filter(|&bytes| bytes <= PART_BYTES_MAX)
}

impl Frame {
    /// The encoded pieces in their order on the wire; tensors are not copied.
    ///
    /// # Errors
    /// [`Error::TooLarge`] when the frame exceeds a bound, or the data of a tensor does not match its shape.
    pub fn encode(&self) -> Result<Vec<Bytes>> {
        if self.meta.len() > META_BYTES_MAX || self.parts.len() > PARTS_MAX {
            return Err(Error::too_large(format!(
                "{} bytes of metadata, {} tensors",
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
                return Err(Error::too_large(format!(
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
            return Err(Error::too_large(format!("{total} bytes of tensors")));
        }
        Ok(std::iter::once(head.freeze()).chain(self.parts.iter().map(|part| part.data.clone())).collect())
    }

    /// Decodes a frame from all of its bytes with the checks of the stream reader, for tests and fuzzing.
    ///
    /// # Errors
    /// [`Error::Malformed`] when the bytes are not a frame, or exceed a bound.
    pub fn decode(bytes: &Bytes) -> Result<Self> {
        let mut cursor = Cursor { bytes, at: 0 };
        let head = Head::decode(&mut cursor)?;
        let data = |part: &PartHead| Ok(bytes.slice_ref(cursor.take(part.bytes as usize)?));
        let data = head.parts.iter().map(data).collect::<Result<Vec<_>>>()?;
        if cursor.at != bytes.len() {
            return Err(Error::malformed("frame", format!("{} extra bytes", bytes.len() - cursor.at)));
        }
        Ok(head.frame(data))
    }

    /// Decodes the pieces of [`Frame::encode`] without copying tensors.
    #[cfg(any(test, feature = "test-util"))]
    pub(crate) fn from_pieces(pieces: &[Bytes]) -> Result<Self> {
        let (bytes, data) = pieces.split_first().ok_or_else(cut)?;
        let head = Head::decode(&mut Cursor { bytes, at: 0 })?;
        let sizes = head.parts.iter().map(|part| part.bytes as usize);
        if !sizes.eq(data.iter().map(Bytes::len)) {
            return Err(cut());
        }
        Ok(head.frame(data.to_vec()))
    }
}

/// Everything before the tensors' data.
struct Head {
    fixed: Fixed,
    meta: Bytes,
    parts: Vec<PartHead>,
}

impl Head {
    fn decode(cursor: &mut Cursor<'_>) -> Result<Self> {
        let fixed = Fixed::decode(cursor.take(FIXED)?)?;
        let meta = cursor.bytes.slice_ref(cursor.take(fixed.meta)?);
        let mut parts = Vec::new();
        for _ in 0..fixed.parts {
            let [dtype, rank] = cursor.take(2)? else { return Err(cut()) };
            parts.push(PartHead::decode(*dtype, *rank, cursor.take(PartHead::rest(*rank)?)?)?);
        }
        check_total(&parts)?;
        Ok(Self { fixed, meta, parts })
    }

    fn frame(self, data: Vec<Bytes>) -> Frame {
        let part = |(head, data): (PartHead, Bytes)| Part { dtype: head.dtype, shape: head.shape, data };
        self.fixed.frame(self.meta, self.parts.into_iter().zip(data).map(part).collect())
    }
}

fn cut() -> Error {
    Error::malformed("frame", "it is cut short")
}

/// Reads bytes in order.
struct Cursor<'a> {
    bytes: &'a Bytes,
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
            return Err(Error::malformed("frame", "wrong magic bytes"));
        }
        let [version, kind] = number(bytes, 4)?;
        if version != VERSION {
            return Err(Error::malformed("frame", format!("layout {version}, expected {VERSION}")));
        }
        let parts = usize::from(u16::from_le_bytes(number(bytes, 6)?));
        let meta = u32::from_le_bytes(number(bytes, 52)?) as usize;
        if parts > PARTS_MAX || meta > META_BYTES_MAX {
            return Err(Error::malformed("frame", format!("{meta} bytes of metadata, {parts} tensors")));
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

/// The header of a tensor.
pub(crate) struct PartHead {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<u64>,
    pub(crate) bytes: u64,
}

impl PartHead {
    /// Bytes of a part's header after its first two.
    pub(crate) fn rest(rank: u8) -> Result<usize> {
        if usize::from(rank) > RANK_MAX {
            return Err(Error::malformed("frame", format!("a tensor of rank {rank}, at most {RANK_MAX}")));
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
