//! Token files: ids as little-endian `u32`, one after the other.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::error::Error;

/// A token file that is being written.
pub(crate) struct TokenWriter {
    path: PathBuf,
    file: BufWriter<File>,
    pub(crate) tokens: u64,
}

impl TokenWriter {
    pub(crate) fn create(path: &Path) -> Result<Self, Error> {
        let file = File::create(path).map_err(Error::write(path))?;
        Ok(Self { path: path.to_path_buf(), file: BufWriter::with_capacity(1 << 20, file), tokens: 0 })
    }

    /// Appends a document and the end of text.
    pub(crate) fn write(&mut self, ids: &[u32], end_of_text: u32) -> Result<(), Error> {
        let mut bytes = Vec::with_capacity(4 * (ids.len() + 1));
        bytes.extend(ids.iter().chain([&end_of_text]).flat_map(|id| id.to_le_bytes()));
        self.file.write_all(&bytes).map_err(Error::write(&self.path))?;
        self.tokens += ids.len() as u64 + 1;
        Ok(())
    }

    /// Makes the file durable and gives the number of its tokens.
    pub(crate) fn finish(self) -> Result<u64, Error> {
        let fail = Error::write(&self.path);
        let done = self.file.into_inner().map_err(|e| e.into_error()).and_then(|file| file.sync_all());
        done.map_err(fail)?;
        Ok(self.tokens)
    }
}

/// Takes the two files for one, the second after the first, and parts it anew after `tokens` tokens.
pub(crate) fn repart(first: &Path, second: &Path, tokens: u64) -> Result<(), Error> {
    let moved = second.with_extension("moved");
    move_cut(first, second, &moved, 4 * tokens).map_err(Error::write(second))
}

fn move_cut(first: &Path, second: &Path, moved: &Path, cut: u64) -> io::Result<()> {
    let mut head = OpenOptions::new().read(true).write(true).open(first)?;
    let mut tail = File::open(second)?;
    let mut out = File::create(moved)?;
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
    std::fs::rename(moved, second)
}

/// A token file that is read at any place, by any number of threads.
#[derive(Debug)]
pub(crate) struct TokenFile {
    path: PathBuf,
    file: File,
    /// How many tokens the file holds.
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
