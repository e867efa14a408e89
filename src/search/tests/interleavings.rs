//! Loads at every stage, with all changes and failures that can happen meanwhile.

use std::collections::BTreeSet;
use std::sync::Arc;

use proptest::prelude::*;
use tokio::task::JoinHandle;
use tokio_util::task::TaskTracker;

use super::super::{Error, Hit, Similarity, SlabIndex};
use super::{DIMENSION, Store, index, vector};
use crate::config::SimilarScope;
use crate::domain::{Embedding, PromptId, UserId};

const USER: UserId = UserId(1);

/// More than one page.
const ROWS: i64 = 2100;

#[derive(Clone, Debug)]
enum Step {
    Insert,
    /// Committed, but the write fails with an outage, so it is not reported.
    CommitUnknown,
    /// Committed; reported by a later `Report`.
    Commit,
    Report,
    /// Deletes the row at this share of the store.
    Delete(f64),
    Search,
    /// The caller of the oldest search leaves.
    Leave,
    /// Permits the reading of so many pages.
    Pages(usize),
    /// Reads fail from now on, or succeed again.
    Fail(bool),
    /// Another user's slab evicts this one, if it is not being loaded.
    Evict,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::Insert),
        1 => Just(Step::CommitUnknown),
        2 => Just(Step::Commit),
        2 => Just(Step::Report),
        3 => (0.0..1.0).prop_map(Step::Delete),
        5 => Just(Step::Search),
        2 => Just(Step::Leave),
        5 => (1_usize..3).prop_map(Step::Pages),
        1 => any::<bool>().prop_map(Step::Fail),
        1 => Just(Step::Evict),
    ]
}

/// A running search, with the rows that it must and must not find.
struct Searching {
    task: JoinHandle<Result<Vec<Hit>, Error>>,
    /// Reported before it began, and not deleted since.
    required: BTreeSet<PromptId>,
    /// Deleted before it began.
    forbidden: BTreeSet<PromptId>,
}

impl Searching {
    async fn check(self) {
        match self.task.await.unwrap() {
            Ok(hits) => {
                let found: BTreeSet<PromptId> = hits.iter().map(|hit| hit.id).collect();
                assert_eq!(found.len(), hits.len(), "a row was found twice");
                assert!(found.is_superset(&self.required), "a row is missing");
                assert!(found.is_disjoint(&self.forbidden), "a deleted row is there");
            }
            Err(error) => assert!(matches!(error, Error::Source(_)), "{error:?}"),
        }
    }
}

struct World {
    store: Arc<Store>,
    index: Arc<SlabIndex>,
    next_id: i64,
    unreported: Vec<(PromptId, Embedding)>,
    known: BTreeSet<PromptId>,
    deleted: BTreeSet<PromptId>,
    searches: Vec<Searching>,
}

impl World {
    fn commit(&mut self) -> (PromptId, Embedding) {
        self.next_id += 1;
        let row = vector(DIMENSION, self.next_id as u64 % 31);
        self.store.insert(USER, PromptId(self.next_id), &row);
        (PromptId(self.next_id), row)
    }

    fn report(&mut self, id: PromptId, row: &Embedding) {
        self.index.inserted(USER, id, row);
        if !self.deleted.contains(&id) {
            self.known.insert(id);
        }
    }

    fn search(&mut self) {
        let index = Arc::clone(&self.index);
        let task = TaskTracker::new().spawn(async move {
            let query = vector(DIMENSION, 5);
            index.nearest(USER, &query, usize::MAX).await
        });
        self.searches.push(Searching {
            task,
            required: self.known.clone(),
            forbidden: self.deleted.clone(),
        });
    }

    async fn take(&mut self, step: Step) {
        match step {
            Step::Insert => {
                let (id, row) = self.commit();
                self.report(id, &row);
            }
            Step::CommitUnknown => {
                let (id, _) = self.commit();
                self.index.invalidate(USER);
                self.known.insert(id);
            }
            Step::Commit => {
                let committed = self.commit();
                self.unreported.push(committed);
            }
            Step::Report => {
                for (id, row) in std::mem::take(&mut self.unreported) {
                    self.report(id, &row);
                }
            }
            Step::Delete(share) => {
                let id = {
                    let rows = self.store.rows.lock().unwrap();
                    let at = (rows.len() as f64 * share) as usize;
                    rows.keys().nth(at).map(|(_, id)| *id)
                };
                if let Some(id) = id {
                    self.store.delete(USER, id);
                    self.index.deleted(USER, id);
                    self.known.remove(&id);
                    self.deleted.insert(id);
                    for search in &mut self.searches {
                        search.required.remove(&id);
                    }
                }
            }
            Step::Search => self.search(),
            Step::Leave => {
                if !self.searches.is_empty() {
                    let leaving = self.searches.remove(0);
                    leaving.task.abort();
                    let _ = leaving.task.await;
                }
            }
            Step::Pages(pages) => self.store.gate.add_permits(pages),
            Step::Fail(fail) => self.store.fail.store(fail, super::SeqCst),
            Step::Evict => {
                let index = Arc::clone(&self.index);
                // Its load waits for its turn and the gate like any other. The test does not wait
                // for it.
                TaskTracker::new().spawn(async move {
                    let query = vector(DIMENSION, 5);
                    let _ = index.nearest(UserId(2), &query, 1).await;
                });
            }
        }
        for _ in 0..8 {
            tokio::task::yield_now().await;
        }
    }

    async fn end(mut self) {
        self.store.fail.store(false, super::SeqCst);
        self.store.gate.add_permits(10_000);
        for search in std::mem::take(&mut self.searches) {
            search.check().await;
        }
        self.take(Step::Report).await;
        let query = vector(DIMENSION, 5);
        let hits = self.index.nearest(USER, &query, 50).await;
        assert_eq!(hits.unwrap(), self.store.nearest(Some(USER), &query, 50));
        let all = self.index.nearest(USER, &query, usize::MAX);
        assert_eq!(
            all.await.unwrap().len(),
            self.store.rows.lock().unwrap().len()
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn searches_find_the_right_rows_however_loads_and_changes_interleave(
        steps in prop::collection::vec(step(), 1..60),
        memory_bytes in prop_oneof![Just(0_usize), Just(usize::MAX)],
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.unwrap().block_on(async {
            let store = Store::held_up();
            let mut world = World {
                index: Arc::new(index(SimilarScope::Own, memory_bytes, &store)),
                store,
                next_id: 0,
                unreported: Vec::new(),
                known: BTreeSet::new(),
                deleted: BTreeSet::new(),
                searches: Vec::new(),
            };
            for _ in 0..ROWS {
                let (id, row) = world.commit();
                world.report(id, &row);
            }
            for step in steps {
                world.take(step).await;
            }
            world.end().await;
        });
    }
}
