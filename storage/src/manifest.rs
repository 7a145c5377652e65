//! The record of a checkpoint, and its manifest: the same data as in the catalogue, in a file for people, for
//! other processes, and for the restoration of lost catalogue entries.

use crate::blobs;
use crate::disk::{Disk, RealDisk};
use crate::error::{Error, Result};
use crate::layout::RunDir;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use volary_core::Digest;
use volary_core::{Epoch, ExpertId, LayerId, ShardId, Step, Timeline};

/// The format of checkpoints of this version.
pub const FORMAT: u16 = 2;

/// The extension of manifests that are set aside.
const ASIDE: &str = "json.damaged";

/// The blob of a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobRef {
    /// The digest, which is the blob's name.
    pub digest: Digest,
    /// The size in bytes.
    pub bytes: u64,
}

/// A complete checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointRecord {
    /// [`FORMAT`].
    pub format: u16,
    /// The last step in the weights.
    pub step: Step,
    /// The run's timeline at its time: after a return to a checkpoint, later checkpoints of an earlier
    /// timeline are void.
    pub timeline: Timeline,
    /// The placement epoch at its time; the content does not depend on it.
    pub epoch: Epoch,
    /// The digest of the options that determine the weights.
    pub config_hash: Digest,
    /// The time of its completion, in milliseconds since 1970.
    pub created_unix_ms: u64,
    /// All shards of the model.
    #[serde(serialize_with = "list_shards", deserialize_with = "collect_shards")]
    pub shards: BTreeMap<ShardId, BlobRef>,
}

impl CheckpointRecord {
    /// The total size of all shards in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.shards.values().map(|blob| blob.bytes).sum()
    }

    /// Whether both have the same weights of the same step, independent of time and placement.
    #[must_use]
    pub fn same_content(&self, other: &Self) -> bool {
        (self.step, self.config_hash, &self.shards) == (other.step, other.config_hash, &other.shards)
    }

    /// A shard's bytes; `get` reads and verifies a blob.
    pub(crate) fn read(&self, get: impl Fn(&Digest) -> Result<Vec<u8>>, shard: ShardId) -> Result<Vec<u8>> {
        let blob = self.shards.get(&shard).ok_or(Error::NoShard { step: self.step, shard })?;
        get(&blob.digest)
    }

    /// Reads all shards and computes their digests from the bytes, not from the file names.
    pub(crate) fn digest(&self, get: impl Fn(&Digest) -> Result<Vec<u8>>) -> Result<CheckpointDigest> {
        let read = |shard: &ShardId| Ok((*shard, Digest::of(&self.read(&get, *shard)?)));
        self.shards.keys().map(read).collect::<Result<Vec<_>>>().map(CheckpointDigest::fold)
    }
}

/// The digest of a checkpoint's weights: equal for equal weights, independent of place and order of the
/// writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointDigest {
    /// The digests of the shards, sorted by the shards' names.
    pub shards: Vec<(ShardId, Digest)>,
    /// BLAKE3 of the shards' names and digests in that order.
    pub whole: Digest,
}

impl CheckpointDigest {
    /// The digest of a checkpoint from those of its shards in any order.
    #[must_use]
    pub fn fold(mut shards: Vec<(ShardId, Digest)>) -> Self {
        shards.sort_by_cached_key(|(shard, _)| shard.to_string());
        let mut hasher = blake3::Hasher::new();
        for (shard, digest) in &shards {
            let name = shard.to_string();
            hasher.update(&(name.len() as u64).to_le_bytes()).update(name.as_bytes()).update(&digest.0);
        }
        let whole = Digest(*hasher.finalize().as_bytes());
        Self { shards, whole }
    }
}

/// A shard in JSON, where a map's keys must be strings.
#[derive(Serialize, Deserialize)]
struct Listed {
    shard: ShardId,
    digest: Digest,
    bytes: u64,
}

