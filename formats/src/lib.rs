//! Models in the formats of other programs.
//!
//! | module | content |
//! | --- | --- |
//! | [`glam`] | a GLaM model as safetensors, with a documented layout |
//! | [`tensors`] | tensors in one or several safetensors files |
//! | [`folder`] | folders that appear only when they are complete |
//! | [`limits`] | every bound |
//! | [`error`] | every error |

pub mod error;
pub mod folder;
pub mod glam;
pub mod limits;
pub mod tensors;

pub use error::{Error, Result};
