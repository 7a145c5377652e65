//! The traces that are kept with a run: a file each, the newest so many.

use crate::limits::{SPAN_BYTES_MAX, SPANS_PER_TRACE_MAX, TRACE_BYTES_MAX};
use crate::record::SpanRecord;
use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The folder of a run's traces, for whoever writes them.
#[derive(Debug)]
pub struct TraceStore {
    folder: PathBuf,
    keep: usize,
    /// The traces that are there, oldest first, and the bytes of each.
    traces: VecDeque<(String, u64)>,
}

/// A trace that was kept.
#[derive(Clone, Debug, PartialEq)]
pub struct Trace {
    /// Its spans, by the time at which they began.
    pub spans: Vec<SpanRecord>,
}

fn is_trace_id(id: &str) -> bool {
    id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn file(folder: &Path, id: &str) -> PathBuf {
    folder.join(format!("{id}.jsonl"))
}

/// The traces in a folder, oldest first.
fn found(folder: &Path) -> io::Result<Vec<(SystemTime, String, u64)>> {
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
    /// Opens the folder, or makes it. At most `keep` traces stay in it.
    ///
    /// # Errors
    /// When the folder cannot be made or read.
    pub fn open(folder: impl Into<PathBuf>, keep: usize) -> io::Result<Self> {
        let folder = folder.into();
        fs::create_dir_all(&folder)?;
        let traces = found(&folder)?.into_iter().map(|(_, id, bytes)| (id, bytes)).collect();
        Ok(Self { folder, keep: keep.max(1), traces })
    }

    /// Keeps spans with the others of their traces. What is over a bound, or came from a stranger to the format, is not kept.
    /// Returns how many that were.
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
        self.forget_the_oldest();
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

    fn forget_the_oldest(&mut self) {
        while self.traces.len() > self.keep {
            if let Some((id, _)) = self.traces.pop_front() {
                // Somebody may have removed it before.
                let _ = fs::remove_file(file(&self.folder, &id));
            }
        }
    }
}

/// Reads all traces of a folder, oldest first. Lines that are no spans (a process that died while it wrote) are left out.
///
/// # Errors
/// When the folder or a file cannot be read.
pub fn read(folder: &Path) -> io::Result<Vec<Trace>> {
    let mut traces = Vec::new();
    for (_, id, _) in found(folder)? {
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
    /// The span above all others, when it was kept.
    #[must_use]
    pub fn root(&self) -> Option<&SpanRecord> {
        self.spans.iter().find(|span| span.parent.is_none())
    }

    /// Its name: that of its root.
    #[must_use]
    pub fn name(&self) -> &str {
        self.root().map_or("(the root was not kept)", |root| &root.name)
    }

    /// The step that it is about.
    #[must_use]
    pub fn step(&self) -> Option<u64> {
        self.spans.iter().find_map(|span| span.number("volary.step"))
    }

    /// The spans right below one.
    pub fn children<'a>(&'a self, parent: &'a SpanRecord) -> impl Iterator<Item = &'a SpanRecord> {
        self.spans.iter().filter(|span| span.parent.as_deref() == Some(&parent.span))
    }

    /// The spans whose parents were not kept, roots included.
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
    fn the_newest_traces_are_kept_and_read_back_as_they_were() {
        let temp = tempfile::tempdir().unwrap();
        let mut store = TraceStore::open(temp.path().join("traces"), 3).unwrap();
        for trace in 1..=5 {
            // The parts of one trace come at different times.
            assert_eq!(store.append(&[span(trace, 1)]).unwrap(), 0);
            assert_eq!(store.append(&[span(trace, 0), span(trace, 2)]).unwrap(), 0);
        }
        let traces = read(&temp.path().join("traces")).unwrap();
        assert_eq!(traces.iter().filter_map(Trace::step).collect::<Vec<_>>(), [3, 4, 5]);
        assert_eq!(traces[0].spans, [span(3, 0), span(3, 1), span(3, 2)]);
        assert_eq!(traces[0].root(), Some(&span(3, 0)));
        // A store that is opened again goes on with what is there.
        let mut again = TraceStore::open(temp.path().join("traces"), 3).unwrap();
        again.append(&[span(6, 0)]).unwrap();
        assert_eq!(read(&temp.path().join("traces")).unwrap().len(), 3);
    }

    #[test]
    fn what_is_no_trace_or_too_long_is_not_kept() {
        let temp = tempfile::tempdir().unwrap();
        let mut store = TraceStore::open(temp.path(), 3).unwrap();
        let mut stranger = span(1, 0);
        stranger.trace = "../../escape".into();
        let mut endless = span(1, 0);
        endless.name = "x".repeat(SPAN_BYTES_MAX);
        assert_eq!(store.append(&[stranger, endless]).unwrap(), 2);
        assert_eq!(read(temp.path()).unwrap(), []);
    }

    #[test]
    fn half_a_line_costs_only_itself() {
        let temp = tempfile::tempdir().unwrap();
        let mut store = TraceStore::open(temp.path(), 3).unwrap();
        store.append(&[span(1, 0)]).unwrap();
        let path = file(temp.path(), &span(1, 0).trace);
        fs::write(&path, [fs::read(&path).unwrap(), b"{\"trace\":".to_vec()].concat()).unwrap();
        assert_eq!(read(temp.path()).unwrap()[0].spans, [span(1, 0)]);
    }
}
