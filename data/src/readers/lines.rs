//! Lines of a plain or compressed file, of bounded length and bounded expansion.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read as _};
use std::path::{Path, PathBuf};

use super::compression::Compression;
use crate::error::Error;
use crate::limits::{EXPANSION_FLOOR_BYTES, MAX_EXPANSION, READ_BUFFER_BYTES};

/// Reads a file line by line, counting lines and bytes.
pub(crate) struct Lines {
    pub(crate) path: PathBuf,
    input: Box<dyn BufRead>,
    /// The number of line ends read so far.
    pub(crate) ended: u64,
    read: u64,
    /// The limit of the expanded size, in bytes.
    most: u64,
}

impl Lines {
    pub(crate) fn open(path: &Path, compression: Compression) -> Result<Self, Error> {
        let file = File::open(path).map_err(Error::read(path))?;
        let size = file.metadata().map_err(Error::read(path))?.len();
        let raw = BufReader::with_capacity(READ_BUFFER_BYTES, file);
        let input = compression.expand(raw).map_err(Error::read(path))?;
        let most = match compression {
            Compression::None => u64::MAX,
            _ => size.saturating_mul(MAX_EXPANSION).max(EXPANSION_FLOOR_BYTES),
        };
        Ok(Self { path: path.to_path_buf(), input, ended: 0, read: 0, most })
    }

    /// Appends at most `limit` bytes of the next line, with its end, to `buffer`; 0 at the end of the file.
    pub(crate) fn next_into(&mut self, buffer: &mut Vec<u8>, limit: u64) -> Result<usize, Error> {
        let before = buffer.len();
        let count = self.input.by_ref().take(limit).read_until(b'\n', buffer).map_err(|e| self.failed(e))?;
        self.read += count as u64;
        if self.read > self.most {
            return Err(Error::Expands { path: self.path.clone(), limit: self.most });
        }
        if buffer.len() > before && buffer.last() == Some(&b'\n') {
            self.ended += 1;
        }
        Ok(count)
    }

    /// Reads on to the end of a line of which the start was read.
    pub(crate) fn skip_line(&mut self) -> Result<(), Error> {
        let ended = self.ended;
        let mut rest = Vec::new();
        while self.ended == ended && self.next_into(&mut rest, READ_BUFFER_BYTES as u64)? > 0 {
            rest.clear();
        }
        Ok(())
    }

    fn failed(&self, error: io::Error) -> Error {
        Error::Read { path: self.path.clone(), error }
    }
}
