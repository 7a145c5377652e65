//! The memory that a node may use unless `--memory` is given.

use anyhow::Context;
use std::process::Command;
use volary_model::device::Device;

/// The fraction of free memory that is left to the process itself and to what the plan does not count.
const RESERVED: f64 = 0.1;

/// Free memory of the GPU, or what the machine has available and its control group allows, less what the
/// process itself needs (a tenth); in bytes.
///
/// # Errors
/// When the free memory of a GPU is unknown.
pub fn usable_bytes(device: Device) -> anyhow::Result<u64> {
    let free = match device {
        Device::Cuda(index) => gpu_bytes(index).context("unknown free memory of the GPU: give --memory")?,
        _ => host_bytes(),
    };
    Ok((free as f64 * (1.0 - RESERVED)) as u64)
}

/// Free memory of a GPU, from the driver's own tool.
fn gpu_bytes(index: usize) -> anyhow::Result<u64> {
    let query = ["--query-gpu=memory.free", "--format=csv,noheader,nounits", "--id"];
    let output = Command::new("nvidia-smi").args(query).arg(index.to_string()).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mib: u64 = text.trim().parse().with_context(|| format!("nvidia-smi printed {text:?}"))?;
    Ok(mib << 20)
}

fn host_bytes() -> u64 {
    let available = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("MemAvailable:"))?.to_owned();
        line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
    });
    // Control groups of version 2, and of version 1.
    let limits = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
    let limit = |path: &&str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let limit = limits.iter().filter_map(limit).min();
    available.unwrap_or(u64::MAX).min(limit.unwrap_or(u64::MAX))
}
