//! The parameters and optimizer state of a shard: names, initial values and stored form.
//!
//! The stored form is safetensors, with a weight under its name and optimizer state as `NAME.STATE`. Equal
//! bits give equal bytes on every node, so that a hash of the bytes is a hash of the shard.

use crate::error::{Error, Result};
use crate::limits::DIGEST_CHUNK;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use tch::{Device, Kind, Tensor};
use volary_core::architecture::{Architecture, Family};
use volary_core::options::Optimizer;
use volary_core::random::{Purpose, Stream};
use volary_core::{Digest, ExpertId, LayerId, ShardId, Step};

/// The initial values of a parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Initial {
    /// One value.
    Constant(f64),
    /// Uniform with this standard deviation. Uniform draws need only exact arithmetic, so that all machines
    /// start from the same bits.
    Uniform(f64),
}

/// What a parameter is to the optimizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// A matrix or the embedding: its size says how far a step may go, and it decays.
    Matrix,
    /// The gain of a norm, which does not decay.
    Norm,
    /// A table of position biases. It starts at 0, so that a rate in proportion to its size would hold it
    /// there, and 0 means "no preference", to which it need not be drawn.
    Position,
}

/// The name, shape and initial values of one parameter.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Parameter {
    pub(crate) name: &'static str,
    pub(crate) role: Role,
    pub(crate) shape: Vec<i64>,
    initial: Initial,
}

/// The parameters of a shard, in their fixed order.
pub(crate) fn parameters(a: &Architecture, shard: ShardId) -> Vec<Parameter> {
    let (hidden, width) = (a.hidden as i64, (a.heads * a.head_dim) as i64);
    let matrix = |name, rows: i64, columns: i64| Parameter {
        name,
        role: Role::Matrix,
        shape: vec![rows, columns],
        initial: Initial::Uniform(1.0 / (rows as f64).sqrt()),
    };
    let gain = |name, width: i64| {
        let initial = Initial::Constant(1.0);
        Parameter { name, role: Role::Norm, shape: vec![width], initial }
    };
    let norm = |name| gain(name, hidden);
    match shard {
        ShardId::Embedding => {
            let initial = Initial::Uniform(1.0 / (hidden as f64).sqrt());
            let shape = vec![a.vocabulary as i64, hidden];
            let table = |name| Parameter { name, role: Role::Matrix, shape: shape.clone(), initial };
            let mut list = vec![table("tokens"), norm("norm")];
            if !a.is_tied() {
                list.push(table("output"));
            }
            list
        }
        ShardId::Dense { layer } => {
            let position = Parameter {
                name: "attention.position",
                role: Role::Position,
                shape: vec![a.position_buckets as i64, a.heads as i64],
                initial: Initial::Constant(0.0),
            };
            let mut list = vec![
                norm("attention.norm"),
                matrix("attention.qkv", hidden, a.qkv_width() as i64),
                matrix("attention.output", width, hidden),
            ];
            match a.family {
                Family::Glam => list.push(position),
                Family::Qwen3Moe => {
                    let dim = a.head_dim as i64;
                    list.extend([gain("attention.query_norm", dim), gain("attention.key_norm", dim)]);
                }
            }
            if !a.is_moe(layer) {
                let feed_forward = a.feed_forward as i64;
                list.push(norm("feed_forward.norm"));
                list.push(matrix("feed_forward.gate", hidden, feed_forward));
                list.push(matrix("feed_forward.up", hidden, feed_forward));
                list.push(matrix("feed_forward.down", feed_forward, hidden));
            }
            list
        }
        ShardId::Router { .. } => vec![norm("norm"), matrix("gate", hidden, a.experts as i64)],
        ShardId::Expert { .. } => {
            let expert = a.expert_width() as i64;
            let mut list = match a.family {
                Family::Glam => Vec::new(),
                Family::Qwen3Moe => vec![matrix("gate", hidden, expert)],
            };
            list.extend([matrix("up", hidden, expert), matrix("down", expert, hidden)]);
            list
        }
    }
}

