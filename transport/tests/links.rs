//! Links over QUIC on loopback under load: concurrency, and the order of large and small.
#![expect(clippy::expect_used, clippy::unwrap_used, reason = "tests")]

use bytes::Bytes;
use std::time::{Duration, Instant};
use volary_transport::loopback::probe_frame;
use volary_transport::{
    Authority, ClientAuth, Dtype, Endpoint, Frame, FrameKind, Link, Part, TraceHeader, TransportOptions,
};

const ANY: ([u8; 4], u16) = ([127, 0, 0, 1], 0);

fn node(authority: &Authority, name: &str) -> Endpoint {
    let options = TransportOptions::default();
    Endpoint::bind(ANY.into(), authority.identity(name).unwrap(), ClientAuth::Required, &options).unwrap()
}

async fn pair(authority: &Authority) -> (Link, Link, Endpoint, Endpoint) {
    let (left, right) = (node(authority, "left"), node(authority, "right"));
    let accepting = right.clone();
    let accepted = tokio::spawn(async move { accepting.next_peer().await });
    let link = left.connect(right.local_addr(), "right").await.expect("a link");
    (link, accepted.await.unwrap().expect("a link"), left, right)
}

fn patterned(length: usize, seed: u8) -> Frame {
    let data: Vec<u8> = (0..length * 4).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect();
    let part = Part { dtype: Dtype::F32, shape: vec![length as u64], data: data.into() };
    let meta = Bytes::from(vec![seed]);
    Frame {
        kind: FrameKind::Forward,
        epoch: volary_core::Epoch(1),
        step: volary_core::Step(2),
        trace: TraceHeader::default(),
        meta,
        parts: vec![part],
    }
}

fn echo(link: &Link) {
    let mut inbound = link.serve();
    tokio::spawn(async move {
        while let Some(inbound) = inbound.next().await {
            if let Some(reply) = inbound.reply {
                tokio::spawn(async move { reply.reply(inbound.frame).await });
            }
        }
    });
}

#[tokio::test]
async fn a_hundred_concurrent_requests_return_intact() {
    let authority = Authority::create().unwrap();
    let (link, other, _left, _right) = pair(&authority).await;
    echo(&other);
    let calls = (0..100u8).map(|i| {
        let link = link.clone();
        tokio::spawn(async move {
            let frame = patterned(usize::from(i) * 777, i);
            assert_eq!(link.request(frame.clone()).await.unwrap(), frame);
        })
    });
    for call in calls.collect::<Vec<_>>() {
        call.await.unwrap();
    }
}

#[tokio::test]
async fn a_large_frame_does_not_block_a_small_one() {
    let authority = Authority::create().unwrap();
    let (link, other, _left, _right) = pair(&authority).await;
    echo(&other);
    let bulk = link.clone();
    let bulk = tokio::spawn(async move { bulk.request(probe_frame(128 << 20)).await });
    tokio::time::sleep(Duration::from_millis(20)).await;
    let start = Instant::now();
    link.request(probe_frame(16)).await.unwrap();
    let small = start.elapsed();
    assert!(!bulk.is_finished(), "the large frame should be in flight");
    assert!(small < Duration::from_millis(500), "{small:?}");
    bulk.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_control_message_overtakes_bulk() {
    let authority = Authority::create().unwrap();
    let (link, other, _left, _right) = pair(&authority).await;
    echo(&other);
    let (mut near, mut far) = (link.take_control().unwrap(), other.take_control().unwrap());
    tokio::spawn(async move {
        while let Ok(Some(number)) = far.1.recv::<u32>().await {
            far.0.send(&number).await.unwrap();
        }
    });
    let bulk = link.clone();
    let bulk = tokio::spawn(async move { bulk.request(probe_frame(128 << 20)).await });
    tokio::time::sleep(Duration::from_millis(20)).await;
    let start = Instant::now();
    near.0.send(&5u32).await.unwrap();
    assert_eq!(near.1.recv::<u32>().await.unwrap(), Some(5));
    let round_trip = start.elapsed();
    assert!(!bulk.is_finished(), "the large frame should be in flight");
    assert!(round_trip < Duration::from_millis(500), "{round_trip:?}");
    bulk.await.unwrap().unwrap();
}
