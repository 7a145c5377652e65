//! Every format is read as written, and errors name the broken file.
#![allow(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

mod common;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use ::parquet::file::writer::SerializedFileWriter;
use common::{document, gzip, jsonl, parquet, source, write};
use tempfile::tempdir;
use volary_data::{Error, Source, SourceOptions};

fn texts(options: &SourceOptions) -> Result<Vec<String>, Error> {
    Source::find(options)?.documents(false).map(|d| d.map(|d| d.text)).collect()
}

fn error(options: &SourceOptions) -> String {
    let read = |source: Source| source.documents(true).try_for_each(|document| document.map(drop));
    Source::find(options).and_then(read).unwrap_err().to_string()
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
fn json_lines_are_recognized_whatever_the_name() {
    let dir = tempdir().unwrap();
    let body = jsonl(0..20);
    let expected: Vec<_> = (0..20).map(document).collect();
    let long = serde_json::json!({"id": 1, "text": document(0).repeat(500)}).to_string() + "\n";
    for (name, content) in [
        ("a.json", body.clone().into_bytes()),
        ("c4.json.gz", gzip(body.as_bytes())),
        ("no-suffix", body.clone().into_bytes()),
        ("gzip-without-suffix.json", gzip(body.as_bytes())),
        ("part-0001.txt", body.into_bytes()),
    ] {
        let file = write(dir.path(), name, content);
        assert_eq!(texts(&source("s", &file)).unwrap(), expected, "{name}");
    }
    let file = write(dir.path(), "long.json", long);
    assert_eq!(texts(&source("s", &file)).unwrap(), [document(0).repeat(500)]);
    // Records without the wanted field are text, unless the name promises records.
    let other = "{\"level\": \"info\"}\n{\"level\": \"warn\"}\n";
    assert_eq!(texts(&source("s", &write(dir.path(), "log.txt", other))).unwrap(), [other]);
    assert!(error(&source("s", &write(dir.path(), "log.json", other))).contains("level"));
}

#[test]
fn json_that_is_not_one_object_per_line_is_refused_by_name() {
    let dir = tempdir().unwrap();
    for (body, reason) in [
        ("[\n{\"text\": \"a\"}\n]\n", "one array"),
        ("{\n  \"text\": \"a\"\n}\n", "several lines"),
        ("hello", "other text"),
    ] {
        let message = error(&source("s", &write(dir.path(), "a.json", body)));
        assert!(message.contains("a.json") && message.contains(reason), "{message}");
    }
}

#[test]
fn binaries_and_unknown_compressions_are_refused_by_name_and_skipped_in_folders() {
    let dir = tempdir().unwrap();
    let tar = [&[b'a'; 100][..], &[0; 157], b"ustar\0", &[0; 249]].concat();
    for (name, content) in [
        ("a.txt.xz", b"\xfd7zXZ\0\0\x04\xe6\xd6\xb4\x46".to_vec()),
        ("image.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR".to_vec()),
        ("utf16.txt", "\u{feff}héllo".encode_utf16().flat_map(u16::to_le_bytes).collect()),
        ("archive.txt.gz", gzip(&tar)),
        ("plain.txt.gz", b"not compressed".to_vec()),
    ] {
        let message = error(&source("s", &write(dir.path(), name, content)));
        assert!(message.contains(name), "{message}");
    }
    write(dir.path(), "good.txt", "good");
    let mut found = Source::find(&source("s", dir.path())).unwrap();
    found.check().unwrap();
    let read: Vec<_> = found.documents(false).map(|d| d.unwrap().text).collect();
    assert_eq!(read, ["good"]);
    let skipped: u64 = found.skipped.iter().map(|skipped| skipped.files).sum();
    assert_eq!(skipped, 5, "{:?}", found.skipped);
    assert!(found.skipped.iter().any(|skipped| skipped.reason.contains(".xz")), "{:?}", found.skipped);
}

#[test]
fn odd_records_are_read_rightly_or_named_in_strict_mode() {
    let dir = tempdir().unwrap();
    let deep = "[".repeat(300) + &"]".repeat(300);
    let body = [
        r#"{"score": NaN, "text": "a"}"#.to_string(),
        r#"{"score": 1e999, "text": "b"}"#.into(),
        format!(r#"{{"score": {deep}, "text": "c"}}"#),
        r#"{"text": "d\ud800e"}"#.into(),
    ];
    let path = write(dir.path(), "odd.jsonl", body.join("\n"));
    let found = Source::find(&source("s", &path)).unwrap();
    let documents: Vec<_> = found.documents(false).map(Result::unwrap).collect();
    let read: Vec<_> = documents.iter().map(|d| (d.text.as_str(), d.replaced)).collect();
    assert_eq!(read, [("a", 0), ("b", 0), ("c", 0), ("d\u{fffd}e", 1)]);
    let message = found.documents(true).last().unwrap().unwrap_err().to_string();
    assert!(message.contains("odd.jsonl, line 4"), "{message}");
}

#[test]
fn names_that_are_not_utf8_and_brackets_in_folders_are_names() {
    let dir = tempdir().unwrap();
    let folder = dir.path().join("run [1] {a}");
    write(&folder, "a.txt", "a");
    std::fs::write(folder.join(OsStr::from_bytes(b"caf\xe9.txt")), "b").unwrap();
    std::fs::write(folder.join(OsStr::from_bytes(b"caf\xe9.png")), "c").unwrap();
    assert_eq!(texts(&source("s", &folder)).unwrap(), ["a", "b"]);
    let glob = SourceOptions::new("s", format!("{}/run*/*.txt", dir.path().display()));
    assert_eq!(texts(&glob).unwrap(), ["a", "b"]);
    let literal = SourceOptions::new("s", format!("{}/a.txt", folder.display()));
    assert_eq!(texts(&literal).unwrap(), ["a"]);
}

#[test]
fn a_parquet_file_is_refused_from_its_header() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("a.parquet");
    for (schema, reason) in [
        ("message m { required binary text (UTF8); required binary text (UTF8); }", "several columns"),
        ("message m { repeated binary text (UTF8); }", "does not hold text"),
        ("message m { required group text { required binary a (UTF8); } }", "does not hold text"),
        ("message m { required int32 text; }", "does not hold text"),
    ] {
        let schema = Arc::new(::parquet::schema::parser::parse_message_type(schema).unwrap());
        let file = std::fs::File::create(&path).unwrap();
        SerializedFileWriter::new(file, schema, Arc::default()).unwrap().close().unwrap();
        let mut found = Source::find(&source("s", &path)).unwrap();
        let message = found.check().unwrap_err().to_string();
        assert!(message.contains("a.parquet") && message.contains(reason), "{message}");
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
    assert!(bad("{\"text\": 7}\n").contains("integer `7`, expected a string"));
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
    // The next line is read all the same, unless every error counts.
    for rest in [&b""[..], b" "] {
        let line = [&vec![b' '; 64 << 20], rest, b"\n{\"text\": \"good\"}\n"].concat();
        let path = write(dir.path(), "long.jsonl", line);
        assert_eq!(texts(&source("s", &path)).unwrap(), ["good"]);
    }
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
