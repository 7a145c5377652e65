//! The trace store of a run: a directory with one file per trace, bounded to the newest traces.

use crate::limits::{SPAN_BYTES_MAX, SPANS_PER_TRACE_MAX, TRACE_BYTES_MAX};
use crate::record::SpanRecord;
use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The writer of a trace directory.
///
/// ```
/// use volary_telemetry::{SpanRecord, TraceStore, store};
///
/// let directory = tempfile::tempdir()?;
/// let mut traces = TraceStore::open(directory.path(), 100)?;
/// let span: SpanRecord = serde_json::from_str(
///     r#"{"trace": "000000000000000000000000000000ff", "span": "00000000000000ff", "name": "step",
///         "kind": "internal", "process": "supervisor", "start_ns": 1000, "duration_ns": 500}"#,
/// )?;
/// assert_eq!(traces.append(std::slice::from_ref(&span))?, 0);
/// assert_eq!(store::read(directory.path())?[0].root(), Some(&span));
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct TraceStore {
    folder: PathBuf,
    traces_max: usize,
    /// The stored traces, oldest first, and the bytes of each.
    traces: VecDeque<(String, u64)>,
}

/// A stored trace.
#[derive(Clone, Debug, PartialEq)]
pub struct Trace {
    /// Its spans, by their start.
    pub spans: Vec<SpanRecord>,
}

fn is_trace_id(id: &str) -> bool {
    id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn file(folder: &Path, id: &str) -> PathBuf {
    folder.join(format!("{id}.jsonl"))
}

/// The traces in a directory, oldest first.
fn list(folder: &Path) -> io::Result<Vec<(SystemTime, String, u64)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let id = name.to_str().and_then(|name| name.strip_suffix(".jsonl")).filter(|id| is_trace_id(id));
        if let Some(id) = id {
            let metadata = entry.metadata()?;
            found.push((metadata.modified()?, id.to_owned(), metadata.len()));
        }
    }
    found.sort();
    Ok(found)
}

impl TraceStore {
    /// Opens or creates a directory that stores at most `traces_max` traces.
    ///
    /// # Errors
    /// When the directory cannot be created or read.
    pub fn open(folder: impl Into<PathBuf>, traces_max: usize) -> io::Result<Self> {
        let folder = folder.into();
        fs::create_dir_all(&folder)?;
        let traces = list(&folder)?.into_iter().map(|(_, id, bytes)| (id, bytes)).collect();
        Ok(Self { folder, traces_max: traces_max.max(1), traces })
    }

    /// Appends spans to their traces. Spans beyond a bound or with an invalid trace identifier are dropped;
    /// returns their number.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn append(&mut self, spans: &[SpanRecord]) -> io::Result<u64> {
        let mut by_trace: BTreeMap<&str, Vec<u8>> = BTreeMap::new();
        let mut dropped = 0;
        for span in spans {
            let line = serde_json::to_vec(span)?;
            if !is_trace_id(&span.trace) || line.len() > SPAN_BYTES_MAX {
                dropped += 1;
                continue;
            }
            let lines = by_trace.entry(&span.trace).or_default();
            lines.extend(line);
            lines.push(b'\n');
        }
        for (id, lines) in by_trace {
            dropped += self.append_to(id, &lines)?;
        }
        self.remove_oldest();
        Ok(dropped)
    }

    fn append_to(&mut self, id: &str, lines: &[u8]) -> io::Result<u64> {
        let index = self.traces.iter().rposition(|(known, _)| known == id).unwrap_or_else(|| {
            self.traces.push_back((id.to_owned(), 0));
            self.traces.len() - 1
        });
        let bytes = &mut self.traces[index].1;
        if *bytes + lines.len() as u64 > TRACE_BYTES_MAX {
            return Ok(lines.iter().filter(|&&byte| byte == b'\n').count() as u64);
        }
        *bytes += lines.len() as u64;
        File::options().create(true).append(true).open(file(&self.folder, id))?.write_all(lines)?;
        Ok(0)
    }

    fn remove_oldest(&mut self) {
        while self.traces.len() > self.traces_max {
            if let Some((id, _)) = self.traces.pop_front() {
                // It may have been removed already.
                let _ = fs::remove_file(file(&self.folder, &id));
            }
        }
    }
}

