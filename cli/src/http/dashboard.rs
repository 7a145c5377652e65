//! The supervisor's dashboard: the page, its data and live stream, and commands with the operator's access
//! token.

use super::guard::{self, Guard, GuardArgs, Unauthorized, cookie_name};
use super::history::history;
use super::{encode, metrics_route};
use crate::commands::operate;
use crate::limits::{DASHBOARD_STATUS_INTERVAL, DASHBOARD_STREAMS_MAX};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::sse::{Event as SseEvent, KeepAlive, Sse};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::broadcast::error::RecvError;
use volary_protocol::operator::{OperatorReply, OperatorRequest};
use volary_storage::RunDir;
use volary_supervisor::SupervisorHandle;
use volary_telemetry::metrics::SupervisorMetrics;
use volary_telemetry::{render, store};
use volary_transport::AccessRole;

/// Forbids content from other sites, and frames of other sites.
pub(crate) const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
                      img-src data:; frame-ancestors 'none'";

/// The state of the routes.
#[derive(Clone)]
struct Dashboard {
    handle: SupervisorHandle,
    dir: RunDir,
    streams: Arc<AtomicUsize>,
}

/// The routes of a supervisor.
pub fn supervisor_routes(
    handle: SupervisorHandle,
    dir: RunDir,
    metrics: Arc<SupervisorMetrics>,
    guard: &GuardArgs,
) -> Router {
    let checker = handle.clone();
    let guard = Guard::new(guard, cookie_name(&dir), move |token| {
        checker.check_viewer(token).map_err(Unauthorized::invalid)
    });
    let dashboard = Dashboard { handle, dir, streams: Arc::default() };
    Router::new()
        .route("/", get(|| async { html(include_str!("dashboard.html").to_owned()) }))
        .route("/api/status", get(status))
        .route("/api/history", get(full_history))
        .route("/api/stream", get(stream))
        .route("/api/traces", get(traces))
        .route("/trace/{id}", get(trace))
        .route("/api/drain/{node}", post(drain))
        .route("/api/checkpoint", post(checkpoint))
        .with_state(dashboard)
        .merge(metrics_route(move || encode(metrics.scrape())))
        .layer(axum::middleware::from_fn_with_state(guard, guard::guard))
}

fn html(text: String) -> Response {
    ([(header::CONTENT_SECURITY_POLICY, POLICY)], Html(text)).into_response()
}

fn failure(code: StatusCode, reason: impl Into<String>) -> Response {
    (code, Json(serde_json::json!({ "error": reason.into() }))).into_response()
}

async fn current_status(dashboard: &Dashboard) -> Option<serde_json::Value> {
    match dashboard.handle.ask(OperatorRequest::Status).await {
        OperatorReply::Status(status) => operate::status::to_json(&status).ok(),
        _ => None,
    }
}

async fn status(State(dashboard): State<Dashboard>) -> Response {
    match current_status(&dashboard).await {
        Some(status) => Json(status).into_response(),
        None => failure(StatusCode::SERVICE_UNAVAILABLE, "the run has ended"),
    }
}

/// One live stream; dropping it uncounts it.
struct LiveStream(Arc<AtomicUsize>);

impl Drop for LiveStream {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn stream(State(dashboard): State<Dashboard>) -> Response {
    if dashboard.streams.fetch_add(1, Ordering::Relaxed) >= DASHBOARD_STREAMS_MAX {
        dashboard.streams.fetch_sub(1, Ordering::Relaxed);
        let reason = format!("all {DASHBOARD_STREAMS_MAX} live streams are in use");
        return failure(StatusCode::SERVICE_UNAVAILABLE, reason);
    }
    Sse::new(live(dashboard)).keep_alive(KeepAlive::default()).into_response()
}

/// Steps, validations and events as they happen, and the status at an interval.
fn live(dashboard: Dashboard) -> impl futures::Stream<Item = Result<SseEvent, Infallible>> {
    let stream = LiveStream(Arc::clone(&dashboard.streams));
    let events = dashboard.handle.events().subscribe();
    let ticks = tokio::time::interval(DASHBOARD_STATUS_INTERVAL);
    futures::stream::unfold(
        (dashboard, events, ticks, stream),
        |(dashboard, mut events, mut ticks, stream)| async move {
            let message = tokio::select! {
                event = events.recv() => match event {
                    Ok(event) => SseEvent::default().event(event.kind).data(&*event.json),
                    // A slow reader missed some; it reloads the history.
                    Err(RecvError::Lagged(_)) => SseEvent::default().event("missed").data("{}"),
                    Err(RecvError::Closed) => return None,
                },
                _ = ticks.tick() => {
                    SseEvent::default().event("status").data(current_status(&dashboard).await?.to_string())
                }
            };
            Some((Ok(message), (dashboard, events, ticks, stream)))
        },
    )
}

/// Reads files on another thread: this one serves all requests, health checks included.
async fn from_files<T: Send + 'static>(
    dashboard: Dashboard,
    read: impl FnOnce(&RunDir) -> T + Send + 'static,
) -> Result<T, Response> {
    let read = tokio::task::spawn_blocking(move || read(&dashboard.dir)).await;
    read.map_err(|error| failure(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))
}

async fn full_history(State(dashboard): State<Dashboard>) -> Result<Response, Response> {
    from_files(dashboard, history).await.map(|history| Json(history).into_response())
}

async fn traces(State(dashboard): State<Dashboard>) -> Result<Response, Response> {
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
    from_files(dashboard, list).await.map(|list| Json(list).into_response())
}

async fn trace(State(dashboard): State<Dashboard>, Path(id): Path<String>) -> Result<Response, Response> {
    let wanted = id.clone();
    let draw = move |dir: &RunDir| {
        let found = store::read(&dir.traces()).unwrap_or_default();
        found.iter().find(|trace| trace.spans[0].trace == wanted).map(|trace| render::html(trace, None))
    };
    match from_files(dashboard, draw).await? {
        Some(text) => Ok(html(text)),
        None => Ok(failure(StatusCode::NOT_FOUND, format!("no trace {id}"))),
    }
}

/// Sends a command to the supervisor, if it has the operator's access token.
async fn command(dashboard: &Dashboard, headers: &HeaderMap, request: OperatorRequest) -> Response {
    let checked = match guard::bearer(headers) {
        Some(token) => dashboard.handle.check_operator(token).map_err(Unauthorized::invalid),
        None => Err(Unauthorized::Missing(AccessRole::Operator)),
    };
    if let Err(error) = checked {
        return failure(StatusCode::UNAUTHORIZED, error.to_string());
    }
    match dashboard.handle.ask(request).await {
        OperatorReply::Done { step } => Json(serde_json::json!({ "step": step })).into_response(),
        OperatorReply::Failed { reason } => failure(StatusCode::CONFLICT, reason),
        _ => failure(StatusCode::INTERNAL_SERVER_ERROR, "unexpected reply of the supervisor"),
    }
}

async fn drain(State(dashboard): State<Dashboard>, Path(node): Path<String>, headers: HeaderMap) -> Response {
    command(&dashboard, &headers, OperatorRequest::Drain { node }).await
}

async fn checkpoint(State(dashboard): State<Dashboard>, headers: HeaderMap) -> Response {
    command(&dashboard, &headers, OperatorRequest::Checkpoint).await
}
