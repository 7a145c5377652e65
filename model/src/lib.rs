//! The GLaM model (Du et al., arXiv 2112.06905) on libtorch.
//!
//! The only crate that depends on `tch`. The actors use it through [`volary_core::compute::Compute`], which
//! [`Glam`] implements. [`reference::Reference`] is the whole model in one process, for tests;
//! [`decoder::Decoder`] generates and scores text.
//!
//! | file | content |
//! | --- | --- |
//! | `arithmetic` | the bits of a device's results |
//! | [`decoder`] | the model token by token, for generation and scoring |
//! | [`device`] | devices, threads, and the environment of libtorch |
//! | [`engine`] | [`Glam`]: the computations of the actors; `compute` and `moe` are its parts |
//! | [`error`] | errors |
//! | `exact` | arithmetic with the same bits on every device |
//! | `host` | copies between the device and the wire |
//! | `layers` | the layers as functions on tensors |
//! | [`limits`] | bounds |
//! | `optimizer` | Adafactor and AdamW |
//! | [`mod@reference`] | the whole model in one autograd graph |
//! | [`sampling`] | the choice of a token from logits |
//! | `weights` | the parameters and optimizer state of a shard, and their stored form |

mod arithmetic;
pub mod decoder;
pub mod device;
pub mod engine;
pub mod error;
mod exact;
mod host;
mod layers;
pub mod limits;
mod optimizer;
pub mod reference;
pub mod sampling;
mod weights;

pub use engine::Glam;
pub use error::{Error, Result};
pub use weights::{parameter_bytes, parameter_shapes, shard_bytes, store_given};
