//! Running calls, idempotency keys and the day's count. A lease of no length expires at once, so no
//! case waits.

use std::sync::Arc;
use std::time::Duration;

use prompt_service::domain::{
    Budget, CallDetails, Embedding, FailureCode, KeyRecord, Period, Picodollars, Prompt, PromptId,
    PromptSource, PromptStatus, Record, Timestamp, UserId,
};
use prompt_service::store::{
    Begun, CallBudgets, CallOutcome, DailyLimit, DeletedPrompt, Error, ExpiredCall, Holder,
    KeyClaim, KeyState, NewCall,
};

use crate::store::{InsertPrompt, TestableStore, embedded, model, newest, user, vector};

type Store = Arc<dyn TestableStore>;

const HELD: Duration = Duration::from_secs(3600);
const OVER: Duration = Duration::ZERO;
const DAY: Duration = Duration::from_secs(86_400);
/// Longer than any test takes.
const MINUTE: Duration = Duration::from_secs(60);

pub fn holder(replica: u8, call: i64) -> Holder {
    Holder {
        replica: [replica; 16],
        call,
    }
}

/// The key of that number, claimed for the request of that number.
pub fn claim(key: u8, request: u8) -> KeyClaim {
    KeyClaim {
        key_hash: [key; 32],
        fingerprint: [request; 32],
    }
}

/// A call without a key, held by call 1 of replica 1.
pub fn call(user_id: UserId) -> NewCall {
    NewCall {
        user_id,
        source: PromptSource::Api,
        chat: None,
        is_kept: true,
        prompt: "Why?".to_owned(),
        model: "asked".to_owned(),
        created_at: Timestamp(3_000),
        announce: false,
        key: None,
        holder: holder(1, 1),
        lease: HELD,
        max_prompts: None,
        api_key_id: None,
        budgets: CallBudgets::default(),
        daily: None,
    }
}

fn keyed(user_id: UserId, key: KeyClaim) -> NewCall {
    NewCall {
        key: Some(key),
        ..call(user_id)
    }
}

/// The call with a lease that is over.
fn over(call: NewCall) -> NewCall {
    NewCall {
        lease: OVER,
        ..call
    }
}

pub async fn started(store: &dyn TestableStore, call: NewCall) -> Prompt {
    match store.begin_call(call).await.unwrap() {
        Begun::Started(prompt) => prompt,
        Begun::OverLimit(prompt) => panic!("over the limit: {:?}", prompt.id),
        Begun::Known(state) => panic!("known: {state:?}"),
    }
}

async fn known(store: &dyn TestableStore, call: NewCall) -> KeyState {
    match store.begin_call(call).await.unwrap() {
        Begun::Known(state) => state,
        Begun::Started(prompt) | Begun::OverLimit(prompt) => panic!("started: {:?}", prompt.id),
    }
}

async fn renew(
    store: &dyn TestableStore,
    replica: [u8; 16],
    ids: &[PromptId],
    lease: Duration,
) -> u64 {
    store.renew_leases(replica, ids, lease).await.unwrap()
}

/// The state of a user's key for that claim.
async fn state(store: &dyn TestableStore, user_id: UserId, claim: KeyClaim) -> Option<KeyState> {
    store.key_state(user_id, &claim).await.unwrap()
}

pub fn answered() -> CallOutcome {
    CallOutcome {
        details: CallDetails {
            cost: None,
            finish_reason: Some("stop".to_owned()),
            prompt_tokens: Some(3),
            completion_tokens: Some(2),
            duration_ms: Some(12),
        },
        embedding: Some((model("a"), vector(1))),
        ..CallOutcome::completed("Because.", "answering")
    }
}

fn timed_out() -> CallOutcome {
    CallOutcome::failed(FailureCode::UpstreamTimeout)
}

