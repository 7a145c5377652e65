//! Authorization: the dashboard and the API need a viewer's or operator's access token, unless `--http-open`
//! is given.
//!
//! A browser shows the access token once, as `?token=`, and gets a cookie; other clients send it as a bearer.
//! Commands need the operator's access token as a bearer, which a page of another site cannot make a browser
//! send.

use super::HttpListener;
use anyhow::bail;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::error::Error;
use std::fmt;
use std::io::IsTerminal;
use std::sync::Arc;
use volary_storage::RunDir;
use volary_transport::AccessRole;

/// The start of the cookie's name.
const COOKIE: &str = "volary_token";

/// Access to the dashboard.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct GuardArgs {
    /// Show the dashboard without an access token; beyond localhost only with --insecure.
    #[arg(long)]
    http_open: bool,
    /// Require an access token for /metrics too.
    #[arg(long)]
    closed_metrics: bool,
    /// Show the dashboard without an access token beyond localhost.
    #[arg(long, requires = "http_open")]
    insecure: bool,
}

impl GuardArgs {
    /// Refuses an open dashboard beyond localhost, unless `--insecure` is given.
    ///
    /// # Errors
    /// The alternatives.
    pub fn check(&self, listener: &HttpListener) -> anyhow::Result<()> {
        let is_public = self.http_open && !listener.address.ip().is_loopback();
        if is_public && !self.insecure {
            bail!(
                "--http {}: the dashboard would be open to the network: omit --http-open, or add --insecure",
                listener.address
            );
        }
        Ok(())
    }

    /// Whether a path needs no access token.
    fn is_open(&self, path: &str) -> bool {
        self.http_open || (path == "/metrics" && !self.closed_metrics)
    }
}

/// Why a request is unauthorized.
#[derive(Debug)]
pub(super) enum Unauthorized {
    /// It has no access token for a role.
    Missing(AccessRole),
    /// Its access token is not valid.
    Invalid(Box<dyn Error + Send + Sync>),
}

impl Unauthorized {
    pub(super) fn invalid(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Invalid(error.into())
    }
}

impl fmt::Display for Unauthorized {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing(AccessRole::Operator) => {
                f.write_str("an operator's access token is required: RUN_DIR/identity/operator.token")
            }
            Self::Missing(_) => f.write_str("an access token is required"),
            Self::Invalid(error) => error.fmt(f),
        }
    }
}

impl Error for Unauthorized {}

/// Checks that an access token lets its holder view the dashboard.
type CheckViewer = Arc<dyn Fn(&str) -> Result<(), Unauthorized> + Send + Sync>;

/// The state of the guard.
#[derive(Clone)]
pub(super) struct Guard {
    args: GuardArgs,
    /// Cookies are per host and not per port: the name tells the runs on one host apart.
    cookie: Arc<str>,
    check_viewer: CheckViewer,
}

impl Guard {
    pub(super) fn new(
        args: &GuardArgs,
        cookie: String,
        check_viewer: impl Fn(&str) -> Result<(), Unauthorized> + Send + Sync + 'static,
    ) -> Self {
        Self { args: args.clone(), cookie: cookie.into(), check_viewer: Arc::new(check_viewer) }
    }
}

/// The address of the dashboard: with an access token on a terminal, without one in a log.
#[must_use]
pub fn dashboard_url(dir: &RunDir, address: &str) -> String {
    let path = crate::rundir::token_file(dir, AccessRole::Viewer);
    if std::io::stderr().is_terminal() {
        let token = std::fs::read_to_string(path).unwrap_or_default();
        return format!("http://{address}/?token={}", token.trim());
    }
    format!("http://{address}/?token=TOKEN (access token in {})", path.display())
}

/// The access token in the `Authorization` header.
pub(crate) fn bearer(headers: &HeaderMap) -> Option<&str> {
    headers.get(header::AUTHORIZATION)?.to_str().ok()?.strip_prefix("Bearer ").map(str::trim)
}

/// The name of a run's cookie, by its certificate authority.
pub(super) fn cookie_name(dir: &RunDir) -> String {
    let authority = std::fs::read(dir.identity().join("ca.der")).unwrap_or_default();
    format!("{COOKIE}_{}", &blake3::hash(&authority).to_hex()[..8])
}

fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let all = headers.get(header::COOKIE)?.to_str().ok()?;
    all.split(';').find_map(|pair| pair.trim().strip_prefix(name)?.strip_prefix('='))
}

fn in_query(request: &Request) -> Option<&str> {
    request.uri().query()?.split('&').find_map(|pair| pair.strip_prefix("token="))
}

/// Passes authorized requests on, and stores an access token of the address in a cookie.
pub(super) async fn guard(State(guard): State<Guard>, request: Request, next: Next) -> Response {
    if guard.args.is_open(request.uri().path()) {
        return next.run(request).await;
    }
    let in_query = in_query(&request).map(str::to_owned);
    let headers = request.headers();
    let token = bearer(headers).or(in_query.as_deref()).or_else(|| cookie(headers, &guard.cookie));
    let checked = match token {
        Some(token) => (guard.check_viewer)(token),
        None => Err(Unauthorized::Missing(AccessRole::Viewer)),
    };
    if let Err(error) = checked {
        let help = format!(
            "{error}: open the address that the supervisor printed, or send an access token of RUN_DIR/identity/\n"
        );
        return (StatusCode::UNAUTHORIZED, help).into_response();
    }
    let mut response = next.run(request).await;
    let name = &guard.cookie;
    let cookie = in_query.map(|token| format!("{name}={token}; HttpOnly; SameSite=Strict; Path=/"));
    if let Some(value) = cookie.and_then(|text| HeaderValue::from_str(&text).ok()) {
        response.headers_mut().insert(header::SET_COOKIE, value);
        // The address has the access token: no other site may get it as the referrer.
        response.headers_mut().insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cookies_of_two_runs_on_one_host_have_different_names() {
        let runs = ["first", "other"].map(|authority| {
            let folder = tempfile::tempdir().unwrap();
            let dir = RunDir::create(folder.path().join("run")).unwrap();
            std::fs::create_dir_all(dir.identity()).unwrap();
            std::fs::write(dir.identity().join("ca.der"), authority).unwrap();
            cookie_name(&dir)
        });
        assert_ne!(runs[0], runs[1]);
        let mut headers = HeaderMap::new();
        let both = format!("{}=one; {}=two", runs[0], runs[1]);
        headers.insert(header::COOKIE, HeaderValue::from_str(&both).unwrap());
        assert_eq!(runs.each_ref().map(|name| cookie(&headers, name)), [Some("one"), Some("two")]);
    }
}
