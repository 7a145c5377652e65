//! Token files: ids as little-endian `u32`, one after the other.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::limits::{READ_BUFFER_BYTES, WRITE_BUFFER_BYTES};

/// A token file that is being written.
pub(crate) struct TokenWriter {
    path: PathBuf,
    file: BufWriter<File>,
    tokens: u64,
}

impl TokenWriter {
    pub(crate) fn create(path: &Path) -> Result<Self, Error> {
        let file = File::create(path).map_err(Error::write(path))?;
        Ok(Self {
            path: path.to_path_buf(),
            file: BufWriter::with_capacity(WRITE_BUFFER_BYTES, file),
            tokens: 0,
        })
    }

    /// Appends a document and the end of text.
    pub(crate) fn write(&mut self, ids: &[u32], end_of_text: u32) -> Result<(), Error> {
        let mut bytes = Vec::with_capacity(4 * (ids.len() + 1));
        bytes.extend(ids.iter().chain([&end_of_text]).flat_map(|id| id.to_le_bytes()));
        self.file.write_all(&bytes).map_err(Error::write(&self.path))?;
        self.tokens += ids.len() as u64 + 1;
        Ok(())
    }

    /// Makes the file durable and returns the number of its tokens.
    pub(crate) fn finish(self) -> Result<u64, Error> {
        let fail = Error::write(&self.path);
        let done = self.file.into_inner().map_err(|e| e.into_error()).and_then(|file| file.sync_all());
        done.map_err(fail)?;
        Ok(self.tokens)
    }
}

/// Sifts the documents of `second`: those marked `true` stay, the others move to the end of `first`.
///
/// `documents` gives the length of each document, in tokens, in the order of the file.
pub(crate) fn sift(
    first: &Path,
    second: &Path,
    documents: impl Iterator<Item = (u64, bool)>,
) -> Result<(), Error> {
    let rewritten = second.with_extension("new");
    let work = || {
        let mut input = BufReader::with_capacity(READ_BUFFER_BYTES, File::open(second)?);
        let moved = OpenOptions::new().append(true).open(first)?;
        let mut moved = BufWriter::with_capacity(WRITE_BUFFER_BYTES, moved);
        let mut kept = BufWriter::with_capacity(WRITE_BUFFER_BYTES, File::create(&rewritten)?);
        for (tokens, keep) in documents {
            let target = if keep { &mut kept } else { &mut moved };
            io::copy(&mut input.by_ref().take(4 * tokens), target)?;
        }
        moved.into_inner()?.sync_all()?;
        kept.into_inner()?.sync_all()?;
        fs::rename(&rewritten, second)
    };
    work().map_err(Error::write(second))
}

/// Moves the boundary between two consecutive files: `first` then holds `tokens` tokens, `second` the rest.
pub(crate) fn cut_at(first: &Path, second: &Path, tokens: u64) -> Result<(), Error> {
    let rewritten = second.with_extension("new");
    move_boundary(first, second, &rewritten, 4 * tokens).map_err(Error::write(second))
}

fn move_boundary(first: &Path, second: &Path, rewritten: &Path, cut: u64) -> io::Result<()> {
    let mut head = OpenOptions::new().read(true).write(true).open(first)?;
    let mut tail = File::open(second)?;
    let mut out = File::create(rewritten)?;
    let length = head.metadata()?.len();
    if cut <= length {
        head.seek(SeekFrom::Start(cut))?;
        io::copy(&mut head, &mut out)?;
        head.set_len(cut)?;
    } else {
        head.seek(SeekFrom::End(0))?;
        io::copy(&mut (&tail).take(cut - length), &mut head)?;
    }
    io::copy(&mut tail, &mut out)?;
    head.sync_all()?;
    out.sync_all()?;
    fs::rename(rewritten, second)
}

/// A token file with random access; threads may share it.
#[derive(Debug)]
pub(crate) struct TokenFile {
    path: PathBuf,
    file: File,
    /// The number of tokens in the file.
    pub(crate) tokens: u64,
}

impl TokenFile {
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(Error::read(path))?;
        let tokens = file.metadata().map_err(Error::read(path))?.len() / 4;
        Ok(Self { path: path.to_path_buf(), file, tokens })
    }

    /// Appends `count` tokens from `start` on to `ids`, all of which must be below `vocabulary`.
    pub(crate) fn read(
        &self,
        start: u64,
        count: usize,
        vocabulary: usize,
        ids: &mut Vec<u32>,
    ) -> Result<(), Error> {
        let mut bytes = vec![0; 4 * count];
        self.file.read_exact_at(&mut bytes, 4 * start).map_err(Error::read(&self.path))?;
        for four in bytes.as_chunks::<4>().0 {
            let id = u32::from_le_bytes(*four);
            if id as usize >= vocabulary {
                let reason = format!("holds token {id}, but the vocabulary has {vocabulary} tokens");
                return Err(Error::damaged(&self.path, reason));
            }
            ids.push(id);
        }
        Ok(())
    }
}
