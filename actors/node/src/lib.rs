//! A node of a Volary cluster: the actors that train, and their process.
//!
//! The actors are a thin shell around the pure state machine [`volary_core::agent`]; they work on tensors
//! through [`volary_core::compute::Compute`] and know neither libtorch nor data sets nor storage. Modules
//! import downward only, in the order of this table from the bottom up:
//!
//! | module | contents |
//! | --- | --- |
//! | [`process`] | [`run_node`]: join, serve the supervisor, reconnect, end |
//! | `agent` | the actor through which the supervisor directs the node |
//! | `inbound` | frames from other nodes |
//! | `shards` | the replicas in memory, and how shards get here |
//! | `step` | one lane's path through a step: **start reading at `step::lane`** |
//! | [`options`], `faults` | options of the process; faults of scripted runs |
//! | `context`, `directory` | what all actors share; the shard actors of this node |
//! | `handles` | typed calls of the shard actors |
//! | `messages` | every message between the actors |
//! | `trace` | what a lane carries through a traced step |
//! | `net` | links to peers, to the supervisor, and their measurement |
//! | `device` | the threads that run tensor operations, and their benchmark |
//! | `error`, `ids`, `limits` | errors, what messages belong to, bounds |
//!
//! With the feature `test-util`, [`testing`] has a backend without libtorch, so that a whole cluster of
//! real actors runs in one process.
//!
//! ```no_run
//! use volary_node::{NodeEnd, NodeOptions, ProcessError, run_node};
//! use volary_core::compute::{Compute, Computed};
//! use volary_protocol::RunInfo;
//!
//! async fn node<B: Compute>(
//!     options: NodeOptions,
//!     backend: fn(&RunInfo) -> Computed<B>,
//! ) -> Result<NodeEnd, ProcessError> {
//!     let (_ask_to_leave, leave) = tokio::sync::mpsc::channel(1);
//!     run_node(options, backend, leave).await
//! }
//! ```

mod agent;
mod context;
mod device;
mod directory;
mod error;
mod faults;
mod handles;
mod ids;
mod inbound;
mod limits;
mod messages;
mod net;
pub mod options;
pub mod process;
mod shards;
mod step;
#[cfg(any(test, feature = "test-util"))]
pub mod testing;
mod trace;

pub use agent::NodeEnd;
pub use faults::{Fault, InvalidFault, is_fraction};
pub use limits::FAULT_SECONDS_MAX;
pub use options::NodeOptions;
pub use process::{ProcessError, run_node};
