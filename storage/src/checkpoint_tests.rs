//! Tests of checkpoints: atomicity, restoration, retention, readers.

use crate::testing::{TestDisk, TestRun, bytes_of, config, shards, write, write_in_order};
use crate::{CheckpointReader, Checkpoints, Error, Reconciled, Store, Table, reconcile};
use std::fs;
use std::sync::atomic::Ordering;
use volary_core::{Epoch, ExpertId, LayerId, ShardId, Step, Timeline};

fn lose_entries(checkpoints: &Checkpoints<TestDisk>, run: &TestRun, steps: &[Step]) {
    // As if sled had lost the end of its log: the entries are lost, the manifests stay.
    let kept: Vec<_> =
        steps.iter().map(|s| (run.dir.manifest(*s), fs::read(run.dir.manifest(*s)).unwrap())).collect();
    checkpoints.truncate_after(steps[0].previous()).unwrap();
    for (path, text) in kept {
        fs::write(path, text).unwrap();
    }
}

#[test]
fn a_checkpoint_exists_only_once_it_is_complete() {
    let run = TestRun::new();
    let checkpoints = run.checkpoints();
    let pending = checkpoints.begin((Step(8), Timeline(0), Epoch(3)), config(), shards());
    for shard in shards().into_iter().skip(1) {
        pending.add(shard, &bytes_of(shard, Step(8))).unwrap();
    }
    assert_eq!(pending.missing(), [ShardId::Embedding]);
    assert_eq!(checkpoints.latest().unwrap(), None);
    assert!(matches!(pending.complete().unwrap_err(), Error::Incomplete { step: Step(8), .. }));
    write(&checkpoints, Step(8));
    drop(checkpoints);
    let checkpoints = run.checkpoints();
    assert_eq!(checkpoints.latest().unwrap().unwrap().step, Step(8));
    for shard in shards() {
        assert_eq!(checkpoints.read(Step(8), shard).unwrap(), bytes_of(shard, Step(8)));
    }
    assert!(matches!(checkpoints.at(Step(9)).unwrap_err(), Error::NoCheckpoint { step: Step(9) }));
}

#[test]
fn blobs_are_durable_before_the_manifest_is_written() {
    let run = TestRun::new();
    let checkpoints = run.checkpoints();
    write(&checkpoints, Step(42));
    let log = run.disk.log.lock();
    let at = |line: &str| log.iter().position(|l| l == line).unwrap();
    let last_blob = log.iter().rposition(|l| l.starts_with("write tmp-")).unwrap();
    assert!(last_blob < at("sync blobs") && at("sync blobs") < at("write step-00000042.tmp"), "{log:?}");
    assert_eq!(log.last().unwrap(), "sync checkpoints");
}

#[test]
fn different_and_unexpected_shards_are_refused() {
    let run = TestRun::new();
    let pending = run.checkpoints().begin((Step(1), Timeline(0), Epoch(1)), config(), [ShardId::Embedding]);
    pending.add(ShardId::Embedding, b"weights").unwrap();
    pending.add(ShardId::Embedding, b"weights").unwrap();
    assert!(matches!(pending.add(ShardId::Embedding, b"other").unwrap_err(), Error::ShardDiffers { .. }));
    assert!(matches!(
        pending.add(ShardId::Dense { layer: LayerId(9) }, b"x").unwrap_err(),
        Error::NoShard { .. }
    ));
    pending.complete().unwrap();
}

#[test]
fn the_same_checkpoint_may_be_repeated_but_not_a_different_one() {
    let run = TestRun::new();
    let checkpoints = run.checkpoints();
    write(&checkpoints, Step(5));
    let first = checkpoints.at(Step(5)).unwrap();
    write(&checkpoints, Step(5));
    assert_eq!(checkpoints.at(Step(5)).unwrap(), first);
    let pending = checkpoints.begin((Step(5), Timeline(0), Epoch(1)), config(), [ShardId::Embedding]);
    pending.add(ShardId::Embedding, b"other").unwrap();
    assert!(matches!(pending.complete().unwrap_err(), Error::AlreadyCheckpointed { step: Step(5) }));
    assert_eq!(checkpoints.truncate_after(Step(4)).unwrap(), 1);
    assert!(CheckpointReader::open(&run.dir).unwrap().steps().unwrap().is_empty());
}

