//! The places of the documents in a search.

use std::path::{Path, PathBuf};

use crate::error::{Error, Place};
use crate::rows::RowFile;
use crate::source::Origin;

/// The places of documents, 16 bytes each in a file.
pub(crate) struct Origins {
    /// The files, in the order of the documents.
    paths: Vec<PathBuf>,
    /// For each document the number of its path, the kind of its place, and the number of that.
    table: RowFile,
}

impl Origins {
    pub(super) fn create(path: &Path) -> Result<Self, Error> {
        Ok(Self { paths: Vec::new(), table: RowFile::open(path, 16, 0)? })
    }

    pub(super) fn push(&mut self, origin: &Origin) -> Result<(), Error> {
        if self.paths.last() != Some(&origin.path) {
            self.paths.push(origin.path.clone());
        }
        let (kind, number) = match origin.place {
            Place::Line(number) => (0_u32, number),
            Place::Record(number) => (1, number),
        };
        let path = self.paths.len() as u64 - 1;
        let mut row = [0; 16];
        row[..8].copy_from_slice(&(path << 32 | u64::from(kind)).to_le_bytes());
        row[8..].copy_from_slice(&number.to_le_bytes());
        self.table.push(&row)
    }

    pub(super) fn flush(&mut self) -> Result<(), Error> {
        self.table.flush()
    }

    /// The place of a document.
    pub(crate) fn get(&self, document: u32) -> Result<Origin, Error> {
        let row: [u8; 16] = self.table.get(document)?;
        let [first, number] = [0, 1].map(|at| u64::from_le_bytes(row.as_chunks::<8>().0[at]));
        let place = if first as u32 == 0 { Place::Line(number) } else { Place::Record(number) };
        Ok(Origin { path: self.paths[(first >> 32) as usize].clone(), place })
    }
}
