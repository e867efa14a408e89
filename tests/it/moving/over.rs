//! `move`: an embedded store becomes a PostgreSQL database, and everything is found there as before.

use prompt_service::config::{Secret, StoreConfig};
use prompt_service::domain::{PromptId, PromptRecord, UserId};
use prompt_service::store::BulkStore;
use serde_json::Value;

use crate::moving::{command, embedded_store};
use crate::store::{InsertPrompt, completed, user};
use crate::support::postgres::Database;
use crate::support::{App, Folder, config_in, spawn_app_in};

/// Prompts in all, of two users.
const PROMPTS: i64 = 2_000;

async fn app_on_sqlite(folder: Folder) -> App {
    let store = config_in(folder.path()).store;
    spawn_app_in(folder, |config| config.store = store).await
}

async fn app_on(database: &Database) -> App {
    let (folder, url) = (Folder::new(), Secret::new(database.url()));
    let data_dir = folder.path().to_owned();
    spawn_app_in(folder, |config| {
        config.store = StoreConfig::Postgres {
            data_dir,
            url,
            pool_size: 8,
        };
    })
    .await
}

/// A vector of unit length that is like no other.
fn direction(dimension: usize, seed: i64) -> Vec<u8> {
    let mut state = seed.unsigned_abs().wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut numbers: Vec<f32> = (0..dimension)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1_u32 << 23) as f32 - 1.0
        })
        .collect();
    let length = numbers.iter().map(|x| x * x).sum::<f32>().sqrt();
    numbers.iter_mut().for_each(|x| *x /= length);
    prompt_service::domain::Embedding(numbers.into()).to_f16_bytes()
}

/// Ids and scores of what each user finds.
async fn found(app: &App) -> Vec<Vec<(i64, f64)>> {
    let mut all = Vec::new();
    for name in ["alice", "bob"] {
        let (access, _) = app.login(name).await;
        for query in ["tea", "the+weather+in+spring", "a+proof", "0"] {
            let path = format!("/api/prompts/similar/?q={query}&k=20");
            let answer = app.get(&path).bearer(&access).send().await;
            assert_eq!(answer.status, 200, "{answer:?}");
            let results = answer.json()["results"].as_array().unwrap().clone();
            let row = |row: &Value| (row["id"].as_i64().unwrap(), row["score"].as_f64().unwrap());
            all.push(results.iter().map(row).collect());
        }
    }
    all
}

