//! A network in memory, for tests of whole processes in one process, and single links in memory.
//!
//! It keeps the promises of QUIC (`tests/twins.rs` runs the same tests over both): a frame arrives whole or
//! not at all, control messages are ordered, a request fails when its [`crate::Replier`] is dropped, a link
//! closes with its last handle, certificates and names are verified as TLS does. Time is tokio's, so tests
//! can pause the clock; only the validity of certificates follows the system's clock. In contrast to QUIC, a
//! sender waits during a partition.
//!
//! | file | contents |
//! | --- | --- |
//! | `channel` | the state that both ends of a link share, and its faults |
//! | `wire` | frames and requests |
//! | `control` | control messages |
//! | `network` | the hub: addresses, faults per pair of endpoints, crashes |
//! | `socket` | handshakes |
//! | `trust` | verification of certificates |

mod channel;
mod control;
mod network;
mod socket;
mod trust;
mod wire;

pub use channel::{Faults, Switch};
pub use network::Network;

use crate::link::Link;
use crate::options::TransportOptions;
use channel::Channel;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use wire::{MemoryWire, Peer};

/// Both ends of one link: `a`'s, whose peer is `b`, and `b`'s, whose peer is `a`.
#[must_use]
pub fn pair(a: &str, b: &str) -> (Link, Link) {
    let (left, right, _) = faulty_pair(a, b);
    (left, right)
}

/// [`pair`], with a switch for faults.
#[must_use]
pub fn faulty_pair(a: &str, b: &str) -> (Link, Link, Switch) {
    let channel = Arc::new(Channel::new(Faults::default(), TransportOptions::default().idle_timeout_ms));
    let (left, right) = wire::ends(&channel);
    let link = |end: wire::End, peer: &str| {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let peer = Peer { name: peer.to_owned(), address, certificate: None };
        let (sender, receiver) = end.control;
        let wire = MemoryWire::new(end.frames, peer.clone());
        Link::new(Arc::new(wire), peer.name).with_control(sender, receiver)
    };
    (link(left, b), link(right, a), Switch(channel))
}
