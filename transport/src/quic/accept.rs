//! Accepts QUIC connections; each has a bounded time for its greeting.

use super::control::control_stream;
use super::wire::{QuicWire, peer_certificate};
use crate::accept::{Accepted, Incoming, Places, RefusedCount};
use crate::error::{Error, Result};
use crate::limits::{HANDSHAKE_MAX, INCOMING_MAX};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

/// Accepts connections until the socket is closed. It runs on the socket's runtime.
pub(super) async fn accept_all(
    endpoint: quinn::Endpoint,
    accepted: mpsc::Sender<Accepted>,
    refused: RefusedCount,
) {
    let places = Places::new();
    while let Some(incoming) = endpoint.accept().await {
        let from = incoming.remote_address();
        // When places are scarce, a dialer must prove its address before it gets one.
        if places.are_scarce() && incoming.may_retry() && !incoming.remote_address_validated() {
            drop(incoming.retry());
            continue;
        }
        let Some(place) = places.take() else {
            tracing::warn!(%from, "connection refused: {INCOMING_MAX} others wait for admission");
            refused.fetch_add(1, Ordering::Relaxed);
            incoming.refuse();
            continue;
        };
        let (accepted, refused) = (accepted.clone(), Arc::clone(&refused));
        tokio::spawn(async move {
            let introduced = introduce(incoming, Arc::clone(&refused), place);
            match tokio::time::timeout(2 * HANDSHAKE_MAX, introduced).await {
                Ok(Ok(connection)) => drop(accepted.send(connection).await),
                Ok(Err(error)) => tracing::warn!(%from, %error, "connection refused"),
                Err(_) => {
                    refused.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(%from, "connection refused: no greeting in time");
                }
            }
        });
    }
}

async fn introduce(
    incoming: quinn::Incoming,
    refused: RefusedCount,
    place: OwnedSemaphorePermit,
) -> Result<Accepted> {
    let from = incoming.remote_address().to_string();
    let failed = |error: quinn::ConnectionError| {
        refused.fetch_add(1, Ordering::Relaxed);
        Error::connection(from.clone(), error)
    };
    let connection = incoming.await.map_err(failed)?;
    let control = control_stream(connection.accept_bi().await.map_err(failed)?);
    let certificate = peer_certificate(&connection);
    let incoming = Incoming { control, certificate, place, refused: Arc::clone(&refused) };
    let runtime = Handle::current();
    incoming.introduce(|peer| Arc::new(QuicWire { connection, peer, runtime, refused })).await
}
