//! What all exports have in common: the facts of the run, the tokenizer, a model card.

use crate::error::{Error, Result};
use crate::folder::NewFolder;
use serde::Serialize;
use serde_json::json;
use std::error::Error as StdError;
use std::path::Path;
use volary_core::architecture::Architecture;
use volary_core::{ShardId, Step};
use volary_model::parameter_bytes;

/// Where weights are from.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Origin {
    /// The run's name.
    pub run: String,
    /// The step of the checkpoint.
    pub step: Step,
    /// The checkpoint's digest, of weights and optimizer state.
    pub digest: String,
    /// The loss on the validation tokens at this step, in nats per token.
    pub validation_loss: Option<f64>,
    /// All parameters.
    pub parameters: u64,
    /// The parameters that one token uses.
    pub activated_parameters: u64,
}

/// A model to export.
#[derive(Debug)]
pub struct Export<'a> {
    /// Its shape.
    pub architecture: &'a Architecture,
    /// The length of its training sequences.
    pub sequence_length: usize,
    /// Where its weights are from.
    pub origin: &'a Origin,
    /// Its tokenizer, a `tokenizer.json`.
    pub tokenizer: &'a Path,
    /// The token that ends a text.
    pub end_of_text: &'a str,
    /// The validation sequences, each of `sequence_length + 1` tokens.
    pub validation: &'a [Vec<u32>],
}

/// What a format adds to a model card.
pub(crate) struct Card<'a> {
    /// The library that loads the folder.
    pub(crate) library: &'a str,
    /// A sentence on the architecture.
    pub(crate) kind: &'a str,
    /// A sentence on the files.
    pub(crate) files: &'a str,
}

/// Writes what all formats have beside weights and architecture.
pub(crate) fn write_beside(folder: &NewFolder, model: &Export<'_>, card: &Card<'_>) -> Result<()> {
    folder.write_json("run.json", model.origin)?;
    folder.copy(model.tokenizer, "tokenizer.json")?;
    folder.write_json("tokenizer_config.json", &tokenizer_config(model))?;
    folder.write("README.md", self::card(model, card))
}

/// What `transformers` needs beside a `tokenizer.json`.
fn tokenizer_config(model: &Export<'_>) -> serde_json::Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": model.end_of_text,
        "eos_token": model.end_of_text,
        "model_max_length": model.sequence_length,
        "clean_up_tokenization_spaces": false,
    })
}

/// The parameters of stored shards. The last shard stays in memory, since tensors come shard by shard.
pub(crate) struct Shards<'a, F> {
    architecture: &'a Architecture,
    fetch: F,
    last: Option<(ShardId, Vec<Vec<u8>>)>,
}

impl<'a, E, F> Shards<'a, F>
where
    E: Into<Box<dyn StdError + Send + Sync>>,
    F: FnMut(ShardId) -> std::result::Result<Vec<u8>, E>,
{
    pub(crate) fn new(architecture: &'a Architecture, fetch: F) -> Self {
        Self { architecture, fetch, last: None }
    }

    /// A parameter by its place, f32, row-major and little-endian.
    pub(crate) fn parameter(&mut self, shard: ShardId, at: usize) -> Result<&[u8]> {
        if self.last.as_ref().is_none_or(|(last, _)| *last != shard) {
            let bytes = (self.fetch)(shard).map_err(|source| Error::Read { shard, source: source.into() })?;
            self.last = Some((shard, parameter_bytes(self.architecture, shard, &bytes)?));
        }
        let tensors = self.last.as_ref().map(|(_, tensors)| tensors);
        Ok(tensors.and_then(|tensors| tensors.get(at)).map_or(&[], Vec::as_slice))
    }
}

/// The model card.
fn card(model: &Export<'_>, card: &Card<'_>) -> String {
    let (a, origin) = (model.architecture, model.origin);
    let experts = match a.experts {
        0 => "no experts".to_owned(),
        count => format!("{count} experts in every other layer, 2 of them per token"),
    };
    let loss = origin
        .validation_loss
        .map_or_else(|| "not computed at this step".to_owned(), |loss| format!("{loss:.4} nats per token"));
    format!(
        "---\nlibrary_name: {library}\npipeline_tag: text-generation\n---\n\n# {run}\n\nA decoder-only language model with {kind}, \
         trained with Volary.\n\n\
         | | |\n| --- | --- |\n\
         | checkpoint | step {step} of run `{run}`, digest `{digest}` |\n\
         | parameters | {parameters}, of which a token uses {activated} |\n\
         | shape | {layers} layers, hidden {hidden}, {heads} heads of {dim}, {experts} |\n\
         | vocabulary | {vocabulary} |\n| sequence length | {length} |\n| validation loss | {loss} |\n\n\
         Files: `model.safetensors` has the weights in f32, {files}.\n",
        library = card.library,
        kind = card.kind,
        files = card.files,
        run = origin.run,
        step = origin.step,
        digest = origin.digest,
        parameters = origin.parameters,
        activated = origin.activated_parameters,
        layers = a.layers,
        hidden = a.hidden,
        heads = a.heads,
        dim = a.head_dim,
        vocabulary = a.vocabulary,
        length = model.sequence_length,
    )
}
