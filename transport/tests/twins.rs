//! The in-memory link keeps the promises of the real one: every test here runs over both.
#![expect(clippy::expect_used, clippy::unwrap_used, reason = "tests")]

use std::time::Duration;
use volary_transport::loopback::probe_frame;
use volary_transport::memory::{Faults, faulty_pair, pair};
use volary_transport::{
    Admit, Authority, Endpoint, Error, Frame, Inbound, InboundFrame, Kind, Link, Part, TransportOptions,
};

const LONG: Duration = Duration::from_secs(20);

/// Two ends, and whatever keeps them alive.
async fn over_quic() -> (Link, Link, Vec<Endpoint>) {
    let authority = Authority::create().unwrap();
    let node = |name: &str| {
        let (address, identity) = (([127, 0, 0, 1], 0).into(), authority.identity(name).unwrap());
        Endpoint::bind(address, identity, Admit::Certified, &TransportOptions::default()).unwrap()
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

macro_rules! over_both {
    ($($name:ident)*) => {
        mod quic {
            use super::*;
            $(#[tokio::test]
            async fn $name() {
                let (left, right, endpoints) = over_quic().await;
                tokio::time::timeout(LONG, super::$name(left, right)).await.expect("in time");
                drop(endpoints);
            })*
        }
        mod memory {
            use super::*;
            $(#[tokio::test]
            async fn $name() {
                let (left, right) = pair("left", "right");
                tokio::time::timeout(LONG, super::$name(left, right)).await.expect("in time");
            })*
        }
    };
}

over_both! {
    each_end_knows_the_other_s_name
    a_frame_and_a_request_come_through_whole
    control_messages_keep_their_order_and_end
    a_request_that_nobody_answers_fails
    a_request_has_a_limit
    a_reason_reaches_the_other_end
    a_link_ends_with_its_last_handle
    an_oversized_or_inconsistent_frame_is_never_sent
    control_is_handed_out_once
}

async fn each_end_knows_the_other_s_name(left: Link, right: Link) {
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
    asked.reply.expect("a way back").reply(probe_frame(4)).await.unwrap();
    assert_eq!(asking.await.unwrap().unwrap(), probe_frame(4));
    assert!(left.stats().bytes_sent > 100_000 && right.stats().bytes_received > 100_000);
}

async fn control_messages_keep_their_order_and_end(left: Link, right: Link) {
    let (mut sender, _) = left.control().unwrap();
    let (_, mut receiver) = right.control().unwrap();
    for number in 0..100u32 {
        sender.send(&(number, format!("word {number}"))).await.unwrap();
    }
    // The other end has to acknowledge the end, which it does while it reads.
    let finishing = tokio::spawn(sender.finish());
    for number in 0..100u32 {
        assert_eq!(receiver.recv().await.unwrap(), Some((number, format!("word {number}"))));
    }
    assert_eq!(receiver.recv::<(u32, String)>().await.unwrap(), None);
    finishing.await.unwrap();
}

async fn a_request_that_nobody_answers_fails(left: Link, right: Link) {
    let mut inbound = right.serve();
    let asking = tokio::spawn(async move { left.request(probe_frame(3)).await });
    drop(next(&mut inbound).await.reply);
    assert!(matches!(asking.await.unwrap(), Err(Error::Malformed { .. })));
}

async fn a_request_has_a_limit(left: Link, right: Link) {
    let mut inbound = right.serve();
    let error = left.request_within(probe_frame(1), Duration::from_millis(200)).await.unwrap_err();
    assert!(error.to_string().contains("no answer within 200ms"), "{error}");
    drop(next(&mut inbound).await);
}

async fn a_reason_reaches_the_other_end(left: Link, right: Link) {
    left.close_with(7, "enough");
    assert_eq!(right.closed().await, "closed by peer: enough (code 7)");
    assert_eq!(left.closed().await, "closed");
    assert!(right.serve().next().await.is_none());
    assert!(matches!(right.send(probe_frame(1)).await, Err(Error::Connection { .. })));
    assert!(matches!(left.request(probe_frame(1)).await, Err(Error::Connection { .. })));
}

async fn a_link_ends_with_its_last_handle(left: Link, right: Link) {
    let same = left.clone();
    drop(left);
    same.send(probe_frame(1)).await.unwrap();
    drop(same);
    assert!(right.closed().await.starts_with("closed by peer"));
}

async fn an_oversized_or_inconsistent_frame_is_never_sent(left: Link, right: Link) {
    let Frame { parts, .. } = probe_frame(8);
    let lying = Part { shape: vec![9], ..parts[0].clone() };
    let frame = Frame { kind: Kind::Probe, parts: vec![lying], ..probe_frame(0) };
    assert!(matches!(left.send(frame.clone()).await, Err(Error::Malformed { .. })));
    let too_many = Frame { parts: vec![probe_frame(0).parts[0].clone(); 4097], ..frame };
    assert!(matches!(left.request(too_many).await, Err(Error::Malformed { .. })));
    let mut inbound = right.serve();
    left.send(probe_frame(1)).await.unwrap();
    assert_eq!(next(&mut inbound).await.frame, probe_frame(1));
}

async fn control_is_handed_out_once(left: Link, right: Link) {
    let same = left.clone();
    assert!(left.control().is_some() && same.control().is_none());
    assert!(right.control().is_some() && right.control().is_none());
}

#[tokio::test]
async fn a_tensor_off_the_wire_begins_at_a_boundary() {
    let (left, right, _endpoints) = over_quic().await;
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
async fn one_frame_in_so_many_is_lost_and_control_is_not() {
    let (left, right, switch) = faulty_pair("left", "right");
    let mut inbound = right.serve();
    switch.set(Faults { drop: 2, ..Faults::default() });
    for step in 1..=4 {
        left.send(Frame { step, ..probe_frame(1) }).await.unwrap();
    }
    assert_eq!(next(&mut inbound).await.frame.step, 1);
    assert_eq!(next(&mut inbound).await.frame.step, 3);
    switch.set(Faults { drop: 1, ..Faults::default() });
    assert!(left.request_within(probe_frame(1), Duration::from_millis(20)).await.is_err());
    let ((mut sender, _), (_, mut receiver)) = (left.control().unwrap(), right.control().unwrap());
    sender.send(&1u8).await.unwrap();
    assert_eq!(receiver.recv::<u8>().await.unwrap(), Some(1));
}

#[tokio::test]
async fn a_delay_holds_up_what_it_meets_and_nothing_behind_it() {
    let (left, right, switch) = faulty_pair("left", "right");
    let mut inbound = right.serve();
    switch.set(Faults { delay_ms: 200, ..Faults::default() });
    let start = std::time::Instant::now();
    left.send(Frame { step: 1, ..probe_frame(1) }).await.unwrap();
    switch.set(Faults::default());
    left.send(Frame { step: 2, ..probe_frame(1) }).await.unwrap();
    assert_eq!(next(&mut inbound).await.frame.step, 2);
    assert_eq!(next(&mut inbound).await.frame.step, 1);
    assert!(start.elapsed() >= Duration::from_millis(199), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_partition_that_heals_loses_nothing_and_one_that_lasts_ends_the_link() {
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
    assert_eq!(left.closed().await, "timed out");
    assert_eq!(right.closed().await, "timed out");
    assert!(left.send(probe_frame(1)).await.is_err());
}
