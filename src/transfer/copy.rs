//! Making one store's contents another's, whole.
//!
//! Rows go over by rising key, so what a cut-off run has left in the target is a beginning of the source. A new run reads it
//! through, takes it as done if it is just that, and refuses the target otherwise. At the end both sides are read and compared
//! row by row.

use std::collections::VecDeque;

use async_trait::async_trait;

use super::import::Counts;
use super::rules::keep_in_any_store;
use super::{Error, Meter};
use crate::domain::{FailureCode, PromptRecord, PromptStatus, User, VectorRecord};
use crate::store::{AccountStore, BulkStore, KeyRecord, Put, RevokedToken, Session, UpstreamDay};

/// Rows read, and written in one transaction.
const PAGE: usize = 256;

/// One of the two stores.
#[derive(Clone, Copy)]
pub struct Side<'a> {
    /// Its accounts.
    pub accounts: &'a dyn AccountStore,
    /// Its bulk side.
    pub bulk: &'a dyn BulkStore,
    /// Numbers in a vector of the model in use. Vectors of other lengths, which a change of model has left behind, stay where
    /// they are: a database has room for one length.
    pub dimension: usize,
}

/// A kind of row, read by rising key.
#[async_trait]
trait Table {
    type Row: Clone + PartialEq + Send + Sync;

    /// In an error.
    const NAME: &'static str;
    const LOOKING: &'static str;
    const COPYING: &'static str;
    const COMPARING: &'static str;

