//! `volary doctor`: checks this machine and suggests fixes.

use crate::output;
use crate::units::bytes;
use std::fmt;
use std::path::PathBuf;
use volary_model::device;
use volary_transport::LoopbackReport;

/// The size of UDP buffers that QUIC on loopback links uses.
const UDP_BUFFER_BYTES: u64 = 4 << 20;
/// The MTU of a loopback link at which local transfers are fastest.
const LOOPBACK_MTU: u64 = 65_536;
/// Bytes of the QUIC measurement, in total and per frame.
const QUIC_BYTES: (usize, usize) = (256 << 20, 1 << 20);
/// The supported libtorch.
const LIBTORCH: &str = "2.11";

/// Check this machine and suggest fixes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  volary doctor
  volary doctor --has-cuda && echo 'a GPU is here'")]
pub struct Args {
    /// Print nothing; succeed if libtorch can use a CUDA device.
    #[arg(long)]
    has_cuda: bool,
}

/// Runs the command.
///
/// # Errors
/// With `--has-cuda`, when there is no CUDA device; otherwise when a measurement fails.
pub fn run(args: Args) -> anyhow::Result<()> {
    if args.has_cuda {
        if device::cuda_devices() == 0 {
            std::process::exit(1);
        }
        return Ok(());
    }
    let (libtorch, devices, network) = (Libtorch::find(), Devices::find(), Network::find());
    output::text(&libtorch)?;
    output::text(&devices)?;
    output::text(&network)?;
    let speed = Speed::measure()?;
    output::text(&speed)?;
    let fixes: Vec<String> = libtorch.fixes().chain(network.fixes()).collect();
    if fixes.is_empty() {
        output::line("no problems found")?;
    }
    for fix in fixes {
        output::line(format_args!("fix             {fix}"))?;
    }
    Ok(())
}

/// The loaded libtorch.
struct Libtorch {
    path: Option<PathBuf>,
    version: Option<String>,
}

impl Libtorch {
    fn find() -> Self {
        Self { path: device::torch_library(), version: device::torch_version() }
    }

    fn version(&self) -> &str {
        self.version.as_deref().unwrap_or("of unknown version")
    }

    fn fixes(&self) -> impl Iterator<Item = String> {
        let version = self.version();
        let is_supported = version.strip_prefix(LIBTORCH).is_some_and(|rest| rest.starts_with('.'));
        let fix = || format!("libtorch is {version}, expected {LIBTORCH}: set VOLARY_LIBTORCH to its folder");
        (!is_supported).then(fix).into_iter()
    }
}

impl fmt::Display for Libtorch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = self.path.as_ref().map_or_else(|| "unknown path".into(), |p| p.display().to_string());
        writeln!(f, "libtorch        {} at {place}", self.version())
    }
}

/// The CPU with its memory, and the GPUs.
struct Devices {
    cores: usize,
    memory_bytes: Option<u64>,
    available_bytes: Option<u64>,
    gpus: Vec<String>,
}

impl Devices {
    fn find() -> Self {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let field = |name: &str| {
            let line = text.lines().find(|line| line.starts_with(name))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
        };
        Self {
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: field("MemTotal:"),
            available_bytes: field("MemAvailable:"),
            gpus: (0..device::cuda_devices()).map(gpu).collect(),
        }
    }
}

impl fmt::Display for Devices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = |size: Option<u64>| size.map_or_else(|| "unknown".to_owned(), bytes);
        let (memory, available) = (size(self.memory_bytes), size(self.available_bytes));
        writeln!(f, "cpu             {} threads, {memory} of memory, {available} available", self.cores)?;
        if self.gpus.is_empty() {
            writeln!(f, "cuda            no usable device")?;
        }
        for (index, gpu) in self.gpus.iter().enumerate() {
            writeln!(f, "cuda:{index}          {gpu}")?;
        }
        Ok(())
    }
}

/// Name and memory of a GPU, from the driver's own tool.
fn gpu(index: usize) -> String {
    let query = ["--query-gpu=name,memory.total", "--format=csv,noheader", "-i", &index.to_string()]
        .map(str::to_owned);
    let output = std::process::Command::new("nvidia-smi").args(query).output();
    output
        .map_or_else(|_| "present".into(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The kernel's limits of UDP buffers, and the MTU of the loopback link.
struct Network {
    receive_buffer_bytes: Option<u64>,
    send_buffer_bytes: Option<u64>,
    loopback_mtu: Option<u64>,
}

impl Network {
    fn find() -> Self {
        let read =
            |path: &str| std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok());
        Self {
            receive_buffer_bytes: read("/proc/sys/net/core/rmem_max"),
            send_buffer_bytes: read("/proc/sys/net/core/wmem_max"),
            loopback_mtu: read("/sys/class/net/lo/mtu"),
        }
    }

    fn fixes(&self) -> impl Iterator<Item = String> {
        let buffers = [("rmem_max", self.receive_buffer_bytes), ("wmem_max", self.send_buffer_bytes)];
        let small =
            buffers.into_iter().filter(|(_, limit)| limit.is_some_and(|limit| limit < UDP_BUFFER_BYTES));
        let buffers = small.map(|(key, _)| {
            format!("larger UDP buffers make QUIC steadier: sysctl -w net.core.{key}={UDP_BUFFER_BYTES}")
        });
        let mtu = self.loopback_mtu.filter(|&mtu| mtu < LOOPBACK_MTU).map(|mtu| {
            format!(
                "the loopback MTU is {mtu}: ip link set lo mtu {LOOPBACK_MTU} makes local links three times faster"
            )
        });
        buffers.chain(mtu)
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, limit) in [("receive", self.receive_buffer_bytes), ("send", self.send_buffer_bytes)] {
            let Some(limit) = limit else { continue };
            writeln!(f, "UDP {name:<11} buffers up to {}", bytes(limit))?;
        }
        match self.loopback_mtu {
            Some(mtu) => writeln!(f, "loopback MTU    {mtu}"),
            None => writeln!(f, "loopback MTU    unknown"),
        }
    }
}

/// Measured speeds.
struct Speed {
    gigaflops: f64,
    quic: LoopbackReport,
}

impl Speed {
    fn measure() -> anyhow::Result<Self> {
        let gigaflops = device::measure_products()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let quic = runtime.block_on(volary_transport::measure_loopback(QUIC_BYTES.0, QUIC_BYTES.1))?;
        Ok(Self { gigaflops, quic })
    }
}

impl fmt::Display for Speed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (speed, round_trip) = (self.quic.gigabytes_per_second, self.quic.round_trip.as_secs_f64() * 1e6);
        writeln!(f, "products        {:.1} GFLOP/s in f32 on one thread (512 x 512)", self.gigaflops)?;
        writeln!(f, "QUIC loopback   {speed:.2} GB/s in frames of 1 MiB, round trip {round_trip:.0} us")
    }
}
