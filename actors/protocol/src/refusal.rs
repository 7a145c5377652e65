//! Why a peer refuses a frame: a code for programs, and a text for logs.

use crate::limits::REASON_BYTES_MAX;
use serde::{Deserialize, Serialize};
use std::fmt;

/// The kind of a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FrameRefusalCode {
    /// The frame belongs to an epoch, step or pass that is over on the receiver.
    Stale,
    /// The receiver did not begin the frame's step in time.
    NotBegun,
    /// The receiver does not hold the shard.
    MissingShard,
    /// The receiver holds the shard at another version.
    WrongVersion,
    /// The header or the tensors are malformed, or the receiver takes no frames of this kind.
    Malformed,
    /// The computation failed on the receiver.
    Failed,
    /// The placement does not foresee the frame from its sender.
    NotForeseen,
    /// A third process that the receiver needs for the answer cannot be reached.
    Unreachable,
}

/// A refusal of one frame.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrameRefusal {
    /// What kind of refusal it is.
    pub code: FrameRefusalCode,
    /// The reason, for logs.
    pub reason: String,
}

impl FrameRefusal {
    /// A refusal; a reason over the bound is cut.
    #[must_use]
    pub fn new(code: FrameRefusalCode, reason: impl fmt::Display) -> Self {
        let mut reason = reason.to_string();
        if reason.len() > REASON_BYTES_MAX {
            reason.truncate(reason.floor_char_boundary(REASON_BYTES_MAX));
        }
        Self { code, reason }
    }
}

impl fmt::Display for FrameRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}
