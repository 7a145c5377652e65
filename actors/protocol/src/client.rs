//! The operator's side of a request: `volary status`, `checkpoint`, `drain`, `stop` and `token`.

use crate::operator::{OperatorReply, OperatorRequest};
use std::net::SocketAddr;
use volary_transport::{AccessToken, Endpoint, Error, Result, TransportOptions};

/// Sends one request to a running supervisor and awaits the reply.
///
/// # Errors
/// When the supervisor cannot be reached, refuses the access token, or ends before it replies.
pub async fn operate(
    addresses: &[SocketAddr],
    token: &AccessToken,
    request: &OperatorRequest,
) -> Result<OperatorReply> {
    let mut failed = Error::connection("the supervisor", "it has no address");
    for address in addresses {
        match operate_at(*address, token, request).await {
            Err(error @ Error::Connection { .. }) => failed = error,
            answered => return answered,
        }
    }
    Err(failed)
}

async fn operate_at(
    address: SocketAddr,
    token: &AccessToken,
    request: &OperatorRequest,
) -> Result<OperatorReply> {
    let endpoint = Endpoint::dial_only(address, &TransportOptions::default())?;
    let (_link, mut sender, mut receiver) = endpoint.operate(address, token).await?;
    sender.send(request).await?;
    receiver.recv().await?.ok_or_else(|| Error::connection("the supervisor", "it ended before it replied"))
}
