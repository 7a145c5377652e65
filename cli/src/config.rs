//! The configuration file: one TOML document, checked as a whole before anything starts.

use serde::{Deserialize, Serialize};
use std::fmt::Write as _;
use std::path::Path;
use volary_core::architecture::Architecture;
use volary_core::machine::Settings;
use volary_core::options::{
    CheckpointOptions, ClusterOptions, TelemetryOptions, TrainingOptions, ValidationOptions,
};
use volary_data::DataOptions;

/// A run, as its file describes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Name and seed.
    pub run: RunOptions,
    /// What it trains on.
    pub data: DataOptions,
    /// The model's shape.
    pub model: Architecture,
    /// How it trains.
    pub training: TrainingOptions,
    /// How it uses its cluster.
    #[serde(default)]
    pub cluster: ClusterOptions,
    /// When it writes checkpoints.
    #[serde(default)]
    pub checkpoint: CheckpointOptions,
    /// When it measures the held-out loss.
    #[serde(default)]
    pub validation: ValidationOptions,
    /// What it tells.
    #[serde(default)]
    pub telemetry: TelemetryOptions,
}

/// Name and seed of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunOptions {
    /// The run's name: letters, digits, `-`, `_` and `.`.
    pub name: String,
    /// The seed of everything random.
    #[serde(default)]
    pub seed: u64,
    /// What the finished run shows a sample for.
    #[serde(default = "default_prompt")]
    pub sample_prompt: String,
}

fn default_prompt() -> String {
    "The ".into()
}

impl Config {
    /// Reads a file and applies `--set key.path=value` to it.
    ///
    /// # Errors
    /// One line that names the file, the line, the key and what was expected.
    pub fn load(path: &Path, set: &[String]) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| anyhow::anyhow!("config {}: {error}", path.display()))?;
        Self::parse(&text, &path.display().to_string(), set)
    }

    /// As [`Config::load`], from text; `name` is what errors call it.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str, name: &str, set: &[String]) -> anyhow::Result<Self> {
        let mut table: toml::Table =
            toml::from_str(text).map_err(|error| anyhow::anyhow!("{}", explain(name, text, &error)))?;
        let alone = toml::from_str::<Self>(text);
        match &alone {
            // A key that the file leaves out may be given by --set.
            Err(error) if set.is_empty() || !error.message().starts_with("missing field") => {
                anyhow::bail!("{}", explain(name, text, error));
            }
            _ => {}
        }
        for assignment in set {
            assign(&mut table, assignment)?;
        }
        let config: Self = match alone {
            Ok(config) if set.is_empty() => config,
            _ => table.try_into().map_err(|error: toml::de::Error| {
                anyhow::anyhow!("--set {}: {}", set.join(" --set "), nearest(error.message()))
            })?,
        };
        config.check().map_err(|reason| anyhow::anyhow!("{name}: {reason}"))?;
        Ok(config)
    }

    /// What no single key shows.
    fn check(&self) -> Result<(), String> {
        let name = &self.run.name;
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || name.starts_with('.') || name.len() > 100 || !name.chars().all(plain) {
            return Err(format!("run.name = {name:?}: expected up to 100 letters, digits, '-', '_' and '.'"));
        }
        self.model.check().map_err(|error| error.to_string())?;
        self.training.check().map_err(|error| error.to_string())?;
        self.telemetry.check().map_err(|error| error.to_string())?;
        if self.model.vocabulary < self.data.vocabulary && self.data.tokenizer.is_none() {
            return Err(format!(
                "data.vocabulary = {}: expected at most model.vocabulary = {}",
                self.data.vocabulary, self.model.vocabulary
            ));
        }
        if self.cluster.replication == 0 {
            return Err("cluster.replication = 0: expected at least 1".into());
        }
        if self.cluster.fan_in < 2 {
            return Err(format!("cluster.fan_in = {}: expected at least 2", self.cluster.fan_in));
        }
        let lifetime = self.cluster.certificate_lifetime_ms;
        if !(1_000..=315_360_000_000).contains(&lifetime) {
            return Err(format!(
                "cluster.certificate_lifetime_ms = {lifetime}: expected 1000 to 315360000000 (ten years)"
            ));
        }
        let timeout = self.cluster.node_timeout_ms;
        if !(100..=10_000).contains(&timeout) {
            return Err(format!("cluster.node_timeout_ms = {timeout}: expected 100 to 10000"));
        }
        Ok(())
    }

    /// What the supervisor's state machine is told.
    #[must_use]
    pub fn settings(&self) -> Settings {
        Settings {
            architecture: self.model.clone(),
            training: self.training.clone(),
            cluster: self.cluster.clone(),
            checkpoint: self.checkpoint.clone(),
            validation: self.validation.clone(),
        }
    }

    /// What must be the same when a run goes on: everything that the mathematics depends on.
    #[must_use]
    pub fn identity(&self) -> String {
        let mut training = self.training.clone();
        // A run may be prolonged under a schedule that does not look at its end.
        if matches!(training.schedule, volary_core::schedule::Schedule::InverseSquareRoot { .. }) {
            training.steps = 0;
        }
        let parts = (self.run.seed, &self.model, &training, &self.data.sources, self.data.vocabulary);
        serde_json::to_string(&parts).unwrap_or_default()
    }
}

