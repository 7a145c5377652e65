//! Errors as OpenAI's interface gives them.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::json;
use std::fmt::Display;

/// An answer to a request that cannot be served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ApiError {
    status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    /// The parameter that is wrong.
    param: Option<&'static str>,
    message: String,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Display) -> Self {
        Self { status, kind, code: None, param: None, message: message.to_string() }
    }

    /// A request that is wrong as a whole.
    pub(crate) fn invalid(message: impl Display) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// A parameter that is wrong.
    pub(crate) fn parameter(param: &'static str, message: impl Display) -> Self {
        Self { param: Some(param), ..Self::invalid(format!("{param}: {message}")) }
    }

    /// More tokens than the context.
    pub(crate) fn context(context: usize, prompt: usize, new: usize) -> Self {
        let message = format!(
            "this model's context is {context} tokens, but the request has {prompt} tokens in the prompt and {new} for the completion"
        );
        Self { code: Some("context_length_exceeded"), param: Some("max_tokens"), ..Self::invalid(message) }
    }

    /// A body that is larger than the bound.
    pub(crate) fn too_large(message: impl Display) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message)
    }

    pub(crate) fn unauthorized() -> Self {
        let message = "an access token is required, as `Authorization: Bearer TOKEN`";
        let error = Self::new(StatusCode::UNAUTHORIZED, "authentication_error", message);
        Self { code: Some("invalid_api_key"), ..error }
    }

    pub(crate) fn not_found(message: impl Display) -> Self {
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message)
    }

    pub(crate) fn no_model(name: &str, served: &str) -> Self {
        let message = format!("no model {name:?}: this server has {served:?}");
        Self { code: Some("model_not_found"), param: Some("model"), ..Self::not_found(message) }
    }

    pub(crate) fn wrong_method() -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", "this path has another method")
    }

    /// More requests than the server takes.
    pub(crate) fn busy() -> Self {
        let message = "the server has as many requests as it takes: try again later";
        Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message)
    }

    pub(crate) fn internal(message: impl Display) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// Whether it is a fault of the server.
    pub(crate) fn is_internal(&self) -> bool {
        self.status == StatusCode::INTERNAL_SERVER_ERROR
    }

    /// The HTTP status.
    pub(crate) fn status(&self) -> u16 {
        self.status.as_u16()
    }

    /// The body.
    pub(crate) fn json(&self) -> serde_json::Value {
        let Self { kind, code, param, message, .. } = self;
        json!({ "error": { "message": message, "type": kind, "param": param, "code": code } })
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.status, Json(self.json())).into_response()
    }
}
