//! The suite on SQLite, and what its store promises beyond it while one process uses the file.

use std::fs::File;
use std::future::poll_fn;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::{Duration, Instant};

use prompt_service::domain::{Prompt, PromptId, PromptStatus, UserId};
use prompt_service::store::sqlite::{OpenOptions, SqliteStore};
use prompt_service::store::{AccountStore, CallStore, Error, PromptStore};
use rusqlite::Connection;
use tempfile::TempDir;
use tokio::task::JoinSet;

use crate::store::calls::{call, started};
use crate::store::model::compare_with_naive_model;
use crate::store::{InsertPrompt, TestableStore, completed, embedded, model, newest, user};
use crate::support::DEADLINE;

async fn open() -> (Arc<dyn TestableStore>, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let store = open_in(folder.path(), OpenOptions::default());
    (Arc::new(store), folder)
}

pub fn open_in(folder: &Path, options: OpenOptions) -> SqliteStore {
    SqliteStore::open(&folder.join("test.db"), options).unwrap()
}

mod suite {
    conformance_suite!(crate::store::sqlite::open);
}

#[test]
fn random_operations_agree_with_a_naive_model() {
    compare_with_naive_model(open);
}

/// Reads the file without the store.
pub fn prompt_is_in_file(connection: &Connection, id: PromptId) -> bool {
    connection
        .prepare_cached("SELECT 1 FROM prompt WHERE id = ?1")
        .unwrap()
        .exists([id.0])
        .unwrap()
}

