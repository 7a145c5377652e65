//! The function (seed, step, lane) -> tokens.
#![allow(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

mod common;

use std::collections::HashSet;
use std::path::Path;

use common::{jsonl, options, prepare_16, source, write};
use tempfile::{TempDir, tempdir};
use volary_core::{Lane, Step};
use volary_data::{Dataset, SourceOptions};

/// Two sources, the second three times as heavy, prepared in `run`.
fn prepared() -> TempDir {
    let dir = tempdir().unwrap();
    let a = write(dir.path(), "a.jsonl", jsonl(0..200));
    let b = write(dir.path(), "b.jsonl", jsonl(1000..1400));
    let heavy = SourceOptions { weight: 3.0, ..source("b", &b) };
    prepare_16(&options(dir.path(), vec![source("a", &a), heavy]), &dir.path().join("run")).unwrap();
    dir
}

fn open(dir: &Path, sequences: usize, lanes: u32, seed: u64) -> Dataset {
    Dataset::open(&dir.join("run"), 16, sequences, lanes, seed).unwrap()
}

#[test]
fn a_lane_depends_on_seed_step_and_lane_only() {
    let dir = prepared();
    let [one, other] = [open(dir.path(), 3, 4, 7), open(dir.path(), 3, 4, 7)];
    let keys: Vec<_> = (1..50).flat_map(|step| (0..4).map(move |lane| (step, lane))).collect();
    let forward: Vec<_> =
        keys.iter().map(|&(step, lane)| one.lane(Step(step), Lane(lane)).unwrap()).collect();
    let backward: Vec<_> =
        keys.iter().rev().map(|&(step, lane)| other.lane(Step(step), Lane(lane)).unwrap()).collect();
    assert!(forward.iter().eq(backward.iter().rev()));
    assert!(forward.iter().all(|tokens| tokens.len() == 3 * 17));
    assert_ne!(open(dir.path(), 3, 4, 8).lane(Step(1), Lane(0)).unwrap(), forward[0]);
}

#[test]
fn the_shape_does_not_change_the_order_of_sequences() {
    let dir = prepared();
    let (wide, narrow) = (open(dir.path(), 4, 2, 7), open(dir.path(), 1, 8, 7));
    let all = |data: &Dataset| -> Vec<u32> {
        (1..20)
            .flat_map(|step| {
                (0..data.lanes()).flat_map(move |lane| data.lane(Step(step), Lane(lane)).unwrap())
            })
            .collect()
    };
    assert_eq!(all(&wide), all(&narrow));
}

#[test]
fn one_pass_has_every_window_once_and_lanes_never_share_one() {
    let dir = tempdir().unwrap();
    let file = write(dir.path(), "a.jsonl", jsonl(0..200));
    prepare_16(&options(dir.path(), vec![source("a", &file)]), &dir.path().join("run")).unwrap();
    let data = open(dir.path(), 1, 1, 3);
    let windows = (data.manifest().sources[0].train.tokens - 1) / 16;
    let bytes = std::fs::read(dir.path().join("run/a.train.tokens")).unwrap();
    let tokens: Vec<u32> =
        bytes.chunks_exact(4).map(|four| u32::from_le_bytes(four.try_into().unwrap())).collect();
    let mut expected: Vec<Vec<u32>> =
        (0..windows as usize).map(|w| tokens[w * 16..w * 16 + 17].to_vec()).collect();
    expected.sort();
    for pass in 0..3 {
        let mut seen: Vec<_> =
            (1..=windows).map(|n| data.lane(Step(pass * windows + n), Lane(0)).unwrap()).collect();
        seen.sort();
        assert!(seen == expected, "pass {pass}");
    }
}

#[test]
fn sequences_come_from_sources_in_proportion_to_their_weights() {
    let dir = prepared();
    let data = open(dir.path(), 1, 1, 3);
    let of_a: HashSet<Vec<u32>> = {
        let bytes = std::fs::read(dir.path().join("run/a.train.tokens")).unwrap();
        let tokens: Vec<u32> =
            bytes.chunks_exact(4).map(|four| u32::from_le_bytes(four.try_into().unwrap())).collect();
        tokens.windows(17).step_by(16).map(<[u32]>::to_vec).collect()
    };
    let count = (1..=2000).filter(|&step| of_a.contains(&data.lane(Step(step), Lane(0)).unwrap())).count();
    // Two whole periods; a window of one source might equal one of the other by chance.
    assert!((500..=505).contains(&count), "{count}");
}

