//! What is kept of chat calls.

use std::sync::Arc;
use std::time::Duration;

use prompt_service::domain::{ChatTexts, FailureCode, Prompt, PromptId, PromptSource, UserId};
use prompt_service::store::{CallOutcome, ChatCall, ChatFilter, ChatRead, NewCall};

use crate::store::calls::{answered, call, claim, holder, started};
use crate::store::{TestableStore, model, newest, user};

type Store = Arc<dyn TestableStore>;

const ANSWER: &str = r#"{"object": "chat.completion", "id": "up-1", "choices": [1.50]}"#;

fn texts() -> ChatTexts {
    ChatTexts {
        messages: r#"[ {"role": "user", "content": "Why?\u0000 𝄞"} ]"#.to_owned(),
        request: r#"{"temperature": 0.70, "tools": []}"#.to_owned(),
        metadata: r#"{"topic": "demo"}"#.to_owned(),
        answer: None,
    }
}

fn chat(user_id: UserId) -> NewCall {
    NewCall {
        source: PromptSource::V1,
        chat: Some(Arc::new(texts())),
        ..call(user_id)
    }
}

fn labelled(user_id: UserId, metadata: &str) -> NewCall {
    NewCall {
        chat: Some(Arc::new(ChatTexts {
            metadata: metadata.to_owned(),
            ..texts()
        })),
        ..chat(user_id)
    }
}

fn chat_answer() -> CallOutcome {
    CallOutcome {
        answer: Some(ANSWER.into()),
        ..answered()
    }
}

async fn complete(store: &dyn TestableStore, new: NewCall) -> Prompt {
    let begun = started(store, new).await;
    let settled = store.settle_call(begun.id, holder(1, 1), chat_answer());
    settled.await.unwrap().unwrap()
}

async fn read(store: &dyn TestableStore, user_id: UserId, id: PromptId) -> Option<ChatCall> {
    match store.chat_call(user_id, id, usize::MAX).await.unwrap()? {
        ChatRead::Whole(call) => Some(*call),
        ChatRead::Larger(bytes) => panic!("{bytes} bytes are allowed"),
    }
}

/// The ids of one page, and whether there are more.
async fn listed(
    store: &dyn TestableStore,
    user_id: UserId,
    filter: ChatFilter,
    limit: usize,
) -> (Vec<PromptId>, bool) {
    let page = store.list_chat_calls(user_id, filter, limit, usize::MAX);
    let page = page.await.unwrap();
    let ids = page.calls.iter().map(|call| call.prompt.id).collect();
    (ids, page.has_more)
}

pub async fn an_answered_chat_call_is_read_back_as_it_came(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let prompt = complete(&*store, chat(alice)).await;
    assert_eq!(prompt.source, PromptSource::V1);
    let expected = ChatCall {
        prompt: prompt.clone(),
        texts: ChatTexts {
            answer: Some(ANSWER.to_owned()),
            ..texts()
        },
    };
    assert_eq!(read(&*store, alice, prompt.id).await, Some(expected));
    assert_eq!(newest(&*store, alice, 9).await, [prompt]);
}

pub async fn a_chat_call_that_is_not_answered_is_none(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let running = started(&*store, chat(alice)).await;
    assert_eq!(read(&*store, alice, running.id).await, None);
    let failed = CallOutcome::failed(FailureCode::UpstreamFailed);
    let settled = store.settle_call(running.id, holder(1, 1), failed);
    assert!(settled.await.unwrap().is_some());
    assert_eq!(read(&*store, alice, running.id).await, None);
    let set = store.set_chat_metadata(alice, running.id, "{}".to_owned());
    assert!(!set.await.unwrap());
    let list = listed(&*store, alice, ChatFilter::default(), 9).await;
    assert_eq!(list, (vec![], false));
    // A prompt that came by the other front door is no chat call either.
    let plain = started(&*store, call(alice)).await;
    let settled = store.settle_call(plain.id, holder(1, 1), answered());
    assert!(settled.await.unwrap().is_some());
    assert_eq!(read(&*store, alice, plain.id).await, None);
}

