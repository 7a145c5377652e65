//! Who may come in: the run's tokens and the certificates that were given for them.
//!
//! Tokens are kept as hashes, and compared in a time that tells nothing. A certificate is known by its SHA-256 hash; one
//! that is not known, or was revoked because its node was fenced or has left, lets nobody in: a node then joins anew, with its
//! token, if that is still good.

use crate::operator::{AccessTokenStatus, OperatorReply, OperatorRequest};
use crate::run_files::unix_ms;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use volary_core::NodeId;
use volary_storage::{Store, Table};
use volary_transport::{
    AccessRole, AccessToken, AccessTokenError, AccessTokenRecord, AccessTokenTerms, Authority, Issued,
    SUPERVISOR, check_name, write_secret,
};

/// The most tokens of a run.
pub(crate) const TOKENS_MAX: usize = 1000;
/// How often somebody who lost a race for a token's use tries again.
const RACES_MAX: usize = 16;
/// What a refusal of a certificate begins with: the node may join anew.
pub(crate) const NO_CERTIFICATE: &str = "the certificate is not good any more";

/// What is kept of a certificate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct CertificateRecord {
    node: String,
    /// The token that it was given for.
    token: String,
    zone: Option<String>,
    expires_unix_s: u64,
    /// Why it is not good any more.
    revoked: Option<String>,
}

/// What a refusal begins with where a living node has the name: it may be gone in a moment.
pub(crate) const NAME_IN_USE: &str = "a living node has this name";

type Verdict<T> = Result<T, String>;

/// The tokens and certificates of a run.
pub(crate) struct Credentials {
    authority: Authority,
    store: Store,
    lifetime: Duration,
    /// Held while certificates are given or taken away.
    changing: Mutex<()>,
}

/// The name under which it is kept that a token that came from elsewhere is revoked.
fn tombstone(id: &str) -> String {
    format!("revoked-token-{id}")
}

pub(crate) fn now_unix_s() -> u64 {
    unix_ms() / 1000
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A certificate's hash from the name under which it is kept.
fn unhex(name: &str) -> Option<[u8; 32]> {
    let mut hash = [0; 32];
    for (place, byte) in hash.iter_mut().enumerate() {
        *byte = u8::from_str_radix(name.get(2 * place..2 * place + 2)?, 16).ok()?;
    }
    Some(hash)
}

/// A number that nobody else has: for names, and to tell one process of a name from the next. No secret.
pub(crate) fn random_number() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}

impl Credentials {
    pub(crate) fn new(authority: Authority, store: Store, lifetime: Duration) -> Self {
        Self { authority, store, lifetime, changing: Mutex::default() }
    }

    fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long a certificate is good for.
    pub(crate) fn lifetime(&self) -> Duration {
        self.lifetime
    }

    pub(crate) fn authority(&self) -> &Authority {
        &self.authority
    }

    /// Leaves a token in a file of the run's directory, unless a good one lies there already.
    pub(crate) fn write_token_file(&self, role: AccessRole, path: &Path) -> Verdict<()> {
        let there = std::fs::read_to_string(path).ok();
        if there.is_some_and(|text| self.check(text.trim(), role).is_ok()) {
            return Ok(());
        }
        let token = self.issue_token(role, AccessTokenTerms::default())?;
        write_secret(path, format!("{}\n", token.reveal()).as_bytes()).map_err(|error| error.to_string())
    }

    /// Takes a token that was made elsewhere, until it is revoked.
    pub(crate) fn import(&self, role: AccessRole, text: &str) -> Verdict<()> {
        let token: AccessToken = text.trim().parse().map_err(|error: AccessTokenError| error.to_string())?;
        if token.fingerprint() != self.authority.fingerprint() {
            return Err("it is for another authority".into());
        }
        let revoked = self.store.get::<bool>(Table::Facts, &tombstone(token.id()));
        if revoked.map_err(|error| error.to_string())?.is_some() {
            tracing::warn!(id = token.id(), "this token was revoked, and stays so");
            return Ok(());
        }
        let record = token.record(role, now_unix_s(), AccessTokenTerms::default());
        self.store.put(Table::Tokens, token.id(), &record).map_err(|error| error.to_string())
    }

