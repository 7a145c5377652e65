//! One lane's path through a step, and the gradients that it leaves.
//!
//! ```text
//! lane → stage → dense ─→ router → dispatch → expert ─┐   (a channel here, a frame elsewhere)
//!          ↑       └── next layer ←─ combine ←─────────┘
//!          └ other stages
//! every shard actor → reducer → agent
//! ```

pub(crate) mod dense;
pub(crate) mod dispatch;
pub(crate) mod expert;
pub(crate) mod lane;
pub(crate) mod reducer;
pub(crate) mod router;
pub(crate) mod shard;
pub(crate) mod stage;