pub async fn a_begun_call_is_a_running_prompt(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let begun = started(&*store, call(alice)).await;
    let expected = Prompt {
        id: begun.id,
        user_id: alice,
        source: PromptSource::Api,
        prompt: "Why?".to_owned(),
        response: None,
        model: "asked".to_owned(),
        status: PromptStatus::Running,
        error: None,
        created_at: Timestamp(3_000),
        call: CallDetails::default(),
    };
    assert_eq!(begun, expected);
    assert_eq!(
        store.prompt(alice, begun.id).await.unwrap(),
        Some(expected.clone())
    );
    assert_eq!(newest(&*store, alice, 9).await, [expected]);
    assert_eq!(store.unembedded(&model("a"), None, 9).await.unwrap(), []);
    let late = vec![(begun.id, vector(1))];
    assert_eq!(store.put_embeddings(&model("a"), late).await.unwrap(), []);
}

pub async fn a_call_of_an_unknown_user_stores_nothing(store: Store) {
    let refused = store.begin_call(keyed(UserId(5), claim(1, 1))).await;
    assert!(matches!(refused, Err(Error::Internal(_))), "{refused:?}");
    assert_eq!(
        store
            .list_prompts(UserId(5), None, 9, usize::MAX)
            .await
            .unwrap()
            .prompts,
        []
    );
    assert_eq!(state(&*store, UserId(5), claim(1, 1)).await, None);
}

pub async fn a_call_is_settled_once_and_only_by_its_holder(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let begun = started(&*store, call(alice)).await;
    for other in [holder(2, 1), holder(1, 2)] {
        let refused = store.settle_call(begun.id, other, answered()).await;
        assert_eq!(refused.unwrap(), None);
    }
    let finished = store
        .settle_call(begun.id, holder(1, 1), answered())
        .await
        .unwrap();
    let expected = Prompt {
        response: Some("Because.".to_owned()),
        model: "answering".to_owned(),
        status: PromptStatus::Completed,
        call: CallDetails {
            cost: None,
            finish_reason: Some("stop".to_owned()),
            prompt_tokens: Some(3),
            completion_tokens: Some(2),
            duration_ms: Some(12),
        },
        ..begun.clone()
    };
    assert_eq!(finished.as_ref(), Some(&expected));
    assert_eq!(
        store.prompt(alice, begun.id).await.unwrap(),
        Some(expected.clone())
    );
    for outcome in [answered(), timed_out()] {
        let again = store.settle_call(begun.id, holder(1, 1), outcome);
        assert_eq!(again.await.unwrap(), None);
    }
    assert_eq!(store.prompt(alice, begun.id).await.unwrap(), Some(expected));
    let page = store
        .vectors(&model("a"), Some(alice), None, 9)
        .await
        .unwrap();
    assert_eq!(page.ids, [(alice, begun.id)]);
    assert_eq!(page.f16_bytes, vector(1).to_f16_bytes());
}

pub async fn a_failed_call_has_no_vector_and_releases_its_key(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let begun = started(&*store, keyed(alice, claim(1, 1))).await;
    let finished = store
        .settle_call(begun.id, holder(1, 1), timed_out())
        .await
        .unwrap();
    let expected = Prompt {
        status: PromptStatus::Failed,
        error: Some(FailureCode::UpstreamTimeout),
        ..begun.clone()
    };
    assert_eq!(finished, Some(expected));
    assert_eq!(state(&*store, alice, claim(1, 1)).await, None);
    // The key is free even for another request, and begins another row.
    let next = started(&*store, keyed(alice, claim(1, 2))).await;
    assert!(next.id > begun.id);
    let page = store.vectors(&model("a"), None, None, 9).await.unwrap();
    assert_eq!(page.ids, []);
}

pub async fn a_known_key_is_returned_and_nothing_changes(store: Store) {
    let alice = user(&*store, "alice").await.id;
    assert_eq!(state(&*store, alice, claim(1, 1)).await, None);
    let begun = started(&*store, keyed(alice, claim(1, 1))).await;
    let in_flight = KeyState::InFlight(begun.id);
    for (request, expected) in [(1, in_flight), (2, KeyState::OtherRequest)] {
        let other = NewCall {
            holder: holder(2, 1),
            ..keyed(alice, claim(1, request))
        };
        assert_eq!(known(&*store, other).await, expected);
        let state = state(&*store, alice, claim(1, request)).await;
        assert_eq!(state, Some(expected));
    }
    let settled = store.settle_call(begun.id, holder(1, 1), answered());
    assert!(settled.await.unwrap().is_some());
    let completed = KeyState::Completed(begun.id);
    for (request, expected) in [(1, completed), (2, KeyState::OtherRequest)] {
        let repeated = keyed(alice, claim(1, request));
        assert_eq!(known(&*store, repeated).await, expected);
        let state = state(&*store, alice, claim(1, request)).await;
        assert_eq!(state, Some(expected));
    }
    assert_eq!(newest(&*store, alice, 9).await.len(), 1);
}

