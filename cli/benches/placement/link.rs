//! A network namespace at the other end of a slow link, with a bandwidth and a delay.
//!
//! `tc netem` does the same if the kernel has it; this needs only /dev/net/tun. The ends of the link are TUN
//! devices, one of them in the namespace, and two threads forward packets between them.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};
use tun_rs::{DeviceBuilder, SyncDevice};

const NAMESPACE: &str = "volary-bench";
const DEVICES: [&str; 2] = ["volary0", "volary1"];
/// The addresses of the link's two ends: here, and in the namespace.
pub(crate) const ENDS: [&str; 2] = ["10.213.7.1", "10.213.7.2"];
/// The longest queue; later packets are dropped, as by a router.
const QUEUE_MAX: Duration = Duration::from_millis(100);
/// Packets in flight, in one direction.
const PACKETS_MAX: usize = 1 << 14;
/// The largest packet, in bytes.
const MTU: u16 = 1500;

/// The properties of a link.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Shape {
    /// Megabits per second, each way.
    pub(crate) megabits: f64,
    /// Delay in milliseconds, each way.
    pub(crate) delay_ms: f64,
}

/// The namespace; dropping it removes the namespace.
pub(crate) struct SlowLink;

/// Runs `ip`, and returns whether it succeeded.
fn ip(args: &str) -> bool {
    let status = Command::new("ip").args(args.split_whitespace()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

impl SlowLink {
    /// `None` if this machine or its user cannot create one.
    pub(crate) fn new(shape: Shape) -> Option<Self> {
        // The remains of a killed run.
        drop(Self);
        let device = |name| DeviceBuilder::new().name(name).mtu(MTU).enable(false).build_sync().map(Arc::new);
        let ends = [device(DEVICES[0]).ok()?, device(DEVICES[1]).ok()?];
        let ([here, there], [inside, outside]) = (DEVICES, ENDS);
        let created = ip(&format!("netns add {NAMESPACE}"))
            && ip(&format!("link set {there} netns {NAMESPACE}"))
            && ip(&format!("addr add {inside}/24 dev {here}"))
            && ip(&format!("link set {here} up txqueuelen {PACKETS_MAX}"))
            && ip(&format!("-n {NAMESPACE} addr add {outside}/24 dev {there}"))
            && ip(&format!("-n {NAMESPACE} link set {there} up txqueuelen {PACKETS_MAX}"))
            && ip(&format!("-n {NAMESPACE} link set lo up"));
        let link = created.then_some(Self)?;
        forward(&ends[0], &ends[1], shape);
        forward(&ends[1], &ends[0], shape);
        Some(link)
    }

    /// The prefix of a command that runs in the namespace.
    pub(crate) fn prefix() -> String {
        format!("ip netns exec {NAMESPACE} ")
    }
}

impl Drop for SlowLink {
    fn drop(&mut self) {
        // The threads end with their devices.
        ip(&format!("link del {}", DEVICES[0]));
        ip(&format!("netns del {NAMESPACE}"));
    }
}

/// A packet and its time of arrival.
type InFlight = (Instant, Vec<u8>);

/// Forwards packets from one device to the other until one of them is removed.
fn forward(from: &Arc<SyncDevice>, to: &Arc<SyncDevice>, shape: Shape) {
    let (from, to) = (Arc::clone(from), Arc::clone(to));
    let (sender, packets) = sync_channel(PACKETS_MAX);
    std::thread::spawn(move || send(&from, &sender, shape));
    std::thread::spawn(move || deliver(&to, &packets));
}

fn send(from: &SyncDevice, packets: &SyncSender<InFlight>, shape: Shape) {
    let mut packet = vec![0; usize::from(MTU) + 64];
    let mut wire_free = Instant::now();
    while let Ok(length) = from.recv(&mut packet) {
        let now = Instant::now();
        if wire_free > now + QUEUE_MAX {
            continue;
        }
        let seconds = length as f64 * 8.0 / (shape.megabits * 1e6);
        wire_free = wire_free.max(now) + Duration::from_secs_f64(seconds);
        let arrives = wire_free + Duration::from_secs_f64(shape.delay_ms / 1e3);
        if let Err(TrySendError::Disconnected(_)) = packets.try_send((arrives, packet[..length].to_vec())) {
            return;
        }
    }
}

fn deliver(to: &SyncDevice, packets: &Receiver<InFlight>) {
    while let Ok((arrives, packet)) = packets.recv() {
        std::thread::sleep(arrives.saturating_duration_since(Instant::now()));
        if to.send(&packet).is_err() {
            return;
        }
    }
}