#[test]
fn a_truncated_blob_is_named_and_other_checkpoints_are_intact() {
    let run = TestRun::new();
    let checkpoints = run.checkpoints();
    write(&checkpoints, Step(1));
    write(&checkpoints, Step(2));
    let torn = ShardId::Expert { layer: LayerId(1), expert: ExpertId(3) };
    let path = run.dir.blobs().join(checkpoints.at(Step(2)).unwrap().shards[&torn].digest.to_string());
    fs::File::options().write(true).open(&path).unwrap().set_len(7).unwrap();
    let error = checkpoints.verify(Step(2)).unwrap_err();
    assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    assert!(checkpoints.read(Step(2), torn).is_err());
    checkpoints.read(Step(2), ShardId::Embedding).unwrap();
    checkpoints.verify(Step(1)).unwrap();
    // The run rolls back and recomputes the same weights; the checkpoint is then intact.
    write(&checkpoints, Step(2));
    checkpoints.verify(Step(2)).unwrap();
}

#[test]
fn a_full_disk_names_the_shard_and_damages_no_checkpoint() {
    let run = TestRun::new();
    let checkpoints = run.checkpoints();
    write(&checkpoints, Step(1));
    let pending = checkpoints.begin((Step(2), Timeline(0), Epoch(1)), config(), shards());
    let shard = ShardId::Dense { layer: LayerId(0) };
    run.disk.fill();
    let error = pending.add(shard, &bytes_of(shard, Step(2))).unwrap_err().to_string();
    assert!(
        error.starts_with("no space left on device while writing shard layer.0.dense of step 2"),
        "{error}"
    );
    let left = fs::read_dir(run.dir.blobs()).unwrap().count();
    assert_eq!(left, shards().len());
    checkpoints.verify(Step(1)).unwrap();
    run.disk.free();
    for shard in shards() {
        pending.add(shard, &bytes_of(shard, Step(2))).unwrap();
    }
    run.disk.fill();
    // Its entry is durable before its manifest is written: it exists.
    assert_eq!(pending.complete().unwrap().step, Step(2));
    assert_eq!(CheckpointReader::open(&run.dir).unwrap().steps().unwrap(), [Step(1)]);
    run.disk.free();
    drop(checkpoints);
    // Opening writes the missing manifest.
    run.checkpoints().verify(Step(2)).unwrap();
    CheckpointReader::open(&run.dir).unwrap().verify(Step(2)).unwrap();
}

#[test]
fn the_digest_depends_on_the_weights_alone() {
    let (a, b) = (TestRun::new(), TestRun::new());
    let (first, second) = (a.checkpoints(), b.checkpoints());
    write(&first, Step(3));
    write_in_order(&second, Step(3), shards().into_iter().rev()).unwrap();
    let digest = first.digest(Step(3)).unwrap();
    assert_eq!(digest, second.digest(Step(3)).unwrap());
    assert_eq!(digest.shards.len(), shards().len());
    let names: Vec<String> = digest.shards.iter().map(|(shard, _)| shard.to_string()).collect();
    assert!(names.is_sorted());
    write(&first, Step(4));
    assert_ne!(digest.whole, first.digest(Step(4)).unwrap().whole);
}

#[test]
fn retention_removes_only_unreferenced_blobs() {
    let run = TestRun::new();
    let checkpoints = run.checkpoints();
    for step in (1..=4).map(Step) {
        write(&checkpoints, step);
    }
    let pending = checkpoints.begin((Step(5), Timeline(0), Epoch(1)), config(), shards());
    let router = ShardId::Router { layer: LayerId(1) };
    pending.add(router, &bytes_of(router, Step(5))).unwrap();
    let each = shards().len() as u64 - 1;
    let report = checkpoints.retain(2, &[]).unwrap();
    // All checkpoints share the embedding, and the blob of the pending checkpoint stays.
    assert_eq!((report.removed, report.kept), (2 * each, 2 * each + 2));
    assert_eq!(checkpoints.steps().unwrap(), [Step(3), Step(4)]);
    assert_eq!(CheckpointReader::open(&run.dir).unwrap().steps().unwrap(), [Step(3), Step(4)]);
    for step in [3, 4].map(Step) {
        checkpoints.verify(step).unwrap();
    }
    drop(pending);
    assert_eq!(checkpoints.retain(2, &[]).unwrap().removed, 1);
}

#[test]
fn retention_never_removes_the_checkpoint_that_must_stay() {
    let run = TestRun::new();
    let checkpoints = run.checkpoints();
    for step in (0..=4).map(Step) {
        write(&checkpoints, step);
    }
    // The weights of step 0 came from elsewhere.
    checkpoints.retain(1, &[Some(Step(2)), None]).unwrap();
    assert_eq!(checkpoints.steps().unwrap(), [Step(0), Step(2), Step(4)]);
    checkpoints.verify(Step(2)).unwrap();
}

