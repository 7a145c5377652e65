//! A GLaM model as safetensors.
//!
//! The folder of an export:
//!
//! | file | content |
//! | --- | --- |
//! | `model.safetensors` | the weights, f32 (several files with an index above 5 GB) |
//! | `config.json` | the architecture, and `sequence_length` |
//! | `tokenizer.json` | the tokenizer, as the `tokenizers` library reads it |
//! | `tokenizer_config.json` | what `transformers` needs beside it: the class and the end of text |
//! | `run.json` | where the weights are from: run, step, digest, validation loss |
//! | `validation.safetensors` | `tokens` of the validation, `[sequences, sequence_length + 1]`, i32 |
//! | `README.md` | a model card |
//!
//! The names and shapes of the weights, with `H` for `hidden`, `W` for `heads * head_dim`, `F` for
//! `feed_forward` and `X` for `expert_hidden`; matrices multiply rows of activations from the right:
//!
//! | name | shape |
//! | --- | --- |
//! | `embedding.tokens`, `embedding.norm` | `[vocabulary, H]`, also of the output; `[H]`, before the output |
//! | `layers.L.attention.norm` | `[H]` |
//! | `layers.L.attention.qkv` | `[H, 3 W]`: queries, keys and values, each head after head |
//! | `layers.L.attention.output` | `[W, H]` |
//! | `layers.L.attention.position` | `[position_buckets, heads]` |
//! | `layers.L.feed_forward.norm`, `.gate`, `.up`, `.down` | `[H]`, `[H, F]`, `[H, F]`, `[F, H]` |
//! | `layers.L.router.norm`, `.gate` | `[H]`, `[H, experts]` |
//! | `layers.L.experts.E.up`, `.down` | `[H, X]`, `[X, H]` |

use crate::error::{Error, Result};
use crate::folder::NewFolder;
use crate::limits::FILE_BYTES;
use crate::tensors::{self, Listed, Source};
use safetensors::tensor::{Dtype, TensorView};
use serde::Serialize;
use serde_json::json;
use std::collections::HashMap;
use std::error::Error as StdError;
use std::path::Path;
use volary_core::architecture::Architecture;
use volary_core::{ShardId, Step};
use volary_model::{parameter_bytes, parameter_shapes};

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

/// Writes a model into a new folder. `fetch` reads the stored form of a shard.
///
/// # Errors
/// [`Error::Exists`] if there is something at `target`; [`Error::Read`] with an error of `fetch`; or another
/// [`Error`]. Then nothing stays behind.
pub fn export<E: Into<Box<dyn StdError + Send + Sync>>>(
    model: &Export<'_>,
    target: &Path,
    fetch: impl FnMut(ShardId) -> std::result::Result<Vec<u8>, E>,
) -> Result<()> {
    let folder = NewFolder::create(target)?;
    let a = model.architecture;
    let shards = Shards { architecture: a, fetch, last: None };
    tensors::write(&folder, listed(a), shards, FILE_BYTES)?;
    let mut config = serde_json::to_value(a)?;
    config["model_type"] = "glam".into();
    config["sequence_length"] = model.sequence_length.into();
    folder.write_json("config.json", &config)?;
    folder.write_json("run.json", model.origin)?;
    folder.copy(model.tokenizer, "tokenizer.json")?;
    folder.write_json("tokenizer_config.json", &tokenizer_config(model))?;
    write_validation(&folder, model)?;
    folder.write("README.md", card(model))?;
    folder.finish()
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

/// A tensor of a shard: its place among the shard's parameters.
type Key = (ShardId, usize);

/// The weights of a model by their exported names.
fn listed(a: &Architecture) -> Vec<Listed<Key>> {
    let of_shard = |shard: ShardId| {
        let prefix = prefix(shard);
        let tensor = move |(at, (name, shape)): (usize, (&str, Vec<usize>))| Listed {
            name: format!("{prefix}.{name}"),
            shape,
            key: (shard, at),
        };
        parameter_shapes(a, shard).into_iter().enumerate().map(tensor)
    };
    a.shards().into_iter().flat_map(of_shard).collect()
}

/// What precedes the names of a shard's parameters.
fn prefix(shard: ShardId) -> String {
    match shard {
        ShardId::Embedding => "embedding".into(),
        ShardId::Dense { layer } => format!("layers.{}", layer.0),
        ShardId::Router { layer } => format!("layers.{}.router", layer.0),
        ShardId::Expert { layer, expert } => format!("layers.{}.experts.{}", layer.0, expert.0),
    }
}

/// The tensors of stored shards. The last shard stays in memory, since tensors come shard by shard.
struct Shards<'a, F> {
    architecture: &'a Architecture,
    fetch: F,
    last: Option<(ShardId, Vec<Vec<u8>>)>,
}

impl<E, F> Source for Shards<'_, F>
where
    E: Into<Box<dyn StdError + Send + Sync>>,
    F: FnMut(ShardId) -> std::result::Result<Vec<u8>, E>,
{
    type Key = Key;

    fn read(&mut self, (shard, at): &Key) -> Result<Vec<u8>> {
        if self.last.as_ref().is_none_or(|(last, _)| last != shard) {
            let bytes = (self.fetch)(*shard)
                .map_err(|source| Error::Read { shard: *shard, source: source.into() })?;
            self.last = Some((*shard, parameter_bytes(self.architecture, *shard, &bytes)?));
        }
        Ok(self.last.as_ref().and_then(|(_, tensors)| tensors.get(*at)).cloned().unwrap_or_default())
    }
}

fn write_validation(folder: &NewFolder, model: &Export<'_>) -> Result<()> {
    let shape = vec![model.validation.len(), model.sequence_length + 1];
    let bytes: Vec<u8> =
        model.validation.iter().flatten().flat_map(|&id| (id as i32).to_le_bytes()).collect();
    let path = folder.path("validation.safetensors");
    let failed = |source| Error::SafeTensors { path: path.clone(), source };
    let tokens = TensorView::new(Dtype::I32, shape, &bytes).map_err(failed)?;
    safetensors::serialize_to_file([("tokens", tokens)], None::<HashMap<_, _>>, &path).map_err(failed)
}

/// The model card.
fn card(model: &Export<'_>) -> String {
    let (a, origin) = (model.architecture, model.origin);
    let experts = match a.experts {
        0 => "no experts".to_owned(),
        count => format!("{count} experts in every other layer, 2 of them per token"),
    };
    let loss = origin.validation_loss.map_or_else(
        || "not computed at this step".to_owned(),
        |loss| format!("{loss:.4} nats per token on {} sequences", model.validation.len()),
    );
    format!(
        "---\nlibrary_name: volary\npipeline_tag: text-generation\n---\n\n# {run}\n\nA decoder-only language model with the architecture of GLaM \
         (arXiv 2112.06905), trained with Volary.\n\n\
         | | |\n| --- | --- |\n\
         | checkpoint | step {step} of run `{run}`, digest `{digest}` |\n\
         | parameters | {parameters}, of which a token uses {activated} |\n\
         | shape | {layers} layers, hidden {hidden}, {heads} heads of {dim}, {experts} |\n\
         | vocabulary | {vocabulary} |\n| sequence length | {length} |\n| validation loss | {loss} |\n\n\
         Files: `model.safetensors` has the weights in f32, `config.json` the architecture, `tokenizer.json` \
         the tokenizer, `run.json` the facts above, and `validation.safetensors` the tokens of the validation \
         loss.\n",
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
