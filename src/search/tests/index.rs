//! The index compared with its store, one step at a time.

use std::sync::atomic::Ordering::SeqCst;

use proptest::prelude::*;

use super::super::{Error, Similarity};
use super::{DIMENSION, Store, index, vector};
use crate::config::SimilarScope;
use crate::domain::{Embedding, PromptId, UserId};
use crate::store::VectorPage;

#[derive(Clone, Debug)]
enum Operation {
    Insert {
        user: i64,
    },
    /// The row is committed, and reported only by `Report`.
    CommitOnly {
        user: i64,
    },
    Report,
    /// Deletes the row at this share of the store.
    Delete(f64),
    Query {
        user: i64,
        k: usize,
    },
    /// A query while the store is unavailable: an error if the slab is not in memory, otherwise the
    /// right rows.
    QueryWithoutStore {
        user: i64,
    },
}

fn operation() -> impl Strategy<Value = Operation> {
    let user = 1_i64..5;
    prop_oneof![
        6 => user.clone().prop_map(|user| Operation::Insert { user }),
        2 => user.clone().prop_map(|user| Operation::CommitOnly { user }),
        2 => Just(Operation::Report),
        3 => (0.0..1.0).prop_map(Operation::Delete),
        6 => (user.clone(), prop_oneof![Just(0_usize), Just(1), Just(100), Just(usize::MAX), any::<usize>(), 0_usize..12])
            .prop_map(|(user, k)| Operation::Query { user, k }),
        1 => user.prop_map(|user| Operation::QueryWithoutStore { user }),
    ]
}

async fn run(scope: SimilarScope, memory_bytes: usize, operations: Vec<Operation>) {
    let store = Store::open();
    let index = index(scope, memory_bytes, &store);
    index.load_all().await.unwrap();
    let mut unreported: Vec<(UserId, PromptId, Embedding)> = Vec::new();
    let report = |rows: &mut Vec<(UserId, PromptId, Embedding)>| {
        for (user, id, row) in rows.drain(..) {
            index.inserted(user, id, &row);
        }
    };
    for (step, operation) in operations.into_iter().enumerate() {
        let row = vector(DIMENSION, step as u64 % 13);
        let id = PromptId(step as i64 + 1);
        match operation {
            Operation::Insert { user } => {
                store.insert(UserId(user), id, &row);
                index.inserted(UserId(user), id, &row);
            }
            Operation::CommitOnly { user } => {
                store.insert(UserId(user), id, &row);
                unreported.push((UserId(user), id, row));
            }
            Operation::Report => report(&mut unreported),
            Operation::Delete(share) => {
                let victim = {
                    let rows = store.rows.lock().unwrap();
                    rows.keys()
                        .nth((rows.len() as f64 * share) as usize)
                        .copied()
                };
                if let Some((user, id)) = victim {
                    store.delete(user, id);
                    index.deleted(user, id);
                }
            }
            Operation::Query { user, k } => {
                report(&mut unreported);
                let user = UserId(user);
                let hits = index.nearest(user, &row, k).await.unwrap();
                assert_eq!(hits, store.nearest(scope.owner(user), &row, k));
            }
            Operation::QueryWithoutStore { user } => {
                report(&mut unreported);
                store.fail.store(true, SeqCst);
                let user = UserId(user);
                match index.nearest(user, &row, 9).await {
                    Ok(hits) => assert_eq!(hits, store.nearest(scope.owner(user), &row, 9)),
                    Err(error) => assert!(matches!(error, Error::Source(_)), "{error:?}"),
                }
                store.fail.store(false, SeqCst);
            }
        }
    }
}

fn block_on(future: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.unwrap().block_on(future);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn own_scope_equals_the_store_whatever_is_evicted(
        operations in prop::collection::vec(operation(), 1..120),
        // From "only one slab" to "all of them".
        memory_bytes in prop_oneof![Just(0_usize), 0_usize..40_000, Just(usize::MAX)],
    ) {
        block_on(run(SimilarScope::Own, memory_bytes, operations));
    }

    #[test]
    fn shared_scope_equals_the_store(operations in prop::collection::vec(operation(), 1..120)) {
        block_on(run(SimilarScope::Shared, 0, operations));
    }
}

