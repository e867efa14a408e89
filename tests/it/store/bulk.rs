//! Whole rows in bulk.

use std::sync::Arc;

use prompt_service::domain::{
    CallDetails, FailureCode, LastIds, Prompt, PromptId, PromptRecord, PromptStatus, Timestamp,
    User, UserId, VectorRecord,
};
use prompt_service::store::{
    Error, KeyClaim, KeyRecord, KeyState, Put, RevokedToken, Session, UpstreamDay,
};

use crate::store::{
    InsertPrompt, TestableStore, completed, embedded, model, new_user, user, vector,
};

type Store = Arc<dyn TestableStore>;

fn a_user(id: i64, username: &str) -> User {
    User {
        id: UserId(id),
        username: username.to_owned(),
        email: String::new(),
        password_hash: "!".to_owned(),
        is_active: false,
        tokens_valid_from: Timestamp(77),
        created_at: Timestamp(5),
    }
}

fn a_prompt(id: i64, user_id: i64, mark: u16) -> PromptRecord {
    PromptRecord {
        prompt: Prompt {
            id: PromptId(id),
            user_id: UserId(user_id),
            prompt: format!("question {id} 🦀"),
            response: Some("answer".to_owned()),
            model: "gpt".to_owned(),
            status: PromptStatus::Completed,
            error: None,
            created_at: Timestamp(1_000 + id),
            call: CallDetails {
                duration_ms: Some(u32::MAX),
                prompt_tokens: Some(0),
                completion_tokens: None,
                finish_reason: Some("length".to_owned()),
            },
        },
        vector: Some(VectorRecord {
            model: model("a"),
            f16_bytes: vector(mark).to_f16_bytes(),
        }),
    }
}

fn a_failed_prompt(id: i64, user_id: i64) -> PromptRecord {
    let completed = a_prompt(id, user_id, 0);
    PromptRecord {
        prompt: Prompt {
            response: None,
            status: PromptStatus::Failed,
            error: Some(FailureCode::UpstreamUnavailable),
            ..completed.prompt
        },
        vector: None,
    }
}

fn last(user: i64, prompt: i64) -> LastIds {
    LastIds {
        user: UserId(user),
        prompt: PromptId(prompt),
    }
}

fn a_session(mark: u8, user_id: i64) -> Session {
    Session {
        token_hash: [mark; 32],
        user_id: UserId(user_id),
        created_at: Timestamp(1),
        expires_at: Timestamp(2),
    }
}

fn a_token(jti: &str, expires_at: i64) -> RevokedToken {
    RevokedToken {
        jti: jti.to_owned(),
        expires_at: Timestamp(expires_at),
    }
}

pub async fn rows_put_with_their_ids_are_read_back_whole(store: Store) {
    let users = vec![a_user(7, "alice"), a_user(3, "bob")];
    let put = store.put_users(users.clone()).await.unwrap();
    assert_eq!(put, [Put::Stored, Put::Stored]);
    let listed = store.list_users(None, 9).await.unwrap();
    assert_eq!(listed, [users[1].clone(), users[0].clone()]);

    let mut running = a_failed_prompt(12, 3);
    running.prompt.status = PromptStatus::Running;
    running.prompt.error = None;
    let rows = vec![
        a_prompt(10, 7, 1),
        a_failed_prompt(11, 7),
        running,
        a_prompt(40, 3, 2),
    ];
    let put = store.put_prompts(rows.clone()).await.unwrap();
    assert_eq!(put, [Put::Stored; 4]);
    assert_eq!(store.prompt_records(None, 9).await.unwrap(), rows);
    let shown = store.prompt(UserId(7), PromptId(10)).await.unwrap();
    assert_eq!(shown.as_ref(), Some(&rows[0].prompt));
    let covered = store.coverage(&model("a"), None).await.unwrap();
    assert_eq!((covered.embedded, covered.completed), (2, 2));
    let page = store.vectors(&model("a"), None, None, 9).await.unwrap();
    assert_eq!(
        page.ids,
        [(UserId(3), PromptId(40)), (UserId(7), PromptId(10))]
    );
}