    async fn page(side: Side<'_>, after: Option<&Self::Row>) -> Result<Vec<Self::Row>, Error>;

    async fn put(side: Side<'_>, rows: Vec<Self::Row>) -> Result<(), Error>;

    /// The row's key, where that is no secret.
    fn key(row: &Self::Row) -> String;
}

struct Users;
struct Prompts;
struct Keys;
struct UpstreamDays;
struct Sessions;
struct RevokedTokens;

#[async_trait]
impl Table for Users {
    type Row = User;
    const NAME: &'static str = "user";
    const LOOKING: &'static str = "looking at the target's users";
    const COPYING: &'static str = "copying users";
    const COMPARING: &'static str = "comparing users";

    async fn page(side: Side<'_>, after: Option<&User>) -> Result<Vec<User>, Error> {
        Ok(side
            .accounts
            .list_users(after.map(|user| user.id), PAGE)
            .await?)
    }

    async fn put(side: Side<'_>, rows: Vec<User>) -> Result<(), Error> {
        none_taken(&side.bulk.put_users(rows).await?)
    }

    fn key(row: &User) -> String {
        row.id.to_string()
    }
}

#[async_trait]
impl Table for Prompts {
    type Row = PromptRecord;
    const NAME: &'static str = "prompt";
    const LOOKING: &'static str = "looking at the target's prompts";
    const COPYING: &'static str = "copying prompts";
    const COMPARING: &'static str = "comparing prompts";

    async fn page(
        side: Side<'_>,
        after: Option<&PromptRecord>,
    ) -> Result<Vec<PromptRecord>, Error> {
        let after = after.map(|record| record.prompt.id);
        let mut records = side.bulk.prompt_records(after, PAGE).await?;
        for record in &mut records {
            let is_kept = |vector: &VectorRecord| vector.f16_bytes.len() == 2 * side.dimension;
            record.vector = record.vector.take().filter(is_kept);
            let prompt = &mut record.prompt;
            if prompt.status == PromptStatus::Running {
                // No server is at work on it any more: it ends as the next server would end it. A lease stays where it is.
                prompt.status = PromptStatus::Failed;
                prompt.error = Some(FailureCode::Interrupted);
            }
            let words = prompt.response.iter_mut().chain([&mut prompt.model]);
            let words = words.chain(&mut prompt.call.finish_reason);
            words.for_each(keep_in_any_store);
        }
        Ok(records)
    }

    async fn put(side: Side<'_>, rows: Vec<PromptRecord>) -> Result<(), Error> {
        none_taken(&side.bulk.put_prompts(rows).await?)
    }

    fn key(row: &PromptRecord) -> String {
        row.prompt.id.to_string()
    }
}

#[async_trait]
impl Table for Keys {
    type Row = KeyRecord;
    const NAME: &'static str = "idempotency key";
    const LOOKING: &'static str = "looking at the target's idempotency keys";
    const COPYING: &'static str = "copying idempotency keys";
    const COMPARING: &'static str = "comparing idempotency keys";

    async fn page(side: Side<'_>, after: Option<&KeyRecord>) -> Result<Vec<KeyRecord>, Error> {
        let after = after.map(|key| (key.user_id, key.key_hash));
        Ok(side.bulk.list_keys(after, PAGE).await?)
    }

    async fn put(side: Side<'_>, rows: Vec<KeyRecord>) -> Result<(), Error> {
        Ok(side.bulk.put_keys(rows).await?)
    }

    fn key(row: &KeyRecord) -> String {
        format!("of prompt {}", row.prompt_id)
    }
}

#[async_trait]
impl Table for UpstreamDays {
    type Row = UpstreamDay;
    const NAME: &'static str = "day's count of calls";
    const LOOKING: &'static str = "looking at the target's counts of calls";
    const COPYING: &'static str = "copying counts of calls";
    const COMPARING: &'static str = "comparing counts of calls";

    async fn page(side: Side<'_>, after: Option<&UpstreamDay>) -> Result<Vec<UpstreamDay>, Error> {
        let after = after.map(|day| day.day);
        Ok(side.bulk.list_upstream_days(after, PAGE).await?)
    }

    async fn put(side: Side<'_>, rows: Vec<UpstreamDay>) -> Result<(), Error> {
        Ok(side.bulk.put_upstream_days(rows).await?)
    }

    fn key(row: &UpstreamDay) -> String {
        row.day.to_string()
    }
}

#[async_trait]
impl Table for Sessions {
    type Row = Session;
    const NAME: &'static str = "session";
    const LOOKING: &'static str = "looking at the target's sessions";
    const COPYING: &'static str = "copying sessions";
    const COMPARING: &'static str = "comparing sessions";

    async fn page(side: Side<'_>, after: Option<&Session>) -> Result<Vec<Session>, Error> {
        let after = after.map(|session| session.token_hash);
        Ok(side.bulk.list_sessions(after, PAGE).await?)
    }

    async fn put(side: Side<'_>, rows: Vec<Session>) -> Result<(), Error> {
        Ok(side.bulk.put_sessions(rows).await?)
    }

    fn key(_: &Session) -> String {
        String::new()
    }
}

#[async_trait]
impl Table for RevokedTokens {
    type Row = RevokedToken;
    const NAME: &'static str = "revoked token";
    const LOOKING: &'static str = "looking at the target's revoked tokens";
    const COPYING: &'static str = "copying revoked tokens";
    const COMPARING: &'static str = "comparing revoked tokens";

    async fn page(
        side: Side<'_>,
        after: Option<&RevokedToken>,
    ) -> Result<Vec<RevokedToken>, Error> {
        let after = after.map(|token| token.jti.as_str());
        Ok(side.bulk.list_revoked_tokens(after, PAGE).await?)
    }

    async fn put(side: Side<'_>, rows: Vec<RevokedToken>) -> Result<(), Error> {
        Ok(side.bulk.put_revoked_tokens(rows).await?)
    }

    fn key(_: &RevokedToken) -> String {
        String::new()
    }
}

/// What is there already may come from a run that was cut off: the server finishes what it was told. The comparison at the end tells
/// whether it is the same.
fn none_taken(put: &[Put]) -> Result<(), Error> {
    if put.contains(&Put::Taken) {
        Err(Error::Foreign)
    } else {
        Ok(())
    }
}

/// The rows of a table, one after another.
struct Walk<'a, T: Table> {
    side: Side<'a>,
    page: VecDeque<T::Row>,
    /// The last row that was read, where the next page begins.
    last: Option<T::Row>,
}

impl<'a, T: Table> Walk<'a, T> {
    fn of(side: Side<'a>) -> Self {
        Self::after(side, None)
    }

    fn after(side: Side<'a>, last: Option<T::Row>) -> Self {
        Self {
            side,
            page: VecDeque::new(),
            last,
        }
    }

    /// The next row; `None` at the end.
    async fn row(&mut self) -> Result<Option<T::Row>, Error> {
        self.fill().await?;
        Ok(self.page.pop_front())
    }

    /// What is left of the page at hand, or the next one; empty at the end.
    async fn rows(&mut self) -> Result<Vec<T::Row>, Error> {
        self.fill().await?;
        Ok(std::mem::take(&mut self.page).into())
    }

