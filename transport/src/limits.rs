//! Every bound of the transport, in one place.

use std::time::Duration;

/// Bytes of one message on a control stream.
pub const CONTROL_BYTES_MAX: usize = 16 << 20;
/// Bytes of a frame's metadata.
pub const META_BYTES_MAX: usize = 1 << 20;
/// Tensors in a frame.
pub const PARTS_MAX: usize = 4096;
/// Bytes of one tensor.
pub const PART_BYTES_MAX: u64 = 32 << 30;
/// Bytes of all tensors of a frame.
pub const FRAME_BYTES_MAX: u64 = 64 << 30;
/// Dimensions of a tensor.
pub const RANK_MAX: usize = 6;
/// Bytes reserved for a tensor before they arrive; the rest is reserved after this much has arrived.
pub const RESERVE_BYTES_MAX: usize = 64 << 20;
/// Alignment of received tensors in bytes: the device's libraries then compute the same result at every
/// address.
pub const ALIGNMENT_BYTES: usize = 64;
/// Streams that a peer may have open at a time, per direction.
pub const STREAMS_MAX: u32 = 1024;
/// Flow-control window of one stream, in bytes.
pub const STREAM_WINDOW_BYTES: u32 = 1 << 20;
/// Flow-control window of one connection, in bytes.
pub const RECEIVE_WINDOW_BYTES: u32 = 4 << 20;
/// Bytes that a connection may have sent without an acknowledgment.
pub const SEND_WINDOW_BYTES: u64 = 2 << 20;
/// Bytes of a UDP socket's buffers, per direction.
pub const SOCKET_BUFFER_BYTES: usize = 4 << 20;
/// Bytes of a message of the handshake.
pub const HELLO_BYTES_MAX: usize = 16 << 10;
/// Duration of each step of a handshake.
pub const HANDSHAKE_MAX: Duration = Duration::from_secs(5);
/// Connections before their admission; more are refused.
pub const INCOMING_MAX: usize = 256;
/// Keep-alive packets within an idle timeout, at least.
pub const KEEP_ALIVES_PER_IDLE_TIMEOUT: u64 = 6;
/// Wait for the last datagrams of a socket that closes.
pub const GOODBYE_MAX: Duration = Duration::from_millis(200);
/// Time without data in the middle of a frame before its link closes.
pub const STALL_MAX: Duration = if cfg!(test) { Duration::from_millis(400) } else { Duration::from_secs(60) };
/// Received frames of one link that wait for [`crate::Inbound::next`].
pub const INBOUND_MAX: usize = 64;
/// Control messages in flight on one in-memory link.
pub const CONTROL_AHEAD_MAX: usize = 1024;
/// Time in which a connection to a canary must present its key.
pub const CANARY_KEY_MAX: Duration = Duration::from_secs(2);
/// Connections to a canary without a key yet; more are refused.
pub const CANARY_STRANGERS_MAX: usize = 64;
/// Characters of a node's name.
pub const NAME_MAX: usize = 100;
/// Characters of an access token's identifier.
pub const ACCESS_TOKEN_ID_MAX: usize = 64;
