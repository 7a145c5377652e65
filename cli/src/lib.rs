//! The commands of `volary`, as a library so that tests and benchmarks can use them.
//!
//! | file | what |
//! | --- | --- |
//! | [`config`] | the configuration file |
//! | [`commands`] | one file per command |
//! | [`rundir`] | which run a command means, and how to reach its supervisor |
//! | [`local`] | the processes of a run on one machine |
//! | [`progress`] | the progress bar |
//! | [`environment`], [`log`] | what must be set before libtorch runs; the log |

pub mod commands;
pub mod config;
pub mod environment;
pub mod local;
pub mod log;
pub mod progress;
pub mod rundir;
