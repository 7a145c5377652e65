//! The choices that count: what the random second expert and the capacity leave of a gate's top two.
//!
//! Written again from GShard's algorithm 1 (arXiv 2006.16668), and not with [`volary_core::dispatch`], which
//! it checks.

use crate::error::Result;
use crate::layers::Gate;
use tch::Tensor;
use volary_core::architecture::{Architecture, SecondExpert};
use volary_core::dispatch::{Capacity, TOP_K};
use volary_core::random::{Purpose, Stream};
use volary_core::{Lane, LayerId, Step};

/// What a pass is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Routing {
    /// Training or validation on a lane: the second expert may be left out at random, and what exceeds an
    /// expert's capacity is dropped.
    Lane {
        /// The run's seed.
        seed: u64,
        step: Step,
        lane: Lane,
    },
    /// Generation and scoring: each token goes to both experts. A text must not depend on what else is in a
    /// batch.
    Free,
}

impl Routing {
    /// Which choices of a layer's gate count: `[tokens, 2]`, f32, 1 or 0.
    pub(super) fn kept(self, a: &Architecture, layer: LayerId, gate: &Gate) -> Result<Tensor> {
        let shape = gate.weights.size();
        let tokens = shape[0] as usize;
        let mut kept = vec![[true; TOP_K]; tokens];
        if let Self::Lane { seed, step, lane } = self {
            if a.second_expert == SecondExpert::Random {
                let path = [step.0, lane.0.into(), layer.0.into()];
                let mut stream = Stream::new(seed, Purpose::SecondExpert, &path);
                for (token, kept) in kept.iter_mut().enumerate() {
                    let weight = gate.weights.f_double_value(&[token as i64, 1])?;
                    kept[1] = stream.next_f64() < 2.0 * weight;
                }
            }
            if let Capacity::Factor(factor) = a.capacity {
                let rows = (tokens as f64 / a.experts as f64 * factor).ceil().max(1.0);
                let mut taken = vec![0.0; a.experts];
                for choice in 0..TOP_K {
                    for (token, kept) in kept.iter_mut().enumerate().filter(|(_, kept)| kept[choice]) {
                        let expert = gate.experts.f_int64_value(&[token as i64, choice as i64])? as usize;
                        kept[choice] = taken[expert] < rows;
                        taken[expert] += 1.0;
                    }
                }
            }
        }
        let values: Vec<f32> = kept.iter().flatten().map(|&kept| f32::from(u8::from(kept))).collect();
        Ok(Tensor::f_from_slice(&values)?.f_view(shape.as_slice())?.f_to_device(gate.weights.device())?)
    }
}
