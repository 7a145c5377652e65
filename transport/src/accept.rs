//! The accepting side of a handshake: who is there is proven here, who may come in is the caller's to say.

use crate::control::{ControlReceiver, ControlSender, finish, write_message};
use crate::error::{Error, Result};
use crate::handshake::{Answer, Role, hear};
use crate::identity::{Issued, fingerprint};
use crate::limits::{HANDSHAKE_MAX, HELLO_BYTES_MAX, INCOMING_MAX};
use crate::link::{CONTROL_PRIORITY, Link};
use crate::tls;
use quinn::{Connection, RecvStream, SendStream, VarInt};
use rustls::pki_types::CertificateDer;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

/// Somebody who has said who it is and waits to be let in.
#[derive(Debug)]
pub struct Accepted {
    /// Who, and what it wants. Names are proven; tokens are not checked yet.
    pub role: Role,
    /// The SHA-256 hash of the certificate that proves the name, where there is one.
    pub certificate: Option<[u8; 32]>,
    connection: Connection,
    streams: (SendStream, RecvStream),
    runtime: Handle,
    refused: Refused,
    /// Its place among those who are not let in yet.
    _place: OwnedSemaphorePermit,
}

/// How many were turned away, for whoever counts.
pub(crate) type Refused = Arc<AtomicU64>;

impl Accepted {
    /// Says no.
    pub async fn refuse(mut self, reason: &str) {
        self.refused.fetch_add(1, Ordering::Relaxed);
        let answer = Answer::Refused(reason.into());
        if self.answer(&answer).await.is_ok() {
            // The reason must arrive before the connection is gone.
            drop(tokio::time::timeout(HANDSHAKE_MAX, finish(self.streams.0)).await);
        }
        self.connection.close(VarInt::from_u32(1), b"refused");
    }

    /// A peer that does not take its answer is not waited for.
    async fn answer(&mut self, answer: &Answer) -> Result<()> {
        let told = write_message(&mut self.streams.0, answer, HELLO_BYTES_MAX);
        let late = || Error::connection("a stranger", "it does not take its answer");
        let told = tokio::time::timeout(HANDSHAKE_MAX, told).await.map_err(|_| late());
        let told = told.and_then(|told| told);
        if told.is_err() {
            self.connection.close(VarInt::from_u32(1), b"no answer is taken");
        }
        told
    }

    /// Hands out a certificate; the connection has no other use.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn certify(mut self, name: String, issued: Issued, ca: Vec<u8>) -> Result<()> {
        let Issued { certificate, lifetime } = issued;
        let answer = Answer::Certificate { name, certificate, ca, lifetime };
        self.answer(&answer).await?;
        drop(tokio::time::timeout(HANDSHAKE_MAX, finish(self.streams.0)).await);
        self.connection.close(VarInt::from_u32(0), b"certified");
        Ok(())
    }

    /// Lets it in.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn welcome(mut self) -> Result<(Link, ControlSender, ControlReceiver)> {
        self.answer(&Answer::Welcome).await?;
        let peer = match self.role {
            Role::Node { name } | Role::Peer { name } => name,
            Role::Operator { .. } | Role::Join { .. } => "operator".into(),
        };
        let (send, receive) = self.streams;
        let link = Link::new(self.connection, peer, self.runtime, self.refused);
        Ok((link, ControlSender::new(send), ControlReceiver::new(receive)))
    }
}

/// Takes up connections for as long as somebody wants them; each has a bounded time to say who it is.
pub(crate) async fn accept_all(
    endpoint: quinn::Endpoint,
    accepted: mpsc::Sender<Accepted>,
    refused: Refused,
) {
    // Strangers may dial the supervisor: how many of them take memory at a time is bounded.
    let places = Arc::new(Semaphore::new(INCOMING_MAX));
    while let Some(incoming) = endpoint.accept().await {
        let from = incoming.remote_address();
        // With many at the door, who comes must show that it is where it says before it gets a place.
        if places.available_permits() < INCOMING_MAX / 2
            && incoming.may_retry()
            && !incoming.remote_address_validated()
        {
            drop(incoming.retry());
            continue;
        }
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            tracing::warn!(%from, "a connection was turned away: {INCOMING_MAX} others are saying who they are");
            refused.fetch_add(1, Ordering::Relaxed);
            incoming.refuse();
            continue;
        };
        let (accepted, refused) = (accepted.clone(), Arc::clone(&refused));
        tokio::spawn(async move {
            let introduced = introduce(incoming, Arc::clone(&refused), place);
            match tokio::time::timeout(2 * HANDSHAKE_MAX, introduced).await {
                Ok(Ok(somebody)) => drop(accepted.send(somebody).await),
                Ok(Err(error)) => tracing::warn!(%from, %error, "a connection was turned away"),
                Err(_) => {
                    refused.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(%from, "a connection did not say who it is in time");
                }
            }
        });
    }
}

async fn introduce(
    incoming: quinn::Incoming,
    refused: Refused,
    place: OwnedSemaphorePermit,
) -> Result<Accepted> {
    let from = incoming.remote_address().to_string();
    let gone = |error: quinn::ConnectionError| {
        refused.fetch_add(1, Ordering::Relaxed);
        Error::connection(from.clone(), error)
    };
    let connection = incoming.await.map_err(gone)?;
    let (send, mut receive) = connection.accept_bi().await.map_err(gone)?;
    let _ = send.set_priority(CONTROL_PRIORITY);
    let heard = hear(&mut receive).await;
    let (role, verdict) = match heard {
        Ok(role) if proves_its_name(&connection, &role) => (role, Ok(())),
        Ok(role) => (role, Err(Error::Refused("the certificate does not prove the name".into()))),
        Err(error) => (Role::Operator { token: String::new() }, Err(error)),
    };
    // It runs on the endpoint's runtime, as the connection's driver does.
    let certificate = presented(&connection).map(|certificate| fingerprint(&certificate));
    let accepted = Accepted {
        role,
        certificate,
        connection,
        streams: (send, receive),
        runtime: Handle::current(),
        refused,
        _place: place,
    };
    match verdict {
        Ok(()) => Ok(accepted),
        Err(error) => {
            let reason = match &error {
                Error::Refused(reason) => reason.clone(),
                other => other.to_string(),
            };
            accepted.refuse(&reason).await;
            Err(error)
        }
    }
}

/// Roles with a name need a certificate of the cluster's authority with that name in it.
fn proves_its_name(connection: &Connection, role: &Role) -> bool {
    let (Role::Node { name } | Role::Peer { name }) = role else {
        return true;
    };
    presented(connection).is_some_and(|certificate| tls::is_named(&certificate, name))
}

/// The peer's own certificate, if it has shown one; it is the authority's, or there would be no connection.
pub(crate) fn presented(connection: &Connection) -> Option<CertificateDer<'static>> {
    let chain = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    chain.first().cloned()
}