pub async fn keys_of_different_users_are_independent(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let bob = user(&*store, "bob").await.id;
    let first = started(&*store, keyed(alice, claim(1, 1))).await;
    assert_eq!(state(&*store, bob, claim(1, 1)).await, None);
    let second = started(&*store, keyed(bob, claim(1, 2))).await;
    assert_ne!(first.id, second.id);
    let finished = store.settle_call(second.id, holder(1, 1), timed_out());
    assert!(finished.await.unwrap().is_some());
    assert_eq!(state(&*store, bob, claim(1, 1)).await, None);
    assert!(state(&*store, alice, claim(1, 1)).await.is_some());
}

pub async fn an_expired_call_fails_once_and_is_returned_with_its_announcement(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let held = started(&*store, call(alice)).await;
    let mut expected = Vec::new();
    for announce in [true, false, true] {
        let begun = started(
            &*store,
            NewCall {
                announce,
                ..over(call(alice))
            },
        )
        .await;
        expected.push(ExpiredCall {
            prompt: Prompt {
                status: PromptStatus::Failed,
                error: Some(FailureCode::Interrupted),
                ..begun
            },
            announce,
        });
    }
    let mut expired = store.expire_calls(2, &[]).await.unwrap();
    assert_eq!(expired.len(), 2);
    expired.extend(store.expire_calls(2, &[]).await.unwrap());
    expired.sort_by_key(|call| call.prompt.id);
    assert_eq!(expired, expected);
    assert_eq!(store.expire_calls(2, &[]).await.unwrap(), []);
    for call in expired {
        let id = call.prompt.id;
        assert_eq!(
            store.prompt(alice, id).await.unwrap().as_ref(),
            Some(&call.prompt)
        );
        let late = store.settle_call(id, holder(1, 1), answered());
        assert_eq!(late.await.unwrap(), None);
    }
    let held = store.settle_call(held.id, holder(1, 1), answered());
    assert!(held.await.unwrap().is_some());
}

pub async fn a_renewed_lease_does_not_expire(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let begun = started(&*store, over(call(alice))).await;
    assert_eq!(
        renew(&*store, [1; 16], &[begun.id, begun.id], HELD).await,
        1
    );
    assert_eq!(store.expire_calls(9, &[]).await.unwrap(), []);
    // Renewing replaces the length and does not add to it.
    assert_eq!(renew(&*store, [1; 16], &[begun.id], OVER).await, 1);
    assert_eq!(store.expire_calls(9, &[]).await.unwrap().len(), 1);
    assert_eq!(renew(&*store, [1; 16], &[begun.id], HELD).await, 0);
    assert_eq!(renew(&*store, [1; 16], &[], HELD).await, 0);
}

pub async fn a_spared_call_does_not_expire_and_others_do(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let mut begun = Vec::new();
    for _ in 0..3 {
        begun.push(started(&*store, over(call(alice))).await.id);
    }
    let spared = [begun[0], begun[1]];
    let expired = store.expire_calls(1, &spared).await.unwrap();
    let expired: Vec<PromptId> = expired.iter().map(|call| call.prompt.id).collect();
    assert_eq!(expired, [begun[2]], "the spared use up none of the limit");
    assert_eq!(store.expire_calls(9, &spared).await.unwrap(), []);
    let late = store.settle_call(begun[0], holder(1, 1), answered());
    assert!(late.await.unwrap().is_some());
    assert_eq!(store.expire_calls(9, &[]).await.unwrap().len(), 1);
}

