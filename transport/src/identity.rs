//! The cluster's certificate authority and the identities that it issues.
//!
//! The authority is created at a run's first start and stays in `RUN_DIR/identity`, readable by its owner
//! only. A node creates its own key, which never leaves the node, and gets a certificate for it in exchange
//! for an access token.

use crate::error::{Error, Result};
use crate::limits::NAME_MAX;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use time::{Duration, OffsetDateTime};

/// The name of the supervisor in its certificate.
pub const SUPERVISOR: &str = "supervisor";
/// Validity of the certificates of the authority and of the supervisor.
const LIFETIME: Duration = Duration::days(3650);
/// Tolerated difference of clocks.
const CLOCK_SLACK: Duration = Duration::hours(24);

/// The DNS name in a certificate. The supervisor's has a domain of its own, so that no node can have it.
pub(crate) fn dns_name(name: &str) -> String {
    if name == SUPERVISOR { format!("{name}.volary") } else { format!("{name}.node.volary") }
}

/// Checks a node's name: lowercase letters, digits and `-`, so that it is valid in certificates and file
/// names. Names in certificates are case-insensitive, hence no capitals.
///
/// # Errors
/// [`Error::Identity`] with the expected format.
pub fn check_name(name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if name.is_empty() || name.len() > NAME_MAX || !name.chars().all(plain) || name.starts_with('-') {
        let reason =
            format!("node name {name:?}: expected up to {NAME_MAX} lowercase letters, digits and '-'");
        return Err(Error::identity(reason));
    }
    Ok(())
}

/// An issued certificate.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IssuedCertificate {
    /// The certificate, DER.
    pub certificate: Vec<u8>,
    /// Validity from the time of issue.
    pub lifetime: std::time::Duration,
}

impl IssuedCertificate {
    /// The certificate's SHA-256 hash, which identifies it in records and revocations.
    #[must_use]
    pub fn fingerprint(&self) -> [u8; 32] {
        fingerprint(&self.certificate)
    }
}

impl fmt::Debug for IssuedCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IssuedCertificate({:?})", self.lifetime)
    }
}

/// The cluster's certificate authority.
pub struct Authority {
    certificate: CertificateDer<'static>,
    key: KeyPair,
    issuer: Issuer<'static, KeyPair>,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Authority")
    }
}

impl Authority {
    /// Loads the authority in a directory, or creates one.
    ///
    /// # Errors
    /// [`Error::Identity`] when the directory is not writable, or has a damaged authority.
    pub fn load_or_create(folder: &Path) -> Result<Self> {
        let (certificate, key) = (folder.join("ca.der"), folder.join("ca.key"));
        let read = |path: &Path| {
            std::fs::read(path).map_err(|e| Error::identity(format!("{}: {e}", path.display())))
        };
        // The certificate is written last. If it exists without the key, the key was lost: a new authority
        // would lock out all nodes of the old one.
        if certificate.exists() {
            let pem = String::from_utf8(read(&key)?).map_err(Error::identity)?;
            return Self::from_parts(read(&certificate)?.into(), &pem);
        }
        let authority = Self::create()?;
        write_secret(&key, authority.key.serialize_pem().as_bytes())?;
        write_secret(&certificate, &authority.certificate)?;
        Ok(authority)
    }

    /// Creates an authority.
    ///
    /// # Errors
    /// [`Error::Identity`] when the machine provides no random numbers.
    pub fn create() -> Result<Self> {
        let key = KeyPair::generate().map_err(Error::identity)?;
        let certificate = authority_params()?.self_signed(&key).map_err(Error::identity)?;
        Self::from_parts(certificate.der().clone(), &key.serialize_pem())
    }

    /// An authority that was created elsewhere, from its certificate and its PKCS #8 key, both PEM.
    ///
    /// # Errors
    /// [`Error::Identity`] when they are damaged, or not an authority's.
    pub fn from_pem(certificate: &str, key: &str) -> Result<Self> {
        let der = CertificateDer::from_pem_slice(certificate.as_bytes())
            .map_err(|error| Error::identity(format!("the authority's certificate: {error}")))?;
        Self::from_parts(der, key)
    }

    fn from_parts(certificate: CertificateDer<'static>, key: &str) -> Result<Self> {
        let read =
            || KeyPair::from_pem(key).map_err(|e| Error::identity(format!("the authority's key: {e}")));
        let issuer = Issuer::from_ca_cert_der(&certificate, read()?).map_err(Error::identity)?;
        Ok(Self { certificate, key: read()?, issuer })
    }

    /// The certificate and the key, PEM, for [`Authority::from_pem`].
    #[must_use]
    pub fn to_pem(&self) -> (String, String) {
        let certificate = pem::encode(&pem::Pem::new("CERTIFICATE", self.certificate.to_vec()));
        (certificate, self.key.serialize_pem())
    }

    /// The SHA-256 hash of the authority's certificate, as other tools print it too. Access tokens pin it.
    #[must_use]
    pub fn fingerprint(&self) -> [u8; 32] {
        fingerprint(&self.certificate)
    }

