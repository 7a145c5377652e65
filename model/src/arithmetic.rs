//! The arithmetic kind of a device: the bits of its results on one fixed lane.
//!
//! Matrix products and sums of forward and backward passes add in an order that depends on the device and its
//! libraries. Devices with equal bits on a fixed lane are of one kind: a run on them gives the same bits
//! wherever its lanes and experts are.

use crate::engine::{Glam, Gradient};
use crate::error::Result;
use tch::{Device, Kind, Tensor};
use volary_core::architecture::{Architecture, presets};
use volary_core::compute::{Compute, Computed};
use volary_core::options::TrainingOptions;
use volary_core::random::{Purpose, Stream};
use volary_core::{Digest, ExpertId, Lane, LayerId, ShardId, Step};

/// Of weights and tokens. Part of every digest.
const SEED: u64 = 0;

/// A model with every kind of layer, large enough for the products' blocked kernels and their remainders.
fn architecture() -> Architecture {
    let mut architecture = presets().swap_remove(1).architecture;
    (architecture.layers, architecture.experts, architecture.vocabulary) = (2, 2, 509);
    (architecture.hidden, architecture.feed_forward) = (192, 448);
    (architecture.heads, architecture.head_dim) = (3, 64);
    architecture
}

/// The digest of a fixed lane's loss and gradients on `device`, with activations of `kind`.
pub(crate) fn digest(device: Device, kind: Kind) -> Result<Computed<Digest>> {
    let architecture = architecture();
    let training =
        TrainingOptions { lanes: 1, sequences_per_lane: 1, sequence_length: 80, ..TrainingOptions::new(1) };
    let glam = Glam::with_kind(&architecture, &training, SEED, device, kind)?;
    let mut stream = Stream::new(SEED, Purpose::Initial, &[]);
    let tokens: Vec<u32> =
        (0..=training.sequence_length).map(|_| stream.below(architecture.vocabulary as u64) as u32).collect();
    let probe =
        Probe { glam: &glam, architecture: &architecture, tokens: &tokens, hasher: blake3::Hasher::new() };
    Ok(probe.run())
}

/// A lane's way through the model.
struct Probe<'a> {
    glam: &'a Glam,
    architecture: &'a Architecture,
    tokens: &'a [u32],
    hasher: blake3::Hasher,
}

impl Probe<'_> {
    fn run(mut self) -> Computed<Digest> {
        let layers: Vec<LayerId> = self.architecture.layer_range().iter().collect();
        let x = self.glam.embed(self.params(ShardId::Embedding)?, self.tokens)?;
        let (dx, head) = self.through(&layers, x)?;
        let embedding = self.glam.embed_backward(head, dx, self.tokens)?;
        self.add(&embedding)?;
        Ok(Digest(*self.hasher.finalize().as_bytes()))
    }

    /// The gradient of `x`, the input of the first of `layers`, and the head's share of the embedding's.
    fn through(&mut self, layers: &[LayerId], x: Tensor) -> Computed<(Tensor, Gradient)> {
        let Some((&layer, rest)) = layers.split_first() else {
            let (loss, back) = self.glam.loss(self.params(ShardId::Embedding)?, x, self.tokens, true)?;
            self.hasher.update(&loss.mean.to_bits().to_le_bytes());
            return back.ok_or_else(|| crate::Error::OutOfTurn("loss").into());
        };
        let (x, saved) = self.glam.dense(layer, self.params(ShardId::Dense { layer })?, x, true)?;
        let (dx, head) = match self.architecture.is_moe(layer) {
            true => self.through_experts(layer, rest, x)?,
            false => self.through(rest, x)?,
        };
        let (dx, gradient) = self.glam.dense_backward(saved, dx)?;
        self.add(&gradient)?;
        Ok((dx, head))
    }

    fn through_experts(
        &mut self,
        layer: LayerId,
        rest: &[LayerId],
        x: Tensor,
    ) -> Computed<(Tensor, Gradient)> {
        let glam = self.glam;
        let at = (Step(1), Lane(0));
        let gated = glam.gate(layer, self.params(ShardId::Router { layer })?, x, at, true)?;
        let dispatch = &gated.dispatch;
        let (mut outputs, mut experts) = (Vec::new(), Vec::new());
        for (expert, offset) in dispatch.offsets().into_iter().enumerate() {
            let rows = glam.rows(&gated.rows, offset, dispatch.counts[expert])?;
            let id = ShardId::Expert { layer, expert: ExpertId(expert as u16) };
            let (y, saved) = glam.expert(self.params(id)?, rows, true)?;
            outputs.push(y);
            experts.push((id, offset, dispatch.counts[expert], saved));
        }
        let (y, saved) = glam.combine(dispatch, gated.saved, outputs)?;
        let (dy, head) = self.through(rest, y)?;
        let (rows, saved) = glam.combine_backward(dispatch, saved, dy)?;
        let mut inputs = Vec::new();
        for (id, offset, count, kept) in experts {
            let (dx, kept) =
                glam.expert_backward(self.params(id)?, kept, glam.rows(&rows, offset, count)?)?;
            inputs.push(dx);
            if let Some(gradient) = glam.expert_gradient(vec![kept])? {
                self.add(&gradient)?;
            }
        }
        let load: Vec<u32> = dispatch.counts.iter().map(|&count| count as u32).collect();
        let (dx, gradient) = glam.gate_backward(dispatch, saved, inputs, &load)?;
        self.add(&gradient)?;
        Ok((dx, head))
    }

    fn params(&self, shard: ShardId) -> Computed<<Glam as Compute>::Params> {
        Ok(self.glam.params(&self.glam.initial(shard)?))
    }

    fn add(&mut self, gradient: &Gradient) -> Computed<()> {
        for bytes in Glam::gradient_bytes(gradient)? {
            self.hasher.update(&bytes);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::expect_used, reason = "tests")]
    use super::*;

    #[test]
    fn the_kind_of_a_device_is_always_the_same_and_another_one_has_another() {
        crate::device::single_thread();
        let digest = |kind| digest(Device::Cpu, kind).expect("a model").expect("a digest");
        let float = digest(Kind::Float);
        assert_eq!(float, digest(Kind::Float));
        // Other roundings, as on another device.
        assert_ne!(float, digest(Kind::BFloat16));
    }
}
