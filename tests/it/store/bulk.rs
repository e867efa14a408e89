//! Whole rows in bulk.

use std::sync::Arc;

use prompt_service::domain::{
    CallDetails, ChatTexts, FailureCode, KeyRecord, LastIds, Prompt, PromptId, PromptRecord,
    PromptSource, PromptStatus, Record, RecordCursor, RevokedToken, Session, Timestamp,
    UpstreamDay, User, UserId, VectorRecord,
};
use prompt_service::store::{BulkStore, Error, KeyClaim, KeyState};

use crate::store::calls::{call, is_counted};
use crate::store::{
    InsertPrompt, TestableStore, completed, embedded, list_users, model, new_user, user, vector,
};

type Store = Arc<dyn TestableStore>;

/// Puts rows of one kind.
pub async fn put<R>(
    store: &(impl BulkStore + ?Sized),
    kind: fn(R) -> Record,
    rows: impl IntoIterator<Item = R>,
) -> Result<(), Error> {
    store.put(rows.into_iter().map(kind).collect()).await
}

/// All prompts, by rising id.
pub async fn prompt_records(store: &(impl BulkStore + ?Sized)) -> Vec<PromptRecord> {
    let records = store.records(RecordCursor::Prompts(None), 9_999);
    let records = records.await.unwrap().into_iter();
    records.map(prompt_of).collect()
}

fn prompt_of(record: Record) -> PromptRecord {
    let Record::Prompt(record) = record else {
        panic!("not a prompt: {record:?}");
    };
    record
}

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
            source: PromptSource::Api,
            prompt: format!("question {id} 🦀"),
            response: Some("answer".to_owned()),
            model: "gpt".to_owned(),
            status: PromptStatus::Completed,
            error: None,
            created_at: Timestamp(1_000 + id),
            call: CallDetails {
                cost: None,
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
        chat: None,
    }
}

