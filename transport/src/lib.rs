//! QUIC links between the processes of a cluster.
//!
//! It knows nothing of the messages that it carries. Where things are:
//!
//! | file | what |
//! | --- | --- |
//! | [`endpoint`] | the UDP socket, dialling, accepting, joining |
//! | [`link`] | one peer: requests, frames, streams |
//! | [`control`] | small typed messages |
//! | [`frame`] | the layout of tensors on the wire |
//! | [`handshake`] | who is there, in which version |
//! | [`identity`], [`token`], `tls` | the cluster's authority, certificates, tokens |
//! | [`limits`] | every bound |

pub mod control;
pub mod endpoint;
mod error;
pub mod frame;
pub mod handshake;
pub mod identity;
pub mod limits;
pub mod link;
pub mod loopback;
mod options;
mod tls;
pub mod token;

pub use control::{ControlReceiver, ControlSender};
pub use endpoint::{Accepted, Endpoint, join, local_ip};
pub use error::{Error, Result};
pub use frame::{Dtype, Frame, Kind, Part, TraceContext};
pub use handshake::{PROTOCOL, Role};
pub use identity::{Authority, Identity, KeyRequest, SUPERVISOR, check_name, write_secret};
pub use link::{Inbound, InboundFrame, Link, LinkStats, Replier};
pub use loopback::{LoopbackReport, measure_loopback};
pub use options::TransportOptions;
pub use tls::Admit;
pub use token::{Token, TokenError, TokenRecord, TokenRole};
