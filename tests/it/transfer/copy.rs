//! Making one store's contents another's. The target here is SQLite too: a copy knows only the
//! trait.

use std::sync::Arc;
use std::time::Instant;

use prompt_service::domain::{
    Embedding, FailureCode, KeyRecord, LastIds, PromptId, PromptStatus, Record, RecordCursor,
    RevokedToken, Session, Timestamp, UpstreamDay, UserId,
};
use prompt_service::store::sqlite::SqliteStore;
use prompt_service::store::{AccountStore, BulkStore, PromptStore};
use prompt_service::transfer::{Error, Meter, RowCounts, copy};

use crate::store::bulk::{prompt_records, put};
use crate::store::{InsertPrompt, completed, embedded, model, user, vector};
use crate::support::Folder;
use crate::transfer::{embedded_store, interrupted};

/// Numbers in a vector of the model in use.
const DIMENSION: usize = 4;

async fn copied(from: &SqliteStore, to: &SqliteStore) -> Result<RowCounts, Error> {
    copy(from, to, DIMENSION, &Meter::new(Instant::now())).await
}

/// A store with something in every table.
async fn furnished(folder: &Folder) -> SqliteStore {
    let store = embedded_store(folder);
    for name in ["alice", "bob", "carol"] {
        let id = user(&store, name).await.id;
        for n in 0..250 {
            store
                .insert_prompt(embedded(id, &format!("{name} {n}"), n))
                .await
                .unwrap();
        }
        let session = Session {
            token_hash: [id.0 as u8; 32],
            user_id: id,
            created_at: Timestamp(1),
            expires_at: Timestamp(i64::MAX),
        };
        store.create_session(session, 100).await.unwrap();
    }
    store
        .insert_prompt(completed(UserId(2), "no vector"))
        .await
        .unwrap();
    store
        .put_embeddings(&model("b"), vec![(PromptId(3), vector(1_000))])
        .await
        .unwrap();
    store
        .set_active(UserId(3), false, Timestamp(50))
        .await
        .unwrap();
    let keys = (0..300_u16).map(|n| KeyRecord {
        user_id: UserId(i64::from(n % 3) + 1),
        key_hash: std::array::from_fn(|at| n.to_be_bytes()[at % 2]),
        fingerprint: [n as u8; 32],
        // Some of them are of prompts that were deleted.
        prompt_id: PromptId(i64::from(n) + 1),
        claimed_at: Timestamp(i64::from(n)),
    });
    put(&store, Record::Key, keys).await.unwrap();
    let days = [20_000, 20_001].map(|day| UpstreamDay { day, calls: day });
    put(&store, Record::UpstreamDay, days).await.unwrap();
    for n in 0..300 {
        let token = RevokedToken {
            jti: format!("{n:032x}"),
            expires_at: Timestamp(n),
        };
        store.log_out(&[], Some(token)).await.unwrap();
    }
    store.delete_prompt(UserId(1), PromptId(1)).await.unwrap();
    store.delete_prompt(UserId(2), PromptId(751)).await.unwrap();
    store
}

/// Everything in a store.
async fn contents(store: &SqliteStore) -> (LastIds, Vec<Record>) {
    let mut all = Vec::new();
    for start in RecordCursor::STARTS {
        all.extend(store.records(start, 9_999).await.unwrap());
    }
    (store.last_ids().await.unwrap(), all)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_is_copied_and_the_next_ids_too() {
    let (here, there) = (Folder::new(), Folder::new());
    let (from, to) = (furnished(&here).await, embedded_store(&there));
    let counts = copied(&from, &to).await.unwrap();
    assert_eq!((counts.users, counts.prompts), (3, 749));
    let expected = contents(&from).await;
    assert_eq!(expected.1.len(), 3 + 749 + 2 + 300 + 2 + 300);
    assert_eq!(contents(&to).await, expected);
    let next = to
        .insert_prompt(completed(UserId(1), "next"))
        .await
        .unwrap();
    assert_eq!(next.id, PromptId(752));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn interrupted_copy_continues_and_a_finished_one_is_only_compared() {
    let (here, there) = (Folder::new(), Folder::new());
    let (from, to) = (furnished(&here).await, embedded_store(&there));
    let meter = Meter::new(Instant::now());
    // The users are the first operation, the first page of prompts is the second.
    let enough = || to.stats().committed_operations >= 2;
    interrupted(copy(&from, &to, DIMENSION, &meter), enough).await;
    copied(&from, &to).await.unwrap();
    let before = to.stats().committed_operations;
    copied(&from, &to).await.unwrap();
    // Raising the ids is repeated, nothing else.
    assert_eq!(to.stats().committed_operations, before + 1);
    assert_eq!(contents(&to).await, contents(&from).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn target_with_other_rows_is_refused_and_left_as_it_was() {
    let here = Folder::new();
    let from = furnished(&here).await;
    for name in ["alice", "zoe"] {
        let there = Folder::new();
        let to = embedded_store(&there);
        user(&to, name).await;
        let made = to.insert_prompt(completed(UserId(1), "theirs")).await;
        made.unwrap();
        // The first account is as in the source, but its prompt is not; the second is another one.
        let before = contents(&to).await;
        let refused = copied(&from, &to).await;
        assert!(matches!(refused, Err(Error::Foreign)), "{refused:?}");
        assert_eq!(contents(&to).await, before);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn empty_store_is_copied() {
    let (here, there) = (Folder::new(), Folder::new());
    let (from, to) = (embedded_store(&here), embedded_store(&there));
    assert_eq!(copied(&from, &to).await.unwrap(), RowCounts::default());
    assert_eq!(to.last_ids().await.unwrap(), LastIds::NONE);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vectors_of_another_length_are_not_copied_and_null_characters_of_responses_are_replaced() {
    let (here, there) = (Folder::new(), Folder::new());
    let (from, to) = (embedded_store(&here), embedded_store(&there));
    let alice = user(&from, "alice").await.id;
    let mut odd = embedded(alice, "x", 1);
    odd.response = Some("a\0b".to_owned());
    from.insert_prompt(odd).await.unwrap();
    let mut short = completed(alice, "y");
    short.embedding = Some((model("short"), Embedding(Arc::from([1.0, 0.0].as_slice()))));
    from.insert_prompt(short).await.unwrap();
    copied(&from, &to).await.unwrap();
    let records = prompt_records(&to).await;
    assert_eq!(records[0].prompt.response.as_deref(), Some("a\u{fffd}b"));
    assert!(records[0].vector.is_some());
    assert_eq!(records[1].vector, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn running_call_arrives_as_failed() {
    let (here, there) = (Folder::new(), Folder::new());
    let (from, to) = (embedded_store(&here), embedded_store(&there));
    let alice = user(&from, "alice").await.id;
    from.insert_prompt(completed(alice, "x")).await.unwrap();
    let mut running = prompt_records(&from).await.remove(0);
    running.prompt.id = PromptId(5);
    running.prompt.status = PromptStatus::Running;
    running.prompt.response = None;
    put(&from, Record::Prompt, [running]).await.unwrap();
    copied(&from, &to).await.unwrap();
    copied(&from, &to).await.unwrap();
    let arrived = prompt_records(&to).await.remove(1).prompt;
    assert_eq!(
        (arrived.id, arrived.status, arrived.error),
        (
            PromptId(5),
            PromptStatus::Failed,
            Some(FailureCode::Interrupted)
        )
    );
}
