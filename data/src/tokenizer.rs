//! The tokenizer: a byte-level BPE trained on a sample of the corpus, or a given `tokenizer.json`.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::{AddedToken, Tokenizer as Inner};

use crate::error::Error;
use crate::limits::{ENCODE_CHUNK_BYTES, MAX_JSON_BYTES, MAX_THREADS, MAX_TRAINED_WORD_BYTES};

/// The token that ends every document; id 0 in a trained tokenizer.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// The names of the end of text in given tokenizers, the most likely first.
const ENDS_OF_TEXT: &[&str] =
    &[END_OF_TEXT, "<|end_of_text|>", "<eos>", "</s>", "<|eos|>", "[EOS]", "<|im_end|>", "[SEP]"];

/// Converts text to token ids and back. Clones are cheap; threads may share it.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
    /// The file, byte for byte; the fingerprint is the hash of these bytes.
    json: Arc<[u8]>,
    vocabulary: usize,
    end_of_text: u32,
    /// Whether every text can be cut before a single space without a change of its tokens.
    splits_at_spaces: bool,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokenizer({} tokens, {})", self.vocabulary, self.fingerprint())
    }
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::Tokenizer(error.to_string())
}

impl Tokenizer {
    /// Trains a byte-level BPE of at most `vocabulary` tokens: the end of text (id 0), the 256 bytes, then
    /// merges.
    ///
    /// The same texts in the same order give the same tokenizer, bit for bit. A small sample may give a
    /// smaller vocabulary. Every text can be encoded and decodes to itself.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the training fails.
    pub fn train(texts: impl Iterator<Item = String> + Send, vocabulary: usize) -> Result<Self, Error> {
        let trainer = BpeTrainer::builder()
            .show_progress(false)
            .vocab_size(vocabulary)
            .min_frequency(2)
            .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        let mut inner = Inner::new(BPE::default());
        inner.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
        inner.with_decoder(Some(ByteLevel::new(false, true, true)));
        let pieces = texts.flat_map(|text| pieces(&text).map(String::from).collect::<Vec<_>>());
        inner.train(&mut TrainerWrapper::from(trainer), pieces).map_err(failed)?;
        let json = inner.to_string(true).map_err(failed)?;
        Self::from_json(json.into_bytes())
    }

