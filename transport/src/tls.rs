//! TLS settings: 1.3 only, AES-128-GCM on ring, the cluster's authority as the only root.

use crate::error::{Error, Result};
use crate::identity::{Identity, dns_name, fingerprint};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme};
use std::sync::Arc;

const PROTOCOL: &[u8] = b"volary/1";

/// Whether dialers must present a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientAuth {
    /// They must: between nodes.
    Required,
    /// They may present an access token instead: the supervisor.
    Optional,
}

pub(crate) fn provider() -> Arc<CryptoProvider> {
    let mut provider = ring::default_provider();
    // The fastest suite on current CPUs. Both ends are this program, so one suite is enough.
    provider.cipher_suites = vec![ring::cipher_suite::TLS13_AES_128_GCM_SHA256];
    Arc::new(provider)
}

pub(crate) fn roots(ca: &CertificateDer<'static>) -> Result<Arc<RootCertStore>> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.clone()).map_err(Error::identity)?;
    Ok(Arc::new(roots))
}

/// Verifies the certificates that dialers present.
pub(crate) fn client_verifier(
    identity: &Identity,
    clients: ClientAuth,
) -> Result<Arc<dyn ClientCertVerifier>> {
    let builder = WebPkiClientVerifier::builder_with_provider(roots(&identity.ca)?, provider());
    let builder = if clients == ClientAuth::Optional { builder.allow_unauthenticated() } else { builder };
    builder.build().map_err(Error::identity)
}

/// The accepting side.
pub(crate) fn server(identity: &Identity, clients: ClientAuth) -> Result<quinn::ServerConfig> {
    let chain = vec![identity.certificate.clone(), identity.ca.clone()];
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(Error::identity)?
        .with_client_cert_verifier(client_verifier(identity, clients)?)
        .with_single_cert(chain, identity.key())
        .map_err(Error::identity)?;
    config.alpn_protocols = vec![PROTOCOL.to_vec()];
    // A resumed session would outlive its certificate.
    config.send_tls13_tickets = 0;
    let crypto = QuicServerConfig::try_from(config).map_err(Error::identity)?;
    Ok(quinn::ServerConfig::with_crypto(Arc::new(crypto)))
}

/// The dialing side of a certificate's holder.
pub(crate) fn client(identity: &Identity) -> Result<quinn::ClientConfig> {
    let config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(Error::identity)?
        .with_root_certificates(roots(&identity.ca)?)
        .with_client_auth_cert(vec![identity.certificate.clone()], identity.key())
        .map_err(Error::identity)?;
    finish(config)
}

/// The dialing side of an access token's holder; the token pins the authority.
pub(crate) fn pinned(authority: [u8; 32]) -> Result<quinn::ClientConfig> {
    let config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(Error::identity)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Pinned { authority }))
        .with_no_client_auth();
    finish(config)
}

fn finish(mut config: rustls::ClientConfig) -> Result<quinn::ClientConfig> {
    config.alpn_protocols = vec![PROTOCOL.to_vec()];
    Ok(quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(config).map_err(Error::identity)?)))
}

/// Whether a certificate proves `name`.
pub(crate) fn is_named(certificate: &CertificateDer<'_>, name: &str) -> bool {
    let (Ok(parsed), Ok(server)) =
        (ParsedCertificate::try_from(certificate), ServerName::try_from(dns_name(name)))
    else {
        return false;
    };
    rustls::client::verify_server_name(&parsed, &server).is_ok()
}

/// Trusts only the authority with this fingerprint; the server sends the authority's certificate with its
/// own.
#[derive(Debug)]
pub(crate) struct Pinned {
    pub(crate) authority: [u8; 32],
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        let authority = intermediates.iter().find(|certificate| fingerprint(certificate) == self.authority);
        let authority = authority.ok_or_else(|| {
            rustls::Error::General(
                "the access token is for another cluster: its authority is not this supervisor's".into(),
            )
        })?;
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not supported".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            certificate,
            signature,
            &provider().signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }

    fn root_hint_subjects(&self) -> Option<&[DistinguishedName]> {
        None
    }
}
