//! [`Compute`] for [`Glam`]. Shapes and dtypes are those of the trait.

use super::{Glam, Gradient, Params, Saved, gradients};
use crate::arithmetic;
use crate::error::{Error, Result};
use crate::exact;
use crate::layers;
use crate::weights::{Parameter, Shard, parameters};
use tch::{Device, Kind, Tensor};
use volary_core::compute::{Compute, Computed, Gated, HostDtype, HostTensor, LaneLoss};
use volary_core::dispatch::{Dispatch, TOP_K};
use volary_core::messages::Norm;
use volary_core::update::Update;
use volary_core::{Digest, Lane, LayerId, ShardId, Step};

impl Compute for Glam {
    type Tensor = Tensor;
    type Shard = Shard;
    type Params = Params;
    type Saved = Saved;
    type Gradient = Gradient;

    fn arithmetic(&self) -> Computed<Digest> {
        arithmetic::digest(self.device, self.kind)?
    }

    fn initial(&self, shard: ShardId) -> Computed<Shard> {
        Ok(Shard::initial(&self.architecture, &self.training.optimizer, self.seed, shard, self.device)?)
    }

    fn load(&self, shard: ShardId, bytes: &[u8]) -> Computed<Shard> {
        Ok(Shard::load(&self.architecture, &self.training.optimizer, shard, bytes, self.device)?)
    }

    fn store(&self, shard: ShardId, version: Step, state: &Shard) -> Computed<Vec<u8>> {
        Ok(state.store(shard, version)?)
    }

    fn digest(&self, state: &Shard) -> Computed<Digest> {
        Ok(state.digest()?)
    }

    fn is_finite(&self, state: &Shard) -> Computed<bool> {
        // The sum of zeros, one for each finite number, is NaN if there is any other.
        let zero = |weight: &Tensor| -> Result<Tensor> { Ok(weight.f_mul_scalar(0.0)?.f_sum(Kind::Float)?) };
        let zeros = || -> Result<f64> {
            let zeros = state.slots.iter().map(|slot| zero(&slot.weight)).collect::<Result<Vec<_>>>()?;
            Ok(Tensor::f_stack(&zeros, 0)?.f_sum(Kind::Float)?.f_double_value(&[])?)
        };
        Ok(tch::no_grad(zeros)?.is_finite())
    }

    fn params(&self, state: &Shard) -> Params {
        Params(state.slots.iter().map(|slot| slot.weight.shallow_clone()).collect())
    }

    fn embed(&self, params: Params, tokens: &[u32]) -> Computed<Tensor> {
        Ok(layers::embed(&self.architecture, &params.0[0], &self.ids(tokens, 0)?, self.kind)?)
    }

    fn loss(
        &self,
        params: Params,
        x: Tensor,
        tokens: &[u32],
        train: bool,
    ) -> Computed<(LaneLoss, Option<(Tensor, Gradient)>)> {
        Ok(self.loss_inner(&params, &x, tokens, train)?)
    }

    fn embed_backward(&self, gradient: Gradient, dx: Tensor, tokens: &[u32]) -> Computed<Gradient> {
        let inner = || -> Result<Gradient> {
            let dx = dx.f_to_kind(Kind::Float)?;
            let dx = match layers::embedding_scale(&self.architecture) {
                Some(scale) => dx.f_mul_scalar(scale)?,
                None => dx,
            };
            let vocabulary = self.architecture.vocabulary as i64;
            let ids = self.ids(tokens, 0)?;
            let input = Tensor::f_embedding_dense_backward(&dx, &ids, vocabulary, -1, false)?;
            let mut parts: Vec<Tensor> = gradient.0.iter().map(Tensor::shallow_clone).collect();
            let _ = parts[0].f_add_(&input)?;
            Ok(Gradient(parts))
        };
        Ok(inner()?)
    }

    fn dense(&self, layer: LayerId, params: Params, x: Tensor, train: bool) -> Computed<(Tensor, Saved)> {
        let inner = || -> Result<_> {
            if !train {
                return Ok((tch::no_grad(|| self.dense_forward(layer, &params.0, &x))?, Saved::None));
            }
            let x = self.leaf(&x, true)?;
            let leaves = params.leaves(true)?;
            let y = self.dense_forward(layer, &leaves, &x)?;
            Ok((y.f_detach()?, Saved::Segment { x, leaves, y }))
        };
        Ok(inner()?)
    }

    fn dense_backward(&self, saved: Saved, dy: Tensor) -> Computed<(Tensor, Gradient)> {
        let inner = || -> Result<_> {
            let Saved::Segment { x, leaves, y } = saved else {
                return Err(Error::OutOfTurn("dense_backward"));
            };
            let inputs: Vec<&Tensor> = std::iter::once(&x).chain(&leaves).collect();
            let mut all = gradients(&y.f_mul(&dy)?.f_sum(Kind::Float)?, &inputs)?;
            let dx = all.remove(0);
            Ok((dx, Gradient(all)))
        };
        Ok(inner()?)
    }

