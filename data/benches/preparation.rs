//! Text per second and core of each stage of the preparation, on the sources of this machine's crates.
//! `cargo bench -p volary-data --bench preparation`; with `VOLARY_PYTHON` (a Python with `datatrove` and
//! `tokenizers`), beside the same stages there, on the same documents and with the same tokenizer.
#![expect(clippy::expect_used, reason = "a benchmark")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::time::{ClockId, clock_gettime};
use volary_data::duplicates::DuplicateOptions;
use volary_data::quality::{QualityOptions, TrainingOptions, train};
use volary_data::{DataOptions, PreparationStage, Source, SourceOptions, prepare};

const ROUNDS: usize = 3;
const TEXT_BYTES: u64 = 24 << 20;

fn main() {
    let folder = tempfile::tempdir().expect("a folder");
    let documents = folder.path().join("documents.jsonl");
    let bytes = write_documents(&documents);
    let classifier = folder.path().join("quality.safetensors");
    let source = |path: &Path| Source::find(&options_of(path)).expect("a source");
    let positive = [Source::find(&SourceOptions::new("positive", registry("md"))).expect("a source")];
    let trained = train(&positive, &[source(&documents)], &TrainingOptions::default()).expect("a classifier");
    trained.classifier.save(&classifier).expect("a file");

    let plain = DataOptions { sources: vec![options_of(&documents)], ..DataOptions::default() };
    let exact = DuplicateOptions { near: false, ..DuplicateOptions::default() };
    let filtering = PreparationStage::Filtering;
    let stages: [(&str, DataOptions, PreparationStage); 4] = [
        (
            "quality filter",
            DataOptions { quality: Some(QualityOptions::new(classifier)), ..plain.clone() },
            filtering,
        ),
        ("exact copies", DataOptions { duplicates: Some(exact), ..plain.clone() }, filtering),
        (
            "near-duplicates",
            DataOptions { duplicates: Some(DuplicateOptions::default()), ..plain.clone() },
            filtering,
        ),
        ("tokenizing", plain, PreparationStage::Tokenizing),
    ];
    println!(
        "{:.1} MB of text; MB of text for each second of processor time, the median of {ROUNDS}",
        bytes / 1e6
    );
    let reading = median(|| {
        let began = processor_s();
        source(&documents).documents(false).for_each(|document| drop(document.expect("a document")));
        processor_s() - began
    });
    println!("reading: {:.1}", bytes / 1e6 / reading);
    for (name, options, stage) in &stages {
        let seconds = median(|| stage_s(options, *stage, folder.path()));
        println!("{name}: {:.1}", bytes / 1e6 / seconds);
    }
    match std::env::var_os("VOLARY_PYTHON") {
        Some(python) => {
            let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/preparation.py");
            let mut command = Command::new(python);
            command.arg(script).arg(&documents).arg(folder.path().join("run/tokenizer.json"));
            assert!(command.status().expect("Python").success());
        }
        None => println!("no VOLARY_PYTHON: without a comparison"),
    }
}

fn registry(extension: &str) -> String {
    let home = std::env::var("CARGO_HOME").unwrap_or_else(|_| "~/.cargo".into());
    format!("{home}/registry/src/**/*.{extension}")
}

fn options_of(path: &Path) -> SourceOptions {
    SourceOptions::new("documents", path.display().to_string())
}

/// One file of documents for both sides; returns the size of their text.
fn write_documents(path: &Path) -> f64 {
    let options = SourceOptions { max_bytes: Some(TEXT_BYTES), ..SourceOptions::new("code", registry("rs")) };
    let source = Source::find(&options).expect("sources of crates");
    let mut file = std::io::BufWriter::new(std::fs::File::create(path).expect("a file"));
    let mut bytes = 0;
    for document in source.documents(false) {
        let text = document.expect("a document").text;
        bytes += text.len();
        writeln!(file, "{}", serde_json::json!({ "text": text })).expect("a line");
    }
    file.flush().expect("a file");
    bytes as f64
}

fn processor_s() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn median(mut measure: impl FnMut() -> f64) -> f64 {
    let mut values: Vec<f64> = (0..ROUNDS).map(|_| measure()).collect();
    values.sort_by(f64::total_cmp);
    values[ROUNDS / 2]
}

/// The processor time of one stage, reading included.
fn stage_s(options: &DataOptions, stage: PreparationStage, folder: &Path) -> f64 {
    let (run, cache): (PathBuf, PathBuf) = (folder.join("run"), folder.join("cache"));
    for path in [&run, &cache] {
        drop(std::fs::remove_dir_all(path));
    }
    let options = DataOptions { cache: Some(cache), ..options.clone() };
    let (mut began, mut ended) = (None, None);
    let mut progress = |now: volary_data::Progress| match (now.stage == stage, began, ended) {
        (true, None, _) => began = Some(processor_s()),
        (false, Some(_), None) => ended = Some(processor_s()),
        _ => {}
    };
    prepare(&options, 128, &run, &mut progress).expect("a corpus");
    ended.unwrap_or_else(processor_s) - began.expect("the stage")
}
