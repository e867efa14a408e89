//! Slabs, scans and the index against a naive model.
//!
//! The vectors' numbers are small multiples of 1/64: every sum of their products is exact in f32, in any order, so scores can
//! be compared bit by bit, and equal scores are frequent.

mod index;
mod interleavings;
mod races;
mod slab;

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::kernel::Kernel;
use super::{BoxError, Hit, Page, ScopeMode, SlabIndex, SlabOptions, VectorSource};
use crate::domain::{Embedding, PromptId, UserId};

const DIMENSION: usize = 70;

/// A vector that depends on `seed` alone; many seeds give vectors that score alike.
fn vector(dimension: usize, seed: u64) -> Embedding {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let numbers = (0..dimension).map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        f32::from((state >> 40) as u8 % 9) / 64.0 - 4.0 / 64.0
    });
    Embedding(numbers.collect())
}

/// The `k` best rows of a list, by definition.
fn naive_nearest<'a>(
    rows: impl IntoIterator<Item = (PromptId, &'a Embedding)>,
    query: &Embedding,
    k: usize,
) -> Vec<Hit> {
    let score =
        |row: &Embedding| query.0.iter().zip(&*row.0).map(|(q, r)| q * r).sum::<f32>() + 0.0;
    let mut hits: Vec<Hit> = rows
        .into_iter()
        .map(|(id, row)| Hit {
            id,
            score: score(row),
        })
        .collect();
    hits.sort_by(|a, b| match b.score.total_cmp(&a.score) {
        Ordering::Equal => a.id.cmp(&b.id),
        unequal @ (Ordering::Less | Ordering::Greater) => unequal,
    });
    hits.truncate(k);
    hits
}

/// A store of vectors in memory whose reads can be held up and made to fail.
struct Store {
    rows: Mutex<BTreeMap<(UserId, PromptId), Embedding>>,
    /// A permit for every page that may be read.
    gate: Semaphore,
    fail: AtomicBool,
    pages_begun: AtomicUsize,
}

impl Store {
    /// Whose reads are never held up.
    fn open() -> Arc<Self> {
        Self::with_gate(Semaphore::MAX_PERMITS)
    }

    /// Whose reads wait until `gate` lets them pass.
    fn held_up() -> Arc<Self> {
        Self::with_gate(0)
    }

    fn with_gate(permits: usize) -> Arc<Self> {
        Arc::new(Self {
            rows: Mutex::default(),
            gate: Semaphore::new(permits),
            fail: AtomicBool::new(false),
            pages_begun: AtomicUsize::new(0),
        })
    }

    fn insert(&self, user: UserId, id: PromptId, embedding: &Embedding) {
        self.rows
            .lock()
            .unwrap()
            .insert((user, id), embedding.clone());
    }

    fn delete(&self, user: UserId, id: PromptId) {
        self.rows.lock().unwrap().remove(&(user, id));
    }

    fn nearest(&self, owner: Option<UserId>, query: &Embedding, k: usize) -> Vec<Hit> {
        let rows = self.rows.lock().unwrap();
        let own = rows
            .iter()
            .filter(|((user, _), _)| owner.is_none_or(|owner| owner == *user));
        naive_nearest(own.map(|((_, id), row)| (*id, row)), query, k)
    }

    /// Waits until this many pages have been asked for in all.
    async fn wait_for_pages(&self, pages: usize) {
        let asked = async {
            while self.pages_begun.load(SeqCst) < pages {
                tokio::task::yield_now().await;
            }
        };
        let deadline = Duration::from_secs(30);
        tokio::time::timeout(deadline, asked)
            .await
            .expect("the pages are asked for");
    }
}

#[async_trait]
impl VectorSource for Store {
    async fn page(
        &self,
        owner: Option<UserId>,
        after: Option<(UserId, PromptId)>,
        limit: usize,
    ) -> Result<Page, BoxError> {
        // Read first, then held up: the page is as old as it can be when it arrives.
        let page = {
            let rows = self.rows.lock().unwrap();
            let wanted = rows.iter().filter(|(key, _)| {
                owner.is_none_or(|owner| owner == key.0) && after.is_none_or(|after| after < **key)
            });
            let (mut ids, mut f16_bytes) = (Vec::new(), Vec::new());
            for (key, row) in wanted.take(limit) {
                ids.push(*key);
                f16_bytes.extend(row.to_f16_bytes());
            }
            Page { ids, f16_bytes }
        };
        self.pages_begun.fetch_add(1, SeqCst);
        self.gate.acquire().await?.forget();
        if self.fail.load(SeqCst) {
            return Err("the store is gone".into());
        }
        Ok(page)
    }
}

fn index(mode: ScopeMode, memory_bytes: usize, store: &Arc<Store>) -> SlabIndex {
    patient_index(mode, memory_bytes, store, Duration::from_secs(30))
}

/// An index whose searches wait that long for rows that are being loaded.
fn patient_index(
    mode: ScopeMode,
    memory_bytes: usize,
    store: &Arc<Store>,
    load_wait: Duration,
) -> SlabIndex {
    let options = SlabOptions {
        dimension: DIMENSION,
        mode,
        memory_bytes,
        concurrent_scans: 2,
        load_wait,
        kernel: Kernel::detect(),
    };
    let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
    SlabIndex::new(
        options,
        Arc::clone(store) as Arc<dyn VectorSource>,
        tasks,
        stop,
    )
}
