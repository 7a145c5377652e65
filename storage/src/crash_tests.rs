//! Checkpoints on a disk that loses what is not synced.

use crate::testing::{bytes_of, config, shards};
use crate::{BlobStore, Checkpoints, Disk, RealDisk, RunDir, Store};
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use volary_core::random::{Purpose, Stream};
use volary_core::{Epoch, Step, Timeline};

/// A change of a folder that is not durable yet, with what undoes it.
#[derive(Debug)]
enum Change {
    Created(PathBuf),
    Renamed { from: PathBuf, to: PathBuf, replaced: Option<Vec<u8>> },
    Removed(PathBuf, Vec<u8>),
}

impl Change {
    fn folder(&self) -> Option<&Path> {
        match self {
            Self::Created(path) | Self::Removed(path, _) | Self::Renamed { to: path, .. } => path.parent(),
        }
    }

    fn undo(self) {
        match self {
            Self::Created(path) => drop(fs::remove_file(path)),
            Self::Removed(path, bytes) => fs::write(path, bytes).unwrap(),
            Self::Renamed { from, to, replaced } => {
                drop(fs::rename(&to, from));
                if let Some(bytes) = replaced {
                    fs::write(to, bytes).unwrap();
                }
            }
        }
    }
}

/// The part of a disk that is in memory only.
#[derive(Debug, Default)]
struct Volatile {
    changes: Vec<Change>,
    /// Files whose content is not durable.
    contents: BTreeSet<PathBuf>,
    /// Operations until the power fails.
    left: u64,
}

/// A disk without power after some operations.
#[derive(Clone, Debug, Default)]
struct CrashDisk {
    volatile: Arc<Mutex<Volatile>>,
}

impl CrashDisk {
    fn operate<T>(&self, work: impl FnOnce(&mut Volatile) -> io::Result<T>) -> io::Result<T> {
        let mut volatile = self.volatile.lock();
        if volatile.left == 0 {
            return Err(io::Error::other("no power"));
        }
        volatile.left -= 1;
        work(&mut volatile)
    }

    /// What a later start finds: of the changes that were not synced, a random number of the first ones, and
    /// no content that was not synced.
    fn crash(&self, random: &mut Stream) {
        let mut volatile = self.volatile.lock();
        let kept = random.below(volatile.changes.len() as u64 + 1) as usize;
        let contents = std::mem::take(&mut volatile.contents);
        for path in contents.iter().filter(|path| path.exists()) {
            fs::write(path, b"").unwrap();
        }
        let lost = volatile.changes.split_off(kept);
        lost.into_iter().rev().for_each(Change::undo);
        volatile.changes.clear();
        volatile.left = u64::MAX;
    }
}

impl Disk for CrashDisk {
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.operate(|_| RealDisk.read(path))
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.operate(|volatile| {
            if !path.exists() {
                volatile.changes.push(Change::Created(path.to_owned()));
            }
            volatile.contents.insert(path.to_owned());
            fs::write(path, bytes)
        })
    }

    fn sync_file(&self, path: &Path) -> io::Result<()> {
        self.operate(|volatile| {
            volatile.contents.remove(path);
            Ok(())
        })
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.operate(|volatile| {
            let replaced = fs::read(to).ok();
            fs::rename(from, to)?;
            if volatile.contents.remove(from) {
                volatile.contents.insert(to.to_owned());
            }
            volatile.changes.push(Change::Renamed { from: from.to_owned(), to: to.to_owned(), replaced });
            Ok(())
        })
    }

    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        self.operate(|volatile| {
            volatile.changes.retain(|change| change.folder() != Some(path));
            Ok(())
        })
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.operate(|volatile| {
            let bytes = fs::read(path)?;
            fs::remove_file(path)?;
            volatile.changes.push(Change::Removed(path.to_owned(), bytes));
            Ok(())
        })
    }
}

fn open(dir: &RunDir, disk: &CrashDisk) -> crate::Result<Checkpoints<CrashDisk>> {
    let blobs = BlobStore::open_on(dir.blobs(), disk.clone())?;
    Checkpoints::open(dir, Store::open(dir)?, blobs)
}

fn write(checkpoints: &Checkpoints<CrashDisk>, step: Step) -> crate::Result<()> {
    let pending = checkpoints.begin((step, Timeline(0), Epoch(1)), config(), shards());
    for shard in shards() {
        pending.add(shard, &bytes_of(shard, step))?;
    }
    pending.complete().map(drop)
}

/// Writes, retains and removes checkpoints until the power fails. Returns those that must be there.
fn play(
    checkpoints: &Checkpoints<CrashDisk>,
    first: Step,
    mut there: BTreeMap<Step, bool>,
    random: &mut Stream,
) -> BTreeMap<Step, bool> {
    for step in first.through(Step(first.0 + 5)) {
        if write(checkpoints, step).is_err() {
            // It may exist: its entry may be durable.
            there.insert(step, false);
            return there;
        }
        there.insert(step, true);
        if random.below(3) == 0 {
            let removed: Vec<Step> = there.keys().rev().skip(2).copied().collect();
            removed.iter().for_each(|step| _ = there.insert(*step, false));
            if checkpoints.retain(2, &[]).is_err() {
                return there;
            }
        }
    }
    there
}

#[test]
fn a_checkpoint_that_was_reported_durable_is_intact_after_a_power_failure_at_any_operation() {
    let seeds: u64 = std::env::var("VOLARY_CRASHES").map_or(40, |seeds| seeds.parse().unwrap());
    for seed in 0..seeds {
        let mut random = Stream::new(seed, Purpose::Faults, &[14]);
        let temp = tempfile::tempdir().unwrap();
        let dir = RunDir::create(temp.path()).unwrap();
        let disk = CrashDisk::default();
        let mut there = BTreeMap::new();
        for life in 0..3 {
            disk.volatile.lock().left = u64::MAX;
            let checkpoints = open(&dir, &disk).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
            let steps = checkpoints.steps().unwrap();
            for (step, _) in there.iter().filter(|(_, must)| **must) {
                assert!(steps.contains(step), "seed {seed}: the checkpoint at step {step} is lost");
            }
            for step in &steps {
                let verified = checkpoints.verify(*step);
                assert!(verified.is_ok(), "seed {seed}: step {step}: {verified:?}");
            }
            there = steps.iter().map(|step| (*step, true)).collect();
            disk.volatile.lock().left = random.below(250);
            there = play(&checkpoints, Step(10 * life + 1), there, &mut random);
            drop(checkpoints);
            disk.crash(&mut random);
        }
    }
}
