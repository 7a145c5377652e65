//! What the preparation of a corpus has found, in lines for the terminal and the log.

use crate::config::Config;
use crate::units::{counted, short};
use std::fmt::Write as _;
use volary_data::limits::REPLACED_WARNING_SHARE;
use volary_data::mixture::Mixture;
use volary_data::selection::Count;
use volary_data::{HeldOut, Manifest, SourceManifest};

/// One line for each source, and more for what was left out, skipped or replaced.
#[must_use]
pub fn lines(manifest: &Manifest) -> Vec<String> {
    let of_source =
        |source| [Some(summary(source)), dropped(source), bad(source), skipped(source), replaced(source)];
    let duplicates = manifest.duplicates.as_ref().filter(|duplicates| duplicates.clusters > 0);
    let clusters = duplicates.map(|duplicates| {
        let (most, count) = (duplicates.sizes.keys().max().unwrap_or(&0), duplicates.clusters);
        format!("data: {} of copies, of up to {}", counted(count, "cluster"), counted(*most, "document"))
    });
    manifest.sources.iter().flat_map(of_source).flatten().chain(clusters).collect()
}

/// How often all steps of a run read each source.
#[must_use]
pub fn epochs(manifest: &Manifest, config: &Config) -> String {
    let training = &config.training;
    let weights: Vec<f64> = manifest.sources.iter().map(|source| source.weight).collect();
    let mixture = Mixture::new(&weights, config.run.seed);
    let per_step = u128::from(training.lanes) * training.sequences_per_lane as u128;
    let epochs = manifest.epochs(&mixture, u128::from(training.steps) * per_step, training.sequence_length);
    let told: Vec<String> = epochs.iter().map(|(name, epochs)| format!("{name} {epochs:.2} times")).collect();
    format!("data: {} read {}", counted(training.steps, "step"), told.join(", "))
}

fn dropped(source: &SourceManifest) -> Option<String> {
    let reasons = [
        ("of low quality", source.dropped.low_quality),
        ("equal to earlier ones", source.dropped.exact_copies),
        ("nearly equal to earlier ones", source.dropped.near_copies),
    ];
    let reason = |(reason, count): &(&str, Count)| {
        (count.documents > 0).then(|| {
            format!("{} ({} bytes) {reason}", counted(count.documents, "document"), short(count.bytes))
        })
    };
    let told: Vec<String> = reasons.iter().filter_map(reason).collect();
    (!told.is_empty()).then(|| format!("data {}: left out {}", source.name, told.join(", ")))
}

fn bad(source: &SourceManifest) -> Option<String> {
    let count = counted(source.bad_records, "record");
    let hint = "that cannot be read (--strict stops at the first)";
    (source.bad_records > 0).then(|| format!("data {}: skipped {count} {hint}", source.name))
}

fn summary(source: &SourceManifest) -> String {
    let (train, held_out) = (source.train.tokens, source.validation.tokens);
    let share = 100.0 * held_out as f64 / (train + held_out).max(1) as f64;
    let mut line = format!(
        "data {}: {}, {}; {} tokens for training, {} held out ({share:.1} %{})",
        source.name,
        counted(source.files, "file"),
        counted(source.documents, "document"),
        short(train),
        short(held_out),
        if source.held_out == HeldOut::Tail { ", the end of the text" } else { "" },
    );
    let near = source.near_duplicates;
    let fate = if near.left_out { "left out" } else { "kept: they are most of the text" };
    if near.documents > 0 && source.held_out == HeldOut::Documents {
        let count = counted(near.documents, "near-duplicate");
        let _ = write!(line, "; {count} of held-out documents ({} tokens) {fate}", short(near.tokens));
    }
    line
}

fn skipped(source: &SourceManifest) -> Option<String> {
    let total = source.skipped.iter().map(|skipped| skipped.files).sum();
    let most = source.skipped.iter().max_by_key(|skipped| skipped.files)?;
    let others = if source.skipped.len() > 1 { "mostly " } else { "" };
    let (files, example) = (counted(total, "file"), &most.example);
    Some(format!(
        "data {}: skipped {files}, {others}because: {}, such as {example}",
        source.name, most.reason
    ))
}

fn replaced(source: &SourceManifest) -> Option<String> {
    let count = source.replaced_utf8;
    let share = count as f64 / source.bytes.max(1) as f64;
    let warning = match share > REPLACED_WARNING_SHARE {
        true => "; warning: this text may have another encoding than UTF-8 (--strict names the first file)",
        false => "",
    };
    let sequences = counted(count, "byte sequence");
    (count > 0).then(|| format!("data {}: replaced {sequences} that are not UTF-8{warning}", source.name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use volary_data::manifest::{NearDuplicates, TokenFileRecord};
    use volary_data::selection::Dropped;
    use volary_data::skipped::Skipped;

    fn manifest(change: impl FnOnce(&mut SourceManifest)) -> Manifest {
        let record = |tokens| TokenFileRecord { tokens, blake3: String::new() };
        let mut source = SourceManifest {
            name: "web".into(),
            weight: 1.0,
            files: 1,
            documents: 200,
            bytes: 1_000_000,
            replaced_utf8: 0,
            skipped: Vec::new(),
            bad_records: 0,
            dropped: Dropped::default(),
            held_out: HeldOut::Documents,
            near_duplicates: NearDuplicates::default(),
            train: record(9_900),
            validation: record(100),
        };
        change(&mut source);
        Manifest {
            version: 1,
            tokenizer: String::new(),
            vocabulary: 300,
            end_of_text: 0,
            sources: vec![source],
            duplicates: None,
        }
    }

    #[test]
    fn a_source_is_told_in_one_line() {
        let lines = lines(&manifest(|_| {}));
        assert_eq!(lines.len(), 1);
        assert!(lines[0].contains("1 file, 200 documents") && lines[0].contains("(1.0 %)"), "{}", lines[0]);
    }

    #[test]
    fn skipped_files_and_replaced_bytes_are_told_and_many_are_warned_of() {
        let change = |source: &mut SourceManifest| {
            let skipped =
                |reason: &str, files| Skipped { reason: reason.into(), files, example: "a.png".into() };
            source.skipped = vec![skipped("binary data", 1), skipped("no known type (.png)", 7)];
            source.replaced_utf8 = 5_000;
            source.near_duplicates = NearDuplicates { documents: 3, tokens: 90, left_out: true };
        };
        let text = lines(&manifest(change)).join("\n");
        for part in ["skipped 8 files", "no known type (.png)", "a.png", "warning", "3 near-duplicates"] {
            assert!(text.contains(part), "{text}");
        }
        let filtered = lines(&manifest(|source| {
            source.bad_records = 2;
            source.dropped.low_quality = Count { documents: 7, bytes: 12_000 };
            source.dropped.near_copies = Count { documents: 1, bytes: 10 };
        }));
        let text = filtered.join("\n");
        for part in
            ["7 documents (12.000k bytes) of low quality", "1 document (10 bytes) nearly", "2 records that"]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
        let few = lines(&manifest(|source| source.replaced_utf8 = 1)).join("\n");
        assert!(few.contains("1 byte sequence that") && !few.contains("warning"), "{few}");
    }
}
