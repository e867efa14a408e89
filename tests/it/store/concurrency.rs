//! Many tasks at once.

use std::collections::HashSet;
use std::sync::Arc;

use prompt_service::domain::{Budget, Period, Picodollars, Session, Timestamp, UserId};
use prompt_service::store::{Begun, CallBudgets, Error, NewCall};
use tokio::task::JoinSet;

use crate::store::calls::{answered, call, claim, holder, is_counted, started};
use crate::store::{
    InsertPrompt, NewPrompt, TestableStore, completed, embedded, list_users, model, new_user,
    newest, user, vector,
};

type Store = Arc<dyn TestableStore>;

pub async fn racing_inserts_are_all_there_with_rising_ids(store: Store) {
    const TASKS: usize = 32;
    const EACH: usize = 20;
    let alice = user(&*store, "alice").await.id;
    let mut tasks = JoinSet::new();
    for _ in 0..TASKS {
        let store = Arc::clone(&store);
        tasks.spawn(async move {
            let mut ids = Vec::new();
            for _ in 0..EACH {
                ids.push(
                    store
                        .insert_prompt(embedded(alice, "p", 1))
                        .await
                        .unwrap()
                        .id,
                );
            }
            ids
        });
    }
    let mut all = HashSet::new();
    while let Some(ids) = tasks.join_next().await {
        let ids = ids.unwrap();
        assert!(ids.is_sorted(), "a task's later prompt has a higher id");
        all.extend(ids);
    }
    assert_eq!(all.len(), TASKS * EACH);
    let listed = store
        .list_prompts(alice, None, usize::MAX, usize::MAX)
        .await
        .unwrap()
        .prompts;
    assert_eq!(
        listed
            .iter()
            .map(|prompt| prompt.id)
            .collect::<HashSet<_>>(),
        all
    );
    let covered = store.coverage(&model("a"), Some(alice)).await.unwrap();
    assert_eq!(covered.embedded, (TASKS * EACH) as u64);
}

pub async fn racing_registrations_of_one_name_have_one_winner(store: Store) {
    let mut tasks = JoinSet::new();
    for _ in 0..16 {
        let store = Arc::clone(&store);
        tasks.spawn(async move { store.create_user(new_user("alice")).await });
    }
    let mut made = 0;
    for answer in tasks.join_all().await {
        match answer {
            Ok(_) => made += 1,
            Err(error) => assert!(matches!(error, Error::UsernameTaken), "{error:?}"),
        }
    }
    assert_eq!(made, 1);
    assert_eq!(list_users(&*store, None, 99).await.len(), 1);
}

pub async fn racing_sessions_stop_at_the_limit(store: Store) {
    const LIMIT: usize = 5;
    let alice = user(&*store, "alice").await.id;
    let hashes: Vec<[u8; 32]> = (0..32).map(|mark| [mark; 32]).collect();
    let mut tasks = JoinSet::new();
    for token_hash in hashes.clone() {
        let store = Arc::clone(&store);
        let session = Session {
            token_hash,
            user_id: alice,
            created_at: Timestamp(10),
            expires_at: Timestamp(99),
        };
        tasks.spawn(async move { store.create_session(session, LIMIT).await.unwrap() });
    }
    tasks.join_all().await;
    assert_eq!(store.sessions(&hashes).await.unwrap().len(), LIMIT);
}

pub async fn racing_claims_of_one_key_have_one_winner(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let mut tasks = JoinSet::new();
    for n in 0..64 {
        let store = Arc::clone(&store);
        let call = NewCall {
            key: Some(claim(1, 1)),
            holder: holder(1, n),
            ..call(alice)
        };
        tasks.spawn(async move { store.begin_call(call).await.unwrap() });
    }
    let begun = tasks.join_all().await;
    let winners = begun
        .iter()
        .filter(|begun| matches!(begun, Begun::Started(_)));
    assert_eq!(winners.count(), 1);
    assert_eq!(newest(&*store, alice, 99).await.len(), 1);
}

