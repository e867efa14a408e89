//! Prompts and their vectors.

use std::sync::Arc;

use prompt_service::domain::{
    Embedding, FailureCode, ModelId, PromptId, PromptStatus, Timestamp, UserId,
};
use prompt_service::store::{
    Access, Coverage, DeletedPrompt, Error, NewCall, Unembedded, VectorCursor, VectorPage,
};

use crate::store::calls::{call, started};
use crate::store::{
    InsertPrompt, NewPrompt, TestableStore, completed, embedded, ids, model, newest, user, vector,
};

type Store = Arc<dyn TestableStore>;

const NO_VECTORS: VectorPage = VectorPage {
    ids: Vec::new(),
    f16_bytes: Vec::new(),
};

fn failed(user_id: UserId) -> NewPrompt {
    NewPrompt {
        response: None,
        status: PromptStatus::Failed,
        error: Some(FailureCode::UpstreamTimeout),
        llm_duration_ms: None,
        prompt_tokens: None,
        ..completed(user_id, "no answer")
    }
}

async fn insert(store: &dyn TestableStore, prompt: NewPrompt) -> PromptId {
    store.insert_prompt(prompt).await.unwrap().id
}

async fn coverage(store: &dyn TestableStore, model: &ModelId, owner: Option<UserId>) -> (u64, u64) {
    let Coverage {
        embedded,
        completed,
    } = store.coverage(model, owner).await.unwrap();
    (embedded, completed)
}

fn stored(vectors: &[Embedding]) -> Vec<u8> {
    vectors.iter().flat_map(Embedding::to_f16_bytes).collect()
}

pub async fn a_completed_prompt_is_read_back(store: Store) {
    let alice = user(&*store, "alice").await;
    let text = "long ".repeat(20_000);
    let made = store
        .insert_prompt(embedded(alice.id, &text, 1))
        .await
        .unwrap();
    assert!(made.id.0 > 0);
    assert_eq!(made.user_id, alice.id);
    assert_eq!(made.prompt, text);
    assert_eq!(made.response, Some(format!("[mock] You said: {text}")));
    assert_eq!(made.model, "mock");
    assert_eq!(
        (made.call.duration_ms, made.call.prompt_tokens),
        (Some(12), Some(3))
    );
    assert_eq!(made.status, PromptStatus::Completed);
    assert_eq!(made.error, None);
    assert_eq!(made.created_at, Timestamp(2_000));
    assert_eq!(store.prompt(alice.id, made.id).await.unwrap(), Some(made));
}

pub async fn a_failed_prompt_is_read_back_and_has_no_vector(store: Store) {
    let alice = user(&*store, "alice").await;
    let given = NewPrompt {
        embedding: Some((model("a"), vector(1))),
        ..failed(alice.id)
    };
    let made = store.insert_prompt(given).await.unwrap();
    assert_eq!(made.status, PromptStatus::Failed);
    assert_eq!(made.error, Some(FailureCode::UpstreamTimeout));
    assert_eq!(made.response, None);
    assert_eq!(store.prompt(alice.id, made.id).await.unwrap(), Some(made));
    let page = store.vectors(&model("a"), None, None, 9).await.unwrap();
    assert_eq!(page, NO_VECTORS);
    assert_eq!(coverage(&*store, &model("a"), None).await, (0, 0));
    assert_eq!(store.unembedded(&model("a"), None, 9).await.unwrap(), []);
}

pub async fn a_prompt_of_an_unknown_user_stores_nothing(store: Store) {
    let refused = store.insert_prompt(embedded(UserId(5), "x", 1)).await;
    assert!(matches!(refused, Err(Error::Internal(_))), "{refused:?}");
    assert_eq!(
        store
            .list_prompts(UserId(5), None, 9, usize::MAX)
            .await
            .unwrap()
            .prompts,
        []
    );
    assert_eq!(coverage(&*store, &model("a"), None).await, (0, 0));
}

pub async fn another_users_prompt_is_absent(store: Store) {
    let alice = user(&*store, "alice").await;
    let bob = user(&*store, "bob").await;
    let id = insert(&*store, embedded(alice.id, "mine", 1)).await;
    assert_eq!(store.prompt(bob.id, id).await.unwrap(), None);
    assert_eq!(store.delete_prompt(bob.id, id).await.unwrap(), None);
    assert!(store.prompt(alice.id, id).await.unwrap().is_some());
    assert_eq!(newest(&*store, bob.id, 9).await, []);
    assert_eq!(store.prompt(alice.id, PromptId(999)).await.unwrap(), None);
}

