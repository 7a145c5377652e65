//! The GLaM model on libtorch, and the device executor's computations.
//!
//! The only crate that names `tch`. The actors see it through [`volary_core::compute::Compute`], which [`Glam`]
//! implements. The whole model in one process, for tests, generation and comparison, is [`reference::Reference`].

pub mod device;
pub mod engine;
pub mod error;
mod host;
mod layers;
mod optimizer;
pub mod reference;
mod weights;

pub use engine::Glam;
pub use error::{Error, Result};
pub use weights::shard_bytes;
