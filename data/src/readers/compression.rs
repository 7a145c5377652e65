//! Compressions of whole files.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use flate2::bufread::MultiGzDecoder;

use crate::limits::{HEAD_BYTES, READ_BUFFER_BYTES};

/// The compression of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    /// The compression of a file that starts with `head`. A zstd file may start with a skippable frame.
    pub(crate) fn of(head: &[u8]) -> Self {
        match head {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            _ => Self::None,
        }
    }

    /// The compression that a file's name promises.
    pub(crate) fn of_name(path: &Path) -> Option<Self> {
        match path.extension()?.to_ascii_lowercase().to_str()? {
            "gz" => Some(Self::Gzip),
            "zst" => Some(Self::Zstd),
            _ => None,
        }
    }

    /// A reader of the expanded bytes of `raw`.
    pub(crate) fn expand<'a>(self, raw: impl BufRead + 'a) -> io::Result<Box<dyn BufRead + 'a>> {
        Ok(match self {
            Self::None => Box::new(raw),
            Self::Gzip => Box::new(BufReader::with_capacity(READ_BUFFER_BYTES, MultiGzDecoder::new(raw))),
            Self::Zstd => {
                let decoder = zstd::stream::read::Decoder::with_buffer(raw)?;
                Box::new(BufReader::with_capacity(READ_BUFFER_BYTES, decoder))
            }
        })
    }

    /// The start of the expanded file, from the start of the file; as far as it can be expanded.
    pub(crate) fn expand_head(self, head: Vec<u8>) -> Vec<u8> {
        if self == Self::None {
            return head;
        }
        let mut expanded = Vec::new();
        if let Ok(mut reader) = self.expand(&head[..]) {
            // The cut at the end of the head is an error that comes after the bytes before it.
            while expanded.len() < HEAD_BYTES {
                let wanted = (HEAD_BYTES - expanded.len()) as u64;
                match reader.by_ref().take(wanted).read_to_end(&mut expanded) {
                    Ok(count) if count > 0 => {}
                    _ => break,
                }
            }
        }
        expanded
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "not compressed",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        })
    }
}
