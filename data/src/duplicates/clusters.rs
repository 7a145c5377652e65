//! Clusters of duplicates and their report.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::limits::{MAX_LISTED_CLUSTERS, MAX_LISTED_MEMBERS};
use crate::source::Origin;

/// The clusters of duplicates of a corpus.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Duplicates {
    /// The number of clusters of two documents or more.
    pub clusters: u64,
    /// The number of clusters of each size.
    pub sizes: BTreeMap<u64, u64>,
    /// The largest clusters.
    pub largest: Vec<Cluster>,
}

/// Documents that are copies of the first one, or nearly.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cluster {
    /// The number of documents.
    pub documents: u64,
    /// The first documents; the very first one stays.
    pub members: Vec<ClusterMember>,
}

/// The place of a document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterMember {
    /// The file.
    pub path: String,
    /// The position in the file, such as `line 7`.
    pub place: String,
}

/// Disjoint sets of documents; the root of a set is its first document.
pub(crate) struct Forest {
    parents: Vec<u32>,
    /// Whether a document equals an earlier one.
    exact: Vec<bool>,
}

impl Forest {
    pub(super) fn new(documents: u32) -> Self {
        Self { parents: (0..documents).collect(), exact: vec![false; documents as usize] }
    }

    fn root(&mut self, document: u32) -> u32 {
        let mut at = document;
        while self.parents[at as usize] != at {
            // Halves the path.
            self.parents[at as usize] = self.parents[self.parents[at as usize] as usize];
            at = self.parents[at as usize];
        }
        at
    }

    pub(super) fn join(&mut self, a: u32, b: u32) {
        let (a, b) = (self.root(a), self.root(b));
        self.parents[a.max(b) as usize] = a.min(b);
    }

    /// Joins the documents of a bucket that equal an earlier one of it.
    pub(super) fn join_exact(
        &mut self,
        bucket: &[u32],
        is_equal: impl Fn(u32, u32) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        let mut firsts: Vec<u32> = Vec::new();
        for &document in bucket {
            let mut copy_of = None;
            for &first in &firsts {
                if is_equal(first, document)? {
                    copy_of = Some(first);
                    break;
                }
            }
            match copy_of {
                Some(first) => {
                    self.join(first, document);
                    self.exact[document as usize] = true;
                }
                None => firsts.push(document),
            }
        }
        Ok(())
    }

    pub(super) fn is_exact_copy(&self, document: u32) -> bool {
        self.exact[document as usize]
    }

    /// Whether a document is dropped; `Some(true)` if it equals an earlier one, `Some(false)` if nearly.
    pub(crate) fn dropped(&mut self, document: u32) -> Option<bool> {
        (self.root(document) != document).then(|| self.exact[document as usize])
    }

    /// The report; `origin` gives the places of the listed documents.
    pub(crate) fn report(
        &mut self,
        mut origin: impl FnMut(u32) -> Result<Origin, Error>,
    ) -> Result<Duplicates, Error> {
        let documents = self.parents.len() as u32;
        let mut counts: BTreeMap<u32, u64> = BTreeMap::new();
        for document in 0..documents {
            let root = self.root(document);
            if root != document {
                *counts.entry(root).or_insert(1) += 1;
            }
        }
        let mut sizes = BTreeMap::new();
        counts.values().for_each(|count| *sizes.entry(*count).or_default() += 1);
        let mut largest: Vec<(u32, u64)> = counts.iter().map(|(root, count)| (*root, *count)).collect();
        largest.sort_by_key(|(root, count)| (std::cmp::Reverse(*count), *root));
        largest.truncate(MAX_LISTED_CLUSTERS);
        let mut members: BTreeMap<u32, Vec<u32>> =
            largest.iter().map(|(root, _)| (*root, Vec::new())).collect();
        for document in 0..documents {
            let root = self.root(document);
            if let Some(members) = members.get_mut(&root).filter(|all| all.len() < MAX_LISTED_MEMBERS) {
                members.push(document);
            }
        }
        let mut listed = Vec::with_capacity(largest.len());
        for (root, documents) in largest {
            let member = |document: &u32| {
                let Origin { path, place } = origin(*document)?;
                Ok(ClusterMember { path: path.display().to_string(), place: place.to_string() })
            };
            let members = members[&root].iter().map(member).collect::<Result<_, Error>>()?;
            listed.push(Cluster { documents, members });
        }
        Ok(Duplicates { clusters: counts.len() as u64, sizes, largest: listed })
    }
}
