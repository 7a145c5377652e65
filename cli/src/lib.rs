//! The commands of `volary`, as a library so that tests and benchmarks can use them.
//!
//! | file | what |
//! | --- | --- |
//! | [`config`] | the configuration file |
//! | [`commands`] | one file per command |
//! | [`rundir`] | which run a command means, and how to reach its supervisor |
//! | [`cluster`], `member`, [`local`] | the processes of a run on this machine; one node; one process |
//! | [`follow`] | a run on this machine, from its first step to its end |
//! | [`script`] | what happens to a scripted run |
//! | [`progress`] | the progress bar |
//! | [`http`] | the page of the supervisor, figures for Prometheus |
//! | [`units`] | sizes and times as people write them |
//! | [`environment`], [`log`] | what must be set before libtorch runs; the log |

pub mod cluster;
pub mod commands;
pub mod config;
pub mod environment;
pub mod follow;
pub mod http;
pub mod inventory;
pub mod local;
pub mod log;
mod member;
pub mod progress;
pub mod rundir;
pub mod script;
pub mod units;
