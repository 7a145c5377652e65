//! What a process shows over HTTP: figures for Prometheus on every process, and on the supervisor the page.
//!
//! It runs on a thread and runtime of its own, so that nobody who looks takes time from the run.

mod bounded;
mod fuzz;
mod guard;
mod history;
mod page;

pub use fuzz::{fuzz_http, fuzz_http_seeds};
pub use guard::{GuardArgs, page_url};
pub use page::supervisor_routes;

use anyhow::Context;
use axum::Router;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use volary_telemetry::metrics::{CONTENT_TYPE, NodeMetrics, Scrape};

/// Where the page of a supervisor is unless `--http` says otherwise; another port when this one is taken.
pub const PAGE_PORT: u16 = 7680;

/// A socket that listens and is not served yet.
#[derive(Debug)]
pub struct Door {
    listener: TcpListener,
    /// Where it listens.
    pub address: SocketAddr,
}

/// Listens at an address, or, when none is wanted in particular, on this machine: at `port`, or at any other when that is taken.
///
/// # Errors
/// When the address is in use or is not this machine's.
pub fn listen(address: Option<SocketAddr>, port: u16) -> anyhow::Result<Door> {
    let own = |port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
    let listener = match address {
        Some(address) => TcpListener::bind(address).with_context(|| format!("--http {address}"))?,
        None => {
            TcpListener::bind(own(port)).or_else(|_| TcpListener::bind(own(0))).context("a port for HTTP")?
        }
    };
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    Ok(Door { listener, address })
}

impl Door {
    /// Answers until the process ends.
    ///
    /// # Errors
    /// When its thread does not start.
    pub fn serve(self, routes: Router) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new().name("http".into()).spawn(move || {
            let served = runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(self.listener)?;
                axum::serve(bounded::Bounded::new(listener), routes).await
            });
            if let Err(error) = served {
                tracing::warn!(%error, "HTTP is not served any more");
            }
        })?;
        Ok(())
    }
}

/// What a node answers.
pub fn node_routes(metrics: Arc<NodeMetrics>) -> Router {
    common_routes(move || encode(metrics.scrape()))
}

fn common_routes(metrics: impl Fn() -> Response + Clone + Send + Sync + 'static) -> Router {
    Router::new()
        .route("/health", get(|| async { "ok\n" }))
        .route("/metrics", get(move || std::future::ready(metrics())))
}

fn encode(scrape: &Scrape) -> Response {
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], scrape.encode()).into_response()
}
