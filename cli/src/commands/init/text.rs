//! The text of a new configuration.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;
use volary_core::architecture::Architecture;
use volary_core::dispatch::Capacity;
use volary_core::options::{ClusterOptions, TrainingOptions};
use volary_core::planner::Member;

/// Steps of a new run.
const STEPS: u64 = 1000;
/// Lanes for each thread of the cluster: enough for threads of unlike speeds, and for nodes that join.
const LANES_PER_THREAD: usize = 3;
/// Lanes whose gradients are summed before they are sent.
const LANE_GROUP: u32 = 2;
/// The width of the residual stream from which the paper's training is taken over.
const LARGE: usize = 512;

/// Tokens of a sequence of small models, and where memory is short.
const SHORT: usize = 256;

/// How the work is cut.
#[derive(Clone)]
pub(super) struct Layout {
    pub(super) training: TrainingOptions,
    pub(super) replication: usize,
}

impl Layout {
    /// The layouts from the roomiest on: with copies of each expert, without, and with little work in a step,
    /// whose gradients need less memory.
    pub(super) fn candidates(architecture: &Architecture, members: &[Member]) -> [Self; 3] {
        let roomy = Self::roomy(architecture, members);
        let alone = Self { replication: 1, ..roomy.clone() };
        // One sum of gradients for each node.
        let threads = members.iter().map(|member| member.profile.threads).sum::<usize>() as u32;
        let groups = (members.len() as u32).max(2);
        let lane_group = threads.div_ceil(groups);
        let training = TrainingOptions {
            lanes: groups * lane_group,
            lane_group,
            sequences_per_lane: 1,
            sequence_length: SHORT,
            ..roomy.training
        };
        [roomy, alone, Self { training, replication: 1 }]
    }

    fn roomy(architecture: &Architecture, members: &[Member]) -> Self {
        let threads: usize = members.iter().map(|member| member.profile.threads).sum();
        let groups = (LANES_PER_THREAD * threads).div_ceil(LANE_GROUP as usize).max(2) as u32;
        let is_large = architecture.hidden >= LARGE;
        let training = TrainingOptions {
            lanes: groups * LANE_GROUP,
            lane_group: LANE_GROUP,
            sequences_per_lane: if is_large { 1 } else { 4 },
            sequence_length: if is_large { 1024 } else { SHORT },
            ..TrainingOptions::new(STEPS)
        };
        Self { training, replication: ClusterOptions::default().replication.min(members.len()) }
    }
}

/// A new configuration.
pub(super) struct Text<'a> {
    pub(super) preset: Option<&'a str>,
    pub(super) architecture: &'a Architecture,
    pub(super) layout: &'a Layout,
    pub(super) data: &'a [String],
    /// The threads of each node, if the nodes are processes of this machine.
    pub(super) local_threads: Option<usize>,
    pub(super) members: &'a [Member],
    /// The predicted duration of a step.
    pub(super) step_s: f64,
}

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "# Written by `volary init`. `volary plan FILE` shows the costs of the model, `volary train FILE`"
        )?;
        writeln!(f, "# trains it, and every value can be changed with `--set KEY.PATH=VALUE`.\n")?;
        writeln!(
            f,
            "[run]\nname = \"run\"\n# The seed of the weights and of the order of the text.\nseed = 1\n"
        )?;
        self.data(f)?;
        self.model(f)?;
        self.training(f)?;
        self.cluster(f)?;
        writeln!(
            f,
            "[checkpoint]\n# Steps between checkpoints, and how many stay.\nevery = 100\nkeep = 3\n"
        )?;
        writeln!(
            f,
            "[validation]\n# Steps between computations of the held-out loss.\nevery = 100\nrounds = 4"
        )
    }
}

