//! The options of a run, as they appear in the configuration file.

use crate::ids::Step;
use crate::invalid::InvalidValue;
use crate::limits::{
    LANES_MAX, SEQUENCE_LENGTH_MAX, SEQUENCES_MAX, SPANS_MAX, STEPS_MAX, TRACED_TOKENS_MAX, TRACES_MAX,
};
use crate::schedule::Schedule;
use serde::{Deserialize, Serialize};

/// The optimizer and its constants.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Optimizer {
    /// Adafactor (Shazeer and Stern, arXiv 1804.04235) with GLaM's settings: no first moment, a factored
    /// second one.
    Adafactor {
        /// The decay of the second moment as a function of the step.
        #[serde(default)]
        decay: Decay,
        /// The decay of the second moment, where it is constant.
        #[serde(default = "adafactor_beta2")]
        beta2: f64,
        /// Update clipping: the largest root mean square of an update.
        #[serde(default = "one")]
        clip_threshold: f64,
        /// Whether the rate is multiplied by the root mean square of the parameter, at least 1e-3 (section
        /// 8). That of position biases never is: they start at 0.
        #[serde(default = "yes")]
        scale_by_parameter: bool,
    },
    /// AdamW (Loshchilov and Hutter, arXiv 1711.05101).
    Adamw {
        /// Decay of the first moment.
        #[serde(default = "adamw_beta1")]
        beta1: f64,
        /// Decay of the second moment.
        #[serde(default = "adamw_beta2")]
        beta2: f64,
        /// Added to the root of the second moment.
        #[serde(default = "adamw_epsilon")]
        epsilon: f64,
        /// Decoupled decay of matrices, not of norms and position biases.
        #[serde(default = "adamw_decay")]
        weight_decay: f64,
    },
}

/// The decay of Adafactor's second moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// `beta2`, as in GLaM, with the correction of its start.
    #[default]
    Constant,
    /// `1 - t^-0.8` at step t (Adafactor, section 7).
    General,
}

fn adafactor_beta2() -> f64 {
    0.99
}
fn yes() -> bool {
    true
}
fn one() -> f64 {
    1.0
}
fn adamw_beta1() -> f64 {
    0.9
}
fn adamw_beta2() -> f64 {
    0.95
}
fn adamw_epsilon() -> f64 {
    1e-8
}
fn adamw_decay() -> f64 {
    0.1
}

impl Default for Optimizer {
    fn default() -> Self {
        Self::Adafactor {
            decay: Decay::Constant,
            beta2: adafactor_beta2(),
            clip_threshold: one(),
            scale_by_parameter: yes(),
        }
    }
}

impl Optimizer {
    /// Checks the bounds of all values.
    ///
    /// # Errors
    /// The first value that is out of its bounds.
    pub fn check(&self) -> Result<(), InvalidValue> {
        let wrong = |key: &str, value: f64, expected: &str| {
            Err(InvalidValue::new(format!("training.optimizer.{key}"), value, expected))
        };
        let is_positive = |value: f64| value.is_finite() && value > 0.0;
        match *self {
            Self::Adafactor { beta2, .. } if !(beta2 > 0.0 && beta2 < 1.0) => {
                wrong("beta2", beta2, "a number between 0 and 1")
            }
            Self::Adafactor { clip_threshold, .. } if !is_positive(clip_threshold) => {
                wrong("clip_threshold", clip_threshold, "a positive number")
            }
            Self::Adamw { beta1, .. } if !(0.0..1.0).contains(&beta1) => {
                wrong("beta1", beta1, "a number from 0 to below 1")
            }
            Self::Adamw { beta2, .. } if !(beta2 > 0.0 && beta2 < 1.0) => {
                wrong("beta2", beta2, "a number between 0 and 1")
            }
            Self::Adamw { epsilon, .. } if !is_positive(epsilon) => {
                wrong("epsilon", epsilon, "a positive number")
            }
            Self::Adamw { weight_decay, .. } if !(weight_decay.is_finite() && weight_decay >= 0.0) => {
                wrong("weight_decay", weight_decay, "a number that is not negative")
            }
            _ => Ok(()),
        }
    }
}

