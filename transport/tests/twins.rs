//! Links in memory keep the promises of QUIC: the same tests run over both, and over endpoints in memory.
#![expect(clippy::expect_used, clippy::unwrap_used, reason = "tests")]

use std::time::Duration;
use volary_core::Step;
use volary_transport::loopback::probe_frame;
use volary_transport::memory::{Faults, faulty_pair, pair};
use volary_transport::{
    Authority, ByteBudget, ClientAuth, CloseReason, Endpoint, Error, Frame, FrameKind, Inbound, InboundFrame,
    Link, Network, Part, TransportOptions, memory,
};

const LONG: Duration = Duration::from_secs(20);

/// Both ends of a link between two endpoints, which close when they are dropped.
async fn over(network: Network) -> (Link, Link, Vec<Endpoint>) {
    let authority = Authority::create().unwrap();
    let node = |name: &str| {
        let (address, identity) = (([127, 0, 0, 1], 0).into(), authority.identity(name).unwrap());
        network.bind(address, identity, ClientAuth::Required, &TransportOptions::default()).unwrap()
    };
    let (left, right) = (node("left"), node("right"));
    let accepting = right.clone();
    let accepted = tokio::spawn(async move { accepting.next_peer().await });
    let link = left.connect(right.local_addr(), "right").await.expect("a link");
    (link, accepted.await.unwrap().expect("a link"), vec![left, right])
}

async fn next(inbound: &mut Inbound) -> InboundFrame {
    tokio::time::timeout(LONG, inbound.next()).await.expect("in time").expect("a frame")
}

macro_rules! over_all {
    ($($name:ident)*) => {
        mod quic {
            use super::*;
            $(#[tokio::test]
            async fn $name() {
                let (left, right, endpoints) = over(Network::quic()).await;
                tokio::time::timeout(LONG, super::$name(left, right)).await.expect("in time");
                drop(endpoints);
            })*
        }
        mod memory_network {
            use super::*;
            $(#[tokio::test]
            async fn $name() {
                let (left, right, endpoints) = over(memory::Network::new().handle()).await;
                tokio::time::timeout(LONG, super::$name(left, right)).await.expect("in time");
                drop(endpoints);
            })*
        }
        mod memory_pair {
            use super::*;
            $(#[tokio::test]
            async fn $name() {
                let (left, right) = pair("left", "right");
                tokio::time::timeout(LONG, super::$name(left, right)).await.expect("in time");
            })*
        }
    };
}

over_all! {
    each_end_knows_the_name_of_the_other
    a_frame_and_a_request_come_through_whole
    control_messages_keep_their_order_and_end
    a_request_without_a_reply_fails
    a_request_has_a_timeout
    a_reason_reaches_the_other_end
    a_link_ends_with_its_last_handle
    an_oversized_or_inconsistent_frame_is_never_sent
    the_control_stream_is_taken_once
    frames_over_the_budget_wait_until_others_are_processed
}

async fn frames_over_the_budget_wait_until_others_are_processed(left: Link, right: Link) {
    const FRAMES: usize = 12;
    const BYTES: usize = 100 << 10;
    let mut inbound = right.serve_within(Some(ByteBudget::new(2 * BYTES as u64 + 1024)));
    let sending: Vec<_> = (0..FRAMES)
        .map(|_| {
            let left = left.clone();
            tokio::spawn(async move { left.send(probe_frame(BYTES)).await })
        })
        .collect();
    let mut held = vec![next(&mut inbound).await, next(&mut inbound).await];
    for received in 2..FRAMES {
        let early = tokio::time::timeout(Duration::from_millis(30), inbound.next()).await;
        assert!(early.is_err(), "frame {received} came although two are in memory");
        drop(held.remove(0));
        held.push(next(&mut inbound).await);
    }
    for sent in sending {
        sent.await.unwrap().unwrap();
    }
    assert!(held.iter().all(|frame| frame.frame == probe_frame(BYTES)));
}

async fn each_end_knows_the_name_of_the_other(left: Link, right: Link) {
    assert_eq!((left.peer(), right.peer()), ("right", "left"));
    assert!(left.remote_address().ip().is_loopback());
}

async fn a_frame_and_a_request_come_through_whole(left: Link, right: Link) {
    let mut inbound = right.serve();
    left.send(probe_frame(100_000)).await.unwrap();
    let got = next(&mut inbound).await;
    assert_eq!(got.frame, probe_frame(100_000));
    assert!(got.reply.is_none());
    let asking = tokio::spawn({
        let left = left.clone();
        async move { left.request(probe_frame(3)).await }
    });
    let asked = next(&mut inbound).await;
    assert_eq!(asked.frame, probe_frame(3));
    asked.reply.expect("a reply side").reply(probe_frame(4)).await.unwrap();
    assert_eq!(asking.await.unwrap().unwrap(), probe_frame(4));
    assert!(left.stats().bytes_sent > 100_000 && right.stats().bytes_received > 100_000);
}

async fn control_messages_keep_their_order_and_end(left: Link, right: Link) {
    let (mut sender, _) = left.take_control().unwrap();
    let (_, mut receiver) = right.take_control().unwrap();
    for number in 0..100u32 {
        sender.send(&(number, format!("message {number}"))).await.unwrap();
    }
    // The other end acknowledges the end while it reads.
    let finishing = tokio::spawn(sender.finish());
    for number in 0..100u32 {
        assert_eq!(receiver.recv().await.unwrap(), Some((number, format!("message {number}"))));
    }
    assert_eq!(receiver.recv::<(u32, String)>().await.unwrap(), None);
    finishing.await.unwrap();
}

