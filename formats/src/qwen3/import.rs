//! A folder of `transformers` as shards.

use super::config;
use super::layout::{self, Place};
use crate::error::{Error, Result};
use crate::files::TensorFiles;
use crate::limits::NAMED_MAX;
use crate::tensors::Listed;
use serde_json::Value;
use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use volary_core::ShardId;
use volary_core::architecture::Architecture;
use volary_model::parameter_shapes;

/// A checkpoint in Hugging Face's format, all of whose tensors are there and have the right shapes.
#[derive(Debug)]
pub struct Import {
    architecture: Architecture,
    files: TensorFiles,
    folder: PathBuf,
    upcycled: bool,
}

impl Import {
    /// Opens a folder. It reads the headers of the files.
    ///
    /// # Errors
    /// [`Error::Import`]: a file is missing or malformed, the architecture is another one, or tensors are
    /// missing, unknown or of other shapes, each of which is named.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let text = fs::read_to_string(&path).map_err(|error| Error::import(&path, error))?;
        let json: Value = serde_json::from_str(&text).map_err(|error| Error::import(&path, error))?;
        let architecture = config::read(&json).map_err(|reason| Error::import(&path, reason))?;
        let files = TensorFiles::open(folder)?;
        let import = Self { architecture, files, folder: folder.into(), upcycled: false };
        import.check()?;
        Ok(import)
    }

    /// The shape of the model.
    #[must_use]
    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// The file with the tokenizer.
    #[must_use]
    pub fn tokenizer(&self) -> PathBuf {
        self.folder.join("tokenizer.json")
    }

    /// The same model with experts in every other layer, each of which starts as a copy of the layer's
    /// feed-forward (Komatsuzaki et al., arXiv 2212.05055). Gates are not part of it.
    ///
    /// # Errors
    /// [`Error::Import`] if it has experts already, or the number is out of bounds.
    pub fn upcycle(mut self, experts: usize) -> Result<Self> {
        if self.architecture.experts > 0 {
            let reason = format!("it has {} experts: expected a dense model", self.architecture.experts);
            return Err(Error::import(&self.folder, reason));
        }
        self.architecture.experts = experts;
        self.architecture.check().map_err(|error| Error::import(&self.folder, error))?;
        self.upcycled = true;
        Ok(self)
    }

    /// The parameters of a shard in their fixed order, f32, row-major and little-endian; `None` for those
    /// that the checkpoint does not have, the gates of an upcycled model.
    ///
    /// # Errors
    /// [`Error::Import`] when a file cannot be read.
    pub fn parameters(&self, shard: ShardId) -> Result<Vec<Option<Vec<u8>>>> {
        let shapes = parameter_shapes(&self.architecture, shard);
        let mut parameters: Vec<Option<Vec<u8>>> = vec![None; shapes.len()];
        for Listed { name, key: Place { parameter, form, .. }, .. } in
            layout::of_shard(&self.architecture, shard, self.upcycled)
        {
            let bytes = 4 * shapes[parameter].1.iter().product::<usize>();
            let whole = parameters[parameter].get_or_insert_with(|| vec![0; bytes]);
            form.write(&self.files.read(&name)?, whole);
        }
        Ok(parameters)
    }

    /// Names what is missing, unknown or misshapen.
    fn check(&self) -> Result<()> {
        let expected = layout::tensors(&self.architecture, false);
        let mut wrong = Vec::new();
        for Listed { name, shape, .. } in &expected {
            match self.files.shape(name) {
                None => wrong.push(format!("{name} is missing")),
                Some(found) if found != shape.as_slice() => {
                    wrong.push(format!("{name} is {found:?}, expected {shape:?}"));
                }
                Some(_) => {}
            }
        }
        let known: HashSet<&str> = expected.iter().map(|tensor| tensor.name.as_str()).collect();
        // A tied model may have its output all the same, which is the embedding.
        let may_be_there = |name: &str| self.architecture.is_tied() && name == "lm_head.weight";
        let unknown = self.files.names().filter(|name| !known.contains(name) && !may_be_there(name));
        wrong.extend(unknown.map(|name| format!("{name} is unknown")));
        if wrong.is_empty() {
            return Ok(());
        }
        let more = wrong.len().saturating_sub(NAMED_MAX);
        wrong.truncate(NAMED_MAX);
        let more = if more > 0 { format!("; and {more} more") } else { String::new() };
        Err(Error::import(&self.folder, wrong.join("; ") + &more))
    }
}
