//! The commands of `volary`, as a library for tests and benchmarks.
//!
//! | file | content |
//! | --- | --- |
//! | [`commands`] | one file per command |
//! | [`config`], `document` | the configuration file; TOML documents and their errors |
//! | [`inventory`] | the machines of a planned cluster |
//! | [`preparation`], [`corpus_summary`] | before a run starts: its directory and tokens |
//! | [`rundir`], [`registry`] | the run that a command addresses; the live runs of this machine |
//! | [`cluster`] | the processes of a run on this machine |
//! | `node_process`, [`process`] | one node with its restarts; one process |
//! | [`follow`], [`progress`] | a run on this machine from its first step to its end; its progress bar |
//! | [`alerts`], [`signals`] | events that a person must see; interrupts |
//! | [`spot`] | a recorded trace of spot instances, played on this machine |
//! | [`script`] | faults and membership changes at chosen steps |
//! | `trained` | the model of a run, for the commands that use it |
//! | `serve` | the HTTP server of a trained model |
//! | [`http`] | the dashboard of the supervisor, and metrics for Prometheus |
//! | [`output`] | standard output and standard error |
//! | [`arguments`], [`units`] | invalid arguments; sizes and durations with units |
//! | [`environment`], [`log`] | variables that must be set before libtorch loads; the log |
//! | [`limits`] | all bounds |
//!
//! ```no_run
//! use volary_cli::config::Config;
//!
//! let text = r#"
//!     [run]
//!     name = "small"
//!     [data]
//!     sources = [{ name = "notes", path = "notes/*.txt" }]
//!     vocabulary = 300
//!     [model]
//!     vocabulary = 300
//!     hidden = 8
//!     layers = 2
//!     heads = 2
//!     head_dim = 4
//!     feed_forward = 16
//!     experts = 4
//!     [training]
//!     steps = 5
//! "#;
//! let set = ["training.steps=9".to_owned()];
//! assert_eq!(Config::parse(text, "small.toml", &set)?.training.steps, 9);
//! let error = Config::parse(text, "small.toml", &["training.stepz=9".to_owned()]).unwrap_err();
//! assert!(error.to_string().ends_with("did you mean `steps`?"));
//! # anyhow::Ok(())
//! ```

pub mod alerts;
pub mod arguments;
pub mod cluster;
pub mod commands;
pub mod config;
pub mod corpus_summary;
mod document;
pub mod environment;
pub mod follow;
pub mod http;
pub mod inventory;
pub mod limits;
pub mod log;
pub mod memory;
mod node_process;
pub mod output;
pub mod preparation;
pub mod process;
pub mod progress;
pub mod registry;
pub mod rundir;
pub mod script;
mod serve;
pub mod signals;
pub mod spot;
mod trained;
pub mod units;
