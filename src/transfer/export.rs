//! Writing the store's rows as JSON lines.

use std::future::ready;
use std::io::Write;

use futures_util::TryStreamExt;

use super::json_lines::Writer;
use super::pipe::{as_rows, pages, pipe};
use super::{Error, Meter, RowCounts};
use crate::domain::{LastIds, RecordCursor};
use crate::store::BulkStore;

/// Writes every account and prompt with an id up to `last`, by rising id. Returns how many.
///
/// Beside a server, each page is of one moment, but not all pages are of the same moment. A row
/// that is there from beginning to end is written once. A row that is deleted meanwhile may be
/// written; a row that is made after `last` was read is not. Every prompt's owner is written.
///
/// # Errors
/// Those of the store and of the file.
pub async fn export<W: Write>(
    store: &dyn BulkStore,
    last: LastIds,
    out: &mut Writer<W>,
    meter: &Meter,
) -> Result<RowCounts, Error> {
    let users = ("exporting users", RecordCursor::Users(None));
    let prompts = ("exporting prompts", RecordCursor::Prompts(None));
    let mut counts = RowCounts::default();
    for (phase, start) in [users, prompts] {
        let last = last.of(&start);
        meter.begin(phase, last.map(as_rows));
        let pages = pages(store, start)
            .map_ok(|mut page| {
                page.retain(|record| record.id() <= last);
                page
            })
            .try_take_while(|page| ready(Ok(!page.is_empty())));
        counts += pipe(pages, async |page| {
            for record in &page {
                out.row(record)?;
                meter.reached(record.id().map_or(0, as_rows));
            }
            Ok(())
        })
        .await?;
    }
    Ok(counts)
}