#[test]
fn validation_is_in_file_order_and_wraps_around() {
    let dir = tempdir().unwrap();
    let file = write(dir.path(), "a.jsonl", jsonl(0..2000));
    prepare_16(&options(dir.path(), vec![source("a", &file)]), &dir.path().join("run")).unwrap();
    let data = open(dir.path(), 2, 2, 3);
    let windows = (data.manifest().sources[0].validation.tokens - 1) / 16;
    let rounds = data.validation_rounds();
    assert_eq!(rounds, windows.div_ceil(4));
    let all: Vec<u32> = (0..rounds + 1)
        .flat_map(|r| [data.validation(r, Lane(0)).unwrap(), data.validation(r, Lane(1)).unwrap()].concat())
        .collect();
    let rows: Vec<_> = all.chunks(17).collect();
    let first = rows[..windows as usize].iter().map(|row| &row[..16]).collect::<Vec<_>>().concat();
    let bytes = std::fs::read(dir.path().join("run/a.validation.tokens")).unwrap();
    let tokens: Vec<u32> =
        bytes.chunks_exact(4).map(|four| u32::from_le_bytes(four.try_into().unwrap())).collect();
    assert_eq!(first, tokens[..16 * windows as usize]);
    assert_eq!(rows[windows as usize], rows[0]);
    assert_ne!(
        open(dir.path(), 2, 2, 4).lane(Step(1), Lane(0)).unwrap(),
        data.lane(Step(1), Lane(0)).unwrap()
    );
    assert_eq!(
        open(dir.path(), 2, 2, 4).validation(0, Lane(0)).unwrap(),
        data.validation(0, Lane(0)).unwrap()
    );
}

#[test]
fn the_document_of_a_validation_sequence_is_that_of_its_first_token() {
    let dir = prepared();
    let data = open(dir.path(), 3, 2, 7);
    let documents = data.validation_documents(5).unwrap();
    assert_eq!((documents.len(), documents[0].len()), (10, 3));
    let ends = |name: &str| {
        let bytes = std::fs::read(dir.path().join(format!("run/{name}.validation.tokens"))).unwrap();
        let ids: Vec<_> = bytes.as_chunks::<4>().0.iter().map(|four| u32::from_le_bytes(*four)).collect();
        ids.split_inclusive(|id| *id == data.manifest().end_of_text).map(<[u32]>::to_vec).collect::<Vec<_>>()
    };
    let texts = ["a", "b"].map(ends);
    for (at, lane) in documents.iter().enumerate() {
        let tokens = data.validation(at as u64 / 2, Lane(at as u32 % 2)).unwrap();
        for (document, row) in lane.iter().zip(tokens.chunks(17)) {
            let text = &texts[(document >> 48) as usize][(document & 0xffff) as usize];
            let shared = text.windows(4).any(|window| row.windows(4).next() == Some(window));
            let is_short = row.iter().position(|id| *id == data.manifest().end_of_text) < Some(4);
            assert!(shared || is_short, "round and lane {at}: {row:?} is not in document {document}");
        }
    }
}

#[test]
fn requests_beyond_the_shape_are_rejected_and_far_steps_are_not() {
    let dir = prepared();
    let data = open(dir.path(), 3, 4, 7);
    assert!(data.lane(Step(0), Lane(0)).is_err());
    assert!(data.lane(Step(1), Lane(4)).is_err());
    assert!(data.validation(0, Lane(4)).is_err());
    assert_eq!(data.lane(Step(u64::MAX), Lane(3)).unwrap().len(), 51);
    assert!(Dataset::open(&dir.path().join("run"), 0, 1, 1, 0).is_err());
    let message = Dataset::open(&dir.path().join("run"), 1 << 20, 1, 1, 0).unwrap_err().to_string();
    assert!(message.contains("at least 2097154"), "{message}");
}
