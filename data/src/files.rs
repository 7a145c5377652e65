//! From a source's path (a file, a folder or a glob) to the list of its files.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use blake3::Hash;

use crate::error::Error;
use crate::file_manifest::{FileManifest, ListedFile, hash_file};
use crate::options::SourceOptions;
use crate::paths::{SourcePath, walk};
use crate::readers::is_known_extension;
use crate::skipped::{self, Skipped};

/// One file of a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceFile {
    /// The path of the file.
    pub path: PathBuf,
    /// Its path below the source's folder, with `/` between parts: equal on all machines.
    pub relative: String,
    /// Its size on disk, in bytes.
    pub bytes: u64,
    /// The identity of its content.
    pub stamp: Stamp,
    /// Its BLAKE3 hash, if the source has a manifest.
    pub blake3: Option<Hash>,
}

/// The identity of a file's content without a look at it. The time of the last change of the inode is set by
/// the system alone: unlike the modification time, no program puts it back after a write. The inode tells a
/// link that was pointed elsewhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stamp {
    inode: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(metadata: &fs::Metadata) -> Self {
        Self {
            inode: metadata.ino(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    pub(crate) fn fields(self) -> [i64; 5] {
        let Self { inode, modified, changed } = self;
        [inode.cast_signed(), modified.0, modified.1, changed.0, changed.1]
    }
}

/// The files of a source.
#[derive(Clone, Debug, Default)]
pub struct FoundFiles {
    /// The files to read, ordered by relative path, or in the order of the source's manifest.
    pub files: Vec<SourceFile>,
    /// Whether they are those of a folder: then files of no known type were skipped, and files that turn out
    /// to be unreadable are.
    pub of_folder: bool,
    /// The files that were skipped.
    pub skipped: Vec<Skipped>,
}

/// Finds the files of `source`.
///
/// # Errors
/// An [`Error`] that names the source, for a path without files, a variable that is not set, a file that
/// cannot be read, and a file that its manifest lists but that does not exist or has another content.
pub fn find_files(source: &SourceOptions) -> Result<FoundFiles, Error> {
    let path = SourcePath::expand(source)?;
    let literal = path.literal()?;
    if let Some(manifest) = &source.manifest {
        let files = listed_files(source, manifest, &path, literal)?;
        return Ok(FoundFiles { files, ..FoundFiles::default() });
    }
    let mut found = FoundFiles::default();
    if literal.is_file() {
        let name = literal.file_name().unwrap_or_default().to_string_lossy().into_owned();
        found.files.push(describe(literal, name)?);
    } else if literal.is_dir() {
        found = files_of_folder(&literal)?;
        if found.files.is_empty() {
            let kinds =
                "the folder holds no file of a known type (text, source code, .jsonl, .json, .parquet)";
            return Err(path.nothing_found(kinds));
        }
    } else if path.is_pattern() {
        let (root, paths) = path.matches()?;
        let files = paths.into_iter().filter(|path| path.is_file());
        let described = files.map(|path| describe(path.clone(), relative_to(&root, &path)));
        found.files = described.collect::<Result<_, _>>()?;
        if found.files.is_empty() {
            return Err(path.nothing_found("no file matches"));
        }
    } else {
        return Err(path.nothing_found("no such file or folder"));
    }
    found.files.sort_by(|a, b| (&a.relative, &a.path).cmp(&(&b.relative, &b.path)));
    Ok(found)
}

fn files_of_folder(root: &Path) -> Result<FoundFiles, Error> {
    let mut found = FoundFiles { of_folder: true, ..FoundFiles::default() };
    for path in walk(root) {
        let path = path?;
        if !path.is_file() {
            continue;
        }
        if is_known_extension(&path) {
            let relative = relative_to(root, &path);
            found.files.push(describe(path, relative)?);
        } else {
            let extension = path.extension().map(|extension| format!(" (.{})", extension.display()));
            let reason = format!("no known type{}", extension.unwrap_or_default());
            skipped::add(&mut found.skipped, reason, &path);
        }
    }
    Ok(found)
}

/// The files of a manifest, each from the first folder that has it, after a comparison with their hashes.
fn listed_files(
    source: &SourceOptions,
    manifest: &Path,
    path: &SourcePath<'_>,
    literal: PathBuf,
) -> Result<Vec<SourceFile>, Error> {
    let folders = if !literal.is_dir() && path.is_pattern() {
        path.matches()?.1.into_iter().filter(|path| path.is_dir()).collect()
    } else {
        vec![literal]
    };
    let mut files = Vec::new();
    for ListedFile { blake3, relative } in FileManifest::load(manifest)?.files {
        let path = folders.iter().map(|folder| folder.join(&relative)).find(|path| path.is_file());
        let Some(path) = path else {
            let matched: Vec<_> = folders.iter().map(|folder| folder.display().to_string()).collect();
            let matched = if matched.is_empty() { "no folder matches".into() } else { matched.join(", ") };
            return Err(Error::ListedFileMissing {
                name: source.name.clone(),
                file: relative,
                manifest: manifest.to_path_buf(),
                searched: format!("{} ({matched})", source.path),
            });
        };
        let found = hash_file(&path)?;
        if found != blake3 {
            return Err(Error::ListedFileChanged {
                name: source.name.clone(),
                path,
                manifest: manifest.to_path_buf(),
                expected: blake3.to_string(),
                found: found.to_string(),
            });
        }
        files.push(SourceFile { blake3: Some(found), ..describe(path, relative)? });
    }
    Ok(files)
}

fn describe(path: PathBuf, relative: String) -> Result<SourceFile, Error> {
    let metadata = fs::metadata(&path).map_err(Error::read(&path))?;
    Ok(SourceFile { path, relative, bytes: metadata.len(), stamp: Stamp::of(&metadata), blake3: None })
}

fn relative_to(root: &Path, path: &Path) -> String {
    let below = path.strip_prefix(root).unwrap_or(path);
    below.iter().map(OsStr::to_string_lossy).collect::<Vec<_>>().join("/")
}
