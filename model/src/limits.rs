//! The bounds of the model crate. Memory is bounded by the planner; there are no queues and no waits.

/// Products in a measurement of the CPU's speed.
pub const PRODUCTS: u32 = 40;
/// Rows and columns of their matrices.
pub const SIDE: i64 = 512;
/// Tokens that are scored at a time: their logits over the vocabulary are in memory together.
pub const SCORED_ROWS: usize = 128;
/// Numbers of a replica that are copied to the host at a time for a digest.
pub const DIGEST_CHUNK: i64 = 1 << 20;
/// Numbers that are summed at a time: what is added stays in the cache. Part of the order of additions in
/// norms.
pub const CHUNK: i64 = 1 << 18;
/// Rows of a matrix that are added to each other before others. Part of the order of additions.
pub const BLOCK: i64 = 64;
/// Numbers of a row that are left when the rest of its sum is made with all rows side by side.
pub const NARROW: i64 = 32;