/// Training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainingOptions {
    /// The last step.
    pub steps: u64,
    /// Lanes: slices of the global batch, fixed for the life of the run.
    #[serde(default = "default_lanes")]
    pub lanes: u32,
    /// Consecutive lanes whose tokens share one product in an expert's weight gradient, fixed for the life of
    /// the run.
    #[serde(default = "default_lane_group")]
    pub lane_group: u32,
    /// Sequences in a lane.
    #[serde(default = "default_sequences")]
    pub sequences_per_lane: usize,
    /// Tokens in a sequence.
    #[serde(default = "default_sequence_length")]
    pub sequence_length: usize,
    /// The optimizer.
    #[serde(default)]
    pub optimizer: Optimizer,
    /// The learning rate.
    #[serde(default)]
    pub schedule: Schedule,
    /// What follows weights that are not finite, and `max_skipped_steps` in a row.
    #[serde(default)]
    pub on_nan: OnNan,
    /// Steps in a row that may be skipped because their gradients are not finite, before `on_nan` applies.
    #[serde(default = "default_max_skipped_steps")]
    pub max_skipped_steps: u64,
    /// The largest norm of the whole gradient; without it, no clipping.
    #[serde(default)]
    pub clip_norm: Option<f64>,
    /// Coefficient of the load-balancing loss (GLaM: 0.01).
    #[serde(default = "default_aux")]
    pub aux_loss: f64,
    /// Coefficient of the router z-loss (about 1e-3 where it is used).
    #[serde(default)]
    pub z_loss: f64,
}

fn default_lanes() -> u32 {
    8
}
fn default_lane_group() -> u32 {
    4
}
fn default_sequences() -> usize {
    4
}
fn default_sequence_length() -> usize {
    1024
}
fn default_aux() -> f64 {
    0.01
}
fn default_max_skipped_steps() -> u64 {
    10
}

/// What follows when a run is broken by numbers that are not finite (GLaM, section 6: single steps are
/// skipped, and a run restarts from an earlier healthy checkpoint).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnNan {
    /// The run goes back to the newest checkpoint, and past the data that broke it. It ends with an error
    /// when that does not help.
    #[default]
    GoBack,
    /// Steps are skipped without end; a run whose last steps were skipped ends with an error.
    Skip,
    /// The run ends with an error.
    Stop,
}

impl TrainingOptions {
    /// The defaults for a run of `steps` steps.
    #[must_use]
    pub fn new(steps: u64) -> Self {
        Self {
            steps,
            lanes: default_lanes(),
            lane_group: default_lane_group(),
            sequences_per_lane: default_sequences(),
            sequence_length: default_sequence_length(),
            optimizer: Optimizer::default(),
            schedule: Schedule::default(),
            on_nan: OnNan::default(),
            max_skipped_steps: default_max_skipped_steps(),
            clip_norm: None,
            aux_loss: default_aux(),
            z_loss: 0.0,
        }
    }

    /// Tokens in one step.
    #[must_use]
    pub fn tokens_per_step(&self) -> u64 {
        u64::from(self.lanes) * self.tokens_per_lane() as u64
    }

    /// Tokens in one lane.
    #[must_use]
    pub fn tokens_per_lane(&self) -> usize {
        self.sequences_per_lane * self.sequence_length
    }

    /// The last step of the run.
    #[must_use]
    pub fn last_step(&self) -> Step {
        Step(self.steps)
    }

    /// Checks the bounds of all values.
    ///
    /// # Errors
    /// The first value that is out of its bounds.
    pub fn check(&self) -> Result<(), InvalidValue> {
        let bounded = [
            ("steps", self.steps, STEPS_MAX),
            ("lanes", self.lanes.into(), LANES_MAX),
            ("lane_group", self.lane_group.into(), LANES_MAX),
            ("sequences_per_lane", self.sequences_per_lane as u64, SEQUENCES_MAX),
            ("sequence_length", self.sequence_length as u64, SEQUENCE_LENGTH_MAX),
            ("max_skipped_steps", self.max_skipped_steps, STEPS_MAX),
        ];
        for (key, value, most) in bounded {
            if value == 0 || value > most {
                let expected = format!("a number from 1 to {most}");
                return Err(InvalidValue::new(format!("training.{key}"), value, expected));
            }
        }
        for (key, value) in [("aux_loss", self.aux_loss), ("z_loss", self.z_loss)] {
            if !(value.is_finite() && value >= 0.0) {
                let expected = "a number that is not negative";
                return Err(InvalidValue::new(format!("training.{key}"), value, expected));
            }
        }
        if let Some(norm) = self.clip_norm.filter(|norm| !(norm.is_finite() && *norm > 0.0)) {
            let expected = "a positive number; leave it out to clip nothing";
            return Err(InvalidValue::new("training.clip_norm", norm, expected));
        }
        self.optimizer.check()?;
        self.schedule.check(self.steps)
    }
}

