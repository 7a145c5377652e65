//! Bytes of received frames that may be in memory at a time.

use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes that received frames may take together; clones share them. A frame's header is read, its bytes are
/// taken from the budget, and only then its tensors are read: what does not fit waits on the wire.
///
/// A budget must not hold up frames for which the processing of others waits.
#[derive(Clone, Debug)]
pub struct ByteBudget {
    kib: Arc<Semaphore>,
    kib_max: u32,
}

/// Bytes of a frame, until this is dropped.
#[derive(Debug)]
pub struct BytePermit(
    #[expect(dead_code, reason = "it is held for its effect when it is dropped")] OwnedSemaphorePermit,
);

impl ByteBudget {
    /// A budget of about so many bytes.
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        let kib_max = u32::try_from(bytes >> 10).unwrap_or(u32::MAX).max(1);
        Self { kib: Arc::new(Semaphore::new(kib_max as usize)), kib_max }
    }

    /// Waits until `bytes` fit. A frame that is larger than the whole budget takes all of it, and one without
    /// tensors a KiB for its header.
    pub(crate) async fn take(&self, bytes: u64) -> Option<BytePermit> {
        let kib = u32::try_from(bytes.div_ceil(1 << 10).max(1)).unwrap_or(u32::MAX).min(self.kib_max);
        // The semaphore is never closed.
        Arc::clone(&self.kib).acquire_many_owned(kib).await.ok().map(BytePermit)
    }
}
