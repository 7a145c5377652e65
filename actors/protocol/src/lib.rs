//! What crosses a link of a Volary cluster, and nothing else: no actor, no state, no clock.
//!
//! Messages that carry reply ports or tensor handles never cross a link; they live with the actors.
//! Everything here is encoded with postcard and versioned by the handshake
//! ([`volary_transport::PROTOCOL`]): both ends of a link run the same version.
//!
//! | module | contents |
//! | --- | --- |
//! | [`control`] | the control stream between the supervisor and a node |
//! | [`frames`] | tensor frames: the header of each kind, building and reading them |
//! | [`operator`] | requests of operators and their replies |
//! | [`bounds`] | whether what a model sends fits |
//! | [`client`] | the operator's side of such a request |
//! | [`refusal`] | why a peer refuses a frame, as a code and a text |
//! | [`trace`] | which spans and tokens of a step are recorded |
//! | [`error`] | what can be wrong with a frame |
//! | [`layout`] | layouts, as their differences |
//! | [`limits`] | bounds |
//!
//! ```
//! use volary_core::{Epoch, Lane, LayerId, Step};
//! use volary_protocol::frames::{self, ExpertRequest};
//! use volary_transport::FrameKind;
//!
//! let request = ExpertRequest { layer: LayerId(1), lane: Lane(3), train: true, experts: vec![] };
//! let frame = frames::frame(FrameKind::Forward, Epoch(2), Step(7), &request, vec![])?;
//! assert_eq!(frames::decode::<ExpertRequest>(&frame)?, request);
//! # Ok::<(), volary_protocol::Error>(())
//! ```

pub mod bounds;
pub mod client;
pub mod control;
pub mod error;
pub mod frames;
mod fuzzing;
pub mod layout;
pub mod limits;
pub mod operator;
pub mod refusal;
pub mod trace;

pub use client::operate;
pub use control::{LinkReport, NodeInfo, RunInfo, ToNode, ToSupervisor, Welcome};
pub use error::{Error, Result};
pub use fuzzing::{fuzz_message_seeds, fuzz_messages};
pub use refusal::{FrameRefusal, FrameRefusalCode};
pub use trace::{SampledToken, TraceRequest};
