//! HTTP: metrics for Prometheus on every process, and the dashboard on the supervisor.
//!
//! The server has a thread and a runtime of its own, so that requests take no time from the run.
//!
//! | file | content |
//! | --- | --- |
//! | `bounded` | a listener with bounded connections |
//! | `dashboard`, `dashboard.html` | the routes of the supervisor, and the page |
//! | `fuzz` | the fuzz target |
//! | `guard` | access tokens |
//! | `history` | the curves and events of a run so far |

mod bounded;
mod dashboard;
mod fuzz;
mod guard;
mod history;

pub use dashboard::supervisor_routes;
pub use fuzz::{fuzz_http, fuzz_http_seeds};
pub use guard::{GuardArgs, dashboard_url};

pub(crate) use dashboard::POLICY;
pub(crate) use guard::bearer;

use crate::limits::{DASHBOARD_BOUNDS, HttpBounds};
use anyhow::Context;
use axum::Router;
use axum::extract::Request;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::sync::{Arc, OnceLock};
use tower::ServiceExt;
use volary_telemetry::metrics::{CONTENT_TYPE, NodeMetrics, Scrape};

/// The port of the dashboard unless `--http` is given; another one if it is in use.
pub const DASHBOARD_PORT: u16 = 7680;

/// The paths of the probes that a process answers as long as it lives.
const LIVENESS: [&str; 3] = ["/health", "/healthz", "/livez"];
/// The paths of the probes that tell whether a process has started.
const READINESS: [&str; 2] = ["/ready", "/readyz"];

/// A socket that listens and is not served yet.
#[derive(Debug)]
pub struct HttpListener {
    listener: TcpListener,
    bounds: HttpBounds,
    /// Its address.
    pub address: SocketAddr,
}

impl HttpListener {
    /// Listens on an address; without one on localhost, on `port` or, if that is in use, any free port.
    ///
    /// # Errors
    /// When the address is in use or not one of this machine.
    pub fn bind(address: Option<SocketAddr>, port: u16) -> anyhow::Result<Self> {
        let local = |port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
        let listener = match address {
            // Where the kernel has no IPv6, all addresses are those of IPv4.
            Some(address) => match TcpListener::bind(address) {
                Err(error) if address.is_ipv6() && error.kind() == ErrorKind::Unsupported => {
                    TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port()))
                }
                bound => bound,
            }
            .with_context(|| format!("--http {address}"))?,
            None => TcpListener::bind(local(port))
                .or_else(|_| TcpListener::bind(local(0)))
                .context("no free port for HTTP")?,
        };
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        Ok(Self { listener, bounds: DASHBOARD_BOUNDS, address })
    }

    /// With other bounds than those of a dashboard.
    #[must_use]
    pub fn with_bounds(self, bounds: HttpBounds) -> Self {
        Self { bounds, ..self }
    }

    /// Serves the probes until the process ends, and the other routes once they are there.
    ///
    /// # Errors
    /// When the thread does not start.
    pub fn serve_probes(self) -> anyhow::Result<StartingServer> {
        let routes: Arc<OnceLock<Router>> = Arc::default();
        let (known, others) = (Arc::clone(&routes), Arc::clone(&routes));
        let ready = move || std::future::ready(readiness(known.get().is_some()));
        let forward = move |request: Request| async move {
            match others.get() {
                Some(routes) => routes.clone().oneshot(request).await.into_response(),
                None => readiness(false),
            }
        };
        self.serve(probes(ready).fallback(forward))?;
        Ok(StartingServer { routes })
    }

    /// Serves routes on a thread of its own until the process ends.
    ///
    /// # Errors
    /// When the thread does not start.
    pub fn serve(self, routes: Router) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new().name("http".into()).spawn(move || {
            let served = runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(self.listener)?;
                axum::serve(bounded::BoundedListener::new(listener, self.bounds), routes).await
            });
            if let Err(error) = served {
                tracing::warn!(%error, "the HTTP server ended");
            }
        })?;
        Ok(())
    }
}

/// A server that answers probes while the supervisor starts.
#[derive(Debug)]
pub struct StartingServer {
    routes: Arc<OnceLock<Router>>,
}

impl StartingServer {
    /// Serves all routes from now on.
    pub fn open(&self, routes: Router) {
        // The first ones stay.
        let _ = self.routes.set(routes);
    }
}

/// The routes of a node.
pub fn node_routes(metrics: Arc<NodeMetrics>) -> Router {
    probes(|| std::future::ready(readiness(true))).merge(metrics_route(move || encode(metrics.scrape())))
}

/// Probes of liveness, under their usual names, and of readiness.
fn probes<F>(ready: impl Fn() -> F + Clone + Send + Sync + 'static) -> Router
where
    F: Future<Output = Response> + Send + 'static,
{
    let alive = || async { "ok\n" };
    let live = LIVENESS.into_iter().fold(Router::new(), |routes, path| routes.route(path, get(alive)));
    READINESS.into_iter().fold(live, |routes, path| routes.route(path, get(ready.clone())))
}

fn readiness(ready: bool) -> Response {
    match ready {
        true => "ready\n".into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, "starting\n").into_response(),
    }
}

fn metrics_route(metrics: impl Fn() -> Response + Clone + Send + Sync + 'static) -> Router {
    Router::new().route("/metrics", get(move || std::future::ready(metrics())))
}

fn encode(scrape: &Scrape) -> Response {
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], scrape.encode()).into_response()
}
