//! The search: signatures into files, then bucket by bucket.

use std::path::Path;

use super::DuplicateOptions;
use super::bands::Bands;
use super::buckets::for_each_bucket;
use super::clusters::Forest;
use super::origins::Origins;
use super::signature::{Signature, Signer, similarity};
use crate::document_hash::DocumentHash;
use crate::error::Error;
use crate::limits::{MAX_BUCKET_ENTRIES, MAX_COMPARED, MAX_COMPARED_DOCUMENTS};
use crate::rows::RowFile;
use crate::source::Origin;

/// What is kept of a document for the search.
pub(crate) struct Copies {
    hash: DocumentHash,
    signature: Signature,
}

/// The documents among which duplicates are searched, numbered in the order of [`add`](Self::add).
pub(crate) struct Search<'a> {
    options: &'a DuplicateOptions,
    signer: Signer,
    bands: Bands,
    documents: u32,
    hashes: RowFile,
    signatures: RowFile,
    /// The hashes of each band.
    keys: Vec<RowFile>,
    origins: Origins,
}

impl<'a> Search<'a> {
    /// A search whose files lie in `dir`.
    pub(crate) fn create(options: &'a DuplicateOptions, dir: &Path) -> Result<Self, Error> {
        let bands = Bands::for_threshold(options.threshold, options.permutations);
        let count = if options.near { bands.bands } else { 0 };
        let keys = (0..count).map(|band| RowFile::open(&dir.join(format!("band-{band}")), 8, 0));
        Ok(Self {
            options,
            signer: Signer::new(options.ngram, options.permutations),
            bands,
            documents: 0,
            hashes: RowFile::open(&dir.join("hashes"), 32, 0)?,
            signatures: RowFile::open(&dir.join("signatures"), 4 * options.permutations, 0)?,
            keys: keys.collect::<Result<_, _>>()?,
            origins: Origins::create(&dir.join("origins"))?,
        })
    }

    /// The part of the work on a document that threads can share.
    pub(crate) fn prepare(&self, hash: DocumentHash, text: &str) -> Copies {
        let signature = if self.options.near { self.signer.sign(text) } else { Vec::new() };
        Copies { hash, signature }
    }

    /// Adds the next document.
    ///
    /// # Errors
    /// [`Error::Write`], and [`Error::TooManyDocuments`] beyond the limit.
    pub(crate) fn add(&mut self, Copies { hash, signature }: &Copies, origin: &Origin) -> Result<(), Error> {
        if self.documents == MAX_COMPARED_DOCUMENTS {
            return Err(Error::TooManyDocuments { limit: MAX_COMPARED_DOCUMENTS });
        }
        self.documents += 1;
        self.hashes.push(hash.bytes())?;
        self.origins.push(origin)?;
        if !self.options.near {
            return Ok(());
        }
        // A document without words has the key 0 in all bands, and no values to compare.
        let mut values = vec![0; 4 * self.options.permutations];
        values
            .iter_mut()
            .zip(signature.iter().flat_map(|value| value.to_le_bytes()))
            .for_each(|(to, from)| *to = from);
        self.signatures.push(&values)?;
        let mut hashes = self.bands.hashes(signature);
        for table in &mut self.keys {
            table.push(&hashes.next().unwrap_or(0).to_le_bytes())?;
        }
        Ok(())
    }

    /// The clusters of duplicates, and the places of the documents.
    ///
    /// # Errors
    /// [`Error::Read`] and [`Error::Write`] of the search's own files.
    pub(crate) fn finish(mut self) -> Result<(Forest, Origins), Error> {
        self.origins.flush()?;
        let mut forest = Forest::new(self.documents);
        for table in [&mut self.hashes, &mut self.signatures].into_iter().chain(&mut self.keys) {
            table.flush()?;
        }
        let hashes = &self.hashes;
        for_each_bucket(hashes, self.documents, MAX_BUCKET_ENTRIES, |bucket| {
            forest.join_exact(bucket, |a, b| Ok(hashes.get::<32>(a)? == hashes.get::<32>(b)?))
        })?;
        for table in &self.keys {
            for_each_bucket(table, self.documents, MAX_BUCKET_ENTRIES, |bucket| {
                self.join_similar(&mut forest, bucket)
            })?;
        }
        Ok((forest, self.origins))
    }

