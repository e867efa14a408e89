//! Which files the store opens, and how it refuses the others.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use prompt_service::domain::UserId;
use prompt_service::store::sqlite::{self, OpenError, OpenOptions, SqliteStore};
use prompt_service::store::{AccountStore, PromptStore};
use rusqlite::Connection;

use crate::store::sqlite::open_in;
use crate::store::{list_users, model, newest, user};

fn refused(path: &Path) -> OpenError {
    let error = SqliteStore::open(path, OpenOptions::default()).unwrap_err();
    assert!(!error.to_string().contains('\n'), "{error}");
    error
}

#[tokio::test]
async fn only_the_owner_can_read_the_files() {
    let folder = tempfile::tempdir().unwrap();
    let store = open_in(folder.path(), OpenOptions::default());
    user(&store, "alice").await;
    for name in ["test.db", "test.db-wal", "test.db-shm"] {
        let mode = fs::metadata(folder.path().join(name))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
}

#[tokio::test]
async fn file_in_use_and_closed_file_are_opened_again() {
    let folder = tempfile::tempdir().unwrap();
    let first = open_in(folder.path(), OpenOptions::default());
    let alice = user(&first, "alice").await;
    let second = open_in(folder.path(), OpenOptions::default());
    assert_eq!(second.user(alice.id).await.unwrap(), Some(alice.clone()));
    first.close().await;
    let bob = user(&second, "bob").await;
    second.close().await;
    let third = open_in(folder.path(), OpenOptions::default());
    assert_eq!(list_users(&third, None, 9).await, [alice, bob]);
}

#[tokio::test]
async fn empty_file_is_accepted() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("test.db"), "").unwrap();
    open_in(folder.path(), OpenOptions::default())
        .ping()
        .await
        .unwrap();
}

/// The file of version 0.1.0 with an account, a prompt and its vector.
fn make_file_of_schema_3(path: &Path) {
    let file = Connection::open(path).unwrap();
    for migration in [
        include_str!("../../../migrations/sqlite/0001_initial.sql"),
        include_str!("../../../migrations/sqlite/0002_running_calls.sql"),
        include_str!("../../../migrations/sqlite/0003_purge_horizon.sql"),
    ] {
        file.execute_batch(migration).unwrap();
    }
    file.execute_batch(
        "PRAGMA application_id = 1349676371; PRAGMA user_version = 3;
         INSERT INTO user VALUES (7, 'alice', 'alice@example.org', 'hash', 1, 5, 6);
         INSERT INTO prompt (id, user_id, created_at, status, model, prompt, response)
             VALUES (9, 7, 8, 'completed', 'mock', 'Why?', 'Because.');
         INSERT INTO embedding_model VALUES (1, 'a', 2);
         INSERT INTO prompt_embedding VALUES (7, 9, 1, x'003c003c');",
    )
    .unwrap();
}

#[tokio::test]
async fn a_file_of_an_older_schema_is_counted_and_migrated() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("test.db");
    make_file_of_schema_3(&path);
    assert_eq!(sqlite::count_rows(&path).unwrap(), (1, 1));
    let store = open_in(folder.path(), OpenOptions::default());
    let alice = store.user_by_username("alice").await.unwrap().unwrap();
    assert_eq!(alice.id, UserId(7));
    let prompts = newest(&store, alice.id, 9).await;
    assert_eq!(prompts[0].response.as_deref(), Some("Because."));
    let page = store.vectors(&model("a"), Some(alice.id), None, 9).await;
    assert_eq!(page.unwrap().f16_bytes, [0, 60, 0, 60]);
    let covered = store.coverage(&model("a"), Some(alice.id)).await.unwrap();
    assert_eq!((covered.completed, covered.embedded), (1, 1));
    // The account's reference and the counter's triggers follow the renamed table and column.
    assert!(user(&store, "bob").await.id > alice.id);
    let deleted = store.delete_prompt(alice.id, prompts[0].id).await.unwrap();
    assert!(deleted.is_some());
    let covered = store.coverage(&model("a"), Some(alice.id)).await.unwrap();
    assert_eq!((covered.completed, covered.embedded), (0, 0));
    store.close().await;
    assert_eq!(sqlite::count_rows(&path).unwrap(), (2, 0));
}

#[test]
fn file_of_another_program_is_refused_and_not_changed() {
    let folder = tempfile::tempdir().unwrap();
    for (name, sql) in [
        ("tables.db", "CREATE TABLE theirs (x)"),
        (
            "marked.db",
            "PRAGMA application_id = 7; CREATE TABLE theirs (x)",
        ),
        ("versioned.db", "PRAGMA user_version = 1"),
    ] {
        let path = folder.path().join(name);
        Connection::open(&path).unwrap().execute_batch(sql).unwrap();
        let before = fs::read(&path).unwrap();
        let error = refused(&path);
        assert!(matches!(error, OpenError::Foreign), "{name}: {error:?}");
        assert!(error.to_string().contains("another program"));
        assert_eq!(fs::read(&path).unwrap(), before, "{name}");
    }
}

#[tokio::test]
async fn file_of_a_newer_version_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    open_in(folder.path(), OpenOptions::default()).close().await;
    let path = folder.path().join("test.db");
    let file = Connection::open(&path).unwrap();
    file.pragma_update(None, "user_version", 99).unwrap();
    let error = refused(&path);
    assert!(
        matches!(
            error,
            OpenError::Newer {
                found: 99,
                known: 1..99
            }
        ),
        "{error:?}"
    );
    assert!(error.to_string().contains("newer version"));
}

#[test]
fn file_that_is_no_database_is_refused_and_not_changed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("garbage.db");
    for garbage in ["hello".to_owned(), "no database ".repeat(2_000)] {
        fs::write(&path, &garbage).unwrap();
        let error = refused(&path);
        assert!(matches!(error, OpenError::NotADatabase(_)), "{error:?}");
        assert_eq!(fs::read_to_string(&path).unwrap(), garbage);
    }
}

#[test]
fn missing_folder_and_folder_instead_of_a_file_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let error = refused(&folder.path().join("missing").join("test.db"));
    assert!(matches!(error, OpenError::NoFolder(_)), "{error:?}");
    let error = refused(folder.path());
    assert!(matches!(error, OpenError::NotWritable(_)), "{error:?}");
}

#[test]
fn name_that_looks_like_a_uri_is_a_file_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file:test.db?mode=memory");
    SqliteStore::open(&path, OpenOptions::default()).unwrap();
    assert!(fs::metadata(&path).unwrap().len() > 0);
}
