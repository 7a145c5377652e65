//! The fuzz target of HTTP requests: the real server and guard, with routes like those of the dashboard.

use super::guard::{Guard, GuardArgs, Unauthorized, bearer, guard};
use super::{metrics_route, probes, readiness};
use crate::limits::{FUZZ_BUFFER_BYTES, FUZZ_RESPONSE_MAX};
use axum::Router;
use axum::extract::Path;
use axum::http::{HeaderMap, StatusCode};
use axum::response::IntoResponse;
use axum::routing::{get, post};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

/// The access token of a viewer.
const TOKEN: &str = "volary1.good";
/// The content that needs it.
const SECRET: &str = "for viewers only";

/// A listener with one connection.
struct Once(Option<DuplexStream>);

impl axum::serve::Listener for Once {
    type Io = DuplexStream;
    type Addr = ();

    async fn accept(&mut self) -> (DuplexStream, ()) {
        match self.0.take() {
            Some(stream) => (stream, ()),
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> std::io::Result<()> {
        Ok(())
    }
}

fn routes() -> Router {
    let check_viewer = |token: &str| {
        if token == TOKEN { Ok(()) } else { Err(Unauthorized::invalid("unknown access token")) }
    };
    let state = Guard::new(&GuardArgs::default(), "volary_token".into(), check_viewer);
    let drain = |Path(node): Path<String>, headers: HeaderMap| async move {
        match bearer(&headers) {
            Some(TOKEN) => node.into_response(),
            _ => StatusCode::UNAUTHORIZED.into_response(),
        }
    };
    Router::new()
        .route("/", get(|| async { SECRET }))
        .route("/trace/{id}", get(|Path(id): Path<String>| async move { format!("{SECRET} {id}") }))
        .route("/api/drain/{node}", post(drain))
        .merge(probes(|| std::future::ready(readiness(true))))
        .merge(metrics_route(|| "volary_steps 1\n".into_response()))
        .layer(axum::middleware::from_fn_with_state(state, guard))
}

/// Sends bytes to the HTTP port of a process.
///
/// # Panics
/// When the server does not end with its peer, or shows guarded content without the access token.
#[doc(hidden)]
pub fn fuzz_http(bytes: &[u8]) {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
    let response = runtime.block_on(async {
        let (mut peer, server) = duplex(FUZZ_BUFFER_BYTES);
        let serving = tokio::spawn(async { axum::serve(Once(Some(server)), routes()).await });
        let mut response = Vec::new();
        let exchange = async {
            // The server may close before it has read everything.
            let _ = peer.write_all(bytes).await;
            let _ = peer.shutdown().await;
            let _ = peer.read_to_end(&mut response).await;
        };
        let ended = tokio::time::timeout(FUZZ_RESPONSE_MAX, exchange).await;
        serving.abort();
        assert!(ended.is_ok(), "the server does not end with its peer");
        response
    });
    let has = |text: &[u8], part: &str| text.windows(part.len()).any(|window| window == part.as_bytes());
    assert!(
        !has(&response, SECRET) || has(bytes, TOKEN),
        "guarded content was shown without the access token"
    );
}

/// Valid requests of several kinds, from which mutations start.
#[doc(hidden)]
#[must_use]
pub fn fuzz_http_seeds() -> Vec<Vec<u8>> {
    let with = |head: &str| format!("{head}\r\nHost: localhost:7680\r\n");
    let get = with("GET / HTTP/1.1");
    [
        format!("{}\r\n", with(&format!("GET /?token={TOKEN} HTTP/1.1"))),
        format!("{get}\r\n"),
        format!("{get}Authorization: Bearer {TOKEN}\r\n\r\n"),
        format!("{get}Cookie: a=b; volary_token=volary1.bad\r\n\r\n"),
        format!("{}\r\n{get}\r\n", with("GET /health HTTP/1.1")),
        format!(
            "{}Authorization: Bearer x\r\nContent-Length: 4\r\n\r\nbody",
            with("POST /api/drain/node-1 HTTP/1.1")
        ),
        format!(
            "{}Transfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
            with("POST /api/drain/n%20 HTTP/1.1")
        ),
    ]
    .map(String::into_bytes)
    .into()
}
