//! From the text of a source's path to paths: variables are expanded, and patterns are matched.
//!
//! Only what the user wrote is a pattern: the value of a variable and the working folder are names, whatever
//! characters they hold. The names of files are bytes and need not be UTF-8.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use globset::{GlobBuilder, GlobMatcher};
use walkdir::WalkDir;

use crate::error::Error;
use crate::options::SourceOptions;

/// The characters that make a component of a path a pattern.
const SPECIAL: &[u8] = b"*?[";

/// A source's path with its variables expanded: each byte, and whether the user wrote it.
pub(crate) struct SourcePath<'a> {
    source: &'a SourceOptions,
    bytes: Vec<(u8, bool)>,
}

/// One component of a pattern.
enum Part {
    Name(OsString),
    Pattern {
        matcher: GlobMatcher,
        matches_hidden: bool,
    },
    /// `**`: this folder and all folders below.
    Recursive,
}

impl<'a> SourcePath<'a> {
    /// Expands a leading `~` and every `$NAME` and `${NAME}`.
    pub(crate) fn expand(source: &'a SourceOptions) -> Result<Self, Error> {
        let lookup = |variable: &str| {
            value_of(variable).ok_or_else(|| Error::Unset {
                name: source.name.clone(),
                path: source.path.clone(),
                variable: variable.into(),
            })
        };
        let mut bytes = Vec::new();
        let mut push = |text: &[u8], written| bytes.extend(text.iter().map(|byte| (*byte, written)));
        let mut rest = source.path.as_str();
        if rest == "~" || rest.starts_with("~/") {
            push(lookup("HOME")?.as_bytes(), false);
            rest = &rest[1..];
        }
        while let Some(at) = rest.find('$') {
            push(&rest.as_bytes()[..at], true);
            let (name, after) = variable_name(&rest[at + 1..]);
            match name {
                "" => push(b"$", true),
                name => push(lookup(name)?.as_bytes(), false),
            }
            rest = after;
        }
        push(rest.as_bytes(), true);
        Ok(Self { source, bytes })
    }

    /// The absolute path if nothing in it is a pattern. A relative path depends on the working folder; the
    /// cache's key must not.
    pub(crate) fn literal(&self) -> Result<PathBuf, Error> {
        let path = name(&self.bytes);
        std::path::absolute(&path).map_err(|error| self.nothing_found(error.to_string()))
    }

    pub(crate) fn is_pattern(&self) -> bool {
        is_pattern(&self.bytes)
    }

    /// The folder above the first component that is a pattern, and the paths that match, in order.
    ///
    /// Hidden files and folders match only a component that starts with a dot.
    pub(crate) fn matches(&self) -> Result<(PathBuf, BTreeSet<PathBuf>), Error> {
        let components = || self.bytes.split(|(byte, _)| *byte == b'/');
        let literal: Vec<_> = components().take_while(|component| !is_pattern(component)).collect();
        let root = literal.join(&(b'/', true));
        // The first component of an absolute path is empty.
        let root = if literal == [&[]] { PathBuf::from("/") } else { PathBuf::from(name(&root)) };
        let root = if root.as_os_str().is_empty() { PathBuf::from(".") } else { root };
        let root = std::path::absolute(root).map_err(|error| self.nothing_found(error.to_string()))?;
        let rest = components().skip(literal.len()).filter(|component| !component.is_empty());
        let parts = rest.map(|component| self.part(component)).collect::<Result<Vec<_>, _>>()?;
        let mut found = BTreeSet::new();
        find(&root, &parts, &mut found)?;
        Ok((root, found))
    }

    fn part(&self, component: &[(u8, bool)]) -> Result<Part, Error> {
        if !is_pattern(component) {
            return Ok(Part::Name(name(component)));
        }
        if component == [(b'*', true), (b'*', true)] {
            return Ok(Part::Recursive);
        }
        let mut glob = Vec::new();
        for (byte, written) in component {
            if matches!(byte, b'{' | b'}') || !written && SPECIAL.contains(byte) {
                glob.extend([b'[', *byte, b']']);
            } else {
                glob.push(*byte);
            }
        }
        let invalid = |error: String| self.nothing_found(format!("not a valid glob: {error}"));
        let glob = String::from_utf8(glob).map_err(|error| invalid(error.to_string()))?;
        let built = GlobBuilder::new(&glob).literal_separator(true).backslash_escape(false).build();
        let matcher = built.map_err(|error| invalid(error.to_string()))?.compile_matcher();
        Ok(Part::Pattern { matcher, matches_hidden: glob.starts_with('.') })
    }

    pub(crate) fn nothing_found(&self, reason: impl Into<String>) -> Error {
        let SourceOptions { name, path, .. } = self.source;
        Error::NothingFound { name: name.clone(), path: path.clone(), reason: reason.into() }
    }
}