#[test]
fn opening_reads_no_blob_and_deletes_nothing_that_it_cannot_read() {
    let run = TestRun::new();
    let checkpoints = run.checkpoints();
    write(&checkpoints, Step(1));
    write(&checkpoints, Step(2));
    lose_entries(&checkpoints, &run, &[Step(2)]);
    drop(checkpoints);
    let files = |folder: std::path::PathBuf| fs::read_dir(folder).unwrap().count();
    let before = (files(run.dir.blobs()), files(run.dir.checkpoints()));
    run.disk.unreadable.store(true, Ordering::Relaxed);
    let error = run.try_checkpoints().unwrap_err();
    assert!(matches!(error, Error::Io { .. }) && !error.is_damage(), "{error}");
    assert_eq!((files(run.dir.blobs()), files(run.dir.checkpoints())), before);
    run.disk.unreadable.store(false, Ordering::Relaxed);
    let reads = run.disk.reads.load(Ordering::Relaxed);
    let checkpoints = run.checkpoints();
    assert_eq!(checkpoints.steps().unwrap(), [Step(1), Step(2)]);
    let manifests = run.disk.reads.load(Ordering::Relaxed) - reads;
    assert!(manifests <= 4, "{manifests} reads: two manifests, each at most twice");
}

#[test]
fn a_damaged_checkpoint_is_set_aside_with_its_blobs() {
    let run = TestRun::new();
    let checkpoints = run.checkpoints();
    write(&checkpoints, Step(1));
    write(&checkpoints, Step(2));
    let kept = checkpoints.at(Step(2)).unwrap().shards[&ShardId::Router { layer: LayerId(1) }].digest;
    checkpoints.set_aside(Step(2)).unwrap();
    assert_eq!(checkpoints.steps().unwrap(), [Step(1)]);
    checkpoints.retain(1, &[]).unwrap();
    assert!(run.dir.blobs().join(kept.to_string()).exists());
    drop(checkpoints);
    assert_eq!(run.checkpoints().steps().unwrap(), [Step(1)], "it stays aside");
}

#[test]
fn an_empty_folder_of_blobs_stops_the_start_with_its_name() {
    let run = TestRun::new();
    let checkpoints = run.checkpoints();
    write(&checkpoints, Step(1));
    drop(checkpoints);
    // As where its file system is not mounted.
    fs::remove_dir_all(run.dir.blobs()).unwrap();
    let error = run.try_checkpoints().unwrap_err();
    assert!(matches!(error, Error::NoBlobs { step: Step(1), .. }), "{error}");
    assert!(error.to_string().contains(run.dir.blobs().to_str().unwrap()), "{error}");
}

fn write_in_timeline(checkpoints: &Checkpoints<TestDisk>, step: Step, timeline: Timeline) {
    let pending = checkpoints.begin((step, timeline, Epoch(1)), config(), shards());
    for shard in shards() {
        pending.add(shard, &bytes_of(shard, step)).unwrap();
    }
    pending.complete().unwrap();
}

#[test]
fn a_checkpoint_ahead_of_a_journal_that_lost_its_end_becomes_its_base() {
    let run = TestRun::new();
    let store = Store::open(&run.dir).unwrap();
    Step(1).through(Step(22)).for_each(|step| store.commit(step, &step.0).unwrap());
    drop(store);
    write(&run.checkpoints(), Step(30));
    for _ in 0..2 {
        let checkpoints = run.checkpoints();
        let store = Store::open_twin(&checkpoints);
        let report = reconcile(&store, &checkpoints, Timeline(0)).unwrap();
        assert_eq!(store.last_committed().unwrap(), Some(Step(30)));
        assert!(report.abandoned.is_empty());
    }
    let store = Store::open(&run.dir).unwrap();
    store.commit(Step(31), &31u64).unwrap();
    assert!(matches!(store.commit(Step(33), &33u64), Err(Error::OutOfOrder { .. })));
    drop(store);
    assert_eq!(Store::open(&run.dir).unwrap().last_committed().unwrap(), Some(Step(31)));
}