/// The cluster of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClusterOptions {
    /// Replicas of every expert, each on another node; fewer where there are fewer nodes.
    pub replication: usize,
    /// Nodes whose gradients one node adds, and to which it passes the sum; more nodes form a tree. At least
    /// 2.
    pub fan_in: u32,
    /// Nodes to wait for before the first step.
    pub nodes: usize,
    /// Silence after which a node counts as lost, in milliseconds; at most 10,000.
    pub node_timeout_ms: u64,
    /// The timeout of a step, of the move to a new placement and of a checkpoint, in milliseconds; then it is
    /// retried.
    pub step_timeout_ms: u64,
    /// The longest wait for enough nodes, in milliseconds, at the start and after a loss.
    pub gather_timeout_ms: u64,
    /// The longest wait of nodes, with their state, for a lost supervisor, in milliseconds.
    pub supervisor_timeout_ms: u64,
    /// The longest wait of a restarted supervisor for nodes with last copies of shards, in milliseconds.
    pub return_timeout_ms: u64,
    /// The lifetime of a node's certificate, in milliseconds; nodes renew theirs after half of it.
    pub certificate_lifetime_ms: u64,
    /// Steps within which the replicas of every shard are compared bit by bit; 0 compares nothing.
    pub compare_within: u64,
    /// Whether nodes run a benchmark before they are placed; otherwise their number of threads counts.
    pub measure: bool,
    /// Whether measured speeds and expert loads may change the placement.
    pub rebalance: bool,
    /// Bytes that one placement may move to even out the nodes, besides necessary moves.
    pub rebalance_bytes: u64,
}

impl Default for ClusterOptions {
    fn default() -> Self {
        Self {
            replication: 2,
            fan_in: 8,
            nodes: 1,
            node_timeout_ms: 2_000,
            step_timeout_ms: 600_000,
            gather_timeout_ms: 120_000,
            supervisor_timeout_ms: 120_000,
            return_timeout_ms: 20_000,
            certificate_lifetime_ms: 7 * 24 * 3_600_000,
            compare_within: 16,
            measure: true,
            rebalance: true,
            rebalance_bytes: 1 << 30,
        }
    }
}

/// Checkpoints of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointOptions {
    /// Steps between checkpoints; 0 writes only the last.
    pub every: u64,
    /// Checkpoints that are kept.
    pub keep: usize,
    /// The address of a folder to which each checkpoint is copied: `s3://`, `gs://`, `az://` or `file://`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store: Option<String>,
}

impl Default for CheckpointOptions {
    fn default() -> Self {
        Self { every: 100, keep: 3, store: None }
    }
}

/// Measurements of the held-out loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ValidationOptions {
    /// Steps between measurements, besides those before the first and after the last step; 0 measures only
    /// then.
    pub every: u64,
    /// Rounds of `lanes` lanes in one measurement; 0 measures nothing.
    pub rounds: u64,
}

impl Default for ValidationOptions {
    fn default() -> Self {
        Self { every: 0, rounds: 2 }
    }
}

/// Telemetry of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TelemetryOptions {
    /// Steps between traced steps, whose expert load is logged, too; 0 traces none. The step after a change
    /// of the cluster is traced as well.
    pub sample_every: u64,
    /// Tokens of each lane whose routing is in the trace.
    pub tokens_per_lane: usize,
    /// The approximate limit of spans in a traced step: lanes beyond it have one span each.
    pub spans_per_step: usize,
    /// Traces that are kept with the run.
    pub keep: usize,
    /// The trace collector; `OTEL_EXPORTER_OTLP_ENDPOINT` of a process takes precedence.
    pub endpoint: Option<String>,
    /// The collector's protocol; `OTEL_EXPORTER_OTLP_PROTOCOL` of a process takes precedence.
    pub protocol: OtlpProtocol,
}

