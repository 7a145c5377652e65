//! An HTTP server for a trained model, with the interface of OpenAI's completions.
//!
//! | file | content |
//! | --- | --- |
//! | `request` | a request's body, and what is checked of it |
//! | `page.html` | a page to try the model in a browser |
//! | `scheduler` | the thread that computes, and the requests that it is sent |
//! | `completions` | answers to completion requests, whole or as a stream |
//! | `response` | the bodies of answers |
//! | `error` | errors as OpenAI's interface gives them |

mod completions;
mod error;
mod request;
mod response;
mod scheduler;

pub(crate) use scheduler::{Scheduler, Setup};

use crate::limits::REQUEST_BYTES_MAX;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use error::ApiError;
use serde_json::json;
use std::sync::Arc;
use volary_data::Tokenizer;
use volary_telemetry::metrics::{self, ModelServerMetrics};

/// What requests need to know of the model.
#[derive(Clone, Debug)]
pub(crate) struct Served {
    /// The model's name.
    pub(crate) name: String,
    /// When its checkpoint was loaded, in seconds since 1970.
    pub(crate) created: u64,
    pub(crate) tokenizer: Tokenizer,
    /// The longest sequence, in tokens.
    pub(crate) context: usize,
}

/// The state of the routes.
#[derive(Clone)]
pub(crate) struct Server {
    pub(crate) served: Arc<Served>,
    pub(crate) scheduler: Scheduler,
    pub(crate) metrics: Arc<ModelServerMetrics>,
    /// The BLAKE3 hash of the access token, if one is required.
    token: Option<blake3::Hash>,
}

impl Server {
    /// A server that requires an access token if there is one.
    pub(crate) fn new(
        served: Served,
        scheduler: Scheduler,
        metrics: Arc<ModelServerMetrics>,
        token: Option<&str>,
    ) -> Self {
        let token = token.map(|token| blake3::hash(token.as_bytes()));
        Self { served: Arc::new(served), scheduler, metrics, token }
    }

    /// All routes.
    pub(crate) fn routes(self) -> Router {
        let guarded = Router::new()
            .route("/v1/completions", post(completions::complete))
            .route("/v1/models", get(models))
            .route("/metrics", get(metrics))
            .route("/v1/models/{name}", get(model))
            .layer(from_fn_with_state(self.clone(), guard));
        Router::new()
            .route("/", get(page))
            .route("/health", get(health))
            .merge(guarded)
            .fallback(|| async {
                ApiError::not_found("no such path: expected /v1/completions or /v1/models")
            })
            .method_not_allowed_fallback(|| async { ApiError::wrong_method() })
            .layer(DefaultBodyLimit::max(REQUEST_BYTES_MAX))
            .with_state(self)
    }
}

/// Passes requests with the access token on, and all requests if none is required.
async fn guard(State(server): State<Server>, request: Request, next: Next) -> Response {
    let Some(expected) = server.token else { return next.run(request).await };
    let sent = crate::http::bearer(request.headers()).map(|token| blake3::hash(token.as_bytes()));
    // Hashes are compared in constant time.
    match sent {
        Some(sent) if sent == expected => next.run(request).await,
        _ => ApiError::unauthorized().into_response(),
    }
}

/// A page to try the model in a browser. It loads nothing from elsewhere.
async fn page() -> Response {
    ([(CONTENT_SECURITY_POLICY, crate::http::POLICY)], Html(include_str!("serve/page.html"))).into_response()
}

async fn health(State(server): State<Server>) -> Response {
    match server.scheduler.is_alive().await {
        true => Json(json!({ "status": "ok" })).into_response(),
        false => ApiError::internal("the model's thread has ended").into_response(),
    }
}

async fn metrics(State(server): State<Server>) -> Response {
    ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], server.metrics.scrape().encode()).into_response()
}

async fn models(State(server): State<Server>) -> Response {
    Json(json!({ "object": "list", "data": [described(&server)] })).into_response()
}

async fn model(State(server): State<Server>, name: axum::extract::Path<String>) -> Response {
    match name.0 == server.served.name {
        true => Json(described(&server)).into_response(),
        false => ApiError::no_model(&name.0, &server.served.name).into_response(),
    }
}

fn described(server: &Server) -> serde_json::Value {
    let Served { name, created, context, .. } = &*server.served;
    json!({ "id": name, "object": "model", "created": created, "owned_by": "volary", "context": context })
}
