//! The manifest of a source: its files, with their hashes.

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Component, Path};

use blake3::Hash;

use crate::error::Error;
use crate::limits::MAX_FILE_MANIFEST_BYTES;

/// A list of files and their BLAKE3 hashes, in the format of `b3sum`: one line `HASH  RELATIVE/PATH` for each
/// file.
///
/// The order of the lines is the order of reading. `Display` writes the format that [`load`](Self::load)
/// reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileManifest {
    /// The files, in the order of reading.
    pub files: Vec<ListedFile>,
}

/// A line of a [`FileManifest`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedFile {
    /// The BLAKE3 hash of the content.
    pub blake3: Hash,
    /// The path, with `/` between parts, without `.` and `..`.
    pub relative: String,
}

impl FileManifest {
    /// Reads a manifest.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::FileManifestLine`] for a malformed line, [`Error::FileManifest`] for a
    /// manifest that is empty or too large.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let fail = |reason| Error::FileManifest { path: path.to_path_buf(), reason };
        let file = File::open(path).map_err(Error::read(path))?;
        let mut text = String::new();
        let limited = file.take(MAX_FILE_MANIFEST_BYTES + 1).read_to_string(&mut text);
        if limited.map_err(Error::read(path))? as u64 > MAX_FILE_MANIFEST_BYTES {
            return Err(fail("the manifest is too large"));
        }
        let mut files = Vec::new();
        let mut seen = HashSet::new();
        for (at, line) in text.lines().enumerate() {
            let malformed =
                |reason| Error::FileManifestLine { path: path.to_path_buf(), line: at + 1, reason };
            let (blake3, relative) = parse(line).map_err(malformed)?;
            if !seen.insert(relative) {
                return Err(malformed("the file is listed twice"));
            }
            files.push(ListedFile { blake3, relative: relative.to_string() });
        }
        if files.is_empty() {
            return Err(fail("the manifest lists no file"));
        }
        Ok(Self { files })
    }
}

impl fmt::Display for FileManifest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.files.iter().try_for_each(|file| writeln!(f, "{}  {}", file.blake3.to_hex(), file.relative))
    }
}

/// The BLAKE3 hash of a file, which is streamed.
pub(crate) fn hash_file(path: &Path) -> Result<Hash, Error> {
    let file = File::open(path).map_err(Error::read(path))?;
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(file).map_err(Error::read(path))?;
    Ok(hasher.finalize())
}

fn parse(line: &str) -> Result<(Hash, &str), &'static str> {
    let (hash, relative) = line.split_once("  ").ok_or("there are no two spaces")?;
    let hash = Hash::from_hex(hash).map_err(|_| "the hash is not 64 hexadecimal digits")?;
    let is_name = |part| matches!(part, Component::Normal(_));
    if relative.is_empty() || relative.ends_with('/') || !Path::new(relative).components().all(is_name) {
        return Err("the path is not a relative path of a file");
    }
    Ok((hash, relative))
}
