//! The first messages on a connection: the dialer's role and version, and the answer.
//!
//! The dialer opens the control stream and sends a `Hello`; the other end replies with an `Answer`. The
//! rest of the stream is the caller's. Versions must be equal: all processes of a cluster are one program.

use crate::control::{ControlReceiver, ControlSender};
use crate::error::{Error, Result};
use crate::limits::{HANDSHAKE_MAX, HELLO_BYTES_MAX};
use crate::refusal::{Refusal, RefusalCode};
use serde::{Deserialize, Serialize};

/// The version of all messages between nodes and supervisors.
pub const PROTOCOL: u16 = 8;

/// The role in which a process dials.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PeerRole {
    /// A machine that requests a certificate for its key.
    Join {
        /// The access token's text.
        token: String,
        /// The certificate request, DER.
        request: Vec<u8>,
        /// The preferred node name.
        name: Option<String>,
    },
    /// An operator with an access token.
    Operator {
        /// The access token's text.
        token: String,
    },
    /// A node that connects to its supervisor.
    Node {
        /// Its name, which its certificate must prove.
        name: String,
    },
    /// A node that connects to another node.
    Peer {
        /// Its name, which its certificate must prove.
        name: String,
    },
}

impl PeerRole {
    /// The name that the dialer's certificate must prove.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        match self {
            Self::Node { name } | Self::Peer { name } => Some(name),
            Self::Join { .. } | Self::Operator { .. } => None,
        }
    }
}

/// The dialer's first message. Its layout never changes, so that different versions can name each other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hello {
    pub(crate) protocol: u16,
    pub(crate) version: String,
    pub(crate) role: Vec<u8>,
}

/// The answer to a [`Hello`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// Number 0, and the reason first, in every version.
    Refused(Refusal),
    Welcome,
    /// To [`PeerRole::Join`].
    Certificate {
        /// The node's name.
        name: String,
        /// Its certificate, DER.
        certificate: Vec<u8>,
        /// The authority's certificate, DER.
        ca: Vec<u8>,
        /// Validity of the certificate from now on.
        lifetime: std::time::Duration,
    },
}

/// The answer of protocol 2, as far as another version needs it.
#[derive(Serialize, Deserialize)]
enum AnswerV2 {
    Refused(String),
}

/// Sends a hello and reads the answer; a refusal is an error.
///
/// # Errors
/// [`Error::Refused`] with the peer's code and reason; otherwise when the connection breaks or the answer is
/// malformed.
pub(crate) async fn greet(
    control: (&mut ControlSender, &mut ControlReceiver),
    role: &PeerRole,
    protocol: u16,
) -> Result<Answer> {
    let role = postcard::to_stdvec(role).map_err(|e| Error::malformed("handshake", e.to_string()))?;
    let hello = Hello { protocol, version: env!("CARGO_PKG_VERSION").into(), role };
    let (sender, receiver) = control;
    sender.send_within(&hello, HELLO_BYTES_MAX).await?;
    match within(receiver.recv_bytes(HELLO_BYTES_MAX)).await? {
        Some(bytes) => match decode_answer(&bytes)? {
            Answer::Refused(refusal) => Err(refusal.into()),
            answer => Ok(answer),
        },
        None => Err(Error::malformed("handshake", "the peer closed without an answer")),
    }
}

fn decode_answer(bytes: &[u8]) -> Result<Answer> {
    postcard::from_bytes(bytes).or_else(|error| match postcard::from_bytes(bytes) {
        // The only hello that protocol 2 can read of this version is one that it refuses for its version.
        Ok(AnswerV2::Refused(reason)) => Ok(Answer::Refused(Refusal::new(RefusalCode::Version, reason))),
        Err(_) => Err(Error::malformed("message", error.to_string())),
    })
}

/// Reads a hello; a peer of another version is refused with both versions in the reason.
pub(crate) async fn read_greeting(receiver: &mut ControlReceiver) -> Result<PeerRole> {
    let hello = within(receiver.recv_bytes(HELLO_BYTES_MAX)).await?;
    let hello = hello.ok_or_else(|| Error::malformed("handshake", "the peer closed without a greeting"))?;
    let hello: Hello =
        postcard::from_bytes(&hello).map_err(|error| Error::malformed("message", error.to_string()))?;
    if hello.protocol != PROTOCOL {
        let reason = format!(
            "this is Volary {} (protocol {PROTOCOL}), and the other end is {} (protocol {}): \
             use the same version everywhere",
            env!("CARGO_PKG_VERSION"),
            hello.version,
            hello.protocol
        );
        return Err(Refusal::new(RefusalCode::Version, reason).into());
    }
    postcard::from_bytes(&hello.role).map_err(|error| Error::malformed("handshake", error.to_string()))
}

async fn within<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout(HANDSHAKE_MAX, work)
        .await
        .unwrap_or_else(|_| Err(Error::malformed("handshake", format!("not within {HANDSHAKE_MAX:?}"))))
}

/// Decodes complete bytes as [`read_greeting`] and [`greet`] do.
pub(crate) fn fuzz(bytes: &[u8]) {
    if let Ok(hello) = postcard::from_bytes::<Hello>(bytes) {
        drop(postcard::from_bytes::<PeerRole>(&hello.role));
    }
    drop(postcard::from_bytes::<PeerRole>(bytes));
    drop(decode_answer(bytes));
}

pub(crate) fn fuzz_seeds() -> Vec<Vec<u8>> {
    let (token, name) = ("volary1.a.b.c".to_owned(), "node-1".to_owned());
    let roles = [
        PeerRole::Join { token: token.clone(), request: vec![48, 3, 2, 1, 0], name: Some(name.clone()) },
        PeerRole::Operator { token },
        PeerRole::Node { name: name.clone() },
        PeerRole::Peer { name },
    ];
    let hello = |role: &PeerRole| {
        let role = postcard::to_stdvec(role).unwrap_or_default();
        postcard::to_stdvec(&Hello { protocol: PROTOCOL, version: "0.1.0".into(), role }).unwrap_or_default()
    };
    roles.iter().map(hello).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_of_protocol_2_is_understood_and_ours_is_understood_there() {
        let old = postcard::to_stdvec(&AnswerV2::Refused("use protocol 2".into())).unwrap();
        let expected = Refusal::new(RefusalCode::Version, "use protocol 2");
        assert_eq!(decode_answer(&old).unwrap(), Answer::Refused(expected));
        let ours = Answer::Refused(Refusal::new(RefusalCode::Version, "use protocol 3"));
        let AnswerV2::Refused(reason) = postcard::from_bytes(&postcard::to_stdvec(&ours).unwrap()).unwrap();
        assert_eq!(reason, "use protocol 3");
    }

    #[test]
    fn arbitrary_bytes_are_no_answer() {
        for bytes in [&[][..], &[9], &[0], &[0, 5, b'a'], &[2, 1]] {
            assert!(decode_answer(bytes).is_err(), "{bytes:?}");
        }
    }
}