/// Applies `key.path=value`, where the value is TOML or, failing that, a string.
fn assign(table: &mut toml::Table, assignment: &str) -> anyhow::Result<()> {
    let Some((path, value)) = assignment.split_once('=') else {
        anyhow::bail!("--set {assignment}: expected key.path=value");
    };
    let parsed = toml::from_str::<toml::Table>(&format!("value = {value}"));
    let value = parsed.ok().and_then(|mut t| t.remove("value")).unwrap_or_else(|| value.into());
    let mut keys: Vec<&str> = path.split('.').map(str::trim).collect();
    let Some(last) = keys.pop().filter(|key| !key.is_empty()) else {
        anyhow::bail!("--set {assignment}: expected key.path=value");
    };
    let mut at = table;
    for key in keys {
        let next = at.entry(key).or_insert_with(|| toml::Table::new().into());
        at = next.as_table_mut().ok_or_else(|| anyhow::anyhow!("--set {assignment}: {key} is no section"))?;
    }
    at.insert(last.into(), value);
    Ok(())
}

/// One line for an error of the TOML parser: file, line, key, what was expected.
pub(crate) fn explain(name: &str, text: &str, error: &toml::de::Error) -> String {
    let mut line = name.to_owned();
    if let Some(span) = error.span() {
        let before = &text[..span.start.min(text.len())];
        let number = before.matches('\n').count() + 1;
        // Writing to a string cannot fail.
        let _ = write!(line, ", line {number}");
        let section =
            before.lines().rev().find_map(|l| l.trim().strip_prefix('[').map(|s| s.trim_matches(['[', ']'])));
        let key = text.lines().nth(number - 1).and_then(|l| l.split_once('=')).map(|(key, _)| key.trim());
        match (section, key) {
            (Some(section), Some(key)) => drop(write!(line, ", key {section}.{key}")),
            (None, Some(key)) => drop(write!(line, ", key {key}")),
            (Some(section), None) => drop(write!(line, ", section {section}")),
            (None, None) => {}
        }
    }
    format!("{line}: {}", nearest(error.message()))
}

/// Adds the nearest known key to an error about an unknown one.
pub(crate) fn nearest(message: &str) -> String {
    let message = message.lines().collect::<Vec<_>>().join(" ");
    let mut quoted = message.split('`').skip(1).step_by(2);
    let Some(unknown) = message.starts_with("unknown").then(|| quoted.next()).flatten() else {
        return message;
    };
    let best =
        quoted.max_by(|a, b| strsim::jaro_winkler(a, unknown).total_cmp(&strsim::jaro_winkler(b, unknown)));
    match best {
        Some(best) if strsim::jaro_winkler(best, unknown) > 0.6 => {
            format!("{message}; did you mean `{best}`?")
        }
        _ => message,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
[run]
name = "t"
[data]
sources = [{ name = "a", path = "a.txt", weight = 1.0 }]
vocabulary = 300
[model]
vocabulary = 300
hidden = 8
layers = 2
heads = 2
head_dim = 4
feed_forward = 16
experts = 4
[training]
steps = 5
"#;

    fn error(text: &str, set: &[&str]) -> String {
        let set: Vec<String> = set.iter().map(|s| (*s).to_owned()).collect();
        Config::parse(text, "c.toml", &set).expect_err("an error").to_string()
    }

    #[test]
    fn an_unknown_key_names_its_line_and_the_nearest_known_one() {
        let message = error(&GOOD.replace("steps = 5", "steps = 5\nlanez = 3"), &[]);
        assert!(
            message.starts_with("c.toml, line 17, key training.lanez: unknown field `lanez`"),
            "{message}"
        );
        assert!(message.ends_with("did you mean `lanes`?"), "{message}");
        assert_eq!(message.lines().count(), 1);
    }

    #[test]
    fn a_wrong_type_names_line_key_and_what_was_expected() {
        let message = error(&GOOD.replace("steps = 5", "steps = \"many\""), &[]);
        assert!(
            message.contains("line 16, key training.steps") && message.contains("expected u64"),
            "{message}"
        );
    }

    #[test]
    fn a_value_out_of_range_names_its_key() {
        assert!(error(&GOOD.replace("hidden = 8", "hidden = 0"), &[]).contains("model.hidden = 0: expected"));
        assert!(error(GOOD, &["run.name=../up"]).contains("run.name"));
    }

    #[test]
    fn set_takes_a_toml_value_or_a_plain_string_for_any_key() {
        let set = [
            "training.steps=9".to_owned(),
            "run.name=other".to_owned(),
            "model.capacity={ factor = 1.5 }".to_owned(),
        ];
        let config = Config::parse(GOOD, "c.toml", &set).expect("a config");
        assert_eq!((config.training.steps, config.run.name.as_str()), (9, "other"));
        assert_eq!(config.model.capacity, volary_core::dispatch::Capacity::Factor(1.5));
        assert!(error(GOOD, &["training.stepz=9"]).contains("did you mean `steps`"));
        assert!(error(GOOD, &["nonsense"]).contains("expected key.path=value"));
    }

    #[test]
    fn a_key_that_is_missing_in_the_file_may_come_from_set() {
        let text = GOOD.replace("steps = 5", "");
        assert!(error(&text, &[]).contains("missing field `steps`"));
        assert!(Config::parse(&text, "c.toml", &["training.steps=3".to_owned()]).is_ok());
    }
}
