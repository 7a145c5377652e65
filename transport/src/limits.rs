//! Every bound of the transport, in one place.

use std::time::Duration;

/// Bytes of one message on a control stream.
pub const CONTROL_BYTES_MAX: usize = 16 << 20;
/// Bytes of a frame's words.
pub const META_BYTES_MAX: usize = 1 << 20;
/// Tensors in a frame.
pub const PARTS_MAX: usize = 4096;
/// Bytes of one tensor.
pub const PART_BYTES_MAX: u64 = 2 << 30;
/// Bytes of all tensors of a frame.
pub const FRAME_BYTES_MAX: u64 = 4 << 30;
/// Dimensions of a tensor.
pub const RANK_MAX: usize = 6;
/// Bytes that are reserved on a peer's word; room for more is made once so much has come.
pub const RESERVE_BYTES_MAX: usize = 64 << 20;
/// What a tensor off the wire is aligned to, in bytes: the device's libraries compute the same wherever it lies.
pub const ALIGNMENT_BYTES: usize = 64;
/// Streams that a peer may have open at a time, each way.
pub const STREAMS_MAX: u32 = 1024;
/// Bytes of a first message.
pub const HELLO_BYTES_MAX: usize = 16 << 10;
/// How long a handshake may take.
pub const HANDSHAKE_MAX: Duration = Duration::from_secs(5);
/// Connections that say who they are or wait to be taken up; more are turned away.
pub const INCOMING_MAX: usize = 256;
/// How long a frame that has begun may bring nothing before its link is closed.
pub const STALL_MAX: Duration = if cfg!(test) { Duration::from_millis(400) } else { Duration::from_secs(60) };
/// Frames of one link that wait to be taken up.
pub const INBOUND_MAX: usize = 64;
/// Control messages of one in-memory link that wait to be taken up.
pub const CONTROL_AHEAD_MAX: usize = 1024;
/// How long a canary's connection may take to show its key.
pub const CANARY_KEY_MAX: Duration = Duration::from_secs(2);
/// Connections to a canary that have not shown a key yet; more are turned away.
pub const CANARY_STRANGERS_MAX: usize = 64;
/// Characters of a node's name.
pub const NAME_MAX: usize = 100;
