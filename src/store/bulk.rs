//! Whole rows with their ids, in bulk: how data leave a store and enter another.

use async_trait::async_trait;

use super::Error;
use crate::domain::{LastIds, Record, RecordCursor};

/// Everything a store keeps, read and written by key. For operators' commands, not for requests:
/// pages may be large, and a call takes as long as its rows take.
///
/// Putting is repeatable: rows that are stored already are left as they are, so that work that was
/// interrupted can be started again. Ids given out later are above all that were put.
#[async_trait]
pub trait BulkStore: Send + Sync {
    /// The highest ids given out so far, those of deleted rows included.
    async fn last_ids(&self) -> Result<LastIds, Error>;

    /// Gives out no ids up to these any more. Ids below the store's own change nothing.
    async fn raise_ids(&self, last: LastIds) -> Result<(), Error>;

    /// Up to `limit` rows after the cursor, in the cursor's order, whole: a prompt with its vector,
    /// of whatever model; a session or a token whether it has expired or not.
    async fn records(&self, after: RecordCursor, limit: usize) -> Result<Vec<Record>, Error>;

    /// Stores rows as they are, in one transaction.
    ///
    /// A row whose id or key is stored already is not stored, nor is an account whose name another
    /// one has. Two kinds keep the greater value instead: the later expiry of a revoked token, the
    /// higher count of a day. A vector is stored with its prompt, and only if that is completed.
    ///
    /// `Internal` if an owner is missing, or a vector's length is not that of its model's others;
    /// nothing is stored then.
    async fn put(&self, records: Vec<Record>) -> Result<(), Error>;
}
