//! The suite on SQLite, and what its store promises beyond it while one process uses the file.

use std::fs::File;
use std::future::poll_fn;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use prompt_service::domain::{PromptId, UserId};
use prompt_service::store::sqlite::{OpenOptions, SqliteStore};
use prompt_service::store::{AccountStore, Error, PromptStore};
use rusqlite::Connection;
use tempfile::TempDir;
use tokio::task::JoinSet;

use crate::store::model::compare_with_naive_model;
use crate::store::{TestableStore, completed, embedded, model, newest, user};
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

/// A look at the file that owes nothing to the store.
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
async fn writes_share_commits_and_are_answered_after_them() {
    let folder = tempfile::tempdir().unwrap();
    let options = OpenOptions {
        busy_timeout: DEADLINE,
        ..OpenOptions::default()
    };
    let store = Arc::new(open_in(folder.path(), options));
    let alice = user(&*store, "alice").await.id;
    // The writer has taken one, and waits with it for the file while all others queue.
    let other = Connection::open(folder.path().join("test.db")).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let mut first = pin!(store.insert_prompt(completed(alice, "p")));
    poll_fn(|context| {
        assert!(first.as_mut().poll(context).is_pending());
        Poll::Ready(())
    })
    .await;
    eventually!(store.stats().queued_writes == 0);
    let mut tasks = JoinSet::new();
    for _ in 0..32 {
        let store = Arc::clone(&store);
        let file = Connection::open(folder.path().join("test.db")).unwrap();
        tasks.spawn(async move {
            for _ in 0..10 {
                let id = store.insert_prompt(completed(alice, "p")).await.unwrap().id;
                assert!(prompt_is_in_file(&file, id), "answered before the commit");
            }
        });
    }
    eventually!(store.stats().queued_writes == 32);
    other.execute_batch("COMMIT").unwrap();
    first.await.unwrap();
    tasks.join_all().await;
    let stats = store.stats();
    assert_eq!(stats.committed_operations, 322);
    // The 32 that waited shared one commit.
    assert!(stats.committed_batches <= 322 - 31, "{stats:?}");
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
        tasks.spawn(async move { store.insert_prompt(completed(alice, "p")).await });
    }
    // On this runtime of one thread no task has run yet. After one turn all have queued their write.
    tokio::task::yield_now().await;
    store.close().await;
    let answered = tasks.join_all().await;
    let stored = answered.iter().filter(|answer| answer.is_ok()).count();
    assert!(stored > 0);
    assert!(!folder.path().join("test.db-wal").exists());
    for answer in answered {
        assert!(matches!(answer, Ok(_) | Err(Error::Unavailable(_))));
    }
    let late = store.insert_prompt(completed(alice, "p")).await;
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
async fn the_log_starts_over_though_someone_is_always_reading() {
    let folder = tempfile::tempdir().unwrap();
    let store = open_in(folder.path(), OpenOptions::default());
    let alice = user(&store, "alice").await.id;
    let done = Arc::new(AtomicBool::new(false));
    // Each reader begins before the one before it ends, so that at no moment the log is without a reader.
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
                    .execute_batch("BEGIN; SELECT count(*) FROM user;")
                    .unwrap();
                if !pair[1].is_autocommit() {
                    pair[1].execute_batch("COMMIT").unwrap();
                }
                std::thread::sleep(Duration::from_millis(5));
                pair.swap(0, 1);
            }
        }
    });
    // The writer makes room when the log has come to 64 MB, or soon after if a reader takes its time.
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
        // The salt, which is another each time the log starts over. There is none while it is empty.
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
async fn a_full_store_answers_unavailable_and_recovers_when_there_is_room() {
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
    // Reading goes on, and what was acknowledged is there.
    assert_eq!(newest(&store, alice, 999).await.len(), stored.len());
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
async fn a_writer_locked_out_for_too_long_answers_unavailable_and_recovers() {
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
async fn errors_hold_neither_statements_nor_values() {
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
