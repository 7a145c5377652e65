//! A network namespace at the other end of a slow link: every packet takes its time on the wire, and waits out the way.
//!
//! `tc netem` would do the same, where the kernel has it; this needs no more than /dev/net/tun. The link's two ends are TUN devices, of which
//! one is moved into the namespace, and two threads carry packets between them.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};
use tun_rs::{DeviceBuilder, SyncDevice};

const NAMESPACE: &str = "volary-bench";
const DEVICES: [&str; 2] = ["volary0", "volary1"];
/// The addresses of the link's two ends: here, and in the namespace.
pub(crate) const ENDS: [&str; 2] = ["10.213.7.1", "10.213.7.2"];
/// The longest queue before the wire: what comes then is dropped, as a router would.
const QUEUE_MAX: Duration = Duration::from_millis(100);
/// Packets on their way at a time, in one direction.
const PACKETS_MAX: usize = 1 << 14;
/// Bytes of the largest packet.
const MTU: u16 = 1500;

/// What a link does to packets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Shape {
    /// Megabits per second, each way.
    pub(crate) megabits: f64,
    /// Milliseconds of the way, each way.
    pub(crate) delay_ms: f64,
}

/// The namespace, which is removed when this is dropped.
pub(crate) struct SlowLink;

fn ip(words: &str) -> bool {
    let status = Command::new("ip").args(words.split_whitespace()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

impl SlowLink {
    /// `None` where this machine or its user may make none.
    pub(crate) fn new(shape: Shape) -> Option<Self> {
        // What a run that was killed left behind.
        drop(Self);
        let device = |name| DeviceBuilder::new().name(name).mtu(MTU).enable(false).build_sync().map(Arc::new);
        let ends = [device(DEVICES[0]).ok()?, device(DEVICES[1]).ok()?];
        let ([here, there], [inside, outside]) = (DEVICES, ENDS);
        let made = ip(&format!("netns add {NAMESPACE}"))
            && ip(&format!("link set {there} netns {NAMESPACE}"))
            && ip(&format!("addr add {inside}/24 dev {here}"))
            && ip(&format!("link set {here} up txqueuelen {PACKETS_MAX}"))
            && ip(&format!("-n {NAMESPACE} addr add {outside}/24 dev {there}"))
            && ip(&format!("-n {NAMESPACE} link set {there} up txqueuelen {PACKETS_MAX}"))
            && ip(&format!("-n {NAMESPACE} link set lo up"));
        let link = made.then_some(Self)?;
        carry(&ends[0], &ends[1], shape);
        carry(&ends[1], &ends[0], shape);
        Some(link)
    }

    /// What a command begins with to run at the other end.
    pub(crate) fn there() -> String {
        format!("ip netns exec {NAMESPACE} ")
    }
}

impl Drop for SlowLink {
    fn drop(&mut self) {
        // The threads find their devices gone, and end.
        ip(&format!("link del {}", DEVICES[0]));
        ip(&format!("netns del {NAMESPACE}"));
    }
}

/// A packet, and when it arrives.
type OnItsWay = (Instant, Vec<u8>);

/// Carries packets from one device to the other until one of them is gone.
fn carry(from: &Arc<SyncDevice>, to: &Arc<SyncDevice>, shape: Shape) {
    let (from, to) = (Arc::clone(from), Arc::clone(to));
    let (sender, way) = sync_channel(PACKETS_MAX);
    std::thread::spawn(move || send(&from, &sender, shape));
    std::thread::spawn(move || deliver(&to, &way));
}

fn send(from: &SyncDevice, way: &SyncSender<OnItsWay>, shape: Shape) {
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
        if let Err(TrySendError::Disconnected(_)) = way.try_send((arrives, packet[..length].to_vec())) {
            return;
        }
    }
}

fn deliver(to: &SyncDevice, way: &Receiver<OnItsWay>) {
    while let Ok((arrives, packet)) = way.recv() {
        std::thread::sleep(arrives.saturating_duration_since(Instant::now()));
        if to.send(&packet).is_err() {
            return;
        }
    }
}
