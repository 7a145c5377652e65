//! Parameters, operations and bytes of a model.

use crate::units::{bytes, short};
use serde::Serialize;
use std::fmt;
use volary_core::ShardId;
use volary_core::architecture::{Architecture, Preset};
use volary_core::options::TrainingOptions;

/// The costs of a model.
#[derive(Debug, Serialize)]
pub(super) struct ModelCosts {
    name: String,
    parameters: u64,
    activated_parameters: u64,
    /// Forward pass.
    flops_per_token: u64,
    /// Forward and backward pass.
    training_flops_per_token: u64,
    sequence_length: usize,
    shards: Vec<ShardGroup>,
    /// Weights and optimizer state of all shards, one copy.
    state_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    paper: Option<Paper>,
}

/// Equal shards.
#[derive(Debug, Serialize)]
struct ShardGroup {
    kind: &'static str,
    count: usize,
    /// Of one shard.
    parameters: u64,
    /// Of one shard.
    state_bytes: u64,
}

/// The numbers in table 4 of the GLaM paper.
#[derive(Debug, Serialize)]
struct Paper {
    parameters: &'static str,
    activated_parameters: &'static str,
}

impl ModelCosts {
    pub(super) fn new(name: &str, architecture: &Architecture, training: &TrainingOptions) -> Self {
        let sequence_length = training.sequence_length;
        let mut shards: Vec<ShardGroup> = Vec::new();
        for shard in architecture.shards() {
            let kind = match shard {
                ShardId::Embedding => "embedding",
                ShardId::Dense { layer } if architecture.is_moe(layer) => "attention",
                ShardId::Dense { .. } => "attention and feed-forward",
                ShardId::Router { .. } => "router",
                ShardId::Expert { .. } => "expert",
            };
            match shards.iter_mut().find(|group| group.kind == kind) {
                Some(group) => group.count += 1,
                None => shards.push(ShardGroup {
                    kind,
                    count: 1,
                    parameters: architecture.shard_parameters(shard),
                    state_bytes: volary_model::shard_bytes(architecture, &training.optimizer, shard),
                }),
            }
        }
        let flops_per_token = architecture.flops_per_token(sequence_length);
        Self {
            name: name.into(),
            parameters: architecture.parameters(),
            activated_parameters: architecture.activated_parameters(),
            flops_per_token,
            training_flops_per_token: 3 * flops_per_token,
            sequence_length,
            state_bytes: shards.iter().map(|group| group.state_bytes * group.count as u64).sum(),
            shards,
            paper: None,
        }
    }

    /// With the paper's numbers beside them.
    pub(super) fn of_preset(preset: &Preset, training: &TrainingOptions) -> Self {
        let paper =
            Paper { parameters: preset.paper_parameters, activated_parameters: preset.paper_activated };
        Self { paper: Some(paper), ..Self::new(preset.name, &preset.architecture, training) }
    }
}

impl fmt::Display for ModelCosts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let paper = |number: fn(&Paper) -> &'static str| {
            let paper = self.paper.as_ref();
            paper.map_or_else(String::new, |paper| format!("   (the paper prints {})", number(paper)))
        };
        let (parameters, activated) = (short(self.parameters), short(self.activated_parameters));
        writeln!(f, "{}", self.name)?;
        writeln!(f, "  parameters            {parameters:>10}{}", paper(|p| p.parameters))?;
        writeln!(f, "  activated per token   {activated:>10}{}", paper(|p| p.activated_parameters))?;
        let (forward, training) = (short(self.flops_per_token), short(self.training_flops_per_token));
        writeln!(
            f,
            "  FLOPs per token       {forward:>10}   forward, sequences of {}",
            self.sequence_length
        )?;
        writeln!(f, "                        {training:>10}   forward and backward")?;
        writeln!(f, "  state, one copy       {:>10}", bytes(self.state_bytes))?;
        writeln!(f, "  shards")?;
        for ShardGroup { kind, count, parameters, state_bytes } in &self.shards {
            let (parameters, state) = (short(*parameters), bytes(*state_bytes));
            writeln!(f, "    {count:>6} x {kind:<27}{parameters:>10}   {state:>10} of state each")?;
        }
        Ok(())
    }
}
