//! Who is admitted: the run's access tokens, and the certificates issued for them.
//!
//! Access tokens are stored as hashes and compared in constant time. A certificate is known by its SHA-256
//! hash. One that is unknown, expired, or revoked because its node was fenced or has left is rejected:
//! its node joins again, with its access token if that is still valid.

use crate::run_files::unix_ms;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::time::Duration;
use volary_core::NodeId;
use volary_protocol::operator::{AccessTokenStatus, OperatorReply, OperatorRequest};
use volary_storage::{Store, Table};
use volary_transport::{
    AccessRole, AccessToken, AccessTokenError, AccessTokenRecord, AccessTokenTerms, Authority,
    IssuedCertificate, Refusal, RefusalCode, SUPERVISOR, check_name, write_secret,
};

use crate::limits::{ACCESS_TOKENS_MAX, USE_RACES_MAX};

/// Why a credential is refused, or cannot be issued.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// The access token is not valid for this.
    #[error(transparent)]
    AccessToken(#[from] AccessTokenError),
    /// The access token belongs to another cluster.
    #[error("the access token is for another authority")]
    OtherAuthority,
    /// Concurrent uses of one access token.
    #[error("too many concurrent uses of this access token")]
    Contended,
    /// The run has as many access tokens as it may.
    #[error("the run has {ACCESS_TOKENS_MAX} access tokens: revoke some first")]
    TooManyAccessTokens,
    /// No access token has this id.
    #[error("no access token {id}; `volary token list` shows all")]
    NoSuchAccessToken {
        /// The id.
        id: String,
    },
    /// The name is reserved.
    #[error("the name {name} is reserved")]
    ReservedName {
        /// The name.
        name: String,
    },
    /// The dialer presented no certificate.
    #[error("no certificate")]
    NoCertificate,
    /// This supervisor did not issue the certificate.
    #[error("certificate unknown: this supervisor did not issue it")]
    CertificateUnknown,
    /// The certificate is revoked.
    #[error("certificate revoked: {reason}")]
    CertificateRevoked {
        /// Why.
        reason: String,
    },
    /// The certificate has expired.
    #[error("certificate expired")]
    CertificateExpired,
    /// The certificate is another node's.
    #[error("the certificate belongs to {node}")]
    CertificateOfOther {
        /// Whose.
        node: String,
    },
    /// The name or the key request is malformed, or the authority cannot sign.
    #[error(transparent)]
    Transport(#[from] volary_transport::Error),
    /// The run's state on disk.
    #[error(transparent)]
    Storage(#[from] volary_storage::Error),
}

type Result<T> = std::result::Result<T, CredentialError>;

impl CredentialError {
    /// The refusal that the dialer gets.
    #[must_use]
    pub fn refusal(&self) -> Refusal {
        let code = match self {
            Self::AccessToken(error) => return Refusal::from(error.clone()),
            Self::OtherAuthority => RefusalCode::AccessTokenInvalid,
            Self::CertificateUnknown => RefusalCode::CertificateUnknown,
            Self::CertificateRevoked { .. } => RefusalCode::CertificateRevoked,
            Self::CertificateExpired => RefusalCode::CertificateExpired,
            Self::NoCertificate | Self::CertificateOfOther { .. } => RefusalCode::NameNotProven,
            _ => RefusalCode::Other,
        };
        Refusal::new(code, self.to_string())
    }
}

/// What is stored of a certificate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct CertificateRecord {
    node: String,
    /// The id of the access token that it was issued for.
    token: String,
    zone: Option<String>,
    expires_unix_s: u64,
    /// The reason of its revocation.
    revoked: Option<String>,
}

/// A certificate for an access token.
#[derive(Debug)]
pub(crate) struct Exchanged {
    pub(crate) name: String,
    pub(crate) issued: IssuedCertificate,
    /// The hashes of the name's certificates until now: they are revoked.
    pub(crate) revoked: Vec<[u8; 32]>,
}

/// The access tokens and certificates of a run.
pub(crate) struct Credentials {
    authority: Authority,
    store: Store,
    lifetime: Duration,
    /// Held while certificates are issued or revoked, so that a renewal cannot escape a revocation.
    changing: Mutex<()>,
}

/// The key under which the revocation of an imported access token is stored.
fn revocation_key(id: &str) -> String {
    format!("revoked-token-{id}")
}

fn now_unix_s() -> u64 {
    unix_ms() / 1000
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A certificate's hash from its key in the store.
fn unhex(key: &str) -> Option<[u8; 32]> {
    let mut hash = [0; 32];
    for (i, byte) in hash.iter_mut().enumerate() {
        *byte = u8::from_str_radix(key.get(2 * i..2 * i + 2)?, 16).ok()?;
    }
    Some(hash)
}

/// A name for a node that wants none in particular.
fn random_name() -> String {
    use std::hash::{BuildHasher, Hasher};
    let number = std::collections::hash_map::RandomState::new().build_hasher().finish();
    format!("node-{:08x}", number as u32)
}

impl Credentials {
    pub(crate) fn new(authority: Authority, store: Store, lifetime: Duration) -> Self {
        Self { authority, store, lifetime, changing: Mutex::default() }
    }

    /// The lifetime of certificates.
    pub(crate) fn lifetime(&self) -> Duration {
        self.lifetime
    }

    pub(crate) fn authority(&self) -> &Authority {
        &self.authority
    }

    /// Writes an access token to a file of the run's directory, unless it has a valid one already.
    pub(crate) fn write_token_file(&self, role: AccessRole, path: &Path) -> Result<()> {
        let existing = std::fs::read_to_string(path).ok();
        if existing.is_some_and(|text| self.check(text.trim(), role).is_ok()) {
            return Ok(());
        }
        let token = self.issue_token(role, AccessTokenTerms::default())?;
        Ok(write_secret(path, format!("{}\n", token.reveal()).as_bytes())?)
    }

    /// Accepts an access token that was created elsewhere, until it is revoked.
    pub(crate) fn import(&self, role: AccessRole, text: &str) -> Result<()> {
        let token: AccessToken = text.trim().parse()?;
        if token.fingerprint() != self.authority.fingerprint() {
            return Err(CredentialError::OtherAuthority);
        }
        if self.store.get::<bool>(Table::Facts, &revocation_key(token.id()))?.is_some() {
            tracing::warn!(id = token.id(), "this access token was revoked and stays so");
            return Ok(());
        }
        let record = token.record(role, now_unix_s(), AccessTokenTerms::default());
        Ok(self.store.put(Table::Tokens, token.id(), &record)?)
    }

    fn issue_token(&self, role: AccessRole, terms: AccessTokenTerms) -> Result<AccessToken> {
        let fingerprint = self.authority.fingerprint();
        let (token, record) = AccessToken::issue(fingerprint, role, now_unix_s(), terms)?;
        self.store.put(Table::Tokens, token.id(), &record)?;
        Ok(token)
    }

    fn record(&self, text: &str) -> Result<(AccessToken, AccessTokenRecord)> {
        let token: AccessToken = text.parse()?;
        let record = self.store.get::<AccessTokenRecord>(Table::Tokens, token.id())?;
        Ok((token, record.ok_or(AccessTokenError::Unknown)?))
    }

    /// Checks that an access token is valid for a role.
    pub(crate) fn check(&self, text: &str, role: AccessRole) -> Result<()> {
        let (token, record) = self.record(text)?;
        Ok(record.verify(&token, role, now_unix_s())?)
    }

    /// Issues a certificate for a key, for one use of an access token. A name is one identity: its
    /// certificates until now are revoked.
    pub(crate) fn exchange(&self, text: &str, request: &[u8], name: Option<String>) -> Result<Exchanged> {
        let name = name.unwrap_or_else(random_name);
        if name == SUPERVISOR {
            return Err(CredentialError::ReservedName { name });
        }
        check_name(&name)?;
        let issued = self.authority.issue(request, &name, self.lifetime)?;
        let record = self.use_once(text)?;
        let zone = record.labels.iter().find(|(key, _)| key == "zone").map(|(_, zone)| zone.clone());
        let _changing = self.changing.lock();
        let revoked = self.revoke_all_of(&name, "a node joined under its name")?;
        self.store_certificate(&issued, &name, &record.id, zone)?;
        Ok(Exchanged { name, issued, revoked })
    }

    /// Counts one use, so that of two concurrent ones only one is the last.
    fn use_once(&self, text: &str) -> Result<AccessTokenRecord> {
        for _ in 0..USE_RACES_MAX {
            let (token, record) = self.record(text)?;
            record.verify(&token, AccessRole::Node, now_unix_s())?;
            let Some(left) = record.uses_left else { return Ok(record) };
            let mut used = record.clone();
            used.uses_left = Some(left.saturating_sub(1));
            if self.store.swap(Table::Tokens, token.id(), Some(&record), Some(&used))? {
                return Ok(used);
            }
        }
        Err(CredentialError::Contended)
    }

    /// Issues another certificate to a node that has a valid one.
    pub(crate) fn renew(&self, node: &str, before: [u8; 32], request: &[u8]) -> Result<IssuedCertificate> {
        let _changing = self.changing.lock();
        let known = self.known(before)?;
        let issued = self.authority.issue(request, node, self.lifetime)?;
        self.store_certificate(&issued, node, &known.token, known.zone)?;
        Ok(issued)
    }

    fn store_certificate(
        &self,
        issued: &IssuedCertificate,
        node: &str,
        token: &str,
        zone: Option<String>,
    ) -> Result<()> {
        let record = CertificateRecord {
            node: node.to_owned(),
            token: token.to_owned(),
            zone,
            expires_unix_s: now_unix_s() + issued.lifetime.as_secs(),
            revoked: None,
        };
        self.remove_expired()?;
        Ok(self.store.put(Table::Certificates, &hex(&issued.fingerprint()), &record)?)
    }

    fn certificates(&self) -> Result<Vec<(String, CertificateRecord)>> {
        Ok(self.store.list(Table::Certificates)?)
    }

    fn remove_expired(&self) -> Result<()> {
        let now = now_unix_s();
        for (key, _) in self.certificates()?.into_iter().filter(|(_, record)| record.expires_unix_s < now) {
            self.store.remove(Table::Certificates, &key)?;
        }
        Ok(())
    }

    fn known(&self, certificate: [u8; 32]) -> Result<CertificateRecord> {
        let record = self.store.get::<CertificateRecord>(Table::Certificates, &hex(&certificate))?;
        let record = record.ok_or(CredentialError::CertificateUnknown)?;
        match record.revoked {
            Some(reason) => Err(CredentialError::CertificateRevoked { reason }),
            None if record.expires_unix_s < now_unix_s() => Err(CredentialError::CertificateExpired),
            None => Ok(record),
        }
    }

    /// Checks that a certificate admits `node`; the zone that its access token gave it.
    pub(crate) fn admit(&self, node: &str, certificate: Option<[u8; 32]>) -> Result<Option<String>> {
        let record = self.known(certificate.ok_or(CredentialError::NoCertificate)?)?;
        if record.node != node {
            return Err(CredentialError::CertificateOfOther { node: record.node });
        }
        Ok(record.zone)
    }

    /// Revokes every certificate of `node`, and returns their hashes.
    pub(crate) fn revoke_certificates(&self, node: &NodeId, reason: &str) -> Result<Vec<[u8; 32]>> {
        let _changing = self.changing.lock();
        self.revoke_all_of(&node.0, reason)
    }

    /// Revokes every certificate of a node. The caller holds the lock `changing`.
    fn revoke_all_of(&self, node: &str, reason: &str) -> Result<Vec<[u8; 32]>> {
        let mut hashes = Vec::new();
        for (key, record) in self.certificates()? {
            if record.node == node && record.revoked.is_none() {
                let revoked = CertificateRecord { revoked: Some(reason.to_owned()), ..record };
                self.store.put(Table::Certificates, &key, &revoked)?;
                hashes.extend(unhex(&key));
            }
        }
        Ok(hashes)
    }

    /// The hashes of all revoked certificates that have not expired.
    pub(crate) fn revoked(&self) -> Result<Vec<[u8; 32]>> {
        let revoked = self.certificates()?.into_iter().filter(|(_, record)| record.revoked.is_some());
        Ok(revoked.filter_map(|(key, _)| unhex(&key)).collect())
    }

    /// The reply to an operator's request about access tokens; `None` for any other request.
    pub(crate) fn answer(&self, request: &OperatorRequest) -> Option<OperatorReply> {
        let answer = match request {
            OperatorRequest::AccessTokenCreate { role, terms } => self.create(*role, terms),
            OperatorRequest::AccessTokenList => self.list(),
            OperatorRequest::AccessTokenRevoke { id } => self.revoke(id),
            _ => return None,
        };
        Some(answer.unwrap_or_else(|error| OperatorReply::Failed { reason: error.to_string() }))
    }

    fn create(&self, role: AccessRole, terms: &AccessTokenTerms) -> Result<OperatorReply> {
        let now = now_unix_s();
        let (expired, valid): (Vec<_>, Vec<_>) = self
            .store
            .list::<AccessTokenRecord>(Table::Tokens)?
            .into_iter()
            .partition(|(_, record)| record.expires_unix_s.is_some_and(|end| end <= now));
        for (id, _) in expired {
            self.store.remove(Table::Tokens, &id)?;
        }
        if valid.len() >= ACCESS_TOKENS_MAX {
            return Err(CredentialError::TooManyAccessTokens);
        }
        let token = self.issue_token(role, terms.clone())?;
        Ok(OperatorReply::AccessToken { text: token.reveal() })
    }

    fn list(&self) -> Result<OperatorReply> {
        let status = |(id, record): (String, AccessTokenRecord)| AccessTokenStatus {
            id,
            role: record.role,
            created_unix_s: record.created_unix_s,
            expires_unix_s: record.expires_unix_s,
            uses_left: record.uses_left,
            labels: record.labels,
        };
        let records = self.store.list::<AccessTokenRecord>(Table::Tokens)?;
        Ok(OperatorReply::AccessTokens(records.into_iter().map(status).collect()))
    }

    fn revoke(&self, id: &str) -> Result<OperatorReply> {
        // First the record that outlives a restart with the same imported token.
        if self.store.get::<AccessTokenRecord>(Table::Tokens, id)?.is_some() {
            self.store.put(Table::Facts, &revocation_key(id), &true)?;
        }
        if !self.store.remove(Table::Tokens, id)? {
            return Err(CredentialError::NoSuchAccessToken { id: id.to_owned() });
        }
        Ok(OperatorReply::Done { step: volary_core::Step(0) })
    }
}

#[cfg(test)]
#[path = "credentials_tests.rs"]
mod tests;
