//! Copies of checkpoints in an object store, from which a run resumes on another machine.
//!
//! | name | content |
//! | --- | --- |
//! | `run.json` | the run whose folder it is |
//! | `config.toml`, `tokenizer.json`, `corpus.json` | what a run directory has beside its checkpoints |
//! | `blobs/DIGEST` | the tensors of a shard, as in the run directory |
//! | `checkpoints/step-N.json` | a checkpoint's manifest, written when all of its blobs are there |
//!
//! A manifest is written last and removed first, so that every checkpoint that is listed is whole: the folder
//! alone is enough. One process writes it: the run's supervisor.

use crate::blobs::{self, BlobStore};
use crate::error::{Error, Result};
use crate::journal::RunIdentity;
use crate::layout::RunDir;
use crate::limits::{BLOBS_IN_FLIGHT, SMALL_OBJECT_BYTES_MAX};
use crate::manifest::{self, BlobRef, CheckpointRecord};
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use volary_core::{Digest, Step};
use volary_objects::{Location, ObjectFolder};

const RUN: &str = "run.json";
const CONFIG: &str = "config.toml";
const BLOBS: &str = "blobs";
const CHECKPOINTS: &str = "checkpoints";

/// The copies of a run's checkpoints.
#[derive(Debug)]
pub struct Mirror {
    folder: ObjectFolder,
    dir: RunDir,
    /// The blobs that are there, with their sizes.
    blobs: HashMap<String, u64>,
}

/// What a copy took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Blobs that were not there before.
    pub blobs: usize,
    /// Their bytes.
    pub bytes: u64,
}

impl Mirror {
    /// The folder of this run: it is claimed where it is new.
    ///
    /// # Errors
    /// [`Error::MirrorTaken`] when it can only be read, is another run's, or has later checkpoints than the
    /// run directory;
    /// [`Error::Objects`] when the store refuses or cannot be reached.
    pub async fn open(address: &str, dir: &RunDir, run: &RunIdentity) -> Result<Self> {
        let folder = ObjectFolder::open(address)?;
        let taken = |reason: String| Error::MirrorTaken { folder: folder.to_string(), reason };
        if !Location::parse(address)?.is_writable() {
            return Err(taken("it can only be read".into()));
        }
        match folder.get(RUN, SMALL_OBJECT_BYTES_MAX).await {
            Ok(bytes) => {
                let found: Option<RunIdentity> = serde_json::from_slice(&bytes).ok();
                if found.as_ref() != Some(run) {
                    let name =
                        found.map_or_else(|| "another program".into(), |run| format!("run {}", run.name));
                    return Err(taken(format!("it is that of {name} with other options")));
                }
            }
            Err(error) if error.is_missing() => {}
            Err(error) => return Err(error.into()),
        }
        let (there, here) = (steps(&folder).await?, manifest::steps(dir)?);
        let (there, here) = (there.last().copied(), here.last().copied());
        if let Some(step) = there.filter(|step| here.is_none_or(|here| here < *step)) {
            let reason =
                format!("it has a checkpoint of step {step}, which this run directory has not reached");
            return Err(taken(reason));
        }
        let json = serde_json::to_vec_pretty(run).unwrap_or_default();
        folder.put(RUN, json).await?;
        let mirror = Self { blobs: blobs_in(&folder).await?, folder, dir: dir.clone() };
        for path in mirror.beside() {
            if path.exists() {
                mirror.folder.put_file(&name_of(&path), &path).await?;
            }
        }
        Ok(mirror)
    }

    /// Copies a checkpoint, and removes all but the newest `keep` and those that `must_stay`. Checkpoints of
    /// later steps are of a past from which the run has returned.
    ///
    /// # Errors
    /// [`Error::Objects`]. What was copied counts for the next attempt.
    pub async fn copy(
        &mut self,
        record: &CheckpointRecord,
        keep: usize,
        must_stay: &[Option<Step>],
    ) -> Result<Copied> {
        let is_new = |blob: &&BlobRef| self.blobs.get(&blob.digest.to_string()) != Some(&blob.bytes);
        // Shards with the same bytes are one blob.
        let new: BTreeMap<String, u64> =
            record.shards.values().filter(is_new).map(|blob| (blob.digest.to_string(), blob.bytes)).collect();
        let copies = new.iter().map(|(digest, bytes)| self.copy_blob(digest, *bytes).boxed());
        several(copies.collect()).await?;
        let copied = Copied { blobs: new.len(), bytes: new.values().sum() };
        self.blobs.extend(new);
        let path = self.dir.manifest(record.step);
        self.folder.put_file(&format!("{CHECKPOINTS}/{}", name_of(&path)), &path).await?;
        self.retain(record.step, keep, must_stay).await?;
        Ok(copied)
    }

    async fn copy_blob(&self, digest: &str, bytes: u64) -> Result<()> {
        let (name, path) = (format!("{BLOBS}/{digest}"), self.dir.blobs().join(digest));
        self.folder.put_file(&name, &path).await?;
        let found = self.folder.info(&name).await?.bytes;
        if found != bytes {
            return Err(Error::MirrorSize { object: self.folder.address(&name), found, expected: bytes });
        }
        Ok(())
    }

