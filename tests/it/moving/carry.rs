//! Making one store's contents another's. The target here is SQLite too: what carries knows the traits only.

use std::sync::Arc;
use std::time::Instant;

use prompt_service::domain::{
    Embedding, FailureCode, LastIds, PromptId, PromptStatus, Timestamp, UserId,
};
use prompt_service::services::moving::carry::{Side, carry};
use prompt_service::services::moving::import::Counts;
use prompt_service::services::moving::{Error, Meter};
use prompt_service::store::sqlite::SqliteStore;
use prompt_service::store::{
    AccountStore, BulkStore, KeyRecord, PromptStore, RevokedToken, Session, UpstreamDay,
};

use crate::moving::{cut_off, embedded_store};
use crate::store::{InsertPrompt, completed, embedded, model, user, vector};
use crate::support::Folder;

fn side(store: &SqliteStore) -> Side<'_> {
    Side {
        accounts: store,
        bulk: store,
        dimension: 4,
    }
}

async fn carried(from: &SqliteStore, to: &SqliteStore) -> Result<Counts, Error> {
    carry(side(from), side(to), &Meter::new(Instant::now())).await
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
    store.put_keys(keys.collect()).await.unwrap();
    for day in [20_000, 20_001] {
        let counted = vec![UpstreamDay { day, calls: day }];
        store.put_upstream_days(counted).await.unwrap();
    }
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

/// Everything in a store, in words.
async fn contents(store: &SqliteStore) -> Vec<String> {
    let mut all = vec![format!("{:?}", store.last_ids().await.unwrap())];
    let users = store.list_users(None, 9_999).await.unwrap();
    all.extend(users.iter().map(|user| {
        format!(
            "{user:?} {} {} {}",
            user.username, user.email, user.password_hash
        )
    }));
    let records = store.prompt_records(None, 9_999).await.unwrap();
    all.extend(records.iter().map(|record| format!("{record:?}")));
    let sessions = store.list_sessions(None, 9_999).await.unwrap();
    all.extend(sessions.iter().map(|session| format!("{session:?}")));
    let keys = store.list_keys(None, 9_999).await.unwrap();
    all.extend(keys.iter().map(|key| format!("{key:?}")));
    let days = store.list_upstream_days(None, 9_999).await.unwrap();
    all.extend(days.iter().map(|day| format!("{day:?}")));
    let tokens = store.list_revoked_tokens(None, 9_999).await.unwrap();
    all.extend(tokens.iter().map(|token| format!("{token:?}")));
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_is_carried_and_the_next_ids_too() {
    let (here, there) = (Folder::new(), Folder::new());
    let (from, to) = (furnished(&here).await, embedded_store(&there));
    let counts = carried(&from, &to).await.unwrap();
    assert_eq!((counts.users, counts.prompts), (3, 749));
    let expected = contents(&from).await;
    assert_eq!(expected.len(), 1 + 3 + 749 + 2 + 300 + 2 + 300);
    assert_eq!(contents(&to).await, expected);
    let next = to
        .insert_prompt(completed(UserId(1), "next"))
        .await
        .unwrap();
    assert_eq!(next.id, PromptId(752));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_that_was_cut_off_goes_on_and_a_finished_one_is_only_compared() {
    let (here, there) = (Folder::new(), Folder::new());
    let (from, to) = (furnished(&here).await, embedded_store(&there));
    let meter = Meter::new(Instant::now());
    // The users are the first operation, the first page of prompts is the second.
    let enough = || to.stats().committed_operations >= 2;
    cut_off(carry(side(&from), side(&to), &meter), enough).await;
    carried(&from, &to).await.unwrap();
    let before = to.stats().committed_operations;
    carried(&from, &to).await.unwrap();
    // Raising the ids is repeated, nothing else.
    assert_eq!(to.stats().committed_operations, before + 1);
    assert_eq!(contents(&to).await, contents(&from).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_with_rows_of_its_own_is_refused_and_left_as_it_was() {
    let here = Folder::new();
    let from = furnished(&here).await;
    for name in ["alice", "zoe"] {
        let there = Folder::new();
        let to = embedded_store(&there);
        user(&to, name).await;
        let made = to.insert_prompt(completed(UserId(1), "theirs")).await;
        made.unwrap();
        // The first is just as the source has it, and its prompt tells; the second is another's.
        let before = contents(&to).await;
        let refused = carried(&from, &to).await;
        assert!(matches!(refused, Err(Error::Foreign)), "{refused:?}");
        assert_eq!(contents(&to).await, before);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_empty_store_is_carried() {
    let (here, there) = (Folder::new(), Folder::new());
    let (from, to) = (embedded_store(&here), embedded_store(&there));
    assert_eq!(carried(&from, &to).await.unwrap(), Counts::default());
    assert_eq!(to.last_ids().await.unwrap(), LastIds::NONE);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vectors_of_another_length_stay_behind_and_null_characters_of_answers_are_replaced() {
    let (here, there) = (Folder::new(), Folder::new());
    let (from, to) = (embedded_store(&here), embedded_store(&there));
    let alice = user(&from, "alice").await.id;
    let mut odd = embedded(alice, "x", 1);
    odd.response = Some("a\0b".to_owned());
    from.insert_prompt(odd).await.unwrap();
    let mut short = completed(alice, "y");
    short.embedding = Some((model("short"), Embedding(Arc::from([1.0, 0.0].as_slice()))));
    from.insert_prompt(short).await.unwrap();
    carried(&from, &to).await.unwrap();
    let records = to.prompt_records(None, 9).await.unwrap();
    assert_eq!(records[0].prompt.response.as_deref(), Some("a\u{fffd}b"));
    assert!(records[0].vector.is_some());
    assert_eq!(records[1].vector, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_nobody_is_at_work_on_any_more_arrives_as_failed() {
    let (here, there) = (Folder::new(), Folder::new());
    let (from, to) = (embedded_store(&here), embedded_store(&there));
    let alice = user(&from, "alice").await.id;
    from.insert_prompt(completed(alice, "x")).await.unwrap();
    let mut cut_off = from.prompt_records(None, 9).await.unwrap().remove(0);
    cut_off.prompt.id = PromptId(5);
    cut_off.prompt.status = PromptStatus::Running;
    cut_off.prompt.response = None;
    from.put_prompts(vec![cut_off]).await.unwrap();
    carried(&from, &to).await.unwrap();
    carried(&from, &to).await.unwrap();
    let arrived = to.prompt_records(None, 9).await.unwrap().remove(1).prompt;
    assert_eq!(
        (arrived.id, arrived.status, arrived.error),
        (
            PromptId(5),
            PromptStatus::Failed,
            Some(FailureCode::Interrupted)
        )
    );
}
