//! Tests of the journal and the tables.

use crate::journal::FORMAT;
use crate::limits::RECORD_BYTES_MAX;
use crate::testing::{TestRun, config};
use crate::{Error, RunIdentity, Store, Table};
use serde::{Deserialize, Serialize};
use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};
use volary_core::Step;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Committed {
    lr: f64,
    tokens: u64,
    applied: bool,
}

fn value(step: u64) -> Committed {
    Committed { lr: 1e-3 / step as f64, tokens: step * 512, applied: step.is_multiple_of(2) }
}

fn committed_to(store: &Store, last: u64) {
    for step in 1..=last {
        store.commit(Step(step), &value(step)).unwrap();
    }
}

#[test]
fn committed_steps_survive_reopening() {
    let run = TestRun::new();
    let store = Store::open(&run.dir).unwrap();
    assert_eq!(store.last_committed().unwrap(), None);
    // Across a power of 256: only big-endian keys keep this in order.
    committed_to(&store, 300);
    drop(store);
    let store = Store::open(&run.dir).unwrap();
    assert_eq!(store.last_committed().unwrap(), Some(Step(300)));
    assert_eq!(store.committed(Step(257)).unwrap(), Some(value(257)));
    assert_eq!(store.committed::<Committed>(Step(301)).unwrap(), None);
    let all: Vec<(Step, Committed)> = store.committed_range(Step(254)).map(Result::unwrap).collect();
    assert_eq!(all, (254..=300).map(|s| (Step(s), value(s))).collect::<Vec<_>>());
}

#[test]
fn a_commit_returns_only_after_the_file_of_the_database_is_synced() {
    static SYNCS: AtomicU64 = AtomicU64::new(0);
    let run = TestRun::new();
    let store = Store::open_with(&run.dir, |file| {
        SYNCS.fetch_add(1, Ordering::Relaxed);
        file.sync_all()
    })
    .unwrap();
    let mut before = SYNCS.load(Ordering::Relaxed);
    assert!(before > 0, "opening makes durable what an earlier process may not have");
    let mut synced = |what: &str| {
        let now = SYNCS.load(Ordering::Relaxed);
        assert!(now > std::mem::replace(&mut before, now), "{what}");
    };
    store.commit(Step(1), &value(1)).unwrap();
    synced("a commit");
    store.put(Table::Facts, "cluster", &1u64).unwrap();
    synced("a fact");
    store.go_back(Step(0), "cluster", &2u64).unwrap();
    synced("a going-back");
    let failing = Store::open_with(&run.dir, |_| Err(std::io::Error::from_raw_os_error(5)));
    assert!(failing.is_err(), "a sync that fails is an error");
}

#[test]
fn a_step_is_committed_once() {
    let run = TestRun::new();
    let store = Store::open(&run.dir).unwrap();
    committed_to(&store, 2);
    store.commit(Step(2), &value(2)).unwrap();
    store.commit(Step(1), &value(1)).unwrap();
    let error = store.commit(Step(2), &value(9)).unwrap_err();
    assert!(matches!(error, Error::AlreadyCommitted { step: Step(2) }), "{error}");
    assert_eq!(store.committed(Step(2)).unwrap(), Some(value(2)));
}

#[test]
fn of_several_different_commits_of_a_step_one_succeeds() {
    let run = TestRun::new();
    let store = Store::open(&run.dir).unwrap();
    let committed = std::thread::scope(|scope| {
        let store = &store;
        let threads: Vec<_> =
            (1..=8).map(|n| scope.spawn(move || store.commit(Step(1), &value(n)).is_ok())).collect();
        threads.into_iter().map(|t| t.join().unwrap()).filter(|ok| *ok).count()
    });
    assert_eq!(committed, 1);
}

#[test]
fn a_commit_that_leaves_a_gap_is_refused() {
    let run = TestRun::new();
    let store = Store::open(&run.dir).unwrap();
    store.commit(Step(5), &value(5)).unwrap();
    for step in [4, 7] {
        let error = store.commit(Step(step), &value(step)).unwrap_err();
        assert!(matches!(error, Error::OutOfOrder { last: Step(5), .. }), "{error}");
    }
    store.commit(Step(6), &value(6)).unwrap();
}

#[test]
fn opening_detects_a_gap_and_names_its_steps() {
    let run = TestRun::new();
    let store = Store::open(&run.dir).unwrap();
    committed_to(&store, 9);
    for step in [4_u64, 5] {
        store.journal.remove(step.to_be_bytes()).unwrap();
    }
    store.make_durable().unwrap();
    drop(store);
    let error = Store::open(&run.dir).unwrap_err();
    assert!(matches!(error, Error::Gap { first: Step(4), last: Step(5), .. }), "{error}");
    assert!(error.to_string().contains("steps 4 to 5"), "{error}");
}

#[test]
fn opening_detects_a_damaged_step() {
    let run = TestRun::new();
    let store = Store::open(&run.dir).unwrap();
    committed_to(&store, 3);
    let mut bytes = store.journal.get(2_u64.to_be_bytes()).unwrap().unwrap().to_vec();
    *bytes.last_mut().unwrap() ^= 1;
    store.journal.insert(2_u64.to_be_bytes(), bytes).unwrap();
    store.make_durable().unwrap();
    drop(store);
    let error = Store::open(&run.dir).unwrap_err();
    assert!(error.to_string().contains("step 2"), "{error}");
}