fn list_shards<S: Serializer>(
    shards: &BTreeMap<ShardId, BlobRef>,
    to: S,
) -> std::result::Result<S::Ok, S::Error> {
    to.collect_seq(shards.iter().map(|(shard, blob)| Listed {
        shard: *shard,
        digest: blob.digest,
        bytes: blob.bytes,
    }))
}

fn collect_shards<'de, D: Deserializer<'de>>(
    from: D,
) -> std::result::Result<BTreeMap<ShardId, BlobRef>, D::Error> {
    let listed = Vec::<Listed>::deserialize(from)?;
    Ok(listed.into_iter().map(|l| (l.shard, BlobRef { digest: l.digest, bytes: l.bytes })).collect())
}

/// The content of a manifest file.
#[derive(Serialize, Deserialize)]
struct Manifest {
    checkpoint: CheckpointRecord,
    /// Of the record's postcard encoding, so that any changed byte in the file is detected.
    checksum: Digest,
}

/// The format alone, which is readable in all versions.
#[derive(Deserialize)]
struct AnyManifest {
    checkpoint: AnyCheckpoint,
}

#[derive(Deserialize)]
struct AnyCheckpoint {
    format: u16,
}

/// Writes a checkpoint's manifest, durably.
pub(crate) fn write(disk: &impl Disk, dir: &RunDir, record: &CheckpointRecord) -> Result<()> {
    let path = dir.manifest(record.step);
    let manifest = Manifest { checkpoint: record.clone(), checksum: checksum(record)? };
    let text = serde_json::to_vec_pretty(&manifest).map_err(|e| unstorable(record.step, &e))?;
    blobs::replace(disk, &path.with_extension("tmp"), &path, &text)
        .map_err(|e| e.while_writing(|| format!("the manifest of the checkpoint at step {}", record.step)))?;
    sync(disk, dir)
}

/// Removes a checkpoint's manifest, durably.
pub(crate) fn remove(disk: &impl Disk, dir: &RunDir, step: Step) -> Result<()> {
    let path = dir.manifest(step);
    match disk.remove(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", &path, e)),
        _ => sync(disk, dir),
    }
}

/// The verified record in a manifest; `None` without a manifest.
pub(crate) fn read(dir: &RunDir, step: Step) -> Result<Option<CheckpointRecord>> {
    read_on(&RealDisk, dir, step)
}

/// [`read`] on another disk.
pub(crate) fn read_on(disk: &impl Disk, dir: &RunDir, step: Step) -> Result<Option<CheckpointRecord>> {
    read_file(disk, &dir.manifest(step), step)
}

fn read_file(disk: &impl Disk, path: &Path, step: Step) -> Result<Option<CheckpointRecord>> {
    let text = match disk.read(path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io("read", path, e)),
    };
    parse(path, step, &text).map(Some)
}

/// Sets a checkpoint's manifest aside, durably: it counts no longer, and nothing is lost.
pub(crate) fn set_aside(disk: &impl Disk, dir: &RunDir, step: Step) -> Result<()> {
    let path = dir.manifest(step);
    match disk.rename(&path, &path.with_extension(ASIDE)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("set aside", &path, e)),
        _ => sync(disk, dir),
    }
}

/// The records that were set aside.
///
/// # Errors
/// [`Error::DamagedManifest`] when one cannot be read.
pub(crate) fn all_aside(disk: &impl Disk, dir: &RunDir) -> Result<Vec<CheckpointRecord>> {
    let mut records = Vec::new();
    for step in steps_with(dir, &format!(".{ASIDE}"))? {
        records.extend(read_file(disk, &dir.manifest(step).with_extension(ASIDE), step)?);
    }
    Ok(records)
}

/// The steps with a manifest, damaged or not, ascending.
pub(crate) fn steps(dir: &RunDir) -> Result<Vec<Step>> {
    steps_with(dir, ".json")
}

