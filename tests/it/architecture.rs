//! Which module may know which other: Rust does not check it inside a crate, so this does, from the source.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// What each module may use of this crate, beside itself. A row names only rows above it, so there is no way round.
const MAY_USE: &[(&str, &[&str])] = &[
    // Values and rules, what went wrong, what may be set, what operators see.
    ("domain", &[]),
    ("threads", &[]),
    ("memory_budget", &["domain"]),
    ("turns", &[]),
    ("fair_semaphore", &["turns"]),
    ("error", &["domain", "memory_budget", "fair_semaphore"]),
    // Of tests alone: what a run expects of its machine.
    ("expected", &[]),
    ("config", &["domain", "error"]),
    ("telemetry", &["domain", "error", "config"]),
    // The link that several capabilities of a replica share.
    (
        "redis",
        &["domain", "error", "threads", "config", "telemetry"],
    ),
    // Capabilities: none knows another.
    ("credentials", BASE),
    ("data_dir", BASE),
    ("embed", BASE),
    ("llm", BASE),
    ("realtime", BASE),
    ("search", BASE),
    ("store", BASE),
    ("throttle", BASE),
    // Use cases.
    (
        "services",
        &[
            "domain",
            "error",
            "threads",
            "memory_budget",
            "turns",
            "fair_semaphore",
            "config",
            "telemetry",
            "credentials",
            "embed",
            "llm",
            "realtime",
            "search",
            "store",
            "throttle",
        ],
    ),
    // The operator's commands that move whole stores.
    ("transfer", &["domain", "credentials", "embed", "store"]),
    // The ways in. HTTP keeps sockets in the hub and counts in the throttle; everything else goes through a use case.
    (
        "api",
        &[
            "domain",
            "error",
            "memory_budget",
            "fair_semaphore",
            "config",
            "telemetry",
            "realtime",
            "throttle",
            "services",
        ],
    ),
    ("cli", &["config"]),
    // Picks and wires.
    (
        "app",
        &[
            "domain",
            "error",
            "threads",
            "memory_budget",
            "turns",
            "fair_semaphore",
            "config",
            "telemetry",
            "redis",
            "credentials",
            "data_dir",
            "embed",
            "llm",
            "realtime",
            "search",
            "store",
            "throttle",
            "services",
            "transfer",
            "api",
            "cli",
        ],
    ),
    ("main", &["config", "telemetry", "api", "cli", "app"]),
    // Of tests and the fuzzer alone: whatever takes bytes of strangers.
    (
        "fuzzing",
        &[
            "domain",
            "memory_budget",
            "config",
            "credentials",
            "embed",
            "llm",
            "services",
            "transfer",
            "api",
        ],
    ),
];

const BASE: &[&str] = &[
    "domain",
    "error",
    "threads",
    "memory_budget",
    "turns",
    "fair_semaphore",
    "expected",
    "config",
    "telemetry",
    "redis",
];

/// Words that must not stand in the code of a place, whatever way they came there: whose places (beginnings of paths under
/// `src`), which words, and where they are at home all the same.
const BANNED: &[(&[&str], &[&str], &[&str])] = &[
    // Use cases know neither the way in nor a particular backend.
    (
        &["services"],
        &[
            "axum",
            "http",
            "hyper",
            "serde_json",
            "StatusCode",
            "HeaderMap",
            "Json",
        ],
        &[],
    ),
    // One folder reads and writes the files of `export` and `import`.
    (
        &["transfer"],
        &["axum", "serde_json"],
        &["transfer/json_lines/"],
    ),
    (
        &["services", "transfer", "api"],
        &["SlabIndex", "SqliteStore", "PostgresStore"],
        &[],
    ),
    // SQL lives in one folder.
    (&[""], &["rusqlite"], &["store/sqlite/"]),
    (
        &[""],
        &["tokio_postgres"],
        &["store/postgres/", "store/django/"],
    ),
    (
        &[""],
        &["deadpool_postgres", "pgvector"],
        &["store/postgres/"],
    ),
    // One folder knows the web framework, and the fuzzer feeds it.
    (
        &[""],
        &["axum", "utoipa"],
        &["api/", "app/mod.rs", "fuzzing/"],
    ),
    // Values are not wire types: a secret field cannot reach JSON by accident.
    (
        &["domain", "error"],
        &["serde", "Serialize", "serde_json"],
        &[],
    ),
];