pub async fn another_users_chat_call_is_none(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let bob = user(&*store, "bob").await.id;
    let prompt = complete(&*store, chat(alice)).await;
    assert_eq!(read(&*store, bob, prompt.id).await, None);
    let list = listed(&*store, bob, ChatFilter::default(), 9).await;
    assert_eq!(list, (vec![], false));
}

pub async fn a_chat_call_larger_than_allowed_is_only_measured(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let prompt = complete(&*store, chat(alice)).await;
    let bytes = read(&*store, alice, prompt.id).await.unwrap().text_bytes();
    let read = store.chat_call(alice, prompt.id, bytes - 1).await.unwrap();
    assert_eq!(read, Some(ChatRead::Larger(bytes)));
    let read = store.chat_call(alice, prompt.id, bytes).await.unwrap();
    assert!(matches!(read, Some(ChatRead::Whole(_))));
}

pub async fn chat_calls_are_listed_in_both_orders_and_in_pages(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(complete(&*store, chat(alice)).await.id);
    }
    let oldest_first = |after| ChatFilter {
        after,
        ..ChatFilter::default()
    };
    let page = listed(&*store, alice, oldest_first(None), 2).await;
    assert_eq!(page, (ids[..2].to_vec(), true));
    let page = listed(&*store, alice, oldest_first(Some(ids[1])), 2).await;
    assert_eq!(page, (vec![ids[2]], false));
    let newest_first = |after| ChatFilter {
        after,
        is_newest_first: true,
        ..ChatFilter::default()
    };
    let page = listed(&*store, alice, newest_first(None), 2).await;
    assert_eq!(page, (vec![ids[2], ids[1]], true));
    let page = listed(&*store, alice, newest_first(Some(ids[1])), 1).await;
    assert_eq!(page, (vec![ids[0]], false));
}

pub async fn a_list_of_chat_calls_is_filtered_before_it_is_cut(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let mut ids = Vec::new();
    for metadata in [
        r#"{"topic": "demo", "run": "1"}"#,
        r#"{"topic": "other"}"#,
        "{}",
        r#"{"run": "2", "topic": "demo", "odd \" name": "ü"}"#,
    ] {
        ids.push(complete(&*store, labelled(alice, metadata)).await.id);
    }
    let with = |labels: &[(&str, &str)]| ChatFilter {
        metadata: labels
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect(),
        ..ChatFilter::default()
    };
    let page = listed(&*store, alice, with(&[("topic", "demo")]), 2).await;
    assert_eq!(page, (vec![ids[0], ids[3]], false));
    let both = with(&[("topic", "demo"), ("run", "1")]);
    assert_eq!(listed(&*store, alice, both, 9).await.0, [ids[0]]);
    let odd = with(&[("odd \" name", "ü")]);
    assert_eq!(listed(&*store, alice, odd, 9).await.0, [ids[3]]);
    let none = with(&[("topic", "demo"), ("run", "3")]);
    assert_eq!(listed(&*store, alice, none, 9).await.0, []);
    let of = |model: &str| ChatFilter {
        model: Some(model.to_owned()),
        ..ChatFilter::default()
    };
    // The model that answered.
    let page = listed(&*store, alice, of("answering"), 9).await;
    assert_eq!(page.0, ids);
    assert_eq!(listed(&*store, alice, of("asked"), 9).await.0, []);
}

pub async fn a_page_of_chat_calls_ends_before_its_texts_are_too_long(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let first = complete(&*store, chat(alice)).await.id;
    let second = complete(&*store, chat(alice)).await.id;
    let bytes = read(&*store, alice, first).await.unwrap().text_bytes();
    for (most, expected) in [
        (2 * bytes, &[first, second][..]),
        (2 * bytes - 1, &[first]),
        (0, &[first]),
    ] {
        let page = store.list_chat_calls(alice, ChatFilter::default(), 9, most);
        let page = page.await.unwrap();
        let ids: Vec<_> = page.calls.iter().map(|call| call.prompt.id).collect();
        assert_eq!(ids, expected);
        assert_eq!(page.has_more, expected.len() < 2);
    }
}

