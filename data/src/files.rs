//! From a source's path (a file, a folder or a glob) to the list of its files.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use blake3::Hash;
use walkdir::WalkDir;

use crate::error::Error;
use crate::file_manifest::{FileManifest, ListedFile, hash_file};
use crate::options::SourceOptions;
use crate::readers::is_known_extension;

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

/// The files of `source`, ordered by relative path, or in the order of its manifest.
///
/// # Errors
/// An [`Error`] that names the source, for a path without files, a variable that is not set, a file that
/// cannot be read, and a file that its manifest lists but that does not exist or has another content.
pub fn find_files(source: &SourceOptions) -> Result<Vec<SourceFile>, Error> {
    let expanded = expand(source)?;
    // A relative path depends on the working folder; the cache's key must not.
    let path = std::path::absolute(&expanded).map_err(|error| nothing_found(source, error.to_string()))?;
    if let Some(manifest) = &source.manifest {
        return listed_files(source, manifest, &path);
    }
    let mut files = if path.is_file() {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        vec![describe(path, name)?]
    } else if path.is_dir() {
        let kinds = "the folder holds no file of a known type (text, source code, .jsonl, .parquet)";
        some(source, walk(&path)?, kinds)?
    } else if is_glob(&path) {
        some(source, matching_files(source, &path)?, "no file matches")?
    } else {
        return Err(nothing_found(source, "no such file or folder".into()));
    };
    files.sort_by(|a, b| a.relative.cmp(&b.relative));
    Ok(files)
}

fn nothing_found(source: &SourceOptions, reason: String) -> Error {
    Error::NothingFound { name: source.name.clone(), path: source.path.clone(), reason }
}

fn some(source: &SourceOptions, files: Vec<SourceFile>, otherwise: &str) -> Result<Vec<SourceFile>, Error> {
    if files.is_empty() { Err(nothing_found(source, otherwise.into())) } else { Ok(files) }
}

/// The files of a manifest, each from the first folder that has it, after a comparison with their hashes.
fn listed_files(source: &SourceOptions, manifest: &Path, path: &Path) -> Result<Vec<SourceFile>, Error> {
    let mut folders = vec![path.to_path_buf()];
    if !path.is_dir() && is_glob(path) {
        folders = matches(source, path)?.into_iter().filter(|path| path.is_dir()).collect();
    }
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

fn is_hidden(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b".")
}

fn walk(root: &Path) -> Result<Vec<SourceFile>, Error> {
    let mut files = Vec::new();
    // Model hubs keep their files as links into a store of blobs.
    let entries = WalkDir::new(root).follow_links(true).into_iter();
    for entry in entries.filter_entry(|e| e.depth() == 0 || !is_hidden(e.file_name())) {
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) if is_dangling(&error) => continue,
            Err(error) => {
                let path = error.path().unwrap_or(root).to_path_buf();
                return Err(Error::Read { path, error: error.into() });
            }
        };
        if entry.file_type().is_file() && is_known_extension(entry.path()) {
            let relative = relative_to(root, entry.path());
            files.push(describe(entry.into_path(), relative)?);
        }
    }
    Ok(files)
}

/// A link to a missing file or to its own parent: nothing to read, and no reason to fail.
fn is_dangling(error: &walkdir::Error) -> bool {
    error.loop_ancestor().is_some()
        || error.io_error().is_some_and(|e| e.kind() == std::io::ErrorKind::NotFound)
}

fn is_glob(path: &Path) -> bool {
    path.to_string_lossy().contains(['*', '?', '['])
}

fn matching_files(source: &SourceOptions, pattern: &Path) -> Result<Vec<SourceFile>, Error> {
    let root: PathBuf = pattern.iter().take_while(|part| !is_glob(Path::new(part))).collect();
    let paths = matches(source, pattern)?.into_iter().filter(|path| path.is_file());
    paths.map(|path| describe(path.clone(), relative_to(&root, &path))).collect()
}

/// The paths that match a glob, in alphabetical order.
fn matches(source: &SourceOptions, pattern: &Path) -> Result<Vec<PathBuf>, Error> {
    // `*` does not match a leading dot: hidden files are skipped unless the pattern names them.
    let options = glob::MatchOptions { require_literal_leading_dot: true, ..glob::MatchOptions::new() };
    let found = glob::glob_with(&pattern.to_string_lossy(), options)
        .map_err(|error| nothing_found(source, format!("not a valid glob: {error}")))?;
    let unreadable = |error: glob::GlobError| Error::Read { path: error.path().into(), error: error.into() };
    found.map(|path| path.map_err(unreadable)).collect()
}

/// Expands a leading `~` and every `$NAME` and `${NAME}` of the source's path.
fn expand(source: &SourceOptions) -> Result<String, Error> {
    let lookup = |variable: &str| {
        value_of(variable).ok_or_else(|| Error::Unset {
            name: source.name.clone(),
            path: source.path.clone(),
            variable: variable.into(),
        })
    };
    let mut rest = source.path.as_str();
    let mut expanded = String::new();
    if rest == "~" || rest.starts_with("~/") {
        expanded = lookup("HOME")?;
        rest = &rest[1..];
    }
    while let Some(at) = rest.find('$') {
        expanded.push_str(&rest[..at]);
        let (name, after) = variable_name(&rest[at + 1..]);
        if name.is_empty() {
            expanded.push('$');
        } else {
            expanded.push_str(&lookup(name)?);
        }
        rest = after;
    }
    expanded.push_str(rest);
    Ok(expanded)
}

/// Splits text after a `$` into the variable's name (empty if there is none) and the rest.
fn variable_name(text: &str) -> (&str, &str) {
    if let Some(inner) = text.strip_prefix('{')
        && let Some(end) = inner.find('}')
    {
        return (&inner[..end], &inner[end + 1..]);
    }
    let end = text.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(text.len());
    text.split_at(end)
}

fn value_of(variable: &str) -> Option<String> {
    match std::env::var(variable) {
        Ok(value) if !value.is_empty() => Some(value),
        _ if variable == "CARGO_HOME" => Some(format!("{}/.cargo", value_of("HOME")?)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_and_the_home_folder_expand() {
        let home = std::env::var("HOME").unwrap();
        let expanded = |path: &str| expand(&SourceOptions::new("s", path)).unwrap();
        assert_eq!(expanded("~/x"), format!("{home}/x"));
        assert_eq!(expanded("$HOME/x"), format!("{home}/x"));
        assert_eq!(expanded("a${HOME}b"), format!("a{home}b"));
        assert_eq!(expanded("a~b"), "a~b");
        assert_eq!(expanded("price$"), "price$");
        assert!(!expanded("$CARGO_HOME/registry").contains('$'));
    }

    #[test]
    fn an_unset_variable_is_named() {
        let error = expand(&SourceOptions::new("books", "$VOLARY_NO_SUCH/x")).unwrap_err().to_string();
        assert!(error.contains("books") && error.contains("VOLARY_NO_SUCH"), "{error}");
    }
}
