//! Regenerates the manifests of the quickstart from `examples/quickstart/files.txt`, Cargo.lock and cargo's
//! registry:
//!
//! ```sh
//! cargo run --release -p volary-data --example quickstart_manifest
//! ```
//!
//! Run it after a build of the workspace, whenever the list or the version of a listed crate has changed.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

use globset::{GlobBuilder, GlobMatcher};
use volary_data::{FileManifest, ListedFile, Source, SourceOptions};

/// The machines on which the quickstart must find the same files.
const TARGETS: [&str; 2] = ["x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"];

/// Shorter files are skipped, in bytes: they hold re-exports and little else.
const MIN_FILE_BYTES: u64 = 300;

/// A crate and its patterns.
struct Selection {
    name: String,
    include: Vec<GlobMatcher>,
    exclude: Vec<GlobMatcher>,
}

/// A section's name, which is that of its manifest, and its crates.
type Section = (String, Vec<Selection>);

fn main() -> Result<(), Box<dyn Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let folder = root.join("examples/quickstart");
    let sections = parse(&std::fs::read_to_string(folder.join("files.txt"))?)?;
    let versions = compiled_versions(&root)?;
    // A text that occurs in several files, or in both sources, is listed once.
    let mut seen = HashSet::new();
    for (section, crates) in sections {
        let (mut files, mut bytes) = (Vec::new(), 0);
        for selection in crates {
            let version = versions.get(&selection.name).and_then(BTreeSet::last).ok_or_else(|| {
                format!("{}: not a crate that every build of volary-cli for Linux compiles", selection.name)
            })?;
            let package = format!("{}-{}", selection.name, version.text);
            let before = files.len();
            for (relative, path) in selected_files(&selection, &package)? {
                let content = std::fs::read(path)?;
                let blake3 = blake3::hash(&content);
                if content.len() as u64 >= MIN_FILE_BYTES && seen.insert(blake3) {
                    bytes += content.len();
                    files.push(ListedFile { blake3, relative: format!("{package}/{relative}") });
                }
            }
            if files.len() == before {
                return Err(format!("{package}: no file matches").into());
            }
        }
        files.sort_by(|a, b| a.relative.cmp(&b.relative));
        println!("{section}: {} files, {bytes} bytes", files.len());
        std::fs::write(folder.join(format!("{section}.manifest")), FileManifest { files }.to_string())?;
    }
    Ok(())
}

/// The sections of the list, in its order.
fn parse(text: &str) -> Result<Vec<Section>, Box<dyn Error>> {
    let mut sections: Vec<Section> = Vec::new();
    for line in text.lines().map(|line| line.split('#').next().unwrap_or_default().trim()) {
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            sections.push((name.to_string(), Vec::new()));
        } else if let Some((name, patterns)) = line.split_once(char::is_whitespace) {
            let (exclude, include): (Vec<&str>, Vec<&str>) =
                patterns.split_whitespace().partition(|pattern| pattern.starts_with('!'));
            let (_, selections) = sections.last_mut().ok_or("a crate before the first section")?;
            selections.push(Selection {
                name: name.to_string(),
                include: include.into_iter().map(glob).collect::<Result<_, _>>()?,
                exclude: exclude.into_iter().map(|p| glob(&p[1..])).collect::<Result<_, _>>()?,
            });
        } else if !line.is_empty() {
            return Err(format!("{line}: expected a crate and its patterns").into());
        }
    }
    Ok(sections)
}

/// A version that sorts by its numbers.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Version {
    numbers: Vec<u64>,
    text: String,
}

/// The versions of each crate that the builds for all targets compile.
fn compiled_versions(root: &Path) -> Result<BTreeMap<String, BTreeSet<Version>>, Box<dyn Error>> {
    let mut packages: Option<BTreeSet<String>> = None;
    for target in TARGETS {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let arguments = ["tree", "--locked", "-p", "volary-cli", "-e", "normal,build", "--prefix", "none"];
        let output = Command::new(cargo)
            .args(arguments)
            .args(["--format", "{p}", "--target", target])
            .current_dir(root)
            .output()?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into());
        }
        let lines: BTreeSet<String> = String::from_utf8(output.stdout)?.lines().map(str::to_string).collect();
        packages = Some(match packages {
            Some(others) => others.intersection(&lines).cloned().collect(),
            None => lines,
        });
    }
    let mut versions: BTreeMap<String, BTreeSet<Version>> = BTreeMap::new();
    for package in packages.unwrap_or_default() {
        let mut words = package.split(' ');
        if let (Some(name), Some(version)) = (words.next(), words.next()) {
            let text = version.trim_start_matches('v').to_string();
            let numbers = text.split(['.', '+', '-']).map_while(|part| part.parse().ok()).collect();
            versions.entry(name.to_string()).or_default().insert(Version { numbers, text });
        }
    }
    Ok(versions)
}

fn glob(pattern: &str) -> Result<GlobMatcher, globset::Error> {
    Ok(GlobBuilder::new(pattern).literal_separator(true).build()?.compile_matcher())
}

/// The files of a package that match its patterns: relative path, path.
fn selected_files(selection: &Selection, package: &str) -> Result<Vec<(String, PathBuf)>, Box<dyn Error>> {
    let pattern = format!("$CARGO_HOME/registry/src/*/{package}/**/*");
    let found = Source::find(&SourceOptions::new(package, pattern))?;
    let mut files = Vec::new();
    for file in found.files {
        let Some((_, relative)) = file.relative.split_once(&format!("{package}/")) else { continue };
        let matches = |patterns: &[GlobMatcher]| patterns.iter().any(|p| p.is_match(relative));
        if matches(&selection.include) && !matches(&selection.exclude) {
            files.push((relative.to_string(), file.path));
        }
    }
    Ok(files)
}