#[test]
fn a_run_may_recommit_steps_after_a_rollback() {
    let run = TestRun::new();
    let store = Store::open(&run.dir).unwrap();
    committed_to(&store, 9);
    assert_eq!(store.go_back(Step(6), "cluster", &0u64).unwrap(), 3);
    assert_eq!(store.go_back(Step(6), "cluster", &0u64).unwrap(), 0);
    store.commit(Step(7), &value(70)).unwrap();
    assert_eq!(store.prune_before(Step(5)).unwrap(), 4);
    drop(store);
    let store = Store::open(&run.dir).unwrap();
    let steps: Vec<Step> = store.committed_range::<Committed>(Step(0)).map(|item| item.unwrap().0).collect();
    assert_eq!(steps, [5, 6, 7].map(Step));
}

#[test]
fn a_run_may_go_back_before_the_first_step_of_its_journal() {
    let run = TestRun::new();
    let store = Store::open(&run.dir).unwrap();
    committed_to(&store, 9);
    store.prune_before(Step(8)).unwrap();
    store.go_back(Step(3), "cluster", &0u64).unwrap();
    assert_eq!(store.last_committed().unwrap(), Some(Step(3)));
    store.commit(Step(4), &value(4)).unwrap();
    drop(store);
    assert_eq!(Store::open(&run.dir).unwrap().last_committed().unwrap(), Some(Step(4)));
}

/// sled keeps what is pruned until it rewrites a segment: the size is bounded, not minimal.
#[test]
fn a_journal_that_is_pruned_stays_small_over_many_steps() {
    let run = TestRun::new();
    let store = Store::open_with(&run.dir, |_| Ok(())).unwrap();
    let mut largest = 0;
    for step in (1..=30_000).map(Step) {
        store.commit(step, &value(step.0)).unwrap();
        if step.is_multiple_of(100) && step.0 > 500 {
            while store.prune_before(Step(step.0 - 500)).unwrap() > 0 {}
        }
        if step.is_multiple_of(5_000) {
            largest = largest.max(store.bytes_on_disk());
        }
    }
    assert!(largest <= 64 << 20, "{largest} bytes on disk");
    drop(store);
    let store = Store::open(&run.dir).unwrap();
    assert_eq!(store.last_committed().unwrap(), Some(Step(30_000)));
    assert!(store.journal.len() <= 600, "{} records", store.journal.len());
}

#[test]
fn a_directory_of_another_run_is_refused_with_the_difference() {
    let run = TestRun::new();
    let store = Store::open(&run.dir).unwrap();
    let identity = RunIdentity { name: "a".to_owned(), seed: 7, config_hash: config(), format: FORMAT };
    assert_eq!(store.identity().unwrap(), None);
    store.identify(&identity).unwrap();
    store.identify(&identity).unwrap();
    let error = store.identify(&RunIdentity { seed: 8, ..identity.clone() }).unwrap_err();
    assert!(error.to_string().contains("seed is 7, not 8"), "{error}");
    store.put_identity(&RunIdentity { format: 99, ..identity }).unwrap();
    assert!(matches!(store.identity().unwrap_err(), Error::Format { found: 99, .. }));
}

#[test]
fn values_are_stored_by_name_and_a_token_is_used_once() {
    let run = TestRun::new();
    let store = Store::open(&run.dir).unwrap();
    store.put(Table::Facts, "placement", &vec![1_u32, 2]).unwrap();
    store.put(Table::Tokens, "t1", &"fresh".to_owned()).unwrap();
    let (fresh, used) = ("fresh".to_owned(), "used".to_owned());
    assert!(store.swap(Table::Tokens, "t1", Some(&fresh), Some(&used)).unwrap());
    assert!(!store.swap(Table::Tokens, "t1", Some(&fresh), Some(&used)).unwrap());
    drop(store);
    let store = Store::open(&run.dir).unwrap();
    assert_eq!(store.get(Table::Facts, "placement").unwrap(), Some(vec![1_u32, 2]));
    assert_eq!(store.get::<u32>(Table::Facts, "t1").unwrap(), None);
    assert_eq!(store.list::<String>(Table::Tokens).unwrap(), [("t1".to_owned(), used)]);
    assert!(store.remove(Table::Tokens, "t1").unwrap());
    assert!(!store.remove(Table::Tokens, "t1").unwrap());
}

#[test]
fn the_largest_records_stay_in_the_synced_file() {
    let run = TestRun::new();
    let store = Store::open(&run.dir).unwrap();
    let largest = vec![7_u8; RECORD_BYTES_MAX - 16];
    for n in 0..40 {
        store.put(Table::Facts, &format!("fact {n}"), &largest).unwrap();
    }
    let out_of_line = fs::read_dir(run.dir.state().join("blobs")).unwrap().count();
    assert_eq!(out_of_line, 0);
}

#[test]
fn an_open_database_is_refused_by_name() {
    let run = TestRun::new();
    let store = Store::open(&run.dir).unwrap();
    let error = Store::open(&run.dir).unwrap_err();
    assert!(error.to_string().contains(run.dir.state().to_str().unwrap()), "{error}");
    store.commit(Step(1), &value(1)).unwrap();
}
