//! Every format is read as written, and errors name the broken file.
#![allow(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

mod common;

use common::{document, gzip, jsonl, parquet, source, write};
use tempfile::tempdir;
use volary_data::{Error, Source, SourceOptions};

fn texts(options: &SourceOptions) -> Result<Vec<String>, Error> {
    Source::find(options)?.documents(false).map(|d| d.map(|d| d.text)).collect()
}

fn error(options: &SourceOptions) -> String {
    texts(options).unwrap_err().to_string()
}

#[test]
fn text_files_are_documents_and_lines_of_end_of_text_separate_more() {
    let dir = tempdir().unwrap();
    let plain = write(dir.path(), "plain.txt", "one\ntwo\n");
    assert_eq!(texts(&source("s", &plain)).unwrap(), ["one\ntwo\n"]);
    let parted = write(dir.path(), "parted.txt", "\u{feff}one\n<|endoftext|>\n\n<|endoftext|>\r\ntwo");
    assert_eq!(texts(&source("s", &parted)).unwrap(), ["one\n", "two"]);
}

#[test]
fn long_text_is_cut_into_pieces_without_loss() {
    let dir = tempdir().unwrap();
    for (name, text) in
        [("lines.txt", "ein schöner Tag\n".repeat(200_000)), ("flat.txt", "x€".repeat(900_000))]
    {
        let path = write(dir.path(), name, &text);
        let pieces = texts(&source("s", &path)).unwrap();
        assert!(pieces.len() > 2 && pieces.iter().all(|piece| piece.len() <= 1 << 20), "{name}");
        assert!(pieces.concat() == text, "{name}");
    }
}

#[test]
fn folders_and_globs_give_their_files_in_order_without_hidden_and_binary_ones() {
    let dir = tempdir().unwrap();
    for (name, text) in
        [("b.txt", "b"), ("a/z.md", "z"), ("a/y.rs", "y"), (".hidden.txt", "h"), ("p.png", "png")]
    {
        write(dir.path(), name, text);
    }
    write(dir.path(), ".git/x.txt", "git");
    assert_eq!(texts(&source("s", dir.path())).unwrap(), ["y", "z", "b"]);
    let glob = |pattern: &str| texts(&source("s", &dir.path().join(pattern))).unwrap();
    assert_eq!(glob("**/*.txt"), ["b"]);
    assert_eq!(glob("a/*"), ["y", "z"]);
}

#[test]
fn jsonl_is_read_plain_and_compressed() {
    let dir = tempdir().unwrap();
    let body = jsonl(0..20) + "\n{\"text\": null}\n";
    let expected: Vec<_> = (0..20).map(document).collect();
    let files = [
        write(dir.path(), "a.jsonl", &body),
        write(
            dir.path(),
            "b.jsonl.gz",
            [gzip(&body.as_bytes()[..1000]), gzip(&body.as_bytes()[1000..])].concat(),
        ),
        write(dir.path(), "c.jsonl.zst", zstd::encode_all(body.as_bytes(), 1).unwrap()),
    ];
    for file in files {
        assert_eq!(texts(&source("s", &file)).unwrap(), expected, "{}", file.display());
    }
    let zipped = write(dir.path(), "d.txt.gz", gzip(b"hello"));
    assert_eq!(texts(&source("s", &zipped)).unwrap(), ["hello"]);
    let zipped = write(dir.path(), "e.txt.zst", zstd::encode_all(&b"hello"[..], 1).unwrap());
    assert_eq!(texts(&source("s", &zipped)).unwrap(), ["hello"]);
}

#[test]
fn parquet_gives_its_text_column_across_row_groups() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("a.parquet");
    let all: Vec<_> = (0..250).map(document).collect();
    let rows: Vec<_> = all.iter().enumerate().map(|(n, t)| (n % 7 != 3).then_some(t.as_str())).collect();
    parquet(&path, "content", &rows);
    let options = SourceOptions { column: Some("content".into()), ..source("s", &path) };
    let expected: Vec<_> = rows.iter().flatten().map(|t| t.to_string()).collect();
    assert_eq!(texts(&options).unwrap(), expected);
    let message = error(&source("s", &path));
    assert!(message.contains("\"text\"") && message.contains("\"content\""), "{message}");
}

