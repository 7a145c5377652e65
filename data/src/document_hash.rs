//! The hash of a document's text, from which everything follows that must be the same for copies.

/// The BLAKE3 hash of a document's text. Each use has its own bits, so that no choice depends on another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DocumentHash([u8; 32]);

impl DocumentHash {
    /// The hash of a text.
    #[must_use]
    pub fn of(text: &str) -> Self {
        Self(*blake3::hash(text.as_bytes()).as_bytes())
    }

    /// The bytes, all of which together identify the text.
    #[must_use]
    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The order in which documents are held out for validation.
    pub(crate) fn rank(&self) -> u64 {
        self.word(0)
    }

    /// A uniform draw from 0 to 1 (without 1) for the quality filter.
    pub(crate) fn sampling_draw(&self) -> f64 {
        unit(self.word(1))
    }

    /// A uniform draw from 0 to 1 (without 1) that holds a document out of a classifier's training.
    pub(crate) fn held_out_draw(&self) -> f64 {
        unit(self.word(2))
    }

    /// The order in which a classifier is trained.
    pub(crate) fn training_order(&self) -> u64 {
        self.word(3)
    }

    fn word(&self, number: usize) -> u64 {
        u64::from_le_bytes(self.0.as_chunks::<8>().0[number])
    }
}

/// The upper 53 bits as a fraction.
fn unit(bits: u64) -> f64 {
    (bits >> 11) as f64 / (1_u64 << 53) as f64
}
