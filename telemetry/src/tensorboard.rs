//! Event files for TensorBoard: records of protocol buffers with checksums
//! (`tensorflow/core/util/event.proto`, `tensorflow/core/lib/io/record_writer.cc`).

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
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
/// let mut file = EventFile::create(directory.path())?;
/// file.write(7, &[("train/loss".into(), Value::Scalar(2.5)), ("load".into(), Value::Counts(&[3, 0, 5]))])?;
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct EventFile {
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

impl EventFile {
    /// Creates an event file in a directory.
    ///
    /// # Errors
    /// When the directory or the file cannot be written.
    pub fn create(folder: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let began = now();
        let name = format!("events.out.tfevents.{:010}.volary.{}", began as u64, std::process::id());
        let mut file = File::options().create(true).append(true).open(folder.join(name))?;
        let version = Event {
            wall_time: began,
            step: 0,
            content: Some(EventContent::FileVersion("brain.Event:2".into())),
        };
        file.write_all(&record(&version))?;
        Ok(Self { file })
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
    fn values_are_read_back() {
        let temp = tempfile::tempdir().unwrap();
        let mut file = EventFile::create(temp.path()).unwrap();
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
