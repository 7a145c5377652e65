//! The device: the threads that run all tensor operations, and their benchmark.

pub(crate) mod benchmark;
pub(crate) mod credit;
pub(crate) mod executor;