/// A prompt that came in a chat call.
fn a_chat(id: i64, user_id: i64) -> PromptRecord {
    let mut record = a_prompt(id, user_id, 3);
    record.prompt.source = PromptSource::V1;
    record.chat = Some(ChatTexts {
        messages: r#"[{"role": "user", "content": "Why?\u0000"}]"#.to_owned(),
        request: r#"{"temperature": 0.70}"#.to_owned(),
        metadata: r#"{"topic": "demo"}"#.to_owned(),
        answer: Some(r#"{"object": "chat.completion"}"#.to_owned()),
    });
    record
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
        chat: None,
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
    put(&*store, Record::User, users.clone()).await.unwrap();
    let listed = list_users(&*store, None, 9).await;
    assert_eq!(listed, [users[1].clone(), users[0].clone()]);

    let mut running = a_failed_prompt(12, 3);
    running.prompt.status = PromptStatus::Running;
    running.prompt.error = None;
    let rows = vec![
        a_prompt(10, 7, 1),
        a_failed_prompt(11, 7),
        running,
        a_prompt(40, 3, 2),
        a_chat(41, 3),
    ];
    put(&*store, Record::Prompt, rows.clone()).await.unwrap();
    assert_eq!(prompt_records(&*store).await, rows);
    let shown = store.prompt(UserId(7), PromptId(10)).await.unwrap();
    assert_eq!(shown.as_ref(), Some(&rows[0].prompt));
    let covered = store.coverage(&model("a"), None).await.unwrap();
    assert_eq!((covered.embedded, covered.completed), (3, 3));
    let page = store.vectors(&model("a"), None, None, 9).await.unwrap();
    assert_eq!(
        page.ids,
        [
            (UserId(3), PromptId(40)),
            (UserId(3), PromptId(41)),
            (UserId(7), PromptId(10))
        ]
    );
}

pub async fn vector_of_a_prompt_that_is_not_completed_is_not_put(store: Store) {
    put(&*store, Record::User, [a_user(1, "alice")])
        .await
        .unwrap();
    let failed = a_failed_prompt(1, 1);
    let given = PromptRecord {
        vector: a_prompt(1, 1, 1).vector,
        ..failed.clone()
    };
    put(&*store, Record::Prompt, [given]).await.unwrap();
    assert_eq!(prompt_records(&*store).await, [failed]);
}

pub async fn ids_given_out_after_a_put_are_above_it(store: Store) {
    assert_eq!(store.last_ids().await.unwrap(), LastIds::NONE);
    put(&*store, Record::User, [a_user(50, "alice")])
        .await
        .unwrap();
    put(&*store, Record::Prompt, [a_prompt(900, 50, 1)])
        .await
        .unwrap();
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

pub async fn putting_again_leaves_stored_rows(store: Store) {
    put(&*store, Record::User, [a_user(1, "alice")])
        .await
        .unwrap();
    put(&*store, Record::Prompt, [a_prompt(1, 1, 1)])
        .await
        .unwrap();
    let now = Timestamp(99);
    store.set_password(UserId(1), "$new", now).await.unwrap();
    let changed = PromptRecord {
        prompt: Prompt {
            response: Some("another answer".to_owned()),
            ..a_prompt(1, 1, 1).prompt
        },
        ..a_prompt(1, 1, 2)
    };
    let users = [a_user(1, "alice"), a_user(2, "bob")];
    put(&*store, Record::User, users).await.unwrap();
    let prompts = [changed, a_prompt(2, 2, 3)];
    put(&*store, Record::Prompt, prompts).await.unwrap();
    let alice = store.user(UserId(1)).await.unwrap().unwrap();
    assert_eq!(
        (alice.password_hash.as_str(), alice.tokens_valid_from),
        ("$new", now)
    );
    let rows = prompt_records(&*store).await;
    assert_eq!(rows, [a_prompt(1, 1, 1), a_prompt(2, 2, 3)]);
}

pub async fn rows_of_several_kinds_are_put_together_or_not_at_all(store: Store) {
    let alice = Record::User(a_user(1, "alice"));
    let of_nobody = Record::Prompt(a_prompt(2, 9, 1));
    let refused = store.put(vec![alice.clone(), of_nobody]).await;
    assert!(matches!(refused, Err(Error::Internal(_))), "{refused:?}");
    assert_eq!(list_users(&*store, None, 9).await, []);
    let all = vec![
        alice,
        Record::Prompt(a_prompt(2, 1, 1)),
        Record::Key(a_key(1, 3, 2)),
        Record::UpstreamDay(UpstreamDay { day: 7, calls: 8 }),
        Record::Session(a_session(1, 1)),
        Record::RevokedToken(a_token("a", 1)),
    ];
    store.put(all.clone()).await.unwrap();
    let mut found = Vec::new();
    for start in RecordCursor::STARTS {
        found.extend(store.records(start, 9).await.unwrap());
    }
    assert_eq!(found, all);
    for record in all {
        assert_eq!(store.records(record.cursor(), 9).await.unwrap(), []);
    }
    assert_eq!(store.last_ids().await.unwrap(), last(1, 2));
}

pub async fn rows_of_another_id_or_name_are_left_out(store: Store) {
    let users = vec![a_user(1, "alice"), a_user(2, "bob")];
    put(&*store, Record::User, users.clone()).await.unwrap();
    put(&*store, Record::Prompt, [a_prompt(1, 1, 1)])
        .await
        .unwrap();
    let others = [a_user(1, "carol"), a_user(3, "bob"), a_user(4, "dave")];
    put(&*store, Record::User, others).await.unwrap();
    let mut listed = users;
    listed.push(a_user(4, "dave"));
    assert_eq!(list_users(&*store, None, 9).await, listed);

    let others = a_prompt(1, 2, 1);
    let mut later = a_prompt(1, 1, 1);
    later.prompt.created_at = Timestamp(5);
    let mut reworded = a_prompt(1, 1, 1);
    reworded.prompt.prompt.push('!');
    let others = [others, later, reworded];
    put(&*store, Record::Prompt, others).await.unwrap();
    assert_eq!(prompt_records(&*store).await, [a_prompt(1, 1, 1)]);
}

pub async fn prompts_without_an_owner_put_nothing(store: Store) {
    put(&*store, Record::User, [a_user(1, "alice")])
        .await
        .unwrap();
    let prompts = [a_prompt(1, 1, 1), a_prompt(2, 9, 1)];
    let refused = put(&*store, Record::Prompt, prompts).await;
    assert!(matches!(refused, Err(Error::Internal(_))), "{refused:?}");
    assert_eq!(prompt_records(&*store).await, []);
}

pub async fn vector_of_another_length_puts_nothing(store: Store) {
    put(&*store, Record::User, [a_user(1, "alice")])
        .await
        .unwrap();
    let mut longer = a_prompt(2, 1, 1);
    if let Some(vector) = &mut longer.vector {
        vector.f16_bytes.extend([0, 0]);
    }
    let prompts = [a_prompt(1, 1, 1), longer];
    let refused = put(&*store, Record::Prompt, prompts).await;
    assert!(matches!(refused, Err(Error::Internal(_))), "{refused:?}");
    assert_eq!(prompt_records(&*store).await, []);
}

pub async fn prompts_are_listed_by_rising_id_in_pages_with_vectors_of_any_model(store: Store) {
    let alice = store.create_user(new_user("alice")).await.unwrap().id;
    let bob = store.create_user(new_user("bob")).await.unwrap().id;
    let mut ids = Vec::new();
    for (owner, mark) in [(bob, 1), (alice, 2), (bob, 3)] {
        let made = store.insert_prompt(embedded(owner, "x", mark)).await;
        ids.push(made.unwrap().id);
    }
    let replaced = vec![(ids[1], vector(9))];
    store.put_embeddings(&model("b"), replaced).await.unwrap();
    let page = async |after| {
        store
            .records(RecordCursor::Prompts(after), 2)
            .await
            .unwrap()
    };
    let (first, rest) = (page(None).await, page(Some(ids[1])).await);
    assert_eq!((first.len(), rest.len()), (2, 1));
    let all: Vec<_> = first.into_iter().chain(rest).map(prompt_of).collect();
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
    assert_eq!(page(Some(ids[2])).await, []);
}

pub async fn sessions_are_put_and_listed_by_rising_hash_in_pages(store: Store) {
    put(&*store, Record::User, [a_user(1, "alice")])
        .await
        .unwrap();
    let sessions = [a_session(0xff, 1), a_session(0, 1), a_session(0x80, 1)];
    put(&*store, Record::Session, sessions).await.unwrap();
    let later = Session {
        expires_at: Timestamp(9),
        ..a_session(0, 1)
    };
    put(&*store, Record::Session, [later]).await.unwrap();
    let page = async |after, limit| {
        store
            .records(RecordCursor::Sessions(after), limit)
            .await
            .unwrap()
    };
    let first = [a_session(0, 1), a_session(0x80, 1)].map(Record::Session);
    assert_eq!(page(None, 2).await, first);
    let rest = [Record::Session(a_session(0xff, 1))];
    assert_eq!(page(Some([0x80; 32]), 2).await, rest);
    let sessions = [a_session(1, 1), a_session(2, 9)];
    let refused = put(&*store, Record::Session, sessions).await;
    assert!(matches!(refused, Err(Error::Internal(_))), "{refused:?}");
    assert_eq!(page(None, 9).await.len(), 3);
}

pub async fn revoked_tokens_are_put_and_listed_by_rising_bytes_in_pages(store: Store) {
    let tokens = ["é", "b", "B", "a b"].map(|jti| a_token(jti, 10));
    put(&*store, Record::RevokedToken, tokens).await.unwrap();
    let again = [a_token("b", 5), a_token("B", 20)];
    put(&*store, Record::RevokedToken, again).await.unwrap();
    let first = store.records(RecordCursor::RevokedTokens(None), 2);
    let expected = [a_token("B", 20), a_token("a b", 10)].map(Record::RevokedToken);
    assert_eq!(first.await.unwrap(), expected);
    let rest = store.records(expected[1].cursor(), 9);
    let expected = [a_token("b", 10), a_token("é", 10)].map(Record::RevokedToken);
    assert_eq!(rest.await.unwrap(), expected);
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

pub async fn keys_are_put_and_listed_by_rising_user_and_hash_in_pages(store: Store) {
    let users = vec![a_user(1, "alice"), a_user(2, "bob")];
    put(&*store, Record::User, users).await.unwrap();
    let keys = [a_key(2, 0, 9), a_key(1, 0xff, 8), a_key(1, 1, 7)];
    put(&*store, Record::Key, keys).await.unwrap();
    // A stored key stays as it is.
    put(&*store, Record::Key, [a_key(1, 1, 99)]).await.unwrap();
    let page = async |after, limit| {
        store
            .records(RecordCursor::Keys(after), limit)
            .await
            .unwrap()
    };
    let first = [a_key(1, 1, 7), a_key(1, 0xff, 8)].map(Record::Key);
    assert_eq!(page(None, 2).await, first);
    let after = Some((UserId(1), [0xff; 32]));
    assert_eq!(page(after, 2).await, [Record::Key(a_key(2, 0, 9))]);
    let keys = [a_key(1, 2, 1), a_key(9, 2, 1)];
    let refused = put(&*store, Record::Key, keys).await;
    assert!(matches!(refused, Err(Error::Internal(_))), "{refused:?}");
    assert_eq!(page(None, 9).await.len(), 3);
}

pub async fn key_that_was_put_is_known_with_its_prompt(store: Store) {
    put(&*store, Record::User, [a_user(1, "alice")])
        .await
        .unwrap();
    let record = a_prompt(5, 1, 1);
    put(&*store, Record::Prompt, [record.clone()])
        .await
        .unwrap();
    put(&*store, Record::Key, [a_key(1, 3, 5)]).await.unwrap();
    let claim = KeyClaim {
        key_hash: [3; 32],
        fingerprint: [7; 32],
    };
    let state = store.key_state(UserId(1), &claim).await.unwrap();
    assert_eq!(state, Some(KeyState::Completed(record.prompt.id)));
}

pub async fn counts_of_days_are_put_and_the_higher_one_is_kept(store: Store) {
    let a_day = |day, calls| UpstreamDay { day, calls };
    let days = vec![a_day(20_001, 5), a_day(20_000, 7)];
    put(&*store, Record::UpstreamDay, days).await.unwrap();
    let again = [a_day(20_000, 6), a_day(20_001, 9)];
    put(&*store, Record::UpstreamDay, again).await.unwrap();
    let page = async |after, limit| {
        store
            .records(RecordCursor::UpstreamDays(after), limit)
            .await
            .unwrap()
    };
    assert_eq!(page(None, 1).await, [Record::UpstreamDay(a_day(20_000, 7))]);
    let rest = [Record::UpstreamDay(a_day(20_001, 9))];
    assert_eq!(page(Some(20_000), 9).await, rest);
    let alice = user(&*store, "alice").await.id;
    assert!(!is_counted(&*store, call(alice), 20_001, 9).await);
    assert!(is_counted(&*store, call(alice), 20_001, 10).await);
}