pub async fn leases_of_others_are_not_renewed(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let begun = started(&*store, over(call(alice))).await;
    assert_eq!(
        renew(&*store, [2; 16], &[begun.id, PromptId(999)], HELD).await,
        0
    );
    assert_eq!(store.expire_calls(9, &[]).await.unwrap().len(), 1);
}

/// Begins the call again with the same key after it expired, and checks that the row is the same.
async fn take_over(store: &dyn TestableStore, alice: UserId, first: &Prompt) {
    let expired = KeyState::Expired(first.id);
    assert_eq!(state(store, alice, claim(1, 1)).await, Some(expired));
    let retried = NewCall {
        created_at: Timestamp(9_000),
        model: "other".to_owned(),
        holder: holder(1, 2),
        ..keyed(alice, claim(1, 1))
    };
    let second = started(store, retried.clone()).await;
    let expected = Prompt {
        model: "other".to_owned(),
        ..first.clone()
    };
    assert_eq!(second, expected);
    assert_eq!(store.prompt(alice, first.id).await.unwrap(), Some(expected));
    let in_flight = KeyState::InFlight(first.id);
    assert_eq!(known(store, retried).await, in_flight);
    // The first holder is late, though of the same process.
    let late = store.settle_call(first.id, holder(1, 1), answered());
    assert_eq!(late.await.unwrap(), None);
    assert_eq!(store.expire_calls(9, &[]).await.unwrap(), []);
    let finished = store.settle_call(first.id, holder(1, 2), answered());
    assert!(finished.await.unwrap().is_some());
    assert_eq!(newest(store, alice, 9).await.len(), 1);
    let covered = store.coverage(&model("a"), Some(alice)).await.unwrap();
    assert_eq!((covered.completed, covered.embedded), (1, 1));
}

pub async fn a_key_takes_over_its_expired_row(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let first = started(&*store, over(keyed(alice, claim(1, 1)))).await;
    assert_eq!(store.expire_calls(9, &[]).await.unwrap().len(), 1);
    take_over(&*store, alice, &first).await;
}

pub async fn a_key_takes_over_an_expired_row_before_it_is_ended(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let first = started(&*store, over(keyed(alice, claim(1, 1)))).await;
    take_over(&*store, alice, &first).await;
}

pub async fn an_expired_row_is_not_taken_over_by_another_request(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let first = started(&*store, over(keyed(alice, claim(1, 1)))).await;
    let other = keyed(alice, claim(1, 2));
    assert_eq!(known(&*store, other).await, KeyState::OtherRequest);
    assert_eq!(
        state(&*store, alice, claim(1, 1)).await,
        Some(KeyState::Expired(first.id))
    );
    assert_eq!(store.expire_calls(9, &[]).await.unwrap().len(), 1);
}

pub async fn a_known_key_needs_no_quota(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let bounded = |call| NewCall {
        max_prompts: Some(2),
        ..call
    };
    let held = started(&*store, bounded(keyed(alice, claim(1, 1)))).await;
    let expired = started(&*store, bounded(over(keyed(alice, claim(2, 2))))).await;
    let again = known(&*store, bounded(keyed(alice, claim(1, 1)))).await;
    assert_eq!(again, KeyState::InFlight(held.id));
    let taken_over = started(&*store, bounded(keyed(alice, claim(2, 2)))).await;
    assert_eq!(taken_over.id, expired.id);

    // A refused call leaves its key free.
    let refused = store.begin_call(bounded(keyed(alice, claim(3, 3)))).await;
    assert!(matches!(refused, Err(Error::QuotaExceeded)), "{refused:?}");
    assert_eq!(state(&*store, alice, claim(3, 3)).await, None);
}

