//! A disk with injected faults, and a run for tests.

use crate::{BlobStore, Checkpoints, Digest, Disk, RealDisk, RunDir, Store};
use parking_lot::Mutex;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use volary_core::{Epoch, ExpertId, LayerId, ShardId, Step, Timeline};

/// Logs operations. From operation `full_from` on, the disk is full and writes are partial.
#[derive(Clone, Debug, Default)]
pub(crate) struct TestDisk {
    pub(crate) log: Arc<Mutex<Vec<String>>>,
    pub(crate) full_from: Arc<Mutex<Option<usize>>>,
    /// Reads so far.
    pub(crate) reads: Arc<AtomicUsize>,
    /// Whether every read fails.
    pub(crate) unreadable: Arc<AtomicBool>,
}

impl TestDisk {
    fn log(&self, what: &str, path: &Path) -> bool {
        let mut log = self.log.lock();
        log.push(format!("{what} {}", path.file_name().unwrap().to_string_lossy()));
        self.full_from.lock().is_some_and(|from| log.len() > from)
    }

    pub(crate) fn fill(&self) {
        let done = self.log.lock().len();
        *self.full_from.lock() = Some(done);
    }

    pub(crate) fn free(&self) {
        *self.full_from.lock() = None;
    }

    pub(crate) fn count(&self, what: &str) -> usize {
        self.log.lock().iter().filter(|line| line.starts_with(what)).count()
    }
}

impl Disk for TestDisk {
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        if self.unreadable.load(Ordering::Relaxed) {
            // EIO.
            return Err(io::Error::from_raw_os_error(5));
        }
        RealDisk.read(path)
    }

    fn sync_file(&self, path: &Path) -> io::Result<()> {
        RealDisk.sync_file(path)
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        if self.log("write", path) {
            fs::write(path, &bytes[..bytes.len() / 2])?;
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        RealDisk.write(path, bytes)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.log("rename", to);
        RealDisk.rename(from, to)
    }

    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        self.log("sync", path);
        RealDisk.sync_folder(path)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.log("remove", path);
        RealDisk.remove(path)
    }
}

impl Store {
    /// The store of open checkpoints.
    pub(crate) fn open_twin<D: Disk>(checkpoints: &Checkpoints<D>) -> Self {
        checkpoints.store().clone()
    }
}

/// A run in a temporary directory.
pub(crate) struct TestRun {
    _temp: tempfile::TempDir,
    pub(crate) dir: RunDir,
    pub(crate) disk: TestDisk,
}

impl TestRun {
    pub(crate) fn new() -> Self {
        let temp = tempfile::tempdir().unwrap();
        let dir = RunDir::create(temp.path()).unwrap();
        Self { _temp: temp, dir, disk: TestDisk::default() }
    }

    pub(crate) fn checkpoints(&self) -> Checkpoints<TestDisk> {
        self.try_checkpoints().unwrap()
    }

    pub(crate) fn try_checkpoints(&self) -> crate::Result<Checkpoints<TestDisk>> {
        let blobs = BlobStore::open_on(self.dir.blobs(), self.disk.clone())?;
        Checkpoints::open(&self.dir, Store::open(&self.dir)?, blobs)
    }
}

pub(crate) fn shards() -> Vec<ShardId> {
    let mut shards =
        vec![ShardId::Embedding, ShardId::Dense { layer: LayerId(0) }, ShardId::Router { layer: LayerId(1) }];
    shards.extend((0..12).map(|expert| ShardId::Expert { layer: LayerId(1), expert: ExpertId(expert) }));
    shards
}

/// A shard's bytes at a step; the embedding never changes.
pub(crate) fn bytes_of(shard: ShardId, step: Step) -> Vec<u8> {
    let step = if shard == ShardId::Embedding { Step(0) } else { step };
    format!("{shard} at {step}").repeat(100).into_bytes()
}

pub(crate) fn config() -> Digest {
    Digest::of(b"config")
}

/// Writes a checkpoint with its shards in the given order.
pub(crate) fn write_in_order<D: Disk>(
    checkpoints: &Checkpoints<D>,
    step: Step,
    order: impl IntoIterator<Item = ShardId>,
) -> crate::Result<()> {
    let pending = checkpoints.begin((step, Timeline(0), Epoch(1)), config(), shards());
    for shard in order {
        pending.add(shard, &bytes_of(shard, step))?;
    }
    pending.complete().map(drop)
}

pub(crate) fn write<D: Disk>(checkpoints: &Checkpoints<D>, step: Step) {
    write_in_order(checkpoints, step, shards()).unwrap();
}