pub async fn racing_ends_of_one_call_have_one_winner(store: Store) {
    let alice = user(&*store, "alice").await.id;
    for _ in 0..10 {
        let expiring = NewCall {
            lease: std::time::Duration::ZERO,
            ..call(alice)
        };
        let id = started(&*store, expiring).await.id;
        let mut tasks = JoinSet::new();
        for n in 0..8 {
            let store = Arc::clone(&store);
            tasks.spawn(async move {
                if n % 2 == 0 {
                    store.expire_calls(9, &[]).await.unwrap().len()
                } else {
                    let ended = store.settle_call(id, holder(1, 1), answered()).await;
                    usize::from(ended.unwrap().is_some())
                }
            });
        }
        assert_eq!(tasks.join_all().await.iter().sum::<usize>(), 1);
    }
}

pub async fn racing_upstream_calls_stop_at_the_limit(store: Store) {
    // Of several users, in budgets and with keys: each lock that a call may take.
    let users = [
        user(&*store, "alice").await.id,
        user(&*store, "bob").await.id,
    ];
    let limit = Budget {
        amount: Picodollars(1_000),
        period: Period::Total,
    };
    let mut tasks = JoinSet::new();
    for n in 0..40 {
        let store = Arc::clone(&store);
        let new = NewCall {
            key: (n % 3 == 0).then(|| claim(n, n)),
            max_prompts: (n % 2 == 0).then_some(99),
            budgets: CallBudgets {
                most_cost: Some(Picodollars(1)),
                key: None,
                service: (n % 5 < 3).then_some(limit),
            },
            holder: holder(1, n.into()),
            ..call(users[usize::from(n) % 2])
        };
        tasks.spawn(async move { is_counted(&*store, new, 20_000, 25).await });
    }
    let counted = tasks
        .join_all()
        .await
        .into_iter()
        .filter(|counted| *counted);
    assert_eq!(counted.count(), 25);
}

pub async fn racing_posts_of_one_user_stop_at_the_quota(store: Store) {
    const QUOTA: u32 = 10;
    let alice = user(&*store, "alice").await.id;
    let mut tasks = JoinSet::new();
    for n in 0..48 {
        let store = Arc::clone(&store);
        tasks.spawn(async move {
            let max_prompts = Some(QUOTA);
            let outcome = if n % 3 == 0 {
                let new = NewPrompt {
                    max_prompts,
                    ..completed(alice, "at once")
                };
                store.insert_prompt(new).await.map(drop)
            } else {
                let key = (n % 3 == 1).then(|| claim(n, n));
                let new = NewCall {
                    key,
                    max_prompts,
                    holder: holder(1, n.into()),
                    ..call(alice)
                };
                store.begin_call(new).await.map(drop)
            };
            match outcome {
                Ok(()) => 1,
                Err(Error::QuotaExceeded) => 0,
                Err(error) => panic!("{error:?}"),
            }
        });
    }
    let stored: u32 = tasks.join_all().await.into_iter().sum();
    assert_eq!(stored, QUOTA);
    let kept = store.list_prompts(alice, None, 99, usize::MAX).await;
    assert_eq!(kept.unwrap().prompts.len(), 10);
}

pub async fn a_failed_operation_leaves_its_neighbours_alone(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let mut tasks = JoinSet::new();
    for n in 0..60 {
        let store = Arc::clone(&store);
        let owner = if n % 3 == 0 { UserId(999) } else { alice };
        tasks.spawn(async move { store.insert_prompt(completed(owner, "p")).await.is_ok() });
    }
    let stored = tasks.join_all().await.into_iter().filter(|ok| *ok).count();
    assert_eq!(stored, 40);
    assert_eq!(newest(&*store, alice, 99).await.len(), 40);
}

pub async fn a_write_is_seen_by_the_next_read(store: Store) {
    let alice = user(&*store, "alice").await.id;
    let mut tasks = JoinSet::new();
    for _ in 0..16 {
        let store = Arc::clone(&store);
        tasks.spawn(async move {
            for _ in 0..10 {
                let made = store.insert_prompt(completed(alice, "p")).await.unwrap();
                let rows = vec![(made.id, vector(1))];
                assert_eq!(
                    store.prompt(alice, made.id).await.unwrap().as_ref(),
                    Some(&made)
                );
                assert_eq!(
                    store.put_embeddings(&model("a"), rows).await.unwrap(),
                    [made.id]
                );
                store.delete_prompt(alice, made.id).await.unwrap();
                assert_eq!(store.prompt(alice, made.id).await.unwrap(), None);
            }
        });
    }
    tasks.join_all().await;
    let covered = store.coverage(&model("a"), None).await.unwrap();
    assert_eq!((covered.embedded, covered.completed), (0, 0));
}
