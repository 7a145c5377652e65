//! Who is admitted: nodes that join with an access token, nodes that connect with a certificate, and
//! operators.

use super::session::{Admitted, serve_node};
use super::shared::Shared;
use crate::credentials::{CredentialError, Exchanged};
use crate::messages::{SupervisorMsg, notify};
use std::sync::Arc;
use tokio::sync::watch;
use volary_protocol::operator::OperatorRequest;
use volary_transport::{
    Accepted, AccessRole, ControlReceiver, ControlSender, Endpoint, Error, Link, PeerRole, Refusal,
    RefusalCode,
};

/// Why a connection ended without being served to its end.
#[derive(Debug, thiserror::Error)]
enum Rejected {
    #[error("{0}")]
    Refused(Refusal),
    #[error(transparent)]
    Transport(#[from] Error),
}

/// Admits connections for as long as the endpoint is open.
/// Until the supervisor has started, everybody is told to wait.
pub(super) async fn accept(open: watch::Receiver<Option<Arc<Shared>>>, endpoint: Endpoint) {
    while let Some(accepted) = endpoint.accept().await {
        let shared = open.borrow().clone();
        tokio::spawn(async move {
            let Some(shared) = shared else {
                let reason = "the supervisor is starting; try again in a moment";
                return accepted.refuse(Refusal::new(RefusalCode::Starting, reason)).await;
            };
            if let Err(error) = admit(shared, accepted).await {
                tracing::warn!(%error, "connection rejected");
            }
        });
    }
}

/// Decides on a connection, and serves it.
async fn admit(shared: Arc<Shared>, accepted: Accepted) -> Result<(), Rejected> {
    let admitted = match verdict(&shared, &accepted) {
        Ok(admitted) => admitted,
        Err(refusal) => return refuse(accepted, refusal).await,
    };
    match accepted.role.clone() {
        PeerRole::Join { token, request, name } => certify(&shared, accepted, &token, &request, name).await,
        PeerRole::Operator { token } => {
            let (link, sender, receiver) = accepted.welcome().await?;
            serve_operator(&shared, &token, link, sender, receiver).await;
            Ok(())
        }
        PeerRole::Node { .. } | PeerRole::Peer { .. } => {
            let (link, sender, receiver) = accepted.welcome().await?;
            serve_node(shared, link, admitted, sender, receiver).await.map_err(Rejected::Refused)
        }
    }
}

/// Whether a role is admitted.
fn verdict(shared: &Shared, accepted: &Accepted) -> Result<Admitted, Refusal> {
    let refuse = |error: CredentialError| error.refusal();
    let certificate = accepted.certificate.unwrap_or_default();
    let mut admitted = Admitted { certificate, zone: None };
    match &accepted.role {
        // Operators may still ask, and get the same answer.
        PeerRole::Join { .. } | PeerRole::Node { .. } if shared.is_over() => {
            return Err(Refusal::new(RefusalCode::RunEnded, "the run has ended"));
        }
        // What nodes hold may be all that there is of the last steps.
        PeerRole::Join { .. } | PeerRole::Node { .. } if shared.has_stopped() => {
            let reason = "the supervisor cannot go on; wait until it is started again";
            return Err(Refusal::new(RefusalCode::Starting, reason));
        }
        PeerRole::Join { name: Some(name), .. } if shared.is_in_use(name) => {
            let reason = "a live node has this name; choose another one";
            return Err(Refusal::new(RefusalCode::NameInUse, reason));
        }
        PeerRole::Join { name: Some(name), .. } if shared.is_reserved(name) => {
            let reason = "the supervisor has restarted, and the node of this name may return; try again soon";
            return Err(Refusal::new(RefusalCode::NameInUse, reason));
        }
        PeerRole::Join { token, .. } => {
            shared.credentials.check(token, AccessRole::Node).map_err(refuse)?;
        }
        PeerRole::Operator { token } => {
            shared.credentials.check(token, AccessRole::Operator).map_err(refuse)?;
        }
        PeerRole::Node { name } => {
            admitted.zone = shared.credentials.admit(name, accepted.certificate).map_err(refuse)?;
        }
        PeerRole::Peer { .. } => {
            return Err(Refusal::new(RefusalCode::NotANode, "this is the supervisor, not a node"));
        }
    }
    Ok(admitted)
}

async fn refuse(accepted: Accepted, refusal: Refusal) -> Result<(), Rejected> {
    accepted.refuse(refusal.clone()).await;
    Err(Rejected::Refused(refusal))
}

/// Exchanges an access token for a certificate.
async fn certify(
    shared: &Shared,
    accepted: Accepted,
    token: &str,
    request: &[u8],
    name: Option<String>,
) -> Result<(), Rejected> {
    match shared.credentials.exchange(token, request, name) {
        Ok(Exchanged { name, issued, revoked }) => {
            if !revoked.is_empty() {
                notify(&shared.actor, SupervisorMsg::Revoked(revoked));
            }
            let authority = shared.credentials.authority().certificate().to_vec();
            Ok(accepted.certify(name, issued, authority).await?)
        }
        Err(error) => refuse(accepted, error.refusal()).await,
    }
}

/// Answers an operator's requests until its link ends.
async fn serve_operator(
    shared: &Shared,
    token: &str,
    link: Link,
    mut sender: ControlSender,
    mut receiver: ControlReceiver,
) {
    while let Ok(Some(request)) = receiver.recv::<OperatorRequest>().await {
        // The access token may have been revoked since the link was opened.
        if let Err(error) = shared.credentials.check(token, AccessRole::Operator) {
            return link.refuse(&error.refusal());
        }
        let answer = match shared.credentials.answer(&request) {
            Some(answer) => answer,
            None => tokio::select! {
                answer = shared.ask(request) => answer,
                _ = link.closed() => return,
            },
        };
        if sender.send(&answer).await.is_err() {
            return;
        }
    }
}
