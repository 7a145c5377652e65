//! From a source's path (a file, a folder or a glob) to the list of files it stands for.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use walkdir::WalkDir;

use crate::error::Error;
use crate::options::SourceOptions;
use crate::readers::is_known_extension;

/// One file of a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceFile {
    /// Where the file is.
    pub path: PathBuf,
    /// Its path below the source's folder, with `/` between parts: the same on every machine.
    pub relative: String,
    /// Its size on disk, in bytes.
    pub bytes: u64,
    /// When it was last changed, in nanoseconds since 1970 (0 when the file system does not say).
    pub modified_ns: u128,
}

/// The files of `source`, ordered by relative path.
pub fn find_files(source: &SourceOptions) -> Result<Vec<SourceFile>, Error> {
    let expanded = expand(source)?;
    let nothing = |reason: &str| Error::NothingFound {
        name: source.name.clone(),
        path: source.path.clone(),
        reason: reason.into(),
    };
    // What a relative path stands for depends on the working folder; the cache's key must not.
    let path = std::path::absolute(&expanded).map_err(|error| nothing(&error.to_string()))?;
    let path = path.as_path();
    let mut files = if path.is_file() {
        vec![describe(
            path.to_path_buf(),
            path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        )?]
    } else if path.is_dir() {
        let files = walk(path)?;
        if files.is_empty() {
            return Err(nothing(
                "the folder holds no file of a kind that is read (text, source code, .jsonl, .parquet)",
            ));
        }
        files
    } else if expanded.contains(['*', '?', '[']) {
        let files = matches(source, &path.to_string_lossy())?;
        if files.is_empty() {
            return Err(nothing("no file matches"));
        }
        files
    } else {
        return Err(nothing("no such file or folder"));
    };
    files.sort_by(|a, b| a.relative.cmp(&b.relative));
    Ok(files)
}

fn describe(path: PathBuf, relative: String) -> Result<SourceFile, Error> {
    let metadata = fs::metadata(&path).map_err(Error::read(&path))?;
    let modified = metadata.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
    let modified_ns = modified.map_or(0, |t| t.as_nanos());
    Ok(SourceFile { path, relative, bytes: metadata.len(), modified_ns })
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
    // Links are followed: model hubs keep their files as links into a store of blobs.
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

/// A link to nowhere or to its own parent: nothing to read there, and no reason to fail.
fn is_dangling(error: &walkdir::Error) -> bool {
    error.loop_ancestor().is_some()
        || error.io_error().is_some_and(|e| e.kind() == std::io::ErrorKind::NotFound)
}

fn matches(source: &SourceOptions, pattern: &str) -> Result<Vec<SourceFile>, Error> {
    // `*` does not match a leading dot, so hidden files are skipped unless the pattern names them.
    let options = glob::MatchOptions { require_literal_leading_dot: true, ..glob::MatchOptions::new() };
    let found = glob::glob_with(pattern, options).map_err(|error| Error::NothingFound {
        name: source.name.clone(),
        path: source.path.clone(),
        reason: format!("not a valid glob: {error}"),
    })?;
    let root: PathBuf = Path::new(pattern)
        .iter()
        .take_while(|part| !part.to_string_lossy().contains(['*', '?', '[']))
        .collect();
    let mut files = Vec::new();
    for path in found {
        let path = path.map_err(|error| Error::Read { path: error.path().into(), error: error.into() })?;
        if path.is_file() {
            let relative = relative_to(&root, &path);
            files.push(describe(path, relative)?);
        }
    }
    Ok(files)
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

/// Splits text after a `$` into the variable's name (empty if there is none) and what follows.
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
