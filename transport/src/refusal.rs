//! Refusals: a code for programs and a reason for people. The same codes close live links.

use crate::access_token::AccessTokenError;
use serde::{Deserialize, Serialize};

/// Why a process refuses a peer. Numbers are never reused for something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "u16", into = "u16")]
#[repr(u16)]
pub enum RefusalCode {
    /// A node of this name is connected.
    NameInUse = 100,
    /// The supervisor has not issued the certificate.
    CertificateUnknown = 101,
    /// The certificate is revoked.
    CertificateRevoked = 102,
    /// The certificate has expired.
    CertificateExpired = 103,
    /// The certificate does not prove the name, or there is none.
    NameNotProven = 104,
    /// The access token is malformed, unknown, or has the wrong secret.
    AccessTokenInvalid = 110,
    /// The access token has expired.
    AccessTokenExpired = 111,
    /// The access token has no uses left.
    AccessTokenUsedUp = 112,
    /// The access token is for another role.
    AccessTokenWrongRole = 113,
    /// The run has ended.
    RunEnded = 120,
    /// The supervisor is starting: retry in a moment.
    Starting = 121,
    /// The two ends have different protocol versions.
    Version = 130,
    /// The role needs a supervisor, and this process is a node.
    NotASupervisor = 131,
    /// The role needs a node, and this process is the supervisor.
    NotANode = 132,
    /// The greeting, a message or a frame is malformed.
    Malformed = 133,
    /// Any other reason, and every code that this version does not know.
    Other = 199,
}

impl RefusalCode {
    const ALL: [Self; 16] = [
        Self::NameInUse,
        Self::CertificateUnknown,
        Self::CertificateRevoked,
        Self::CertificateExpired,
        Self::NameNotProven,
        Self::AccessTokenInvalid,
        Self::AccessTokenExpired,
        Self::AccessTokenUsedUp,
        Self::AccessTokenWrongRole,
        Self::RunEnded,
        Self::Starting,
        Self::Version,
        Self::NotASupervisor,
        Self::NotANode,
        Self::Malformed,
        Self::Other,
    ];

    /// The code of a closed link, as the peer sent it; `None` for a close that is no refusal.
    #[must_use]
    pub fn from_close_code(code: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|known| u32::from(*known as u16) == code)
    }
}

impl From<u16> for RefusalCode {
    fn from(number: u16) -> Self {
        Self::from_close_code(number.into()).unwrap_or(Self::Other)
    }
}

impl From<RefusalCode> for u16 {
    fn from(code: RefusalCode) -> Self {
        code as Self
    }
}

impl From<RefusalCode> for u32 {
    fn from(code: RefusalCode) -> Self {
        (code as u16).into()
    }
}

/// A refusal: what the refused process acts on, and what its user reads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{reason}")]
pub struct Refusal {
    /// For people. It comes first: protocol 2 sent nothing else, and each version can read the other's
    /// reason.
    pub reason: String,
    /// For programs.
    pub code: RefusalCode,
}

impl Refusal {
    /// A refusal with a code and a reason.
    #[must_use]
    pub fn new(code: RefusalCode, reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), code }
    }
}

impl From<AccessTokenError> for Refusal {
    fn from(error: AccessTokenError) -> Self {
        let code = match error {
            AccessTokenError::Malformed | AccessTokenError::Unknown | AccessTokenError::WrongSecret => {
                RefusalCode::AccessTokenInvalid
            }
            AccessTokenError::Expired => RefusalCode::AccessTokenExpired,
            AccessTokenError::UsedUp => RefusalCode::AccessTokenUsedUp,
            AccessTokenError::WrongRole => RefusalCode::AccessTokenWrongRole,
        };
        Self::new(code, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_survives_its_number_and_an_unknown_number_is_other() {
        for code in RefusalCode::ALL {
            assert_eq!(RefusalCode::from(u16::from(code)), code);
            assert_eq!(RefusalCode::from_close_code(code.into()), Some(code));
        }
        assert_eq!(RefusalCode::from(7), RefusalCode::Other);
        assert_eq!(RefusalCode::from_close_code(0), None);
    }

    #[test]
    fn a_refusal_begins_with_its_reason_on_the_wire() {
        let refusal = Refusal::new(RefusalCode::NameInUse, "no");
        assert_eq!(postcard::to_stdvec(&refusal).unwrap(), [2, b'n', b'o', 100]);
        assert_eq!(postcard::from_bytes(&[2, b'n', b'o', 100]), Ok(refusal));
    }
}
