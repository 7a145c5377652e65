//! Near-duplicates among the documents of all sources: MinHash signatures and locality-sensitive hashing.
//!
//! Two documents are near-duplicates if their sets of word n-grams have a Jaccard similarity of at least a
//! threshold, as estimated from their signatures (Broder, "On the resemblance and containment of documents",
//! 1997). Documents of which the signatures agree in one of several bands are compared (Indyk and Motwani,
//! 1998; Leskovec et al., "Mining of Massive Datasets", section 3.4). Of each cluster the first document
//! stays, in the order of the sources.
//!
//! The signatures lie in files, and each band is searched in parts that fit a fixed memory. What stays in
//! memory is 4 bytes for each document.

mod bands;
mod buckets;
mod clusters;
mod options;
mod origins;
mod search;
mod signature;

pub use clusters::{Cluster, ClusterMember, Duplicates};
pub use options::DuplicateOptions;
pub(crate) use search::{Copies, Search};
