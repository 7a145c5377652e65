//! Gradients that are made and not yet added up, counted so that lanes do not run ahead of their sums.
//!
//! Deferred work runs after what lanes wait for. Without a limit the leaves of all lanes of a step would lie
//! in memory at its end. A lane therefore begins only when at most one lane's leaves are open; those of the
//! lanes in flight come on top, and the partial sums that the tree keeps: one per level
//! ([`volary_core::costs::live_gradients`]). Leaves are added up without any lane's help, so that lanes wait
//! for nothing that waits for lanes.

use std::sync::Arc;
use tokio::sync::watch;

/// The open leaves of a node; clones count the same ones.
#[derive(Clone, Debug)]
pub(crate) struct OpenLeaves(Arc<watch::Sender<usize>>);

impl Default for OpenLeaves {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(0)))
    }
}

/// One leaf, open until this is dropped: its gradient has become a part of a sum that waits for others, has
/// gone to another node, or is not needed any more.
#[derive(Debug)]
pub(crate) struct LeafCredit(Arc<watch::Sender<usize>>);

impl OpenLeaves {
    /// A leaf is made.
    pub(crate) fn open(&self) -> LeafCredit {
        self.0.send_modify(|open| *open += 1);
        LeafCredit(Arc::clone(&self.0))
    }

    /// Waits until at most `most` leaves are open.
    pub(crate) async fn at_most(&self, most: usize) {
        // The sender lives as long as this.
        drop(self.0.subscribe().wait_for(|open| *open <= most).await);
    }
}

impl Drop for LeafCredit {
    fn drop(&mut self) {
        self.0.send_modify(|open| *open -= 1);
    }
}
