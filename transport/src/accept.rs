//! The accepting side of a handshake. The dialer's identity is proven here; admission is the caller's
//! decision.

use crate::error::{Error, Result};
use crate::handshake::{Answer, PeerRole, read_greeting};
use crate::identity::{IssuedCertificate, fingerprint};
use crate::limits::{HANDSHAKE_MAX, HELLO_BYTES_MAX, INCOMING_MAX};
use crate::link::{CLOSE_NORMAL, Link};
use crate::refusal::{Refusal, RefusalCode};
use crate::tls;
use crate::wire::{Control, Wire};
use crate::{ControlReceiver, ControlSender};
use rustls::pki_types::CertificateDer;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// A connection after its greeting, before its admission.
#[derive(Debug)]
pub struct Accepted {
    /// The dialer's role. Names are proven; access tokens are not checked yet.
    pub role: PeerRole,
    /// The SHA-256 hash of the dialer's certificate, if it has presented one.
    pub certificate: Option<[u8; 32]>,
    wire: Arc<dyn Wire>,
    control: Control,
    refused: RefusedCount,
    /// Its place among the connections that are not admitted yet.
    _place: OwnedSemaphorePermit,
}

/// The number of refused connections and frames of an endpoint.
pub(crate) type RefusedCount = Arc<AtomicU64>;

impl Accepted {
    /// Refuses the connection; the dialer gets the code and the reason.
    pub async fn refuse(mut self, refusal: Refusal) {
        self.refused.fetch_add(1, Ordering::Relaxed);
        let code = refusal.code;
        if self.answer(&Answer::Refused(refusal)).await.is_ok() {
            // The reason must arrive before the connection closes.
            drop(tokio::time::timeout(HANDSHAKE_MAX, self.control.0.finish()).await);
        }
        self.wire.close(code.into(), "refused");
    }

    /// A peer that does not read its answer holds up nothing.
    async fn answer(&mut self, answer: &Answer) -> Result<()> {
        let sent = self.control.0.send_within(answer, HELLO_BYTES_MAX);
        let late = || Error::connection("an unknown peer", "it does not read its answer");
        let sent = tokio::time::timeout(HANDSHAKE_MAX, sent).await.unwrap_or_else(|_| Err(late()));
        if sent.is_err() {
            self.wire.close(RefusalCode::Malformed.into(), "the answer was not read");
        }
        sent
    }

    /// Answers [`PeerRole::Join`] with a certificate and closes the connection, which has no other use.
    ///
    /// # Errors
    /// When the connection is closed.
    pub async fn certify(mut self, name: String, issued: IssuedCertificate, ca: Vec<u8>) -> Result<()> {
        let IssuedCertificate { certificate, lifetime } = issued;
        let answer = Answer::Certificate { name, certificate, ca, lifetime };
        self.answer(&answer).await?;
        drop(tokio::time::timeout(HANDSHAKE_MAX, self.control.0.finish()).await);
        self.wire.close(CLOSE_NORMAL, "certified");
        Ok(())
    }

    /// Admits the connection.
    ///
    /// # Errors
    /// When the connection is closed.
    pub async fn welcome(mut self) -> Result<(Link, ControlSender, ControlReceiver)> {
        self.answer(&Answer::Welcome).await?;
        let (sender, receiver) = self.control;
        Ok((Link::new(self.wire, peer_name(&self.role).to_owned()), sender, receiver))
    }
}

/// The name of a link's peer: proven, except for operators, who have none.
fn peer_name(role: &PeerRole) -> &str {
    role.name().unwrap_or("operator")
}

/// Places for connections that are not admitted yet: any host can dial a supervisor, so their memory is
/// bounded.
#[derive(Clone, Debug)]
pub(crate) struct Places(Arc<Semaphore>);

impl Places {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Semaphore::new(INCOMING_MAX)))
    }

    /// Whether more than half of the places are taken.
    pub(crate) fn are_scarce(&self) -> bool {
        self.0.available_permits() < INCOMING_MAX / 2
    }

    /// A place, unless all are taken.
    pub(crate) fn take(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.0).try_acquire_owned().ok()
    }
}

/// A connection whose dialer has not sent its greeting yet.
pub(crate) struct Incoming {
    pub(crate) control: Control,
    /// The dialer's certificate; it is the authority's, or there would be no connection.
    pub(crate) certificate: Option<CertificateDer<'static>>,
    pub(crate) place: OwnedSemaphorePermit,
    pub(crate) refused: RefusedCount,
}

impl Incoming {
    /// Reads the greeting and checks that the certificate proves the name in it. `wire` gets the peer's name.
    ///
    /// # Errors
    /// When the greeting is malformed, of another version, or its name is not proven; the dialer is refused.
    pub(crate) async fn introduce(mut self, wire: impl FnOnce(String) -> Arc<dyn Wire>) -> Result<Accepted> {
        let greeting = read_greeting(&mut self.control.1).await;
        let (role, verdict) = match greeting {
            Ok(role) if self.proves_the_name(&role) => (role, Ok(())),
            Ok(role) => {
                let reason = "the certificate does not prove the name";
                (role, Err(Refusal::new(RefusalCode::NameNotProven, reason).into()))
            }
            Err(error) => (PeerRole::Operator { token: String::new() }, Err(error)),
        };
        let accepted = Accepted {
            wire: wire(peer_name(&role).to_owned()),
            role,
            certificate: self.certificate.map(|certificate| fingerprint(&certificate)),
            control: self.control,
            refused: self.refused,
            _place: self.place,
        };
        match verdict {
            Ok(()) => Ok(accepted),
            Err(error) => {
                accepted.refuse(refusal(&error)).await;
                Err(error)
            }
        }
    }

    /// Roles with a name need a certificate of the cluster's authority with that name in it.
    fn proves_the_name(&self, role: &PeerRole) -> bool {
        let Some(name) = role.name() else { return true };
        self.certificate.as_ref().is_some_and(|certificate| tls::is_named(certificate, name))
    }
}

fn refusal(error: &Error) -> Refusal {
    match error {
        Error::Refused { code, reason } => Refusal::new(*code, reason.clone()),
        other => Refusal::new(RefusalCode::Malformed, other.to_string()),
    }
}