async fn a_request_without_a_reply_fails(left: Link, right: Link) {
    let mut inbound = right.serve();
    let asking = tokio::spawn(async move { left.request(probe_frame(3)).await });
    drop(next(&mut inbound).await.reply);
    assert!(matches!(asking.await.unwrap(), Err(Error::Malformed { .. })));
}

async fn a_request_has_a_timeout(left: Link, right: Link) {
    let mut inbound = right.serve();
    let error = left.request_within(probe_frame(1), Duration::from_millis(200)).await.unwrap_err();
    assert!(error.to_string().contains("no answer within 200ms"), "{error}");
    drop(next(&mut inbound).await);
}

async fn a_reason_reaches_the_other_end(left: Link, right: Link) {
    left.close_with(7, "enough");
    assert_eq!(right.closed().await.to_string(), "closed by peer: enough (code 7)");
    assert_eq!(left.closed().await, CloseReason::Local);
    assert!(right.serve().next().await.is_none());
    assert!(matches!(right.send(probe_frame(1)).await, Err(Error::Connection { .. })));
    assert!(matches!(left.request(probe_frame(1)).await, Err(Error::Connection { .. })));
}

async fn a_link_ends_with_its_last_handle(left: Link, right: Link) {
    let same = left.clone();
    drop(left);
    same.send(probe_frame(1)).await.unwrap();
    drop(same);
    assert!(right.closed().await.to_string().starts_with("closed by peer"));
}

async fn an_oversized_or_inconsistent_frame_is_never_sent(left: Link, right: Link) {
    let Frame { parts, .. } = probe_frame(8);
    let inconsistent = Part { shape: vec![9], ..parts[0].clone() };
    let frame = Frame { kind: FrameKind::Probe, parts: vec![inconsistent], ..probe_frame(0) };
    assert!(matches!(left.send(frame.clone()).await, Err(Error::TooLarge(_))));
    let too_many = Frame { parts: vec![probe_frame(0).parts[0].clone(); 4097], ..frame };
    assert!(matches!(left.request(too_many).await, Err(Error::TooLarge(_))));
    let mut inbound = right.serve();
    left.send(probe_frame(1)).await.unwrap();
    assert_eq!(next(&mut inbound).await.frame, probe_frame(1));
}

async fn the_control_stream_is_taken_once(left: Link, right: Link) {
    let same = left.clone();
    assert!(left.take_control().is_some() && same.take_control().is_none());
    assert!(right.take_control().is_some() && right.take_control().is_none());
}

#[tokio::test]
async fn received_tensors_are_aligned() {
    let (left, right, _endpoints) = over(Network::quic()).await;
    let mut inbound = right.serve();
    for bytes in [1, 100, 4_096, 65_000, 1 << 20, (64 << 20) + 13] {
        left.send(probe_frame(bytes)).await.unwrap();
        let frame = next(&mut inbound).await.frame;
        assert_eq!(frame.parts[0].data.len(), bytes);
        assert_eq!(frame.parts[0].data.as_ptr().align_offset(64), 0, "{bytes}");
        assert!(frame.parts[0].data.iter().all(|&byte| byte == 7));
    }
}

#[tokio::test]
async fn every_nth_frame_is_lost_and_no_control_message() {
    let (left, right, switch) = faulty_pair("left", "right");
    let mut inbound = right.serve();
    switch.set(Faults { drop: 2, ..Faults::default() });
    for step in 1..=4 {
        left.send(Frame { step: Step(step), ..probe_frame(1) }).await.unwrap();
    }
    assert_eq!(next(&mut inbound).await.frame.step, Step(1));
    assert_eq!(next(&mut inbound).await.frame.step, Step(3));
    switch.set(Faults { drop: 1, ..Faults::default() });
    assert!(left.request_within(probe_frame(1), Duration::from_millis(20)).await.is_err());
    let ((mut sender, _), (_, mut receiver)) = (left.take_control().unwrap(), right.take_control().unwrap());
    sender.send(&1u8).await.unwrap();
    assert_eq!(receiver.recv::<u8>().await.unwrap(), Some(1));
}

#[tokio::test]
async fn a_delayed_frame_does_not_block_later_ones() {
    let (left, right, switch) = faulty_pair("left", "right");
    let mut inbound = right.serve();
    switch.set(Faults { delay_ms: 200, ..Faults::default() });
    let start = std::time::Instant::now();
    left.send(Frame { step: Step(1), ..probe_frame(1) }).await.unwrap();
    switch.set(Faults::default());
    left.send(Frame { step: Step(2), ..probe_frame(1) }).await.unwrap();
    assert_eq!(next(&mut inbound).await.frame.step, Step(2));
    assert_eq!(next(&mut inbound).await.frame.step, Step(1));
    assert!(start.elapsed() >= Duration::from_millis(199), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_short_partition_loses_nothing_and_a_long_one_closes_the_link() {
    let (left, right, switch) = faulty_pair("left", "right");
    let mut inbound = right.serve();
    switch.set(Faults { partition: true, ..Faults::default() });
    let sending = tokio::spawn({
        let left = left.clone();
        async move { left.send(probe_frame(5)).await }
    });
    let early = tokio::time::timeout(Duration::from_millis(50), inbound.next()).await;
    assert!(early.is_err(), "it came through a partition");
    switch.set(Faults::default());
    assert_eq!(next(&mut inbound).await.frame, probe_frame(5));
    sending.await.unwrap().unwrap();

    switch.set(Faults { partition: true, ..Faults::default() });
    assert_eq!(left.closed().await, CloseReason::TimedOut);
    assert_eq!(right.closed().await, CloseReason::TimedOut);
    assert!(left.send(probe_frame(1)).await.is_err());
}