pub async fn a_vector_of_a_prompt_that_is_not_completed_is_not_put(store: Store) {
    store.put_users(vec![a_user(1, "alice")]).await.unwrap();
    let failed = a_failed_prompt(1, 1);
    let given = PromptRecord {
        vector: a_prompt(1, 1, 1).vector,
        ..failed.clone()
    };
    store.put_prompts(vec![given]).await.unwrap();
    assert_eq!(store.prompt_records(None, 9).await.unwrap(), [failed]);
}

pub async fn ids_given_out_after_a_put_are_above_it(store: Store) {
    assert_eq!(store.last_ids().await.unwrap(), LastIds::NONE);
    store.put_users(vec![a_user(50, "alice")]).await.unwrap();
    store.put_prompts(vec![a_prompt(900, 50, 1)]).await.unwrap();
    assert_eq!(store.last_ids().await.unwrap(), last(50, 900));
    assert!(user(&*store, "bob").await.id > UserId(50));
    let made = store.insert_prompt(completed(UserId(50), "next")).await;
    assert!(made.unwrap().id > PromptId(900));
}

pub async fn the_ids_of_deleted_rows_count_as_given_out(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let made = store.insert_prompt(completed(alice, "x")).await.unwrap();
    store.delete_prompt(alice, made.id).await.unwrap();
    assert_eq!(store.last_ids().await.unwrap(), last(alice.0, made.id.0));
}

pub async fn raised_ids_are_not_given_out_and_never_fall(store: Store) {
    store.raise_ids(last(100, 2_000)).await.unwrap();
    assert_eq!(store.last_ids().await.unwrap(), last(100, 2_000));
    store.raise_ids(last(99, 2_001)).await.unwrap();
    assert_eq!(store.last_ids().await.unwrap(), last(100, 2_001));
    let alice = user(&*store, "alice").await.id;
    assert!(alice > UserId(100));
    let made = store.insert_prompt(completed(alice, "x")).await.unwrap();
    assert!(made.id > PromptId(2_001));
    store.raise_ids(LastIds::NONE).await.unwrap();
    assert_eq!(store.last_ids().await.unwrap(), last(alice.0, made.id.0));
}

pub async fn putting_again_leaves_what_is_there(store: Store) {
    store.put_users(vec![a_user(1, "alice")]).await.unwrap();
    store.put_prompts(vec![a_prompt(1, 1, 1)]).await.unwrap();
    let now = Timestamp(99);
    store.set_password(UserId(1), "$new", now).await.unwrap();
    let changed = PromptRecord {
        prompt: Prompt {
            response: Some("another answer".to_owned()),
            ..a_prompt(1, 1, 1).prompt
        },
        ..a_prompt(1, 1, 2)
    };
    let users = vec![a_user(1, "alice"), a_user(2, "bob")];
    let put = store.put_users(users).await.unwrap();
    assert_eq!(put, [Put::Present, Put::Stored]);
    let put = store.put_prompts(vec![changed, a_prompt(2, 2, 3)]).await;
    assert_eq!(put.unwrap(), [Put::Present, Put::Stored]);
    let alice = store.user(UserId(1)).await.unwrap().unwrap();
    assert_eq!(
        (alice.password_hash.as_str(), alice.tokens_valid_from),
        ("$new", now)
    );
    let rows = store.prompt_records(None, 9).await.unwrap();
    assert_eq!(rows, [a_prompt(1, 1, 1), a_prompt(2, 2, 3)]);
}

