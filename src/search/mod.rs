//! Similarity: the stored prompts nearest in meaning to a text, by cosine over their vectors.
//!
//! [`Similarity`] is the seam, with two implementations over the store's rows:
//! - [`SlabIndex`] serves from memory, beside SQLite: the engine's scan of rows in slabs
//!   (`crates/engine/src/scan`). Slabs are loaded when they are
//!   first needed and evicted by a byte budget (`index`, `loading`, `slot`, `slab_cache`). There is
//!   no index to build, save or repair. A prompt takes 824 bytes at 384 dimensions: 768 of f16
//!   vector, 48 of sign code, 8 of id.
//! - [`PostgresSimilarity`] asks the database.

mod index;
mod loading;
mod postgres;
mod slab_cache;
mod slot;
#[cfg(test)]
mod tests;

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use crate::domain::{Embedding, PromptId, UserId};

pub use index::{SlabIndex, SlabOptions};
pub use postgres::PostgresSimilarity;

/// A failure of any type.
type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A stored prompt and its similarity.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hit {
    /// The prompt.
    pub id: PromptId,
    /// Cosine similarity in [-1, 1].
    pub score: f32,
}

/// What an index holds, for metrics and readiness.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IndexStatus {
    /// Whether searches are served: in shared scope only once every row is loaded.
    pub ready: bool,
    /// Rows in memory.
    pub rows: u64,
    /// Bytes of the rows, including spare room and bookkeeping.
    pub bytes: u64,
    /// Slabs in memory: one per user in own scope, one for everybody in shared scope.
    pub slabs: u64,
    /// Slabs loaded since the start.
    pub loads: u64,
    /// Slabs evicted since the start to keep the budget.
    pub evictions: u64,
}

/// Why a search failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The rows are still being loaded. A retry may succeed.
    #[error("the vectors are still being loaded")]
    Loading,
    /// The rows could not be read. The next call tries again.
    #[error("the vectors could not be read")]
    Source(#[source] BoxError),
    /// A defect of the store.
    #[error("the search failed")]
    Failed(#[source] BoxError),
    /// The query is not a vector of the model in use.
    #[error("the query has {actual} dimensions instead of {expected}")]
    Dimension {
        /// Numbers in the model's vectors.
        expected: usize,
        /// Numbers in the query.
        actual: usize,
    },
    /// The scan did not end, because of a defect or because the process stops.
    #[error("the scan was broken off")]
    Interrupted(#[source] tokio::task::JoinError),
}

/// Finds near prompts. Whose prompts a search finds is the operator's choice, for all searches
/// alike: [`SimilarScope`](crate::config::SimilarScope).
///
/// It reads its own writes: once [`inserted`](Self::inserted) has returned, the next search finds
/// the row; once [`deleted`](Self::deleted) has returned, no search finds it.
#[async_trait]
pub trait Similarity: Send + Sync {
    /// The `k` rows nearest to `query`, among those that a search of `caller` may find: nearest
    /// first, equal scores by rising id; all rows if there are fewer. `query`: `[dimension]`
    /// numbers of unit length. Cancel safe.
    async fn nearest(&self, caller: UserId, query: &Embedding, k: usize)
    -> Result<Vec<Hit>, Error>;

    /// Inserts a row, once, after its commit. A row whose deletion was reported before is not
    /// inserted.
    fn inserted(&self, user: UserId, id: PromptId, embedding: &Embedding);

    /// Removes a row, after the commit of its deletion. Only for rows that had a vector of the
    /// model in use.
    fn deleted(&self, user: UserId, id: PromptId);

    /// Makes the index read the user's rows again before it serves this user again. For a write of
    /// such a row that failed with an outage and may have been committed nevertheless: the row may
    /// have come or gone. In shared scope only new rows are read, soon after the call. A deleted
    /// row then costs searches a second read of the store and is never shown.
    ///
    /// Call it when the write is over, from a thread of the runtime. It returns quickly. Calling it
    /// too often costs a load and nothing else.
    fn invalidate(&self, user: UserId);

    /// What it holds now.
    fn status(&self) -> IndexStatus;

    /// Makes searches available and fast, where that takes longer than a start may: until it is
    /// done or `stop` is cancelled. Retries while the store is unavailable.
    async fn prepare(&self, stop: CancellationToken);
}

/// # Errors
/// `Dimension` if the vector has not `expected` numbers.
fn check_dimension(expected: usize, embedding: &Embedding) -> Result<(), Error> {
    let actual = embedding.0.len();
    if actual == expected {
        Ok(())
    } else {
        Err(Error::Dimension { expected, actual })
    }
}
