//! Metrics and events, a line of JSON each: appended to, read by anybody, and cut back when the run goes back.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use volary_core::Step;

const TAIL_BYTES: u64 = 64 * 1024;

/// A file of JSON lines, open to append to. One process at a time may hold it.
#[derive(Debug)]
pub struct JsonLines {
    path: PathBuf,
    file: File,
    bytes: u64,
}

/// As much of a line as is needed to cut the file back.
#[derive(Deserialize)]
struct Dated {
    step: Option<Step>,
}

impl JsonLines {
    /// Opens the file, makes it if need be, and repairs a last line that a dying process left torn.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let mut file = append_to(&path)?;
        let bytes = repair(&mut file, &path).map_err(|e| Error::io("repair", &path, e))?;
        Ok(Self { path, file, bytes })
    }

    /// Appends a line with one write; a line that does not fit on the disk leaves nothing behind.
    pub fn append<T: Serialize>(&mut self, value: &T) -> Result<()> {
        let mut line = serde_json::to_vec(value).map_err(|e| Error::Unstorable {
            what: format!("a line of {}", self.path.display()),
            reason: e.to_string(),
        })?;
        line.push(b'\n');
        if let Err(e) = self.file.write_all(&line) {
            // Best effort: should this fail too, the next opening repairs the line.
            let _ = self.file.set_len(self.bytes);
            return Err(Error::io("append to", &self.path, e).while_writing(|| "a line".to_owned()));
        }
        self.bytes += line.len() as u64;
        Ok(())
    }

    /// Makes every line so far outlive a loss of power.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(|e| Error::io("sync", &self.path, e))
    }

    /// Removes the lines whose `step` is greater; how many. Lines without a step stay.
    pub fn truncate_after(&mut self, step: Step) -> Result<u64> {
        let temporary = self.path.with_extension("jsonl.tmp");
        let removed = copy_until(&self.path, &temporary, step);
        match removed {
            Ok(0) | Err(_) => {
                // Nothing to replace: the file that is there stays, and the copy goes.
                let _ = fs::remove_file(&temporary);
            }
            Ok(_) => self.take(&temporary)?,
        }
        removed.map_err(|e| Error::io("rewrite", &self.path, e))
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn take(&mut self, temporary: &Path) -> Result<()> {
        fs::rename(temporary, &self.path).map_err(|e| Error::io("rename", temporary, e))?;
        // The old handle leads to a file without a name now.
        self.file = append_to(&self.path)?;
        self.bytes = self.file.metadata().map_err(|e| Error::io("look at", &self.path, e))?.len();
        let folder =
            self.path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
        File::open(folder).and_then(|f| f.sync_all()).map_err(|e| Error::io("sync", folder, e))
    }
}

fn append_to(path: &Path) -> Result<File> {
    let opened = OpenOptions::new().read(true).append(true).create(true).open(path);
    opened.map_err(|e| Error::io("open", path, e))
}

/// The file's length once its last line is whole.
fn repair(file: &mut File, path: &Path) -> io::Result<u64> {
    let bytes = file.metadata()?.len();
    let start = last_line_start(file, bytes)?;
    if start == bytes {
        return Ok(bytes);
    }
    file.seek(SeekFrom::Start(start))?;
    let mut last = Vec::new();
    file.read_to_end(&mut last)?;
    // An object is over with its last brace: only the end of the line is missing.
    if serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(&last).is_ok() {
        file.write_all(b"\n")?;
        return Ok(bytes + 1);
    }
    tracing::warn!(path = %path.display(), bytes = bytes - start, "removing a torn last line");
    file.set_len(start)?;
    Ok(start)
}

/// Just after the last end of a line, looking back from the end, a piece at a time.
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
        let later = serde_json::from_slice::<Dated>(&line).is_ok_and(|l| l.step.is_some_and(|s| s > step));
        if later {
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
    fn a_torn_last_line_goes_and_what_follows_is_whole() {
        for torn in ["{\"step\":2,\"lo", "{", "\0\0\0\0", "12"] {
            let (_temp, path) = file_with(&format!("{{\"step\":1}}\n{torn}"));
            let mut lines = JsonLines::open(&path).unwrap();
            lines.append(&json!({"step": 2})).unwrap();
            lines.sync().unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":1}\n{\"step\":2}\n");
        }
    }

    #[test]
    fn a_whole_line_without_its_end_stays() {
        let (_temp, path) = file_with("{\"step\":1}");
        JsonLines::open(&path).unwrap().append(&json!({"step": 2})).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":1}\n{\"step\":2}\n");
    }

    #[test]
    fn a_torn_line_longer_than_a_piece_goes_too() {
        let (_temp, path) = file_with(&format!("{{\"step\":1}}\n{{\"x\":\"{}", "y".repeat(200_000)));
        drop(JsonLines::open(&path).unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":1}\n");
        let (_temp, path) = file_with(&"y".repeat(200_000));
        drop(JsonLines::open(&path).unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), "");
    }

    #[test]
    fn going_back_removes_later_steps_only() {
        let (_temp, path) = file_with("");
        let mut lines = JsonLines::open(&path).unwrap();
        for step in 1..=5 {
            lines.append(&json!({"step": step})).unwrap();
            lines.append(&json!({"event": "joined"})).unwrap();
        }
        assert_eq!(lines.truncate_after(5).unwrap(), 0);
        assert_eq!(lines.truncate_after(3).unwrap(), 2);
        lines.append(&json!({"step": 4, "again": true})).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        let steps: Vec<_> = text.lines().filter(|l| l.contains("step")).collect();
        assert_eq!(steps, ["{\"step\":1}", "{\"step\":2}", "{\"step\":3}", "{\"again\":true,\"step\":4}"]);
        assert_eq!(text.lines().count(), 9);
        assert!(!path.with_extension("jsonl.tmp").exists());
    }
}
