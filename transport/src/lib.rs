//! Links between the processes of a cluster: authenticated, encrypted, over QUIC.
//!
//! A process binds an [`Endpoint`] on a [`Network`]; endpoints connect [`Link`]s, which carry [`Frame`]s with
//! tensors and a control stream of small messages. The crate knows nothing about the contents of either.
//!
//! | module | contents |
//! | --- | --- |
//! | [`network`] | where endpoints come from: QUIC, or memory in tests; joining a cluster |
//! | [`endpoint`] | an identity, its admission of peers, its links |
//! | `accept` | the accepting side of a handshake |
//! | [`handshake`] | protocol version, the dialer's role |
//! | [`refusal`] | the codes of refusals |
//! | [`link`] | one peer: requests, frames, replies |
//! | `budget` | bytes of received frames that may be in memory |
//! | [`control`] | small typed messages |
//! | [`frame`] | the layout of tensors on the wire |
//! | `wire` | the connection below a link, as traits |
//! | `quic` | QUIC: sockets, streams, settings, fault injection |
//! | `memory` | a network in memory, with faults; in tests and with the feature `test-util` |
//! | [`identity`], `tls` | the cluster's authority, certificates, their verification |
//! | [`access_token`] | access tokens |
//! | [`canary`] | detects the death of a process at once |
//! | [`loopback`] | a benchmark of this machine's loopback |
//! | `options` | the idle timeout |
//! | [`limits`] | every bound |
//! | `error` | [`Error`] |

mod accept;
pub mod access_token;
mod budget;
pub mod canary;
pub mod control;
pub mod endpoint;
mod error;
pub mod frame;
pub mod handshake;
pub mod identity;
pub mod limits;
pub mod link;
pub mod loopback;
#[cfg(any(test, feature = "test-util"))]
pub mod memory;
pub mod network;
mod options;
mod quic;
pub mod refusal;
mod tls;
mod wire;

pub use accept::Accepted;
pub use access_token::{AccessRole, AccessToken, AccessTokenError, AccessTokenRecord, AccessTokenTerms};
pub use budget::{ByteBudget, BytePermit};
pub use canary::{Canary, CanaryKey, CanaryWatch};
pub use control::{ControlReceiver, ControlSender};
pub use endpoint::Endpoint;
pub use error::{Error, Result};
pub use frame::{Dtype, Frame, FrameKind, Part, TraceHeader};
pub use handshake::{PROTOCOL, PeerRole};
pub use identity::{
    Authority, Identity, IssuedCertificate, KeyRequest, SUPERVISOR, check_name, write_secret,
};
pub use link::{CloseReason, Inbound, InboundFrame, Link, LinkStats, Replier};
pub use loopback::{LoopbackReport, measure_loopback};
pub use network::{Network, join};
pub use options::TransportOptions;
pub use quic::Interference;
pub use quic::settings::local_ip;
pub use refusal::{Refusal, RefusalCode};
pub use tls::ClientAuth;

/// Reads bytes as the first message of a connection, for fuzzing.
#[doc(hidden)]
pub fn fuzz_handshake(bytes: &[u8]) {
    handshake::fuzz(bytes);
}

/// A first message of each role, for fuzzing.
#[doc(hidden)]
#[must_use]
pub fn fuzz_handshake_seeds() -> Vec<Vec<u8>> {
    handshake::fuzz_seeds()
}
