//! Access tokens: the credentials with which nodes join and people operate.
//!
//! The text of an access token is `volary1.FINGERPRINT.ID.SECRET`. The fingerprint pins the cluster's
//! authority, so that the holder can verify the supervisor from the first packet; the supervisor stores only
//! a hash of the secret.

use crate::limits::ACCESS_TOKEN_ID_MAX;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

const PREFIX: &str = "volary1";

/// The permission of an access token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AccessRole {
    /// Join as a node.
    Node,
    /// Query and control the run.
    Operator,
    /// View the dashboard.
    Viewer,
}

/// An access token with its secret.
///
/// ```
/// use volary_transport::{AccessRole, AccessToken, AccessTokenTerms};
///
/// let (fingerprint, terms) = ([7; 32], AccessTokenTerms::default());
/// let (token, record) = AccessToken::issue(fingerprint, AccessRole::Node, 1_000, terms)?;
/// let copy: AccessToken = token.reveal().parse()?;
/// assert_eq!(copy.id(), record.id);
/// assert!(record.verify(&copy, AccessRole::Node, 1_001).is_ok());
/// assert!(record.verify(&copy, AccessRole::Operator, 1_001).is_err());
/// # Ok::<(), volary_transport::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct AccessToken {
    fingerprint: [u8; 32],
    id: String,
    secret: [u8; 32],
}

impl fmt::Debug for AccessToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AccessToken({})", self.id)
    }
}

/// Why an access token is invalid.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AccessTokenError {
    /// The text has another format.
    #[error("malformed access token: expected volary1.FINGERPRINT.ID.SECRET")]
    Malformed,
    /// The supervisor has no access token with this identifier.
    #[error("unknown access token: it is of another run, or revoked")]
    Unknown,
    /// The secret differs.
    #[error("the access token's secret is wrong")]
    WrongSecret,
    /// Its lifetime is over.
    #[error("the access token has expired")]
    Expired,
    /// It has no uses left.
    #[error("the access token has no uses left")]
    UsedUp,
    /// It has another role.
    #[error("the access token is for another role")]
    WrongRole,
}

/// The stored form of an access token, without its secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccessTokenRecord {
    /// The identifier.
    pub id: String,
    /// The permission.
    pub role: AccessRole,
    /// Time of issue, in seconds since 1970.
    pub created_unix_s: u64,
    /// Expiry, in seconds since 1970; `None` is never.
    pub expires_unix_s: Option<u64>,
    /// Remaining joins; `None` is unlimited.
    pub uses_left: Option<u32>,
    /// Labels, as `key=value`. A `zone` is the zone of all nodes that join with the access token.
    pub labels: Vec<(String, String)>,
    hash: [u8; 32],
}

/// The terms of a new access token.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccessTokenTerms {
    /// Lifetime; `None` is unlimited.
    pub lifetime: Option<Duration>,
    /// Joins; `None` is unlimited.
    pub uses: Option<u32>,
    /// Labels, as in [`AccessTokenRecord::labels`].
    pub labels: Vec<(String, String)>,
}

fn hash(secret: &[u8; 32]) -> [u8; 32] {
    blake3::derive_key("volary 2026 token secret", secret)
}

impl AccessToken {
    /// A new access token and its stored form.
    ///
    /// # Errors
    /// [`crate::Error::Identity`] when the machine provides no random numbers.
    pub fn issue(
        fingerprint: [u8; 32],
        role: AccessRole,
        now_unix_s: u64,
        terms: AccessTokenTerms,
    ) -> crate::Result<(Self, AccessTokenRecord)> {
        let mut random = [0; 40];
        let provider = rustls::crypto::ring::default_provider();
        provider
            .secure_random
            .fill(&mut random)
            .map_err(|_| crate::Error::identity("the machine provides no random numbers"))?;
        let mut secret = [0; 32];
        secret.copy_from_slice(&random[8..]);
        let id = hex(&random[..8]);
        let token = Self { fingerprint, id, secret };
        let record = token.record(role, now_unix_s, terms);
        Ok((token, record))
    }