pub async fn prompts_are_listed_newest_first_in_pages(store: Store) {
    let alice = user(&*store, "alice").await;
    let bob = user(&*store, "bob").await;
    let mut made = Vec::new();
    for n in 0..5 {
        let new = if n == 2 {
            failed(alice.id)
        } else {
            completed(alice.id, "p")
        };
        // Later posts may have been accepted earlier: the id decides, not the time.
        let new = NewPrompt {
            created_at: Timestamp(100 - n),
            ..new
        };
        made.push(store.insert_prompt(new).await.unwrap());
        insert(&*store, completed(bob.id, "other")).await;
    }
    assert!(made.is_sorted_by_key(|prompt| prompt.id));
    made.reverse();
    assert_eq!(newest(&*store, alice.id, 2).await, made[..2]);
    let before = Some(made[1].id);
    assert_eq!(
        store
            .list_prompts(alice.id, before, 2, usize::MAX)
            .await
            .unwrap()
            .prompts,
        made[2..4]
    );
    let before = Some(made[3].id);
    assert_eq!(
        store
            .list_prompts(alice.id, before, 2, usize::MAX)
            .await
            .unwrap()
            .prompts,
        made[4..]
    );
    let before = Some(made[4].id);
    assert_eq!(
        store
            .list_prompts(alice.id, before, 2, usize::MAX)
            .await
            .unwrap()
            .prompts,
        []
    );
    assert_eq!(newest(&*store, alice.id, 0).await, []);
    assert_eq!(
        store
            .list_prompts(alice.id, None, usize::MAX, usize::MAX)
            .await
            .unwrap()
            .prompts,
        made
    );
}

pub async fn a_page_ends_before_its_texts_are_too_long(store: Store) {
    let alice = user(&*store, "alice").await;
    let mut made = Vec::new();
    // Ten characters of twenty bytes each, and an answer of the same length.
    for _ in 0..4 {
        let prompt = NewPrompt {
            prompt: "é".repeat(10),
            response: Some("é".repeat(10)),
            ..completed(alice.id, "")
        };
        made.push(store.insert_prompt(prompt).await.unwrap());
    }
    made.reverse();
    let page = |before, limit, bytes| store.list_prompts(alice.id, before, limit, bytes);
    for (limit, bytes, expected) in [
        (9, 160, 4),
        (9, 159, 3),
        (9, 80, 2),
        (9, 79, 1),
        (9, 0, 1),
        (2, 160, 2),
    ] {
        let page = page(None, limit, bytes).await.unwrap();
        assert_eq!(
            page.prompts,
            made[..expected],
            "{limit} prompts, {bytes} bytes"
        );
        assert_eq!(page.has_more, expected < made.len());
    }
    let last = page(Some(made[2].id), 9, 0).await.unwrap();
    assert_eq!((last.prompts, last.has_more), (made[3..].to_vec(), false));
}

pub async fn of_several_prompts_the_first_come_whole_and_of_the_rest_the_size(store: Store) {
    let alice = user(&*store, "alice").await;
    let mut made = Vec::new();
    for length in [10, 20, 5, 5] {
        let prompt = NewPrompt {
            prompt: "x".repeat(length),
            response: Some("é".to_owned()),
            ..completed(alice.id, "")
        };
        made.push(store.insert_prompt(prompt).await.unwrap());
    }
    let asked: Vec<PromptId> = [2, 0, 1, 0, 3].map(|at: usize| made[at].id).to_vec();
    let read = |bytes| store.prompts(Some(alice.id), &asked, bytes);
    let all = read(48).await.unwrap();
    let in_order: Vec<_> = [2, 0, 1, 3].map(|at: usize| made[at].clone()).to_vec();
    assert_eq!((all.whole, all.rest), (in_order.clone(), vec![]));
    // The last one would fit, but what comes whole are the first ones.
    let some = read(26).await.unwrap();
    assert_eq!(some.whole, in_order[..2]);
    assert_eq!(some.rest, [(made[1].id, 22), (made[3].id, 7)]);
    let none = read(6).await.unwrap();
    assert_eq!((none.whole.len(), none.rest.len()), (0, 4));
}

