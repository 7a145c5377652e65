//! The buckets of rows that begin alike.

use crate::error::Error;
use crate::rows::RowFile;

/// Calls `visit` for the documents of each bucket with more than one, in ascending order: documents whose
/// rows begin with the same 8 bytes. The keys are read as often as needed for `most` entries at a time. The
/// key 0 is of documents that are compared with none.
pub(super) fn for_each_bucket(
    table: &RowFile,
    documents: u32,
    most: usize,
    mut visit: impl FnMut(&[u32]) -> Result<(), Error>,
) -> Result<(), Error> {
    let parts = u64::from(documents).div_ceil(most as u64).max(1);
    for part in 0..parts {
        let mut entries: Vec<(u64, u32)> = Vec::new();
        let mut number = 0..documents;
        table.for_each(|row| {
            let (key, document) = (u64::from_le_bytes(*row), number.next().unwrap_or(documents));
            // The upper bits of a hash spread evenly.
            if key != 0 && (u128::from(key) * u128::from(parts)) >> 64 == u128::from(part) {
                entries.push((key, document));
            }
        })?;
        entries.sort_unstable();
        let mut bucket = Vec::new();
        for equal in entries.chunk_by(|a, b| a.0 == b.0).filter(|equal| equal.len() > 1) {
            bucket.clear();
            bucket.extend(equal.iter().map(|(_, document)| *document));
            visit(&bucket)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_the_same_however_little_fits_the_memory() {
        let folder = tempfile::tempdir().unwrap();
        let mut table = RowFile::open(&folder.path().join("keys"), 8, 0).unwrap();
        let keys: Vec<u64> =
            (0..1000_u64).map(|n| crate::words::mixed(n % 300 + 1) * u64::from(n % 7 != 0)).collect();
        keys.iter().for_each(|key| table.push(&key.to_le_bytes()).unwrap());
        table.flush().unwrap();
        let buckets = |most| {
            let mut found = Vec::new();
            let visit = |bucket: &[u32]| {
                found.push(bucket.to_vec());
                Ok(())
            };
            for_each_bucket(&table, 1000, most, visit).unwrap();
            found.sort();
            found
        };
        let all = buckets(1000);
        assert!(all.iter().all(|bucket| bucket.len() > 1 && bucket.is_sorted()));
        let with_others = |n: usize| keys[n] != 0 && keys.iter().filter(|key| **key == keys[n]).count() > 1;
        assert_eq!(all.concat().len(), (0..1000).filter(|n| with_others(*n)).count());
        assert_eq!(buckets(1), all);
        assert_eq!(buckets(77), all);
    }
}
