//! The uncertainty of a validation loss.
//!
//! The sequences of one document are alike: a long document with an odd style shifts the loss more than as
//! many independent sequences would. The standard error is therefore that of a mean of clusters, the
//! documents.

use std::collections::BTreeMap;

/// The standard error of the mean of `losses` (document, loss of a sequence) over all sequences, in the unit
/// of the losses; `None` with fewer than two documents.
///
/// The mean is a ratio of two sums over documents, of losses and of sequences; its variance is that of the
/// ratio's linearization (W. G. Cochran, *Sampling Techniques*, 3rd edition, 1977, equation 6.13, without the
/// correction for finite populations).
#[must_use]
pub fn standard_error(losses: &[(u64, f64)]) -> Option<f64> {
    let mean = losses.iter().map(|(_, loss)| loss).sum::<f64>() / losses.len() as f64;
    let mut deviations: BTreeMap<u64, f64> = BTreeMap::new();
    for (document, loss) in losses {
        *deviations.entry(*document).or_default() += loss - mean;
    }
    let documents = deviations.len() as f64;
    if documents < 2.0 {
        return None;
    }
    let squares: f64 = deviations.values().map(|deviation| deviation * deviation).sum();
    Some((documents / (documents - 1.0) * squares).sqrt() / losses.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn with_one_sequence_per_document_it_is_that_of_a_mean() {
        // The deviation of 1, 2, 3, 4 is sqrt(5/3), and there are four of them.
        let losses: Vec<_> = (1..=4_u32).map(|n| (u64::from(n), f64::from(n))).collect();
        assert!((standard_error(&losses).unwrap() - (5.0_f64 / 3.0).sqrt() / 2.0).abs() < 1e-12);
    }

    #[test]
    fn repeating_the_sequences_of_a_document_adds_no_certainty() {
        let losses = [(1, 2.0), (2, 3.0), (3, 5.0)];
        let repeated: Vec<_> = losses.iter().flat_map(|loss| [*loss; 10]).collect();
        let (once, often) = (standard_error(&losses).unwrap(), standard_error(&repeated).unwrap());
        assert!((once - often).abs() < 1e-12, "{once} {often}");
    }

    #[test]
    fn one_document_has_no_standard_error() {
        assert_eq!(standard_error(&[(1, 2.0), (1, 3.0)]), None);
        assert_eq!(standard_error(&[]), None);
    }
}