pub async fn a_deleted_prompt_keeps_its_key_and_cannot_be_settled(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let begun = started(&*store, keyed(alice, claim(1, 1))).await;
    let deleted = store.delete_prompt(alice, begun.id).await.unwrap();
    let embedding_model = None;
    assert_eq!(deleted, Some(DeletedPrompt { embedding_model }));
    let late = store.settle_call(begun.id, holder(1, 1), answered());
    assert_eq!(late.await.unwrap(), None);
    assert_eq!(store.prompt(alice, begun.id).await.unwrap(), None);
    assert_eq!(renew(&*store, [1; 16], &[begun.id], HELD).await, 0);
    let gone = KeyState::Deleted;
    assert_eq!(state(&*store, alice, claim(1, 1)).await, Some(gone));
    assert_eq!(known(&*store, keyed(alice, claim(1, 1))).await, gone);
    assert_eq!(newest(&*store, alice, 9).await, []);

    let begun = started(&*store, keyed(alice, claim(2, 1))).await;
    let finished = store.settle_call(begun.id, holder(1, 1), answered());
    assert!(finished.await.unwrap().is_some());
    store.delete_prompt(alice, begun.id).await.unwrap();
    assert_eq!(known(&*store, keyed(alice, claim(2, 1))).await, gone);
}

pub async fn purged_keys_are_free_and_their_prompts_stay(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let begun = started(&*store, keyed(alice, claim(1, 1))).await;
    // Claimed just now, so it is free in a day.
    let now = Timestamp::now();
    assert_eq!(store.purge_keys(now).await.unwrap(), 0);
    assert_eq!(store.purge_keys(now.plus(DAY - MINUTE)).await.unwrap(), 0);
    assert!(state(&*store, alice, claim(1, 1)).await.is_some());
    assert_eq!(store.purge_keys(now.plus(DAY + MINUTE)).await.unwrap(), 1);
    assert_eq!(state(&*store, alice, claim(1, 1)).await, None);
    let finished = store.settle_call(begun.id, holder(1, 1), answered());
    assert!(finished.await.unwrap().is_some());
    let next = started(&*store, keyed(alice, claim(1, 1))).await;
    assert!(next.id > begun.id);
}

pub async fn a_key_of_yesterday_is_free_before_it_is_purged(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let begun = started(&*store, keyed(alice, claim(1, 1))).await;
    let finished = store.settle_call(begun.id, holder(1, 1), answered());
    assert!(finished.await.unwrap().is_some());
    let now = Timestamp::now();
    let key = |mark: u8, age: Duration| KeyRecord {
        user_id: alice,
        key_hash: [mark; 32],
        fingerprint: [9; 32],
        prompt_id: begun.id,
        claimed_at: now.minus(age),
    };
    let keys = vec![key(2, DAY - MINUTE), key(3, DAY + MINUTE)];
    let keys = keys.into_iter().map(Record::Key);
    store.put(keys.collect()).await.unwrap();
    assert!(state(&*store, alice, claim(2, 9)).await.is_some());
    assert_eq!(state(&*store, alice, claim(3, 9)).await, None);
    // The key can be claimed by another request now.
    let next = started(&*store, keyed(alice, claim(3, 1))).await;
    assert!(next.id > begun.id);
    assert_eq!(
        state(&*store, alice, claim(3, 1)).await,
        Some(KeyState::InFlight(next.id))
    );
}

pub async fn a_vector_of_another_length_leaves_the_call_running(store: Store) {
    let alice = user(&*store, "alice").await.id;
    store.insert_prompt(embedded(alice, "p", 1)).await.unwrap();
    let begun = started(&*store, call(alice)).await;
    let outcome = CallOutcome {
        embedding: Some((model("a"), Embedding(Arc::from([1.0_f32].as_slice())))),
        ..CallOutcome::completed("Because.", "answering")
    };
    let refused = store.settle_call(begun.id, holder(1, 1), outcome);
    assert!(matches!(refused.await, Err(Error::Internal(_))));
    assert_eq!(
        store.prompt(alice, begun.id).await.unwrap(),
        Some(begun.clone())
    );
    let failed = store.settle_call(begun.id, holder(1, 1), timed_out());
    assert!(failed.await.unwrap().is_some());
}

