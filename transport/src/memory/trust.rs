//! Verification of certificates with TLS's own verifiers.

use crate::error::{Error, Result};
use crate::identity::{Identity, dns_name};
use crate::network::Credential;
use crate::tls::{self, ClientAuth};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use std::sync::Arc;

/// The dialer's view: the listener is `name`, of the expected authority.
pub(super) fn verify_listener(listener: &Identity, name: &str, credential: &Credential) -> Result<()> {
    let verifier: Arc<dyn ServerCertVerifier> = match credential {
        Credential::Certificate(identity) => {
            let roots = tls::roots(&identity.ca)?;
            let verifier = WebPkiServerVerifier::builder_with_provider(roots, tls::provider());
            verifier.build().map_err(Error::identity)?
        }
        Credential::Pinned(authority) => Arc::new(tls::Pinned { authority: *authority }),
    };
    let name = ServerName::try_from(dns_name(name)).map_err(Error::identity)?;
    let chain = [listener.ca.clone()];
    let verified = verifier.verify_server_cert(&listener.certificate, &chain, &name, &[], UnixTime::now());
    verified.map(drop).map_err(Error::identity)
}

/// The listener's view: the dialer's certificate, if it presents a valid one.
pub(super) fn verify_dialer(
    listener: &Identity,
    clients: ClientAuth,
    credential: &Credential,
) -> Result<Option<CertificateDer<'static>>> {
    let Credential::Certificate(dialer) = credential else {
        return match clients {
            ClientAuth::Required => Err(Error::identity("the dialer presents no certificate")),
            ClientAuth::Optional => Ok(None),
        };
    };
    let verifier = tls::client_verifier(listener, clients)?;
    let verified =
        verifier.verify_client_cert(&dialer.certificate, std::slice::from_ref(&dialer.ca), UnixTime::now());
    verified.map_err(Error::identity)?;
    Ok(Some(dialer.certificate.clone()))
}