/// Reads all traces of a directory, oldest first. Invalid lines, which a crash may leave, are skipped.
///
/// # Errors
/// When the directory or a file cannot be read.
pub fn read(folder: &Path) -> io::Result<Vec<Trace>> {
    let mut traces = Vec::new();
    for (_, id, _) in list(folder)? {
        let lines = BufReader::new(File::open(file(folder, &id))?).lines();
        let mut spans = Vec::new();
        for line in lines.take(SPANS_PER_TRACE_MAX) {
            spans.extend(serde_json::from_str::<SpanRecord>(&line?).ok());
        }
        spans.sort_by_key(|span| (span.start_ns, u64::MAX - span.duration_ns));
        if !spans.is_empty() {
            traces.push(Trace { spans });
        }
    }
    traces.sort_by_key(|trace| trace.spans[0].start_ns);
    Ok(traces)
}

impl Trace {
    /// The root span, if it was stored.
    #[must_use]
    pub fn root(&self) -> Option<&SpanRecord> {
        self.spans.iter().find(|span| span.parent.is_none())
    }

    /// The name of the root span.
    #[must_use]
    pub fn name(&self) -> &str {
        self.root().map_or("(root span missing)", |root| &root.name)
    }

    /// The training step.
    #[must_use]
    pub fn step(&self) -> Option<u64> {
        self.spans.iter().find_map(|span| span.number("volary.step"))
    }

    /// The children of a span.
    pub fn children<'a>(&'a self, parent: &'a SpanRecord) -> impl Iterator<Item = &'a SpanRecord> {
        self.spans.iter().filter(|span| span.parent.as_deref() == Some(&parent.span))
    }

    /// The spans without a stored parent, root included.
    pub fn tops(&self) -> impl Iterator<Item = &SpanRecord> {
        self.spans.iter().filter(|span| {
            let parent = span.parent.as_deref();
            parent.is_none_or(|parent| self.spans.iter().all(|other| other.span != parent))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Attributes;

    fn span(trace: u8, span: u8) -> SpanRecord {
        SpanRecord {
            trace: format!("{trace:032x}"),
            span: format!("{span:016x}"),
            parent: (span > 0).then(|| format!("{:016x}", span - 1)),
            name: "step".into(),
            kind: "internal".into(),
            process: "supervisor".into(),
            start_ns: u64::from(trace) * 1000 + u64::from(span),
            duration_ns: 5,
            attributes: Attributes::from([("volary.step".into(), trace.into())]),
            events: Vec::new(),
            links: Vec::new(),
            error: None,
        }
    }

    #[test]
    fn the_newest_traces_are_stored_and_read_back_intact() {
        let temp = tempfile::tempdir().unwrap();
        let mut store = TraceStore::open(temp.path().join("traces"), 3).unwrap();
        for trace in 1..=5 {
            // The spans of one trace arrive at different times.
            assert_eq!(store.append(&[span(trace, 1)]).unwrap(), 0);
            assert_eq!(store.append(&[span(trace, 0), span(trace, 2)]).unwrap(), 0);
        }
        let traces = read(&temp.path().join("traces")).unwrap();
        assert_eq!(traces.iter().filter_map(Trace::step).collect::<Vec<_>>(), [3, 4, 5]);
        assert_eq!(traces[0].spans, [span(3, 0), span(3, 1), span(3, 2)]);
        assert_eq!(traces[0].root(), Some(&span(3, 0)));
        // A reopened store continues with the stored traces.
        let mut reopened = TraceStore::open(temp.path().join("traces"), 3).unwrap();
        reopened.append(&[span(6, 0)]).unwrap();
        assert_eq!(read(&temp.path().join("traces")).unwrap().len(), 3);
    }

    #[test]
    fn invalid_and_oversized_spans_are_dropped() {
        let temp = tempfile::tempdir().unwrap();
        let mut store = TraceStore::open(temp.path(), 3).unwrap();
        let mut invalid = span(1, 0);
        invalid.trace = "../../escape".into();
        let mut oversized = span(1, 0);
        oversized.name = "x".repeat(SPAN_BYTES_MAX);
        assert_eq!(store.append(&[invalid, oversized]).unwrap(), 2);
        assert_eq!(read(temp.path()).unwrap(), []);
    }

    #[test]
    fn a_partial_line_is_skipped() {
        let temp = tempfile::tempdir().unwrap();
        let mut store = TraceStore::open(temp.path(), 3).unwrap();
        store.append(&[span(1, 0)]).unwrap();
        let path = file(temp.path(), &span(1, 0).trace);
        fs::write(&path, [fs::read(&path).unwrap(), b"{\"trace\":".to_vec()].concat()).unwrap();
        assert_eq!(read(temp.path()).unwrap()[0].spans, [span(1, 0)]);
    }
}
