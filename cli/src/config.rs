//! The configuration file: one TOML document, checked as a whole before anything starts.

use crate::document;
use crate::limits::{CERTIFICATE_LIFETIME_MS, NODE_TIMEOUT_MS, RUN_NAME_BYTES_MAX};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use volary_core::InvalidValue;
use volary_core::architecture::{Architecture, presets};
use volary_core::machine::Settings;
use volary_core::options::{
    CheckpointOptions, ClusterOptions, TelemetryOptions, TrainingOptions, ValidationOptions,
};
use volary_data::DataOptions;

/// The configuration of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Its name and seed.
    pub run: RunOptions,
    /// The text.
    pub data: DataOptions,
    /// The shape of the model.
    pub model: Architecture,
    /// The training.
    pub training: TrainingOptions,
    /// The cluster.
    #[serde(default)]
    pub cluster: ClusterOptions,
    /// The schedule of checkpoints.
    #[serde(default)]
    pub checkpoint: CheckpointOptions,
    /// The schedule of the held-out loss.
    #[serde(default)]
    pub validation: ValidationOptions,
    /// Traces.
    #[serde(default)]
    pub telemetry: TelemetryOptions,
}

/// Name and seed of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunOptions {
    /// The name: letters, digits, `-`, `_` and `.`.
    pub name: String,
    /// The seed of all random draws.
    #[serde(default)]
    pub seed: u64,
    /// The prompt of the sample that `volary train` prints at the end; default the first words of the
    /// held-out text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sample_prompt: Option<String>,
}

/// Whether the model is a row of the paper's table 4, with single keys overridden.
fn uses_preset(table: &toml::Table) -> bool {
    table.get("model").and_then(|model| model.get("preset")).is_some()
}

/// The shape of a preset.
fn preset(name: &toml::Value) -> Result<Architecture, InvalidValue> {
    let all = presets();
    let found = all.iter().find(|preset| name.as_str() == Some(preset.name));
    found.map(|preset| preset.architecture.clone()).ok_or_else(|| {
        let names: Vec<&str> = all.iter().map(|preset| preset.name).collect();
        InvalidValue::new("model.preset", name, format!("one of {}", names.join(", ")))
    })
}

