//! Token files: ids as little-endian `u32`, one after the other.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::limits::{READ_BUFFER_BYTES, WRITE_BUFFER_BYTES};
use crate::rows::RowFile;

/// A token file that is being written.
pub(crate) struct TokenWriter {
    rows: RowFile,
}

impl TokenWriter {
    /// Opens or creates a file, and keeps its first `tokens` tokens.
    ///
    /// # Errors
    /// [`Error::Damaged`] for a file with fewer tokens, and [`Error::Write`].
    pub(crate) fn open(path: &Path, tokens: u64) -> Result<Self, Error> {
        Ok(Self { rows: RowFile::open(path, 4, tokens)? })
    }

    /// Appends a document and the end of text.
    pub(crate) fn write(&mut self, ids: &[u32], end_of_text: u32) -> Result<(), Error> {
        let mut bytes = Vec::with_capacity(4 * (ids.len() + 1));
        bytes.extend(ids.iter().chain([&end_of_text]).flat_map(|id| id.to_le_bytes()));
        self.rows.push(&bytes)
    }

    /// Makes the file durable and returns the number of its tokens.
    pub(crate) fn sync(&mut self) -> Result<u64, Error> {
        self.rows.sync()
    }
}

/// The part of the corpus to which a document belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Training,
    Validation,
    /// It nearly equals a held-out document.
    Neither,
}

/// Calls `visit` for each document of a token file, with its number and tokens. `lengths` gives the lengths
/// of the documents, in tokens, in the order of the file.
pub(crate) fn for_each_document(
    path: &Path,
    lengths: impl Iterator<Item = u64>,
    mut visit: impl FnMut(usize, &[u32]),
) -> Result<(), Error> {
    let file = File::open(path).map_err(Error::read(path))?;
    let mut input = BufReader::with_capacity(READ_BUFFER_BYTES, file);
    let (mut bytes, mut ids) = (Vec::new(), Vec::new());
    for (number, tokens) in lengths.enumerate() {
        bytes.resize(4 * tokens as usize, 0);
        input.read_exact(&mut bytes).map_err(Error::read(path))?;
        ids.clear();
        ids.extend(bytes.as_chunks::<4>().0.iter().map(|four| u32::from_le_bytes(*four)));
        visit(number, &ids);
    }
    Ok(())
}

/// Distributes the documents of two files: `first` then holds those for training, `second` those for
/// validation.
///
/// The lists give the length of each document, in tokens, in the order of the file. No document of `first` is
/// for validation.
pub(crate) fn distribute(
    first: &Path,
    second: &Path,
    [of_first, of_second]: [&[(u64, Fate)]; 2],
) -> Result<(), Error> {
    let [new_first, new_second] = [first, second].map(|path| path.with_extension("new"));
    let work = || {
        let rewrite = of_first.iter().any(|(_, fate)| *fate != Fate::Training);
        let kept =
            if rewrite { File::create(&new_first)? } else { OpenOptions::new().append(true).open(first)? };
        let mut training = BufWriter::with_capacity(WRITE_BUFFER_BYTES, kept);
        let mut validation = BufWriter::with_capacity(WRITE_BUFFER_BYTES, File::create(&new_second)?);
        let files = [(first, of_first), (second, of_second)];
        for (path, documents) in &files[usize::from(!rewrite)..] {
            let mut input = BufReader::with_capacity(READ_BUFFER_BYTES, File::open(path)?);
            for (tokens, fate) in *documents {
                let mut document = input.by_ref().take(4 * tokens);
                match fate {
                    Fate::Training => io::copy(&mut document, &mut training)?,
                    Fate::Validation => io::copy(&mut document, &mut validation)?,
                    Fate::Neither => io::copy(&mut document, &mut io::sink())?,
                };
            }
        }
        training.into_inner()?.sync_all()?;
        validation.into_inner()?.sync_all()?;
        if rewrite {
            fs::rename(&new_first, first)?;
        }
        fs::rename(&new_second, second)
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

    /// The positions after each `end_of_text`, in order.
    pub(crate) fn ends(&self, end_of_text: u32) -> Result<Vec<u64>, Error> {
        let mut input = BufReader::with_capacity(READ_BUFFER_BYTES, &self.file);
        input.rewind().map_err(Error::read(&self.path))?;
        let mut ends = Vec::new();
        let mut four = [0; 4];
        for at in 0..self.tokens {
            input.read_exact(&mut four).map_err(Error::read(&self.path))?;
            if u32::from_le_bytes(four) == end_of_text {
                ends.push(at + 1);
            }
        }
        Ok(ends)
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