    /// Loads a `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::Read`], and [`Error::Tokenizer`] for a file that is too large, malformed or without a token
    /// for the end of text.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let size = fs::metadata(path).map_err(Error::read(path))?.len();
        if size > MAX_JSON_BYTES {
            return Err(failed(format_args!(
                "{}: {size} bytes: expected at most {MAX_JSON_BYTES}",
                path.display()
            )));
        }
        let json = fs::read(path).map_err(Error::read(path))?;
        Self::from_json(json).map_err(|error| match error {
            Error::Tokenizer(reason) => failed(format_args!("{}: {reason}", path.display())),
            other => other,
        })
    }

    fn from_json(json: Vec<u8>) -> Result<Self, Error> {
        // The library panics on some malformed JSON, and on some JSON that is not a tokenizer.
        let _: serde_json::Value = serde_json::from_slice(&json).map_err(failed)?;
        let read = std::panic::catch_unwind(|| Inner::from_bytes(&json));
        let mut inner = read.map_err(|_| failed("not a tokenizer"))?.map_err(failed)?;
        inner.with_truncation(None).map_err(failed)?;
        inner.with_padding(None);
        // A special token spelled out in the text is text: it must not end a document.
        inner.set_encode_special_tokens(true);
        let end_of_text = ENDS_OF_TEXT.iter().find_map(|token| inner.token_to_id(token));
        let end_of_text = end_of_text.ok_or_else(|| {
            failed(format_args!("no token for the end of text: expected one of {ENDS_OF_TEXT:?}"))
        })?;
        let last = inner.get_vocab(true).into_values().max().unwrap_or(0);
        let splits_at_spaces = splits_at_spaces(&inner);
        let (inner, json, vocabulary) = (Arc::new(inner), json.into(), last as usize + 1);
        Ok(Self { inner, json, vocabulary, end_of_text, splits_at_spaces })
    }

    /// Writes the `tokenizer.json` for [`load`](Self::load); a loaded file is reproduced byte for byte.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn save(&self, path: &Path) -> Result<(), Error> {
        fs::write(path, &self.json).map_err(Error::write(path))
    }

    /// The number of rows of an embedding: one more than the largest id.
    #[must_use]
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// The id that ends every document.
    #[must_use]
    pub fn end_of_text(&self) -> u32 {
        self.end_of_text
    }

    /// The BLAKE3 hash of the `tokenizer.json`, in hex.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        blake3::hash(&self.json).to_hex().to_string()
    }

    /// The tokens of a text; no special token is added, and special tokens spelled out in the text are plain
    /// text.
    ///
    /// Long texts are encoded in chunks if that gives the tokens of the whole. Byte-level BPE ends a word
    /// before a single space or line end in any case; a tokenizer of another make sees a text as a whole.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer cannot represent the text; a byte-level tokenizer represents
    /// every text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        let mut ids = Vec::new();
        for chunk in self.chunks(text) {
            ids.extend(self.encode_chunk(chunk)?);
        }
        Ok(ids)
    }

    /// Splits a text into chunks of about `ENCODE_CHUNK_BYTES`.
    fn chunks<'a>(&self, mut text: &'a str) -> impl Iterator<Item = &'a str> + use<'a> {
        let splits = self.splits_at_spaces;
        std::iter::from_fn(move || {
            if text.is_empty() {
                return None;
            }
            let (chunk, rest) = text.split_at(if splits { chunk_end(text) } else { text.len() });
            text = rest;
            Some(chunk)
        })
    }

    fn encode_chunk(&self, chunk: &str) -> Result<Vec<u32>, Error> {
        Ok(self.inner.encode_fast(chunk, false).map_err(failed)?.get_ids().to_vec())
    }

    /// The tokens of several texts, computed by a few threads; equal to [`encode`](Self::encode) of each.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_batch<T: AsRef<str> + Sync>(&self, texts: &[T]) -> Result<Vec<Vec<u32>>, Error> {
        let mut work = Vec::new();
        for (at, text) in texts.iter().enumerate() {
            work.extend(self.chunks(text.as_ref()).map(|chunk| (at, chunk)));
        }
        let next = AtomicUsize::new(0);
        let threads =
            thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS).min(work.len().max(1));
        let encode = || {
            let mut done = Vec::new();
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let Some((_, chunk)) = work.get(at) else { break };
                done.push((at, self.encode_chunk(chunk)?));
            }
            Ok::<_, Error>(done)
        };
        let results: Vec<_> = thread::scope(|scope| {
            let handles: Vec<_> = (0..threads).map(|_| scope.spawn(encode)).collect();
            handles.into_iter().map(|handle| handle.join()).collect()
        });
        let mut encoded = vec![Vec::new(); work.len()];
        for result in results {
            for (at, ids) in result.map_err(|_| failed("an encoding thread panicked"))?? {
                encoded[at] = ids;
            }
        }
        let mut all = vec![Vec::new(); texts.len()];
        for ((at, _), ids) in work.iter().zip(encoded) {
            all[*at].extend(ids);
        }
        Ok(all)
    }

    /// The text of some tokens, without special tokens; bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the decoder of the tokenizer fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String, Error> {
        self.inner.decode(ids, true).map_err(failed)
    }

    /// The text that `continuation` adds after `prompt`, decoded with it: a decoder may drop a space at the
    /// start of a text, and a character may have bytes in both.
    ///
    /// # Errors
    /// As [`decode`](Self::decode).
    pub fn decode_continuation(&self, prompt: &[u32], continuation: &[u32]) -> Result<String, Error> {
        let (before, whole) = (self.decode(prompt)?, self.decode(&[prompt, continuation].concat())?);
        match whole.strip_prefix(&before) {
            Some(added) => Ok(added.into()),
            None => self.decode(continuation),
        }
    }

    /// One token for display: its text, or its raw name if it is special or a part of a character.
    #[must_use]
    pub fn token(&self, id: u32) -> String {
        match self.inner.decode(&[id], false) {
            Ok(text) if !text.is_empty() && !text.contains(char::REPLACEMENT_CHARACTER) => text,
            _ => self.inner.id_to_token(id).unwrap_or_else(|| format!("<{id}>")),
        }
    }
}

/// Whether words are split as GPT-2 splits them, without changes to the text before. Added tokens that are
/// not special are found in the text before it is split into words.
fn splits_at_spaces(inner: &Inner) -> bool {
    let is_gpt2 = match inner.get_pre_tokenizer() {
        Some(PreTokenizerWrapper::ByteLevel(level)) => level.use_regex && !level.add_prefix_space,
        _ => false,
    };
    let all_special = inner.get_added_tokens_decoder().values().all(|token| token.special);
    is_gpt2 && all_special && inner.get_normalizer().is_none()
}

/// The end of the first chunk: the first break beyond its size, or the end of the text.
fn chunk_end(text: &str) -> usize {
    let bytes = text.as_bytes();
    // White space beyond ASCII has no graphic ASCII bytes, so it cannot be next to such a break.
    let is_break = |&at: &usize| {
        matches!(bytes[at], b' ' | b'\n')
            && bytes[at - 1].is_ascii_graphic()
            && bytes[at + 1].is_ascii_graphic()
    };
    (ENCODE_CHUNK_BYTES..text.len().saturating_sub(1)).find(is_break).unwrap_or(text.len())
}

/// A text for the trainer in pieces, none of which holds a longer word than `MAX_TRAINED_WORD_BYTES`; a usual
/// text is one piece.
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut cuts = Vec::new();
    let (mut start, mut is_space) = (0, false);
    for (at, c) in text.char_indices() {
        if c.is_whitespace() != is_space {
            (start, is_space) = (at, c.is_whitespace());
        } else if at - start >= MAX_TRAINED_WORD_BYTES {
            cuts.push(at);
            start = at;
        }
    }
    cuts.push(text.len());
    let mut from = 0;
    cuts.into_iter().map(move |cut| &text[std::mem::replace(&mut from, cut)..cut])
}

/// The last character boundary at or before byte `at`, which must be within the text.
pub(crate) fn floor_boundary(text: &str, at: usize) -> usize {
    (0..=at).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0)
}
