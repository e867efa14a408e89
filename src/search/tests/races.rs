//! Loads, changes and leaving callers at the same time.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering::SeqCst};
use std::time::Duration;

use futures_util::FutureExt;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::task::TaskTracker;

use super::super::{Error, Similarity, SlabIndex};
use super::{DIMENSION, Store, index, patient_index, vector};
use crate::config::SimilarScope;
use crate::domain::{PromptId, UserId};

const USER: UserId = UserId(1);

fn ids(hits: &[super::Hit]) -> Vec<i64> {
    let mut ids: Vec<i64> = hits.iter().map(|hit| hit.id.0).collect();
    ids.sort_unstable();
    ids
}

/// Commits a row and reports it.
fn add(store: &Store, index: &SlabIndex, id: i64) {
    let row = vector(DIMENSION, id as u64);
    store.insert(USER, PromptId(id), &row);
    index.inserted(USER, PromptId(id), &row);
}

fn delete(store: &Store, index: &SlabIndex, id: i64) {
    store.delete(USER, PromptId(id));
    index.deleted(USER, PromptId(id));
}

async fn changes_during_a_load_are_kept(scope: SimilarScope) {
    let store = Store::held_up();
    let index = Arc::new(index(scope, usize::MAX, &store));
    for id in 1..=5 {
        add(&store, &index, id);
    }
    // Committed before the load and reported during it, so it is both read and reported.
    let late = vector(DIMENSION, 6);
    store.insert(USER, PromptId(6), &late);

    let mut tasks = JoinSet::new();
    let searching = Arc::clone(&index);
    tasks.spawn(async move {
        searching.load_all().await?;
        searching.nearest(USER, &vector(DIMENSION, 0), 100).await
    });
    store.wait_for_pages(1).await;
    add(&store, &index, 7);
    delete(&store, &index, 2);
    index.inserted(USER, PromptId(6), &late);
    add(&store, &index, 8);
    delete(&store, &index, 8);
    // A deletion reported before its row's insertion.
    index.deleted(USER, PromptId(9));
    index.inserted(USER, PromptId(9), &late);
    store.gate.add_permits(100);

    let hits = tasks.join_next().await.unwrap().unwrap().unwrap();
    assert_eq!(ids(&hits), [1, 3, 4, 5, 6, 7]);
    assert_eq!(index.status().loads, 1);
}

#[tokio::test]
async fn changes_during_a_load_of_ones_own_rows_are_kept() {
    changes_during_a_load_are_kept(SimilarScope::Own).await;
}

#[tokio::test]
async fn changes_during_the_load_of_all_rows_are_kept() {
    changes_during_a_load_are_kept(SimilarScope::Shared).await;
}

#[tokio::test]
async fn a_deletion_reported_before_its_insertion_cancels_it() {
    let store = Store::open();
    let index = index(SimilarScope::Own, usize::MAX, &store);
    let row = vector(DIMENSION, 1);
    // Reported while nothing is loaded, the insertion only after the load.
    index.deleted(USER, PromptId(1));
    assert_eq!(index.nearest(USER, &row, 9).await.unwrap(), []);
    index.inserted(USER, PromptId(1), &row);
    // Both after the load.
    index.deleted(USER, PromptId(2));
    index.inserted(USER, PromptId(2), &row);
    assert_eq!(index.nearest(USER, &row, 9).await.unwrap(), []);
}

