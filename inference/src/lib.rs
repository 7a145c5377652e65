//! Text by a trained model, and its scores on tasks.
//!
//! | module | content |
//! | --- | --- |
//! | [`generator`] | continuations of many prompts at a time |
//! | [`text`] | from tokens to text, piece by piece; strings that end a text |
//! | [`contamination`] | runs of words that tasks share with training text |
//! | [`evaluation`] | tasks, their scoring, and the report |
//! | `workers` | the model on several threads |
//! | [`limits`] | every bound |
//! | [`error`] | every error |

pub mod contamination;
pub mod error;
pub mod evaluation;
pub mod generator;
pub mod limits;
pub mod text;
mod workers;

pub use error::{Error, Result};
pub use generator::{Finish, Generator, Piece, ReportedTokens, Request, RequestId, Token};
