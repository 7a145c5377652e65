//! The bounds of the formats crate.

/// The size of one safetensors file, in bytes, as Hugging Face's `save_pretrained` cuts them. A tensor that
/// is larger has a file of its own.
pub const FILE_BYTES: u64 = 5_000_000_000;
