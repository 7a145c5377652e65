//! Devices, threads, and the environment that libtorch needs.

use crate::error::{Error, Result};
use crate::limits::{PRODUCTS, SIDE};
use std::path::PathBuf;
use tch::Cuda;
pub use tch::Device;

/// Variables that make the results of libtorch independent of the alignment of buffers and of the number of
/// threads, and equal on all CPUs with AVX2: MKL, libtorch's own kernels and oneDNN would each choose wider
/// vectors where there are any. They must be in the environment before the process starts, since OpenMP reads
/// them at load time.
#[must_use]
pub fn environment() -> Vec<(&'static str, &'static str)> {
    let mut variables = vec![
        ("OMP_NUM_THREADS", "1"),
        ("MKL_NUM_THREADS", "1"),
        ("MKL_CBWR", "AVX2,STRICT"),
        // Without it, cuBLAS may choose among algorithms with other bits.
        ("CUBLAS_WORKSPACE_CONFIG", ":4096:8"),
    ];
    // libtorch takes the value without a look at the CPU.
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
        variables.extend([("ATEN_CPU_CAPABILITY", "avx2"), ("ONEDNN_MAX_CPU_ISA", "AVX2")]);
    }
    variables
}

/// The device of a name: `auto` (the first GPU, or the CPU), `cpu`, `cuda` or `cuda:N`.
///
/// # Errors
/// [`Error::Device`] when the name has another form, or the machine has no such device.
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
    load_cuda().map_err(|error| fail(format!("cannot load libtorch's CUDA library ({error})")))?;
    let count = Cuda::device_count();
    if index as i64 >= count {
        return Err(fail(format!("this machine has {count} CUDA devices")));
    }
    Ok(Device::Cuda(index))
}

/// The name of a device, as [`parse`] accepts it.
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
    // The library stays loaded: registered kernels point into it.
    std::mem::forget(library);
    deterministic_cuda();
    Ok(())
}

/// Makes CUDA's kernels give the same bits each time (`settings.cpp`).
#[expect(unsafe_code, reason = "a call of C++")]
fn deterministic_cuda() {
    unsafe extern "C" {
        safe fn volary_deterministic_cuda();
    }
    volary_deterministic_cuda();
}

/// The path of this process's `libtorch_cpu.so`.
#[must_use]
pub fn torch_library() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let line = maps.lines().find(|line| line.ends_with("/libtorch_cpu.so"))?;
    line.find('/').map(|start| PathBuf::from(&line[start..]))
}

/// The version of this process's libtorch, from the `version.py` in its folder.
#[must_use]
pub fn torch_version() -> Option<String> {
    let root = torch_library()?.parent()?.parent()?.to_path_buf();
    let text = std::fs::read_to_string(root.join("version.py"))
        .or_else(|_| std::fs::read_to_string(root.join("build-version")))
        .ok()?;
    let quoted = text.lines().find_map(|line| line.strip_prefix("__version__ = ")).unwrap_or(&text);
    Some(quoted.trim().trim_matches('\'').to_owned())
}

/// Makes libtorch use one thread for calls of the calling thread: calls run in parallel, not their kernels.
pub fn single_thread() {
    tch::set_num_threads(1);
}

/// The number of threads that libtorch uses for calls of the calling thread.
#[must_use]
pub fn threads() -> u16 {
    u16::try_from(tch::get_num_threads()).unwrap_or(1).max(1)
}

/// Makes libtorch use `count` threads for calls of the calling thread: for comparisons with plain loops.
pub fn set_threads(count: u16) {
    tch::set_num_threads(count.into());
}

/// The device of tests: that of `VOLARY_TEST_DEVICE`, or the CPU. Calls of the calling thread use one thread.
///
/// # Panics
/// When this machine has no such device.
#[doc(hidden)]
#[must_use]
#[expect(clippy::expect_used, reason = "for tests")]
pub fn for_tests() -> Device {
    single_thread();
    parse(&std::env::var("VOLARY_TEST_DEVICE").unwrap_or_else(|_| "cpu".into())).expect("VOLARY_TEST_DEVICE")
}

/// The number of CUDA devices; 0 if libtorch's CUDA library cannot be loaded.
#[must_use]
pub fn cuda_devices() -> usize {
    if load_cuda().is_err() {
        return 0;
    }
    usize::try_from(Cuda::device_count()).unwrap_or(0)
}

/// The speed of one thread in products of f32 matrices, `[512, 512]`: 10^9 floating-point operations per
/// second.
///
/// # Errors
/// [`Error::Torch`] when libtorch fails.
pub fn measure_products() -> Result<f64> {
    single_thread();
    let x = tch::Tensor::f_ones([SIDE, SIDE], (tch::Kind::Float, Device::Cpu))?;
    let _ = x.f_matmul(&x)?;
    let start = std::time::Instant::now();
    for _ in 0..PRODUCTS {
        let _ = x.f_matmul(&x)?;
    }
    Ok(2.0 * (SIDE as f64).powi(3) * f64::from(PRODUCTS) / start.elapsed().as_secs_f64() / 1e9)
}
