//! The gate of an MoE layer.

use super::rms_norm;
use crate::error::Result;
use tch::{Device, Kind, Tensor};
use volary_core::architecture::Family;
use volary_core::dispatch::TOP_K;

/// The output of the gate for one lane and layer.
pub(crate) struct Gate {
    /// The normalized input: `[tokens, hidden]`, activations.
    pub(crate) normed: Tensor,
    /// The two chosen experts: `[tokens, 2]`, i64.
    pub(crate) experts: Tensor,
    /// Their gate weights, which sum to 1: `[tokens, 2]`, f32.
    pub(crate) weights: Tensor,
    /// The load-balancing loss of this layer, E * sum of f_e * P_e, a scalar, f32. In GLaM f_e counts first
    /// choices (GShard, section 2.2), and 1 is even; in Qwen3 both choices, and 2 is even.
    pub(crate) aux_loss: Tensor,
    /// The mean squared logsumexp of the logits (ST-MoE, arXiv 2202.08906, equation 5): a scalar, f32.
    pub(crate) z_loss: Tensor,
    /// The probabilities of all experts: `[tokens, experts]`, f32.
    pub(crate) probabilities: Tensor,
    /// The means of the probabilities over tokens: `[experts]`, f32.
    pub(crate) mean: Tensor,
}

impl Gate {
    /// Norm, logits and softmax in f32, and the top two (GLaM, section 4). `x` is `[tokens, hidden]`, `norm`
    /// `[hidden]` and `gate` `[hidden, experts]`.
    pub(crate) fn forward(family: Family, x: &Tensor, norm: &Tensor, gate: &Tensor) -> Result<Self> {
        let experts_count = gate.size()[1];
        let normed = rms_norm(x, norm)?;
        let logits = normed.f_to_kind(Kind::Float)?.f_matmul(gate)?;
        let probabilities = logits.f_softmax(-1, Kind::Float)?;
        let (top, experts) = probabilities.f_topk(TOP_K as i64, -1, true, true)?;
        let total = top.f_sum_dim_intlist([-1i64].as_slice(), true, Kind::Float)?;
        let (total, counted) = match family {
            Family::Glam => (total.f_add_scalar(1e-9)?, experts.f_select(1, 0)?),
            Family::Qwen3Moe => (total, experts.f_flatten(0, -1)?),
        };
        let tokens = x.size()[0].max(1) as f64;
        let share = counted
            .f_bincount::<Tensor>(None, experts_count)?
            .f_to_kind(Kind::Float)?
            .f_div_scalar(tokens)?;
        let mean = probabilities.f_mean_dim([0i64].as_slice(), false, Kind::Float)?;
        let aux_loss = share.f_mul(&mean)?.f_sum(Kind::Float)?.f_mul_scalar(experts_count as f64)?;
        let z_loss = logits.f_logsumexp([-1i64].as_slice(), false)?.f_square()?.f_mean(Kind::Float)?;
        Ok(Self { normed, experts, weights: top.f_div(&total)?, aux_loss, z_loss, probabilities, mean })
    }

    /// On the host: each token's first and second expert, the load-balancing loss, and the mean over tokens
    /// of the entropy of the probabilities, in nats. One copy, since a GPU is waited for at each; f64 holds
    /// all of it exactly.
    pub(crate) fn on_host(&self) -> Result<(Vec<i64>, Vec<i64>, f64, f64)> {
        let tokens = self.experts.size()[0] as usize;
        let entropy = self.probabilities.f_detach()?.f_special_entr()?.f_sum(Kind::Double)?;
        let parts = [
            self.experts.f_tr()?.f_reshape([-1i64].as_slice())?.f_to_kind(Kind::Double)?,
            self.aux_loss.f_detach()?.f_to_kind(Kind::Double)?.f_view([1i64].as_slice())?,
            entropy.f_view([1i64].as_slice())?,
        ];
        let mut first: Vec<f64> = Vec::try_from(Tensor::f_cat(&parts, 0)?.f_to_device(Device::Cpu)?)?;
        let entropy = first.pop().unwrap_or_default() / tokens.max(1) as f64;
        let aux_loss = first.pop().unwrap_or_default();
        let second = first.split_off(tokens);
        let experts = |choices: Vec<f64>| choices.into_iter().map(|expert| expert as i64).collect();
        Ok((experts(first), experts(second), aux_loss, entropy))
    }
}

/// One layer's part of the load-balancing loss over `layers` MoE layers together, as Hugging Face computes it
/// for `qwen3_moe`: E * sum of f_e * P_e, with both means over the tokens of all layers. `mean` has this
/// layer's P_e, `[experts]`, and `load` the choices of all layers, of `tokens` tokens each. A scalar, f32.
pub(crate) fn pooled_aux_loss(mean: &Tensor, load: &[u32], tokens: usize, layers: usize) -> Result<Tensor> {
    let all = (tokens * layers).max(1) as f64;
    let share: Vec<f32> = load.iter().map(|&count| (f64::from(count) / all) as f32).collect();
    let share = Tensor::f_from_slice(&share)?.f_to_device(mean.device())?;
    let scale = load.len() as f64 / layers.max(1) as f64;
    Ok(mean.f_mul(&share)?.f_sum(Kind::Float)?.f_mul_scalar(scale)?)
}
