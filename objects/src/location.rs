//! An address in a store, and the store behind it.

use crate::error::{Error, Result};
use crate::limits::{BACKOFF, CONNECT_TIMEOUT, REQUEST_TIMEOUT, RETRIES, RETRY_TIMEOUT};
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::http::HttpBuilder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{BackoffConfig, ClientOptions, ObjectStore, RetryConfig};
use std::fmt;
use std::sync::Arc;
use url::Url;

/// The address of a folder or file in a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    url: Url,
    kind: Kind,
    path: Path,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    S3,
    Google,
    Azure,
    File,
    Http,
}

impl Location {
    /// Whether a text begins like an address, and not like a path.
    #[must_use]
    pub fn is_address(text: &str) -> bool {
        ["s3", "gs", "az", "file", "http", "https"]
            .iter()
            .any(|scheme| text.strip_prefix(scheme).is_some_and(|rest| rest.starts_with("://")))
    }

    /// The location of an address.
    ///
    /// # Errors
    /// [`Error::Address`].
    pub fn parse(text: &str) -> Result<Self> {
        let fail = |reason: String| Error::Address { text: text.to_owned(), reason };
        let url = Url::parse(text).map_err(|error| fail(error.to_string()))?;
        let has_host = url.host_str().is_some_and(|host| !host.is_empty());
        let kind = match (url.scheme(), has_host) {
            ("s3", true) => Kind::S3,
            ("gs", true) => Kind::Google,
            ("az", true) => Kind::Azure,
            ("file", false) => Kind::File,
            ("http" | "https", true) => Kind::Http,
            ("file", true) => return Err(fail("a file has no host: write file:///path".into())),
            (_, false) => return Err(fail("it names no bucket".into())),
            (scheme, true) => return Err(fail(format!("{scheme} is no store"))),
        };
        if !url.username().is_empty() || url.password().is_some() {
            return Err(fail("credentials belong into the environment".into()));
        }
        let path = Path::from_url_path(url.path()).map_err(|error| fail(error.to_string()))?;
        Ok(Self { url, kind, path })
    }

    /// The path in the store.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the store can be written.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.kind != Kind::Http
    }

    /// The store, with credentials from the environment.
    pub(crate) fn store(&self) -> Result<Arc<dyn ObjectStore>> {
        // There is one provider of cryptography in a process; another one may be set already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let url = self.url.to_string();
        let built: object_store::Result<Arc<dyn ObjectStore>> = match self.kind {
            Kind::S3 => AmazonS3Builder::from_env()
                .with_url(url)
                .with_retry(retries())
                .with_client_options(client())
                .with_allow_http(true)
                .build()
                .map(|store| Arc::new(store) as _),
            Kind::Google => GoogleCloudStorageBuilder::from_env()
                .with_url(url)
                .with_retry(retries())
                .with_client_options(client())
                .build()
                .map(|store| Arc::new(store) as _),
            Kind::Azure => MicrosoftAzureBuilder::from_env()
                .with_url(url)
                .with_retry(retries())
                .with_client_options(client())
                .build()
                .map(|store| Arc::new(store) as _),
            Kind::File => Ok(Arc::new(LocalFileSystem::new())),
            Kind::Http => {
                let mut root = self.url.clone();
                root.set_path("/");
                HttpBuilder::new()
                    .with_url(root.to_string())
                    .with_retry(retries())
                    .with_client_options(client())
                    .build()
                    .map(|store| Arc::new(store) as _)
            }
        };
        built.map_err(|source| Error::Setup { location: self.to_string(), source: Box::new(source) })
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.url.as_str().trim_end_matches('/'))
    }
}

fn retries() -> RetryConfig {
    let (init_backoff, max_backoff) = BACKOFF;
    RetryConfig {
        backoff: BackoffConfig { init_backoff, max_backoff, base: 2.0 },
        max_retries: RETRIES,
        retry_timeout: RETRY_TIMEOUT,
    }
}

fn client() -> ClientOptions {
    let options = ClientOptions::new().with_timeout(REQUEST_TIMEOUT).with_connect_timeout(CONNECT_TIMEOUT);
    // Stores in the user's own network often have no certificate; the address says which one is meant.
    options.with_allow_http(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_others_are_refused_with_what_is_wrong() {
        for (text, path) in [
            ("s3://bucket/runs/one/", "runs/one"),
            ("gs://bucket", ""),
            ("az://container/a b", "a b"),
            ("file:///tmp/runs", "tmp/runs"),
            ("https://host:8000/text.jsonl", "text.jsonl"),
        ] {
            assert!(Location::is_address(text));
            let location = Location::parse(text).unwrap();
            assert_eq!(location.path().as_ref(), path);
            assert_eq!(Location::parse(&location.to_string()).unwrap().path(), location.path());
        }
        for (text, part) in [
            ("s3:///path", "names no bucket"),
            ("ftp://host/path", "ftp is no store"),
            ("file://host/path", "file:///path"),
            ("s3://key:secret@bucket/path", "environment"),
            ("runs/one", "relative URL"),
        ] {
            let error = Location::parse(text).unwrap_err().to_string();
            assert!(error.contains(part) && error.lines().count() == 1, "{error}");
        }
        assert!(!Location::is_address("s3/bucket") && !Location::is_address("/tmp/x"));
    }
}
