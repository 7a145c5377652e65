//! A run on a spot market: a recorded trace of available instances adds and takes away nodes of this machine,
//! and the run's goodput is reported.
//!
//! | file | content |
//! | --- | --- |
//! | `trace` | the recorded numbers of instances, scaled down |
//! | `replay` | quiet measurements first, then the trace: which node comes and which goes, when |
//! | `report` | goodput, lost steps, stalls; as text, JSON and a picture |

mod replay;
mod report;
mod trace;

pub use replay::{Change, Replay, SpotOptions};
pub use report::Report;
pub use trace::{Trace, Unit};
