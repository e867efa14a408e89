//! The fuzzer's functions over the committed corpora, on any toolchain. Each file is fed as it is
//! and in many deterministic mutations.

use std::collections::BTreeSet;
use std::fs;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

/// Inputs made of each file.
const MUTATIONS: u64 = 200;
/// A mutation makes a file at most this much longer, in bytes.
const MOST_MORE: usize = 64;

/// A test for each function: its name is that of the corpus, too.
macro_rules! targets {
    ($($target:ident),+ $(,)?) => {
        const TARGETS: &[&str] = &[$(stringify!($target)),+];

        mod nothing_panics_on {
            $(
                #[test]
                fn $target() {
                    super::feed(stringify!($target), super::super::$target);
                }
            )+
        }
    };
}

targets![
    chat_answers,
    chat_requests,
    env_files,
    json_lines,
    places,
    request_bodies,
    request_heads,
    tokenizer,
    tokens,
    upstream_answers,
    upstream_errors,
    web_socket,
];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz")
        .join(name)
}

/// The names in a folder, without their extensions.
fn names(folder: &Path) -> BTreeSet<String> {
    let stem = |entry: std::io::Result<fs::DirEntry>| {
        let path = entry.unwrap().path();
        path.file_stem().unwrap().to_str().unwrap().to_owned()
    };
    fs::read_dir(folder).unwrap().map(stem).collect()
}

/// The files of a corpus and what they hold, always in the same order.
fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = fs::read_dir(folder("corpus").join(target)).unwrap();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let read = |path: PathBuf| {
        let bytes = fs::read(&path).unwrap();
        (path, bytes)
    };
    paths.into_iter().map(read).collect()
}

fn feed(target: &str, function: fn(&[u8])) {
    let corpus = corpus(target);
    assert!(!corpus.is_empty(), "fuzz/corpus/{target} is empty");
    for (number, (path, bytes)) in corpus.iter().enumerate() {
        check(path, function, bytes);
        let mut random = Random(number as u64);
        for _ in 0..MUTATIONS {
            let other = &corpus[random.below(corpus.len())].1;
            check(path, function, &random.mutation(bytes, other));
        }
    }
}

/// Shows an input that fails, ready to be put into the corpus: `printf '…' > fuzz/corpus/…`.
fn check(path: &Path, function: fn(&[u8]), input: &[u8]) {
    if catch_unwind(|| function(input)).is_err() {
        let name = path.display();
        panic!("made of {name}, this input fails: {}", input.escape_ascii());
    }
}

/// A generator of random numbers that is the same on every machine (xorshift64*).
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        // Any seed will do but 0.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15).max(1);
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let number = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d);
        usize::try_from((number >> 32) % end.max(1) as u64).unwrap()
    }

    fn range(&mut self, bytes: &[u8]) -> std::ops::Range<usize> {
        let start = self.below(bytes.len() + 1);
        start..start + self.below(bytes.len() + 1 - start)
    }

    /// One to four changes: bits turned, bytes set, parts cut out, repeated, or taken from `other`.
    fn mutation(&mut self, bytes: &[u8], other: &[u8]) -> Vec<u8> {
        /// Bytes that mean something in one of the formats.
        const MEANT: &[u8] = b"\0\n\r\t \"'\\,;:=.-%[]{}&#\x80\xff\xc3\xf0019e";
        let mut bytes = bytes.to_vec();
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len());
            match self.below(6) {
                0 if !bytes.is_empty() => bytes[at] ^= 1 << self.below(8),
                1 if !bytes.is_empty() => bytes[at] = MEANT[self.below(MEANT.len())],
                2 => drop(bytes.drain(self.range(&bytes))),
                3 => bytes.insert(at, MEANT[self.below(MEANT.len())]),
                kind => {
                    let from = if kind == 4 {
                        other.to_vec()
                    } else {
                        bytes.clone()
                    };
                    let part = self.range(&from);
                    let end = part.end.min(part.start + MOST_MORE);
                    bytes.splice(at..at, from[part.start..end].iter().copied());
                }
            }
        }
        bytes
    }
}

/// The packages of a lock file, each with its version.
fn packages(lock: &Path) -> BTreeSet<String> {
    let text = fs::read_to_string(lock).unwrap();
    let packages = text.split("[[package]]\n").skip(1);
    let name_and_version = |package: &str| package.lines().take(2).collect();
    packages.map(name_and_version).collect()
}

#[test]
fn the_fuzzer_runs_on_the_dependencies_of_the_service() {
    let own = [
        "arbitrary",
        "jobserver",
        "libfuzzer-sys",
        "prompt-service-fuzz",
    ];
    let is_own = |package: &&String| {
        let mut names = own.iter().map(|name| format!("name = \"{name}\""));
        names.any(|name| package.starts_with(&name))
    };
    let ours = packages(&folder("../Cargo.lock"));
    let fuzzed = packages(&folder("Cargo.lock"));
    let others: Vec<&String> = fuzzed
        .difference(&ours)
        .filter(|package| !is_own(package))
        .collect();
    assert!(
        others.is_empty(),
        "fuzz/Cargo.lock is not up to date: {others:?}"
    );
}

#[test]
fn every_function_has_a_corpus_and_a_target_and_the_other_way_round() {
    let functions: BTreeSet<String> = TARGETS.iter().map(|name| (*name).to_owned()).collect();
    assert_eq!(names(&folder("corpus")), functions);
    assert_eq!(names(&folder("fuzz_targets")), functions);
    let manifest = fs::read_to_string(folder("Cargo.toml")).unwrap();
    for name in &functions {
        let program = fs::read_to_string(folder("fuzz_targets").join(format!("{name}.rs")));
        assert!(program.unwrap().contains(&format!("fuzzing::{name}(data)")));
        assert!(manifest.contains(&format!("path = \"fuzz_targets/{name}.rs\"")));
    }
}
