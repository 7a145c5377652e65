//! Metrics and events as JSON lines: append-only, readable by any process, truncated when the run rolls back.

use crate::error::{Error, Result};
use crate::limits::TAIL_BYTES;
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use volary_core::Step;

/// A file of JSON lines, open for appending by one process at a time.
#[derive(Debug)]
pub struct JsonLines {
    path: PathBuf,
    file: File,
    bytes: u64,
}

/// The part of a line that truncation needs.
#[derive(Deserialize)]
struct Dated {
    step: Option<Step>,
}

impl JsonLines {
    /// Opens or creates the file, and repairs a partial last line after a crash.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let mut file = append_to(&path)?;
        let bytes = repair(&mut file, &path).map_err(|e| Error::io("repair", &path, e))?;
        Ok(Self { path, file, bytes })
    }

    /// Appends a line with one write; a failed write leaves no partial line.
    ///
    /// # Errors
    /// [`Error::NoSpace`], [`Error::Io`] or [`Error::Unstorable`].
    pub fn append<T: Serialize>(&mut self, value: &T) -> Result<()> {
        let mut line = serde_json::to_vec(value).map_err(|e| Error::Unstorable {
            what: format!("a line of {}", self.path.display()),
            reason: e.to_string(),
        })?;
        line.push(b'\n');
        if let Err(e) = self.file.write_all(&line) {
            // Best effort: if this fails too, the next opening repairs the line.
            let _ = self.file.set_len(self.bytes);
            return Err(Error::io("append to", &self.path, e).while_writing(|| "a line".to_owned()));
        }
        self.bytes += line.len() as u64;
        Ok(())
    }

    /// Makes all lines so far durable.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(|e| Error::io("sync", &self.path, e))
    }

    /// Removes all lines with a greater `step` and returns their number. Lines without a step stay.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn truncate_after(&mut self, step: Step) -> Result<u64> {
        let temporary = self.path.with_extension("jsonl.tmp");
        let removed = copy_until(&self.path, &temporary, step);
        match removed {
            Ok(0) | Err(_) => {
                // The file stays as it is; the copy is not needed.
                let _ = fs::remove_file(&temporary);
            }
            Ok(_) => self.replace_by(&temporary)?,
        }
        removed.map_err(|e| Error::io("rewrite", &self.path, e))
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn replace_by(&mut self, temporary: &Path) -> Result<()> {
        fs::rename(temporary, &self.path).map_err(|e| Error::io("rename", temporary, e))?;
        // The old handle refers to the unlinked file.
        self.file = append_to(&self.path)?;
        self.bytes = self.file.metadata().map_err(|e| Error::io("inspect", &self.path, e))?.len();
        let folder =
            self.path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
        File::open(folder).and_then(|f| f.sync_all()).map_err(|e| Error::io("sync", folder, e))
    }
}

fn append_to(path: &Path) -> Result<File> {
    let opened = OpenOptions::new().read(true).append(true).create(true).open(path);
    opened.map_err(|e| Error::io("open", path, e))
}

/// Repairs the last line and returns the file's size.
fn repair(file: &mut File, path: &Path) -> io::Result<u64> {
    let bytes = file.metadata()?.len();
    let start = last_line_start(file, bytes)?;
    if start == bytes {
        return Ok(bytes);
    }
    file.seek(SeekFrom::Start(start))?;
    let mut last = Vec::new();
    file.read_to_end(&mut last)?;
    // A complete object only lacks its newline.
    if serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(&last).is_ok() {
        file.write_all(b"\n")?;
        return Ok(bytes + 1);
    }
    tracing::warn!(path = %path.display(), bytes = bytes - start, "removing a partial last line");
    file.set_len(start)?;
    Ok(start)
}

/// The position after the last newline, searched backwards in pieces.
fn last_line_start(file: &mut File, bytes: u64) -> io::Result<u64> {
    let mut end = bytes;
    while end > 0 {
        let start = end.saturating_sub(TAIL_BYTES);
        let mut piece = Vec::new();
        file.seek(SeekFrom::Start(start))?;
        (&mut *file).take(end - start).read_to_end(&mut piece)?;
        if let Some(at) = piece.iter().rposition(|byte| *byte == b'\n') {
            return Ok(start + at as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}

fn copy_until(from: &Path, to: &Path, step: Step) -> io::Result<u64> {
    let mut reader = BufReader::new(File::open(from)?);
    let mut writer = BufWriter::new(File::create(to)?);
    let (mut line, mut removed) = (Vec::new(), 0);
    while reader.read_until(b'\n', &mut line)? > 0 {
        let is_later = serde_json::from_slice::<Dated>(&line).is_ok_and(|l| l.step.is_some_and(|s| s > step));
        if is_later {
            removed += 1;
        } else {
            writer.write_all(&line)?;
        }
        line.clear();
    }
    writer.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn file_with(text: &str) -> (tempfile::TempDir, PathBuf) {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("metrics.jsonl");
        fs::write(&path, text).unwrap();
        (temp, path)
    }

    #[test]
    fn a_partial_last_line_is_removed() {
        for partial in ["{\"step\":2,\"lo", "{", "\0\0\0\0", "12"] {
            let (_temp, path) = file_with(&format!("{{\"step\":1}}\n{partial}"));
            let mut lines = JsonLines::open(&path).unwrap();
            lines.append(&json!({"step": 2})).unwrap();
            lines.sync().unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":1}\n{\"step\":2}\n");
        }
    }

    #[test]
    fn a_complete_line_without_its_newline_stays() {
        let (_temp, path) = file_with("{\"step\":1}");
        JsonLines::open(&path).unwrap().append(&json!({"step": 2})).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":1}\n{\"step\":2}\n");
    }

    #[test]
    fn a_partial_line_longer_than_a_piece_is_removed() {
        let (_temp, path) = file_with(&format!("{{\"step\":1}}\n{{\"x\":\"{}", "y".repeat(200_000)));
        drop(JsonLines::open(&path).unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":1}\n");
        let (_temp, path) = file_with(&"y".repeat(200_000));
        drop(JsonLines::open(&path).unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), "");
    }

    #[test]
    fn truncation_removes_later_steps_only() {
        let (_temp, path) = file_with("");
        let mut lines = JsonLines::open(&path).unwrap();
        for step in 1..=5 {
            lines.append(&json!({"step": step})).unwrap();
            lines.append(&json!({"event": "joined"})).unwrap();
        }
        assert_eq!(lines.truncate_after(Step(5)).unwrap(), 0);
        assert_eq!(lines.truncate_after(Step(3)).unwrap(), 2);
        lines.append(&json!({"step": 4, "again": true})).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        let steps: Vec<_> = text.lines().filter(|l| l.contains("step")).collect();
        assert_eq!(steps, ["{\"step\":1}", "{\"step\":2}", "{\"step\":3}", "{\"again\":true,\"step\":4}"]);
        assert_eq!(text.lines().count(), 9);
        assert!(!path.with_extension("jsonl.tmp").exists());
    }
}
