//! A whole cluster of Volary in simulated time: the real state machines of the supervisor and the nodes on a
//! simulated network, with simulated disks and devices, and faults at any moment. Thousands of schedules run
//! within seconds.
//!
//! A number per shard stands for its state. Every update changes it in its own way, so that a step that is
//! applied twice, left out, or applied to a stale copy shows at once.
//!
//! | module | content |
//! | --- | --- |
//! | [`world`] | the cluster: time, processes, the queue of events |
//! | `event` | the events |
//! | `network`, `links` | messages between processes; links to the supervisor, and its process |
//! | `supervisor`, `disk` | carries out the supervisor's effects; its disk |
//! | `node`, `node_effects` | a node's state; carries out its effects on a simulated device |
//! | [`fault`], `inject` | the faults, and their injection |
//! | [`mod@schedule`] | random schedules of faults |
//! | [`mod@settings`] | small runs and nodes |
//! | [`limits`] | the simulated timeouts, and the bounds of traces |

mod disk;
mod event;
pub mod fault;
mod inject;
pub mod limits;
mod links;
mod network;
mod node;
mod node_effects;
pub mod schedule;
pub mod settings;
mod supervisor;
pub mod world;

pub use fault::{Fault, NetworkFaults};
pub use schedule::{Kinds, schedule};
pub use settings::{deep_settings, room_for_half, settings};
pub use world::World;