    fn issue_token(&self, role: AccessRole, terms: AccessTokenTerms) -> Verdict<AccessToken> {
        let (token, record) = AccessToken::issue(self.authority.fingerprint(), role, now_unix_s(), terms)
            .map_err(|error| error.to_string())?;
        self.store.put(Table::Tokens, token.id(), &record).map_err(|error| error.to_string())?;
        Ok(token)
    }

    fn record(&self, text: &str) -> Verdict<(AccessToken, AccessTokenRecord)> {
        let token: AccessToken = text.parse().map_err(|error: AccessTokenError| error.to_string())?;
        let record =
            self.store.get::<AccessTokenRecord>(Table::Tokens, token.id()).map_err(|e| e.to_string())?;
        Ok((token, record.ok_or_else(|| AccessTokenError::Unknown.to_string())?))
    }

    /// Whether a token's text is good for something.
    pub(crate) fn check(&self, text: &str, role: AccessRole) -> Verdict<()> {
        let (token, record) = self.record(text)?;
        record.verify(&token, role, now_unix_s()).map_err(|error| error.to_string())
    }

    /// A certificate for a key, in exchange for one use of a token.
    pub(crate) fn exchange(
        &self,
        text: &str,
        request: &[u8],
        name: Option<String>,
    ) -> Verdict<(String, Issued)> {
        let name = name.unwrap_or_else(|| format!("node-{:08x}", random_number() as u32));
        if name == SUPERVISOR {
            return Err(format!("the name {name} is taken"));
        }
        check_name(&name).map_err(|error| error.to_string())?;
        let issued =
            self.authority.issue(request, &name, self.lifetime).map_err(|error| error.to_string())?;
        let record = self.use_once(text)?;
        let zone = record.labels.iter().find(|(key, _)| key == "zone").map(|(_, zone)| zone.clone());
        self.remember(&issued, &name, &record.id, zone)?;
        Ok((name, issued))
    }

    /// Counts one use, so that of two who come at once only one has the last.
    fn use_once(&self, text: &str) -> Verdict<AccessTokenRecord> {
        for _ in 0..RACES_MAX {
            let (token, record) = self.record(text)?;
            record.verify(&token, AccessRole::Node, now_unix_s()).map_err(|error| error.to_string())?;
            let Some(left) = record.uses_left else { return Ok(record) };
            let mut used = record.clone();
            used.uses_left = Some(left.saturating_sub(1));
            let swapped = self.store.swap(Table::Tokens, token.id(), Some(&record), Some(&used));
            if swapped.map_err(|error| error.to_string())? {
                return Ok(used);
            }
        }
        Err("too many use this token at once".into())
    }

    /// Another certificate for a node that has a good one.
    pub(crate) fn renew(&self, node: &str, before: [u8; 32], request: &[u8]) -> Verdict<Issued> {
        let _changing = self.changing();
        let known = self.known(before)?;
        let issued = self.authority.issue(request, node, self.lifetime).map_err(|error| error.to_string())?;
        self.remember(&issued, node, &known.token, known.zone)?;
        Ok(issued)
    }

    fn remember(&self, issued: &Issued, node: &str, token: &str, zone: Option<String>) -> Verdict<()> {
        let record = CertificateRecord {
            node: node.to_owned(),
            token: token.to_owned(),
            zone,
            expires_unix_s: now_unix_s() + issued.lifetime.as_secs(),
            revoked: None,
        };
        self.forget_expired()?;
        let name = hex(&issued.fingerprint());
        self.store.put(Table::Certificates, &name, &record).map_err(|error| error.to_string())
    }

    fn all(&self) -> Verdict<Vec<(String, CertificateRecord)>> {
        self.store.list(Table::Certificates).map_err(|error| error.to_string())
    }