/// Files and folders under `src/api` that each are one resource and leave the others alone.
const RESOURCES: &[&str] = &["accounts", "health", "oauth", "pages", "prompts", "ws"];

fn source_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// Every source file: its path under `src`, and its code without comments and texts.
fn sources() -> Vec<(String, String)> {
    let (root, mut folders, mut sources) = (source_root(), vec![source_root()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(&root).unwrap().to_str().unwrap();
                sources.push((
                    name.to_owned(),
                    code_of(&fs::read_to_string(&path).unwrap()),
                ));
            }
        }
    }
    sources
}

/// The text without comments, and with empty ones in place of string and character literals.
fn code_of(text: &str) -> String {
    let mut code = String::new();
    let mut rest = text;
    while let Some(next) = rest.chars().next() {
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if next == '"' {
            code.push_str("\"\"");
            quoted(rest)
        } else if let Some(hashes) = raw_hashes(rest) {
            code.push_str("\"\"");
            let end = format!("\"{}", "#".repeat(hashes));
            let start = hashes + 2;
            rest[start..]
                .find(&end)
                .map_or(rest.len(), |at| start + at + end.len())
        } else if next == '\'' {
            match literal(rest) {
                Some(length) => length,
                None => {
                    code.push(next);
                    1
                }
            }
        } else {
            code.push(next);
            next.len_utf8()
        };
        rest = &rest[skipped..];
    }
    code
}

/// The length of the string literal that `text` begins with.
fn quoted(text: &str) -> usize {
    let mut is_escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if is_escaped => is_escaped = false,
            '\\' => is_escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// How many hashes the raw string has that `text` begins with, if it does.
fn raw_hashes(text: &str) -> Option<usize> {
    let rest = text.strip_prefix('r')?;
    let hashes = rest.len() - rest.trim_start_matches('#').len();
    rest[hashes..].starts_with('"').then_some(hashes)
}

/// The length of the character literal that `text` begins with; `None` if the quote begins a lifetime.
fn literal(text: &str) -> Option<usize> {
    let inner = &text[1..];
    let first = inner.chars().next()?;
    let body = if first == '\\' {
        1 + inner[1..].chars().next()?.len_utf8()
    } else {
        first.len_utf8()
    };
    let end = inner[body..].find('\'')?;
    // An escape may be long; any other character stands alone between its quotes.
    (first == '\\' && end < 10 || end == 0).then_some(1 + body + end + 1)
}

/// The words of the code: identifiers, and `::`, braces and commas, which make the paths.
fn words(code: &str) -> Vec<&str> {
    let mut words = Vec::new();
    let mut rest = code;
    while let Some(first) = rest.chars().next() {
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        let length = if is_word(first) {
            rest.find(|c| !is_word(c)).unwrap_or(rest.len())
        } else if rest.starts_with("::") {
            2
        } else {
            first.len_utf8()
        };
        if !first.is_whitespace() {
            words.push(&rest[..length]);
        }
        rest = &rest[length..];
    }
    words
}

/// Which modules of the crate the code of a file names: after `crate::`, after as many `super::` as lead there from `depth`
/// folders down, or, in the program itself, after `prompt_service::`.
fn uses(code: &str, depth: usize) -> BTreeSet<&str> {
    let words = words(code);
    let mut found = BTreeSet::new();
    let mut at = 0;
    while at < words.len() {
        let mut ups = 0;
        let is_root = match words[at] {
            "crate" | "prompt_service" => true,
            "super" => {
                while words.get(at + 2 * ups) == Some(&"super")
                    && words.get(at + 2 * ups + 1) == Some(&"::")
                {
                    ups += 1;
                }
                ups >= depth
            }
            _ => false,
        };
        let start = at + 2 * ups.max(1);
        let is_path = words.get(start - 1) == Some(&"::");
        if is_root && is_path {
            found.extend(heads(&words[start..]));
        }
        at = if is_path && ups > 0 { start } else { at + 1 };
    }
    found
}

/// The first words of what may follow `crate::`: one, or those of the list in braces.
fn heads<'a>(words: &[&'a str]) -> Vec<&'a str> {
    if words.first() != Some(&"{") {
        return words.first().copied().into_iter().collect();
    }
    let (mut depth, mut is_first, mut heads) = (0, true, Vec::new());
    for word in words {
        match *word {
            "{" => {
                depth += 1;
                is_first = depth == 1;
            }
            "}" => {
                depth -= 1;
                if depth == 0 {
                    break;
                }
            }
            "," => is_first = depth == 1,
            word if is_first => {
                heads.push(word);
                is_first = false;
            }
            _ => {}
        }
    }
    heads
}

