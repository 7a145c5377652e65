use super::*;
use proptest::prelude::*;
use volary_core::layout::Addresses;
use volary_core::placement::{Placement, Stage};
use volary_core::random::{Purpose, Stream};
use volary_core::{Epoch, LayerId, NodeId, ShardId};

/// A layout of the nodes of these numbers, each at an address of its own.
fn layout(epoch: u64, numbers: impl Iterator<Item = u64>) -> Shared<Layout> {
    let mut all: Vec<(NodeId, String)> = numbers
        .map(|number| {
            let place = Stream::new(number, Purpose::Faults, &[]).next_f64() * 65536.0;
            let address = format!("10.0.{}.{}:7100", place as u32 / 256, place as u32 % 256);
            (NodeId::new(format!("node-{number:05}")), address)
        })
        .collect();
    all.sort();
    let members: Vec<NodeId> = all.iter().map(|(node, _)| node.clone()).collect();
    let lanes = (0..members.len() as u32).collect();
    let stage = Stage { layers: LayerId::range(0..4), holders: members.clone(), lanes };
    let experts = [(ShardId::Embedding, members.iter().take(2).cloned().collect())].into();
    let epoch = Epoch(epoch);
    let placement = Placement { epoch, members, stages: vec![stage], experts, ..Placement::default() };
    Shared::new(Layout { placement: Arc::new(placement), addresses: Addresses(all) })
}

fn assignment(layout: &Shared<Layout>) -> Assignment {
    Assignment {
        layout: layout.clone(),
        timeline: Default::default(),
        version: Default::default(),
        last: None,
        shards: Vec::new(),
        learn: Vec::new(),
    }
}

/// Sends a layout over a stream; the bytes of its patch.
fn send(sender: &mut LayoutSender, receiver: &mut LayoutReceiver, layout: &Shared<Layout>) -> usize {
    let sent = assignment(layout);
    let bytes = postcard::to_stdvec(&sender.patch(&sent).unwrap()).unwrap();
    receiver.receive(&postcard::from_bytes(&bytes).unwrap()).unwrap();
    // The assignment crosses the link without its layout.
    let mut received: Assignment = postcard::from_bytes(&postcard::to_stdvec(&sent).unwrap()).unwrap();
    assert_eq!(received.layout, Shared::default());
    receiver.complete(&mut received).unwrap();
    assert_eq!(received, sent);
    bytes.len()
}

#[test]
fn a_small_change_of_ten_thousand_nodes_takes_a_few_hundred_bytes() {
    let patches = Arc::new(Patches::default());
    let (mut sender, mut receiver) = (LayoutSender::new(Arc::clone(&patches)), LayoutReceiver::default());
    let first = send(&mut sender, &mut receiver, &layout(1, 0..10_000));
    let changed = layout(2, (0..10_004).filter(|number| number % 2_500 != 7));
    let change = send(&mut sender, &mut receiver, &changed);
    assert!(first < 60_000 && change < 600, "{first} bytes at first, then {change}");
    // A node that joins has no layout to start from.
    let (mut sender, mut receiver) = (LayoutSender::new(patches), LayoutReceiver::default());
    let whole = send(&mut sender, &mut receiver, &changed);
    assert!(whole > change);
}

#[test]
fn a_patch_is_made_once_for_all_streams_and_few_are_kept() {
    let patches = Arc::new(Patches::default());
    let layouts: Vec<Shared<Layout>> = (1..20).map(|epoch| layout(epoch, 0..50)).collect();
    let mut senders: Vec<LayoutSender> = (0..3).map(|_| LayoutSender::new(Arc::clone(&patches))).collect();
    for layout in &layouts {
        let made: Vec<Arc<LayoutPatch>> = senders
            .iter_mut()
            .map(|sender| {
                sender.patch(&assignment(layout)).unwrap();
                Arc::clone(&patches.0.lock().back().unwrap().patch)
            })
            .collect();
        assert!(made.iter().all(|patch| Arc::ptr_eq(patch, &made[0])));
    }
    assert_eq!(patches.0.lock().len(), PATCHES_KEPT);
}

#[test]
fn a_patch_of_another_layout_a_false_length_and_a_missing_layout_are_refused() {
    let (one, two) = (layout(1, 0..200), layout(2, 1..201));
    let (one, two) = (one.encoded().unwrap(), two.encoded().unwrap());
    let patch = LayoutPatch::new(&one.bytes, two).unwrap();
    assert_eq!(patch.apply(&one.bytes).unwrap(), two.bytes);
    let other = one.bytes[..one.bytes.len() / 2].to_vec();
    assert!(patch.apply(&other).is_err());
    assert!(patch.apply(&[]).is_err());
    for length in [0, patch.length - 1, u32::MAX] {
        assert!(LayoutPatch { length, ..patch.clone() }.apply(&one.bytes).is_err(), "{length}");
    }
    let mut receiver = LayoutReceiver::default();
    let mut assignment = assignment(&layout(1, 0..2));
    let error = receiver.complete(&mut assignment).unwrap_err();
    assert_eq!(error.to_string(), "a layout did not come ahead of its assignment");
}

proptest! {
    #[test]
    fn any_frame_is_read_or_refused(frame in prop::collection::vec(any::<u8>(), 0..200), length in 0u32..5_000) {
        let patch = LayoutPatch { length, digest: Digest([0; 32]), frame };
        prop_assert!(patch.apply(b"some layout").is_err());
    }

    #[test]
    fn any_bytes_survive(base in prop::collection::vec(0u8..4, 0..300), bytes in prop::collection::vec(0u8..4, 0..300)) {
        let layout = Encoded { digest: Digest::of(&bytes), bytes };
        let patch = LayoutPatch::new(&base, &layout).unwrap();
        prop_assert_eq!(patch.apply(&base).unwrap(), layout.bytes);
    }
}