pub async fn several_prompts_are_read_at_once_and_only_the_owners(store: Store) {
    let alice = user(&*store, "alice").await;
    let bob = user(&*store, "bob").await;
    let first = insert(&*store, completed(alice.id, "1")).await;
    let second = insert(&*store, completed(bob.id, "2")).await;
    let third = insert(&*store, failed(alice.id)).await;
    let asked = [third, second, PromptId(999), first, third];
    let mut found = ids(&store.prompts(None, &asked, usize::MAX).await.unwrap().whole);
    found.sort();
    assert_eq!(found, [first, second, third]);
    let mut found = ids(&store
        .prompts(Some(alice.id), &asked, usize::MAX)
        .await
        .unwrap()
        .whole);
    found.sort();
    assert_eq!(found, [first, third]);
    assert_eq!(
        store.prompts(None, &[], usize::MAX).await.unwrap().whole,
        []
    );
}

pub async fn deleting_removes_the_prompt_and_its_vector(store: Store) {
    let alice = user(&*store, "alice").await;
    let with = insert(&*store, embedded(alice.id, "with", 1)).await;
    let without = insert(&*store, completed(alice.id, "without")).await;
    let deleted = store.delete_prompt(alice.id, with).await.unwrap();
    let embedding_model = Some(model("a"));
    assert_eq!(deleted, Some(DeletedPrompt { embedding_model }));
    let deleted = store.delete_prompt(alice.id, without).await.unwrap();
    assert_eq!(
        deleted,
        Some(DeletedPrompt {
            embedding_model: None
        })
    );
    assert_eq!(store.delete_prompt(alice.id, with).await.unwrap(), None);
    assert_eq!(store.prompt(alice.id, with).await.unwrap(), None);
    assert_eq!(newest(&*store, alice.id, 9).await, []);
    let page = store.vectors(&model("a"), None, None, 9).await.unwrap();
    assert_eq!(page, NO_VECTORS);
}

pub async fn ids_are_not_reused_after_deletion(store: Store) {
    let alice = user(&*store, "alice").await;
    let mut last = PromptId(0);
    for _ in 0..3 {
        let id = insert(&*store, completed(alice.id, "p")).await;
        assert!(id > last);
        store.delete_prompt(alice.id, id).await.unwrap();
        last = id;
    }
}

/// Two prompts of Alice and one of Bob, stored in turns. Returns their ids and vectors in the order
/// of a scan.
async fn three_vectors(store: &dyn TestableStore) -> (Vec<VectorCursor>, Vec<Embedding>) {
    let alice = user(store, "alice").await.id;
    let bob = user(store, "bob").await.id;
    let first = insert(store, embedded(alice, "1", 1)).await;
    let second = insert(store, embedded(bob, "2", 2)).await;
    insert(store, completed(alice, "no vector")).await;
    let third = insert(store, embedded(alice, "3", 3)).await;
    let ids = vec![(alice, first), (alice, third), (bob, second)];
    (ids, vec![vector(1), vector(3), vector(2)])
}

pub async fn vectors_come_in_order_and_in_pages(store: Store) {
    let (ids, vectors) = three_vectors(&*store).await;
    let a = model("a");
    for limit in 1..5 {
        let (mut found, mut bytes, mut after) = (Vec::new(), Vec::new(), None);
        loop {
            let page = store.vectors(&a, None, after, limit).await.unwrap();
            assert!(page.ids.len() <= limit);
            found.extend_from_slice(&page.ids);
            bytes.extend_from_slice(&page.f16_bytes);
            after = page.ids.last().copied().or(after);
            if page.ids.len() < limit {
                break;
            }
        }
        assert_eq!(found, ids, "in pages of {limit}");
        assert_eq!(bytes, stored(&vectors), "in pages of {limit}");
    }
    let page = store.vectors(&a, None, None, usize::MAX).await.unwrap();
    assert_eq!(page.ids, ids);
    assert_eq!(store.vectors(&a, None, None, 0).await.unwrap(), NO_VECTORS);
}

pub async fn vectors_of_one_owner_ignore_a_cursor_in_anothers_rows(store: Store) {
    let (ids, vectors) = three_vectors(&*store).await;
    let (a, alice, bob) = (model("a"), ids[0].0, ids[2].0);
    let page = store.vectors(&a, Some(alice), None, 9).await.unwrap();
    assert_eq!(page.ids, ids[..2]);
    assert_eq!(page.f16_bytes, stored(&vectors[..2]));
    let page = store
        .vectors(&a, Some(alice), Some(ids[0]), 9)
        .await
        .unwrap();
    assert_eq!(page.ids, ids[1..2]);
    let page = store.vectors(&a, Some(bob), Some(ids[1]), 9).await.unwrap();
    assert_eq!(page.ids, ids[2..]);
    let page = store
        .vectors(&a, Some(alice), Some(ids[2]), 9)
        .await
        .unwrap();
    assert_eq!(page, NO_VECTORS);
}

