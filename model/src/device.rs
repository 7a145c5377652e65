//! Devices, threads and what must be set before libtorch runs.

use crate::error::{Error, Result};
use std::path::PathBuf;
use tch::Cuda;
pub use tch::Device;

/// What makes libtorch's results independent of where buffers lie and of how many threads there are. To be set
/// in the environment before the process starts, since OpenMP reads it as it is loaded.
pub const ENVIRONMENT: [(&str, &str); 3] =
    [("OMP_NUM_THREADS", "1"), ("MKL_NUM_THREADS", "1"), ("MKL_CBWR", "AVX2,STRICT")];

/// The device that `auto`, `cpu`, `cuda` or `cuda:N` names.
///
/// # Errors
/// When the text names no device, or one that is not there.
pub fn parse(name: &str) -> Result<Device> {
    let fail = |reason: String| Error::Device { name: name.to_owned(), reason };
    let index = match name {
        "cpu" => return Ok(Device::Cpu),
        "auto" => {
            return Ok(if load_cuda().is_ok() && Cuda::is_available() {
                Device::Cuda(0)
            } else {
                Device::Cpu
            });
        }
        "cuda" => 0,
        _ => name
            .strip_prefix("cuda:")
            .and_then(|n| n.parse::<usize>().ok())
            .ok_or_else(|| fail("expected auto, cpu, cuda or cuda:N".into()))?,
    };
    load_cuda().map_err(|error| fail(format!("libtorch's CUDA library cannot be loaded ({error})")))?;
    let count = Cuda::device_count();
    if index as i64 >= count {
        return Err(fail(format!("this machine has {count} CUDA devices")));
    }
    Ok(Device::Cuda(index))
}

/// The name that [`parse`] takes for a device.
#[must_use]
pub fn name(device: Device) -> String {
    match device {
        Device::Cuda(index) => format!("cuda:{index}"),
        _ => "cpu".into(),
    }
}

/// Loads `libtorch_cuda.so`: a plain link drops it as unneeded, and a machine without CUDA must not need it.
#[expect(unsafe_code, reason = "loading a library runs its initialisers; there is no safe form")]
fn load_cuda() -> std::result::Result<(), libloading::Error> {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
    let beside = torch_library().map(|path| path.with_file_name("libtorch_cuda.so"));
    let path = beside.filter(|path| path.exists()).unwrap_or_else(|| PathBuf::from("libtorch_cuda.so"));
    // SAFETY: libtorch's own library, whose initialisers only register kernels.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }?;
    // It stays for the life of the process: kernels point into it.
    std::mem::forget(library);
    Ok(())
}

/// Where this process has `libtorch_cpu.so` from.
#[must_use]
pub fn torch_library() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let line = maps.lines().find(|line| line.ends_with("/libtorch_cpu.so"))?;
    line.find('/').map(|start| PathBuf::from(&line[start..]))
}

/// The version of the libtorch that this process has loaded, from the `version.py` beside it.
#[must_use]
pub fn torch_version() -> Option<String> {
    let root = torch_library()?.parent()?.parent()?.to_path_buf();
    let text = std::fs::read_to_string(root.join("version.py"))
        .or_else(|_| std::fs::read_to_string(root.join("build-version")))
        .ok()?;
    let quoted = text.lines().find_map(|line| line.strip_prefix("__version__ = ")).unwrap_or(&text);
    Some(quoted.trim().trim_matches('\'').to_owned())
}

/// One libtorch thread per call on the calling thread: parallelism lives between calls.
pub fn single_thread() {
    tch::set_num_threads(1);
}

/// So many libtorch threads per call on the calling thread: for comparisons with plain loops.
pub fn set_threads(count: u16) {
    tch::set_num_threads(count.into());
}

/// CUDA devices on this machine; 0 where libtorch's CUDA library cannot be loaded.
#[must_use]
pub fn cuda_devices() -> usize {
    if load_cuda().is_err() {
        return 0;
    }
    usize::try_from(Cuda::device_count()).unwrap_or(0)
}

/// Billions of floating-point operations per second of one thread in an f32 product of 512 x 512 matrices.
///
/// # Errors
/// When libtorch cannot multiply.
pub fn measure_products() -> Result<f64> {
    single_thread();
    let x = tch::Tensor::f_ones([512, 512], (tch::Kind::Float, Device::Cpu))?;
    let _ = x.f_matmul(&x)?;
    let start = std::time::Instant::now();
    let rounds = 40;
    for _ in 0..rounds {
        let _ = x.f_matmul(&x)?;
    }
    Ok(2.0 * 512f64.powi(3) * f64::from(rounds) / start.elapsed().as_secs_f64() / 1e9)
}