fn is_pattern(bytes: &[(u8, bool)]) -> bool {
    bytes.iter().any(|(byte, written)| *written && SPECIAL.contains(byte))
}

fn name(bytes: &[(u8, bool)]) -> OsString {
    OsString::from_vec(bytes.iter().map(|(byte, _)| *byte).collect())
}

fn find(folder: &Path, parts: &[Part], found: &mut BTreeSet<PathBuf>) -> Result<(), Error> {
    let Some((part, rest)) = parts.split_first() else {
        found.insert(folder.to_path_buf());
        return Ok(());
    };
    match part {
        Part::Name(name) => {
            let path = folder.join(name);
            if path.exists() {
                find(&path, rest, found)?;
            }
        }
        Part::Pattern { matcher, matches_hidden } => {
            if !folder.is_dir() {
                return Ok(());
            }
            for entry in fs::read_dir(folder).map_err(Error::read(folder))? {
                let name = entry.map_err(Error::read(folder))?.file_name();
                if matcher.is_match(Path::new(&name)) && (*matches_hidden || !is_hidden(&name)) {
                    find(&folder.join(&name), rest, found)?;
                }
            }
        }
        Part::Recursive => {
            for path in walk(folder) {
                let path = path?;
                if rest.is_empty() || path.is_dir() {
                    find(&path, rest, found)?;
                }
            }
        }
    }
    Ok(())
}

/// `root` and everything below, without hidden files and folders. Links are followed: model hubs keep their
/// files as links into a store of blobs.
pub(crate) fn walk(root: &Path) -> impl Iterator<Item = Result<PathBuf, Error>> {
    let entries = WalkDir::new(root).follow_links(true).into_iter();
    let visible = entries.filter_entry(|entry| entry.depth() == 0 || !is_hidden(entry.file_name()));
    visible.filter_map(|entry| match entry {
        Ok(entry) => Some(Ok(entry.into_path())),
        Err(error) if is_dangling(&error) => None,
        Err(error) => {
            let path = error.path().unwrap_or_else(|| Path::new("")).to_path_buf();
            Some(Err(Error::Read { path, error: error.into() }))
        }
    })
}

fn is_hidden(name: &OsStr) -> bool {
    name.as_bytes().starts_with(b".")
}

/// A link to a missing file or to its own parent: nothing to read, and no reason to fail.
fn is_dangling(error: &walkdir::Error) -> bool {
    error.loop_ancestor().is_some()
        || error.io_error().is_some_and(|e| e.kind() == std::io::ErrorKind::NotFound)
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

fn value_of(variable: &str) -> Option<OsString> {
    match std::env::var_os(variable) {
        Some(value) if !value.is_empty() => Some(value),
        _ if variable == "CARGO_HOME" => Some(PathBuf::from(value_of("HOME")?).join(".cargo").into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expand(path: &str) -> Result<String, Error> {
        let source = SourceOptions::new("books", path);
        Ok(name(&SourcePath::expand(&source)?.bytes).into_string().unwrap())
    }

    #[test]
    fn variables_and_the_home_folder_expand() {
        let home = std::env::var("HOME").unwrap();
        assert_eq!(expand("~/x").unwrap(), format!("{home}/x"));
        assert_eq!(expand("$HOME/x").unwrap(), format!("{home}/x"));
        assert_eq!(expand("a${HOME}b").unwrap(), format!("a{home}b"));
        assert_eq!(expand("a~b").unwrap(), "a~b");
        assert_eq!(expand("price$").unwrap(), "price$");
        assert!(!expand("$CARGO_HOME/registry").unwrap().contains('$'));
    }

    #[test]
    fn an_unset_variable_is_named() {
        let error = expand("$VOLARY_NO_SUCH/x").unwrap_err().to_string();
        assert!(error.contains("books") && error.contains("VOLARY_NO_SUCH"), "{error}");
    }

    #[test]
    fn the_value_of_a_variable_is_a_name_and_not_a_pattern() {
        let folder = tempfile::tempdir().unwrap();
        for part in ["odd [1]{a}*", "odd 1a"] {
            fs::create_dir(folder.path().join(part)).unwrap();
            fs::write(folder.path().join(part).join("a.txt"), "a").unwrap();
        }
        let source = SourceOptions::new("s", "$FOLDER*/?.txt");
        let value = folder.path().join("odd [1]{a}");
        let mut path = SourcePath { source: &source, bytes: Vec::new() };
        path.bytes.extend(value.as_os_str().as_bytes().iter().map(|byte| (*byte, false)));
        path.bytes.extend(b"*/?.txt".iter().map(|byte| (*byte, true)));
        let (root, found) = path.matches().unwrap();
        assert_eq!(root, folder.path());
        assert_eq!(found, [folder.path().join("odd [1]{a}*/a.txt")].into());
    }
}