pub async fn settled_calls_are_counted_as_covered(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let count = async || {
        let covered = store.coverage(&model("a"), Some(alice)).await.unwrap();
        (covered.completed, covered.embedded)
    };
    let first = started(&*store, call(alice)).await;
    let second = started(&*store, call(alice)).await;
    assert_eq!(count().await, (0, 0));
    store
        .settle_call(first.id, holder(1, 1), answered())
        .await
        .unwrap();
    assert_eq!(count().await, (1, 1));
    store
        .settle_call(second.id, holder(1, 1), timed_out())
        .await
        .unwrap();
    assert_eq!(count().await, (1, 1));
    store.delete_prompt(alice, first.id).await.unwrap();
    store.delete_prompt(alice, second.id).await.unwrap();
    assert_eq!(count().await, (0, 0));
}

/// Begins a call that is counted on `day`. Returns whether it is within that limit.
pub async fn is_counted(store: &dyn TestableStore, new: NewCall, day: i64, calls: u64) -> bool {
    let daily = Some(DailyLimit { day, calls });
    match store.begin_call(NewCall { daily, ..new }).await.unwrap() {
        Begun::Started(_) => true,
        Begun::OverLimit(_) => false,
        Begun::Known(state) => panic!("known: {state:?}"),
    }
}

pub async fn upstream_calls_are_counted_by_day_up_to_the_limit(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let count = async |day, limit| is_counted(&*store, call(alice), day, limit).await;
    assert!(!count(20_000, 0).await);
    assert!(count(20_000, 2).await);
    assert!(count(20_000, 2).await);
    assert!(!count(20_000, 2).await);
    assert!(count(20_001, 1).await);
    assert!(!count(20_001, 1).await);
    // A call beyond the limit was not counted: one more is allowed by one more.
    assert!(count(20_000, 3).await);
    assert!(!count(20_000, 3).await);
    // Within the limit or not, each was begun.
    let begun = newest(&*store, alice, 9).await;
    assert_eq!(begun.len(), 8);
    for prompt in begun {
        assert_eq!(prompt.status, PromptStatus::Running);
        let settled = store.settle_call(prompt.id, holder(1, 1), timed_out());
        assert!(settled.await.unwrap().is_some());
    }
}

pub async fn only_calls_that_are_begun_are_counted(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let daily = Some(DailyLimit {
        day: 20_000,
        calls: 3,
    });
    let new = NewCall {
        daily,
        max_prompts: Some(9),
        ..call(alice)
    };
    let refused = NewCall {
        max_prompts: Some(0),
        ..new.clone()
    };
    let refused = store.begin_call(refused).await;
    assert!(matches!(refused, Err(Error::QuotaExceeded)), "{refused:?}");
    for (most_cost, is_price_known) in [(Some(Picodollars(2)), true), (None, false)] {
        let budgets = CallBudgets {
            most_cost,
            key: None,
            service: Some(Budget {
                amount: Picodollars(1),
                period: Period::Total,
            }),
        };
        let refused = store.begin_call(NewCall {
            budgets,
            ..new.clone()
        });
        match refused.await {
            Err(Error::BudgetExceeded) => assert!(is_price_known),
            Err(Error::PriceUnknown) => assert!(!is_price_known),
            other => panic!("{other:?}"),
        }
    }
    let nobody = NewCall {
        user_id: UserId(alice.0 + 1),
        ..new.clone()
    };
    assert!(store.begin_call(nobody).await.is_err());
    // With a key: begun, known, and taken over once its lease is over.
    let keyed = NewCall {
        key: Some(claim(1, 1)),
        ..new.clone()
    };
    started(&*store, keyed.clone()).await;
    let known = store.begin_call(keyed).await.unwrap();
    assert!(matches!(known, Begun::Known(_)), "{known:?}");
    let expiring = NewCall {
        key: Some(claim(2, 2)),
        ..over(new.clone())
    };
    let first = started(&*store, expiring.clone()).await;
    let second = started(&*store, expiring.clone()).await;
    assert_eq!(first.id, second.id);
    // Three were begun, so the day has no call left. A row is taken over all the same.
    for beyond in [new, expiring] {
        let begun = store.begin_call(beyond).await.unwrap();
        assert!(matches!(begun, Begun::OverLimit(_)), "{begun:?}");
    }
}