#[test]
fn a_checkpoint_that_a_going_back_has_undone_is_void() {
    let run = TestRun::new();
    let checkpoints = run.checkpoints();
    let store = Store::open_twin(&checkpoints);
    Step(1).through(Step(30)).for_each(|step| store.commit(step, &step.0).unwrap());
    write_in_timeline(&checkpoints, Step(20), Timeline(0));
    // Its last shards came late: the run has gone back meanwhile.
    assert_eq!(store.go_back(Step(20), "cluster", &Timeline(1)).unwrap(), 10);
    write_in_timeline(&checkpoints, Step(30), Timeline(0));
    let report = reconcile(&store, &checkpoints, Timeline(1)).unwrap();
    assert_eq!(report, Reconciled { rebased: None, abandoned: vec![Step(30)] });
    assert_eq!(store.last_committed().unwrap(), Some(Step(20)));
    assert_eq!(store.get::<Timeline>(Table::Facts, "cluster").unwrap(), Some(Timeline(1)));
    store.commit(Step(21), &210u64).unwrap();
}

#[test]
fn lost_entries_are_restored_from_manifests() {
    let run = TestRun::new();
    let checkpoints = run.checkpoints();
    for step in (1..=4).map(Step) {
        write(&checkpoints, step);
    }
    lose_entries(&checkpoints, &run, &[Step(2), Step(3), Step(4)]);
    fs::write(run.dir.manifest(Step(3)), b"torn").unwrap();
    assert_eq!(checkpoints.steps().unwrap(), [Step(1)]);
    drop(checkpoints);
    let checkpoints = run.checkpoints();
    assert_eq!(checkpoints.steps().unwrap(), [Step(1), Step(2), Step(4)]);
    checkpoints.verify(Step(4)).unwrap();
    assert!(checkpoints.rebuild_catalogue().unwrap().is_empty());
}

#[test]
fn a_reader_sees_the_checkpoints_of_the_writer() {
    let run = TestRun::new();
    let checkpoints = run.checkpoints();
    let reader = CheckpointReader::open(&run.dir).unwrap();
    assert_eq!(reader.latest().unwrap(), None);
    write(&checkpoints, Step(41));
    write(&checkpoints, Step(42));
    assert_eq!(reader.latest().unwrap(), Some(checkpoints.at(Step(42)).unwrap()));
    assert_eq!(reader.digest(Step(41)).unwrap(), checkpoints.digest(Step(41)).unwrap());
    assert_eq!(reader.read(Step(42), ShardId::Embedding).unwrap(), bytes_of(ShardId::Embedding, Step(42)));
}

#[test]
fn any_changed_byte_of_a_manifest_is_detected_and_the_reader_falls_back() {
    let run = TestRun::new();
    let checkpoints = run.checkpoints();
    write(&checkpoints, Step(1));
    write(&checkpoints, Step(2));
    let reader = CheckpointReader::open(&run.dir).unwrap();
    let (path, whole) = (run.dir.manifest(Step(2)), checkpoints.at(Step(2)).unwrap());
    let text = fs::read(&path).unwrap();
    for at in (0..text.len()).step_by(13) {
        let mut changed = text.clone();
        changed[at] ^= 1;
        fs::write(&path, &changed).unwrap();
        // A changed blank may still be whitespace in JSON; then the content is the same.
        assert!(reader.at(Step(2)).map_or(true, |record| record == whole), "byte {at} of {}", path.display());
    }
    fs::write(&path, &text[..text.len() / 2]).unwrap();
    assert!(reader.at(Step(2)).unwrap_err().to_string().contains("step-00000002.json"));
    assert_eq!(reader.latest().unwrap().unwrap().step, Step(1));
    drop(checkpoints);
    // The catalogue has the entry, and opening rewrites the manifest.
    drop(run.checkpoints());
    assert_eq!(reader.at(Step(2)).unwrap(), whole);
}

#[test]
fn a_checkpoint_may_have_more_shards_than_a_record() {
    let many = (0..6_100u16).map(|n| ShardId::Expert { layer: LayerId(n / 256), expert: ExpertId(n % 256) });
    let run = TestRun::new();
    let checkpoints = run.checkpoints();
    let pending = checkpoints.begin((Step(4), Timeline(0), Epoch(1)), config(), many.clone());
    many.for_each(|shard| {
        assert_eq!(pending.add(shard, b"the same").unwrap(), crate::Digest::of(b"the same"))
    });
    let written = pending.complete().unwrap();
    assert_eq!(written.shards.len(), 6_100);
    drop(checkpoints);
    let checkpoints = run.checkpoints();
    assert_eq!(checkpoints.at(Step(4)).unwrap(), written);
    lose_entries(&checkpoints, &run, &[Step(4)]);
    drop(checkpoints);
    let checkpoints = run.checkpoints();
    assert_eq!(checkpoints.at(Step(4)).unwrap(), written, "restored from its manifest");
    checkpoints.truncate_after(Step(0)).unwrap();
    assert!(matches!(checkpoints.at(Step(4)).unwrap_err(), Error::NoCheckpoint { step: Step(4) }));
}
