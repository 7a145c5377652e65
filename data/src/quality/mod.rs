//! The quality filter: a linear classifier on hashed n-grams, and the sample of pages that its scores give.
//!
//! GLaM trains a classifier that tells curated text from other pages, and samples pages by their scores with
//! a Pareto distribution so that some of lower quality stay (arXiv 2112.06905, section 3; the form is
//! GPT-3's, arXiv 2005.14165, appendix A). What a document becomes depends on its text alone.

mod classifier;
mod evaluation;
mod options;
mod sampling;
mod training;

pub use classifier::{Classifier, Contribution, Features};
pub use evaluation::{CalibrationBin, Evaluation};
pub use options::QualityOptions;
pub use sampling::{is_kept, keep_probability};
pub use training::{Trained, TrainingOptions, train};