/// One side rounds the query: prompts of nearly the same score may change places, also around the last place.
fn same_but_for_rounding(ours: &[(i64, f64)], theirs: &[(i64, f64)]) {
    let last = theirs.last().unwrap();
    for (id, score) in ours {
        let other = theirs.iter().find(|row| row.0 == *id).unwrap_or(last);
        assert!((score - other.1).abs() < 2e-4, "{ours:?} {theirs:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_searches_find_the_same_after_a_move() {
    let app = app_on_sqlite(Folder::new()).await;
    app.user("alice").await.prompt("a cup of tea").await;
    app.user("bob").await.prompt("rain again").await;
    let folder = app.stop().await;
    let store = embedded_store(&folder);
    let pattern = store.prompt_records(None, 1).await.unwrap().remove(0);
    let dimension = pattern.vector.as_ref().unwrap().f16_bytes.len() / 2;
    let records: Vec<PromptRecord> = (3..=PROMPTS)
        .map(|id| {
            let mut record = pattern.clone();
            record.prompt.id = PromptId(id);
            record.prompt.user_id = UserId(id % 2 + 1);
            record.prompt.prompt = format!("prompt {id}");
            record.vector.as_mut().unwrap().f16_bytes = direction(dimension, id);
            record
        })
        .collect();
    store.put_prompts(records).await.unwrap();
    store.close().await;

    let app = app_on_sqlite(folder).await;
    let before = found(&app).await;
    let database = Database::migrated().await;
    let url = database.url();
    let config = config_in(app.folder.path());
    // Neither side may have a server.
    let refused = command(&config, &["move", "--to", &url]).await.unwrap_err();
    assert!(refused.contains("DATA_DIR"), "{refused}");
    let folder = app.stop().await;
    let config = config_in(folder.path());
    let other = app_on(&database).await;
    let refused = command(&config, &["move", "--to", &url]).await.unwrap_err();
    assert!(
        refused.contains("--to: another prompt-service"),
        "{refused}"
    );
    other.stop().await;

    let url_file = folder.path().join("url");
    std::fs::write(&url_file, format!("{url}\n")).unwrap();
    let from_file = ["move", "--to-file", url_file.to_str().unwrap()];
    for _ in 0..2 {
        let out = command(&config, &from_file).await.unwrap();
        assert!(out.starts_with("moved 2 users, 2000 prompts"), "{out}");
    }
    let moved = app_on(&database).await;
    let after = found(&moved).await;
    assert_eq!(after.len(), before.len());
    for (after, before) in after.iter().zip(&before) {
        assert_eq!(before.len(), 20);
        assert_eq!(after.len(), 20);
        same_but_for_rounding(after, before);
        same_but_for_rounding(before, after);
    }
    let (access, _) = moved.login("alice").await;
    let posted = moved.post("/api/prompts").bearer(&access);
    let posted = posted.json(&serde_json::json!({ "prompt": "next" }));
    assert_eq!(posted.send().await.json()["id"], PROMPTS + 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_post_that_is_repeated_with_its_key_across_a_move_is_not_answered_anew() {
    let app = app_on_sqlite(Folder::new()).await;
    let alice = app.user("alice").await;
    let body = serde_json::json!({ "prompt": "hello" });
    let post = alice.post("/api/prompts").header("idempotency-key", "k");
    let first = post.json(&body).send().await;
    assert_eq!(first.status, 201, "{first:?}");
    let folder = app.stop().await;
    let database = Database::migrated().await;
    let arguments = ["move", "--to", &database.url()];
    command(&config_in(folder.path()), &arguments)
        .await
        .unwrap();

    let moved = app_on(&database).await;
    let (access, _) = moved.login("alice").await;
    let post = moved.post("/api/prompts").bearer(&access);
    let again = post.header("idempotency-key", "k").json(&body).send().await;
    assert_eq!(again.header("idempotent-replayed"), Some("true"));
    assert_eq!(again.json(), first.json());
    let listed = moved.get("/api/prompts").bearer(&access).send().await;
    assert_eq!(listed.json()["results"].as_array().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_with_rows_of_its_own_is_refused() {
    let (folder, database) = (Folder::new(), Database::migrated().await);
    let store = embedded_store(&folder);
    let alice = user(&store, "alice").await.id;
    store.insert_prompt(completed(alice, "x")).await.unwrap();
    store.close().await;
    let app = app_on(&database).await;
    app.user("zoe").await;
    app.stop().await;
    let config = config_in(folder.path());
    let refused = command(&config, &["move", "--to", &database.url()]).await;
    let refused = refused.unwrap_err();
    assert!(refused.contains("not empty"), "{refused}");
    assert!(!refused.contains("127.0.0.1"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_on_a_postgres_store_export_import_and_name_pg_dump() {
    let (folder, database) = (Folder::new(), Database::migrated().await);
    let app = app_on(&database).await;
    app.user("alice").await.prompt("hello").await;
    let mut config = config_in(folder.path());
    config.store = StoreConfig::Postgres {
        data_dir: folder.path().to_owned(),
        url: Secret::new(database.url()),
        pool_size: 2,
    };
    let file = folder.path().join("all.jsonl");
    let file = file.to_str().unwrap();
    command(&config, &["export", file]).await.unwrap();
    let copy = folder.path().join("copy");
    let refused = command(&config, &["backup", copy.to_str().unwrap()]).await;
    assert!(refused.unwrap_err().contains("pg_dump"));
    let refused = command(&config, &["import", file]).await.unwrap_err();
    assert!(refused.contains("another prompt-service"), "{refused}");
    app.stop().await;
    let out = command(&config, &["import", file]).await.unwrap();
    assert!(out.contains("here already: 1 users, 1 prompts"), "{out}");
    let empty = Database::migrated().await;
    config.store = StoreConfig::Postgres {
        data_dir: folder.path().to_owned(),
        url: Secret::new(empty.url()),
        pool_size: 2,
    };
    let out = command(&config, &["import", file]).await.unwrap();
    assert!(out.contains("imported 1 users, 1 prompts"), "{out}");
    let (lines, error) = super::check::checked(Ok(config), false).await;
    assert_eq!(error, None, "{lines:?}");
    let store = super::check::line(&lines, "store");
    assert!(
        store.contains("1 users") && store.starts_with("ok"),
        "{store}"
    );
}
