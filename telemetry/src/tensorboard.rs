//! Event files for TensorBoard: records of protocol buffers with checksums
//! (`tensorflow/core/util/event.proto`, `tensorflow/core/lib/io/record_writer.cc`).

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

#[derive(Clone, PartialEq, prost::Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "EventContent", tags = "3, 5")]
    content: Option<EventContent>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum EventContent {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
}

#[derive(Clone, PartialEq, prost::Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<SummaryValue>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct SummaryValue {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(oneof = "Content", tags = "2, 5")]
    content: Option<Content>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Content {
    #[prost(float, tag = "2")]
    Scalar(f32),
    #[prost(message, tag = "5")]
    Histogram(Histogram),
}

#[derive(Clone, PartialEq, prost::Message)]
struct Histogram {
    #[prost(double, tag = "1")]
    min: f64,
    #[prost(double, tag = "2")]
    max: f64,
    #[prost(double, tag = "3")]
    num: f64,
    #[prost(double, tag = "4")]
    sum: f64,
    #[prost(double, tag = "5")]
    sum_squares: f64,
    #[prost(double, repeated, tag = "6")]
    bucket_limit: Vec<f64>,
    #[prost(double, repeated, tag = "7")]
    bucket: Vec<f64>,
}

/// An event file. TensorBoard shows all event files of a directory as one run, sorted by step.
///
/// ```
/// use volary_telemetry::tensorboard::{EventFile, Value};
///
/// let directory = tempfile::tempdir()?;
/// let (mut file, last) = EventFile::open(directory.path(), 0)?;
/// assert_eq!(last, None);
/// file.write(7, &[("train/loss".into(), Value::Scalar(2.5)), ("load".into(), Value::Counts(&[3, 0, 5]))])?;
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct EventFile {
    folder: PathBuf,
    file: File,
}

/// A value of a step.
#[derive(Clone, Debug, PartialEq)]
pub enum Value<'a> {
    /// A number.
    Scalar(f64),
    /// A histogram: the count of each integer from 0.
    Counts(&'a [u64]),
}

fn mask(data: &[u8]) -> [u8; 4] {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

fn record(event: &Event) -> Vec<u8> {
    let data = prost::Message::encode_to_vec(event);
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &mask(&length), &data, &mask(&data)].concat()
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// The end of the names of the files that this program writes.
const WRITER: &str = ".volary.";

/// The whole records at the start of an event file: the step of each, and its bytes. Bytes of an unfinished
/// or damaged record end the list.
fn records(mut bytes: &[u8]) -> Vec<(i64, &[u8])> {
    let mut records = Vec::new();
    while let Some((head, rest)) = bytes.split_first_chunk::<8>() {
        let length = usize::try_from(u64::from_le_bytes(*head)).unwrap_or(usize::MAX);
        let Some(whole) = length.checked_add(16).and_then(|whole| bytes.get(..whole)) else { break };
        let (data, checksum) = rest[4..].split_at(length);
        if rest[..4] != mask(head) || checksum[..4] != mask(data) {
            break;
        }
        let Ok(event) = <Event as prost::Message>::decode(data) else { break };
        records.push((event.step, whole));
        bytes = &bytes[whole.len()..];
    }
    records
}

/// Removes the events after `step` from a file, by a rewrite. Returns the last step that it keeps.
fn truncate_after(path: &Path, step: i64) -> io::Result<Option<i64>> {
    let bytes = std::fs::read(path)?;
    let kept: Vec<_> = records(&bytes).into_iter().filter(|(at, _)| *at <= step).collect();
    let content = kept.iter().map(|(_, bytes)| *bytes).collect::<Vec<_>>().concat();
    if content.len() < bytes.len() {
        let mut new = tempfile::NamedTempFile::new_in(path.parent().unwrap_or_else(|| Path::new(".")))?;
        new.write_all(&content)?;
        new.persist(path)?;
    }
    Ok(kept.iter().map(|(at, _)| *at).filter(|at| *at > 0).max())
}

impl EventFile {
    /// Creates an event file in a directory. Events after `step` are removed from those that are there: those
    /// steps run again, and each has one value. Returns the last step with an event too.
    ///
    /// # Errors
    /// When the directory or a file cannot be read or written.
    pub fn open(folder: &Path, step: u64) -> io::Result<(Self, Option<u64>)> {
        std::fs::create_dir_all(folder)?;
        let mut last = None;
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().contains(WRITER) {
                last = last.max(truncate_after(&entry.path(), i64::try_from(step).unwrap_or(i64::MAX))?);
            }
        }
        let file = Self { file: Self::create(folder)?, folder: folder.to_path_buf() };
        Ok((file, last.map(i64::cast_unsigned)))
    }

    /// Removes the events after `step`, to which the run went back.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn go_back(&mut self, step: u64) -> io::Result<()> {
        *self = Self::open(&self.folder, step)?.0;
        Ok(())
    }

    fn create(folder: &Path) -> io::Result<File> {
        let began = now();
        let name = format!("events.out.tfevents.{:010}{WRITER}{}", began as u64, std::process::id());
        let mut file = File::options().create(true).append(true).open(folder.join(name))?;
        let version = Event {
            wall_time: began,
            step: 0,
            content: Some(EventContent::FileVersion("brain.Event:2".into())),
        };
        file.write_all(&record(&version))?;
        Ok(file)
    }

    /// Writes the values of a step.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&mut self, step: u64, values: &[(String, Value<'_>)]) -> io::Result<()> {
        let value = |(tag, value): &(String, Value<'_>)| SummaryValue {
            tag: tag.clone(),
            content: Some(match value {
                Value::Scalar(number) => Content::Scalar(*number as f32),
                Value::Counts(counts) => Content::Histogram(histogram(counts)),
            }),
        };
        let summary = Summary { value: values.iter().map(value).collect() };
        let step = i64::try_from(step).unwrap_or(i64::MAX);
        let event = Event { wall_time: now(), step, content: Some(EventContent::Summary(summary)) };
        // One write, so that a reader rarely sees a partial record.
        self.file.write_all(&record(&event))
    }
}

