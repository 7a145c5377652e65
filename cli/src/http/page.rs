//! The supervisor's page: what it shows, live, and what can be done from it by whoever has the operator's token.

use super::guard::{self, GuardArgs, Guarded};
use super::history::history;
use super::{common_routes, encode};
use crate::commands::operate;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures::Stream;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::broadcast::error::RecvError;
use volary_protocol::operator::{OperatorReply, OperatorRequest};
use volary_storage::RunDir;
use volary_supervisor::SupervisorHandle;
use volary_telemetry::metrics::SupervisorMetrics;
use volary_telemetry::{render, store};

/// How often a watcher gets the state of the cluster.
const STATUS_EVERY: Duration = Duration::from_secs(1);
/// Watchers at a time.
const WATCHERS_MAX: usize = 64;
/// Nothing is loaded from anywhere else, and no other page may put this one in a frame.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
                      img-src data:; frame-ancestors 'none'";

#[derive(Clone)]
struct Shown {
    handle: SupervisorHandle,
    dir: RunDir,
    watchers: Arc<AtomicUsize>,
}

/// What a supervisor answers.
pub fn supervisor_routes(
    handle: SupervisorHandle,
    dir: RunDir,
    metrics: Arc<SupervisorMetrics>,
    guard: &GuardArgs,
) -> Router {
    let door = handle.clone();
    let guarded =
        Guarded::new(guard, move |token| door.check_viewer(token).map_err(|error| error.to_string()));
    let shown = Shown { handle, dir, watchers: Arc::default() };
    Router::new()
        .route("/", get(|| async { page(include_str!("page.html").to_owned()) }))
        .route("/api/status", get(status))
        .route("/api/history", get(past))
        .route("/api/stream", get(stream))
        .route("/api/traces", get(traces))
        .route("/trace/{id}", get(trace))
        .route("/api/drain/{node}", post(drain))
        .route("/api/checkpoint", post(checkpoint))
        .with_state(shown)
        .merge(common_routes(move || encode(metrics.scrape())))
        .layer(axum::middleware::from_fn_with_state(guarded, guard::guard))
}

fn page(text: String) -> Response {
    ([(header::CONTENT_SECURITY_POLICY, POLICY)], Html(text)).into_response()
}

fn failure(code: StatusCode, reason: impl Into<String>) -> Response {
    (code, Json(serde_json::json!({ "error": reason.into() }))).into_response()
}

async fn current(shown: &Shown) -> Option<serde_json::Value> {
    match shown.handle.ask(OperatorRequest::Status).await {
        OperatorReply::Status(status) => operate::to_json(&status).ok(),
        _ => None,
    }
}

async fn status(State(shown): State<Shown>) -> Response {
    match current(&shown).await {
        Some(status) => Json(status).into_response(),
        None => failure(StatusCode::SERVICE_UNAVAILABLE, "the run has ended"),
    }
}

/// One less watcher when it is dropped.
struct Watcher(Arc<AtomicUsize>);

impl Drop for Watcher {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn stream(State(shown): State<Shown>) -> Response {
    if shown.watchers.fetch_add(1, Ordering::Relaxed) >= WATCHERS_MAX {
        shown.watchers.fetch_sub(1, Ordering::Relaxed);
        return failure(StatusCode::SERVICE_UNAVAILABLE, format!("{WATCHERS_MAX} others are watching"));
    }
    Sse::new(news(shown)).keep_alive(KeepAlive::default()).into_response()
}

/// What happens, as it happens, and the state of the cluster now and then.
fn news(shown: Shown) -> impl Stream<Item = Result<Event, Infallible>> {
    let watcher = Watcher(Arc::clone(&shown.watchers));
    let feed = shown.handle.events().subscribe();
    let ticks = tokio::time::interval(STATUS_EVERY);
    futures::stream::unfold(
        (shown, feed, ticks, watcher),
        |(shown, mut feed, mut ticks, watcher)| async move {
            let event = tokio::select! {
                news = feed.recv() => match news {
                    Ok(news) => Event::default().event(news.kind).data(&*news.json),
                    // It was too slow and has missed some: it starts over from the history.
                    Err(RecvError::Lagged(_)) => Event::default().event("missed").data("{}"),
                    Err(RecvError::Closed) => return None,
                },
                _ = ticks.tick() => Event::default().event("status").data(current(&shown).await?.to_string()),
            };
            Some((Ok(event), (shown, feed, ticks, watcher)))
        },
    )
}

/// Reads files on a thread of its own: this one answers everybody, and whoever asks whether the process is alive.
async fn from_files<T: Send + 'static>(
    shown: Shown,
    read: impl FnOnce(&RunDir) -> T + Send + 'static,
) -> Result<T, Response> {
    let read = tokio::task::spawn_blocking(move || read(&shown.dir)).await;
    read.map_err(|error| failure(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))
}

async fn past(State(shown): State<Shown>) -> Result<Response, Response> {
    from_files(shown, history).await.map(|history| Json(history).into_response())
}

async fn traces(State(shown): State<Shown>) -> Result<Response, Response> {
    let line = |trace: &volary_telemetry::Trace| {
        let root = trace.root()?;
        Some(serde_json::json!({
            "id": root.trace, "name": root.name, "step": trace.step(), "spans": trace.spans.len(),
            "ms": root.duration_ns as f64 / 1e6,
        }))
    };
    let list = move |dir: &RunDir| {
        let found = store::read(&dir.traces()).unwrap_or_default();
        found.iter().rev().filter_map(line).collect::<Vec<_>>()
    };
    from_files(shown, list).await.map(|list| Json(list).into_response())
}

async fn trace(State(shown): State<Shown>, Path(id): Path<String>) -> Result<Response, Response> {
    let wanted = id.clone();
    let draw = move |dir: &RunDir| {
        let found = store::read(&dir.traces()).unwrap_or_default();
        found.iter().find(|trace| trace.spans[0].trace == wanted).map(|trace| render::html(trace, None))
    };
    match from_files(shown, draw).await? {
        Some(html) => Ok(page(html)),
        None => Ok(failure(StatusCode::NOT_FOUND, format!("no trace {id} is kept"))),
    }
}

/// Does what is asked, if it comes with the operator's token.
async fn order(shown: &Shown, headers: &HeaderMap, request: OperatorRequest) -> Response {
    let allowed = match guard::operators(headers) {
        Some(token) => shown.handle.check_operator(token).map_err(|error| error.to_string()),
        None => Err("an operator's token is needed: RUN_DIR/identity/operator.token".to_owned()),
    };
    if let Err(reason) = allowed {
        return failure(StatusCode::UNAUTHORIZED, reason);
    }
    match shown.handle.ask(request).await {
        OperatorReply::Done { step } => Json(serde_json::json!({ "step": step })).into_response(),
        OperatorReply::Failed { reason } => failure(StatusCode::CONFLICT, reason),
        _ => failure(StatusCode::INTERNAL_SERVER_ERROR, "an answer to another question"),
    }
}

async fn drain(State(shown): State<Shown>, Path(node): Path<String>, headers: HeaderMap) -> Response {
    order(&shown, &headers, OperatorRequest::Drain { node }).await
}

async fn checkpoint(State(shown): State<Shown>, headers: HeaderMap) -> Response {
    order(&shown, &headers, OperatorRequest::Checkpoint).await
}
