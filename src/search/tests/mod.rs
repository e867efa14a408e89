//! Slabs, scans and the index compared with a naive model.
//!
//! The vectors' numbers are small multiples of 1/64: every sum of their products is exact in f32,
//! in any order, so scores can be compared bit by bit, and equal scores are frequent.

mod index;
mod interleavings;
mod races;
mod store;

use std::cmp::Ordering;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Hit, SlabIndex, SlabOptions};
use crate::config::SimilarScope;
use crate::domain::{Embedding, ModelId, PromptId};
use prompt_service_engine::scan::kernel::Kernel;
use store::Store;

const DIMENSION: usize = 70;

/// A vector that depends only on `seed`. Many seeds give vectors with equal scores.
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

fn index(scope: SimilarScope, memory_bytes: usize, store: &Arc<Store>) -> SlabIndex {
    patient_index(scope, memory_bytes, store, Duration::from_secs(30))
}

/// An index whose searches wait for `load_wait` while rows are being loaded.
fn patient_index(
    scope: SimilarScope,
    memory_bytes: usize,
    store: &Arc<Store>,
    load_wait: Duration,
) -> SlabIndex {
    let options = SlabOptions {
        dimension: DIMENSION,
        scope,
        memory_bytes,
        concurrent_scans: 2,
        load_wait,
        kernel: Kernel::detect(),
    };
    let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
    let model = ModelId(Arc::from("a model"));
    SlabIndex::new(options, Arc::clone(store) as _, model, tasks, stop)
}
