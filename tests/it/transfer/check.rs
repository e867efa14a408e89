//! What `check` finds.

use prompt_service::app::check;
use prompt_service::config::{self, Config, StoreConfig};

use crate::support::{Folder, Upstream, config_in, spawn_app};

/// The lines of a check, and its error.
pub async fn checked(
    config: Result<Config, config::Error>,
    upstream_must_be_right: bool,
) -> (Vec<String>, Option<String>) {
    let mut out = Vec::new();
    let done = check::run(config, upstream_must_be_right, &mut out).await;
    let out = String::from_utf8(out).unwrap();
    let lines = out.lines().map(str::to_owned).collect();
    (lines, done.err().map(|error| error.to_string()))
}

pub fn line<'a>(lines: &'a [String], part: &str) -> &'a str {
    let is_of = |line: &&String| line[6..].starts_with(&format!("{part}: "));
    lines.iter().find(is_of).unwrap()
}

#[tokio::test]
async fn empty_folder_passes_the_check_and_stays_empty() {
    let folder = Folder::new();
    let data = folder.path().join("data");
    let (lines, error) = checked(Ok(config_in(&data)), false).await;
    assert_eq!(error, None, "{lines:?}");
    assert!(line(&lines, "settings").starts_with("ok"));
    for part in ["data folder", "signing key", "store"] {
        assert!(line(&lines, part).starts_with("note"), "{lines:?}");
    }
    assert!(
        line(&lines, "model").contains("384 dimensions"),
        "{lines:?}"
    );
    assert!(!data.exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn check_beside_a_server_counts_its_rows_and_names_the_address_in_use() {
    let app = spawn_app(|_| {}).await;
    app.user("alice").await.prompt("hello").await;
    let mut config = config_in(app.folder.path());
    config.server.bind_addr = app.addr;
    let (lines, error) = checked(Ok(config), false).await;
    assert_eq!(error, None, "{lines:?}");
    assert!(
        line(&lines, "store").contains("1 users, 1 prompts"),
        "{lines:?}"
    );
    assert!(line(&lines, "address").contains("in use"), "{lines:?}");
    assert!(line(&lines, "data folder").starts_with("ok"), "{lines:?}");
}

#[tokio::test]
async fn models_and_rows_without_a_price_are_noted() {
    let (folder, upstream) = (Folder::new(), Upstream::start().await);
    let path = folder.path().join("prices.json");
    std::fs::write(&path, r#"{"asked-1": {"mode": "chat"}}"#).unwrap();
    let mut config = config_in(&folder.path().join("data"));
    config.upstream = Some(crate::llm::config(&upstream));
    config.calls.budget = Some("5.00/month".parse().unwrap());
    config.prices_file = Some(path);
    let (lines, error) = checked(Ok(config), false).await;
    assert_eq!(error, None, "{lines:?}");
    assert!(line(&lines, "prices").starts_with("ok"), "{lines:?}");
    for part in [
        "note  prices: PRICES_FILE: 1 row has no price",
        "the default model asked-1 at primary has no price",
    ] {
        assert!(lines.iter().any(|line| line.contains(part)), "{lines:?}");
    }
}

#[tokio::test]
async fn each_fault_is_reported_and_counted() {
    let folder = Folder::new();
    let mut config = config_in(folder.path());
    config.store = StoreConfig::Sqlite {
        data_dir: folder.path().to_owned(),
        path: folder.path().join("notes.txt"),
    };
    std::fs::write(folder.path().join("notes.txt"), "no database ".repeat(99)).unwrap();
    std::fs::write(folder.path().join("secret.key"), "short").unwrap();
    config.embedding_model_dir = Some(folder.path().join("absent"));
    config.server.bind_addr = "192.0.2.1:80".parse().unwrap();
    let (lines, error) = checked(Ok(config), false).await;
    assert_eq!(error.as_deref(), Some("4 faults"), "{lines:?}");
    for (part, word) in [
        ("signing key", "secret.key"),
        ("store", "DATABASE_URL"),
        ("model", "EMBEDDING_MODEL_DIR"),
        ("address", "BIND_ADDR"),
    ] {
        let line = line(&lines, part);
        assert!(line.starts_with("fault") && line.contains(word), "{line}");
    }
}

#[tokio::test]
async fn unusable_setting_is_the_only_fault() {
    let error = config::Error::new("SECRET_KEY", "too short");
    let (lines, error) = checked(Err(error), false).await;
    assert_eq!(lines, ["fault settings: SECRET_KEY: too short"]);
    assert!(error.unwrap().starts_with("1 fault"));
}
