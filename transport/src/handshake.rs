//! The first words on a connection: who is there, in which version, and what it wants.
//!
//! The dialler opens the control stream and says [`Hello`]; the other answers [`Answer`]. What follows on the stream is
//! the caller's. Versions must be equal: a cluster's processes are one program.

use crate::control::{read_message, write_message};
use crate::error::{Error, Result};
use crate::limits::{HANDSHAKE_MAX, HELLO_BYTES_MAX};
use quinn::{RecvStream, SendStream};
use serde::{Deserialize, Serialize};

/// The version of everything that nodes and supervisors say to each other.
pub const PROTOCOL: u16 = 2;

/// Who is there and what it wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// A machine that wants a certificate for its key.
    Join {
        /// The token's text.
        token: String,
        /// The certificate request, DER.
        request: Vec<u8>,
        /// The name that it would like.
        name: Option<String>,
    },
    /// A person with a token.
    Operator {
        /// The token's text.
        token: String,
    },
    /// A node, to its supervisor.
    Node {
        /// Its name, which its certificate must prove.
        name: String,
    },
    /// A node, to another.
    Peer {
        /// Its name, which its certificate must prove.
        name: String,
    },
}

/// The dialler's first message. Its layout never changes, so that unlike versions can tell each other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hello {
    pub(crate) protocol: u16,
    pub(crate) version: String,
    pub(crate) role: Vec<u8>,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// No, and why.
    Refused(String),
    /// Come in.
    Welcome,
    /// To [`Role::Join`].
    Certificate {
        /// The name that the node goes by.
        name: String,
        /// Its certificate, DER.
        certificate: Vec<u8>,
        /// The authority's certificate, DER.
        ca: Vec<u8>,
        /// How long the certificate is good for.
        lifetime: std::time::Duration,
    },
}

/// Says hello and reads the answer; a refusal is an error.
pub(crate) async fn greet(
    send: &mut SendStream,
    receive: &mut RecvStream,
    role: &Role,
    protocol: u16,
) -> Result<Answer> {
    let role = postcard::to_stdvec(role).map_err(|e| Error::malformed("handshake", e.to_string()))?;
    let hello = Hello { protocol, version: env!("CARGO_PKG_VERSION").into(), role };
    write_message(send, &hello, HELLO_BYTES_MAX).await?;
    match within(read_message(receive, HELLO_BYTES_MAX)).await? {
        Some(Answer::Refused(reason)) => Err(Error::Refused(reason)),
        Some(answer) => Ok(answer),
        None => Err(Error::malformed("handshake", "the peer closed without an answer")),
    }
}

/// Reads a hello; another version's is told both versions.
pub(crate) async fn hear(receive: &mut RecvStream) -> Result<Role> {
    let hello: Option<Hello> = within(read_message(receive, HELLO_BYTES_MAX)).await?;
    let hello = hello.ok_or_else(|| Error::malformed("handshake", "the peer closed without a word"))?;
    if hello.protocol != PROTOCOL {
        return Err(Error::Refused(format!(
            "this is Volary {} (protocol {PROTOCOL}), and the other end is {} (protocol {}): use the same version everywhere",
            env!("CARGO_PKG_VERSION"),
            hello.version,
            hello.protocol
        )));
    }
    postcard::from_bytes(&hello.role).map_err(|error| Error::malformed("handshake", error.to_string()))
}

async fn within<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout(HANDSHAKE_MAX, work)
        .await
        .unwrap_or_else(|_| Err(Error::malformed("handshake", format!("not within {HANDSHAKE_MAX:?}"))))
}

/// What [`hear`] does with bytes that have come whole.
pub(crate) fn fuzz(bytes: &[u8]) {
    if let Ok(hello) = postcard::from_bytes::<Hello>(bytes) {
        drop(postcard::from_bytes::<Role>(&hello.role));
    }
    drop(postcard::from_bytes::<Role>(bytes));
    drop(postcard::from_bytes::<Answer>(bytes));
}

pub(crate) fn fuzz_seeds() -> Vec<Vec<u8>> {
    let (token, name) = ("volary1.a.b.c".to_owned(), "node-1".to_owned());
    let roles = [
        Role::Join { token: token.clone(), request: vec![48, 3, 2, 1, 0], name: Some(name.clone()) },
        Role::Operator { token },
        Role::Node { name: name.clone() },
        Role::Peer { name },
    ];
    let hello = |role: &Role| {
        let role = postcard::to_stdvec(role).unwrap_or_default();
        postcard::to_stdvec(&Hello { protocol: PROTOCOL, version: "0.1.0".into(), role }).unwrap_or_default()
    };
    roles.iter().map(hello).collect()
}
