//! The bounds of the formats crate.

/// The size of one safetensors file, in bytes, as Hugging Face's `save_pretrained` cuts them. A tensor that
/// is larger has a file of its own.
pub const FILE_BYTES: u64 = 5_000_000_000;
/// The largest header of a safetensors file that is read, in bytes: that of the format's library.
pub const HEADER_BYTES_MAX: u64 = 100_000_000;
/// Tensors that an error names.
pub const NAMED_MAX: usize = 12;
