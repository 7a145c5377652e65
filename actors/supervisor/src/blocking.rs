//! Disk work on threads that may block.

use crate::error::{Error, Result};

/// Runs disk work on a blocking thread and awaits it.
pub(crate) async fn blocking<T, E>(
    work: impl FnOnce() -> std::result::Result<T, E> + Send + 'static,
) -> Result<T>
where
    T: Send + 'static,
    E: Send + 'static,
    Error: From<E>,
{
    Ok(tokio::task::spawn_blocking(work).await??)
}
