//! The cluster's authority and the identities it gives out.
//!
//! The authority is made at a run's first start and stays in `RUN_DIR/identity`, readable by its owner only. A node makes its own
//! key, which never leaves it, and gets a certificate for it in exchange for a token.

use crate::error::{Error, Result};
use crate::limits::NAME_MAX;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use std::fmt;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use time::{Duration, OffsetDateTime};

/// The name of the supervisor in its certificate.
pub const SUPERVISOR: &str = "supervisor";
/// How long a certificate is good for; a run outlives none of its processes by so much.
const LIFETIME: Duration = Duration::days(365);
/// Clocks may differ by so much.
const CLOCK_SLACK: Duration = Duration::hours(24);

/// The name that a certificate carries for a node.
pub(crate) fn dns_name(name: &str) -> String {
    format!("{name}.volary")
}

/// Whether a name can stand in a certificate and in a file name: letters, digits and `-`.
///
/// # Errors
/// A line that says what was expected.
pub fn check_name(name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
    if name.is_empty() || name.len() > NAME_MAX || !name.chars().all(plain) || name.starts_with('-') {
        let reason = format!("node name {name:?}: expected up to {NAME_MAX} letters, digits and '-'");
        return Err(Error::identity(reason));
    }
    Ok(())
}

/// The cluster's authority.
pub struct Authority {
    certificate: CertificateDer<'static>,
    key: KeyPair,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Authority")
    }
}

impl Authority {
    /// The authority of a folder; made when there is none.
    ///
    /// # Errors
    /// When the folder cannot be written, or holds a damaged authority.
    pub fn load_or_create(folder: &Path) -> Result<Self> {
        let (certificate, key) = (folder.join("ca.der"), folder.join("ca.key"));
        let read = |path: &Path| {
            std::fs::read(path).map_err(|e| Error::identity(format!("{}: {e}", path.display())))
        };
        // The certificate is written last: with it and without the key something was lost, and a new authority would
        // shut out every node of the old one.
        if certificate.exists() {
            let pem = String::from_utf8(read(&key)?).map_err(Error::identity)?;
            let key = KeyPair::from_pem(&pem).map_err(Error::identity)?;
            return Ok(Self { certificate: read(&certificate)?.into(), key });
        }
        let made = Self::create()?;
        write_secret(&key, made.key.serialize_pem().as_bytes())?;
        write_secret(&certificate, &made.certificate)?;
        Ok(made)
    }

    /// A new authority.
    ///
    /// # Errors
    /// When no key can be made.
    pub fn create() -> Result<Self> {
        let key = KeyPair::generate().map_err(Error::identity)?;
        let certificate = authority_params()?.self_signed(&key).map_err(Error::identity)?;
        Ok(Self { certificate: certificate.der().clone(), key })
    }

    /// What a token pins: the BLAKE3 hash of the authority's certificate.
    #[must_use]
    pub fn fingerprint(&self) -> [u8; 32] {
        fingerprint(&self.certificate)
    }

    /// A certificate for the key of a request, in the name that the authority chooses.
    ///
    /// # Errors
    /// When the request is malformed or the name cannot stand in a certificate.
    pub fn issue(&self, request: &[u8], name: &str) -> Result<Vec<u8>> {
        self.issue_for(request, name, LIFETIME.unsigned_abs())
    }

    /// [`Authority::issue`] with a lifetime of the caller's choice, counted from now.
    ///
    /// # Errors
    /// As [`Authority::issue`], and when the lifetime goes beyond what a calendar holds.
    pub fn issue_for(&self, request: &[u8], name: &str, lifetime: std::time::Duration) -> Result<Vec<u8>> {
        check_name(name)?;
        let csr =
            CertificateSigningRequestParams::from_der(&request.to_vec().into()).map_err(Error::identity)?;
        // Only the key is taken from the request: what it asks for beside that is not its to choose.
        let issuer = Issuer::new(authority_params()?, &self.key);
        let issued =
            node_params(name, lifetime)?.signed_by(&csr.public_key, &issuer).map_err(Error::identity)?;
        Ok(issued.der().to_vec())
    }

    /// An identity with a key made here: the supervisor's own.
    ///
    /// # Errors
    /// As [`Authority::issue`].
    pub fn identity(&self, name: &str) -> Result<Identity> {
        let request = KeyRequest::new()?;
        let certificate = self.issue(request.der(), name)?;
        Ok(request.into_identity(name, certificate, self.certificate.to_vec()))
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
    set_lifetime(&mut params, LIFETIME * 10)?;
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
    params.not_after = end.ok_or_else(|| Error::identity("a lifetime beyond the calendar"))?;
    Ok(())
}

pub(crate) fn fingerprint(certificate: &[u8]) -> [u8; 32] {
    *blake3::hash(certificate).as_bytes()
}

/// Writes a file that only its owner can read, whole or not at all.
///
/// # Errors
/// When it cannot be written.
pub fn write_secret(path: &Path, bytes: &[u8]) -> Result<()> {
    let failed = |error: std::io::Error| Error::identity(format!("{}: {error}", path.display()));
    if let Some(folder) = path.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
    }
    let temporary = path.with_extension("new");
    // A file that lies there already would keep its own, maybe wider, permissions.
    match std::fs::remove_file(&temporary) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.create_new(true).write(true).mode(0o600).open(&temporary).map_err(failed)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(failed)?;
    std::fs::rename(&temporary, path).map_err(failed)?;
    match path.parent() {
        // The new name is safe once the folder is.
        Some(folder) => std::fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed),
        None => Ok(()),
    }
}

/// A key made on this machine, and the request for its certificate.
pub struct KeyRequest {
    key: KeyPair,
    request: Vec<u8>,
}

impl KeyRequest {
    /// A new key.
    ///
    /// # Errors
    /// When no key can be made.
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

    /// The identity that the key makes with its certificate.
    #[must_use]
    pub fn into_identity(self, name: &str, certificate: Vec<u8>, ca: Vec<u8>) -> Identity {
        Identity {
            name: name.to_owned(),
            certificate: certificate.into(),
            key: self.key.serialize_der(),
            ca: ca.into(),
        }
    }
}

/// A name with the certificate and key that prove it.
#[derive(Clone)]
pub struct Identity {
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
    /// Whose it is.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.key.clone()).into()
    }
}
