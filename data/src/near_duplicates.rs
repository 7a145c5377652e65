//! The search for training documents that nearly equal a held-out one.
//!
//! A model that was trained on a copy of a validation text with another header is not judged on unseen text.
//! Documents are compared by their *runs*: all sequences of [`RUN_TOKENS`] tokens that occur in them, by
//! hash. Two documents are nearly equal if the shorter one shares at least [`NEAR_DUPLICATE_SHARE`] of its
//! runs with the other: a copy with edits, an excerpt, or a collection that contains it (containment as in
//! Broder, "On the resemblance and containment of documents", 1997). In a large corpus only every 2^n-th hash
//! counts, so that the held-out runs fit a fixed memory.

use std::collections::HashMap;

use crate::limits::{MAX_HELD_OUT_RUNS, MIN_SHARED_RUNS, NEAR_DUPLICATE_SHARE, RUN_TOKENS};
use crate::words::mixed;

/// The runs of the held-out documents.
pub(crate) struct HeldOutRuns {
    /// Hash and document, ordered.
    runs: Vec<(u64, u32)>,
    /// The number of runs of each document.
    sizes: Vec<usize>,
    /// Hashes count that have none of these bits.
    mask: u64,
}

impl HeldOutRuns {
    pub(crate) fn new() -> Self {
        Self { runs: Vec::new(), sizes: Vec::new(), mask: 0 }
    }

    /// Adds a held-out document.
    pub(crate) fn add(&mut self, document: &[u32]) {
        let number = self.sizes.len() as u32;
        let runs = runs(document, self.mask);
        self.sizes.push(runs.len());
        self.runs.extend(runs.into_iter().map(|run| (run, number)));
        while self.runs.len() > MAX_HELD_OUT_RUNS {
            self.thin();
        }
    }

    /// Orders the runs; afterwards documents can be compared.
    pub(crate) fn finish(mut self) -> Self {
        self.runs.sort_unstable();
        self
    }

    /// Halves the runs.
    fn thin(&mut self) {
        self.mask = self.mask << 1 | 1;
        let mask = self.mask;
        self.runs.retain(|(run, _)| run & mask == 0);
        self.sizes.fill(0);
        for (_, document) in &self.runs {
            self.sizes[*document as usize] += 1;
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Whether a document nearly equals a held-out one.
    pub(crate) fn has_near_duplicate_of(&self, document: &[u32]) -> bool {
        let runs = runs(document, self.mask);
        let mut shared: HashMap<u32, usize> = HashMap::new();
        for run in &runs {
            let start = self.runs.partition_point(|(other, _)| other < run);
            for (_, held_out) in self.runs[start..].iter().take_while(|(other, _)| other == run) {
                *shared.entry(*held_out).or_default() += 1;
            }
        }
        shared.into_iter().any(|(held_out, shared)| {
            let shorter = runs.len().min(self.sizes[held_out as usize]);
            shared >= MIN_SHARED_RUNS && shared as f64 >= NEAR_DUPLICATE_SHARE * shorter as f64
        })
    }
}

/// The hashes of a document's runs that have none of the bits of `mask`: ordered, each once.
fn runs(document: &[u32], mask: u64) -> Vec<u64> {
    const BASE: u64 = 0x9e37_79b9_7f4a_7c15;
    let top = (1..RUN_TOKENS).fold(1_u64, |power, _| power.wrapping_mul(BASE));
    let mut hash = 0_u64;
    let mut runs = Vec::new();
    for (at, id) in document.iter().enumerate() {
        if at >= RUN_TOKENS {
            let leaving = u64::from(document[at - RUN_TOKENS]) + 1;
            hash = hash.wrapping_sub(leaving.wrapping_mul(top));
        }
        hash = hash.wrapping_mul(BASE).wrapping_add(u64::from(*id) + 1);
        if at + 1 >= RUN_TOKENS {
            runs.push(mixed(hash));
        }
    }
    runs.retain(|run| run & mask == 0);
    runs.sort_unstable();
    runs.dedup();
    runs
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn index(documents: &[&[u32]]) -> HeldOutRuns {
        let mut index = HeldOutRuns::new();
        documents.iter().for_each(|document| index.add(document));
        index.finish()
    }

    fn text(seed: u32, length: u32) -> Vec<u32> {
        (0..length).map(|at| (seed.wrapping_mul(7919) + at).wrapping_mul(2_654_435_761) >> 20).collect()
    }

    #[test]
    fn edited_copies_excerpts_and_collections_are_near_duplicates() {
        let held_out = text(1, 400);
        let index = index(&[&text(2, 300), &held_out]);
        let mut edited = held_out.clone();
        edited[100] += 1;
        edited.insert(300, 7);
        assert!(index.has_near_duplicate_of(&edited));
        assert!(index.has_near_duplicate_of(&held_out[50..150]));
        assert!(index.has_near_duplicate_of(&[text(3, 2000), held_out, text(4, 2000)].concat()));
    }

    #[test]
    fn documents_with_a_common_header_or_a_short_quotation_are_not() {
        let header = text(9, 60);
        let index = index(&[&[header.clone(), text(1, 400)].concat()]);
        assert!(!index.has_near_duplicate_of(&[header, text(2, 400)].concat()));
        assert!(!index.has_near_duplicate_of(&text(1, 400)[..RUN_TOKENS + 3]));
        assert!(!index.has_near_duplicate_of(&[]));
    }

    #[test]
    fn a_thinned_index_finds_the_same_documents() {
        let documents: Vec<_> = (0..20).map(|seed| text(seed, 800)).collect();
        let mut thinned = HeldOutRuns::new();
        documents[..10].iter().for_each(|document| thinned.add(document));
        thinned.thin();
        thinned.thin();
        let thinned = thinned.finish();
        for (at, document) in documents.iter().enumerate() {
            assert_eq!(thinned.has_near_duplicate_of(document), at < 10, "document {at}");
        }
    }

    proptest! {
        #[test]
        fn equal_runs_and_only_they_have_equal_hashes(document in prop::collection::vec(0..3_u32, 0..200)) {
            let expected: HashSet<_> = document.windows(RUN_TOKENS).collect();
            prop_assert_eq!(runs(&document, 0).len(), expected.len());
        }
    }
}
