//! Exact match and F1 of a completion, as SQuAD's evaluation computes them (Rajpurkar et al., arXiv
//! 1606.05250, section 6.1).

/// Whether a completion is one of the answers, but for case, punctuation, articles and white space.
pub(super) fn is_exact(completion: &str, answers: &[String]) -> bool {
    let completion = normalized(completion);
    answers.iter().any(|answer| normalized(answer) == completion)
}

/// The best F1 of the completion's words with those of an answer, from 0 to 1.
pub(super) fn f1(completion: &str, answers: &[String]) -> f64 {
    answers.iter().map(|answer| f1_of(&normalized(completion), &normalized(answer))).fold(0.0, f64::max)
}

fn f1_of(completion: &[String], answer: &[String]) -> f64 {
    if completion.is_empty() || answer.is_empty() {
        return f64::from(u8::from(completion.is_empty() && answer.is_empty()));
    }
    let mut left = answer.to_vec();
    let mut common = 0;
    for word in completion {
        if let Some(at) = left.iter().position(|other| other == word) {
            left.swap_remove(at);
            common += 1;
        }
    }
    2.0 * f64::from(common) / (completion.len() + answer.len()) as f64
}

/// The words of a text in lower case, without ASCII punctuation and articles.
fn normalized(text: &str) -> Vec<String> {
    let text: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    text.split_whitespace().filter(|word| !matches!(*word, "a" | "an" | "the")).map(Into::into).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(list: &[&str]) -> Vec<String> {
        list.iter().map(|&answer| answer.into()).collect()
    }

    #[test]
    fn case_punctuation_and_articles_do_not_count() {
        assert!(is_exact(" The Eiffel-Tower. ", &answers(&["Louvre", "eiffeltower"])));
        assert!(!is_exact("Eiffel", &answers(&["Eiffel Tower"])));
    }

    #[test]
    fn f1_is_that_of_words_with_their_repetitions() {
        // Two common words; 2 * 2 / (3 + 4).
        assert_eq!(f1("the red red house", &answers(&["green", "red house by sea"])), 4.0 / 7.0);
        assert_eq!(f1("x", &answers(&["y"])), 0.0);
        assert_eq!(f1("", &answers(&["the"])), 1.0);
        assert_eq!(f1("", &answers(&["y"])), 0.0);
    }
}
