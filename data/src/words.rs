//! Words of a text, as hashes: what the quality filter and the search for near-duplicates compare.
//!
//! A word is a run of letters and digits in lower case. The hashes are stable: they depend on neither the
//! machine nor the version of the program.

/// A word or a mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Word {
    /// The hash of its text in lower case.
    pub(crate) hash: u64,
    /// The position of its first byte in the text.
    pub(crate) start: usize,
    /// The position after its last byte.
    pub(crate) end: usize,
}

/// The words of a text, in order; with `marks`, each other character but white space is a word as well.
pub(crate) fn words(text: &str, marks: bool) -> impl Iterator<Item = Word> {
    let mut characters = text.char_indices().peekable();
    std::iter::from_fn(move || {
        let belongs = |c: char| c.is_alphanumeric();
        let (start, first) = characters.find(|(_, c)| belongs(*c) || marks && !c.is_whitespace())?;
        let (mut hash, mut end) = (with_character(BASIS, first), start + first.len_utf8());
        if belongs(first) {
            while let Some((at, c)) = characters.next_if(|(_, c)| belongs(*c)) {
                hash = with_character(hash, c);
                end = at + c.len_utf8();
            }
        }
        Some(Word { hash: mixed(hash), start, end })
    })
}

/// The hash of a sequence of words, from their hashes.
pub(crate) fn sequence_hash(words: &[Word]) -> u64 {
    // An odd factor keeps the order: "a b" and "b a" are two sequences.
    let step = |hash: u64, word: &Word| mixed(hash.wrapping_mul(PRIME) ^ word.hash);
    words.iter().fold(words.len() as u64, step)
}

/// FNV-1a, 64 bits: the offset basis and the prime.
const BASIS: u64 = 0xcbf2_9ce4_8422_2325;
const PRIME: u64 = 0x0100_0000_01b3;

fn with_character(hash: u64, c: char) -> u64 {
    let add = |hash: u64, c: char| {
        let mut bytes = [0; 4];
        let bytes = c.encode_utf8(&mut bytes).bytes();
        bytes.fold(hash, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(PRIME))
    };
    match c {
        ..'\u{80}' => add(hash, c.to_ascii_lowercase()),
        _ => c.to_lowercase().fold(hash, add),
    }
}

/// The finalizer of SplitMix64: every bit depends on every bit.
pub(crate) fn mixed(hash: u64) -> u64 {
    let hash = (hash ^ hash >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let hash = (hash ^ hash >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ hash >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(text: &str, marks: bool) -> Vec<&str> {
        words(text, marks).map(|word| &text[word.start..word.end]).collect()
    }

    #[test]
    fn words_are_runs_of_letters_and_digits_and_marks_stand_alone() {
        let text = " It's 3.5\tÄpfel—x_1!\n";
        assert_eq!(texts(text, false), ["It", "s", "3", "5", "Äpfel", "x", "1"]);
        assert_eq!(texts(text, true), ["It", "'", "s", "3", ".", "5", "Äpfel", "—", "x", "_", "1", "!"]);
        assert_eq!(texts("", true), [""; 0]);
        assert_eq!(texts(" \n", true), [""; 0]);
    }

    #[test]
    fn case_does_not_matter_and_the_order_of_a_sequence_does() {
        let hashes = |text: &str| words(text, false).collect::<Vec<_>>();
        let same = |a: &str, b: &str| sequence_hash(&hashes(a)) == sequence_hash(&hashes(b));
        assert!(same("Straße ÄRGER, don", "straße ärger – DON"));
        assert!(!same("one two", "two one"));
        assert!(!same("one two", "onetwo"));
        assert!(!same("one", "one one"));
    }

    #[test]
    fn hashes_are_those_of_every_machine() {
        let hash = |text| words(text, false).next().map(|word| word.hash);
        // FNV-1a of "a" is af63dc4c8601ec8c (its authors' test vectors).
        assert_eq!(hash("A"), Some(mixed(0xaf63_dc4c_8601_ec8c)));
        assert_eq!(hash("foobar"), Some(mixed(0x8594_4171_f739_67e8)));
    }
}
