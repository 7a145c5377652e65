//! The commands, one file each.
//!
//! | file | command |
//! | --- | --- |
//! | [`data`] | `volary data`: a corpus before a run, and its overlap with evaluation tasks |
//! | [`digest`] | `volary digest`: the exact bits of a checkpoint |
//! | [`doctor`] | `volary doctor`: this machine |
//! | [`eval`] | `volary eval`: scores of a trained model |
//! | [`export`] | `volary export`: a trained model for other programs |
//! | [`generate`] | `volary generate`: text by a trained model |
//! | [`identity`] | `volary identity`: an authority before there is a supervisor |
//! | [`import`] | `volary import`: a run with a model of another program |
//! | [`init`] | `volary init`: a configuration for these machines |
//! | [`node`] | `volary node`: a node process |
//! | [`operate`] | `volary status`, `drain`, `checkpoint`, `stop`: query and control a run |
//! | [`plan`] | `volary plan`: costs, and a planned cluster |
//! | [`serve`] | `volary serve`: completions over HTTP |
//! | [`supervisor`] | `volary supervisor`: a supervisor process |
//! | [`token`] | `volary token`: access tokens |
//! | [`top`] | `volary top`: a live view |
//! | [`trace`] | `volary trace`: stored traces |
//! | [`train`] | `volary train`: a complete run on this machine |

pub mod data;
pub mod digest;
pub mod doctor;
pub mod eval;
pub mod export;
pub mod generate;
pub mod identity;
pub mod import;
pub mod init;
pub mod node;
pub mod operate;
pub mod plan;
pub mod serve;
pub mod supervisor;
pub mod token;
pub mod top;
pub mod trace;
pub mod train;