impl Default for TelemetryOptions {
    fn default() -> Self {
        Self {
            sample_every: 50,
            tokens_per_lane: 2,
            spans_per_step: 500,
            keep: 100,
            endpoint: None,
            protocol: OtlpProtocol::Grpc,
        }
    }
}

/// The protocol of a trace collector (OpenTelemetry).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum OtlpProtocol {
    /// gRPC, usually on port 4317.
    #[serde(rename = "grpc")]
    Grpc,
    /// Protocol buffers over HTTP, usually on port 4318.
    #[serde(rename = "http/protobuf")]
    HttpProtobuf,
}

impl TelemetryOptions {
    /// Checks the bounds of all values.
    ///
    /// # Errors
    /// The first value that is out of its bounds.
    pub fn check(&self) -> Result<(), InvalidValue> {
        let bounded = [
            ("tokens_per_lane", self.tokens_per_lane, 0, TRACED_TOKENS_MAX),
            ("spans_per_step", self.spans_per_step, 1, SPANS_MAX),
            ("keep", self.keep, 1, TRACES_MAX),
        ];
        for (key, value, least, most) in bounded {
            if !(least..=most).contains(&value) {
                let expected = format!("a number from {least} to {most}");
                return Err(InvalidValue::new(format!("telemetry.{key}"), value, expected));
            }
        }
        let is_url = |url: &str| url.starts_with("http://") || url.starts_with("https://");
        match &self.endpoint {
            Some(url) if !is_url(url) => {
                let expected = "a URL that begins with http:// or https://";
                Err(InvalidValue::new("telemetry.endpoint", format!("{url:?}"), expected))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adamw(change: impl Fn(&mut f64, &mut f64, &mut f64, &mut f64)) -> Optimizer {
        let (mut beta1, mut beta2, mut epsilon, mut weight_decay) =
            (adamw_beta1(), adamw_beta2(), adamw_epsilon(), adamw_decay());
        change(&mut beta1, &mut beta2, &mut epsilon, &mut weight_decay);
        Optimizer::Adamw { beta1, beta2, epsilon, weight_decay }
    }

    fn adafactor(beta2: f64, clip_threshold: f64) -> Optimizer {
        Optimizer::Adafactor { decay: Decay::Constant, beta2, clip_threshold, scale_by_parameter: true }
    }

    #[test]
    fn constants_of_optimizers_that_would_poison_or_freeze_a_run_are_named() {
        let bad = [
            ("beta2", adafactor(1.0, 1.0)),
            ("beta2", adafactor(f64::NAN, 1.0)),
            ("clip_threshold", adafactor(0.99, 0.0)),
            ("clip_threshold", adafactor(0.99, -1.0)),
            ("beta1", adamw(|beta1, _, _, _| *beta1 = 1.0)),
            ("beta2", adamw(|_, beta2, _, _| *beta2 = 1.5)),
            ("epsilon", adamw(|_, _, epsilon, _| *epsilon = 0.0)),
            ("weight_decay", adamw(|_, _, _, decay| *decay = -0.1)),
        ];
        for (key, optimizer) in bad {
            let options = TrainingOptions { optimizer, ..TrainingOptions::new(10) };
            let error = options.check().expect_err("a bad value").to_string();
            assert!(error.starts_with(&format!("training.optimizer.{key} = ")), "{key}: {error}");
        }
        for good in [Optimizer::default(), adamw(|_, _, _, _| {}), adamw(|beta1, _, _, _| *beta1 = 0.0)] {
            assert_eq!(good.check(), Ok(()));
        }
    }

    #[test]
    fn a_clip_of_nothing_is_refused_with_the_way_to_clip_nothing() {
        for norm in [0.0, -1.0, f64::INFINITY, f64::NAN] {
            let options = TrainingOptions { clip_norm: Some(norm), ..TrainingOptions::new(10) };
            let error = options.check().expect_err("a bad value").to_string();
            assert!(error.contains("training.clip_norm") && error.contains("leave it out"), "{error}");
        }
        assert_eq!(TrainingOptions { clip_norm: Some(1.0), ..TrainingOptions::new(10) }.check(), Ok(()));
    }
}
