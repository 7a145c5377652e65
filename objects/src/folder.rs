//! Files in a store, under one address.

use crate::error::{Error, Result};
use crate::limits::{PART_BYTES, PARTS_IN_FLIGHT};
use crate::location::Location;
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, WriteMultipart};
use std::fmt;
use std::path::Path as FilePath;
use std::sync::Arc;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// A folder in a store.
#[derive(Clone, Debug)]
pub struct ObjectFolder {
    store: Arc<dyn ObjectStore>,
    location: Location,
}

/// A file in a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Its name in the folder.
    pub name: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// What changes with its content, if the store says so.
    pub version: Option<String>,
}

impl ObjectFolder {
    /// The folder at an address. It need not exist.
    ///
    /// # Errors
    /// [`Error::Address`] or [`Error::Setup`].
    pub fn open(address: &str) -> Result<Self> {
        let location = Location::parse(address)?;
        Ok(Self { store: location.store()?, location })
    }

    /// The files below a folder of this one, by name; none if there is no such folder.
    ///
    /// # Errors
    /// [`Error::Request`].
    pub async fn list(&self, folder: &str) -> Result<Vec<ObjectInfo>> {
        let (own, path) = (self.location.path(), self.path(folder));
        let found = self.store.list(Some(&path)).try_collect::<Vec<_>>().await;
        let found = match found {
            Err(object_store::Error::NotFound { .. }) if folder.is_empty() => Vec::new(),
            found => found.map_err(|error| self.failed(folder, &error))?,
        };
        let name = |path: &Path| {
            path.prefix_match(own)
                .map(|parts| parts.map(|part| part.as_ref().to_owned()).collect::<Vec<_>>().join("/"))
        };
        let info = |meta: object_store::ObjectMeta| {
            Some(ObjectInfo { name: name(&meta.location)?, bytes: meta.size, version: meta.e_tag })
        };
        let mut files: Vec<ObjectInfo> = found.into_iter().filter_map(info).collect();
        files.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(files)
    }

    /// Size and version of one file.
    ///
    /// # Errors
    /// [`Error::Request`].
    pub async fn info(&self, name: &str) -> Result<ObjectInfo> {
        let meta = self.store.head(&self.path(name)).await.map_err(|error| self.failed(name, &error))?;
        Ok(ObjectInfo { name: name.into(), bytes: meta.size, version: meta.e_tag })
    }

    /// Writes a file in one request: it is there with all of its bytes, or not at all.
    ///
    /// # Errors
    /// [`Error::Request`].
    pub async fn put(&self, name: &str, bytes: Vec<u8>) -> Result<()> {
        let put = self.store.put(&self.path(name), bytes.into()).await;
        put.map(drop).map_err(|error| self.failed(name, &error))
    }

    /// Copies a local file into the folder, in parts if it is large, and returns its size. It is there with
    /// all of its bytes, or not at all.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Request`].
    pub async fn put_file(&self, name: &str, from: &FilePath) -> Result<u64> {
        let fail = |source| Error::File { path: from.into(), source };
        let mut file = File::open(from).await.map_err(fail)?;
        let bytes = file.metadata().await.map_err(fail)?.len();
        if bytes <= PART_BYTES as u64 {
            let mut all = Vec::new();
            file.read_to_end(&mut all).await.map_err(fail)?;
            return self.put(name, all).await.map(|()| bytes);
        }
        let upload = self.store.put_multipart(&self.path(name)).await;
        let upload = upload.map_err(|error| self.failed(name, &error))?;
        let mut upload = WriteMultipart::new_with_chunk_size(upload, PART_BYTES);
        let mut buffer = vec![0; PART_BYTES];
        loop {
            upload.wait_for_capacity(PARTS_IN_FLIGHT).await.map_err(|error| self.failed(name, &error))?;
            match file.read(&mut buffer).await {
                Ok(0) => break,
                Ok(count) => upload.write(&buffer[..count]),
                Err(source) => {
                    // The store would keep the parts, and charge for them.
                    upload.abort().await.map_err(|error| self.failed(name, &error))?;
                    return Err(fail(source));
                }
            }
        }
        upload.finish().await.map_err(|error| self.failed(name, &error))?;
        Ok(bytes)
    }

    /// The bytes of a file of at most `most` bytes.
    ///
    /// # Errors
    /// [`Error::Large`] or [`Error::Request`].
    pub async fn get(&self, name: &str, most: u64) -> Result<Vec<u8>> {
        let failed = |error: object_store::Error| self.failed(name, &error);
        let found = self.store.get(&self.path(name)).await.map_err(failed)?;
        let bytes = found.meta.size;
        if bytes > most {
            return Err(Error::Large { object: self.address(name), bytes, most });
        }
        Ok(found.bytes().await.map_err(failed)?.into())
    }

    /// Copies a file into a local one, part by part, and shows each part to `seen`.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Request`].
    pub async fn get_file(
        &self,
        name: &str,
        into: &FilePath,
        mut seen: impl FnMut(&[u8]) + Send,
    ) -> Result<u64> {
        let fail = |source| Error::File { path: into.into(), source };
        let failed = |error: object_store::Error| self.failed(name, &error);
        let mut parts = self.store.get(&self.path(name)).await.map_err(failed)?.into_stream();
        let mut file = File::create(into).await.map_err(fail)?;
        let mut bytes = 0;
        while let Some(part) = parts.try_next().await.map_err(failed)? {
            seen(&part);
            bytes += part.len() as u64;
            file.write_all(&part).await.map_err(fail)?;
        }
        file.sync_all().await.map_err(fail)?;
        Ok(bytes)
    }

    /// Removes a file, if it is there.
    ///
    /// # Errors
    /// [`Error::Request`].
    pub async fn remove(&self, name: &str) -> Result<()> {
        match self.store.delete(&self.path(name)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.failed(name, &error)),
        }
    }

    /// The address of a file.
    #[must_use]
    pub fn address(&self, name: &str) -> String {
        if name.is_empty() { self.to_string() } else { format!("{self}/{name}") }
    }

    fn path(&self, name: &str) -> Path {
        name.split('/').filter(|part| !part.is_empty()).fold(self.location.path().clone(), Path::join)
    }

    fn failed(&self, name: &str, error: &object_store::Error) -> Error {
        Error::request(self.address(name), error)
    }
}

impl fmt::Display for ObjectFolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.location.fmt(f)
    }
}