/// The module at the top of a file's path, and how many modules lie between the file and the crate's root.
fn place(name: &str) -> (&str, usize) {
    let top = name.split('/').next().unwrap().trim_end_matches(".rs");
    let depth = name.trim_end_matches("/mod.rs").split('/').count();
    (top, depth)
}

/// What a file breaks, in words.
fn violations(name: &str, code: &str) -> Vec<String> {
    let (top, depth) = place(name);
    let known: Vec<&str> = MAY_USE.iter().map(|(module, _)| *module).collect();
    let mut violations = Vec::new();
    match MAY_USE.iter().find(|(module, _)| *module == top) {
        None if top == "lib" => {}
        None => violations.push(format!("{name}: its module has no row in the table")),
        Some((_, allowed)) => {
            let used = uses(code, depth);
            let strangers = used
                .into_iter()
                .filter(|used| known.contains(used) && *used != top && !allowed.contains(used));
            violations.extend(strangers.map(|used| format!("{name}: {top} may not use {used}")));
        }
    }
    let words = words(code);
    for (places, banned, homes) in BANNED {
        let concerns = places.iter().any(|place| name.starts_with(place))
            && !homes.iter().any(|home| name.starts_with(home));
        let present = banned
            .iter()
            .filter(|word| concerns && words.contains(word));
        violations.extend(present.map(|word| format!("{name}: {word} has no place here")));
    }
    if let Some(file) = name.strip_prefix("api/")
        && let Some(resource) = RESOURCES.iter().find(|known| place(file).0 == **known)
    {
        let others = RESOURCES.iter().filter(|other| other != &resource);
        let used: Vec<&&str> = others
            .filter(|other| {
                words.windows(3).any(|path| {
                    matches!(path[0], "super" | "api") && path[1] == "::" && path[2] == **other
                })
            })
            .collect();
        violations.extend(
            used.into_iter()
                .map(|other| format!("{name}: uses another resource, {other}")),
        );
    }
    violations
}

#[test]
fn every_file_keeps_to_its_layer() {
    let sources = sources();
    assert!(
        sources.len() > 50,
        "only {} files were found",
        sources.len()
    );
    let violations: Vec<String> = sources
        .iter()
        .flat_map(|(name, code)| violations(name, code))
        .collect();
    assert!(violations.is_empty(), "{}", violations.join("\n"));
}

