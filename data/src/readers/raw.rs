//! Raw documents: the common output of all readers.

use crate::error::{Error, Place};

/// A document as stored in its file: bytes that may not be UTF-8.
pub(crate) struct RawDocument {
    pub(crate) bytes: Vec<u8>,
    pub(crate) place: Place,
}

/// The raw documents of one file; it ends after an error.
pub(crate) type RawDocuments = Box<dyn Iterator<Item = Result<RawDocument, Error>>>;
