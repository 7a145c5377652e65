//! The keys and values of earlier tokens.

use crate::error::Result;
use tch::{Device, Kind, Tensor};
use volary_core::architecture::Architecture;

/// The rows of each slot at the beginning.
const FIRST_ROWS: usize = 64;

/// Keys and values for a fixed number of sequences, each in a slot of its own.
///
/// The token at position `p` of a sequence has the row `p % context` of its slot, so that a sequence longer
/// than the context overwrites its oldest tokens. All slots have room for the longest sequence so far.
#[derive(Debug)]
pub struct Cache {
    layers: Vec<CachedLayer>,
    /// The tokens of the sequence in each slot so far.
    lengths: Vec<usize>,
    context: usize,
    /// The rows of each slot, at most `context`.
    rows: usize,
}

/// One layer's part of a cache.
#[derive(Debug)]
pub(super) struct CachedLayer {
    /// `[slots, kv_heads, rows, head_dim]`, f32. Rows that were never written are 0: masked numbers must be
    /// finite as well.
    pub(super) keys: Tensor,
    /// The same shape.
    pub(super) values: Tensor,
}

impl Cache {
    pub(super) fn new(a: &Architecture, context: usize, slots: usize, device: Device) -> Result<Self> {
        let rows = FIRST_ROWS.min(context);
        let shape = [slots as i64, a.kv_heads() as i64, rows as i64, a.head_dim as i64];
        let zeros = || Tensor::f_zeros(shape.as_slice(), (Kind::Float, device));
        let layer = |_| Ok(CachedLayer { keys: zeros()?, values: zeros()? });
        let layers = (0..a.layers).map(layer).collect::<Result<_>>()?;
        Ok(Self { layers, lengths: vec![0; slots], context, rows })
    }

    /// The number of sequences that fit.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.lengths.len()
    }

    /// The tokens of the sequence in a slot so far.
    #[must_use]
    pub fn length(&self, slot: usize) -> usize {
        self.lengths.get(slot).copied().unwrap_or(0)
    }

    /// Empties a slot for another sequence.
    pub fn clear(&mut self, slot: usize) {
        if let Some(length) = self.lengths.get_mut(slot) {
            *length = 0;
        }
    }

    /// Makes room for a sequence of `tokens`.
    pub(super) fn reserve(&mut self, tokens: usize) -> Result<()> {
        let needed = tokens.min(self.context);
        if needed <= self.rows {
            return Ok(());
        }
        // Doubled, so that a growing sequence is copied a few times only.
        let rows = needed.max(2 * self.rows).min(self.context);
        let more = (rows - self.rows) as i64;
        let grown = |tensor: &Tensor| tensor.f_constant_pad_nd([0, 0, 0, more]);
        let layer = |layer: &CachedLayer| -> Result<CachedLayer> {
            Ok(CachedLayer { keys: grown(&layer.keys)?, values: grown(&layer.values)? })
        };
        self.layers = self.layers.iter().map(layer).collect::<Result<_>>()?;
        self.rows = rows;
        Ok(())
    }

    pub(super) fn extend(&mut self, slot: usize, tokens: usize) {
        if let Some(length) = self.lengths.get_mut(slot) {
            *length += tokens;
        }
    }

    /// The capacity of a slot in tokens.
    pub(super) fn context(&self) -> usize {
        self.context
    }

    pub(super) fn layer(&self, place: usize) -> &CachedLayer {
        &self.layers[place]
    }
}
