//! Tokens: what lets a node join and a person operate.
//!
//! A token's text is `volary1.FINGERPRINT.ID.SECRET`. The fingerprint pins the cluster's authority, so that whoever
//! holds the token knows the supervisor before it has spoken; the supervisor keeps only a hash of the secret.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

const PREFIX: &str = "volary1";

/// What a token allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AccessRole {
    /// To join as a node.
    Node,
    /// To ask and order.
    Operator,
    /// To look at the page.
    Viewer,
}

/// A token, with its secret.
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

/// Why a token is no good.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AccessTokenError {
    /// It is no token at all.
    #[error("this is no token: expected volary1.FINGERPRINT.ID.SECRET")]
    Malformed,
    /// The supervisor has none of this id.
    #[error("the token is not known here: it is another run's, or was revoked")]
    Unknown,
    /// The secret is another.
    #[error("the access token's secret is wrong")]
    WrongSecret,
    /// Its time is over.
    #[error("the access token has expired")]
    Expired,
    /// It was used as often as it may be.
    #[error("the token was used as often as it may be")]
    UsedUp,
    /// It is for something else.
    #[error("the token is for something else")]
    WrongRole,
}

/// What the supervisor keeps of a token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccessTokenRecord {
    /// The token's name.
    pub id: String,
    /// What it allows.
    pub role: AccessRole,
    /// When it was made, in seconds since 1970.
    pub created_unix_s: u64,
    /// When it ends, in seconds since 1970; `None` is never.
    pub expires_unix_s: Option<u64>,
    /// How often it may still be used to join; `None` is without end.
    pub uses_left: Option<u32>,
    /// What whoever made it wrote on it, as `key=value`. A `zone` is that of the nodes that join with it.
    pub labels: Vec<(String, String)>,
    hash: [u8; 32],
}

/// What a new token is to be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccessTokenTerms {
    /// How long it is good for; `None` is for ever.
    pub lifetime: Option<Duration>,
    /// How often it may be used to join; `None` is without end.
    pub uses: Option<u32>,
    /// What is written on it.
    pub labels: Vec<(String, String)>,
}

fn hash(secret: &[u8; 32]) -> [u8; 32] {
    blake3::derive_key("volary 2026 token secret", secret)
}

impl AccessToken {
    /// A new token and what to keep of it; the token itself is shown once.
    ///
    /// # Errors
    /// When the machine has no randomness.
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
            .map_err(|_| crate::Error::identity("this machine has no randomness"))?;
        let mut secret = [0; 32];
        secret.copy_from_slice(&random[8..]);
        let id = hex(&random[..8]);
        let token = Self { fingerprint, id, secret };
        let record = token.record(role, now_unix_s, terms);
        Ok((token, record))
    }

    /// What to keep of a token that was made elsewhere.
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

    /// The token's name, which is no secret.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The token's text, secret included.
    #[must_use]
    pub fn reveal(&self) -> String {
        format!("{PREFIX}.{}.{}.{}", hex(&self.fingerprint), self.id, hex(&self.secret))
    }
}

impl AccessTokenRecord {
    /// Whether a token is this one, and good for `role` now. The comparison takes the same time whatever differs.
    ///
    /// # Errors
    /// What is wrong with it.
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
        if prefix != PREFIX || parts.next().is_some() || id.is_empty() || id.len() > 64 {
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
    fn a_token_survives_its_text_and_its_debug_form_hides_the_secret() {
        let (token, _) = issue();
        assert_eq!(token.reveal().parse::<AccessToken>(), Ok(token.clone()));
        assert!(!format!("{token:?}").contains(&hex(&token.secret)));
    }

    #[test]
    fn wrong_expired_and_misused_tokens_are_told_apart() {
        let (token, record) = issue();
        assert_eq!(record.verify(&token, AccessRole::Node, 149), Ok(()));
        assert_eq!(record.verify(&token, AccessRole::Node, 150), Err(AccessTokenError::Expired));
        assert_eq!(record.verify(&token, AccessRole::Operator, 100), Err(AccessTokenError::WrongRole));
        let used = AccessTokenRecord { uses_left: Some(0), ..record.clone() };
        assert_eq!(used.verify(&token, AccessRole::Node, 100), Err(AccessTokenError::UsedUp));
        assert_eq!(record.verify(&issue().0, AccessRole::Node, 100), Err(AccessTokenError::WrongSecret));
    }

    #[test]
    fn rubbish_is_no_token() {
        for text in ["", "hello", "volary1.00.a.b", "volary2.x.y.z", "é".repeat(70).as_str()] {
            assert_eq!(text.parse::<AccessToken>(), Err(AccessTokenError::Malformed), "{text}");
        }
    }
}
