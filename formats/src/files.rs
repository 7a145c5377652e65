//! The tensors of a folder with safetensors files, read one at a time.

use crate::error::{Error, Result};
use crate::limits::HEADER_BYTES_MAX;
use half::{bf16, f16};
use safetensors::tensor::{Dtype, Metadata};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes before a header: its length.
const PREFIX: u64 = 8;

/// The tensors of a folder: `model.safetensors`, or all files that its index names.
#[derive(Debug)]
pub struct TensorFiles {
    files: Vec<(PathBuf, File)>,
    tensors: BTreeMap<String, Found>,
}

/// A tensor in a file.
#[derive(Debug)]
struct Found {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    offset: u64,
    bytes: usize,
}

impl TensorFiles {
    /// Reads the headers of all files.
    ///
    /// # Errors
    /// [`Error::Import`] when a file is missing or malformed, or a tensor is in two of them or has no f32,
    /// bf16 or f16 numbers.
    pub fn open(folder: &Path) -> Result<Self> {
        let mut all = Self { files: Vec::new(), tensors: BTreeMap::new() };
        for path in paths(folder)? {
            all.add(path)?;
        }
        Ok(all)
    }

    /// The names of all tensors, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The shape of a tensor.
    #[must_use]
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|tensor| tensor.shape.as_slice())
    }

    /// The numbers of a tensor as f32, row-major and little-endian. bf16 and f16 widen without a change.
    ///
    /// # Errors
    /// [`Error::Import`] when the file cannot be read or has no such tensor.
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        let (path, file, tensor) = self
            .tensors
            .get(name)
            .and_then(|tensor| self.files.get(tensor.file).map(|(path, file)| (path, file, tensor)))
            .ok_or_else(|| Error::import(Path::new(name), "there is no such tensor"))?;
        let mut bytes = vec![0; tensor.bytes];
        file.read_exact_at(&mut bytes, tensor.offset).map_err(|error| Error::import(path, error))?;
        let widened = |to_f32: fn([u8; 2]) -> f32| {
            bytes.chunks_exact(2).flat_map(|pair| to_f32([pair[0], pair[1]]).to_le_bytes()).collect()
        };
        Ok(match tensor.dtype {
            Dtype::BF16 => widened(|pair| bf16::from_le_bytes(pair).to_f32()),
            Dtype::F16 => widened(|pair| f16::from_le_bytes(pair).to_f32()),
            _ => bytes,
        })
    }

    fn add(&mut self, path: PathBuf) -> Result<()> {
        let fail = |error: &dyn std::fmt::Display| Error::import(&path, error);
        let file = File::open(&path).map_err(|error| fail(&error))?;
        let mut length = [0; PREFIX as usize];
        file.read_exact_at(&mut length, 0).map_err(|_| fail(&"it is no safetensors file"))?;
        let length = u64::from_le_bytes(length);
        if length > HEADER_BYTES_MAX {
            return Err(fail(&format!("a header of {length} bytes: expected at most {HEADER_BYTES_MAX}")));
        }
        let mut header = vec![0; length as usize];
        file.read_exact_at(&mut header, PREFIX)
            .map_err(|_| fail(&"it is cut off, or no safetensors file"))?;
        let metadata: Metadata = serde_json::from_slice(&header).map_err(|error| fail(&error))?;
        let size = file.metadata().map_err(|error| fail(&error))?.len();
        for (name, info) in metadata.tensors() {
            if !matches!(info.dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) {
                return Err(fail(&format!("{name} is {:?}: expected F32, BF16 or F16", info.dtype)));
            }
            let (start, end) = info.data_offsets;
            let bits = info.shape.iter().try_fold(info.dtype.bitsize(), |bits, &n| bits.checked_mul(n));
            if end.checked_sub(start).and_then(|bytes| bytes.checked_mul(8)) != bits {
                return Err(fail(&format!(
                    "{name} has a size that is not that of its shape {:?}",
                    info.shape
                )));
            }
            let offset = PREFIX + length + start as u64;
            if PREFIX + length + end as u64 > size {
                return Err(fail(&format!("it is cut off: {name} ends behind its {size} bytes")));
            }
            let (dtype, shape) = (info.dtype, info.shape.clone());
            let found = Found { file: self.files.len(), dtype, shape, offset, bytes: end - start };
            if self.tensors.insert(name.clone(), found).is_some() {
                return Err(fail(&format!("{name} is in another file as well")));
            }
        }
        self.files.push((path, file));
        Ok(())
    }
}

/// The files of a folder.
fn paths(folder: &Path) -> Result<Vec<PathBuf>> {
    let index = folder.join("model.safetensors.index.json");
    if !index.exists() {
        return Ok(vec![folder.join("model.safetensors")]);
    }
    let fail = |reason: &dyn std::fmt::Display| Error::import(&index, reason);
    let text = fs::read_to_string(&index).map_err(|error| fail(&error))?;
    let json: serde_json::Value = serde_json::from_str(&text).map_err(|error| fail(&error))?;
    let map = json["weight_map"].as_object().ok_or_else(|| fail(&"it has no weight_map"))?;
    let mut names: Vec<&str> = map.values().filter_map(serde_json::Value::as_str).collect();
    names.sort_unstable();
    names.dedup();
    let is_plain = |name: &&str| !name.contains('/') && !name.starts_with('.');
    if let Some(name) = names.iter().find(|name| !is_plain(name)) {
        return Err(fail(&format!("it names {name:?}: expected files of this folder")));
    }
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}
