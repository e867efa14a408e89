//! Users and prompts as JSON lines: what `export` writes and `import` reads.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use prompt_service::domain::{PromptId, PromptStatus};
use prompt_service::store::{AccountStore, PromptStore};
use serde_json::{Value, json};

use crate::store::bulk::prompt_records;
use crate::store::list_users;
use crate::support::{App, Folder, User, config_in, spawn_app, spawn_app_in};
use crate::transfer::{command, embedded_store};

/// An app with alice, who has two prompts and deleted a third, and bob, who is disabled.
async fn furnished() -> (App, User) {
    let app = spawn_app(|_| {}).await;
    let alice = app.user("alice").await;
    alice.prompt("How do I bake bread?").await;
    alice.prompt("Como asar pão 🦀\n\"quoted\"").await;
    let gone = alice.prompt("gone").await;
    alice.delete(&format!("/api/prompts/{gone}")).send().await;
    let bob = app.user("bob").await;
    let store = embedded_store(&app.folder);
    let now = prompt_service::domain::Timestamp::now();
    store
        .set_active(prompt_service::domain::UserId(bob.id), false, now)
        .await
        .unwrap();
    store.close().await;
    (app, alice)
}

async fn exported(folder: &Folder, flags: &[&str]) -> (PathBuf, Vec<Value>) {
    let file = folder.path().join(format!("out{}.jsonl", flags.len()));
    let mut arguments = vec!["export", file.to_str().unwrap()];
    arguments.extend(flags);
    command(&config_in(folder.path()), &arguments)
        .await
        .unwrap();
    let text = fs::read_to_string(&file).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
    (file, lines.collect())
}