pub fn assert_sound(folder: &Path) {
    let connection = Connection::open(folder.join("test.db")).unwrap();
    let verdict: String = connection
        .query_row("PRAGMA integrity_check", [], |row| row.get(0))
        .unwrap();
    assert_eq!(verdict, "ok");
    let broken = connection
        .prepare("PRAGMA foreign_key_check")
        .unwrap()
        .exists([])
        .unwrap();
    assert!(!broken);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn up_to_256_queued_writes_share_a_commit_and_are_acknowledged_after_it() {
    let folder = tempfile::tempdir().unwrap();
    let options = OpenOptions {
        busy_timeout: DEADLINE,
        ..OpenOptions::default()
    };
    let store = Arc::new(open_in(folder.path(), options));
    let alice = user(&*store, "alice").await.id;
    let connect = || Connection::open(folder.path().join("test.db")).unwrap();
    // The writer takes the first write and waits for the lock of the file. All others queue.
    let other = connect();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let mut first = pin!(store.begin_call(call(alice)));
    poll_fn(|context| {
        assert!(first.as_mut().poll(context).is_pending());
        Poll::Ready(())
    })
    .await;
    eventually!(store.stats().queued_writes == 0);
    let file = Arc::new(Mutex::new(connect()));
    let mut tasks = JoinSet::new();
    for _ in 0..300 {
        let (store, file) = (Arc::clone(&store), Arc::clone(&file));
        tasks.spawn(async move {
            let id = started(&*store, call(alice)).await.id;
            let is_stored = prompt_is_in_file(&file.lock().unwrap(), id);
            assert!(is_stored, "acknowledged before the commit");
        });
    }
    eventually!(store.stats().queued_writes == 300);
    other.execute_batch("COMMIT").unwrap();
    first.await.unwrap();
    tasks.join_all().await;
    let stats = store.stats();
    // The account, the first prompt, 256 prompts, the other 44.
    assert_eq!(stats.committed_batches, 4);
    assert_eq!(stats.committed_operations, 302);
    assert_eq!(stats.failed_batches, 0);
    assert_eq!((stats.queued_writes, stats.queued_reads), (0, 0));
}

#[tokio::test]
async fn closing_finishes_queued_writes_and_empties_the_log() {
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(open_in(folder.path(), OpenOptions::default()));
    let alice = user(&*store, "alice").await.id;
    let mut tasks = JoinSet::new();
    for _ in 0..100 {
        let store = Arc::clone(&store);
        tasks.spawn(async move { store.begin_call(call(alice)).await });
    }
    // On this runtime of one thread no task has run yet. After one turn all have queued their
    // write.
    tokio::task::yield_now().await;
    store.close().await;
    let answered = tasks.join_all().await;
    let stored = answered.iter().filter(|answer| answer.is_ok()).count();
    assert!(stored > 0);
    assert!(!folder.path().join("test.db-wal").exists());
    for answer in answered {
        assert!(matches!(answer, Ok(_) | Err(Error::Unavailable(_))));
    }
    let late = store.begin_call(call(alice)).await;
    assert!(matches!(late, Err(Error::Unavailable(_))), "{late:?}");
    assert!(matches!(store.ping().await, Err(Error::Unavailable(_))));
    store.close().await;

    let again = open_in(folder.path(), OpenOptions::default());
    let listed = again
        .list_prompts(alice, None, 999, usize::MAX)
        .await
        .unwrap()
        .prompts;
    assert_eq!(listed.len(), stored);
}

#[tokio::test]
async fn ids_are_not_reused_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let store = open_in(folder.path(), OpenOptions::default());
    let alice = user(&store, "alice").await.id;
    let id = store.insert_prompt(completed(alice, "p")).await.unwrap().id;
    store.delete_prompt(alice, id).await.unwrap();
    store.close().await;
    let again = open_in(folder.path(), OpenOptions::default());
    let next = again.insert_prompt(completed(alice, "p")).await.unwrap().id;
    assert!(next > id);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn log_starts_over_although_a_reader_is_always_active() {
    let folder = tempfile::tempdir().unwrap();
    let store = open_in(folder.path(), OpenOptions::default());
    let alice = user(&store, "alice").await.id;
    let done = Arc::new(AtomicBool::new(false));
    // Each reader begins before the one before it ends, so the log always has a reader.
    let readers = std::thread::spawn({
        let done = Arc::clone(&done);
        let path = folder.path().join("test.db");
        let mut pair = [
            Connection::open(&path).unwrap(),
            Connection::open(&path).unwrap(),
        ];
        move || {
            while !done.load(Ordering::Relaxed) {
                pair[0]
                    .execute_batch("BEGIN; SELECT count(*) FROM account;")
                    .unwrap();
                if !pair[1].is_autocommit() {
                    pair[1].execute_batch("COMMIT").unwrap();
                }
                std::thread::sleep(Duration::from_millis(5));
                pair.swap(0, 1);
            }
        }
    });
    // The writer starts the log over when it has 64 MB, or soon after if a reader takes long.
    let filler = "x".repeat(100_000);
    let (mut beginning, mut beginnings) = (Vec::new(), 0);
    let deadline = Instant::now() + DEADLINE;
    while beginnings < 3 {
        assert!(Instant::now() < deadline, "it began {beginnings} times");
        let id = store
            .insert_prompt(completed(alice, &filler))
            .await
            .unwrap()
            .id;
        store.delete_prompt(alice, id).await.unwrap();
        let mut log = File::open(folder.path().join("test.db-wal")).unwrap();
        let mut salt = [0; 8];
        // The salt changes each time the log starts over. There is none while the log is empty.
        if log.seek(SeekFrom::Start(16)).is_ok()
            && log.read_exact(&mut salt).is_ok()
            && beginning != salt
        {
            beginning = salt.to_vec();
            beginnings += 1;
        }
    }
    done.store(true, Ordering::Relaxed);
    readers.join().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_store_is_unavailable_and_recovers_when_there_is_room() {
    let folder = tempfile::tempdir().unwrap();
    let options = OpenOptions {
        max_pages: Some(200),
        ..OpenOptions::default()
    };
    let store = open_in(folder.path(), options);
    let alice = user(&store, "alice").await.id;
    let filler = "x".repeat(50_000);
    let mut stored = Vec::new();
    let refused = loop {
        match store.insert_prompt(embedded(alice, &filler, 1)).await {
            Ok(prompt) => stored.push(prompt.id),
            Err(error) => break error,
        }
        assert!(stored.len() < 100, "1.6 MB do not hold 10 MB");
    };
    assert!(matches!(refused, Error::Unavailable(_)), "{refused:?}");
    // Reads go on, and acknowledged prompts are stored.
    let listed = newest(&store, alice, 999).await;
    let completed = |prompt: &&Prompt| prompt.status == PromptStatus::Completed;
    assert_eq!(listed.iter().filter(completed).count(), stored.len());
    let covered = store.coverage(&model("a"), None).await.unwrap();
    assert_eq!(covered.embedded, stored.len() as u64);
    for id in stored.drain(..2) {
        assert!(store.delete_prompt(alice, id).await.unwrap().is_some());
    }
    store
        .insert_prompt(embedded(alice, &filler, 1))
        .await
        .unwrap();
    store.close().await;
    assert_sound(folder.path());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writer_locked_out_for_too_long_is_unavailable_and_recovers() {
    let folder = tempfile::tempdir().unwrap();
    let options = OpenOptions {
        busy_timeout: Duration::from_millis(50),
        ..OpenOptions::default()
    };
    let store = open_in(folder.path(), options);
    let alice = user(&store, "alice").await.id;
    let other = Connection::open(folder.path().join("test.db")).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let refused = store.insert_prompt(completed(alice, "p")).await;
    assert!(matches!(refused, Err(Error::Unavailable(_))), "{refused:?}");
    assert!(
        store.user(alice).await.unwrap().is_some(),
        "readers are not affected"
    );
    other.execute_batch("COMMIT").unwrap();
    store.insert_prompt(completed(alice, "p")).await.unwrap();
    assert_eq!(store.stats().failed_batches, 1);
}

#[tokio::test]
async fn errors_contain_neither_statements_nor_values() {
    let folder = tempfile::tempdir().unwrap();
    let store = open_in(folder.path(), OpenOptions::default());
    let foreign = Connection::open(folder.path().join("test.db")).unwrap();
    let refused = store
        .insert_prompt(completed(UserId(4), "confidential"))
        .await;
    foreign.execute_batch("DROP TABLE revoked_token").unwrap();
    let broken = store.is_token_revoked("confidential").await;
    for error in [refused.unwrap_err(), broken.unwrap_err()] {
        let shown = format!("{error:?} {error}");
        assert!(!shown.contains("confidential"), "{shown}");
        assert!(
            !shown.contains("SELECT") && !shown.contains("INSERT"),
            "{shown}"
        );
    }
}
