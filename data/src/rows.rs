//! Files of rows of equal size, which grow and can be cut back.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::limits::WRITE_BUFFER_BYTES;

/// A file of rows of equal size.
pub(crate) struct RowFile {
    path: PathBuf,
    file: BufWriter<File>,
    size: usize,
    rows: u64,
}

impl RowFile {
    /// Opens or creates a file for rows of `size` bytes, and keeps the first `rows` of them.
    ///
    /// # Errors
    /// [`Error::Damaged`] for a file with fewer rows, and [`Error::Write`].
    pub(crate) fn open(path: &Path, size: usize, rows: u64) -> Result<Self, Error> {
        let opened = File::options().read(true).write(true).create(true).truncate(false).open(path);
        let mut file = opened.map_err(Error::write(path))?;
        let bytes = rows * size as u64;
        if file.metadata().map_err(Error::read(path))?.len() < bytes {
            return Err(Error::damaged(path, format!("has fewer than {rows} rows of {size} bytes")));
        }
        file.set_len(bytes).and_then(|()| file.seek(SeekFrom::End(0))).map_err(Error::write(path))?;
        let file = BufWriter::with_capacity(WRITE_BUFFER_BYTES, file);
        Ok(Self { path: path.to_path_buf(), file, size, rows })
    }

    /// Appends a row, or several.
    pub(crate) fn push(&mut self, rows: &[u8]) -> Result<(), Error> {
        debug_assert!(rows.len().is_multiple_of(self.size), "rows of {} bytes", self.size);
        self.file.write_all(rows).map_err(Error::write(&self.path))?;
        self.rows += (rows.len() / self.size) as u64;
        Ok(())
    }

    /// Makes the rows readable.
    pub(crate) fn flush(&mut self) -> Result<(), Error> {
        self.file.flush().map_err(Error::write(&self.path))
    }

    /// Makes the rows durable, and returns their number.
    pub(crate) fn sync(&mut self) -> Result<u64, Error> {
        self.flush()?;
        self.file.get_ref().sync_data().map_err(Error::write(&self.path))?;
        Ok(self.rows)
    }

    /// A row by its number; of those before the last [`flush`](Self::flush).
    pub(crate) fn get<const N: usize>(&self, number: u32) -> Result<[u8; N], Error> {
        let mut row = [0; N];
        self.read_into(number, &mut row).map(|()| row)
    }

    /// A row of any size.
    pub(crate) fn get_vec(&self, number: u32) -> Result<Vec<u8>, Error> {
        let mut row = vec![0; self.size];
        self.read_into(number, &mut row).map(|()| row)
    }

    fn read_into(&self, number: u32, row: &mut [u8]) -> Result<(), Error> {
        let at = u64::from(number) * self.size as u64;
        self.file.get_ref().read_exact_at(row, at).map_err(Error::read(&self.path))
    }

    /// Calls `visit` with the first `N` bytes of each row before the last [`flush`](Self::flush), in order.
    pub(crate) fn for_each<const N: usize>(&self, mut visit: impl FnMut(&[u8; N])) -> Result<(), Error> {
        let file = File::open(&self.path).map_err(Error::read(&self.path))?;
        let mut input = BufReader::with_capacity(WRITE_BUFFER_BYTES, file);
        let mut row = vec![0; self.size];
        for _ in 0..self.rows {
            input.read_exact(&mut row).map_err(Error::read(&self.path))?;
            if let Some(first) = row.first_chunk() {
                visit(first);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_opened_again_keeps_the_rows_that_count() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows");
        let mut file = RowFile::open(&path, 2, 0).unwrap();
        file.push(b"aabbcc").unwrap();
        assert_eq!(file.sync().unwrap(), 3);
        let mut file = RowFile::open(&path, 2, 2).unwrap();
        file.push(b"dd").unwrap();
        assert_eq!(file.sync().unwrap(), 3);
        let mut rows = Vec::new();
        file.for_each(|row: &[u8; 2]| rows.push(*row)).unwrap();
        assert_eq!(rows, [*b"aa", *b"bb", *b"dd"]);
        assert_eq!((file.get::<2>(1).unwrap(), file.get_vec(2).unwrap()), (*b"bb", b"dd".to_vec()));
        assert!(matches!(RowFile::open(&path, 2, 4), Err(Error::Damaged { .. })));
    }
}
