//! The pipe that every move goes through: pages of rows, read in order and taken in order.

use std::pin::pin;

use futures_util::stream::{self, Stream, StreamExt, TryStreamExt};

use super::{Error, RowCounts};
use crate::domain::{Record, RecordCursor};
use crate::store::BulkStore;

/// Rows read from a store at once, and written in one transaction: with long answers some MiB.
const PAGE: usize = 200;

/// Gives every page to `sink`, one after another. Returns how many rows the pages had.
pub(super) async fn pipe(
    pages: impl Stream<Item = Result<Vec<Record>, Error>>,
    mut sink: impl AsyncFnMut(Vec<Record>) -> Result<(), Error>,
) -> Result<RowCounts, Error> {
    let mut counts = RowCounts::default();
    let mut pages = pin!(pages);
    while let Some(page) = pages.try_next().await? {
        counts += RowCounts::of(&page);
        sink(page).await?;
    }
    Ok(counts)
}

/// The rows of a store after a cursor, up to the last of their kind.
pub(super) fn pages(
    store: &dyn BulkStore,
    after: RecordCursor,
) -> impl Stream<Item = Result<Vec<Record>, Error>> {
    stream::try_unfold(after, move |after| async move {
        let page = store.records(after, PAGE).await?;
        let next = page.last().map(Record::cursor);
        Ok(next.map(|next| (page, next)))
    })
}

/// The same rows one by one.
pub(super) fn rows(
    pages: impl Stream<Item = Result<Vec<Record>, Error>>,
) -> impl Stream<Item = Result<Record, Error>> {
    pages
        .map_ok(|page| stream::iter(page).map(Ok))
        .try_flatten()
}

/// An id as a number of rows. Ids are given out one by one and few rows are ever deleted, so the
/// highest id is about how many rows there are.
pub(super) fn as_rows(id: i64) -> u64 {
    u64::try_from(id).unwrap_or(0)
}