    /// Issues a certificate for the key of a request (DER), under the authority's choice of name and
    /// lifetime.
    ///
    /// # Errors
    /// [`Error::Identity`] when the request is malformed, the name is invalid, or the lifetime is out of
    /// range.
    pub fn issue(
        &self,
        request: &[u8],
        name: &str,
        lifetime: std::time::Duration,
    ) -> Result<IssuedCertificate> {
        check_name(name)?;
        let csr =
            CertificateSigningRequestParams::from_der(&request.to_vec().into()).map_err(Error::identity)?;
        // Only the key is taken from the request; the requester chooses nothing else.
        let issued =
            node_params(name, lifetime)?.signed_by(&csr.public_key, &self.issuer).map_err(Error::identity)?;
        Ok(IssuedCertificate { certificate: issued.der().to_vec(), lifetime })
    }

    /// An identity with a new key, for the supervisor itself.
    ///
    /// # Errors
    /// As [`Authority::issue`].
    pub fn identity(&self, name: &str) -> Result<Identity> {
        let request = KeyRequest::new()?;
        let issued = self.issue(request.der(), name, LIFETIME.unsigned_abs())?;
        Ok(request.into_identity(name, issued, self.certificate.to_vec()))
    }

    /// The authority's certificate, DER.
    #[must_use]
    pub fn certificate(&self) -> &[u8] {
        &self.certificate
    }
}

fn authority_params() -> Result<CertificateParams> {
    let mut params = CertificateParams::new(Vec::<String>::new()).map_err(Error::identity)?;
    params.distinguished_name.push(DnType::CommonName, "Volary cluster authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    set_lifetime(&mut params, LIFETIME)?;
    Ok(params)
}

fn node_params(name: &str, lifetime: std::time::Duration) -> Result<CertificateParams> {
    let mut params = CertificateParams::new(vec![dns_name(name)]).map_err(Error::identity)?;
    params.distinguished_name.push(DnType::CommonName, name);
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    set_lifetime(&mut params, Duration::try_from(lifetime).map_err(Error::identity)?)?;
    Ok(params)
}

fn set_lifetime(params: &mut CertificateParams, lifetime: Duration) -> Result<()> {
    let now = OffsetDateTime::now_utc();
    params.not_before = now - CLOCK_SLACK;
    let end = now.checked_add(lifetime);
    params.not_after = end.ok_or_else(|| Error::identity("the lifetime is out of range"))?;
    Ok(())
}

pub(crate) fn fingerprint(certificate: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(ring::digest::digest(&ring::digest::SHA256, certificate).as_ref());
    hash
}

/// Writes a file atomically, readable by its owner only.
///
/// # Errors
/// [`Error::Identity`] when it cannot be written.
pub fn write_secret(path: &Path, bytes: &[u8]) -> Result<()> {
    let failed = |error: std::io::Error| Error::identity(format!("{}: {error}", path.display()));
    if let Some(folder) = path.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
    }
    let temporary = path.with_extension("new");
    // An existing file would keep its own, possibly wider, permissions.
    match std::fs::remove_file(&temporary) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.create_new(true).write(true).mode(0o600).open(&temporary).map_err(failed)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(failed)?;
    std::fs::rename(&temporary, path).map_err(failed)?;
    match path.parent() {
        // The new name is durable once the directory is.
        Some(folder) => std::fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed),
        None => Ok(()),
    }
}

/// A new key, and the request for its certificate.
pub struct KeyRequest {
    key: KeyPair,
    request: Vec<u8>,
}

impl KeyRequest {
    /// Creates a key.
    ///
    /// # Errors
    /// [`Error::Identity`] when the machine provides no random numbers.
    pub fn new() -> Result<Self> {
        let key = KeyPair::generate().map_err(Error::identity)?;
        let params = CertificateParams::new(Vec::<String>::new()).map_err(Error::identity)?;
        let request = params.serialize_request(&key).map_err(Error::identity)?.der().to_vec();
        Ok(Self { key, request })
    }

    /// The request, DER.
    #[must_use]
    pub fn der(&self) -> &[u8] {
        &self.request
    }

    /// The identity of the key and its certificate.
    #[must_use]
    pub fn into_identity(self, name: &str, issued: IssuedCertificate, ca: Vec<u8>) -> Identity {
        Identity {
            ends: std::time::Instant::now() + issued.lifetime,
            name: name.to_owned(),
            certificate: issued.certificate.into(),
            key: self.key.serialize_der(),
            ca: ca.into(),
        }
    }
}

/// A name with the certificate and key that prove it.
#[derive(Clone)]
pub struct Identity {
    ends: std::time::Instant,
    pub(crate) name: String,
    pub(crate) certificate: CertificateDer<'static>,
    key: Vec<u8>,
    pub(crate) ca: CertificateDer<'static>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.name)
    }
}

impl Identity {
    /// The name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The authority's certificate, DER.
    #[must_use]
    pub fn authority(&self) -> &[u8] {
        &self.ca
    }

    /// Remaining validity of the certificate.
    #[must_use]
    pub fn remaining(&self) -> std::time::Duration {
        self.ends.saturating_duration_since(std::time::Instant::now())
    }

    pub(crate) fn key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.key.clone()).into()
    }
}
