//! The supervisor of a Volary cluster: membership, placement, the step journal, checkpoints, and its
//! process.
//!
//! A thin shell around the pure state machine [`volary_core::machine`], which decides everything. Modules
//! import downward only, in the order of this table from the bottom up:
//!
//! | module | contents |
//! | --- | --- |
//! | [`process`] | [`Supervisor`]: start, admit connections, end |
//! | `actor` | the actor around the state machine: **start reading here** |
//! | `checkpointer` | the actor that makes checkpoints durable |
//! | `copier` | the actor that copies checkpoints to an object store |
//! | `messages` | every message between the actors |
//! | [`error`] | what ends a supervisor |
//! | [`credentials`] | access tokens and certificates |
//! | `run_files` | `metrics.jsonl`, `validation.jsonl`, `events.jsonl` |
//! | `timings` | how long changes of the cluster took |
//! | [`events`] | the live event stream |
//! | `blocking` | disk work on threads that may block |
//! | [`options`], `limits` | options of the process, bounds |
//!
//! ```no_run
//! use volary_supervisor::{RunEnd, Supervisor, SupervisorOptions};
//!
//! # use volary_data::Dataset;
//! # async fn example(options: SupervisorOptions, dataset: Dataset) -> volary_supervisor::Result<()> {
//! let supervisor = Supervisor::start(options, dataset).await?;
//! println!("listening on {}", supervisor.address());
//! match supervisor.ended(std::future::pending()).await {
//!     RunEnd::Done { step } => println!("done after step {step}"),
//!     RunEnd::Halted { reason, .. } | RunEnd::Fatal { reason } => eprintln!("{reason}"),
//! }
//! # Ok(())
//! # }
//! ```

mod actor;
mod blocking;
mod checkpointer;
mod copier;
pub mod credentials;
pub mod error;
pub mod events;
mod limits;
mod messages;
pub mod options;
pub mod process;
mod run_files;
mod timings;

pub use actor::{RunEnd, persist};
pub use credentials::CredentialError;
pub use error::{Error, Result};
pub use events::EventStream;
pub use options::SupervisorOptions;
pub use process::{Door, Supervisor, SupervisorHandle};
