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
use crate::export::{self, Card, Export, Shards};
use crate::folder::NewFolder;
use crate::limits::FILE_BYTES;
use crate::tensors::{self, Listed, Source};
use safetensors::tensor::{Dtype, TensorView};
use std::collections::HashMap;
use std::error::Error as StdError;
use std::path::Path;
use volary_core::ShardId;
use volary_core::architecture::Architecture;
use volary_model::parameter_shapes;

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
    tensors::write(&folder, listed(a), Parameters(Shards::new(a, fetch)), FILE_BYTES)?;
    let mut config = serde_json::to_value(a)?;
    config["model_type"] = "glam".into();
    config["sequence_length"] = model.sequence_length.into();
    folder.write_json("config.json", &config)?;
    write_validation(&folder, model)?;
    let card = Card {
        library: "volary",
        kind: "the architecture of GLaM (arXiv 2112.06905)",
        files: "`config.json` the architecture, `tokenizer.json` the tokenizer, `run.json` the facts above, and \
                `validation.safetensors` the tokens of the validation loss",
    };
    export::write_beside(&folder, model, &card)?;
    folder.finish()
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

/// The tensors of stored shards.
struct Parameters<'a, F>(Shards<'a, F>);

impl<E, F> Source for Parameters<'_, F>
where
    E: Into<Box<dyn StdError + Send + Sync>>,
    F: FnMut(ShardId) -> std::result::Result<Vec<u8>, E>,
{
    type Key = Key;

    fn read(&mut self, (shard, at): &Key) -> Result<Vec<u8>> {
        Ok(self.0.parameter(*shard, *at)?.to_vec())
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
