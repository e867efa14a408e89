//! Chat calls through `export`, `import` and `move`: nothing of them changes.

use prompt_service::config::{Config, Secret, StoreConfig};
use serde_json::{Value, json};

use crate::support::postgres::Database;
use crate::support::{App, Client, Folder, config_in, spawn_app_in};
use crate::transfer::command;
use crate::v1::{answered, ask, id_of, path, streamed, with};

/// An app on the embedded store, with three prompts of alice: a chat call with labels, a streamed
/// one, and a prompt of the other front door.
async fn furnished() -> App {
    let folder = Folder::new();
    let store = config_in(folder.path()).store;
    let app = spawn_app_in(folder, |config: &mut Config| config.store = store).await;
    let alice = app.user("alice").await;
    let messages = json!([
        { "role": "system", "content": "Be brief.", "x_unknown": 1.50 },
        { "role": "user", "content": [{ "type": "text", "text": "How do I bake bread? 🍞" }] },
    ]);
    let members = json!({ "messages": messages, "seed": 7, "metadata": { "topic": "bread" } });
    // In several lines, as `curl` with a file sends it.
    let body = serde_json::to_string_pretty(&with(ask(""), &members)).unwrap();
    let post = alice.post("/v1/chat/completions");
    let first = post.body("application/json", body).send().await;
    assert_eq!(id_of(&first), "chatcmpl-1");
    let second = answered(&alice, &streamed(ask("And cake?"))).await;
    assert!(second.text().contains("chatcmpl-2"));
    alice.prompt("And pies?").await;
    app
}

/// All that alice sees of her calls.
async fn seen(app: &App) -> Vec<Value> {
    let (access, _) = app.login("alice").await;
    let client: Client = app.client().with_bearer(&access);
    let mut seen = Vec::new();
    for path in [
        "/v1/chat/completions?limit=100".to_owned(),
        "/v1/chat/completions?metadata[topic]=bread".to_owned(),
        path("chatcmpl-1"),
        path("chatcmpl-2"),
        format!("{}/messages", path("chatcmpl-1")),
        format!("{}/messages", path("chatcmpl-2")),
        "/api/prompts".to_owned(),
    ] {
        let answer = client.get(&path).send().await;
        assert_eq!(answer.status, 200, "{path}: {answer:?}");
        seen.push(answer.json());
    }
    assert_eq!(seen[0]["data"].as_array().unwrap().len(), 2);
    assert_eq!(seen[1]["data"].as_array().unwrap().len(), 1);
    seen
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chat_calls_are_the_same_after_export_and_import() {
    let app = furnished().await;
    let before = seen(&app).await;
    let file = app.folder.path().join("out.jsonl");
    let file = file.to_str().unwrap();
    let export = [
        "export",
        file,
        "--with-password-hashes",
        "--with-embeddings",
    ];
    command(&config_in(app.folder.path()), &export)
        .await
        .unwrap();
    let text = std::fs::read_to_string(file).unwrap();
    let lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let prompts: Vec<_> = lines
        .iter()
        .filter(|line| line["type"] == "prompt")
        .collect();
    let sources: Vec<_> = prompts.iter().map(|line| line["source"].as_str()).collect();
    assert_eq!(sources, [Some("v1"), Some("v1"), Some("api")]);
    let chat = &prompts[0]["chat"];
    assert_eq!(chat["messages"][0]["content"], "Be brief.");
    assert_eq!(chat["request"]["seed"], 7);
    assert_eq!(chat["metadata"], json!({ "topic": "bread" }));
    assert_eq!(chat["answer"]["object"], "chat.completion");
    assert_eq!(prompts[2].get("chat"), None);

    let other = Folder::new();
    let out = command(&config_in(other.path()), &["import", file]).await;
    assert!(out.unwrap().contains("imported 1 users, 3 prompts"));
    let again = command(&config_in(other.path()), &["import", file]).await;
    assert!(again.unwrap().contains("here already: 1 users, 3 prompts"));
    let store = config_in(other.path()).store;
    let app = spawn_app_in(other, |config: &mut Config| config.store = store).await;
    assert_eq!(seen(&app).await, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chat_calls_are_the_same_after_a_move() {
    let app = furnished().await;
    let before = seen(&app).await;
    let folder = app.stop().await;
    let database = Database::migrated().await;
    let url = database.url();
    let moved = command(&config_in(folder.path()), &["move", "--to", &url]).await;
    assert!(moved.unwrap().starts_with("moved 1 users, 3 prompts"));
    let other = Folder::new();
    let data_dir = other.path().to_owned();
    let app = spawn_app_in(other, |config: &mut Config| {
        config.store = StoreConfig::Postgres {
            data_dir,
            url: Secret::new(url),
            pool_size: 8,
        };
    })
    .await;
    assert_eq!(seen(&app).await, before);
}