pub async fn what_is_anothers_is_told_and_changes_nothing(store: Store) {
    let users = vec![a_user(1, "alice"), a_user(2, "bob")];
    store.put_users(users.clone()).await.unwrap();
    store.put_prompts(vec![a_prompt(1, 1, 1)]).await.unwrap();
    let put = store
        .put_users(vec![
            a_user(1, "carol"),
            a_user(3, "bob"),
            a_user(4, "dave"),
        ])
        .await
        .unwrap();
    assert_eq!(put, [Put::Taken, Put::Taken, Put::Stored]);
    let mut listed = users;
    listed.push(a_user(4, "dave"));
    assert_eq!(store.list_users(None, 9).await.unwrap(), listed);

    let others = a_prompt(1, 2, 1);
    let mut later = a_prompt(1, 1, 1);
    later.prompt.created_at = Timestamp(5);
    let mut reworded = a_prompt(1, 1, 1);
    reworded.prompt.prompt.push('!');
    let put = store.put_prompts(vec![others, later, reworded]).await;
    assert_eq!(put.unwrap(), [Put::Taken; 3]);
    let rows = store.prompt_records(None, 9).await.unwrap();
    assert_eq!(rows, [a_prompt(1, 1, 1)]);
}

pub async fn prompts_without_an_owner_put_nothing(store: Store) {
    store.put_users(vec![a_user(1, "alice")]).await.unwrap();
    let put = store
        .put_prompts(vec![a_prompt(1, 1, 1), a_prompt(2, 9, 1)])
        .await;
    assert!(matches!(put, Err(Error::Internal(_))), "{put:?}");
    assert_eq!(store.prompt_records(None, 9).await.unwrap(), []);
}

pub async fn a_bulk_vector_of_another_length_puts_nothing(store: Store) {
    store.put_users(vec![a_user(1, "alice")]).await.unwrap();
    let mut longer = a_prompt(2, 1, 1);
    if let Some(vector) = &mut longer.vector {
        vector.f16_bytes.extend([0, 0]);
    }
    let put = store.put_prompts(vec![a_prompt(1, 1, 1), longer]).await;
    assert!(matches!(put, Err(Error::Internal(_))), "{put:?}");
    assert_eq!(store.prompt_records(None, 9).await.unwrap(), []);
}

pub async fn records_come_by_rising_id_in_pages_with_vectors_of_any_model(store: Store) {
    let alice = store.create_user(new_user("alice")).await.unwrap().id;
    let bob = store.create_user(new_user("bob")).await.unwrap().id;
    let mut ids = Vec::new();
    for (owner, mark) in [(bob, 1), (alice, 2), (bob, 3)] {
        let made = store.insert_prompt(embedded(owner, "x", mark)).await;
        ids.push(made.unwrap().id);
    }
    let replaced = vec![(ids[1], vector(9))];
    store.put_embeddings(&model("b"), replaced).await.unwrap();
    let first = store.prompt_records(None, 2).await.unwrap();
    let rest = store.prompt_records(Some(ids[1]), 2).await.unwrap();
    let all: Vec<_> = first.iter().chain(&rest).collect();
    let found: Vec<_> = all.iter().map(|record| record.prompt.id).collect();
    assert_eq!(found, ids);
    let vectors: Vec<_> = all.iter().map(|record| record.vector.clone()).collect();
    let expected = [("a", 1), ("b", 9), ("a", 3)].map(|(name, mark)| {
        Some(VectorRecord {
            model: model(name),
            f16_bytes: vector(mark).to_f16_bytes(),
        })
    });
    assert_eq!(vectors, expected);
    let end = store.prompt_records(Some(ids[2]), 2).await.unwrap();
    assert_eq!(end, []);
}

pub async fn sessions_are_put_and_come_by_rising_hash_in_pages(store: Store) {
    store.put_users(vec![a_user(1, "alice")]).await.unwrap();
    let sessions = vec![a_session(0xff, 1), a_session(0, 1), a_session(0x80, 1)];
    store.put_sessions(sessions.clone()).await.unwrap();
    let later = Session {
        expires_at: Timestamp(9),
        ..a_session(0, 1)
    };
    store.put_sessions(vec![later]).await.unwrap();
    let first = store.list_sessions(None, 2).await.unwrap();
    assert_eq!(first, [a_session(0, 1), a_session(0x80, 1)]);
    let rest = store.list_sessions(Some([0x80; 32]), 2).await.unwrap();
    assert_eq!(rest, [a_session(0xff, 1)]);
    let put = store
        .put_sessions(vec![a_session(1, 1), a_session(2, 9)])
        .await;
    assert!(matches!(put, Err(Error::Internal(_))), "{put:?}");
    assert_eq!(store.list_sessions(None, 9).await.unwrap().len(), 3);
}

