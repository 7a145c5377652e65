//! A Qwen3 model in Hugging Face's format: `qwen3_moe`, or without experts `qwen3`.
//!
//! The folder is what `transformers` writes and reads: `config.json`, `generation_config.json`,
//! `model.safetensors` (or several files with an index), `tokenizer.json` with its configuration. An export
//! adds `run.json` and a model card.
//!
//! | file | content |
//! | --- | --- |
//! | `config` | `config.json` and the architecture |
//! | `layout` | the names of tensors, and their places in shards |
//! | `import` | a folder as shards |

mod config;
mod import;
mod layout;

pub use import::Import;

use crate::error::Result;
use crate::export::{self, Card, Export, Shards};
use crate::folder::NewFolder;
use crate::limits::FILE_BYTES;
use crate::tensors::{self, Source};
use layout::Place;
use serde_json::json;
use std::error::Error as StdError;
use std::path::Path;
use volary_core::ShardId;
use volary_core::architecture::Family;

/// Writes a model into a new folder. `fetch` reads the stored form of a shard; `aux_loss` is the coefficient
/// of the load-balancing loss, and `end_of_text` the token that ends a text.
///
/// # Errors
/// [`Error::Family`](crate::Error::Family) for a model of another family;
/// [`Error::Exists`](crate::Error::Exists) if there is something at `target`;
/// [`Error::Read`](crate::Error::Read) with an error of `fetch`; or another [`Error`](crate::Error). Then
/// nothing stays behind.
pub fn export<E: Into<Box<dyn StdError + Send + Sync>>>(
    model: &Export<'_>,
    (aux_loss, end_of_text): (f64, u32),
    target: &Path,
    fetch: impl FnMut(ShardId) -> std::result::Result<Vec<u8>, E>,
) -> Result<()> {
    let a = model.architecture;
    if a.family != Family::Qwen3Moe {
        return Err(crate::Error::Family);
    }
    let folder = NewFolder::create(target)?;
    let source = Parameters(Shards::new(a, fetch));
    tensors::write(&folder, layout::tensors(a, false), source, FILE_BYTES)?;
    folder.write_json("config.json", &config::write(a, model.sequence_length, aux_loss, end_of_text))?;
    let generation = json!({
        "bos_token_id": end_of_text, "eos_token_id": end_of_text, "do_sample": true, "temperature": 0.7,
    });
    folder.write_json("generation_config.json", &generation)?;
    let card = Card {
        library: "transformers",
        kind: "the architecture `qwen3_moe` of Hugging Face's transformers",
        files: "`config.json` the architecture, `tokenizer.json` the tokenizer, and `run.json` the facts above. \
                `AutoModelForCausalLM.from_pretrained` loads the folder",
    };
    export::write_beside(&folder, model, &card)?;
    folder.finish()
}

/// The tensors of stored shards, as the format has them.
struct Parameters<'a, F>(Shards<'a, F>);

impl<E, F> Source for Parameters<'_, F>
where
    E: Into<Box<dyn StdError + Send + Sync>>,
    F: FnMut(ShardId) -> std::result::Result<Vec<u8>, E>,
{
    type Key = Place;

    fn read(&mut self, place: &Place) -> Result<Vec<u8>> {
        let bytes = self.0.parameter(place.shard, place.parameter)?;
        Ok(place.form.read(bytes))
    }
}