impl Config {
    /// Reads a file and applies `--set key.path=value` to it.
    ///
    /// # Errors
    /// One line that names the file, the line, the key and the expected value.
    pub fn load(path: &Path, set: &[String]) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| anyhow::anyhow!("config {}: {error}", path.display()))?;
        let mut config = Self::parse(&text, &path.display().to_string(), set)?;
        // Manifests lie beside the configuration that names them.
        config.data.resolve_paths(path.parent().unwrap_or_else(|| Path::new("")))?;
        Ok(config)
    }

    /// As [`Config::load`], from text; errors call it `name`.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str, name: &str, set: &[String]) -> anyhow::Result<Self> {
        let table: toml::Table = document::parse(text, name)?;
        let config = match document::parse::<Self>(text, name) {
            Ok(config) if set.is_empty() => config,
            // A key that the file leaves out may come from a preset or from --set.
            Err(error) if !uses_preset(&table) && (set.is_empty() || !error.is_missing_key()) => {
                return Err(error.into());
            }
            Ok(_) | Err(_) => Self::assigned(table, name, set)?,
        };
        config.check().map_err(|error| anyhow::anyhow!("{name}: {error}"))?;
        Ok(config)
    }

    /// As [`Config::parse`], for a model whose shape and tokenizer are given: the text must have neither.
    ///
    /// # Errors
    /// As [`Config::parse`].
    pub fn with_model(text: &str, name: &str, set: &[String], model: &Architecture) -> anyhow::Result<Self> {
        let mut table: toml::Table = document::parse(text, name)?;
        let tokenizer = table.get("data").and_then(|data| data.get("tokenizer"));
        for (key, found) in [("model", table.get("model")), ("data.tokenizer", tokenizer)] {
            if found.is_some() {
                anyhow::bail!("{name}: {key}: expected none, since the imported model has its own");
            }
        }
        table.insert("model".into(), toml::Value::try_from(model)?);
        let mut config = Self::assigned(table, name, set)?;
        if config.model != *model {
            anyhow::bail!("--set model: expected nothing, since the imported model has its own shape");
        }
        // Of a tokenizer that is trained, which this one is not.
        config.data.vocabulary = config.data.vocabulary.min(model.vocabulary);
        config.check().map_err(|error| anyhow::anyhow!("{name}: {error}"))?;
        Ok(config)
    }

    /// The configuration of a file with assignments. An error names the assignment with which it began, or
    /// the file.
    fn assigned(mut table: toml::Table, name: &str, set: &[String]) -> anyhow::Result<Self> {
        let error_of = |table: &toml::Table| Self::expanded(table).err().map(|error| error.to_string());
        let mut told = error_of(&table);
        let mut wrong = None;
        for assignment in set {
            assign(&mut table, assignment)?;
            let error = error_of(&table);
            if error != told {
                (told, wrong) = (error, Some(assignment));
            }
        }
        Self::expanded(&table).map_err(|error| match wrong {
            Some(assignment) => anyhow::anyhow!("--set {assignment}: {error}"),
            None => anyhow::anyhow!("{name}: {error}"),
        })
    }

    /// The configuration of a table, with the shape of its preset.
    fn expanded(table: &toml::Table) -> anyhow::Result<Self> {
        let mut table = table.clone();
        if let Some(model) = table.get_mut("model").and_then(toml::Value::as_table_mut)
            && let Some(name) = model.remove("preset")
        {
            let mut shape = toml::Table::try_from(preset(&name)?)?;
            shape.extend(std::mem::take(model));
            *model = shape;
        }
        Ok(document::convert(table.into())?)
    }

    /// Checks values that depend on one another, and those with bounds.
    fn check(&self) -> Result<(), InvalidValue> {
        let name = &self.run.name;
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        let is_name = !name.is_empty() && !name.starts_with('.') && name.len() <= RUN_NAME_BYTES_MAX;
        if !is_name || !name.chars().all(is_plain) {
            let expected = format!("up to {RUN_NAME_BYTES_MAX} letters, digits, '-', '_' and '.'");
            return Err(InvalidValue::new("run.name", format!("{name:?}"), expected));
        }
        self.model.check()?;
        self.training.check()?;
        volary_protocol::bounds::check(&self.model, &self.training)?;
        self.telemetry.check()?;
        let (vocabulary, most) = (self.data.vocabulary, self.model.vocabulary);
        if most < vocabulary && self.data.tokenizer.is_none() {
            let expected = format!("at most model.vocabulary = {most}");
            return Err(InvalidValue::new("data.vocabulary", vocabulary, expected));
        }
        let cluster = &self.cluster;
        if cluster.replication == 0 {
            return Err(InvalidValue::new("cluster.replication", 0, "at least 1"));
        }
        if cluster.fan_in < 2 {
            return Err(InvalidValue::new("cluster.fan_in", cluster.fan_in, "at least 2"));
        }
        let lifetime = cluster.certificate_lifetime_ms;
        if !CERTIFICATE_LIFETIME_MS.contains(&lifetime) {
            let expected = "1000 to 315360000000 (ten years)";
            return Err(InvalidValue::new("cluster.certificate_lifetime_ms", lifetime, expected));
        }
        let timeout = cluster.node_timeout_ms;
        if !NODE_TIMEOUT_MS.contains(&timeout) {
            return Err(InvalidValue::new("cluster.node_timeout_ms", timeout, "100 to 10000"));
        }
        Ok(())
    }

    /// The settings of the supervisor's state machine.
    #[must_use]
    pub fn settings(&self) -> Settings {
        Settings {
            architecture: self.model.clone(),
            training: self.training.clone(),
            cluster: self.cluster.clone(),
            checkpoint: self.checkpoint.clone(),
            validation: self.validation.clone(),
            stay: false,
        }
    }

    /// The values that must not change when a run resumes, by key: all that the mathematics depends on. The
    /// text itself is known by the hashes of its tokens, not by its path.
    fn identity_values(&self) -> BTreeMap<String, Value> {
        let mut training = self.training.clone();
        // A run may be prolonged under a schedule that does not depend on its end.
        if matches!(training.schedule, volary_core::schedule::Schedule::InverseSquareRoot { .. }) {
            training.steps = 0;
        }
        let mut data = volary_data::DataOptions { cache: None, tokenizer: None, ..self.data.clone() };
        for source in &mut data.sources {
            source.manifest = None;
            source.path.clear();
        }
        let mut values = BTreeMap::new();
        flatten("run.seed", serde_json::json!(self.run.seed), &mut values);
        let sections = [
            ("model", serde_json::to_value(&self.model)),
            ("training", serde_json::to_value(&training)),
            ("data", serde_json::to_value(&data)),
        ];
        for (name, section) in sections {
            flatten(name, section.unwrap_or_default(), &mut values);
        }
        values
    }

    /// A text that is equal for equal runs.
    #[must_use]
    pub fn identity(&self) -> String {
        serde_json::to_string(&self.identity_values()).unwrap_or_default()
    }

    /// The first key in which this configuration is of another run than `before`, with both values.
    #[must_use]
    pub fn first_difference(&self, before: &Self) -> Option<String> {
        let (now, then) = (self.identity_values(), before.identity_values());
        let shown = |value: Option<&Value>| value.map_or_else(|| "absent".into(), Value::to_string);
        let key = now.keys().chain(then.keys()).find(|key| now.get(*key) != then.get(*key));
        if let Some(key) = key {
            return Some(format!("{key} was {}, now {}", shown(then.get(key)), shown(now.get(key))));
        }
        let display =
            |path: Option<&Path>| path.map_or_else(|| "absent".into(), |path| path.display().to_string());
        let (now, then) = (&self.data, &before.data);
        if !is_same_file(now.tokenizer.as_deref(), then.tokenizer.as_deref()) {
            let (then, now) = (display(then.tokenizer.as_deref()), display(now.tokenizer.as_deref()));
            return Some(format!("data.tokenizer was {then}, now {now}"));
        }
        let paths = now.sources.iter().zip(&then.sources).enumerate();
        paths.into_iter().find_map(|(at, (now, then))| {
            let same = is_same_file(Some(Path::new(&now.path)), Some(Path::new(&then.path)));
            (!same).then(|| format!("data.sources.{at}.path was {:?}, now {:?}", then.path, now.path))
        })
    }
}

/// Whether two paths lead to the same file or folder, or are spelled the same.
fn is_same_file(one: Option<&Path>, other: Option<&Path>) -> bool {
    let real = |path: Option<&Path>| path.and_then(|path| path.canonicalize().ok());
    one == other || (real(one).is_some() && real(one) == real(other))
}

/// Adds the values below a value to `values`, by their keys.
fn flatten(key: &str, value: Value, values: &mut BTreeMap<String, Value>) {
    let below = |name: &str| format!("{key}.{name}");
    match value {
        Value::Object(fields) => {
            fields.into_iter().for_each(|(name, value)| flatten(&below(&name), value, values));
        }
        Value::Array(items) => {
            let items = items.into_iter().enumerate();
            items.for_each(|(at, value)| flatten(&below(&at.to_string()), value, values));
        }
        value => {
            values.insert(key.to_owned(), value);
        }
    }
}

/// Applies `key.path=value`. A value that is not TOML is a string.
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
        at = next
            .as_table_mut()
            .ok_or_else(|| anyhow::anyhow!("--set {assignment}: {key} is not a section"))?;
    }
    at.insert(last.into(), value);
    Ok(())
}

#[cfg(test)]
mod tests;
