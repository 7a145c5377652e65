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
    #[prost(oneof = "What", tags = "3, 5")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
}

#[derive(Clone, PartialEq, prost::Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Value {
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

/// One event file that grows. Several of them in a folder are one run to TensorBoard, which sorts by step.
#[derive(Debug)]
pub struct EventFile {
    file: File,
}

/// A figure of a step.
#[derive(Clone, Debug, PartialEq)]
pub enum Figure<'a> {
    /// A number.
    Scalar(f64),
    /// How often each whole number from 0 occurred.
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
    /// Makes a new event file in a folder.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn create(folder: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let began = now();
        let name = format!("events.out.tfevents.{:010}.volary.{}", began as u64, std::process::id());
        let mut file = File::options().create(true).append(true).open(folder.join(name))?;
        let version =
            Event { wall_time: began, step: 0, what: Some(What::FileVersion("brain.Event:2".into())) };
        file.write_all(&record(&version))?;
        Ok(Self { file })
    }

    /// Writes the figures of a step.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&mut self, step: u64, figures: &[(String, Figure<'_>)]) -> io::Result<()> {
        let value = |(tag, figure): &(String, Figure<'_>)| Value {
            tag: tag.clone(),
            content: Some(match figure {
                Figure::Scalar(number) => Content::Scalar(*number as f32),
                Figure::Counts(counts) => Content::Histogram(histogram(counts)),
            }),
        };
        let summary = Summary { value: figures.iter().map(value).collect() };
        let step = i64::try_from(step).unwrap_or(i64::MAX);
        let event = Event { wall_time: now(), step, what: Some(What::Summary(summary)) };
        // One write, so that a reader never sees half a record for long.
        self.file.write_all(&record(&event))
    }
}

/// A bucket for each number, so that expert `e` stands between `e - 0.5` and `e + 0.5`.
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

    /// Reads records as their description says, checksums included.
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
    fn the_checksum_is_the_one_of_the_format() {
        // CRC-32C of "123456789" is 0xe3069283 (RFC 3720, appendix B.4 uses the same polynomial); masked as in crc32c.h.
        let masked = 0xe306_9283_u32.rotate_right(15).wrapping_add(0xa282_ead8);
        assert_eq!(mask(b"123456789"), masked.to_le_bytes());
    }

    #[test]
    fn figures_are_read_back() {
        let temp = tempfile::tempdir().unwrap();
        let mut file = EventFile::create(temp.path()).unwrap();
        let counts = [3, 0, 5];
        let figures =
            [("loss".to_owned(), Figure::Scalar(2.5)), ("load".to_owned(), Figure::Counts(&counts))];
        file.write(7, &figures).unwrap();
        let path = std::fs::read_dir(temp.path()).unwrap().next().unwrap().unwrap().path();
        let events = read(&std::fs::read(path).unwrap());
        assert_eq!(events[0].what, Some(What::FileVersion("brain.Event:2".into())));
        let Some(What::Summary(summary)) = &events[1].what else { panic!("{events:?}") };
        assert_eq!((events[1].step, summary.value[0].content.clone()), (7, Some(Content::Scalar(2.5))));
        let Some(Content::Histogram(h)) = &summary.value[1].content else { panic!("{summary:?}") };
        assert_eq!((h.num, h.sum, h.bucket_limit.clone()), (8.0, 10.0, vec![0.5, 1.5, 2.5]));
    }
}
