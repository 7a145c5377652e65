//! The gate and the experts, forward and backward (GLaM, section 4; GShard, arXiv 2006.16668, section 2.2).

use super::{Glam, Gradient, Params, Saved, SavedGate, gradients};
use crate::error::{Error, Result};
use crate::layers::expert::{self, Gradients, Passed};
use crate::layers::{Gate, pooled_aux_loss};
use tch::{Kind, Tensor};
use volary_core::architecture::{Family, SecondExpert};
use volary_core::compute::Gated;
use volary_core::dispatch::{Dispatch, TOP_K};
use volary_core::random::{Purpose, Stream};
use volary_core::{Lane, LayerId, Step};

impl Glam {
    /// For each choice, the rows of `stacked`, `[assignments, hidden]` in expert order, in the order of the
    /// tokens: `[tokens, hidden]`, zero for dropped tokens.
    pub(super) fn by_token(&self, dispatch: &Dispatch, stacked: Tensor) -> Result<Vec<Tensor>> {
        let kept = stacked.size()[0];
        let complete = dispatch.rows.iter().flatten().all(|&row| row >= 0);
        let source = if complete {
            stacked
        } else {
            let zero = stacked.f_new_zeros([1, stacked.size()[1]], (stacked.f_kind()?, self.device))?;
            Tensor::f_cat(&[stacked, zero], 0)?
        };
        let select = |rows: &Vec<i64>| {
            let rows: Vec<i64> = rows.iter().map(|&row| if row < 0 { kept } else { row }).collect();
            Ok(source.f_index_select(0, &self.index(&rows)?)?)
        };
        dispatch.rows.iter().map(select).collect()
    }

    pub(super) fn gate_inner(
        &self,
        layer: LayerId,
        p: &Params,
        x: &Tensor,
        at: (Step, Lane),
        train: bool,
    ) -> Result<Gated<Self>> {
        let x = self.leaf(x, train)?;
        let leaves = p.leaves(train)?;
        let gate = Gate::forward(self.architecture.family, &x, &leaves[0], &leaves[1])?;
        let tokens = x.size()[0] as usize;
        let (first, mut second, aux_loss, entropy) = gate.on_host()?;
        if self.architecture.second_expert == SecondExpert::Random {
            let weights: Vec<f32> = Vec::try_from(gate.weights.f_detach()?.f_select(1, 1)?.f_contiguous()?)?;
            let path = [at.0.0, at.1.0.into(), layer.0.into()];
            let mut stream = Stream::new(self.seed, Purpose::SecondExpert, &path);
            for (choice, weight) in second.iter_mut().zip(weights) {
                if stream.next_f64() >= 2.0 * f64::from(weight) {
                    *choice = -1;
                }
            }
        }
        debug_assert_eq!(first.len(), tokens);
        let dispatch =
            Dispatch::new([&first, &second], self.architecture.experts, self.architecture.capacity);
        let rows = gate.normed.f_detach()?.f_index_select(0, &self.index(&dispatch.tokens)?)?;
        let z_loss = gate.z_loss.f_mul_scalar(self.training.z_loss)?;
        let (penalty, mean) = match self.architecture.family {
            Family::Glam => (gate.aux_loss.f_mul_scalar(self.training.aux_loss)?.f_add(&z_loss)?, None),
            // The load of the layers behind this one is known in the backward pass only.
            Family::Qwen3Moe => (z_loss, Some(gate.mean)),
        };
        let saved = SavedGate {
            x,
            leaves,
            normed: gate.normed,
            weights: gate.weights,
            penalty,
            mean,
            outputs: Vec::new(),
            d_weights: None,
            residual: None,
            train,
        };
        let saved = Saved::Gate(Box::new(saved));
        Ok(Gated { dispatch, choices: [first, second], rows, saved, aux_loss, entropy })
    }

    pub(super) fn gate_weights_inner(saved: &Saved, tokens: &[usize]) -> Result<Vec<[f64; TOP_K]>> {
        let Saved::Gate(gate) = saved else { return Err(Error::OutOfTurn("gate_weights")) };
        let weight = |token: usize, choice: usize| -> Result<f64> {
            Ok(gate.weights.f_double_value(&[token as i64, choice as i64])?)
        };
        tokens.iter().map(|&token| Ok([weight(token, 0)?, weight(token, 1)?])).collect()
    }

    pub(super) fn combine_inner(
        &self,
        d: &Dispatch,
        saved: Saved,
        outputs: &[Tensor],
    ) -> Result<(Tensor, Saved)> {
        let Saved::Gate(mut gate) = saved else { return Err(Error::OutOfTurn("combine")) };
        let chosen = self.by_token(d, Tensor::f_cat(outputs, 0)?)?;
        let weights = gate.weights.f_detach()?.f_to_kind(self.kind)?;
        let mut y = gate.x.f_detach()?;
        for (k, output) in chosen.iter().enumerate() {
            y = y.f_add(&output.f_mul(&weights.f_narrow(1, k as i64, 1)?)?)?;
        }
        if gate.train {
            gate.outputs = chosen;
            return Ok((y, Saved::Gate(gate)));
        }
        Ok((y, Saved::None))
    }

