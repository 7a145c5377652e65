//! Plain text: a file is one document, unless lines of `<|endoftext|>` separate documents or it is longer
//! than a piece.

use super::lines::Lines;
use super::raw::RawDocument;
use crate::error::{Error, Place};
use crate::limits::TEXT_PIECE_BYTES;
use crate::tokenizer::END_OF_TEXT;

/// The documents of a text file.
pub(crate) struct TextDocuments {
    lines: Lines,
    /// Bytes of the next document.
    carried: Vec<u8>,
    started: bool,
    done: bool,
}

impl TextDocuments {
    pub(crate) fn new(lines: Lines) -> Self {
        Self { lines, carried: Vec::new(), started: false, done: false }
    }

    fn read(&mut self) -> Result<Option<RawDocument>, Error> {
        let place = Place::Line(self.lines.ended + u64::from(self.carried.is_empty()));
        let mut bytes = std::mem::take(&mut self.carried);
        loop {
            let start = bytes.len();
            let count = self.lines.next_into(&mut bytes, TEXT_PIECE_BYTES as u64)?;
            if !self.started {
                self.started = true;
                if bytes.starts_with(b"\xef\xbb\xbf") {
                    bytes.drain(..3);
                }
            }
            if count == 0 {
                self.done = true;
                return Ok((!bytes.is_empty()).then_some(RawDocument { bytes, place }));
            }
            let start = start.min(bytes.len());
            if bytes[start..].trim_ascii() == END_OF_TEXT.as_bytes() {
                bytes.truncate(start);
                return Ok(Some(RawDocument { bytes, place }));
            }
            if bytes.len() > TEXT_PIECE_BYTES && start > 0 {
                self.carried = bytes.split_off(start);
                return Ok(Some(RawDocument { bytes, place }));
            }
            if bytes.len() >= TEXT_PIECE_BYTES {
                // A line without an end is cut, but not within a character.
                self.carried = bytes.split_off(bytes.len() - incomplete(&bytes));
                return Ok(Some(RawDocument { bytes, place }));
            }
        }
    }
}

/// The length of the unfinished character at the end of `bytes`, 0 to 3 bytes.
fn incomplete(bytes: &[u8]) -> usize {
    let tail = &bytes[bytes.len().saturating_sub(3)..];
    let Some(back) = tail.iter().rev().position(|b| b & 0xc0 != 0x80) else { return 0 };
    let lead = tail[tail.len() - 1 - back];
    let length = match lead {
        0xc2..=0xdf => 2,
        0xe0..=0xef => 3,
        0xf0..=0xf4 => 4,
        _ => 1,
    };
    if back + 1 < length { back + 1 } else { 0 }
}

impl Iterator for TextDocuments {
    type Item = Result<RawDocument, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let document = self.read();
        self.done |= document.is_err();
        document.transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_length_of_an_unfinished_character_is_known() {
        assert_eq!(incomplete(b"abc"), 0);
        assert_eq!(incomplete("é".as_bytes()), 0);
        assert_eq!(incomplete(&"aé".as_bytes()[..2]), 1);
        assert_eq!(incomplete(&"a€".as_bytes()[..3]), 2);
        assert_eq!(incomplete(&"a😀".as_bytes()[..4]), 3);
        assert_eq!(incomplete(b"\x80\x80\x80\x80"), 0);
    }
}
