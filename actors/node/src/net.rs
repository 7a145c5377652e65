//! A node's links: to the other nodes and to the supervisor.

pub(crate) mod peers;
pub(crate) mod permission;
pub(crate) mod probe;
pub(crate) mod uplink;
