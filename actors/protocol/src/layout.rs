//! Layouts on the control stream: each is sent as its difference from the one before it on the same stream.
//!
//! The stream is ordered and reliable, so that both ends know what the one before was. A new connection
//! begins with a whole layout. The difference is what zstd writes with the layout before as its prefix.

use crate::limits::{LAYOUT_BYTES_MAX, PATCH_LEVEL, PATCH_WINDOW_LOG, PATCHES_KEPT};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::Arc;
use volary_core::Digest;
use volary_core::layout::Layout;
use volary_core::messages::Assignment;
use volary_core::shared::{Encoded, Shared};
use zstd::zstd_safe::{CCtx, CParameter, DCtx, DParameter, compress_bound, get_error_name};

/// A layout as its difference from another one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayoutPatch {
    /// Bytes of the encoded layout.
    length: u32,
    /// The digest of the encoded layout.
    digest: Digest,
    /// A zstd frame, whose prefix is the layout before.
    frame: Vec<u8>,
}

/// A layout that cannot be sent or read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a layout {0}")]
pub struct LayoutError(String);

impl LayoutError {
    fn zstd(what: &'static str) -> impl Fn(usize) -> Self {
        move |code| Self(format!("cannot be {what}: {}", get_error_name(code)))
    }

    fn encoding(error: postcard::Error) -> Self {
        Self(format!("is malformed: {error}"))
    }
}

/// The last patches, for the many streams that need the same one.
#[derive(Debug, Default)]
pub struct Patches(Mutex<VecDeque<Kept>>);

#[derive(Clone, Debug)]
struct Kept {
    base: Option<Digest>,
    patch: Arc<LayoutPatch>,
}

impl Patches {
    /// The patch from one layout to another, made once.
    fn patch(&self, base: Option<&Encoded>, layout: &Encoded) -> Result<Arc<LayoutPatch>, LayoutError> {
        let from = base.map(|base| base.digest);
        // All who wait here want the patch that is being made, most likely.
        let mut kept = self.0.lock();
        if let Some(kept) = kept.iter().find(|kept| kept.base == from && kept.patch.digest == layout.digest) {
            return Ok(Arc::clone(&kept.patch));
        }
        let patch = Arc::new(LayoutPatch::new(base.map_or(&[], |base| &base.bytes), layout)?);
        if kept.len() == PATCHES_KEPT {
            kept.pop_front();
        }
        kept.push_back(Kept { base: from, patch: Arc::clone(&patch) });
        Ok(patch)
    }
}

impl LayoutPatch {
    fn new(base: &[u8], layout: &Encoded) -> Result<Self, LayoutError> {
        if layout.bytes.len() > LAYOUT_BYTES_MAX {
            return Err(LayoutError(format!("of {} bytes is too large", layout.bytes.len())));
        }
        let failed = LayoutError::zstd("compressed");
        let mut context = CCtx::create();
        context.set_parameter(CParameter::CompressionLevel(PATCH_LEVEL)).map_err(&failed)?;
        context.set_parameter(CParameter::WindowLog(PATCH_WINDOW_LOG)).map_err(&failed)?;
        context.ref_prefix(base).map_err(&failed)?;
        let mut frame = Vec::with_capacity(compress_bound(layout.bytes.len()));
        context.compress2(&mut frame, &layout.bytes).map_err(&failed)?;
        frame.shrink_to_fit();
        let length = u32::try_from(layout.bytes.len()).unwrap_or(u32::MAX);
        Ok(Self { length, digest: layout.digest, frame })
    }

    /// The encoded layout.
    fn apply(&self, base: &[u8]) -> Result<Vec<u8>, LayoutError> {
        let length = self.length as usize;
        if length > LAYOUT_BYTES_MAX {
            return Err(LayoutError(format!("of {length} bytes is too large")));
        }
        let failed = LayoutError::zstd("decompressed");
        let mut context = DCtx::create();
        context.set_parameter(DParameter::WindowLogMax(PATCH_WINDOW_LOG)).map_err(&failed)?;
        context.ref_prefix(base).map_err(&failed)?;
        let mut bytes = Vec::with_capacity(length);
        context.decompress(&mut bytes, &self.frame).map_err(&failed)?;
        match bytes.len() == length && Digest::of(&bytes) == self.digest {
            true => Ok(bytes),
            false => Err(LayoutError("is not the one that was sent".into())),
        }
    }
}

/// The sending end of one stream.
#[derive(Debug)]
pub struct LayoutSender {
    patches: Arc<Patches>,
    last: Option<Shared<Layout>>,
}

impl LayoutSender {
    /// A stream on which no layout was sent yet.
    #[must_use]
    pub fn new(patches: Arc<Patches>) -> Self {
        Self { patches, last: None }
    }

    /// The patch that is to go ahead of an assignment.
    ///
    /// # Errors
    /// A layout larger than [`LAYOUT_BYTES_MAX`].
    pub fn patch(&mut self, assignment: &Assignment) -> Result<LayoutPatch, LayoutError> {
        let base = self.last.as_ref().map(Shared::encoded).transpose().map_err(LayoutError::encoding)?;
        let layout = assignment.layout.encoded().map_err(LayoutError::encoding)?;
        let patch = self.patches.patch(base, layout)?;
        self.last = Some(assignment.layout.clone());
        Ok(LayoutPatch::clone(&patch))
    }
}

/// The receiving end of one stream.
#[derive(Debug, Default)]
pub struct LayoutReceiver {
    last: Vec<u8>,
    next: Option<Shared<Layout>>,
}

impl LayoutReceiver {
    /// Takes a patch.
    ///
    /// # Errors
    /// A patch that is not one of the layout before, or is malformed.
    pub fn receive(&mut self, patch: &LayoutPatch) -> Result<(), LayoutError> {
        let bytes = patch.apply(&self.last)?;
        self.next = Some(Shared::new(postcard::from_bytes(&bytes).map_err(LayoutError::encoding)?));
        self.last = bytes;
        Ok(())
    }

    /// Gives an assignment the layout that came ahead of it.
    ///
    /// # Errors
    /// An assignment without a layout.
    pub fn complete(&mut self, assignment: &mut Assignment) -> Result<(), LayoutError> {
        let missing = || LayoutError("did not come ahead of its assignment".into());
        assignment.layout = self.next.take().ok_or_else(missing)?;
        Ok(())
    }
}

#[cfg(test)]
#[path = "layout_tests.rs"]
mod tests;
