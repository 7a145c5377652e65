//! Models in the formats of other programs.
//!
//! | module | content |
//! | --- | --- |
//! | [`glam`] | a GLaM model as safetensors, with a documented layout |
//! | [`qwen3`] | a Qwen3 model as Hugging Face's `transformers` has it, out and in |
//! | [`mod@export`] | what all exports have in common |
//! | [`files`] | the tensors of safetensors files, one at a time |
//! | [`tensors`] | tensors in one or several safetensors files |
//! | [`folder`] | folders that appear only when they are complete |
//! | [`limits`] | every bound |
//! | [`error`] | every error |

pub mod error;
pub mod export;
pub mod files;
pub mod folder;
pub mod glam;
pub mod limits;
pub mod qwen3;
pub mod tensors;

pub use error::{Error, Result};