fn import(file: &std::path::Path) -> [&str; 2] {
    ["import", file.to_str().unwrap()]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn export_beside_a_server_has_every_row_and_no_secret() {
    let (app, alice) = furnished().await;
    let (file, lines) = exported(&app.folder, &[]).await;
    let mode = fs::metadata(&file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(lines[0]["format"], "prompt-service");
    assert_eq!(lines[0]["version"], 1);
    assert_eq!(
        (&lines[0]["last_user_id"], &lines[0]["last_prompt_id"]),
        (&json!(2), &json!(3))
    );
    let kinds: Vec<_> = lines
        .iter()
        .map(|line| line["type"].as_str().unwrap())
        .collect();
    assert_eq!(kinds, ["header", "user", "user", "prompt", "prompt"]);
    assert_eq!(lines[1]["username"], "alice");
    assert_eq!(lines[1]["password_hash"], Value::Null);
    assert_eq!(lines[2]["is_active"], false);
    let shown = alice.get("/api/prompts/1").send().await.json();
    for field in [
        "id",
        "prompt",
        "response",
        "model",
        "status",
        "error",
        "created_at",
    ] {
        assert_eq!(lines[3][field], shown[field], "{field}");
    }
    assert_eq!(lines[3].get("embedding"), None);
    let text = fs::read_to_string(&file).unwrap();
    assert!(!text.contains("argon2"), "no hash");
}

#[tokio::test]
async fn export_to_standard_output_differs_only_in_its_time() {
    let (app, _) = furnished().await;
    let (_, lines) = exported(&app.folder, &[]).await;
    let config = config_in(app.folder.path());
    for arguments in [&["export"][..], &["export", "-"]] {
        let out = command(&config, arguments).await.unwrap();
        let said: Vec<Value> = out
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(said[1..], lines[1..]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn export_with_everything_restores_the_same_service() {
    let (app, alice) = furnished().await;
    let before = alice.all_prompts().await;
    let found = alice.search("baking bread at home", 2).await.json();
    let flags = ["--with-password-hashes", "--with-embeddings"];
    let (file, _) = exported(&app.folder, &flags).await;
    let _kept = app.stop().await;

    let other = Folder::new();
    let config = config_in(other.path());
    let out = command(&config, &import(&file)).await.unwrap();
    assert!(
        out.starts_with("to import: 2 users, 2 prompts\nimported 2 users, 2 prompts in "),
        "{out}"
    );
    let again = command(&config, &import(&file)).await.unwrap();
    assert!(
        again.contains("here already: 2 users, 2 prompts\n"),
        "{again}"
    );

    let app = spawn_app_in(other, |_| {}).await;
    let (access, _) = app.login("alice").await;
    let client = app.client().with_bearer(&access);
    let listed = client.get("/api/prompts/").send().await.json();
    assert_eq!(*listed["results"].as_array().unwrap(), before);
    let path = "/api/prompts/similar?q=baking+bread+at+home&k=2";
    assert_eq!(client.get(path).send().await.json(), found);
    // The deleted prompt's id is not given out again.
    let posted = client
        .post("/api/prompts")
        .json(&json!({"prompt": "new"}))
        .send()
        .await;
    assert_eq!(posted.json()["id"], 4);
    let refused = app.try_login("bob", crate::support::PASSWORD).await;
    assert_eq!(refused.status, 401);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn import_without_hashes_and_vectors_gives_no_password_and_searches_work() {
    let (app, alice) = furnished().await;
    let found = alice.similar("baking bread at home", 1).await;
    let (file, _) = exported(&app.folder, &[]).await;
    let _kept = app.stop().await;
    let other = Folder::new();
    command(&config_in(other.path()), &import(&file))
        .await
        .unwrap();
    let app = spawn_app_in(other, |_| {}).await;
    let refused = app.try_login("alice", crate::support::PASSWORD).await;
    assert_eq!(refused.status, 401);
    let token = app.token(
        prompt_service::credentials::TokenType::Access,
        alice.id,
        prompt_service::domain::Timestamp::now(),
        crate::support::DEADLINE,
    );
    let client = app.client().with_bearer(&token);
    let near = client
        .get("/api/prompts/similar?q=baking+bread+at+home&k=1")
        .send()
        .await;
    assert_eq!(near.ids(), found);
}

const HEADER: &str = r#"{"type":"header","format":"prompt-service","version":1}"#;

fn file_of(folder: &Folder, lines: &[&str]) -> PathBuf {
    let file = folder.path().join("in.jsonl");
    fs::write(&file, lines.join("\n")).unwrap();
    file
}

#[tokio::test]
async fn file_written_by_hand_needs_few_fields() {
    let folder = Folder::new();
    let file = file_of(
        &folder,
        &[
            HEADER,
            r#"{"type":"user","id":5,"username":"eve","created_at":"2020-01-02T03:04:05Z"}"#,
            "",
            r#"{"type":"prompt","id":9,"user_id":5,"prompt":"hi","response":"ho","created_at":"2020-01-02T03:04:06.5Z"}"#,
            r#"{"type":"prompt","id":10,"user_id":5,"prompt":"hi","created_at":"2020-01-02T03:04:07Z"}"#,
        ],
    );
    command(&config_in(folder.path()), &import(&file))
        .await
        .unwrap();
    let store = embedded_store(&folder);
    let rows = prompt_records(&store).await;
    assert_eq!(rows[0].prompt.status, PromptStatus::Completed);
    assert_eq!(rows[0].prompt.model, "unknown");
    assert_eq!(
        rows[0].prompt.created_at.to_string(),
        "2020-01-02T03:04:06.500000Z"
    );
    assert!(rows[0].vector.is_some());
    assert_eq!(rows[1].prompt.status, PromptStatus::Failed);
    assert_eq!(rows[1].vector, None);
    let eve = store.user_by_username("eve").await.unwrap().unwrap();
    assert!(eve.is_active && eve.password_hash == "!");
    store.close().await;
}

#[tokio::test]
async fn null_characters_of_responses_are_replaced() {
    let folder = Folder::new();
    let config = config_in(folder.path());
    let at = r#""created_at":"2020-01-02T03:04:05Z""#;
    let lines = [
        HEADER.to_owned(),
        format!(r#"{{"type":"user","id":1,"username":"eve",{at}}}"#),
        format!(
            r#"{{"type":"prompt","id":1,"user_id":1,"prompt":"x","response":"a\u0000b","model":"m\u0000",{at}}}"#
        ),
    ];
    let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
    let file = file_of(&folder, &lines);
    command(&config, &import(&file)).await.unwrap();
    let store = embedded_store(&folder);
    let kept = prompt_records(&store).await.remove(0).prompt;
    assert_eq!(kept.response.as_deref(), Some("a\u{fffd}b"));
    assert_eq!(kept.model, "m\u{fffd}");
    store.close().await;
}

#[tokio::test]
async fn faulty_lines_are_named_by_number_and_prevent_the_import_unless_skipped() {
    let folder = Folder::new();
    let config = config_in(folder.path());
    let at = r#""created_at":"2020-01-02T03:04:05Z""#;
    let lines = [
        HEADER.to_owned(),
        format!(r#"{{"type":"user","id":1,"username":"eve",{at}}}"#),
        format!(r#"{{"type":"user","id":2,"username":"eve",{at}}}"#),
        format!(r#"{{"type":"user","id":2,"username":"two words",{at}}}"#),
        format!(r#"{{"type":"user","id":3,"username":"mallory","password":"hunter2",{at}}}"#),
        format!(r#"{{"type":"user","id":0,"username":"zero",{at}}}"#),
        r#"{"type":"user","id":4,"username":"kim","created_at":"yesterday"}"#.to_owned(),
        format!(r#"{{"type":"prompt","id":1,"user_id":1,"prompt":"good","response":"x",{at}}}"#),
        format!(r#"{{"type":"prompt","id":1,"user_id":1,"prompt":"again","response":"x",{at}}}"#),
        format!(r#"{{"type":"prompt","id":2,"user_id":7,"prompt":"hunter2","response":"x",{at}}}"#),
        format!(r#"{{"type":"prompt","id":3,"user_id":1,"prompt":" \t","response":"x",{at}}}"#),
        format!(
            r#"{{"type":"prompt","id":4,"user_id":1,"prompt":"a\u0000b","response":"x",{at}}}"#
        ),
        format!(
            r#"{{"type":"prompt","id":5,"user_id":1,"prompt":"{}","response":"x",{at}}}"#,
            "x".repeat(32_001)
        ),
        format!(r#"{{"type":"prompt","id":6,"user_id":1,"prompt":"x","status":"completed",{at}}}"#),
        "hunter2".to_owned(),
        format!(r#"{{"type":"user","id":9,"username":"late",{at}}}"#),
        format!(r#"{{"type":"prompt","id":9007199254740992,"user_id":1,"prompt":"x",{at}}}"#),
    ];
    let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
    let file = file_of(&folder, &lines);

    let output = command(&config, &import(&file)).await.unwrap_err();
    assert!(!output.contains("hunter2"), "{output}");
    let numbers: Vec<u64> = output
        .lines()
        .filter_map(|line| {
            line.strip_prefix("fault: line ")?
                .split(':')
                .next()?
                .parse()
                .ok()
        })
        .collect();
    assert_eq!(numbers, [3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17]);
    assert!(
        output.contains("14 rows cannot be imported; nothing was imported"),
        "{output}"
    );
    let store = embedded_store(&folder);
    assert_eq!(list_users(&store, None, 9).await, []);
    store.close().await;

    let file = file.to_str().unwrap();
    let dry = command(&config, &["import", file, "--dry-run", "--skip-faulty"]).await;
    assert!(dry.unwrap_err().contains("to import: 1 users, 1 prompts"));
    command(&config, &["import", file, "--skip-faulty"])
        .await
        .unwrap();
    let store = embedded_store(&folder);
    assert_eq!(list_users(&store, None, 9).await.len(), 1);
    let kept = store
        .prompts(None, &[PromptId(1)], usize::MAX)
        .await
        .unwrap()
        .whole;
    assert_eq!(kept[0].prompt, "good");
    store.close().await;
}

#[tokio::test]
async fn file_that_is_not_an_export_is_refused() {
    let folder = Folder::new();
    let config = config_in(folder.path());
    for (lines, word) in [
        (&[][..], "header"),
        (&["hello"], "header"),
        (&[r#"{"type":"user","id":1}"#], "header"),
        (
            &[r#"{"type":"header","format":"other","version":1}"#],
            "header",
        ),
        (
            &[r#"{"type":"header","format":"prompt-service","version":2}"#],
            "newer",
        ),
    ] {
        let refused = command(&config, &import(&file_of(&folder, lines))).await;
        assert!(refused.as_ref().unwrap_err().contains(word), "{refused:?}");
    }
    let absent = folder.path().join("absent");
    assert!(command(&config, &import(&absent)).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn import_beside_a_server_is_refused() {
    let app = spawn_app(|_| {}).await;
    let file = file_of(&app.folder, &[HEADER]);
    let refused = command(&config_in(app.folder.path()), &import(&file)).await;
    assert!(
        refused
            .unwrap_err()
            .contains("another prompt-service is using this folder")
    );
}

#[tokio::test]
async fn endless_line_is_skipped_in_bounded_memory() {
    let folder = Folder::new();
    let endless = "x".repeat(130 << 20);
    let user = r#"{"type":"user","id":1,"username":"eve","created_at":"2020-01-02T03:04:05Z"}"#;
    let file = file_of(&folder, &[HEADER, &endless, user]);
    drop(endless);
    let config = config_in(folder.path());
    let output = command(&config, &import(&file)).await.unwrap_err();
    assert!(
        output.starts_with(
            "to import: 1 users, 0 prompts\nfault: line 2: it is longer than 64 MiB\n"
        ),
        "{output}"
    );
}