pub async fn vectors_of_other_models_are_left_out(store: Store) {
    let (ids, _) = three_vectors(&*store).await;
    let (a, b) = (model("a"), model("b"));
    store
        .put_embeddings(&b, vec![(ids[1].1, vector(9))])
        .await
        .unwrap();
    let page = store.vectors(&a, None, None, 9).await.unwrap();
    assert_eq!(page.ids, [ids[0], ids[2]]);
    let page = store.vectors(&b, None, None, 9).await.unwrap();
    assert_eq!(page.ids, [ids[1]]);
    assert_eq!(page.f16_bytes, stored(&[vector(9)]));
    let page = store.vectors(&model("c"), None, None, 9).await.unwrap();
    assert_eq!(page, NO_VECTORS);
}

pub async fn vectors_come_back_in_their_stored_form(store: Store) {
    let alice = user(&*store, "alice").await;
    // More rows than one page of any backend's file holds, and of the real model's length.
    let long = |mark: u16| Embedding((0..384).map(|n| f32::from(mark * n) / 1e4).collect());
    let mut expected = Vec::new();
    for mark in 0..40 {
        let embedding = Some((model("a"), long(mark)));
        let new = NewPrompt {
            embedding,
            ..completed(alice.id, "p")
        };
        insert(&*store, new).await;
        expected.extend(long(mark).to_f16_bytes());
    }
    let page = store
        .vectors(&model("a"), Some(alice.id), None, 100)
        .await
        .unwrap();
    assert_eq!(page.ids.len(), 40);
    assert!(page.f16_bytes == expected);
}

pub async fn a_vector_of_another_length_is_refused_and_changes_nothing(store: Store) {
    let alice = user(&*store, "alice").await;
    let id = insert(&*store, embedded(alice.id, "p", 1)).await;
    let other = insert(&*store, completed(alice.id, "q")).await;
    let short = Embedding(Arc::from([1.0].as_slice()));
    let rows = vec![(other, vector(2)), (id, short.clone())];
    let refused = store.put_embeddings(&model("a"), rows).await;
    assert!(matches!(refused, Err(Error::Internal(_))), "{refused:?}");
    let embedding = Some((model("a"), short));
    let new = NewPrompt {
        embedding,
        ..completed(alice.id, "r")
    };
    let refused = store.insert_prompt(new).await;
    assert!(matches!(refused, Err(Error::Internal(_))), "{refused:?}");
    let page = store.vectors(&model("a"), None, None, 9).await.unwrap();
    assert_eq!(page.f16_bytes, stored(&[vector(1)]));
    assert_eq!(coverage(&*store, &model("a"), None).await, (1, 2));
}

pub async fn coverage_follows_inserts_deletes_and_replacements(store: Store) {
    let (a, b) = (model("a"), model("b"));
    assert_eq!(coverage(&*store, &a, None).await, (0, 0));
    let alice = user(&*store, "alice").await.id;
    let bob = user(&*store, "bob").await.id;
    let first = insert(&*store, embedded(alice, "1", 1)).await;
    let second = insert(&*store, completed(alice, "2")).await;
    let third = insert(&*store, embedded(bob, "3", 3)).await;
    insert(&*store, failed(bob)).await;
    assert_eq!(coverage(&*store, &a, None).await, (2, 3));
    assert_eq!(coverage(&*store, &a, Some(alice)).await, (1, 2));
    assert_eq!(coverage(&*store, &a, Some(bob)).await, (1, 1));
    assert_eq!(coverage(&*store, &b, Some(bob)).await, (0, 1));
    assert_eq!(coverage(&*store, &a, Some(UserId(99))).await, (0, 0));

    let rows = vec![(first, vector(4)), (second, vector(5))];
    store.put_embeddings(&b, rows.clone()).await.unwrap();
    store.put_embeddings(&b, rows).await.unwrap();
    assert_eq!(coverage(&*store, &a, None).await, (1, 3));
    assert_eq!(coverage(&*store, &b, None).await, (2, 3));
    assert_eq!(coverage(&*store, &b, Some(alice)).await, (2, 2));

    store.delete_prompt(alice, second).await.unwrap();
    store.delete_prompt(bob, third).await.unwrap();
    assert_eq!(coverage(&*store, &a, None).await, (0, 1));
    assert_eq!(coverage(&*store, &b, None).await, (1, 1));
    assert_eq!(coverage(&*store, &b, Some(alice)).await, (1, 1));
    assert_eq!(coverage(&*store, &a, Some(bob)).await, (0, 0));
}

