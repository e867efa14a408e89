//! Which module may use which other. Rust does not check this inside a crate, so this test reads it
//! from the source.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use proc_macro2::{Spacing, TokenStream, TokenTree};

/// What each module may use of this crate, beside itself. A row names only rows above it, so there
/// is no circle.
const MAY_USE: &[(&str, &[&str])] = &[
    // Values and rules, what went wrong, what may be set, what operators see.
    ("domain", &[]),
    ("threads", &[]),
    ("memory_budget", &["domain"]),
    ("turns", &[]),
    ("user_permits", &["domain"]),
    ("fair_semaphore", &["turns"]),
    ("error", &["domain", "memory_budget", "fair_semaphore"]),
    ("config", &["domain"]),
    ("telemetry", &["domain", "config"]),
    // The connection that several capabilities of a replica share.
    ("redis", &["config", "telemetry"]),
    // Capabilities: none knows another, but search, which reads the store's vectors.
    ("credentials", BASE),
    ("data_dir", BASE),
    ("embed", BASE),
    ("llm", BASE),
    ("pricing", &["domain"]),
    ("realtime", BASE),
    ("store", BASE),
    ("search", &["domain", "config", "store"]),
    ("throttle", BASE),
    // Use cases.
    (
        "services",
        &[
            "domain",
            "error",
            "memory_budget",
            "fair_semaphore",
            "config",
            "telemetry",
            "credentials",
            "embed",
            "llm",
            "pricing",
            "realtime",
            "search",
            "store",
        ],
    ),
    // The operator's commands that move whole stores.
    ("transfer", &["domain", "credentials", "embed", "store"]),
    // The ways in. HTTP keeps sockets in the hub and counts in the throttle; everything else goes
    // through a use case.
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
            "memory_budget",
            "fair_semaphore",
            "error",
            "config",
            "telemetry",
            "redis",
            "credentials",
            "data_dir",
            "embed",
            "llm",
            "pricing",
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
    ("program", &["config", "telemetry", "api", "cli", "app"]),
    ("main", &["program"]),
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
    "user_permits",
    "config",
    "telemetry",
    "redis",
];

/// Words that the code of some files must not have: beginnings of the files' paths under `src`, the
/// words, and beginnings of paths where the words are allowed after all.
const BANNED: &[(&[&str], &[&str], &[&str])] = &[
    // Use cases know neither the way in nor a particular backend.
    (
        &["services"],
        &["axum", "http", "hyper", "StatusCode", "HeaderMap", "Json"],
        &[],
    ),
    // A chat call is kept as JSON.
    (&["services"], &["serde_json"], &["services/prompts/chat/"]),
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
const RESOURCES: &[&str] = &[
    "accounts", "health", "keys", "oauth", "pages", "prompts", "usage", "ws",
];

fn source_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// Every source file: its path under `src`, and the words of its code.
fn sources() -> Vec<(String, Vec<String>)> {
    let (root, mut folders, mut sources) = (source_root(), vec![source_root()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(&root).unwrap().to_str().unwrap();
                let code = fs::read_to_string(&path).unwrap();
                sources.push((name.to_owned(), words(&code)));
            }
        }
    }
    sources
}

/// The words of the code: identifiers, and `::`, braces and commas, which make the paths. Comments
/// and literals have none.
fn words(code: &str) -> Vec<String> {
    let mut words = Vec::new();
    add_words(code.parse().unwrap(), &mut words);
    words
}

fn add_words(tokens: TokenStream, words: &mut Vec<String>) {
    let mut tokens = tokens.into_iter();
    while let Some(token) = tokens.next() {
        match token {
            TokenTree::Group(group) => {
                words.push("{".to_owned());
                add_words(group.stream(), words);
                words.push("}".to_owned());
            }
            TokenTree::Punct(mark) if mark.as_char() == ':' && mark.spacing() == Spacing::Joint => {
                words.push("::".to_owned());
                tokens.next();
            }
            TokenTree::Ident(_) | TokenTree::Punct(_) => words.push(token.to_string()),
            TokenTree::Literal(_) => {}
        }
    }
}

