//! Copies of tensors between the device and the wire.
//!
//! A GPU copies through a pinned buffer, which its copy engine accesses directly. Imported tensors are in
//! memory that libtorch allocates, aligned to 64 bytes, so that a product never depends on the alignment of a
//! frame.

use crate::error::{Error, Result};
use crate::weights::host_bytes;
use tch::{Device, Kind, Tensor};
use volary_core::compute::{HostDtype, HostTensor};

fn kind_of(dtype: HostDtype) -> Kind {
    match dtype {
        HostDtype::F32 => Kind::Float,
        HostDtype::Bf16 => Kind::BFloat16,
    }
}

/// A copy of a tensor on the host, f32 or bf16.
pub(crate) fn export(x: &Tensor) -> Result<HostTensor> {
    let dtype = match x.f_kind()? {
        Kind::Float => HostDtype::F32,
        Kind::BFloat16 => HostDtype::Bf16,
        other => return Err(Error::WireKind(other)),
    };
    let shape = x.size().iter().map(|&n| n as usize).collect();
    let data = match x.device() {
        Device::Cuda(_) => {
            let mut pinned = pinned(&x.size(), x.f_kind()?, x.device())?;
            pinned.f_copy_(&x.f_detach()?)?;
            host_bytes(&pinned)?
        }
        _ => host_bytes(x)?,
    };
    Ok(HostTensor { dtype, shape, data })
}

/// A tensor on the device from its bytes, row-major and little-endian.
pub(crate) fn import(dtype: HostDtype, shape: &[usize], data: &[u8], device: Device) -> Result<Tensor> {
    let kind = kind_of(dtype);
    let size: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
    let expected = shape.iter().try_fold(kind.elt_size_in_bytes(), |bytes, &n| bytes.checked_mul(n));
    if expected != Some(data.len()) {
        return Err(Error::ByteCount { bytes: data.len(), shape: shape.to_vec() });
    }
    let host = Tensor::f_from_data_size(data, &size, kind)?;
    if let Device::Cuda(_) = device {
        let mut pinned = pinned(&size, kind, device)?;
        pinned.f_copy_(&host)?;
        return Ok(pinned.f_to_device(device)?);
    }
    Ok(host)
}

/// An uninitialized tensor in pinned memory of the host.
fn pinned(size: &[i64], kind: Kind, device: Device) -> Result<Tensor> {
    Ok(Tensor::f_empty(size, (kind, Device::Cpu))?.f_pin_memory(device)?)
}
