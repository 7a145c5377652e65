//! The pure core of Volary: ids, lanes, placement, dispatch and the step protocol.
//!
//! Nothing here knows a clock, a socket, a tensor library or an unseeded random number, so that a whole cluster can
//! be played through in a test, thousands of times a second. Where things are:
//!
//! | file | what |
//! | --- | --- |
//! | [`ids`] | steps, epochs, lanes, nodes, shards |
//! | [`random`] | draws keyed by what they are for |
//! | [`architecture`] | the shape of a model, the paper's presets, counts |
//! | [`options`], [`schedule`] | what a run is told; learning rate, skip, clip |
//! | [`dispatch`] | top-2 choices to batches per expert |
//! | [`tree`] | the fixed order in which gradients are summed |
//! | [`placement`] | who holds what and runs what |
//! | [`costs`], [`profile`] | what a model costs, and what a node can do |
//! | [`planner`] | from these two to a placement and the time of its steps |
//! | [`messages`] | what the supervisor and the nodes say |
//! | [`machine`] | the step and recovery protocol, as the supervisor sees it |
//! | [`agent`] | the same, as a node sees it |
//! | [`compute`] | the seam to the tensor library |

pub mod agent;
pub mod architecture;
pub mod compute;
pub mod costs;
pub mod dispatch;
pub mod ids;
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
pub mod tree;

pub use ids::{Epoch, ExpertId, Lane, LayerId, LayerRange, NodeId, ShardId, Step, Timeline};
