//! `volary doctor`: what this machine has, and what to mend.

use crate::commands::plan::bytes;
use volary_model::device;

/// UDP buffers that loopback links ask for.
const UDP_BUFFER: u64 = 4 << 20;

/// Say what this machine has and what to mend.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  volary doctor
  volary doctor --has-cuda && echo 'a GPU is here'")]
pub struct Args {
    /// Print nothing; succeed when libtorch can use a CUDA device.
    #[arg(long)]
    has_cuda: bool,
}

/// Runs the command.
///
/// # Errors
/// With `--has-cuda`, when there is none; otherwise when something cannot be measured.
pub fn run(args: Args) -> anyhow::Result<()> {
    if args.has_cuda {
        if device::cuda_devices() == 0 {
            std::process::exit(1);
        }
        return Ok(());
    }
    let mut mend = Vec::new();
    libtorch(&mut mend);
    devices();
    udp(&mut mend);
    println!("products        {:.1} GFLOP/s in f32 on one thread (512 x 512)", device::measure_products()?);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let report = runtime.block_on(volary_transport::measure_loopback(256 << 20, 1 << 20))?;
    println!(
        "QUIC loopback   {:.2} GB/s in frames of 1 MiB, round trip {:.0} us",
        report.gigabytes_per_second,
        report.round_trip.as_secs_f64() * 1e6
    );
    if mend.is_empty() {
        println!("nothing to mend");
    }
    mend.iter().for_each(|line| println!("to mend         {line}"));
    Ok(())
}

fn libtorch(mend: &mut Vec<String>) {
    let path = device::torch_library();
    let place = path.as_ref().map_or_else(|| "unknown place".into(), |path| path.display().to_string());
    let version = device::torch_version().unwrap_or_else(|| "of unknown version".into());
    println!("libtorch        {version} at {place}");
    if !version.starts_with("2.11.") {
        mend.push(format!("libtorch is {version}, and Volary is built for 2.11: set VOLARY_LIBTORCH to one"));
    }
}

fn devices() {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| {
        let line = memory.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| bytes(kib * 1024))
    };
    let unknown = || "unknown".to_owned();
    println!(
        "cpu             {cores} threads, {} of memory, {} available",
        field("MemTotal:").unwrap_or_else(unknown),
        field("MemAvailable:").unwrap_or_else(unknown)
    );
    match device::cuda_devices() {
        0 => println!("cuda            none that libtorch can use"),
        count => (0..count).for_each(|index| println!("cuda:{index}          {}", gpu(index))),
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

fn udp(mend: &mut Vec<String>) {
    let read =
        |path: &str| std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok());
    for (name, path) in [("receive", "/proc/sys/net/core/rmem_max"), ("send", "/proc/sys/net/core/wmem_max")]
    {
        let Some(limit) = read(path) else { continue };
        println!("UDP {name:<11} buffers up to {}", bytes(limit));
        if limit < UDP_BUFFER {
            let key = path.trim_start_matches("/proc/sys/").replace('/', ".");
            mend.push(format!("QUIC is steadier with larger UDP buffers: sysctl -w {key}={UDP_BUFFER}"));
        }
    }
    match read("/sys/class/net/lo/mtu") {
        Some(mtu) => {
            println!("loopback MTU    {mtu}");
            if mtu < 65_536 {
                mend.push(format!(
                    "the loopback MTU is {mtu}: ip link set lo mtu 65536 makes local links three times faster"
                ));
            }
        }
        None => println!("loopback MTU    unknown"),
    }
}