    fn forget_expired(&self) -> Verdict<()> {
        let now = now_unix_s();
        for (name, _) in self.all()?.into_iter().filter(|(_, record)| record.expires_unix_s < now) {
            self.store.remove(Table::Certificates, &name).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    fn known(&self, certificate: [u8; 32]) -> Verdict<CertificateRecord> {
        let record = self.store.get::<CertificateRecord>(Table::Certificates, &hex(&certificate));
        let record = record.map_err(|error| error.to_string())?;
        let record = record.ok_or_else(|| format!("{NO_CERTIFICATE}: it is not known here"))?;
        match &record.revoked {
            Some(reason) => Err(format!("{NO_CERTIFICATE}: {reason}")),
            None if record.expires_unix_s < now_unix_s() => {
                Err(format!("{NO_CERTIFICATE}: its time is over"))
            }
            None => Ok(record),
        }
    }

    /// Whether a certificate still lets `node` in, and the zone that its token gave it.
    pub(crate) fn admit(&self, node: &str, certificate: Option<[u8; 32]>) -> Verdict<Option<String>> {
        let record = self.known(certificate.ok_or("no certificate")?)?;
        if record.node != node {
            Err(format!("the certificate is {}'s", record.node))
        } else {
            Ok(record.zone)
        }
    }

    /// From now on no certificate that `node` has lets anybody in; their hashes.
    pub(crate) fn revoke_certificates(&self, node: &NodeId, reason: &str) -> Verdict<Vec<[u8; 32]>> {
        let _changing = self.changing();
        let mut hashes = Vec::new();
        for (name, record) in self.all()? {
            if record.node == node.0 && record.revoked.is_none() {
                let revoked = CertificateRecord { revoked: Some(reason.to_owned()), ..record };
                self.store.put(Table::Certificates, &name, &revoked).map_err(|error| error.to_string())?;
                hashes.extend(unhex(&name));
            }
        }
        Ok(hashes)
    }

    /// The hashes of all certificates that were revoked and would be good otherwise.
    pub(crate) fn revoked(&self) -> Verdict<Vec<[u8; 32]>> {
        let revoked = self.all()?.into_iter().filter(|(_, record)| record.revoked.is_some());
        Ok(revoked.filter_map(|(name, _)| unhex(&name)).collect())
    }

    /// What an operator asks of the tokens; `None` when it asks something else.
    pub(crate) fn answer(&self, request: &OperatorRequest) -> Option<OperatorReply> {
        let answer = match request {
            OperatorRequest::AccessTokenCreate { role, terms } => self.create(*role, terms),
            OperatorRequest::AccessTokenList => self.list(),
            OperatorRequest::AccessTokenRevoke { id } => self.revoke(id),
            _ => return None,
        };
        Some(answer.unwrap_or_else(|reason| OperatorReply::Failed { reason }))
    }

    fn create(&self, role: AccessRole, terms: &AccessTokenTerms) -> Verdict<OperatorReply> {
        let there = self.store.list::<AccessTokenRecord>(Table::Tokens).map_err(|error| error.to_string())?;
        let now = now_unix_s();
        let (over, good): (Vec<_>, Vec<_>) =
            there.into_iter().partition(|(_, record)| record.expires_unix_s.is_some_and(|end| end <= now));
        for (id, _) in over {
            self.store.remove(Table::Tokens, &id).map_err(|error| error.to_string())?;
        }
        if good.len() >= TOKENS_MAX {
            return Err(format!("there are {TOKENS_MAX} tokens: revoke some first"));
        }
        let token = self.issue_token(role, terms.clone())?;
        Ok(OperatorReply::AccessToken { text: token.reveal() })
    }

    fn list(&self) -> Verdict<OperatorReply> {
        let tokens =
            self.store.list::<AccessTokenRecord>(Table::Tokens).map_err(|error| error.to_string())?;
        let status = |(id, record): (String, AccessTokenRecord)| AccessTokenStatus {
            id,
            role: record.role,
            created_unix_s: record.created_unix_s,
            expires_unix_s: record.expires_unix_s,
            uses_left: record.uses_left,
            labels: record.labels,
        };
        Ok(OperatorReply::AccessTokens(tokens.into_iter().map(status).collect()))
    }

    fn revoke(&self, id: &str) -> Verdict<OperatorReply> {
        // First what outlives a restart that brings the token along again.
        let there =
            self.store.get::<AccessTokenRecord>(Table::Tokens, id).map_err(|error| error.to_string())?;
        if there.is_some() {
            self.store.put(Table::Facts, &tombstone(id), &true).map_err(|error| error.to_string())?;
        }
        if self.store.remove(Table::Tokens, id).map_err(|error| error.to_string())? {
            Ok(OperatorReply::Done { step: 0 })
        } else {
            Err(format!("there is no token {id}; `volary token list` shows all"))
        }
    }
}

#[cfg(test)]
#[path = "credentials_tests.rs"]
mod tests;