    fn gate(
        &self,
        layer: LayerId,
        params: Params,
        x: Tensor,
        at: (Step, Lane),
        train: bool,
    ) -> Computed<Gated<Self>> {
        Ok(self.gate_inner(layer, &params, &x, at, train)?)
    }

    fn gate_weights(&self, saved: &Saved, tokens: &[usize]) -> Computed<Vec<[f64; TOP_K]>> {
        Ok(Self::gate_weights_inner(saved, tokens)?)
    }

    fn combine(&self, dispatch: &Dispatch, saved: Saved, outputs: Vec<Tensor>) -> Computed<(Tensor, Saved)> {
        Ok(tch::no_grad(|| self.combine_inner(dispatch, saved, &outputs))?)
    }

    fn combine_backward(&self, dispatch: &Dispatch, saved: Saved, dy: Tensor) -> Computed<(Tensor, Saved)> {
        Ok(tch::no_grad(|| self.combine_backward_inner(dispatch, saved, dy))?)
    }

    fn gate_backward(
        &self,
        dispatch: &Dispatch,
        saved: Saved,
        inputs: Vec<Tensor>,
        load: &[u32],
    ) -> Computed<(Tensor, Gradient)> {
        Ok(self.gate_backward_inner(dispatch, saved, &inputs, load)?)
    }

    fn expert(&self, params: Params, x: Tensor, train: bool) -> Computed<(Tensor, Saved)> {
        Ok(tch::no_grad(|| self.expert_inner(&params, x, train))?)
    }

    fn expert_backward(&self, params: Params, saved: Saved, dy: Tensor) -> Computed<(Tensor, Saved)> {
        Ok(tch::no_grad(|| self.expert_backward_inner(&params, saved, dy))?)
    }

    fn expert_gradient(&self, lanes: Vec<Saved>) -> Computed<Option<Gradient>> {
        Ok(tch::no_grad(|| Self::expert_gradient_inner(lanes))?)
    }

    fn add(&self, left: Gradient, right: Gradient) -> Computed<Gradient> {
        let add = |(mut l, r): (Tensor, Tensor)| -> Result<Tensor> { Ok(l.f_add_(&r)?) };
        if left.0.len() != right.0.len() {
            return Err(Error::GradientTensors { expected: left.0.len(), found: right.0.len() }.into());
        }
        Ok(tch::no_grad(|| left.0.into_iter().zip(right.0).map(add).collect::<Result<_>>().map(Gradient))?)
    }

    fn norm(&self, gradient: &Gradient) -> Computed<Norm> {
        let norms = || -> Result<Vec<f64>> {
            let norms = gradient.0.iter().map(exact::squared_norm).collect::<Result<Vec<_>>>()?;
            // One copy to the host, for which a GPU waits.
            Ok(Vec::try_from(Tensor::f_cat(&norms, 0)?.f_to_device(Device::Cpu)?)?)
        };
        let squared: f64 = tch::no_grad(norms)?.into_iter().sum();
        Ok(Norm { squared, finite: f64::is_finite(squared) })
    }

    fn apply(
        &self,
        _shard: ShardId,
        state: &mut Shard,
        gradient: Option<Gradient>,
        update: Update,
    ) -> Computed<()> {
        Ok(tch::no_grad(|| self.apply_inner(state, gradient, update))?)
    }

    fn rows(&self, x: &Tensor, start: usize, length: usize) -> Computed<Tensor> {
        Ok(x.f_narrow(0, start as i64, length as i64).map_err(Error::from)?)
    }

    fn concatenate(&self, parts: Vec<Tensor>) -> Computed<Tensor> {
        Ok(Tensor::f_cat(&parts, 0).map_err(Error::from)?)
    }

    fn export(&self, x: &Tensor) -> Computed<HostTensor> {
        Ok(crate::host::export(x)?)
    }

    fn import(&self, dtype: HostDtype, shape: &[usize], data: &[u8]) -> Computed<Tensor> {
        Ok(crate::host::import(dtype, shape, data, self.device)?)
    }

    fn export_gradient(&self, gradient: &Gradient) -> Computed<Vec<HostTensor>> {
        gradient.0.iter().map(|tensor| self.export(tensor)).collect()
    }

    fn import_gradient(
        &self,
        shard: ShardId,
        parts: &[(HostDtype, Vec<usize>, &[u8])],
    ) -> Computed<Gradient> {
        let expected = parameters(&self.architecture, shard);
        if expected.len() != parts.len() {
            return Err(Error::GradientTensors { expected: expected.len(), found: parts.len() }.into());
        }
        let convert = |(parameter, (dtype, shape, data)): (&Parameter, &(HostDtype, Vec<usize>, &[u8]))| {
            let same = parameter.shape.iter().map(|&n| n as usize).eq(shape.iter().copied());
            if !same || *dtype != HostDtype::F32 {
                let (name, wanted) = (parameter.name, &parameter.shape);
                let reason = format!("{name} is {dtype:?} {shape:?}, expected F32 {wanted:?}");
                return Err(Error::Gradient { shard, reason });
            }
            crate::host::import(*dtype, shape, data, self.device)
        };
        Ok(Gradient(expected.iter().zip(parts).map(convert).collect::<Result<_>>()?))
    }
}
