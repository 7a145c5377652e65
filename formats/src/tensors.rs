//! Tensors in one or several safetensors files, with the index that Hugging Face's loaders read.

use crate::error::{Error, Result};
use crate::folder::NewFolder;
use safetensors::tensor::{Dtype, View};
use serde_json::json;
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};

/// Tensors that are read when they are written, so that memory holds one shard at a time.
pub trait Source {
    /// What tells a tensor from others.
    type Key;
    /// The bytes of a tensor, f32, row-major and little-endian.
    ///
    /// # Errors
    /// Whatever keeps it from being read.
    fn read(&mut self, key: &Self::Key) -> Result<Vec<u8>>;
}

/// An f32 tensor of a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed<K> {
    /// Its name in the file.
    pub name: String,
    /// Its shape, outermost first.
    pub shape: Vec<usize>,
    /// Its key in the source.
    pub key: K,
}

impl<K> Listed<K> {
    fn bytes(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64 * 4
    }
}

/// A tensor while a file is written. The library's writer cannot be told of an error, so that it is kept.
struct Lazy<'a, S: Source> {
    tensor: &'a Listed<S::Key>,
    source: &'a RefCell<S>,
    failed: &'a RefCell<Option<Error>>,
}

impl<S: Source> View for Lazy<'_, S> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.tensor.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        if self.failed.borrow().is_some() {
            return Cow::Borrowed(&[]);
        }
        let read = self.source.borrow_mut().read(&self.tensor.key);
        Cow::Owned(read.unwrap_or_else(|error| {
            *self.failed.borrow_mut() = Some(error);
            Vec::new()
        }))
    }

    fn data_len(&self) -> usize {
        self.tensor.bytes() as usize
    }
}

/// Writes tensors as `model.safetensors`, or as several such files with an index if they are larger than
/// `file_bytes` together.
///
/// # Errors
/// [`Error::SafeTensors`] or [`Error::Write`] for a file, or the error of `source`.
pub fn write<S: Source>(
    folder: &NewFolder,
    mut tensors: Vec<Listed<S::Key>>,
    source: S,
    file_bytes: u64,
) -> Result<()> {
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    let total: u64 = tensors.iter().map(Listed::bytes).sum();
    let files = files(&tensors, file_bytes);
    let name = |at: usize| match files.len() {
        0 | 1 => "model.safetensors".to_owned(),
        count => format!("model-{:05}-of-{count:05}.safetensors", at + 1),
    };
    let source = RefCell::new(source);
    let mut map = BTreeMap::new();
    for (at, part) in files.iter().enumerate() {
        write_file(folder, &name(at), part, &source)?;
        map.extend(part.iter().map(|tensor| (tensor.name.as_str(), name(at))));
    }
    if files.len() > 1 {
        let index = json!({ "metadata": { "total_size": total }, "weight_map": map });
        folder.write_json("model.safetensors.index.json", &index)?;
    }
    Ok(())
}

/// The tensors of each file, in their order.
fn files<K>(tensors: &[Listed<K>], file_bytes: u64) -> Vec<&[Listed<K>]> {
    let mut files = Vec::new();
    let mut rest = tensors;
    while !rest.is_empty() {
        let mut bytes = 0;
        let fits = |tensor: &&Listed<K>| {
            bytes += tensor.bytes();
            bytes <= file_bytes
        };
        let (file, others) = rest.split_at(rest.iter().take_while(fits).count().max(1));
        files.push(file);
        rest = others;
    }
    files
}

fn write_file<S: Source>(
    folder: &NewFolder,
    name: &str,
    tensors: &[Listed<S::Key>],
    source: &RefCell<S>,
) -> Result<()> {
    let failed = RefCell::new(None);
    let lazy = tensors.iter().map(|tensor| (&tensor.name, Lazy { tensor, source, failed: &failed }));
    // What `transformers` asks for: the library of the tensors.
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let path = folder.path(name);
    let written = safetensors::serialize_to_file(lazy, Some(metadata), &path);
    if let Some(error) = failed.into_inner() {
        return Err(error);
    }
    written.map_err(|source| Error::SafeTensors { path, source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::SafeTensors;
    use std::fs;

    /// A tensor filled with its key.
    struct Filled(usize);

    impl Source for Filled {
        type Key = u8;
        fn read(&mut self, key: &u8) -> Result<Vec<u8>> {
            match key {
                99 => Err(Error::Exists { path: "unreadable".into() }),
                _ => Ok(vec![*key; self.0 * 4]),
            }
        }
    }

    fn listed(keys: &[u8]) -> Vec<Listed<u8>> {
        keys.iter().map(|&key| Listed { name: format!("t{key}"), shape: vec![2, 5], key }).collect()
    }

    #[test]
    fn large_models_are_cut_into_files_with_an_index() {
        let parent = tempfile::tempdir().unwrap();
        for (file_bytes, expected) in [(1000, 1), (100, 2), (40, 3), (1, 3)] {
            let target = parent.path().join(format!("of-{file_bytes}"));
            let folder = NewFolder::create(&target).unwrap();
            write(&folder, listed(&[3, 1, 2]), Filled(10), file_bytes).unwrap();
            folder.finish().unwrap();
            let own = parent.path().join("own");
            fs::write(&own, []).unwrap();
            let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions();
            for entry in fs::read_dir(&target).unwrap() {
                assert_eq!(mode(&entry.unwrap().path()), mode(&own));
            }
            let mut files: Vec<_> =
                fs::read_dir(&target).unwrap().map(|entry| entry.unwrap().path()).collect();
            files.sort();
            let index = target.join("model.safetensors.index.json");
            files.retain(|file| *file != index);
            assert_eq!((files.len(), index.exists()), (expected, expected > 1), "{files:?}");
            let mut keys = Vec::new();
            for file in &files {
                let bytes = fs::read(file).unwrap();
                for (name, tensor) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
                    assert_eq!(tensor.shape(), [2, 5]);
                    let key: u8 = name[1..].parse().unwrap();
                    assert!(tensor.data().iter().all(|byte| *byte == key));
                    keys.push(key);
                    if expected > 1 {
                        let index: serde_json::Value =
                            serde_json::from_slice(&fs::read(&index).unwrap()).unwrap();
                        assert_eq!(index["weight_map"][&name], file.file_name().unwrap().to_str().unwrap());
                        assert_eq!(index["metadata"]["total_size"], 120);
                    }
                }
            }
            keys.sort_unstable();
            assert_eq!(keys, [1, 2, 3]);
        }
    }

    #[test]
    fn a_tensor_that_cannot_be_read_leaves_nothing_behind() {
        let parent = tempfile::tempdir().unwrap();
        let folder = NewFolder::create(&parent.path().join("new")).unwrap();
        let error = write(&folder, listed(&[1, 99, 2]), Filled(10), 1000).unwrap_err();
        assert!(error.to_string().contains("unreadable"), "{error}");
        drop(folder);
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }

    #[test]
    fn an_existing_target_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        let error = NewFolder::create(parent.path()).unwrap_err().to_string();
        assert!(error.ends_with("exists: expected a path for a new folder"), "{error}");
    }
}
