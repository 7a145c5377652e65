//! A live stream of what happens in a run, as lines of JSON: for the dashboard and for `volary train`.

use crate::limits::EVENTS_AHEAD;
use serde::Serialize;
use std::sync::Arc;
use tokio::sync::broadcast;

/// Something that happened.
#[derive(Clone, Debug)]
pub struct Event {
    /// `step`, `validation` or `event`.
    pub kind: &'static str,
    /// As in `metrics.jsonl`, `validation.jsonl` or `events.jsonl`.
    pub json: Arc<str>,
}

/// Publishes events to subscribers. A slow subscriber misses events and delays no other.
#[derive(Clone, Debug)]
pub struct EventStream(broadcast::Sender<Event>);

impl Default for EventStream {
    fn default() -> Self {
        Self(broadcast::Sender::new(EVENTS_AHEAD))
    }
}

impl EventStream {
    /// The events from now on.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.0.subscribe()
    }

    pub(crate) fn publish(&self, kind: &'static str, what: &impl Serialize) {
        if self.0.receiver_count() == 0 {
            return;
        }
        if let Ok(json) = serde_json::to_string(what) {
            // The last subscriber may be gone by now.
            drop(self.0.send(Event { kind, json: json.into() }));
        }
    }
}