/// The names and shapes of a shard's parameters, in their fixed order.
#[must_use]
pub fn parameter_shapes(architecture: &Architecture, shard: ShardId) -> Vec<(&'static str, Vec<usize>)> {
    let shape = |p: &Parameter| p.shape.iter().map(|&n| n as usize).collect();
    parameters(architecture, shard).iter().map(|p| (p.name, shape(p))).collect()
}

/// The parameters of a stored shard, in their fixed order: f32, row-major and little-endian, without
/// optimizer state.
///
/// # Errors
/// [`Error::Stored`] or [`Error::SafeTensors`] when the bytes are not those of the shard.
pub fn parameter_bytes(architecture: &Architecture, shard: ShardId, stored: &[u8]) -> Result<Vec<Vec<u8>>> {
    let tensors = open(shard, stored)?;
    let bytes = |p: Parameter| Ok(view(&tensors, shard, p.name, &p.shape)?.data().to_vec());
    parameters(architecture, shard).into_iter().map(bytes).collect()
}

/// The names and shapes of the optimizer's state for one parameter.
pub(crate) fn state_shapes(optimizer: &Optimizer, shape: &[i64]) -> Vec<(&'static str, Vec<i64>)> {
    match (optimizer, shape) {
        (Optimizer::Adafactor { .. }, [rows, columns]) => {
            vec![("row", vec![*rows]), ("column", vec![*columns])]
        }
        (Optimizer::Adafactor { .. }, _) => vec![("second", shape.to_vec())],
        (Optimizer::Adamw { .. }, _) => vec![("first", shape.to_vec()), ("second", shape.to_vec())],
    }
}

/// Bytes of one shard's weights and optimizer state, f32.
#[must_use]
pub fn shard_bytes(architecture: &Architecture, optimizer: &Optimizer, shard: ShardId) -> u64 {
    let numbers = |shape: &[i64]| shape.iter().product::<i64>() as u64;
    parameters(architecture, shard)
        .iter()
        .map(|p| {
            let state = state_shapes(optimizer, &p.shape);
            4 * (numbers(&p.shape) + state.iter().map(|(_, shape)| numbers(shape)).sum::<u64>())
        })
        .sum()
}

/// One parameter with its optimizer state, f32.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) name: &'static str,
    pub(crate) role: Role,
    pub(crate) weight: Tensor,
    pub(crate) state: Vec<(&'static str, Tensor)>,
}

/// The parameters and optimizer state of one shard.
#[derive(Debug)]
pub struct Shard {
    pub(crate) slots: Vec<Slot>,
}

/// The header of a stored shard.
#[derive(Serialize, Deserialize)]
struct Header {
    format: u16,
    shard: ShardId,
    version: Step,
}

const FORMAT: u16 = 1;
const HEADER: &str = "volary";

impl Shard {
    /// The state before the first step.
    pub(crate) fn initial(
        a: &Architecture,
        optimizer: &Optimizer,
        seed: u64,
        shard: ShardId,
        device: Device,
    ) -> Result<Self> {
        let slots = parameters(a, shard).into_iter().enumerate().map(|(index, parameter)| {
            let weight = initial_values(&parameter, draws(seed, shard, index))?.f_to_device(device)?;
            let state = state_shapes(optimizer, &parameter.shape)
                .into_iter()
                .map(|(name, shape)| Ok((name, Tensor::f_zeros(&shape, (Kind::Float, device))?)))
                .collect::<Result<_>>()?;
            Ok(Slot { name: parameter.name, role: parameter.role, weight, state })
        });
        Ok(Self { slots: slots.collect::<Result<_>>()? })
    }

    /// The stored form.
    pub(crate) fn store(&self, shard: ShardId, version: Step) -> Result<Vec<u8>> {
        let mut owned: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
        for slot in &self.slots {
            let mut add = |name: String, tensor: &Tensor| -> Result<()> {
                let shape = tensor.size().iter().map(|&n| n as usize).collect();
                owned.push((name, shape, host_bytes(tensor)?));
                Ok(())
            };
            add(slot.name.into(), &slot.weight)?;
            for (name, tensor) in &slot.state {
                add(format!("{}.{name}", slot.name), tensor)?;
            }
        }
        serialize(&owned, shard, version)
    }

