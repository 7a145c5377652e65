//! The experts of a layer, each on its tokens.

use crate::error::Result;
use crate::layers::{Gate, expert};
use tch::{Device, Tensor};
use volary_core::ExpertId;
use volary_core::architecture::Architecture;
use volary_core::dispatch::TOP_K;

/// The parameters of an MoE layer.
#[derive(Debug)]
pub(super) struct Mixture {
    /// `[hidden]`.
    pub(super) norm: Tensor,
    /// `[hidden, experts]`.
    pub(super) gate: Tensor,
    /// The parameters of each expert.
    pub(super) experts: Vec<Vec<Tensor>>,
}

impl Mixture {
    /// The same layer for another thread.
    pub(super) fn share(&self) -> Self {
        let shared = |expert: &Vec<Tensor>| expert.iter().map(Tensor::shallow_clone).collect();
        Self {
            norm: self.norm.shallow_clone(),
            gate: self.gate.shallow_clone(),
            experts: self.experts.iter().map(shared).collect(),
        }
    }

    /// The layer with the residual, `[rows, hidden]` to the same shape, and the two experts of each row.
    pub(super) fn forward(&self, a: &Architecture, x: &Tensor) -> Result<(Tensor, Vec<[ExpertId; TOP_K]>)> {
        let gate = Gate::forward(a.family, x, &self.norm, &self.gate)?;
        let chosen: Vec<i64> = Vec::try_from(gate.experts.f_flatten(0, -1)?.f_to_device(Device::Cpu)?)?;
        // Assignments by expert, and within each by row.
        let mut order: Vec<i64> = (0..chosen.len() as i64).collect();
        order.sort_by_key(|&at| chosen[at as usize]);
        let order_of = |pick: &dyn Fn(i64) -> i64| -> Result<Tensor> {
            let picked: Vec<i64> = order.iter().map(|&at| pick(at)).collect();
            Ok(Tensor::f_from_slice(&picked)?.f_to_device(x.device())?)
        };
        let (assignments, rows) = (order_of(&|at| at)?, order_of(&|at| at / TOP_K as i64)?);
        let inputs = gate.normed.f_index_select(0, &rows)?;
        let mut outputs = Vec::new();
        let mut start = 0;
        for of_expert in order.chunk_by(|a, b| chosen[*a as usize] == chosen[*b as usize]) {
            let parameters = &self.experts[chosen[of_expert[0] as usize] as usize];
            let count = of_expert.len() as i64;
            outputs.push(expert::forward(a, parameters, &inputs.f_narrow(0, start, count)?)?.y);
            start += count;
        }
        let weights = gate.weights.f_view([-1, 1])?.f_index_select(0, &assignments)?;
        let y = x.f_index_add(0, &rows, &Tensor::f_cat(&outputs, 0)?.f_mul(&weights)?)?;
        let experts =
            chosen.chunks_exact(TOP_K).map(|pair| [ExpertId(pair[0] as u16), ExpertId(pair[1] as u16)]);
        Ok((y, experts.collect()))
    }
}