pub async fn revoked_tokens_are_put_and_come_by_rising_bytes_in_pages(store: Store) {
    let tokens = ["é", "b", "B", "a b"].map(|jti| a_token(jti, 10));
    store.put_revoked_tokens(tokens.to_vec()).await.unwrap();
    let again = vec![a_token("b", 5), a_token("B", 20)];
    store.put_revoked_tokens(again).await.unwrap();
    let first = store.list_revoked_tokens(None, 2).await.unwrap();
    assert_eq!(first, [a_token("B", 20), a_token("a b", 10)]);
    let rest = store.list_revoked_tokens(Some("a b"), 9).await.unwrap();
    assert_eq!(rest, [a_token("b", 10), a_token("é", 10)]);
}

fn a_key(user_id: i64, byte: u8, prompt_id: i64) -> KeyRecord {
    KeyRecord {
        user_id: UserId(user_id),
        key_hash: [byte; 32],
        fingerprint: [7; 32],
        prompt_id: PromptId(prompt_id),
        claimed_at: Timestamp(i64::MAX),
    }
}

pub async fn keys_are_put_and_come_by_rising_user_and_hash_in_pages(store: Store) {
    let users = vec![a_user(1, "alice"), a_user(2, "bob")];
    store.put_users(users).await.unwrap();
    let keys = vec![a_key(2, 0, 9), a_key(1, 0xff, 8), a_key(1, 1, 7)];
    store.put_keys(keys).await.unwrap();
    // What is there is left alone.
    store.put_keys(vec![a_key(1, 1, 99)]).await.unwrap();
    let first = store.list_keys(None, 2).await.unwrap();
    assert_eq!(first, [a_key(1, 1, 7), a_key(1, 0xff, 8)]);
    let after = Some((UserId(1), [0xff; 32]));
    assert_eq!(store.list_keys(after, 2).await.unwrap(), [a_key(2, 0, 9)]);
    let put = store.put_keys(vec![a_key(1, 2, 1), a_key(9, 2, 1)]).await;
    assert!(matches!(put, Err(Error::Internal(_))), "{put:?}");
    assert_eq!(store.list_keys(None, 9).await.unwrap().len(), 3);
}

pub async fn a_key_that_was_put_is_known_with_its_prompt(store: Store) {
    store.put_users(vec![a_user(1, "alice")]).await.unwrap();
    let record = a_prompt(5, 1, 1);
    store.put_prompts(vec![record.clone()]).await.unwrap();
    store.put_keys(vec![a_key(1, 3, 5)]).await.unwrap();
    let claim = KeyClaim {
        key_hash: [3; 32],
        fingerprint: [7; 32],
    };
    let state = store.key_state(UserId(1), &claim).await.unwrap();
    assert_eq!(state, Some(KeyState::Completed(record.prompt.id)));
}

pub async fn days_counts_are_put_and_the_higher_one_stands(store: Store) {
    let a_day = |day, calls| UpstreamDay { day, calls };
    let days = vec![a_day(20_001, 5), a_day(20_000, 7)];
    store.put_upstream_days(days).await.unwrap();
    let again = vec![a_day(20_000, 6), a_day(20_001, 9)];
    store.put_upstream_days(again).await.unwrap();
    let first = store.list_upstream_days(None, 1).await.unwrap();
    assert_eq!(first, [a_day(20_000, 7)]);
    let rest = store.list_upstream_days(Some(20_000), 9).await.unwrap();
    assert_eq!(rest, [a_day(20_001, 9)]);
    assert!(!store.count_upstream_call(20_001, 9).await.unwrap());
}
