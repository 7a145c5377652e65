//! Who may look at the page: whoever has a viewer's or an operator's token, unless the page is open on purpose.
//!
//! A browser shows the token once, as `?token=`, and gets a cookie for it; other clients send it as a bearer. Orders need the
//! operator's token as a bearer, which no other site's page can make a browser send.

use super::Door;
use anyhow::bail;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::io::IsTerminal;
use std::sync::Arc;
use volary_storage::RunDir;

const COOKIE: &str = "volary_token";

/// How the page is guarded.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct GuardArgs {
    /// Show the page without a token; beyond this machine only with --insecure.
    #[arg(long)]
    http_open: bool,
    /// Let /metrics need a token too.
    #[arg(long)]
    closed_metrics: bool,
    /// Serve a page without a token beyond this machine.
    #[arg(long, requires = "http_open")]
    insecure: bool,
}

impl GuardArgs {
    /// Refuses a page that everybody on the network could read, unless that is wanted.
    ///
    /// # Errors
    /// What to do instead.
    pub fn check(&self, door: &Door) -> anyhow::Result<()> {
        let everybody = self.http_open && !door.address.ip().is_loopback();
        if everybody && !self.insecure {
            bail!(
                "--http {}: everybody who reaches it could read the page: leave out --http-open, or add --insecure",
                door.address
            );
        }
        Ok(())
    }

    /// Whether a path is shown to everybody.
    fn shows(&self, path: &str) -> bool {
        self.http_open || path == "/health" || (path == "/metrics" && !self.closed_metrics)
    }
}

/// Whether a token's text lets somebody look, or why not.
type Verdict = Arc<dyn Fn(&str) -> Result<(), String> + Send + Sync>;

/// What the guard goes by.
#[derive(Clone)]
pub(super) struct Guarded {
    args: GuardArgs,
    may_look: Verdict,
}

impl Guarded {
    pub(super) fn new(
        args: &GuardArgs,
        may_look: impl Fn(&str) -> Result<(), String> + Send + Sync + 'static,
    ) -> Self {
        Self { args: args.clone(), may_look: Arc::new(may_look) }
    }
}

/// The page's address, for somebody who reads it now: with a token on a terminal, without one in a log.
#[must_use]
pub fn page_url(dir: &RunDir, address: &str) -> String {
    let path = crate::rundir::viewer_token(dir);
    if std::io::stderr().is_terminal() {
        let token = std::fs::read_to_string(path).unwrap_or_default();
        return format!("http://{address}/?token={}", token.trim());
    }
    format!("http://{address}/?token=TOKEN with the token in {}", path.display())
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    headers.get(header::AUTHORIZATION)?.to_str().ok()?.strip_prefix("Bearer ").map(str::trim)
}

fn cookie(headers: &HeaderMap) -> Option<&str> {
    let all = headers.get(header::COOKIE)?.to_str().ok()?;
    all.split(';').find_map(|pair| pair.trim().strip_prefix(COOKIE)?.strip_prefix('='))
}

fn in_query(request: &Request) -> Option<&str> {
    request.uri().query()?.split('&').find_map(|pair| pair.strip_prefix("token="))
}

/// Lets through who has a token, and remembers it in the browser that came with it in its address.
pub(super) async fn guard(State(guarded): State<Guarded>, request: Request, next: Next) -> Response {
    if guarded.args.shows(request.uri().path()) {
        return next.run(request).await;
    }
    let asked = in_query(&request).map(str::to_owned);
    let headers = request.headers();
    let token = bearer(headers).or(asked.as_deref()).or_else(|| cookie(headers));
    let verdict = match token {
        Some(token) => (guarded.may_look)(token),
        None => Err("a token is needed".to_owned()),
    };
    if let Err(reason) = verdict {
        let help = format!(
            "{reason}: open the address that the supervisor printed, or send a token of RUN_DIR/identity/\n"
        );
        return (StatusCode::UNAUTHORIZED, help).into_response();
    }
    let mut response = next.run(request).await;
    let remembered = asked.map(|token| format!("{COOKIE}={token}; HttpOnly; SameSite=Strict; Path=/"));
    if let Some(value) = remembered.and_then(|text| HeaderValue::from_str(&text).ok()) {
        response.headers_mut().insert(header::SET_COOKIE, value);
        // The token stands in the address: it must not go to any other site.
        response.headers_mut().insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    }
    response
}

pub(super) fn operators(headers: &HeaderMap) -> Option<&str> {
    bearer(headers)
}