fn steps_with(dir: &RunDir, extension: &str) -> Result<Vec<Step>> {
    let folder = dir.checkpoints();
    let listed = fs::read_dir(&folder).and_then(|entries| {
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    });
    let names: Vec<String> = listed.map_err(|e| Error::io("list", &folder, e))?;
    let step = |name: &String| name.strip_prefix("step-")?.strip_suffix(extension)?.parse().ok().map(Step);
    let mut steps: Vec<Step> = names.iter().filter_map(step).collect();
    steps.sort_unstable();
    Ok(steps)
}

/// The verified record in the text of a manifest.
pub(crate) fn parse(path: &Path, step: Step, text: &[u8]) -> Result<CheckpointRecord> {
    let damaged = |reason: String| Error::DamagedManifest { path: PathBuf::from(path), reason };
    let any: AnyManifest = serde_json::from_slice(text).map_err(|e| damaged(e.to_string()))?;
    let found = any.checkpoint.format;
    if found != FORMAT {
        return Err(Error::Format { what: path.display().to_string(), found, known: FORMAT });
    }
    let manifest: Manifest = serde_json::from_slice(text).map_err(|e| damaged(e.to_string()))?;
    if manifest.checksum != checksum(&manifest.checkpoint)? {
        return Err(damaged("wrong checksum".to_owned()));
    }
    if manifest.checkpoint.step != step {
        return Err(damaged(format!("it belongs to step {}", manifest.checkpoint.step)));
    }
    Ok(manifest.checkpoint)
}

/// Reads bytes as a manifest, for fuzzing: an accepted one survives a rewrite.
pub(crate) fn fuzz(bytes: &[u8]) {
    let Ok(record) = parse(Path::new("step-1.json"), Step(1), bytes) else { return };
    let rewritten = checksum(&record).and_then(|checksum| {
        let text = serde_json::to_vec_pretty(&Manifest { checkpoint: record.clone(), checksum });
        parse(Path::new("step-1.json"), Step(1), &text.map_err(|e| unstorable(Step(1), &e))?)
    });
    assert!(rewritten.is_ok_and(|rewritten| rewritten == record), "an accepted manifest survives a rewrite");
}

/// A manifest, for fuzzing.
pub(crate) fn fuzz_seed() -> Vec<u8> {
    let blob = BlobRef { digest: Digest::of(b"blob"), bytes: 4 };
    let shards = [ShardId::Embedding, ShardId::Expert { layer: LayerId(0), expert: ExpertId(3) }]
        .map(|shard| (shard, blob));
    let record = CheckpointRecord {
        format: FORMAT,
        step: Step(1),
        timeline: Timeline(4),
        epoch: Epoch(2),
        config_hash: Digest::of(b"config"),
        created_unix_ms: 3,
        shards: shards.into(),
    };
    let manifest = checksum(&record).map(|checksum| Manifest { checkpoint: record, checksum });
    manifest.map(|manifest| serde_json::to_vec_pretty(&manifest).unwrap_or_default()).unwrap_or_default()
}

fn checksum(record: &CheckpointRecord) -> Result<Digest> {
    postcard::to_stdvec(record).map(|bytes| Digest::of(&bytes)).map_err(|e| unstorable(record.step, &e))
}

fn sync(disk: &impl Disk, dir: &RunDir) -> Result<()> {
    let folder = dir.checkpoints();
    disk.sync_folder(&folder).map_err(|e| Error::io("sync", &folder, e))
}

fn unstorable(step: Step, reason: &dyn std::fmt::Display) -> Error {
    Error::Unstorable { what: format!("the manifest of step {step}"), reason: reason.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The layout is fixed: a change needs a new [`FORMAT`].
    #[test]
    fn the_layout_of_a_manifest_is_fixed() {
        assert_eq!(
            Digest::of(&fuzz_seed()).to_string(),
            "f45924ddc2639cb219773ea61349ab845ff3f90867ba91038d26237c423b8cc4"
        );
    }
}
