//! QUIC links between the processes of a cluster.
//!
//! It knows nothing of the messages that it carries. Where things are:
//!
//! | file | what |
//! | --- | --- |
//! | [`endpoint`] | the UDP socket, dialling, joining |
//! | `accept` | who dials in, and what it is told |
//! | [`link`] | one peer: requests, frames, answers |
//! | `stream` | one frame on one stream |
//! | [`canary`] | notices at once that a process has died |
//! | `interference` | disturbs a real socket, for tests |
//! | [`memory`] | links without a network, with faults, for tests |
//! | [`control`] | small typed messages |
//! | [`frame`] | the layout of tensors on the wire |
//! | [`handshake`] | who is there, in which version |
//! | [`identity`], [`access_token`], `tls` | the cluster's authority, certificates, tokens |
//! | `settings` | what sockets and connections are set to |
//! | [`limits`] | every bound |

mod accept;
pub mod access_token;
pub mod canary;
pub mod control;
pub mod endpoint;
mod error;
pub mod frame;
pub mod handshake;
pub mod identity;
mod interference;
pub mod limits;
pub mod link;
pub mod loopback;
pub mod memory;
mod options;
mod settings;
mod stream;
mod tls;

pub use accept::Accepted;
pub use access_token::{AccessRole, AccessToken, AccessTokenError, AccessTokenRecord, AccessTokenTerms};
pub use canary::{Canary, CanaryKey, CanaryWatch};
pub use control::{ControlReceiver, ControlSender};
pub use endpoint::{Endpoint, join};
pub use error::{Error, Result};
pub use frame::{Dtype, Frame, Kind, Part, TraceHeader};
pub use handshake::{PROTOCOL, Role};
pub use identity::{Authority, Identity, Issued, KeyRequest, SUPERVISOR, check_name, write_secret};
pub use interference::Interference;
pub use link::{Inbound, InboundFrame, Link, LinkStats, Replier};
pub use loopback::{LoopbackReport, measure_loopback};
pub use options::TransportOptions;
pub use settings::local_ip;
pub use tls::Admit;

/// Reads bytes as the first words of a connection, for fuzzing.
#[doc(hidden)]
pub fn fuzz_handshake(bytes: &[u8]) {
    handshake::fuzz(bytes);
}

/// First words of every kind, for fuzzing.
#[doc(hidden)]
#[must_use]
pub fn fuzz_handshake_seeds() -> Vec<Vec<u8>> {
    handshake::fuzz_seeds()
}