pub async fn labels_are_replaced_for_their_owner_alone(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let bob = user(&*store, "bob").await.id;
    let id = complete(&*store, chat(alice)).await.id;
    let new = r#"{"topic": "new"}"#;
    let set = |user_id| store.set_chat_metadata(user_id, id, new.to_owned());
    assert!(!set(bob).await.unwrap());
    let labels = || async { read(&*store, alice, id).await.unwrap().texts.metadata };
    assert_eq!(labels().await, texts().metadata);
    assert!(set(alice).await.unwrap());
    assert_eq!(labels().await, new);
}

pub async fn a_call_that_is_not_kept_is_never_listed_and_leaves_no_row(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let forgotten = NewCall {
        prompt: String::new(),
        chat: None,
        is_kept: false,
        ..chat(alice)
    };
    let begun = started(&*store, forgotten).await;
    assert_eq!(newest(&*store, alice, 9).await, []);
    assert_eq!(store.prompt(alice, begun.id).await.unwrap(), None);
    let read = store.prompts(Some(alice), &[begun.id], usize::MAX).await;
    assert_eq!(read.unwrap().whole, []);
    let outcome = || CallOutcome {
        is_kept: false,
        embedding: None,
        ..chat_answer()
    };
    let other = store.settle_call(begun.id, holder(1, 2), outcome());
    assert_eq!(other.await.unwrap(), None);
    let settled = store.settle_call(begun.id, holder(1, 1), outcome());
    let settled = settled.await.unwrap().unwrap();
    // As it would have been stored.
    assert_eq!(settled.response.as_deref(), Some("Because."));
    assert_eq!(newest(&*store, alice, 9).await, []);
    let covered = store.coverage(&model("a"), None).await.unwrap();
    assert_eq!(covered.completed, 0);
    let again = store.settle_call(begun.id, holder(1, 1), outcome());
    assert_eq!(again.await.unwrap(), None);
}

pub async fn an_expired_call_that_is_not_kept_leaves_no_row(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let new = |is_kept| NewCall {
        is_kept,
        chat: None,
        lease: Duration::ZERO,
        ..chat(alice)
    };
    started(&*store, new(false)).await;
    let kept = started(&*store, new(true)).await;
    let expired = store.expire_calls(9, &[]).await.unwrap();
    let ids: Vec<_> = expired.iter().map(|call| call.prompt.id).collect();
    assert_eq!(ids, [kept.id]);
    let listed: Vec<_> = newest(&*store, alice, 9).await;
    assert_eq!(listed.len(), 1);
    assert!(store.expire_calls(9, &[]).await.unwrap().is_empty());
}

pub async fn a_call_that_is_not_kept_and_has_no_answer_leaves_its_key_to_the_next(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let new = |lease| NewCall {
        is_kept: false,
        chat: None,
        key: Some(claim(1, 1)),
        lease,
        ..chat(alice)
    };
    let failed = started(&*store, new(Duration::from_secs(3600))).await;
    let outcome = CallOutcome {
        is_kept: false,
        ..CallOutcome::failed(FailureCode::UpstreamFailed)
    };
    let settled = store.settle_call(failed.id, holder(1, 1), outcome);
    assert!(settled.await.unwrap().is_some());
    let lapsed = started(&*store, new(Duration::ZERO)).await;
    assert_ne!(lapsed.id, failed.id);
    assert!(store.expire_calls(9, &[]).await.unwrap().is_empty());
    let next = started(&*store, new(Duration::ZERO)).await;
    assert_ne!(next.id, lapsed.id);
}

pub async fn a_taken_over_chat_call_keeps_its_texts(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let keyed = |lease| NewCall {
        key: Some(claim(1, 1)),
        lease,
        ..chat(alice)
    };
    let begun = started(&*store, keyed(Duration::ZERO)).await;
    let again = started(&*store, keyed(Duration::from_secs(3600))).await;
    assert_eq!(again.id, begun.id);
    let settled = store.settle_call(begun.id, holder(1, 1), chat_answer());
    assert!(settled.await.unwrap().is_some());
    let call = read(&*store, alice, begun.id).await.unwrap();
    assert_eq!(call.texts.messages, texts().messages);
}
