//! What a node can do: what it measured of itself when it joined, and what was seen of it since.

use crate::invalid::InvalidValue;
pub use crate::limits::ZONE_MAX;
use serde::{Deserialize, Serialize};

/// Floating-point operations per second that a whole device reaches at the run's shapes, all its threads together.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// On the way forward.
    pub forward: f64,
    /// On the way back, which has twice the operations.
    pub backward: f64,
}

impl Rate {
    /// The same in both directions.
    #[must_use]
    pub fn even(flops: f64) -> Self {
        Self { forward: flops, backward: flops }
    }

    /// Seconds for work that has `flops` operations forward and twice as many backward.
    #[must_use]
    pub fn seconds(&self, flops: f64) -> f64 {
        flops / self.forward + 2.0 * flops / self.backward
    }

    /// Operations per second of such work, forward and backward together.
    #[must_use]
    pub fn both(&self) -> f64 {
        3.0 / self.seconds(1.0)
    }

    /// The rate of a device that is so many times as fast.
    #[must_use]
    pub fn times(&self, factor: f64) -> Self {
        Self { forward: self.forward * factor, backward: self.backward * factor }
    }
}

/// What a node can do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    /// Attention, dense feed-forward, gates and the loss.
    pub dense: Rate,
    /// Experts.
    pub expert: Rate,
    /// Bytes of parameters per second through the optimizer and the sums of gradients.
    pub update_bytes_per_s: f64,
    /// Calls that run at the same time.
    pub threads: usize,
    /// Memory that the run may use, in bytes.
    pub memory_bytes: u64,
    /// What fails together: a rack, a data centre, a spot pool. Replicas keep to different ones where they can.
    pub zone: String,
    /// Bytes per second in one direction.
    pub bandwidth: f64,
    /// Seconds to a peer and back.
    pub round_trip_s: f64,
    /// Seconds of a thread per byte sent or received: encryption and copies.
    pub network_s_per_byte: f64,
}

/// Rate of one CPU thread where none was measured, in operations per second.
const THREAD_FLOPS: f64 = 2e10;

impl Profile {
    /// A node of which nothing is known but how much it does relative to others, in threads: no limit of memory, a
    /// network that costs nothing.
    #[must_use]
    pub fn relative(capacity: f64) -> Self {
        Self {
            dense: Rate::even(capacity * THREAD_FLOPS),
            expert: Rate::even(capacity * THREAD_FLOPS),
            update_bytes_per_s: f64::INFINITY,
            threads: 1,
            memory_bytes: u64::MAX,
            zone: String::new(),
            bandwidth: f64::INFINITY,
            round_trip_s: 0.0,
            network_s_per_byte: 0.0,
        }
    }

    /// How much it does in a second relative to others, in threads of [`Profile::relative`].
    #[must_use]
    pub fn capacity(&self) -> f64 {
        self.dense.both() / THREAD_FLOPS
    }

    /// The same node, so many times as fast.
    pub fn scale(&mut self, factor: f64) {
        self.dense = self.dense.times(factor);
        self.expert = self.expert.times(factor);
    }

    /// Checks the bounds of all values, which come from a peer.
    ///
    /// # Errors
    /// The first value that is out of its bounds.
    pub fn check(&self) -> Result<(), InvalidValue> {
        let positive = [
            ("dense.forward", self.dense.forward, true),
            ("dense.backward", self.dense.backward, true),
            ("expert.forward", self.expert.forward, true),
            ("expert.backward", self.expert.backward, true),
            ("update_bytes_per_s", self.update_bytes_per_s, false),
            ("bandwidth", self.bandwidth, false),
            ("threads", self.threads as f64, false),
        ];
        for (key, value, finite) in positive {
            if value.is_nan() || value <= 0.0 || (finite && value.is_infinite()) {
                return Err(InvalidValue::new(key, value, "a positive number"));
            }
        }
        let times = [("round_trip_s", self.round_trip_s), ("network_s_per_byte", self.network_s_per_byte)];
        for (key, value) in times {
            if !(value.is_finite() && value >= 0.0) {
                return Err(InvalidValue::new(key, value, "a number that is not negative"));
            }
        }
        if self.zone.len() > ZONE_MAX {
            let found = format!("a name of {} bytes", self.zone.len());
            return Err(InvalidValue::new("zone", found, format!("at most {ZONE_MAX} bytes")));
        }
        if self.zone.contains(char::is_control) {
            return Err(InvalidValue::new("zone", format!("{:?}", self.zone), "no control characters"));
        }
        Ok(())
    }
}