/// Which modules of the crate the code of a file names: after `crate::`, after as many `super::` as
/// lead there from `depth` folders down, or, in the program itself, after `prompt_service::`.
fn uses(words: &[String], depth: usize) -> BTreeSet<&str> {
    let mut found = BTreeSet::new();
    for at in 0..words.len() {
        let path = &words[at..];
        let is_inside_path = at > 0 && words[at - 1] == "::";
        let steps = path.chunks(2).take_while(|step| *step == ["super", "::"]);
        let start = match steps.count() {
            _ if is_inside_path => continue,
            0 if matches!(path[0].as_str(), "crate" | "prompt_service") => 2,
            ups if ups >= depth => 2 * ups,
            _ => continue,
        };
        if path.get(start - 1).is_some_and(|mark| mark == "::") {
            found.extend(heads(&path[start..]));
        }
    }
    found
}

/// The first words of what may follow `crate::`: one, or those of the list in braces.
fn heads(words: &[String]) -> Vec<&str> {
    let (mut depth, mut heads) = (0, Vec::new());
    let mut is_first = true;
    for word in words {
        match word.as_str() {
            "{" => depth += 1,
            "}" => depth -= 1,
            "," => is_first = depth == 1,
            head if std::mem::take(&mut is_first) => heads.push(head),
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    heads
}

/// The module at the top of a file's path, and how many modules lie between the file and the
/// crate's root.
fn place(name: &str) -> (&str, usize) {
    let top = name.split('/').next().unwrap().trim_end_matches(".rs");
    let depth = name.trim_end_matches("/mod.rs").split('/').count();
    (top, depth)
}

/// The rules that a file breaks, in words.
fn violations(name: &str, words: &[String]) -> Vec<String> {
    let (top, depth) = place(name);
    let known: Vec<&str> = MAY_USE.iter().map(|(module, _)| *module).collect();
    let mut violations = Vec::new();
    match MAY_USE.iter().find(|(module, _)| *module == top) {
        None if top == "lib" => {}
        None => violations.push(format!("{name}: its module has no row in the table")),
        Some((_, allowed)) => {
            let used = uses(words, depth);
            let strangers = used
                .into_iter()
                .filter(|used| known.contains(used) && *used != top && !allowed.contains(used));
            violations.extend(strangers.map(|used| format!("{name}: {top} may not use {used}")));
        }
    }
    for (places, banned, homes) in BANNED {
        let concerns = places.iter().any(|place| name.starts_with(place))
            && !homes.iter().any(|home| name.starts_with(home));
        let present = banned
            .iter()
            .filter(|banned| concerns && words.iter().any(|word| word == *banned));
        violations.extend(present.map(|word| format!("{name}: {word} has no place here")));
    }
    if let Some(file) = name.strip_prefix("api/")
        && let Some(resource) = RESOURCES.iter().find(|known| place(file).0 == **known)
    {
        let others = RESOURCES.iter().filter(|other| other != &resource);
        let used: Vec<&&str> = others
            .filter(|other| {
                words.windows(3).any(|path| {
                    matches!(path[0].as_str(), "super" | "api")
                        && path[1] == "::"
                        && path[2] == **other
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
        .flat_map(|(name, words)| violations(name, words))
        .collect();
    assert!(violations.is_empty(), "{}", violations.join("\n"));
}

#[test]
fn table_covers_the_crate_and_has_no_circle() {
    let (_, lib) = sources()
        .into_iter()
        .find(|(name, _)| name == "lib.rs")
        .unwrap();
    let modules = lib
        .windows(2)
        .filter(|pair| pair[0] == "mod")
        .map(|pair| pair[1].as_str());
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
    let used = |code, depth| {
        let words = words(code);
        let used = uses(&words, depth).into_iter().map(str::to_owned);
        used.collect::<Vec<_>>()
    };
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
fn comments_and_literals_are_not_code() {
    let words = words(
        "/// [`crate::store`]\nfn a<'a>(x: &'a str) { let _ = \"crate::llm \\\" crate::api\"; /* crate::app */ '\\'' }\n\
         const R: &str = r#\"crate::embed \" \"#; const Q: char = '\"'; use crate::search;",
    );
    let used: Vec<_> = uses(&words, 1).into_iter().collect();
    assert_eq!(used, ["search"], "{words:?}");
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
        let found = violations(name, &words(code)).join("\n");
        assert!(found.contains(complaint), "{name}: {code}: found {found:?}");
    }
}
