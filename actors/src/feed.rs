//! What the supervisor tells whoever watches a run, as it happens: a line of JSON each.

use crate::limits::FEED_AHEAD;
use serde::Serialize;
use std::sync::Arc;
use tokio::sync::broadcast;

/// Something that happened.
#[derive(Clone, Debug)]
pub struct News {
    /// `step`, `validation` or `event`.
    pub kind: &'static str,
    /// As in `metrics.jsonl`, `validation.jsonl` or `events.jsonl`.
    pub json: Arc<str>,
}

/// Hands news to listeners; one that is too slow misses some, and holds up nobody.
#[derive(Clone, Debug)]
pub struct Feed(broadcast::Sender<News>);

impl Default for Feed {
    fn default() -> Self {
        Self(broadcast::Sender::new(FEED_AHEAD))
    }
}

impl Feed {
    /// News from now on.
    #[must_use]
    pub fn listen(&self) -> broadcast::Receiver<News> {
        self.0.subscribe()
    }

    pub(crate) fn tell(&self, kind: &'static str, what: &impl Serialize) {
        if self.0.receiver_count() == 0 {
            return;
        }
        if let Ok(json) = serde_json::to_string(what) {
            // The last listener may have gone just now.
            let _ = self.0.send(News { kind, json: json.into() });
        }
    }
}
