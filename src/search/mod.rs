//! Similarity: the stored prompts nearest in meaning to a text, by exact cosine over their vectors.
//!
//! [`Similarity`] is the seam. [`SlabIndex`] serves it from memory, beside SQLite: rows in slabs ([`slab`]), scanned whole
//! ([`scan`]) by kernels for the machine at hand ([`kernel`]), loaded when first needed and dropped by a byte budget
//! (`index`, `loading`, `cell`, `residents`). There is no index to build, save or repair: the store's rows are the only truth.
//!
//! A prompt takes 824 bytes at 384 dimensions: 768 of f16 vector, 48 of sign code, 8 of id.

mod cell;
mod index;
pub mod kernel;
mod loading;
mod residents;
pub mod scan;
pub mod slab;
#[cfg(test)]
mod tests;

use async_trait::async_trait;

use crate::domain::{Embedding, PromptId, UserId};

pub use index::{SlabIndex, SlabOptions};

/// A failure of the other side of a seam, of whatever type.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Whose prompts a search may find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// One user's.
    Own(UserId),
    /// Everybody's.
    Shared,
}

/// Which of the two scopes an index serves: the operator's choice, for all searches alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScopeMode {
    /// Each user's own prompts, loaded when the user first searches.
    Own,
    /// Everybody's, loaded at start and kept.
    Shared,
}

/// A stored prompt and how near it is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hit {
    /// The prompt.
    pub id: PromptId,
    /// Cosine similarity in [-1, 1].
    pub score: f32,
}

/// What an index holds, for metrics and readiness.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Whether searches are answered: in shared scope only once every row is loaded.
    pub ready: bool,
    /// Rows in memory.
    pub rows: u64,
    /// Bytes they take, spare room and bookkeeping included.
    pub bytes: u64,
    /// Slabs in memory: one a user in own scope, one in all in shared scope.
    pub slabs: u64,
    /// Slabs loaded since the start.
    pub loads: u64,
    /// Slabs dropped to keep the budget since the start.
    pub evictions: u64,
}

/// Why a search has no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The rows are still being loaded; the same call works later.
    #[error("the vectors are still being loaded")]
    Loading,
    /// The rows could not be read; the next call tries again.
    #[error("the vectors could not be read")]
    Source(#[source] BoxError),
    /// A defect behind the seam.
    #[error("the search failed")]
    Failed(#[source] BoxError),
    /// The query is not a vector of the index's model.
    #[error("the query has {actual} dimensions instead of {expected}")]
    Dimension {
        /// Of the index.
        expected: usize,
        /// Of the query.
        actual: usize,
    },
    /// The index was set up for the other scope.
    #[error("this scope is not served")]
    ScopeNotServed,
    /// The scan was broken off, by a defect or because the process stops.
    #[error("the scan was broken off")]
    Interrupted(#[source] tokio::task::JoinError),
}

/// Finds near prompts. Reads its own writes: once [`inserted`](Self::inserted) has returned the next search finds the row,
/// once [`deleted`](Self::deleted) has it finds it no more.
#[async_trait]
pub trait Similarity: Send + Sync {
    /// The `k` rows of the scope nearest to `query`, nearest first, equal scores by rising id; all rows if there are fewer.
    /// `query`: `[dimension]` numbers of unit length. May be dropped at any point.
    async fn nearest(&self, scope: Scope, query: &Embedding, k: usize) -> Result<Vec<Hit>, Error>;

    /// Takes in a row, once, after its commit. A row whose deletion was reported before is not taken in.
    fn inserted(&self, user: UserId, id: PromptId, embedding: &Embedding);

    /// Drops a row, after the deletion's commit. Only for rows that had a vector of the model in use.
    fn deleted(&self, user: UserId, id: PromptId);

    /// A write of a row of the user's was answered with an outage, and may have been committed all the same: whether a row came, or
    /// one went, is read from the store before the index answers for this user again. (In shared scope only rows that came are read,
    /// soon after; one that went costs searches a second look, and is never shown.) Call it when
    /// the write's fate is decided, from a runtime's thread. Quick; more often than needed costs a load, no more.
    fn doubted(&self, user: UserId);

    /// What it holds just now.
    fn status(&self) -> Status;
}

/// Consecutive stored vectors.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// Owner and prompt of each row, rising.
    pub ids: Vec<(UserId, PromptId)>,
    /// `[ids.len()][dimension]` f16, little-endian.
    pub f16_bytes: Vec<u8>,
}

/// Where an index reads the rows it does not hold.
#[async_trait]
pub trait VectorSource: Send + Sync {
    /// Up to `limit` vectors of the model in use after `after`, of one owner or of all, by rising `(user, prompt)`.
    /// Fewer than `limit` means the end was reached. Sees every commit made before the call.
    async fn page(
        &self,
        owner: Option<UserId>,
        after: Option<(UserId, PromptId)>,
        limit: usize,
    ) -> Result<Page, BoxError>;
}