#[tokio::test]
async fn a_row_read_by_a_load_and_reported_after_it_is_there_once() {
    let store = Store::open();
    let index = index(SimilarScope::Own, usize::MAX, &store);
    let row = vector(DIMENSION, 1);
    store.insert(USER, PromptId(1), &row);
    assert_eq!(index.nearest(USER, &row, 9).await.unwrap().len(), 1);
    index.inserted(USER, PromptId(1), &row);
    assert_eq!(index.nearest(USER, &row, 9).await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_slab_that_many_callers_need_is_loaded_once() {
    let store = Store::held_up();
    let index = Arc::new(index(SimilarScope::Own, usize::MAX, &store));
    add(&store, &index, 1);
    let mut tasks = JoinSet::new();
    for _ in 0..20 {
        let index = Arc::clone(&index);
        tasks.spawn(async move { index.nearest(USER, &vector(DIMENSION, 0), 5).await });
    }
    store.wait_for_pages(1).await;
    store.gate.add_permits(100);
    while let Some(hits) = tasks.join_next().await {
        assert_eq!(ids(&hits.unwrap().unwrap()), [1]);
    }
    assert_eq!(store.pages_begun.load(SeqCst), 1);
}

fn search(index: &Arc<SlabIndex>, user: UserId) -> JoinHandle<Vec<i64>> {
    let index = Arc::clone(index);
    TaskTracker::new().spawn(async move {
        let query = vector(DIMENSION, 0);
        let found = index.nearest(user, &query, 10_000).await;
        ids(&found.unwrap())
    })
}

#[tokio::test]
async fn a_load_goes_on_when_its_caller_has_left_and_is_not_begun_again() {
    let store = Store::held_up();
    let index = Arc::new(index(SimilarScope::Own, usize::MAX, &store));
    for id in 1..=3000 {
        add(&store, &index, id);
    }
    // A caller that leaves whenever it has to wait.
    for page in 1..=2 {
        let leaving = search(&index, USER);
        store.wait_for_pages(page).await;
        leaving.abort();
        assert!(leaving.await.unwrap_err().is_cancelled());
        store.gate.add_permits(1);
    }
    add(&store, &index, 3001);
    assert_eq!(search(&index, USER).await.unwrap().len(), 3001);
    assert_eq!(store.pages_begun.load(SeqCst), 2, "no page was read twice");
}

#[tokio::test]
async fn two_slabs_are_read_at_once_and_their_rows_count_as_memory() {
    let store = Store::held_up();
    let index = Arc::new(index(SimilarScope::Own, 100_000, &store));
    // Each has one whole page, and then a few rows.
    for user in 1..=4 {
        for id in 1..=2050 {
            let id = PromptId(10_000 * user + id);
            store.insert(UserId(user), id, &vector(DIMENSION, 1));
        }
    }
    let searches: Vec<_> = (1..=4).map(|user| search(&index, UserId(user))).collect();
    store.wait_for_pages(2).await;
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert_eq!(store.pages_begun.load(SeqCst), 2, "the others wait");
    store.gate.add_permits(2);
    store.wait_for_pages(4).await;
    // Over the budget, but nothing can be evicted.
    assert!(index.status().bytes > 2 * 2048 * 200);
    store.gate.add_permits(100);
    for search in searches {
        assert_eq!(search.await.unwrap().len(), 2050);
    }
    assert_eq!(index.status().slabs, 1);
}

#[tokio::test]
async fn a_row_that_was_committed_without_a_report_is_found_after_an_invalidation() {
    for scope in [SimilarScope::Own, SimilarScope::Shared] {
        let store = Store::open();
        let index = index(scope, usize::MAX, &store);
        add(&store, &index, 1);
        index.load_all().await.unwrap();
        let query = vector(DIMENSION, 0);
        let found = async || ids(&index.nearest(USER, &query, 9).await.unwrap());
        assert_eq!(found().await, [1]);
        store.insert(USER, PromptId(2), &query);
        assert_eq!(found().await, [1], "nobody has reported it");
        index.invalidate(USER);
        // In shared scope the row comes soon after. It may be found before it is counted.
        while found().await != [1, 2] || index.status().rows != 2 {
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test]
async fn a_load_that_is_invalidated_begins_again() {
    let store = Store::held_up();
    let index = Arc::new(index(SimilarScope::Own, usize::MAX, &store));
    add(&store, &index, 1);
    let searching = search(&index, USER);
    store.wait_for_pages(1).await;
    // Committed after its page was read.
    store.insert(USER, PromptId(2), &vector(DIMENSION, 2));
    index.invalidate(USER);
    store.gate.add_permits(100);
    assert_eq!(searching.await.unwrap(), [1, 2]);
}

#[tokio::test]
async fn a_failed_load_is_an_error_and_the_next_call_tries_again() {
    for scope in [SimilarScope::Own, SimilarScope::Shared] {
        let store = Store::open();
        let index = index(scope, usize::MAX, &store);
        add(&store, &index, 1);
        store.fail.store(true, SeqCst);
        let query = vector(DIMENSION, 0);
        let failed = match scope {
            SimilarScope::Own => index.nearest(USER, &query, 5).await.unwrap_err(),
            SimilarScope::Shared => index.load_all().await.unwrap_err(),
        };
        assert!(matches!(failed, Error::Source(_)), "{failed:?}");
        add(&store, &index, 2);
        store.fail.store(false, SeqCst);
        index.load_all().await.unwrap();
        let hits = index.nearest(USER, &query, 5).await.unwrap();
        assert_eq!(ids(&hits), [1, 2]);
    }
}

#[tokio::test]
async fn shared_searches_are_refused_until_every_row_is_loaded() {
    let store = Store::held_up();
    let index = Arc::new(patient_index(
        SimilarScope::Shared,
        0,
        &store,
        Duration::ZERO,
    ));
    for id in 1..=3000 {
        add(&store, &index, id);
    }
    let query = vector(DIMENSION, 0);
    let search = || index.nearest(USER, &query, 5000);
    assert!(matches!(search().await, Err(Error::Loading)));
    let mut tasks = JoinSet::new();
    let loading = Arc::clone(&index);
    tasks.spawn(async move { loading.load_all().await });
    store.wait_for_pages(1).await;
    store.gate.add_permits(1);
    store.wait_for_pages(2).await;
    assert!(matches!(search().await, Err(Error::Loading)));
    assert!(!index.status().ready);
    store.gate.add_permits(1);
    tasks.join_all().await.pop().unwrap().unwrap();
    assert_eq!(search().await.unwrap().len(), 3000);
    assert!(index.status().ready);
}

#[tokio::test]
async fn a_shared_search_that_may_wait_succeeds_when_every_row_is_loaded() {
    let store = Store::held_up();
    let index = Arc::new(index(SimilarScope::Shared, 0, &store));
    add(&store, &index, 1);
    let query = vector(DIMENSION, 0);
    let mut tasks = JoinSet::new();
    let loading = Arc::clone(&index);
    tasks.spawn(async move { loading.load_all().await });
    store.wait_for_pages(1).await;
    let waiting = index.nearest(USER, &query, 5);
    let mut waiting = std::pin::pin!(waiting);
    assert!(
        waiting.as_mut().now_or_never().is_none(),
        "nothing is loaded yet"
    );
    store.gate.add_permits(1);
    assert_eq!(waiting.await.unwrap().len(), 1);
}

/// Users insert, delete and search on several threads, with room in memory for hardly any of them.
/// Each must find exactly its rows, including its latest change, even while another user searches
/// for it too.
#[test]
fn every_user_reads_its_own_writes_while_threads_race() {
    const USERS: i64 = 6;
    const STEPS: u64 = 150;
    let store = Store::open();
    let index = Arc::new(index(SimilarScope::Own, 30_000, &store));
    let next_id = AtomicI64::new(1);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    std::thread::scope(|threads| {
        for user in 1..=USERS {
            let (store, index, next_id, runtime) = (&store, &index, &next_id, &runtime);
            threads.spawn(move || {
                let user = UserId(user);
                let mut mine: Vec<PromptId> = Vec::new();
                for step in 0..STEPS {
                    let row = vector(DIMENSION, step % 17 + user.0 as u64);
                    if step % 3 == 2 && !mine.is_empty() {
                        let id = mine.swap_remove(step as usize % mine.len());
                        store.delete(user, id);
                        index.deleted(user, id);
                    } else {
                        let id = PromptId(next_id.fetch_add(1, SeqCst));
                        store.insert(user, id, &row);
                        index.inserted(user, id, &row);
                        mine.push(id);
                    }
                    let hits = runtime.block_on(index.nearest(user, &row, 1000));
                    assert_eq!(hits.unwrap(), store.nearest(Some(user), &row, 1000));
                    // Another user's slab, which is loaded, evicted and changed at the same time.
                    // Only its owner knows its rows, but this user's must not be among them.
                    let other = UserId(user.0 % USERS + 1);
                    let hits = runtime.block_on(index.nearest(other, &row, 1000));
                    for hit in hits.unwrap() {
                        assert!(!mine.contains(&hit.id));
                    }
                }
            });
        }
    });
    assert!(index.status().evictions > 0);
}

#[tokio::test]
async fn searches_go_on_while_rows_are_added() {
    let store = Store::open();
    let index = Arc::new(index(SimilarScope::Shared, 0, &store));
    index.load_all().await.unwrap();
    let mut tasks = JoinSet::new();
    let adding = (Arc::clone(&index), Arc::clone(&store));
    tasks.spawn_blocking(move || {
        for id in 1..=3000 {
            add(&adding.1, &adding.0, id);
        }
    });
    let searching = async {
        let mut found = 0;
        while found < 3000 {
            let hits = index
                .nearest(USER, &vector(DIMENSION, 0), 5000)
                .await
                .unwrap();
            // No row that was found before is missing.
            assert!(hits.len() >= found);
            found = hits.len();
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), searching)
        .await
        .unwrap();
    tasks.join_next().await.unwrap().unwrap();
}