/// A bucket for each integer: expert `e` is between `e - 0.5` and `e + 0.5`.
fn histogram(counts: &[u64]) -> Histogram {
    let weighted =
        |of: fn(f64) -> f64| counts.iter().enumerate().map(|(e, &n)| of(e as f64) * n as f64).sum();
    Histogram {
        min: 0.0,
        max: counts.len().saturating_sub(1) as f64,
        num: counts.iter().sum::<u64>() as f64,
        sum: weighted(|e| e),
        sum_squares: weighted(|e| e * e),
        bucket_limit: (0..counts.len()).map(|e| e as f64 + 0.5).collect(),
        bucket: counts.iter().map(|&n| n as f64).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads records and verifies their checksums.
    fn read(mut bytes: &[u8]) -> Vec<Event> {
        let mut events = Vec::new();
        while !bytes.is_empty() {
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            assert_eq!(bytes[8..12], mask(&bytes[..8]));
            let data = &bytes[12..12 + length];
            assert_eq!(bytes[12 + length..16 + length], mask(data));
            events.push(prost::Message::decode(data).unwrap());
            bytes = &bytes[16 + length..];
        }
        events
    }

    #[test]
    fn the_checksum_matches_the_format() {
        // CRC-32C of "123456789" is 0xe3069283 (RFC 3720, appendix B.4 uses the same polynomial); masked as
        // in crc32c.h.
        let masked = 0xe306_9283_u32.rotate_right(15).wrapping_add(0xa282_ead8);
        assert_eq!(mask(b"123456789"), masked.to_le_bytes());
    }

    #[test]
    fn steps_that_run_again_have_one_event_each() {
        let temp = tempfile::tempdir().unwrap();
        let steps = |folder: &Path| {
            let mut files: Vec<_> =
                std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
            files.sort();
            let read = |path| read(&std::fs::read(path).unwrap()).into_iter().map(|event| event.step);
            files.into_iter().flat_map(read).filter(|step| *step > 0).collect::<Vec<_>>()
        };
        let value = [("loss".to_owned(), Value::Scalar(1.0))];
        let (mut file, last) = EventFile::open(temp.path(), 0).unwrap();
        assert_eq!(last, None);
        (1..=9).for_each(|step| file.write(step, &value).unwrap());
        file.go_back(4).unwrap();
        (5..=8).for_each(|step| file.write(step, &value).unwrap());
        assert_eq!(steps(temp.path()), [1, 2, 3, 4, 5, 6, 7, 8]);
        // A resumed run: steps 1 to 6 were committed, and the last record was cut off by a crash.
        file.file.write_all(&[9, 0, 0]).unwrap();
        let (mut file, last) = EventFile::open(temp.path(), 6).unwrap();
        assert_eq!(last, Some(6));
        (7..=8).for_each(|step| file.write(step, &value).unwrap());
        assert_eq!(steps(temp.path()), [1, 2, 3, 4, 5, 6, 7, 8]);
    }

    #[test]
    fn values_are_read_back() {
        let temp = tempfile::tempdir().unwrap();
        let (mut file, _) = EventFile::open(temp.path(), 0).unwrap();
        let counts = [3, 0, 5];
        let values = [("loss".to_owned(), Value::Scalar(2.5)), ("load".to_owned(), Value::Counts(&counts))];
        file.write(7, &values).unwrap();
        let path = std::fs::read_dir(temp.path()).unwrap().next().unwrap().unwrap().path();
        let events = read(&std::fs::read(path).unwrap());
        assert_eq!(events[0].content, Some(EventContent::FileVersion("brain.Event:2".into())));
        let Some(EventContent::Summary(summary)) = &events[1].content else { panic!("{events:?}") };
        assert_eq!((events[1].step, summary.value[0].content.clone()), (7, Some(Content::Scalar(2.5))));
        let Some(Content::Histogram(h)) = &summary.value[1].content else { panic!("{summary:?}") };
        assert_eq!((h.num, h.sum, h.bucket_limit.clone()), (8.0, 10.0, vec![0.5, 1.5, 2.5]));
    }
}
