//! The replicas in this node's memory, and how shards get here.

pub(crate) mod replicas;
pub(crate) mod stores;
pub(crate) mod transfer;