    /// The stored form of an access token that was issued elsewhere.
    #[must_use]
    pub fn record(&self, role: AccessRole, now_unix_s: u64, terms: AccessTokenTerms) -> AccessTokenRecord {
        let AccessTokenTerms { lifetime, uses, labels } = terms;
        AccessTokenRecord {
            id: self.id.clone(),
            role,
            created_unix_s: now_unix_s,
            expires_unix_s: lifetime.map(|lifetime| now_unix_s.saturating_add(lifetime.as_secs())),
            uses_left: uses,
            labels,
            hash: hash(&self.secret),
        }
    }

    /// The fingerprint of the cluster's authority.
    #[must_use]
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    /// The identifier, which is not secret.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The text, with the secret.
    #[must_use]
    pub fn reveal(&self) -> String {
        format!("{PREFIX}.{}.{}.{}", hex(&self.fingerprint), self.id, hex(&self.secret))
    }
}

impl AccessTokenRecord {
    /// Checks an access token for a role at a time, in seconds since 1970. Secrets are compared in constant
    /// time.
    ///
    /// # Errors
    /// The reason why it is invalid.
    pub fn verify(
        &self,
        token: &AccessToken,
        role: AccessRole,
        now_unix_s: u64,
    ) -> Result<(), AccessTokenError> {
        if blake3::Hash::from(hash(&token.secret)) != blake3::Hash::from(self.hash) {
            return Err(AccessTokenError::WrongSecret);
        }
        if self.role != role {
            return Err(AccessTokenError::WrongRole);
        }
        match (self.expires_unix_s, self.uses_left) {
            (Some(end), _) if end <= now_unix_s => Err(AccessTokenError::Expired),
            (_, Some(0)) => Err(AccessTokenError::UsedUp),
            _ => Ok(()),
        }
    }
}

impl FromStr for AccessToken {
    type Err = AccessTokenError;

    fn from_str(text: &str) -> Result<Self, AccessTokenError> {
        let mut parts = text.trim().split('.');
        let mut next = || parts.next().ok_or(AccessTokenError::Malformed);
        let (prefix, fingerprint, id, secret) = (next()?, next()?, next()?, next()?);
        if prefix != PREFIX || parts.next().is_some() || id.is_empty() || id.len() > ACCESS_TOKEN_ID_MAX {
            return Err(AccessTokenError::Malformed);
        }
        Ok(Self { fingerprint: unhex(fingerprint)?, id: id.to_owned(), secret: unhex(secret)? })
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Result<[u8; 32], AccessTokenError> {
    let mut bytes = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return Err(AccessTokenError::Malformed);
    }
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16)
            .map_err(|_| AccessTokenError::Malformed)?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn issue() -> (AccessToken, AccessTokenRecord) {
        let terms =
            AccessTokenTerms { lifetime: Some(Duration::from_secs(50)), uses: Some(1), labels: vec![] };
        AccessToken::issue([7; 32], AccessRole::Node, 100, terms).expect("randomness")
    }

    #[test]
    fn a_token_survives_its_text_and_its_debug_output_hides_the_secret() {
        let (token, _) = issue();
        assert_eq!(token.reveal().parse::<AccessToken>(), Ok(token.clone()));
        assert!(!format!("{token:?}").contains(&hex(&token.secret)));
    }

    #[test]
    fn wrong_expired_and_misused_tokens_are_distinguished() {
        let (token, record) = issue();
        assert_eq!(record.verify(&token, AccessRole::Node, 149), Ok(()));
        assert_eq!(record.verify(&token, AccessRole::Node, 150), Err(AccessTokenError::Expired));
        assert_eq!(record.verify(&token, AccessRole::Operator, 100), Err(AccessTokenError::WrongRole));
        let used = AccessTokenRecord { uses_left: Some(0), ..record.clone() };
        assert_eq!(used.verify(&token, AccessRole::Node, 100), Err(AccessTokenError::UsedUp));
        assert_eq!(record.verify(&issue().0, AccessRole::Node, 100), Err(AccessTokenError::WrongSecret));
    }

    #[test]
    fn arbitrary_text_is_not_a_token() {
        for text in ["", "hello", "volary1.00.a.b", "volary2.x.y.z", "é".repeat(70).as_str()] {
            assert_eq!(text.parse::<AccessToken>(), Err(AccessTokenError::Malformed), "{text}");
        }
    }
}