    /// A digest of all numbers, in the order of the parameters. It needs memory for one chunk only.
    pub(crate) fn digest(&self) -> Result<Digest> {
        let mut hasher = blake3::Hasher::new();
        for slot in &self.slots {
            for tensor in std::iter::once(&slot.weight).chain(slot.state.iter().map(|(_, state)| state)) {
                let numbers = tensor.f_detach()?.f_view([-1i64].as_slice())?;
                let count = tensor.numel() as i64;
                let mut start = 0;
                while start < count {
                    let length = DIGEST_CHUNK.min(count - start);
                    hasher.update(&host_bytes(&numbers.f_narrow(0, start, length)?)?);
                    start += length;
                }
            }
        }
        Ok(Digest(*hasher.finalize().as_bytes()))
    }

    /// A shard from its stored form, which must have every tensor in the expected shape.
    pub(crate) fn load(
        a: &Architecture,
        optimizer: &Optimizer,
        shard: ShardId,
        bytes: &[u8],
        device: Device,
    ) -> Result<Self> {
        let tensors = open(shard, bytes)?;
        let fetch = |name: &str, shape: &[i64]| {
            read(&tensors, shard, name, shape)?.f_to_device(device).map_err(Error::from)
        };
        let slots = parameters(a, shard).into_iter().map(|parameter| {
            let weight = fetch(parameter.name, &parameter.shape)?;
            let state = state_shapes(optimizer, &parameter.shape)
                .into_iter()
                .map(|(name, shape)| Ok((name, fetch(&format!("{}.{name}", parameter.name), &shape)?)))
                .collect::<Result<_>>()?;
            Ok(Slot { name: parameter.name, role: parameter.role, weight, state })
        });
        Ok(Self { slots: slots.collect::<Result<_>>()? })
    }
}

/// The stored form of named tensors with their shapes and bytes, f32.
fn serialize(tensors: &[(String, Vec<usize>, Vec<u8>)], shard: ShardId, version: Step) -> Result<Vec<u8>> {
    let views: Vec<(&str, TensorView<'_>)> = tensors
        .iter()
        .map(|(name, shape, data)| Ok((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), data)?)))
        .collect::<Result<_>>()?;
    // One key only: the order of several keys, and with it the hash, would differ between processes.
    let header = serde_json::to_string(&Header { format: FORMAT, shard, version })?;
    Ok(safetensors::serialize(views, Some(HashMap::from([(HEADER.into(), header)])))?)
}

/// The stored form of a shard at step 0 with given parameters: f32, row-major and little-endian, in their
/// fixed order. `None` takes the initial values of a run with this seed; the optimizer has seen no step.
///
/// # Errors
/// [`Error::Stored`] when their number is not that of the shard; [`Error::SafeTensors`] when one has another
/// size.
pub fn store_given(
    architecture: &Architecture,
    optimizer: &Optimizer,
    seed: u64,
    shard: ShardId,
    given: Vec<Option<Vec<u8>>>,
) -> Result<Vec<u8>> {
    let parameters = parameters(architecture, shard);
    if parameters.len() != given.len() {
        let reason = format!("{} tensors are given, expected {}", given.len(), parameters.len());
        return Err(Error::Stored { shard, reason });
    }
    let mut tensors = Vec::new();
    let size = |shape: &[i64]| shape.iter().map(|&n| n as usize).collect::<Vec<_>>();
    for (index, (parameter, given)) in parameters.into_iter().zip(given).enumerate() {
        let weight = match given {
            Some(bytes) => bytes,
            None => host_bytes(&initial_values(&parameter, draws(seed, shard, index))?)?,
        };
        tensors.push((parameter.name.to_owned(), size(&parameter.shape), weight));
        for (name, shape) in state_shapes(optimizer, &parameter.shape) {
            let zeros = vec![0; 4 * shape.iter().product::<i64>() as usize];
            tensors.push((format!("{}.{name}", parameter.name), size(&shape), zeros));
        }
    }
    serialize(&tensors, shard, Step(0))
}