#[test]
fn damaged_parquet_is_an_error_whatever_the_damage() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("a.parquet");
    let all: Vec<_> = (0..250).map(document).collect();
    parquet(&path, "text", &all.iter().map(|t| Some(t.as_str())).collect::<Vec<_>>());
    let whole = std::fs::read(&path).unwrap();
    let cut = write(dir.path(), "cut.parquet", &whole[..whole.len() / 2]);
    assert!(error(&source("s", &cut)).contains("cut.parquet"));
    let text = write(dir.path(), "text.parquet", "this is no parquet file");
    assert!(error(&source("s", &text)).contains("text.parquet"));
    // Whatever byte is damaged: an error or other text, but no panic and no endless read.
    for at in (0..whole.len()).step_by(whole.len() / 150) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x55;
        let path = write(dir.path(), "flipped.parquet", bytes);
        let _ = texts(&source("s", &path));
    }
}

#[test]
fn a_broken_record_is_named_by_file_and_line() {
    let dir = tempdir().unwrap();
    let bad = |body: &str| error(&source("s", &write(dir.path(), "bad.jsonl", body)));
    let message = bad("{\"text\": \"good\"}\n\n{\"text\": \"cut\n");
    assert!(message.contains("bad.jsonl, line 3"), "{message}");
    let message = bad("{\"body\": \"x\"}\n");
    assert!(
        message.contains("line 1") && message.contains("\"text\"") && message.contains("body"),
        "{message}"
    );
    assert!(bad("{\"text\": 7}\n").contains("a number"));
    assert!(bad("[1, 2]\n").contains("expected a JSON object"));
}

#[test]
fn text_that_is_not_utf8_is_replaced_and_counted_or_refused() {
    let dir = tempdir().unwrap();
    let files = [
        write(dir.path(), "a.txt", b"caf\xe9 and na\xefve"),
        write(dir.path(), "b.jsonl", b"{\"text\": \"caf\xe9 and na\xefve\"}\n"),
    ];
    for path in files {
        let found = Source::find(&source("s", &path)).unwrap();
        let document = found.documents(false).next().unwrap().unwrap();
        assert_eq!((document.text.as_str(), document.replaced), ("caf\u{fffd} and na\u{fffd}ve", 2));
        let message = found.documents(true).next().unwrap().unwrap_err().to_string();
        assert!(message.contains("line 1") && message.contains("UTF-8"), "{message}");
    }
}

#[test]
fn truncated_archives_and_bombs_are_errors() {
    let dir = tempdir().unwrap();
    let body = jsonl(0..500);
    let packed = gzip(body.as_bytes());
    let cut = write(dir.path(), "cut.jsonl.gz", &packed[..packed.len() / 2]);
    assert!(error(&source("s", &cut)).contains("cut.jsonl.gz"));
    let packed = zstd::encode_all(body.as_bytes(), 1).unwrap();
    let cut = write(dir.path(), "cut.jsonl.zst", &packed[..packed.len() / 2]);
    assert!(error(&source("s", &cut)).contains("cut.jsonl.zst"));
    let not = write(dir.path(), "not.txt.gz", "plain");
    assert!(error(&source("s", &not)).contains("not.txt.gz"));
    for (name, bomb) in [
        ("bomb.txt.zst", zstd::encode_all(&vec![b' '; 64 << 20][..], 1).unwrap()),
        ("bomb.jsonl.gz", gzip(&vec![b'['; 64 << 20])),
    ] {
        let message = error(&source("s", &write(dir.path(), name, bomb)));
        assert!(message.contains("expands to more than"), "{message}");
    }
}

#[test]
fn a_line_beyond_the_limit_is_rejected() {
    let dir = tempdir().unwrap();
    let path = write(dir.path(), "long.jsonl", vec![b' '; (64 << 20) + 10]);
    assert!(error(&source("s", &path)).contains("more than 67108864 bytes"));
}

#[test]
fn a_limited_source_is_spread_over_its_files_and_keeps_its_budget() {
    let dir = tempdir().unwrap();
    for n in 0..40 {
        write(dir.path(), &format!("{n:02}.txt"), document(n));
    }
    let limited = SourceOptions { max_bytes: Some(3000), ..source("s", dir.path()) };
    let picked = texts(&limited).unwrap();
    assert_eq!(picked.iter().map(String::len).sum::<usize>(), 3000);
    assert_eq!(picked, texts(&limited).unwrap());
    let first: Vec<_> = (0..picked.len() - 1).map(document).collect();
    assert!(picked[..picked.len() - 1] != first[..], "the first files only");
}

#[test]
fn a_missing_path_is_named() {
    let dir = tempdir().unwrap();
    for (path, reason) in
        [("no-such.txt", "no such file"), ("*.jsonl", "no file matches"), ("", "holds no file")]
    {
        let message = error(&source("books", &dir.path().join(path)));
        assert!(message.contains("books") && message.contains(reason), "{message}");
    }
}