    async fn retain(&mut self, newest: Step, keep: usize, must_stay: &[Option<Step>]) -> Result<()> {
        let (past, mut steps): (Vec<Step>, Vec<Step>) =
            steps(&self.folder).await?.into_iter().partition(|step| *step > newest);
        let old: Vec<Step> = steps.drain(..steps.len().saturating_sub(keep.max(1))).collect();
        let (kept, old): (Vec<Step>, Vec<Step>) =
            old.into_iter().partition(|step| *step == Step(0) || must_stay.contains(&Some(*step)));
        steps.extend(kept);
        for step in past.into_iter().chain(old) {
            self.folder.remove(&manifest_name(&self.dir, step)).await?;
        }
        let mut referenced = HashSet::new();
        for step in steps {
            let record = record_at(&self.folder, &self.dir, step).await?;
            referenced.extend(record.shards.values().map(|blob| blob.digest.to_string()));
        }
        let unused: Vec<String> =
            self.blobs.keys().filter(|digest| !referenced.contains(*digest)).cloned().collect();
        for digest in unused {
            self.folder.remove(&format!("{BLOBS}/{digest}")).await?;
            self.blobs.remove(&digest);
        }
        Ok(())
    }

    fn beside(&self) -> [PathBuf; 3] {
        [self.dir.config(), self.dir.tokenizer(), self.dir.corpus()]
    }
}

/// The text of the configuration of a folder's run.
///
/// # Errors
/// [`Error::Objects`].
pub async fn configuration(address: &str) -> Result<Vec<u8>> {
    let folder = ObjectFolder::open(address)?;
    Ok(folder.get(CONFIG, SMALL_OBJECT_BYTES_MAX).await?)
}

/// Copies the newest checkpoint of a folder, and that of step 0 if there is one, into a run directory that
/// has none, with what is beside them but for the configuration, whose paths are those of another machine.
/// All bytes are verified.
///
/// # Errors
/// [`Error::NoMirror`] when the folder has no checkpoint; [`Error::DamagedBlob`] or
/// [`Error::DamagedManifest`] when bytes are not what they were; [`Error::Objects`] or [`Error::Io`].
pub async fn restore(address: &str, dir: &RunDir) -> Result<Step> {
    let folder = ObjectFolder::open(address)?;
    let steps = steps(&folder).await?;
    let newest = *steps.last().ok_or_else(|| Error::NoMirror { folder: folder.to_string() })?;
    let first = steps.first().copied().filter(|step| *step == Step(0) && newest > *step);
    let blobs = BlobStore::open(dir.blobs())?;
    for step in [Some(newest), first].into_iter().flatten() {
        let record = record_at(&folder, dir, step).await?;
        let wanted: HashSet<Digest> = record.shards.values().map(|blob| blob.digest).collect();
        let copies = wanted.iter().map(|digest| restore_blob(&folder, &blobs, digest).boxed());
        several(copies.collect()).await?;
        blobs.sync()?;
        let text = folder.get(&manifest_name(dir, step), SMALL_OBJECT_BYTES_MAX).await?;
        blobs::write_file(&dir.manifest(step), &text)?;
    }
    for path in [dir.tokenizer(), dir.corpus()] {
        match folder.get(&name_of(&path), SMALL_OBJECT_BYTES_MAX).await {
            Ok(bytes) => blobs::write_file(&path, &bytes)?,
            Err(error) if error.is_missing() => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(newest)
}

/// Awaits transfers, some at a time, until the first failure.
async fn several(transfers: Vec<BoxFuture<'_, Result<()>>>) -> Result<()> {
    stream::iter(transfers).buffer_unordered(BLOBS_IN_FLIGHT).try_collect().await
}

async fn restore_blob(folder: &ObjectFolder, blobs: &BlobStore, digest: &Digest) -> Result<()> {
    let path = blobs.path(digest);
    let partial = path.with_extension("partial");
    let mut hasher = blake3::Hasher::new();
    let name = format!("{BLOBS}/{digest}");
    let bytes = folder
        .get_file(&name, &partial, |part| {
            hasher.update(part);
        })
        .await?;
    let found = Digest(*hasher.finalize().as_bytes());
    if found != *digest {
        // A half or wrong file must not be taken for a blob.
        let _ = std::fs::remove_file(&partial);
        return Err(Error::DamagedBlob { path: folder.address(&name).into(), found, bytes });
    }
    std::fs::rename(&partial, &path).map_err(|error| Error::io("rename", &partial, error))
}

/// The steps with a manifest, ascending.
async fn steps(folder: &ObjectFolder) -> Result<Vec<Step>> {
    let files = folder.list(CHECKPOINTS).await?;
    let step = |name: &str| {
        let name = name.strip_prefix(CHECKPOINTS)?.strip_prefix("/step-")?.strip_suffix(".json")?;
        name.parse().ok().map(Step)
    };
    let mut steps: Vec<Step> = files.iter().filter_map(|file| step(&file.name)).collect();
    steps.sort_unstable();
    Ok(steps)
}

async fn blobs_in(folder: &ObjectFolder) -> Result<HashMap<String, u64>> {
    let files = folder.list(BLOBS).await?.into_iter();
    Ok(files
        .filter_map(|file| Some((file.name.strip_prefix(BLOBS)?.strip_prefix('/')?.to_owned(), file.bytes)))
        .collect())
}

async fn record_at(folder: &ObjectFolder, dir: &RunDir, step: Step) -> Result<CheckpointRecord> {
    let name = manifest_name(dir, step);
    let text = folder.get(&name, SMALL_OBJECT_BYTES_MAX).await?;
    manifest::parse(folder.address(&name).as_ref(), step, &text)
}

fn manifest_name(dir: &RunDir, step: Step) -> String {
    format!("{CHECKPOINTS}/{}", name_of(&dir.manifest(step)))
}

fn name_of(path: &std::path::Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
