//! Buffers for tensors, aligned as the device's libraries need them.

use crate::error::{Error, Result};
use crate::limits::ALIGNMENT_BYTES;
use bytes::Bytes;

pub(super) fn is_aligned(bytes: &[u8]) -> bool {
    bytes.as_ptr().align_offset(ALIGNMENT_BYTES) == 0
}

/// A buffer whose content begins at a multiple of [`ALIGNMENT_BYTES`]: matrix products must not depend on a
/// tensor's address.
pub(super) struct AlignedBuffer {
    buffer: Vec<u8>,
    start: usize,
}

impl AlignedBuffer {
    pub(super) fn with_capacity(bytes: usize) -> Result<Self> {
        let mut buffer = Vec::<u8>::new();
        buffer
            .try_reserve_exact(bytes + ALIGNMENT_BYTES - 1)
            .map_err(|_| Error::malformed("frame", format!("no memory for a tensor of {bytes} bytes")))?;
        let start = buffer.as_ptr().align_offset(ALIGNMENT_BYTES).min(ALIGNMENT_BYTES - 1);
        buffer.resize(start, 0);
        Ok(Self { buffer, start })
    }

    pub(super) fn grow_to(self, bytes: usize) -> Result<Self> {
        let mut larger = Self::with_capacity(bytes)?;
        larger.extend(&self.buffer[self.start..]);
        Ok(larger)
    }

    pub(super) fn len(&self) -> usize {
        self.buffer.len() - self.start
    }

    pub(super) fn extend(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    pub(super) fn finish(self) -> Bytes {
        // `slice` keeps the allocation and with it the alignment.
        Bytes::from(self.buffer).slice(self.start..)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_aligned_and_keeps_its_content_when_it_grows() {
        for bytes in [0, 1, 63, 64, 65, 4_097, 1 << 20] {
            let mut data = AlignedBuffer::with_capacity(bytes).unwrap();
            data.extend(&vec![5; bytes]);
            let moved = data.grow_to(2 * bytes + 7).unwrap();
            assert_eq!(moved.len(), bytes);
            let finished = moved.finish();
            assert!(is_aligned(&finished), "{bytes}");
            assert_eq!(finished, vec![5; bytes]);
        }
    }

    #[test]
    fn a_buffer_that_is_filled_never_reallocates() {
        let mut data = AlignedBuffer::with_capacity(10_000).unwrap();
        let before = data.buffer.as_ptr();
        data.extend(&[1; 10_000]);
        assert_eq!(data.buffer.as_ptr(), before);
    }
}