#[tokio::test]
async fn the_least_recently_used_slab_is_evicted_and_counted() {
    let store = Store::open();
    let row = vector(DIMENSION, 1);
    for user in 1..=3 {
        for id in 1..=100 {
            store.insert(UserId(user), PromptId(1000 * user + id), &row);
        }
    }
    let one = {
        let index = index(SimilarScope::Own, usize::MAX, &store);
        index.nearest(UserId(1), &row, 1).await.unwrap();
        index.status().bytes as usize
    };
    let index = index(SimilarScope::Own, 2 * one, &store);
    for user in [1, 2, 1, 3] {
        index.nearest(UserId(user), &row, 1).await.unwrap();
    }
    let status = index.status();
    assert_eq!(
        (status.slabs, status.rows, status.evictions, status.loads),
        (2, 200, 1, 3)
    );
    assert!(status.bytes as usize <= 2 * one);
    // The first user was used after the second, so it is still there.
    let pages = store.pages_begun.load(SeqCst);
    index.nearest(UserId(1), &row, 1).await.unwrap();
    assert_eq!(store.pages_begun.load(SeqCst), pages);
    index.nearest(UserId(2), &row, 1).await.unwrap();
    assert_eq!(store.pages_begun.load(SeqCst), pages + 1);
}

#[tokio::test]
async fn growing_slabs_are_evicted_too() {
    let store = Store::open();
    let row = vector(DIMENSION, 1);
    let index = index(SimilarScope::Own, 100_000, &store);
    for user in 1..=3 {
        index.nearest(UserId(user), &row, 1).await.unwrap();
    }
    for id in 1..=1000 {
        store.insert(UserId(1), PromptId(id), &row);
        index.inserted(UserId(1), PromptId(id), &row);
    }
    assert!(index.status().bytes <= 100_000);
    assert_eq!(
        index.nearest(UserId(1), &row, 2000).await.unwrap().len(),
        1000
    );
}

#[tokio::test]
async fn a_slab_too_long_for_one_page_is_read_whole() {
    let store = Store::open();
    for id in 1..=4096 + 5 {
        store.insert(UserId(1), PromptId(id), &vector(DIMENSION, id as u64));
        store.insert(
            UserId(2),
            PromptId(id + 10_000),
            &vector(DIMENSION, id as u64),
        );
    }
    let index = index(SimilarScope::Own, usize::MAX, &store);
    let query = vector(DIMENSION, 3);
    let hits = index.nearest(UserId(1), &query, 10_000).await.unwrap();
    assert_eq!(hits, store.nearest(Some(UserId(1)), &query, 10_000));
}

#[tokio::test]
async fn a_scan_on_another_thread_finds_the_same_rows() {
    let store = Store::open();
    // 192 bytes a row: enough rows to pass the limit of what is scanned in place.
    for id in 1..=50_000 {
        store.insert(
            UserId(1),
            PromptId(id),
            &vector(DIMENSION, id as u64 % 5000),
        );
    }
    let index = index(SimilarScope::Own, usize::MAX, &store);
    let query = vector(DIMENSION, 3);
    let k = 300;
    let hits = index.nearest(UserId(1), &query, k).await.unwrap();
    assert_eq!(hits, store.nearest(Some(UserId(1)), &query, k));
}

#[tokio::test]
async fn a_vector_of_another_dimension_is_refused() {
    let store = Store::open();
    let index = index(SimilarScope::Own, usize::MAX, &store);
    let short = vector(DIMENSION - 1, 1);
    let error = index.nearest(UserId(1), &short, 1).await.unwrap_err();
    assert!(
        matches!(
            error,
            Error::Dimension {
                expected: DIMENSION,
                actual: 69
            }
        ),
        "{error:?}"
    );
    index
        .nearest(UserId(1), &vector(DIMENSION, 1), 1)
        .await
        .unwrap();
    index.inserted(UserId(1), PromptId(1), &short);
    assert_eq!(index.status().rows, 0);
}

#[tokio::test]
async fn rows_of_another_user_or_size_are_an_error() {
    let stored = vector(DIMENSION, 1).to_f16_bytes();
    let ids = |user: i64| vec![(UserId(user), PromptId(1))];
    for page in [
        VectorPage {
            ids: ids(2),
            f16_bytes: stored.clone(),
        },
        VectorPage {
            ids: ids(1),
            f16_bytes: stored[1..].to_vec(),
        },
    ] {
        let store = Store::open();
        *store.damage.lock().unwrap() = Some(page);
        let index = index(SimilarScope::Own, 0, &store);
        let query = vector(DIMENSION, 1);
        let error = index.nearest(UserId(1), &query, 1).await.unwrap_err();
        assert!(matches!(error, Error::Source(_)), "{error:?}");
    }
}
