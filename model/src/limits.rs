//! The bounds of the model crate. Memory is bounded by the planner; there are no queues and no waits.

/// Products in a measurement of the CPU's speed.
pub const PRODUCTS: u32 = 40;
/// Rows and columns of their matrices.
pub const SIDE: i64 = 512;
