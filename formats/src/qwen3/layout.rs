//! The names and shapes of the tensors, and their places in shards.
//!
//! Hugging Face's matrices multiply from the left, `[outputs, inputs]`, Volary's from the right. Queries,
//! keys and values are one matrix here and three there.

use crate::tensors::Listed;
use std::ops::Range;
use volary_core::ShardId;
use volary_core::architecture::Architecture;
use volary_model::parameter_shapes;

/// Bytes of an f32.
const F32: usize = 4;

/// The place of a tensor: a parameter of a shard, or columns of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) shard: ShardId,
    /// Among the shard's parameters.
    pub(super) parameter: usize,
    pub(super) form: Form,
}

/// How a tensor differs from its parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Not at all.
    Same,
    /// Its rows are some columns of the parameter, which has `width`.
    Columns { columns: Range<usize>, width: usize },
}

impl Form {
    /// The tensor's bytes from those of the parameter.
    pub(super) fn read(&self, parameter: &[u8]) -> Vec<u8> {
        let Self::Columns { columns, width } = self else { return parameter.to_vec() };
        let mut tensor = Vec::with_capacity(parameter.len() / width * columns.len());
        for column in columns.clone() {
            let cells = parameter.chunks_exact(F32).skip(column).step_by(*width);
            cells.for_each(|cell| tensor.extend_from_slice(cell));
        }
        tensor
    }

    /// Writes the tensor's bytes to their place in the parameter.
    pub(super) fn write(&self, tensor: &[u8], parameter: &mut [u8]) {
        let Self::Columns { columns, width } = self else { return parameter.copy_from_slice(tensor) };
        let rows = parameter.len() / F32 / width;
        for (column, values) in columns.clone().zip(tensor.chunks_exact(F32 * rows)) {
            let cells = parameter.chunks_exact_mut(F32).skip(column).step_by(*width);
            cells.zip(values.chunks_exact(F32)).for_each(|(cell, value)| cell.copy_from_slice(value));
        }
    }
}

/// All tensors of a model. With `upcycled` the experts of a layer are copies of its dense feed-forward, and
/// there is no gate.
pub(super) fn tensors(a: &Architecture, upcycled: bool) -> Vec<Listed<Place>> {
    a.shards().into_iter().flat_map(|shard| of_shard(a, shard, upcycled)).collect()
}

/// The tensors of one shard.
pub(super) fn of_shard(a: &Architecture, shard: ShardId, upcycled: bool) -> Vec<Listed<Place>> {
    let mut list = Vec::new();
    for (parameter, (name, shape)) in parameter_shapes(a, shard).into_iter().enumerate() {
        for (name, columns) in names(a, shard, name, upcycled) {
            let (shape, form) = match (columns, shape.as_slice()) {
                (Some(columns), [rows, width]) => {
                    let columns = if columns.is_empty() { 0..*width } else { columns };
                    (vec![columns.len(), *rows], Form::Columns { columns, width: *width })
                }
                _ => (shape.clone(), Form::Same),
            };
            list.push(Listed { name, shape, key: Place { shard, parameter, form } });
        }
    }
    list
}

/// The tensors that a parameter is made of: their names, and for matrices the columns of each, or an empty
/// range for all columns.
fn names(
    a: &Architecture,
    shard: ShardId,
    parameter: &str,
    upcycled: bool,
) -> Vec<(String, Option<Range<usize>>)> {
    let layer = |name: &str| format!("model.layers.{}.{name}.weight", shard.layer().0);
    let same = |name: String| vec![(name, None)];
    let all = |name: String| vec![(name, Some(0..0))];
    match (shard, parameter) {
        (ShardId::Embedding, "tokens") => same("model.embed_tokens.weight".into()),
        (ShardId::Embedding, "norm") => same("model.norm.weight".into()),
        (ShardId::Embedding, _) => same("lm_head.weight".into()),
        (ShardId::Router { .. }, "gate") if upcycled => Vec::new(),
        (ShardId::Router { .. }, "gate") => all(layer("mlp.gate")),
        (ShardId::Router { .. }, _) | (ShardId::Dense { .. }, "feed_forward.norm") => {
            same(layer("post_attention_layernorm"))
        }
        (ShardId::Expert { expert, .. }, name) => match upcycled {
            true => all(layer(&format!("mlp.{name}_proj"))),
            false => all(layer(&format!("mlp.experts.{}.{name}_proj", expert.0))),
        },
        (ShardId::Dense { .. }, "attention.norm") => same(layer("input_layernorm")),
        (ShardId::Dense { .. }, "attention.query_norm") => same(layer("self_attn.q_norm")),
        (ShardId::Dense { .. }, "attention.key_norm") => same(layer("self_attn.k_norm")),
        (ShardId::Dense { .. }, "attention.output") => all(layer("self_attn.o_proj")),
        (ShardId::Dense { .. }, "attention.qkv") => {
            let (queries, keys) = (a.heads * a.head_dim, a.kv_heads() * a.head_dim);
            let part = |name: &str, columns| (layer(&format!("self_attn.{name}_proj")), Some(columns));
            vec![
                part("q", 0..queries),
                part("k", queries..queries + keys),
                part("v", queries + keys..queries + 2 * keys),
            ]
        }
        (ShardId::Dense { .. }, name) => {
            let name = name.strip_prefix("feed_forward.").unwrap_or(name);
            all(layer(&format!("mlp.{name}_proj")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_of_some_columns_reads_what_it_wrote_and_touches_no_other() {
        let cell = |value: u8| vec![value; F32];
        let numbers = |values: &[u8]| values.iter().flat_map(|&value| cell(value)).collect::<Vec<u8>>();
        // Two rows of three columns.
        let mut parameter = numbers(&[1, 2, 3, 4, 5, 6]);
        let form = Form::Columns { columns: 1..3, width: 3 };
        assert_eq!(form.read(&parameter), numbers(&[2, 5, 3, 6]));
        form.write(&numbers(&[7, 8, 9, 10]), &mut parameter);
        assert_eq!(parameter, numbers(&[1, 7, 9, 4, 8, 10]));
        assert_eq!(form.read(&parameter), numbers(&[7, 8, 9, 10]));
    }
}
