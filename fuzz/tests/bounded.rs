//! A bounded run of every target on the stable toolchain, with the seeds, the files of `corpus/`, and random
//! mutations of both. `VOLARY_FUZZ_SECONDS` sets the duration per target, `VOLARY_FUZZ_SEED` the seed of the
//! mutations.
#![expect(clippy::expect_used, reason = "tests")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};
use volary_core::random::{Purpose, Stream};
use volary_fuzz::{TARGETS, seeds};

/// The longest time of one input, far above that of any valid one.
const INPUT_MAX: Duration = Duration::from_secs(10);
const BYTES_MAX: usize = 1 << 16;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// The stored inputs of a target: they once failed, or differ much from the seeds.
fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
    files.filter_map(|file| std::fs::read(file.path()).ok()).collect()
}

/// A few random changes: of bits, bytes and lengths, and removed, repeated or moved pieces.
fn mutate(bytes: &mut Vec<u8>, other: &[u8], random: &mut Stream) {
    for _ in 0..=random.below(6) {
        let length = bytes.len().max(1) as u64;
        let at = random.below(length) as usize;
        let until = (at + 1 + random.below(16) as usize).min(bytes.len());
        match random.below(8) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << random.below(8),
            1 if !bytes.is_empty() => bytes[at] = random.below(256) as u8,
            2 => bytes.truncate(at),
            3 => bytes.insert(at.min(bytes.len()), random.below(256) as u8),
            4 if at < until => drop(bytes.drain(at..until)),
            5 if at < until => {
                let piece = bytes[at..until].to_vec();
                bytes.extend(piece);
            }
            6 if at + 8 <= bytes.len() => {
                let lengths = [0, 1, u64::MAX, 1 << 31, 1 << 32, 1 << 62];
                bytes[at..at + 8].copy_from_slice(&lengths[random.below(6) as usize].to_le_bytes());
            }
            _ if !other.is_empty() => {
                let from = random.below(other.len() as u64) as usize;
                bytes.extend_from_slice(&other[from..(from + 64).min(other.len())]);
            }
            _ => {}
        }
        bytes.truncate(BYTES_MAX);
    }
}

#[test]
fn no_input_makes_a_decoder_panic_or_hang() {
    let (seconds, first) = (number("VOLARY_FUZZ_SECONDS", 2), number("VOLARY_FUZZ_SEED", 1));
    // The hook would print every panic, also those of inputs that are reported below.
    let hook = std::panic::take_hook();
    if std::env::var_os("VOLARY_FUZZ_LOUD").is_none() {
        std::panic::set_hook(Box::new(|_| {}));
    }
    let mut failed = Vec::new();
    for (name, target) in TARGETS {
        let valid = [seeds::of(name), corpus(name)].concat();
        assert!(!valid.is_empty(), "{name} has no seeds");
        let mut try_one = |input: &[u8]| {
            let start = Instant::now();
            if catch_unwind(AssertUnwindSafe(|| target(input))).is_err() || start.elapsed() > INPUT_MAX {
                failed.push((name, input.to_vec()));
            }
        };
        valid.iter().for_each(|input| try_one(input));
        let (start, mut round) = (Instant::now(), 0);
        while start.elapsed() < Duration::from_secs(seconds) {
            let mut random = Stream::new(first, Purpose::Faults, &[round]);
            let mut input = valid[random.below(valid.len() as u64) as usize].clone();
            let other = &valid[random.below(valid.len() as u64) as usize];
            mutate(&mut input, other, &mut random);
            try_one(&input);
            round += 1;
        }
        eprintln!("{name}: {round} mutations of {} inputs", valid.len());
    }
    std::panic::set_hook(hook);
    if let Some((name, input)) = failed.first() {
        let path = std::env::temp_dir().join(format!("volary-fuzz-{name}"));
        std::fs::write(&path, input).expect("a file");
        panic!("{} inputs fail, the first of {name}: {} (seed {first})", failed.len(), path.display());
    }
}

#[test]
fn a_target_that_panics_is_found() {
    let bad: fn(&[u8]) = |bytes| assert!(bytes.len() < 3);
    assert!(catch_unwind(|| bad(b"four")).is_err() && catch_unwind(|| bad(b"a")).is_ok());
}
