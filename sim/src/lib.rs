//! A whole cluster of Volary in simulated time: the real state machines of the supervisor and of the nodes, with a
//! network, disks and devices that are played, and faults at any moment. Thousands of schedules run in a second or two.
//!
//! Weights are stood in for by a number per shard that every update changes in its own way, so that a step that is
//! applied twice, left out, or applied to a stale copy shows at once.
//!
//! | file | what |
//! | --- | --- |
//! | [`world`] | time, who is alive, what is on its way |
//! | `supervisor` | carries out the supervisor's effects; its disk |
//! | `node` | carries out a node's effects; its device |
//! | [`faults`] | what goes wrong, at random or as told |

pub mod faults;
mod node;
mod supervisor;
pub mod world;

pub use faults::{Fault, Kinds, schedule};
pub use world::{World, deep_settings, room_for_half, settings};
