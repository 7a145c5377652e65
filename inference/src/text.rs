//! From tokens to text, piece by piece, and strings that end a text.

use crate::error::{Error, Result};
use crate::limits::{DECODED_BEFORE, STOP_STRINGS};
use volary_data::Tokenizer;

/// The text that tokens add to a prompt, as they come.
///
/// A token is decoded together with some before it, since a decoder may drop a space at the start of a text.
/// Bytes of a character that is not complete yet wait for the next token.
#[derive(Debug)]
pub struct TextStream {
    tokenizer: Tokenizer,
    /// Tokens whose text was returned, then new ones.
    ids: Vec<u32>,
    /// The number of those whose text was returned.
    read: usize,
}

impl TextStream {
    /// The text after a prompt.
    #[must_use]
    pub fn after(tokenizer: Tokenizer, prompt: &[u32]) -> Self {
        let ids = prompt[prompt.len().saturating_sub(DECODED_BEFORE)..].to_vec();
        Self { tokenizer, read: ids.len(), ids }
    }

    /// The text that a token completes, which may be empty.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer's decoder fails.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.new_text()?;
        if text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        self.read = self.ids.len();
        // The next token needs no more than a few of them.
        let unneeded = self.read.saturating_sub(DECODED_BEFORE);
        self.ids.drain(..unneeded);
        self.read -= unneeded;
        Ok(text)
    }

    /// The rest, with U+FFFD for an incomplete character.
    ///
    /// # Errors
    /// As [`TextStream::push`].
    pub fn finish(&mut self) -> Result<String> {
        let text = if self.read == self.ids.len() { String::new() } else { self.new_text()? };
        self.read = self.ids.len();
        Ok(text)
    }

    fn new_text(&self) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[..self.read])?;
        let all = self.tokenizer.decode(&self.ids)?;
        // A prompt may end within a character, which the continuation completes.
        let before = before.trim_end_matches(char::REPLACEMENT_CHARACTER);
        match all.strip_prefix(before) {
            Some(text) => Ok(text.into()),
            None => Ok(self.tokenizer.decode(&self.ids[self.read..])?),
        }
    }
}

/// Strings that end a text, wherever the pieces of the text are cut.
#[derive(Clone, Debug, Default)]
pub struct StopStrings {
    strings: Vec<String>,
    /// Text that may be the start of one of them.
    held: String,
}

impl StopStrings {
    /// The strings that end a text.
    ///
    /// # Errors
    /// [`Error::StopStrings`] for too many or an empty one.
    pub fn new(strings: Vec<String>) -> Result<Self> {
        if strings.len() > STOP_STRINGS || strings.iter().any(String::is_empty) {
            return Err(Error::StopStrings { found: strings.len() });
        }
        Ok(Self { strings, held: String::new() })
    }

    /// Adds text. Returns what is certain to precede any stop string, and whether one was found.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        if let Some(at) = first_stop(&self.held, &self.strings) {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let is_start = |&at: &usize| {
            let rest = &self.held[at..];
            self.strings.iter().any(|stop| stop.starts_with(rest))
        };
        let starts = (0..self.held.len()).filter(|&at| self.held.is_char_boundary(at)).find(is_start);
        let rest = self.held.split_off(starts.unwrap_or(self.held.len()));
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// The text that was held back, at the end of the tokens.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// The start of the stop string that is complete first.
fn first_stop(text: &str, stops: &[String]) -> Option<usize> {
    let found = stops.iter().filter_map(|stop| text.find(stop.as_str()).map(|at| (at + stop.len(), at)));
    found.min().map(|(_, at)| at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pushed(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut stop = StopStrings::new(stops.iter().map(|&s| s.into()).collect()).unwrap();
        let mut text = String::new();
        for piece in pieces {
            let (new, found) = stop.push(piece);
            text.push_str(&new);
            if found {
                return (text, true);
            }
        }
        text.push_str(&stop.finish());
        (text, false)
    }

    #[test]
    fn a_stop_string_ends_the_text_before_it_wherever_it_is_cut() {
        assert_eq!(pushed(&["\n\n"], &["a\n", "b\n", "\nc"]), ("a\nb".into(), true));
        assert_eq!(pushed(&["END", "ND"], &["x E", "N", "Dx"]), ("x ".into(), true));
        assert_eq!(pushed(&["END"], &["x E", "N"]), ("x EN".into(), false));
        assert_eq!(pushed(&[], &["a", "b"]), ("ab".into(), false));
        assert!(StopStrings::new(vec![String::new()]).is_err());
        assert!(StopStrings::new(vec!["x".into(); STOP_STRINGS + 1]).is_err());
    }

    proptest! {
        /// As if the whole text had been searched.
        #[test]
        fn pieces_give_the_text_of_the_whole(
            pieces in prop::collection::vec("[abé]{0,3}", 0..8),
            stops in prop::collection::vec("[abé]{1,3}", 0..3),
        ) {
            let whole = pieces.concat();
            // Of all prefixes of the text, the shortest with a stop string ends it.
            let ends = (0..=whole.len()).filter(|&end| whole.is_char_boundary(end));
            let starts = ends.flat_map(|end| stops.iter().map(move |stop| (end, stop)))
                .filter(|(end, stop)| whole[..*end].ends_with(stop.as_str()))
                .map(|(end, stop)| (end, end - stop.len()));
            let first = starts.min().map(|(_, start)| start);
            let expected = (whole[..first.unwrap_or(whole.len())].to_owned(), first.is_some());
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            prop_assert_eq!(pushed(&stops, &pieces), expected);
        }
    }
}