    pub(super) fn combine_backward_inner(
        &self,
        d: &Dispatch,
        saved: Saved,
        dy: Tensor,
    ) -> Result<(Tensor, Saved)> {
        let Saved::Gate(mut gate) = saved else { return Err(Error::OutOfTurn("combine_backward")) };
        let weights = gate.weights.f_detach()?.f_to_kind(self.kind)?;
        let (mut by_choice, mut d_weights) = (Vec::new(), Vec::new());
        for (k, output) in std::mem::take(&mut gate.outputs).iter().enumerate() {
            by_choice.push(dy.f_mul(&weights.f_narrow(1, k as i64, 1)?)?);
            let product = dy.f_mul(output)?.f_to_kind(Kind::Float)?;
            d_weights.push(product.f_sum_dim_intlist([-1i64].as_slice(), true, Kind::Float)?);
        }
        let tokens = d.rows[0].len();
        let mut order = vec![0i64; d.tokens.len()];
        for (k, rows) in d.rows.iter().enumerate() {
            for (token, &row) in rows.iter().enumerate().filter(|(_, row)| **row >= 0) {
                order[row as usize] = (k * tokens + token) as i64;
            }
        }
        let rows = Tensor::f_cat(&by_choice, 0)?.f_index_select(0, &self.index(&order)?)?;
        gate.d_weights = Some(Tensor::f_cat(&d_weights, 1)?);
        gate.residual = Some(dy);
        Ok((rows, Saved::Gate(gate)))
    }

    pub(super) fn gate_backward_inner(
        &self,
        d: &Dispatch,
        saved: Saved,
        inputs: &[Tensor],
        load: &[u32],
    ) -> Result<(Tensor, Gradient)> {
        let Saved::Gate(gate) = saved else { return Err(Error::OutOfTurn("gate_backward")) };
        let (Some(d_weights), Some(residual)) = (gate.d_weights, gate.residual) else {
            return Err(Error::OutOfTurn("gate_backward"));
        };
        let mut penalty = gate.penalty;
        if let Some(mean) = &gate.mean {
            let experts = self.architecture.experts;
            if load.len() != experts {
                return Err(Error::Load { experts, found: load.len() });
            }
            let (tokens, layers) = (d.rows[0].len(), self.architecture.moe_layers().count());
            let pooled = pooled_aux_loss(mean, load, tokens, layers)?;
            penalty = penalty.f_add(&pooled.f_mul_scalar(self.training.aux_loss)?)?;
        }
        let [first, second] = self
            .by_token(d, Tensor::f_cat(inputs, 0)?)?
            .try_into()
            .map_err(|_| Error::OutOfTurn("gate_backward"))?;
        let scalar = gate
            .normed
            .f_mul(&first.f_add(&second)?)?
            .f_sum(Kind::Float)?
            .f_add(&gate.weights.f_mul(&d_weights)?.f_sum(Kind::Float)?)?
            .f_add(&penalty)?;
        let mut all = gradients(&scalar, &[&gate.x, &gate.leaves[0], &gate.leaves[1]])?;
        let dx = all.remove(0).f_add(&residual)?;
        Ok((dx, Gradient(all)))
    }

    pub(super) fn expert_inner(&self, p: &Params, x: Tensor, train: bool) -> Result<(Tensor, Saved)> {
        let Passed { h, a, y } = expert::forward(&self.architecture, &p.0, &x)?;
        Ok((y, if train { Saved::Expert { x, h, a, dy: None } } else { Saved::None }))
    }

    pub(super) fn expert_backward_inner(
        &self,
        p: &Params,
        saved: Saved,
        dy: Tensor,
    ) -> Result<(Tensor, Saved)> {
        let Saved::Expert { x, h, a, .. } = saved else { return Err(Error::OutOfTurn("expert_backward")) };
        let (dh, dx) = expert::backward(&self.architecture, &p.0, &h, &dy)?;
        Ok((dx, Saved::Expert { x, h: dh, a, dy: Some(dy) }))
    }

    pub(super) fn expert_gradient_inner(lanes: Vec<Saved>) -> Result<Option<Gradient>> {
        let mut calls = Vec::new();
        for lane in &lanes {
            let Saved::Expert { x, h, a, dy: Some(dy) } = lane else {
                return Err(Error::OutOfTurn("expert_gradient"));
            };
            if x.size()[0] > 0 {
                calls.push(Gradients { x, dh: h, a, dy });
            }
        }
        if calls.is_empty() {
            return Ok(None);
        }
        Ok(Some(Gradient(expert::weight_gradients(&calls)?)))
    }
}