    async fn fill(&mut self) -> Result<(), Error> {
        if self.page.is_empty() {
            self.page = T::page(self.side, self.last.as_ref()).await?.into();
            if let Some(last) = self.page.back() {
                self.last = Some(last.clone());
            }
        }
        Ok(())
    }
}

/// Copies everything from one store to the other and compares both. Nothing else may write to either meanwhile. Answers how many
/// accounts and prompts both have then.
///
/// # Errors
/// `Foreign` if the target holds other rows; `Differs` if a row is not the same on both sides at the end; those of the stores.
pub async fn carry(from: Side<'_>, to: Side<'_>, meter: &Meter) -> Result<Counts, Error> {
    let last = from.bulk.last_ids().await?;
    // All of the target is looked at before any of it is changed.
    let users = beginning::<Users>(from, to, meter).await?;
    let prompts = beginning::<Prompts>(from, to, meter).await?;
    let keys = beginning::<Keys>(from, to, meter).await?;
    let days = beginning::<UpstreamDays>(from, to, meter).await?;
    let sessions = beginning::<Sessions>(from, to, meter).await?;
    let tokens = beginning::<RevokedTokens>(from, to, meter).await?;
    copy(users, to, meter, Some(last.user.0)).await?;
    copy(prompts, to, meter, Some(last.prompt.0)).await?;
    copy(keys, to, meter, None).await?;
    copy(days, to, meter, None).await?;
    copy(sessions, to, meter, None).await?;
    copy(tokens, to, meter, None).await?;
    to.bulk.raise_ids(last).await?;
    let users = compare::<Users>(from, to, meter, Some(last.user.0)).await?;
    let prompts = compare::<Prompts>(from, to, meter, Some(last.prompt.0)).await?;
    compare::<Keys>(from, to, meter, None).await?;
    compare::<UpstreamDays>(from, to, meter, None).await?;
    compare::<Sessions>(from, to, meter, None).await?;
    compare::<RevokedTokens>(from, to, meter, None).await?;
    Ok(Counts { users, prompts })
}

/// About how many rows there are: ids are given out one by one, and few rows are ever deleted.
fn total(last_id: Option<i64>) -> Option<u64> {
    last_id.map(|id| u64::try_from(id).unwrap_or(0))
}

/// What of the source is not in the target yet, if what is there is a beginning of the source.
async fn beginning<'a, T: Table>(
    from: Side<'a>,
    to: Side<'a>,
    meter: &Meter,
) -> Result<Rest<'a, T>, Error> {
    meter.begin(T::LOOKING, None);
    let (mut source, mut target) = (Walk::<T>::of(from), Walk::<T>::of(to));
    let (mut last, mut rows) = (None, 0);
    while let Some(row) = target.row().await? {
        if source.row().await?.as_ref() != Some(&row) {
            return Err(Error::Foreign);
        }
        last = Some(row);
        rows += 1;
        meter.advance(1);
    }
    Ok(Rest {
        walk: Walk::after(from, last),
        copied: rows,
    })
}

/// The rows of the source that are still to be copied.
struct Rest<'a, T: Table> {
    walk: Walk<'a, T>,
    /// How many come before them.
    copied: u64,
}

async fn copy<T: Table>(
    mut rest: Rest<'_, T>,
    to: Side<'_>,
    meter: &Meter,
    last_id: Option<i64>,
) -> Result<(), Error> {
    let left = total(last_id).map(|total| total.saturating_sub(rest.copied));
    meter.begin(T::COPYING, left);
    loop {
        let rows = rest.walk.rows().await?;
        if rows.is_empty() {
            return Ok(());
        }
        let copied = rows.len();
        T::put(to, rows).await?;
        meter.advance(copied);
    }
}

/// Answers how many rows both sides have.
async fn compare<T: Table>(
    from: Side<'_>,
    to: Side<'_>,
    meter: &Meter,
    last_id: Option<i64>,
) -> Result<u64, Error> {
    meter.begin(T::COMPARING, total(last_id));
    let (mut source, mut target) = (Walk::<T>::of(from), Walk::<T>::of(to));
    let mut rows = 0;
    loop {
        let (ours, theirs) = (source.row().await?, target.row().await?);
        if ours != theirs {
            let key = ours.or(theirs).map_or_else(String::new, |row| T::key(&row));
            return Err(Error::Differs { what: T::NAME, key });
        }
        if ours.is_none() {
            return Ok(rows);
        }
        rows += 1;
        meter.advance(1);
    }
}
