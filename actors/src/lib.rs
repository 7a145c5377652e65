//! The actors of Volary: the thin shell around the pure core, in two kinds of process.
//!
//! | file | what |
//! | --- | --- |
//! | [`sessions`], `supervisor` | the supervisor's process, its door; the actor around the state machine |
//! | `credentials` | tokens and certificates |
//! | `checkpointer`, `run_files`, `durations` | durable checkpoints; the files that people read; how long a change took |
//! | [`host`], `node`, `replicas` | the node's process; its agent; the shards in its memory |
//! | `lane`, `leg` | a lane's way through the model and back: **start reading here**; through one stage of it |
//! | `dense`, `router`, `expert` | the actors that each own one shard |
//! | `trace` | what a lane carries through a traced step |
//! | `reducer` | gradients, summed over the fixed tree |
//! | `inbound`, `peers`, `shards`, `wire` | between nodes |
//! | `measure` | what a node finds out about itself before it is placed |
//! | `executor` | the threads on which all tensor operations run |
//! | [`operator`] | what people ask |
//!
//! They work on tensors through [`volary_core::compute::Compute`], and do not know libtorch.

mod ask;
mod checkpointer;
mod credentials;
mod dense;
mod directory;
mod disturb;
mod durations;
pub mod event_stream;
mod executor;
mod expert;
pub mod host;
mod inbound;
mod lane;
mod limits;
mod measure;
mod node;
mod node_context;
pub mod operator;
mod peers;
mod reducer;
mod replicas;
mod router;
mod run_files;
pub mod sessions;
mod shard;
mod shards;
mod stage;
mod supervisor;
mod trace;
mod wire;

pub use disturb::{DISTURB_SECONDS_MAX, Disturbance, is_part};
pub use host::{NodeOptions, run_node};
pub use node::NodeEnd;
pub use sessions::{Supervisor, SupervisorHandle, SupervisorOptions, operate};
pub use supervisor::RunEnd;
pub use volary_transport::Interference;
pub use wire::{LinkReport, NodeInfo, RunInfo};

/// Reads bytes as everything that is said on control streams and in frames, for fuzzing.
#[doc(hidden)]
pub fn fuzz_words(bytes: &[u8]) {
    wire::fuzz(bytes);
}

/// Words of several kinds, for fuzzing.
#[doc(hidden)]
#[must_use]
pub fn fuzz_words_seeds() -> Vec<Vec<u8>> {
    wire::fuzz_seeds()
}
