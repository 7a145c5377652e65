//! The pure core of Volary: placement, dispatch, and the step and recovery protocol.
//!
//! Nothing here uses a clock, a socket, a tensor library or an unseeded random number, so that a test plays a
//! whole cluster thousands of times per second.
//!
//! | module | content |
//! | --- | --- |
//! | [`ids`] | steps, epochs, lanes, layers, experts, nodes, shards |
//! | [`limits`] | every bound of the core |
//! | [`InvalidValue`] | the error of a value out of its bounds |
//! | [`random`] | random draws keyed by their purpose |
//! | [`architecture`] | the shape of a model, the paper's presets, parameter counts |
//! | [`options`], [`schedule`] | the options of a run; the learning rate |
//! | [`update`] | the treatment of a step's gradients: skipped steps, clipping, the optimizer's factors |
//! | [`data_skips`] | the training data that a run leaves out |
//! | [`digest`] | BLAKE3 digests of blobs and replicas |
//! | [`dispatch`] | top-2 choices to batches per expert |
//! | [`tree`] | the fixed order in which gradients are summed |
//! | [`reduction`] | the nodes that make each sum, and the transfers between them |
//! | [`placement`] | the nodes of each shard and lane |
//! | [`costs`], [`profile`] | the costs of a model; the compute, memory and network of a node |
//! | [`planner`] | from costs and profiles to a placement and its predicted step |
//! | [`messages`], [`shared`], [`layout`] | the messages between the supervisor and the nodes |
//! | [`machine`] | the step and recovery protocol on the supervisor |
//! | [`agent`] | the step and recovery protocol on a node |
//! | [`compute`] | the seam to the tensor library |

pub mod agent;
pub mod architecture;
pub mod compute;
pub mod costs;
pub mod data_skips;
pub mod digest;
pub mod dispatch;
pub mod ids;
mod invalid;
pub mod layout;
pub mod limits;
pub mod machine;
pub mod messages;
pub mod options;
pub mod placement;
pub mod planner;
pub mod profile;
pub mod random;
pub mod reduction;
pub mod schedule;
pub mod shared;
pub mod tree;
pub mod update;

pub use digest::Digest;
pub use ids::{Epoch, ExpertId, Lane, LayerId, LayerRange, NodeId, ShardId, Step, Timeline};
pub use invalid::InvalidValue;
