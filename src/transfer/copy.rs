//! Making one store's contents another's, whole.
//!
//! Rows are copied by rising key, so an interrupted run leaves a beginning of the source in the
//! target. A new run reads the target through. It continues after the target's last row if the
//! target is such a beginning, and refuses the target otherwise. At the end both sides are read and
//! compared row by row.

use std::pin::pin;

use futures_util::stream::{Stream, TryStreamExt};

use super::pipe::{as_rows, pages, pipe, rows};
use super::{Error, Meter, RowCounts};
use crate::domain::{Record, RecordCursor, VectorRecord};
use crate::store::BulkStore;

/// A copy from one store to another, under way.
struct Copy<'a> {
    from: &'a dyn BulkStore,
    to: &'a dyn BulkStore,
    dimension: usize,
    meter: &'a Meter,
}

/// Copies everything from one store to the other and compares both. Nothing else may write to
/// either meanwhile. Returns how many accounts and prompts both have then.
///
/// `dimension`: numbers in a vector of the model in use. Vectors of other lengths, which a change
/// of model has left, are not copied: a PostgreSQL database has room for one length.
///
/// # Errors
/// `Foreign` if the target holds other rows; `Differs` if a row is not the same on both sides at
/// the end; those of the stores.
pub async fn copy(
    from: &dyn BulkStore,
    to: &dyn BulkStore,
    dimension: usize,
    meter: &Meter,
) -> Result<RowCounts, Error> {
    let copy = Copy {
        from,
        to,
        dimension,
        meter,
    };
    let last = from.last_ids().await?;
    let mut rest = Vec::new();
    // All of the target is read before any of it is changed.
    for start in RecordCursor::STARTS {
        rest.push(copy.end_of_target(start).await?);
    }
    for (after, present) in rest {
        let total = last.of(&after).map(as_rows);
        copy.fill(after, total.map(|total| total.saturating_sub(present)))
            .await?;
    }
    to.raise_ids(last).await?;
    let mut counts = RowCounts::default();
    for start in RecordCursor::STARTS {
        let total = last.of(&start).map(as_rows);
        counts += copy.compare(start, total).await?;
    }
    Ok(counts)
}

impl Copy<'_> {
    /// The rows of a side, as the target keeps them.
    fn pages(
        &self,
        side: &dyn BulkStore,
        after: RecordCursor,
    ) -> impl Stream<Item = Result<Vec<Record>, Error>> {
        pages(side, after).map_ok(|mut page| {
            for record in &mut page {
                if let Record::Prompt(record) = record {
                    // A lease stays with the source.
                    record.interrupt();
                    record.replace_nul();
                    let fits = |vector: &VectorRecord| vector.f16_bytes.len() == 2 * self.dimension;
                    record.vector = record.vector.take().filter(fits);
                }
            }
            page
        })
    }

    /// Where the target's rows of a kind end, and how many they are, if they are a beginning of the
    /// source's.
    async fn end_of_target(&self, start: RecordCursor) -> Result<(RecordCursor, u64), Error> {
        let phase = format!("looking at the target's {}", words(&start).1);
        self.meter.begin(phase, None);
        let mut source = pin!(rows(self.pages(self.from, start.clone())));
        let mut target = pin!(rows(self.pages(self.to, start.clone())));
        let (mut end, mut present) = (start, 0);
        while let Some(row) = target.try_next().await? {
            if source.try_next().await?.as_ref() != Some(&row) {
                return Err(Error::Foreign);
            }
            end = row.cursor();
            present += 1;
            self.meter.advance(1);
        }
        Ok((end, present))
    }

    /// Copies the rows after a cursor. A statement of an interrupted run may store some of them at
    /// the same time, and putting leaves those as they are.
    async fn fill(&self, after: RecordCursor, total: Option<u64>) -> Result<(), Error> {
        self.meter
            .begin(format!("copying {}", words(&after).1), total);
        pipe(self.pages(self.from, after), async |page| {
            let copied = page.len() as u64;
            self.to.put(page).await?;
            self.meter.advance(copied);
            Ok(())
        })
        .await
        .map(drop)
    }

    /// Returns how many rows both sides have.
    async fn compare(&self, start: RecordCursor, total: Option<u64>) -> Result<RowCounts, Error> {
        let (what, plural) = words(&start);
        self.meter.begin(format!("comparing {plural}"), total);
        let mut source = pin!(rows(self.pages(self.from, start.clone())));
        let mut target = pin!(rows(self.pages(self.to, start)));
        let mut counts = RowCounts::default();
        loop {
            let (ours, theirs) = (source.try_next().await?, target.try_next().await?);
            if ours != theirs {
                return Err(Error::Differs {
                    what,
                    key: ours.or(theirs).as_ref().map_or_else(String::new, key),
                });
            }
            let Some(row) = ours else {
                return Ok(counts);
            };
            counts += RowCounts::of([&row]);
            self.meter.advance(1);
        }
    }
}

/// The words for one row of a kind and for several.
fn words(kind: &RecordCursor) -> (&'static str, &'static str) {
    match kind {
        RecordCursor::Users(_) => ("user", "users"),
        RecordCursor::Prompts(_) => ("prompt", "prompts"),
        RecordCursor::Keys(_) => ("idempotency key", "idempotency keys"),
        RecordCursor::UpstreamDays(_) => ("day's count of calls", "counts of calls"),
        RecordCursor::Sessions(_) => ("session", "sessions"),
        RecordCursor::RevokedTokens(_) => ("revoked token", "revoked tokens"),
        RecordCursor::ApiKeys(_) => ("API key", "API keys"),
        RecordCursor::Usage(_) => ("row of usage", "rows of usage"),
        RecordCursor::UsageDays(_) => ("day's sum of usage", "sums of usage"),
        RecordCursor::UserBudgets(_) => ("user's budget", "users' budgets"),
    }
}

/// A row's key, where that is no secret.
fn key(row: &Record) -> String {
    match row {
        Record::User(user) => user.id.to_string(),
        Record::Prompt(record) => record.prompt.id.to_string(),
        Record::Key(key) => format!("of prompt {}", key.prompt_id),
        Record::UpstreamDay(day) => day.day.to_string(),
        Record::ApiKey(record) => record.key.id.to_string(),
        Record::Session(_) | Record::RevokedToken(_) => String::new(),
        Record::Usage(record) => record.id.to_string(),
        Record::UsageDay(day) => format!("of user {}, day {}", day.user_id, day.day),
        Record::UserBudget(budget) => format!("of user {}", budget.user_id),
    }
}