impl Text<'_> {
    fn data(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "[data]")?;
        writeln!(
            f,
            "# The tokenizer is trained on a sample of the text, unless `tokenizer` names a tokenizer.json."
        )?;
        writeln!(f, "vocabulary = {}", self.architecture.vocabulary)?;
        writeln!(
            f,
            "# Text files, folders, globs, JSONL and Parquet; sequences are drawn in proportion to the weights."
        )?;
        if self.data.is_empty() {
            writeln!(f, "# Replace this path.")?;
        }
        writeln!(f, "sources = [")?;
        let example = ["~/text".to_owned()];
        let paths = if self.data.is_empty() { &example } else { self.data };
        let mut names = BTreeSet::new();
        for path in paths {
            let (name, path) =
                (toml::Value::from(unused_name(path, &mut names)), toml::Value::from(path.as_str()));
            writeln!(f, "  {{ name = {name}, path = {path}, weight = 1.0 }},")?;
        }
        writeln!(f, "]\n")?;
        writeln!(f, "# Copies and near-duplicates of earlier documents are left out.\n[data.duplicates]\n")
    }

    fn model(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let a = self.architecture;
        let (all, activated) =
            (crate::units::short(a.parameters()), crate::units::short(a.activated_parameters()));
        writeln!(f, "# {all} parameters, of which each token activates {activated}.\n[model]")?;
        if let Some(preset) = self.preset {
            return writeln!(
                f,
                "# The shape in the paper's table 4; single keys beside it override it.\npreset = \"{preset}\"\n"
            );
        }
        writeln!(f, "vocabulary = {}\nhidden = {}\nlayers = {}", a.vocabulary, a.hidden, a.layers)?;
        writeln!(f, "heads = {}\nhead_dim = {}\nfeed_forward = {}", a.heads, a.head_dim, a.feed_forward)?;
        writeln!(f, "# In every other layer; 0 makes the model dense.\nexperts = {}", a.experts)?;
        match a.capacity {
            Capacity::Factor(factor) => {
                writeln!(f, "# Tokens beyond this multiple of an expert's even share pass it by.")?;
                writeln!(f, "capacity = {{ factor = {factor:?} }}\n")
            }
            Capacity::Dropless => writeln!(f),
        }
    }

    fn training(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let t = &self.layout.training;
        writeln!(
            f,
            "# A step has {} tokens and takes about {} by the plan.",
            t.tokens_per_step(),
            seconds(self.step_s)
        )?;
        writeln!(f, "[training]\nsteps = {}", t.steps)?;
        writeln!(
            f,
            "# Lanes are what nodes share; they fix the sums of a step, so the number of nodes changes no bit."
        )?;
        writeln!(f, "lanes = {}\nlane_group = {}", t.lanes, t.lane_group)?;
        writeln!(
            f,
            "sequences_per_lane = {}\nsequence_length = {}",
            t.sequences_per_lane, t.sequence_length
        )?;
        if self.architecture.hidden >= LARGE {
            writeln!(f, "# The optimizer is the paper's Adafactor, with its rate of 0.01 for 10,000 steps.\n")
        } else {
            writeln!(f, "schedule = {{ kind = \"linear\", rate = 0.06, warmup_steps = 10 }}\n")
        }
    }

    fn cluster(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "[cluster]")?;
        match self.local_threads {
            Some(threads) => {
                let nodes = self.members.len();
                writeln!(
                    f,
                    "# Node processes of `volary train` on this machine, {threads} of its threads for each."
                )?;
                writeln!(f, "nodes = {nodes}")?;
            }
            None => writeln!(
                f,
                "# Nodes join with `volary node --join ADDRESS`; their number may change at any time."
            )?,
        }
        match self.layout.replication {
            1 => writeln!(
                f,
                "# Copies of each expert; more do not fit, and a node that dies goes back to a checkpoint."
            )?,
            _ => writeln!(f, "# Copies of each expert, so that a node that dies costs nothing.")?,
        }
        writeln!(f, "replication = {}\n", self.layout.replication)
    }
}

/// A name for a source: the stem of its path, and a number if that is taken.
fn unused_name(path: &str, taken: &mut BTreeSet<String>) -> String {
    let stem = Path::new(path).components().rev().find_map(|part| {
        let part = part.as_os_str().to_string_lossy();
        let stem = part.split('.').next().unwrap_or_default().to_ascii_lowercase();
        let plain: String =
            stem.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').take(40).collect();
        (!plain.is_empty()).then_some(plain)
    });
    let stem = stem.unwrap_or_else(|| "text".into());
    let numbered = (2..).map(|number| format!("{stem}-{number}"));
    let name =
        std::iter::once(stem.clone()).chain(numbered).find(|name| !taken.contains(name)).unwrap_or(stem);
    taken.insert(name.clone());
    name
}

/// A duration for a reader.
pub(super) fn seconds(seconds: f64) -> String {
    match seconds {
        ..0.095 => format!("{:.0} ms", 1e3 * seconds),
        ..9.5 => format!("{seconds:.1} s"),
        _ => format!("{seconds:.0} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_have_names_of_their_own() {
        let mut taken = BTreeSet::new();
        let names = ["web/*.jsonl.gz", "~/Web", "/data/web.txt", "*", "über/a b.txt"]
            .map(|path| unused_name(path, &mut taken));
        assert_eq!(names, ["web", "web-2", "web-3", "text", "ab"]);
    }
}
