//! The frame codec: round trips, truncation at every byte, hostile lengths.
use super::codec::{FIXED, shape_bytes};
use super::*;
use proptest::prelude::*;

fn part() -> impl Strategy<Value = Part> {
    let dtype = proptest::sample::select(Dtype::ALL.to_vec());
    (dtype, proptest::collection::vec(0u64..5, 0..4)).prop_flat_map(|(dtype, shape)| {
        let bytes = shape_bytes(dtype, &shape).unwrap() as usize;
        proptest::collection::vec(any::<u8>(), bytes).prop_map(move |data| Part {
            dtype,
            shape: shape.clone(),
            data: data.into(),
        })
    })
}

fn frame() -> impl Strategy<Value = Frame> {
    let kind = proptest::sample::select(FrameKind::ALL.to_vec());
    let meta = proptest::collection::vec(any::<u8>(), 0..40);
    let trace = (any::<[u8; 16]>(), any::<[u8; 8]>(), any::<u8>());
    (kind, any::<u64>(), any::<u64>(), trace, meta, proptest::collection::vec(part(), 0..4)).prop_map(
        |(kind, epoch, step, (trace_id, span_id, flags), meta, parts)| {
            let trace = TraceHeader { trace_id, span_id, flags };
            Frame { kind, epoch: Epoch(epoch), step: Step(step), trace, meta: meta.into(), parts }
        },
    )
}

fn wire(frame: &Frame) -> Bytes {
    frame.encode().unwrap().concat().into()
}

proptest! {
    #[test]
    fn a_frame_survives_its_encoding(frame in frame()) {
        prop_assert_eq!(&Frame::decode(&wire(&frame)).unwrap(), &frame);
        prop_assert_eq!(Frame::from_pieces(&frame.encode().unwrap()).unwrap(), frame);
    }

    #[test]
    fn a_frame_cut_at_any_byte_is_an_error(frame in frame()) {
        let whole = wire(&frame);
        for end in 0..whole.len() {
            prop_assert!(Frame::decode(&whole.slice(..end)).is_err());
        }
    }

    #[test]
    fn no_flipped_byte_makes_it_panic(frame in frame(), at: prop::sample::Index, flip in 1u8..) {
        let mut bytes = wire(&frame).to_vec();
        let index = at.index(bytes.len());
        bytes[index] ^= flip;
        drop(Frame::decode(&bytes.into()));
    }

    #[test]
    fn arbitrary_bytes_are_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(Frame::decode(&bytes.into()).is_err());
    }
}

fn small() -> Frame {
    let part = Part {
        dtype: Dtype::F32,
        shape: vec![1, 2],
        data: Bytes::from_static(&[0, 0, 128, 63, 0, 0, 0, 64]),
    };
    let trace = TraceHeader { trace_id: [1; 16], span_id: [2; 8], flags: 1 };
    Frame {
        kind: FrameKind::Forward,
        epoch: volary_core::Epoch(3),
        step: volary_core::Step(4),
        trace,
        meta: Bytes::from_static(b"hi"),
        parts: vec![part],
    }
}

/// The layout is fixed: a change needs a new layout version.
#[test]
fn the_layout_matches_the_table() {
    let hex: String = wire(&small()).iter().map(|b| format!("{b:02x}")).collect();
    let expected = "564c525901010100\
        03000000000000000400000000000000\
        01010101010101010101010101010101020202020202020201000000\
        02000000\
        6869\
        0102010000000000000002000000000000000800000000000000\
        0000803f00000040";
    assert_eq!(hex, expected);
}

#[test]
fn hostile_lengths_are_refused_before_memory_is_reserved() {
    let mut bytes = wire(&small()).to_vec();
    let dimension = FIXED + 2 + 2;
    bytes[dimension..dimension + 8].copy_from_slice(&(1u64 << 60).to_le_bytes());
    let error = Frame::decode(&bytes.into()).unwrap_err().to_string();
    assert!(error.contains("for a tensor of shape [1152921504606846976, 2]"), "{error}");
    let mut bytes = wire(&small()).to_vec();
    bytes[52..56].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(Frame::decode(&bytes.into()).is_err());
}

#[test]
fn an_unknown_layout_kind_or_dtype_is_named() {
    let with = |at: usize, value: u8| {
        let mut bytes = wire(&small()).to_vec();
        bytes[at] = value;
        Frame::decode(&bytes.into()).unwrap_err().to_string()
    };
    assert!(with(4, 9).contains("layout 9, expected 1"));
    assert!(with(5, 77).contains("unknown kind 77"));
    assert!(with(FIXED + 2, 66).contains("unknown dtype 66"));
}
