//! Between the device and the wire.
//!
//! From a GPU, bytes go through a pinned buffer, which the copy engine reads and writes directly. On the way in libtorch allocates
//! the memory, 64-byte aligned, so that a product never depends on where a frame happened to lie.

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

/// To the host.
pub(crate) fn export(x: &Tensor) -> Result<HostTensor> {
    let dtype = match x.f_kind()? {
        Kind::Float => HostDtype::F32,
        Kind::BFloat16 => HostDtype::Bf16,
        other => return Err(Error::Input(format!("a tensor of kind {other:?} does not cross the wire"))),
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

/// To the device; the bytes must be as many as the shape says.
pub(crate) fn import(dtype: HostDtype, shape: &[usize], data: &[u8], device: Device) -> Result<Tensor> {
    let kind = kind_of(dtype);
    let size: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
    let expected = shape.iter().try_fold(kind.elt_size_in_bytes(), |bytes, &n| bytes.checked_mul(n));
    if expected != Some(data.len()) {
        return Err(Error::Input(format!("{} bytes came for a tensor of shape {shape:?}", data.len())));
    }
    let host = Tensor::f_from_data_size(data, &size, kind)?;
    if let Device::Cuda(_) = device {
        let mut pinned = pinned(&size, kind, device)?;
        pinned.f_copy_(&host)?;
        return Ok(pinned.f_to_device(device)?);
    }
    Ok(host)
}

fn pinned(size: &[i64], kind: Kind, device: Device) -> Result<Tensor> {
    Ok(Tensor::f_empty(size, (kind, Device::Cpu))?.f_pin_memory(device)?)
}