    /// Joins the documents of a bucket that are similar. Each is compared with at most [`MAX_COMPARED`]
    /// others that are not similar to one another: a bucket of a million documents takes no million million
    /// pairs.
    fn join_similar(&self, forest: &mut Forest, bucket: &[u32]) -> Result<(), Error> {
        let mut representatives: Vec<(u32, Vec<u8>)> = Vec::new();
        for &document in bucket {
            if forest.is_exact_copy(document) {
                continue;
            }
            let signature = self.signatures.get_vec(document)?;
            let values =
                |bytes: &[u8]| bytes.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect::<Vec<_>>();
            let own = values(&signature);
            let similar = representatives
                .iter()
                .find(|(_, other)| similarity(&values(other), &own) >= self.options.threshold);
            match similar {
                Some((other, _)) => forest.join(*other, document),
                None if representatives.len() < MAX_COMPARED => representatives.push((document, signature)),
                None => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::path::PathBuf;

    use super::*;
    use crate::error::Place;
    use crate::words::mixed;

    /// Texts of 60 words: families of edited copies, and exact ones.
    fn texts(seed: u64) -> Vec<Vec<u64>> {
        let mut state = seed;
        let mut draw = |below: u64| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            mixed(state) % below
        };
        let mut texts: Vec<Vec<u64>> = Vec::new();
        while texts.len() < 300 {
            let text: Vec<u64> = match texts.is_empty() || draw(3) == 0 {
                true => (0..60).map(|_| draw(500)).collect(),
                false => {
                    let mut copy = texts[draw(texts.len() as u64) as usize].clone();
                    for _ in 0..draw(6) {
                        copy[draw(60) as usize] = draw(500);
                    }
                    copy
                }
            };
            texts.push(text);
        }
        texts
    }

    fn spell(words: &[u64]) -> String {
        words.iter().map(|word| format!("w{word} ")).collect()
    }

    fn found(options: &DuplicateOptions, texts: &[String]) -> (Vec<Option<bool>>, super::super::Duplicates) {
        let folder = tempfile::tempdir().unwrap();
        let mut search = Search::create(options, folder.path()).unwrap();
        for (line, text) in (1..).zip(texts) {
            let origin = Origin { path: PathBuf::from("a.jsonl"), place: Place::Line(line) };
            let copies = search.prepare(DocumentHash::of(text), text);
            search.add(&copies, &origin).unwrap();
        }
        let (mut forest, origins) = search.finish().unwrap();
        let dropped = (0..texts.len() as u32).map(|number| forest.dropped(number)).collect();
        (dropped, forest.report(|number| origins.get(number)).unwrap())
    }

    /// Against all pairs with their exact similarities. The estimates have a standard error of 0.018.
    #[test]
    fn copies_are_dropped_and_others_stay() {
        let options = DuplicateOptions { ngram: 3, permutations: 512, threshold: 0.7, near: true };
        let seed = 7;
        let words = texts(seed);
        let spelled: Vec<String> = words.iter().map(|text| spell(text)).collect();
        let (dropped, _) = found(&options, &spelled);
        let set = |text: &[u64]| text.windows(3).map(<[u64]>::to_vec).collect::<HashSet<_>>();
        let sets: Vec<_> = words.iter().map(|text| set(text)).collect();
        let similarity = |a: usize, b: usize| {
            sets[a].intersection(&sets[b]).count() as f64 / sets[a].union(&sets[b]).count() as f64
        };
        let (mut near, mut missed) = (0, 0);
        for (number, dropped) in dropped.iter().enumerate() {
            assert_eq!(
                *dropped == Some(true),
                words[..number].contains(&words[number]),
                "seed {seed}: {number}"
            );
            let closest = (0..number).map(|other| similarity(other, number)).fold(0.0, f64::max);
            match dropped {
                Some(false) => assert!(closest >= 0.7 - 0.09, "seed {seed}: {number} has only {closest}"),
                None if closest >= 0.7 + 0.09 => missed += 1,
                _ => {}
            }
            near += i32::from(*dropped == Some(false));
        }
        assert!(near > 50, "seed {seed}: only {near}");
        // The bands miss a pair at the threshold with a chance of 0.05, and one above it more rarely.
        assert!(missed <= near / 20, "seed {seed}: missed {missed} of {near}");
    }

    #[test]
    fn without_near_duplicates_only_equal_texts_are_dropped() {
        let options = DuplicateOptions { near: false, ..DuplicateOptions::default() };
        let texts = ["one two", "One two", "one two", "--", "--", "- -"].map(String::from);
        let (dropped, _) = found(&options, &texts);
        assert_eq!(dropped, [None, None, Some(true), None, Some(true), None]);
        let near = DuplicateOptions::default();
        let (dropped, report) = found(&near, &texts);
        assert_eq!(dropped, [None, Some(false), Some(true), None, Some(true), None]);
        assert_eq!((report.clusters, report.sizes[&3], report.sizes[&2]), (2, 1, 1));
        let places: Vec<_> = report.largest[0].members.iter().map(|member| member.place.as_str()).collect();
        assert_eq!(places, ["line 1", "line 2", "line 3"]);
    }
}
