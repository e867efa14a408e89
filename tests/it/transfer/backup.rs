//! Copies of the store, made while it serves.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::task::JoinSet;

use crate::support::{Folder, config_in, spawn_app, spawn_app_in};
use crate::transfer::{command, database_file};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn backup_made_while_users_post_holds_everything_acknowledged_before() {
    let app = spawn_app(|_| {}).await;
    let alice = Arc::new(app.user("alice").await);
    let mut before = Vec::new();
    for n in 0..20 {
        before.push(alice.prompt(&format!("before {n}")).await);
    }
    let done = Arc::new(AtomicBool::new(false));
    let mut posting = JoinSet::new();
    posting.spawn({
        let (alice, done) = (Arc::clone(&alice), Arc::clone(&done));
        async move {
            let mut posted = 0;
            while !done.load(Ordering::Relaxed) {
                alice.prompt("meanwhile").await;
                posted += 1;
            }
            posted
        }
    });
    eventually!(alice.all_prompts().await.len() > before.len());
    let copies = Folder::new();
    let copy = copies.path().join("copy.sqlite3");
    let config = config_in(app.folder.path());
    let out = command(&config, &["backup", copy.to_str().unwrap()]).await;
    done.store(true, Ordering::Relaxed);
    assert!(posting.join_next().await.unwrap().unwrap() > 0);
    let out = out.unwrap();
    assert!(out.starts_with("copied 1 users and "), "{out}");
    assert!(out.ends_with("checked and whole\n"), "{out}");
    let mode = fs::metadata(&copy).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(fs::read_dir(copies.path()).unwrap().count(), 1);

    // As the guide describes: the copy and the key into an empty folder.
    let restored = Folder::new();
    fs::copy(&copy, database_file(&restored)).unwrap();
    let key = app.folder.path().join("secret.key");
    fs::copy(key, restored.path().join("secret.key")).unwrap();
    app.stop().await;
    let again = spawn_app_in(restored, |_| {}).await;
    // A token given out before is still valid, because the key was copied too.
    let client = again.client().with_bearer(&alice.access);
    let me = client.get("/api/auth/me/").send().await;
    assert_eq!(me.status, 200, "{me:?}");
    for (n, id) in before.iter().enumerate() {
        let found = client.get(&format!("/api/prompts/{id}")).send().await;
        assert_eq!(found.status, 200, "{found:?}");
        assert_eq!(found.json()["prompt"], format!("before {n}"));
    }
    let near = client
        .get("/api/prompts/similar?q=before+7&k=1")
        .send()
        .await;
    assert_eq!(near.ids(), [before[7]]);
}

#[tokio::test]
async fn backup_replaces_no_file() {
    let app = spawn_app(|_| {}).await;
    let file = app.folder.path().join("mine");
    fs::write(&file, "precious").unwrap();
    let config = config_in(app.folder.path());
    let refused = command(&config, &["backup", file.to_str().unwrap()]).await;
    assert!(refused.unwrap_err().contains("exists already"));
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
}

#[tokio::test]
async fn backup_and_export_without_a_store_fail_and_make_nothing() {
    let folder = Folder::new();
    let config = config_in(&folder.path().join("data"));
    let file = folder.path().join("copy");
    for arguments in [
        ["backup", file.to_str().unwrap()],
        ["export", file.to_str().unwrap()],
    ] {
        assert!(command(&config, &arguments).await.is_err());
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn damaged_store_gives_no_backup() {
    let app = spawn_app(|_| {}).await;
    let alice = app.user("alice").await;
    for n in 0..30 {
        alice.prompt(&format!("{n} {}", "text ".repeat(500))).await;
    }
    let folder = app.stop().await;
    let mut bytes = fs::read(database_file(&folder)).unwrap();
    // Every page but the first two, so that the copy reads a damaged one.
    bytes[16_384..].fill(0xa5);
    fs::write(database_file(&folder), bytes).unwrap();
    let file = folder.path().join("copy");
    let config = config_in(folder.path());
    let refused = command(&config, &["backup", file.to_str().unwrap()]).await;
    assert!(refused.is_err(), "{refused:?}");
    assert!(!file.exists());
}