#[test]
fn the_table_covers_the_crate_and_has_no_way_round() {
    let (_, lib) = sources()
        .into_iter()
        .find(|(name, _)| name == "lib.rs")
        .unwrap();
    let lib = words(&lib);
    let modules = lib
        .windows(2)
        .filter(|pair| pair[0] == "mod")
        .map(|pair| pair[1]);
    let rows: Vec<&str> = MAY_USE.iter().map(|(module, _)| *module).collect();
    let declared: BTreeSet<&str> = modules.chain(["main"]).collect();
    assert_eq!(declared, rows.iter().copied().collect());
    for (at, (module, allowed)) in MAY_USE.iter().enumerate() {
        for used in *allowed {
            assert!(
                rows[..at].contains(used),
                "{module} may use {used}, which stands below it"
            );
        }
    }
}

#[test]
fn every_way_of_naming_a_module_is_seen() {
    let used = |code, depth| uses(code, depth).into_iter().collect::<Vec<_>>();
    assert_eq!(used("use crate::store::Error;", 1), ["store"]);
    assert_eq!(
        used(
            "use crate::{domain::{self, Prompt, user::{A, B}}, store, embed as e};",
            1
        ),
        ["domain", "embed", "store"]
    );
    assert_eq!(
        used("fn f() -> crate::search::Hit { todo!() }", 3),
        ["search"]
    );
    assert_eq!(
        used("pub(in crate::api) use super::super::embed;", 2),
        ["api", "embed"]
    );
    assert_eq!(
        used("use super::{store, embed::Engine};", 1),
        ["embed", "store"]
    );
    assert_eq!(used("use super::store;", 2), Vec::<&str>::new());
    assert_eq!(used("use prompt_service::app::{App, users};", 1), ["app"]);
    assert_eq!(used("use crate ::\n    llm;", 1), ["llm"]);
}

#[test]
fn comments_and_texts_are_not_code() {
    let code = code_of(
        "/// [`crate::store`]\nfn a<'a>(x: &'a str) -> char { let _ = \"crate::llm \\\" crate::api\"; /* crate::app */ '\\'' }\n\
         const R: &str = r#\"crate::embed \" \"#; const Q: char = '\"'; use crate::search; const D: char = '\\u{1F600}';",
    );
    assert_eq!(
        uses(&code, 1).into_iter().collect::<Vec<_>>(),
        ["search"],
        "{code}"
    );
    assert!(code.contains("fn a<'a>(x: &'a str)"), "{code}");
}

#[test]
fn planted_violations_are_found() {
    for (name, code, complaint) in [
        (
            "store/sqlite/reader.rs",
            "use crate::search::Hit;",
            "store may not use search",
        ),
        (
            "domain/user.rs",
            "use crate::config::Config;",
            "domain may not use config",
        ),
        (
            "services/prompts.rs",
            "use crate::api::ApiError;",
            "services may not use api",
        ),
        (
            "services/search.rs",
            "let x: serde_json::Value;",
            "serde_json has no place here",
        ),
        (
            "services/search.rs",
            "use crate::search::{Hit, SlabIndex};",
            "SlabIndex has no place here",
        ),
        (
            "services/health.rs",
            "use axum::Json;",
            "axum has no place here",
        ),
        (
            "api/prompts.rs",
            "use crate::{store::PromptStore, domain::Prompt};",
            "api may not use store",
        ),
        (
            "api/ws/mod.rs",
            "use super::accounts::x;",
            "uses another resource, accounts",
        ),
        (
            "search/index.rs",
            "use rusqlite::Connection;",
            "rusqlite has no place here",
        ),
        (
            "embed/engine.rs",
            "use axum::http::StatusCode;",
            "axum has no place here",
        ),
        (
            "domain/prompt.rs",
            "#[derive(Serialize)] struct P;",
            "Serialize has no place here",
        ),
        (
            "throttle/mod.rs",
            "use super::store::Store;",
            "throttle may not use store",
        ),
        ("novelty/mod.rs", "", "has no row in the table"),
    ] {
        let found = violations(name, code).join("\n");
        assert!(found.contains(complaint), "{name}: {code}: found {found:?}");
    }
}
