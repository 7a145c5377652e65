//! The profile of a node: its compute, memory and network, by its benchmark at the start and by measurements
//! since.

use crate::digest::Digest;
use crate::invalid::InvalidValue;
pub use crate::limits::ZONE_MAX;
use serde::{Deserialize, Serialize};

/// Floating-point operations per second of a whole device at the run's shapes, with all its threads.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// Of the forward pass.
    pub forward: f64,
    /// Of the backward pass, which has twice the operations.
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

    /// The rate of a device that is `factor` times as fast.
    #[must_use]
    pub fn times(&self, factor: f64) -> Self {
        Self { forward: self.forward * factor, backward: self.backward * factor }
    }
}

/// The compute, memory and network of a node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    /// The rate of attention, dense feed-forward, gates and the loss.
    pub dense: Rate,
    /// The rate of experts.
    pub expert: Rate,
    /// Bytes of parameters per second through the optimizer and the sums of gradients.
    pub update_bytes_per_s: f64,
    /// Calls that run at the same time.
    pub threads: usize,
    /// Memory that the run may use, in bytes.
    pub memory_bytes: u64,
    /// The failure domain: a rack, a data center, a spot pool. Replicas are spread over zones where possible.
    pub zone: String,
    /// Bytes per second in one direction.
    pub bandwidth: f64,
    /// Round trip to a peer, in seconds.
    pub round_trip_s: f64,
    /// Thread time per byte sent or received, in seconds: encryption and copies.
    pub network_s_per_byte: f64,
    /// The arithmetic kind of its device: nodes of one kind compute the same bits. None where it is unknown.
    pub arithmetic: Option<Digest>,
}

/// The assumed rate of one CPU thread without a benchmark, in operations per second.
const THREAD_FLOPS: f64 = 2e10;

impl Profile {
    /// A node with a known relative capacity only, in threads: unlimited memory and a free network.
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
            arithmetic: None,
        }
    }

    /// The relative capacity, in threads of [`Profile::relative`].
    #[must_use]
    pub fn capacity(&self) -> f64 {
        self.dense.both() / THREAD_FLOPS
    }

    /// Makes the node `factor` times as fast.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measurements_that_cannot_be_are_named() {
        let good = Profile::relative(1.0);
        assert_eq!(good.check(), Ok(()), "an unlimited bandwidth is allowed");
        type Change = fn(&mut Profile);
        let bad: [(&str, Change); 9] = [
            ("dense.forward", |p| p.dense.forward = f64::NAN),
            ("dense.backward", |p| p.dense.backward = f64::INFINITY),
            ("expert.forward", |p| p.expert.forward = 0.0),
            ("update_bytes_per_s", |p| p.update_bytes_per_s = -1.0),
            ("threads", |p| p.threads = 0),
            ("round_trip_s", |p| p.round_trip_s = f64::INFINITY),
            ("network_s_per_byte", |p| p.network_s_per_byte = -1e-9),
            ("zone", |p| p.zone = "z".repeat(ZONE_MAX + 1)),
            ("zone", |p| p.zone = "a\nb".into()),
        ];
        for (key, change) in bad {
            let mut profile = good.clone();
            change(&mut profile);
            let error = profile.check().expect_err("a bad value").to_string();
            assert!(error.contains(key), "{key}: {error}");
        }
    }
}