/// The draws of the initial values of a shard's parameter.
fn draws(seed: u64, shard: ShardId, index: usize) -> Stream {
    let (kind, layer, expert) = match shard {
        ShardId::Embedding => (0, LayerId(0), ExpertId(0)),
        ShardId::Dense { layer } => (1, layer, ExpertId(0)),
        ShardId::Router { layer } => (2, layer, ExpertId(0)),
        ShardId::Expert { layer, expert } => (3, layer, expert),
    };
    Stream::new(seed, Purpose::Initial, &[kind, layer.0.into(), expert.0.into(), index as u64])
}

/// The parameters of a stored shard without their optimizer state, in their fixed order.
pub(crate) fn load_weights(
    a: &Architecture,
    shard: ShardId,
    bytes: &[u8],
    device: Device,
) -> Result<Vec<Tensor>> {
    let tensors = open(shard, bytes)?;
    let weight = |p: Parameter| Ok(read(&tensors, shard, p.name, &p.shape)?.f_to_device(device)?);
    parameters(a, shard).into_iter().map(weight).collect()
}

/// The stored form of a shard, whose header must name it.
fn open(shard: ShardId, bytes: &[u8]) -> Result<SafeTensors<'_>> {
    let (_, metadata) = SafeTensors::read_metadata(bytes)?;
    let header = metadata.metadata().as_ref().and_then(|m| m.get(HEADER));
    let header: Header = serde_json::from_str(header.map_or("", String::as_str))
        .map_err(|_| Error::Stored { shard, reason: "it has no volary header".into() })?;
    if (header.format, header.shard) != (FORMAT, shard) {
        let reason = format!("it is {} in format {}, expected format {FORMAT}", header.shard, header.format);
        return Err(Error::Stored { shard, reason });
    }
    Ok(SafeTensors::deserialize(bytes)?)
}

fn read(tensors: &SafeTensors<'_>, shard: ShardId, name: &str, shape: &[i64]) -> Result<Tensor> {
    let view = view(tensors, shard, name, shape)?;
    Ok(Tensor::f_from_data_size(view.data(), shape, Kind::Float)?)
}

/// A tensor of a stored shard, which must have this shape.
fn view<'a>(tensors: &SafeTensors<'a>, shard: ShardId, name: &str, shape: &[i64]) -> Result<TensorView<'a>> {
    let view = tensors
        .tensor(name)
        .map_err(|_| Error::Stored { shard, reason: format!("it has no tensor {name}") })?;
    let found: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
    if view.dtype() != Dtype::F32 || found != shape {
        let reason = format!("{name} is {:?} {found:?}, and this model expects F32 {shape:?}", view.dtype());
        return Err(Error::Stored { shard, reason });
    }
    Ok(view)
}

fn initial_values(parameter: &Parameter, mut stream: Stream) -> Result<Tensor> {
    let count: i64 = parameter.shape.iter().product();
    let values: Vec<f32> = match parameter.initial {
        Initial::Constant(value) => vec![value as f32; count as usize],
        Initial::Uniform(deviation) => {
            let half = deviation * 3f64.sqrt();
            (0..count).map(|_| ((2.0 * stream.next_f64() - 1.0) * half) as f32).collect()
        }
    };
    Ok(Tensor::f_from_slice(&values)?.f_view(parameter.shape.as_slice())?)
}

/// The bytes of a tensor on the host, row-major and little-endian.
pub(crate) fn host_bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    let host = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?;
    let numel = host.numel();
    let mut bytes = vec![0; numel * host.f_kind()?.elt_size_in_bytes()];
    host.f_copy_data_u8(&mut bytes, numel)?;
    Ok(bytes)
}