pub async fn unembedded_prompts_come_by_rising_id_in_pages(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let bob = user(&*store, "bob").await.id;
    let row = |id, user_id, prompt: &str| Unembedded {
        id,
        user_id,
        prompt: prompt.to_owned(),
    };
    let first = row(insert(&*store, completed(bob, "1")).await, bob, "1");
    let second = row(insert(&*store, embedded(alice, "2", 2)).await, alice, "2");
    insert(&*store, failed(alice)).await;
    let third = row(insert(&*store, completed(alice, "3")).await, alice, "3");
    let a = model("a");
    let of_a = [first.clone(), third.clone()];
    let of_b = [first, second, third];
    assert_eq!(store.unembedded(&a, None, 9).await.unwrap(), of_a);
    let after = Some(of_a[0].id);
    assert_eq!(store.unembedded(&a, after, 9).await.unwrap(), of_a[1..]);
    let b = model("b");
    assert_eq!(store.unembedded(&b, None, 9).await.unwrap(), of_b);
    assert_eq!(store.unembedded(&b, None, 2).await.unwrap(), of_b[..2]);
    let after = Some(of_b[1].id);
    assert_eq!(store.unembedded(&b, after, 2).await.unwrap(), of_b[2..]);
    assert_eq!(store.unembedded(&b, None, 0).await.unwrap(), []);
}

pub async fn late_vectors_replace_and_pass_over_the_gone_and_the_failed(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let first = insert(&*store, embedded(alice, "1", 1)).await;
    let gone = insert(&*store, embedded(alice, "2", 2)).await;
    store.delete_prompt(alice, gone).await.unwrap();
    let unanswered = insert(&*store, failed(alice)).await;
    let last = insert(&*store, completed(alice, "3")).await;
    let b = model("b");
    let rows = [last, gone, unanswered, first].map(|id| (id, vector(7)));
    let answer = store.put_embeddings(&b, rows.to_vec()).await.unwrap();
    assert_eq!(answer, [last, first]);
    let page = store.vectors(&b, None, None, 9).await.unwrap();
    assert_eq!(page.ids, [(alice, first), (alice, last)]);
    assert_eq!(page.f16_bytes, stored(&[vector(7), vector(7)]));
    let page = store.vectors(&model("a"), None, None, 9).await.unwrap();
    assert_eq!(page, NO_VECTORS);
    // The same model's vector is replaced too.
    store
        .put_embeddings(&b, vec![(first, vector(8))])
        .await
        .unwrap();
    let page = store.vectors(&b, None, None, 1).await.unwrap();
    assert_eq!(page.f16_bytes, stored(&[vector(8)]));
    assert_eq!(store.put_embeddings(&b, Vec::new()).await.unwrap(), []);
}

pub async fn a_ping_is_answered(store: Store) {
    assert_eq!(store.ping().await.unwrap(), Access::ReadWrite);
}

pub async fn a_user_keeps_no_more_prompts_than_allowed(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let bob = user(&*store, "bob").await.id;
    let bounded = |new| NewPrompt {
        max_prompts: Some(3),
        ..new
    };
    let call = |owner| NewCall {
        max_prompts: Some(3),
        ..call(owner)
    };
    let first = insert(&*store, bounded(embedded(alice, "kept", 1))).await;
    insert(&*store, bounded(failed(alice))).await;
    assert!(store.has_room(alice, 3).await.unwrap());
    started(&*store, call(alice)).await;

    assert!(!store.has_room(alice, 3).await.unwrap());
    let refused = store
        .insert_prompt(bounded(embedded(alice, "more", 2)))
        .await;
    assert!(matches!(refused, Err(Error::QuotaExceeded)), "{refused:?}");
    let refused = store.begin_call(call(alice)).await;
    assert!(matches!(refused, Err(Error::QuotaExceeded)), "{refused:?}");
    let kept = store.list_prompts(alice, None, 9, usize::MAX).await;
    assert_eq!(kept.unwrap().prompts.len(), 3);

    // The bound is the user's own, it may rise, and a deletion makes room.
    insert(&*store, bounded(completed(bob, "other"))).await;
    assert!(store.has_room(alice, 4).await.unwrap());
    assert!(store.delete_prompt(alice, first).await.unwrap().is_some());
    started(&*store, call(alice)).await;
    let refused = store.insert_prompt(bounded(completed(alice, "more"))).await;
    assert!(matches!(refused, Err(Error::QuotaExceeded)), "{refused:?}");
    insert(&*store, completed(alice, "unbounded")).await;
}
