//! Writing the store's rows out.

use std::io::Write;

use super::import::Counts;
use super::{Error, Meter};
use crate::domain::LastIds;
use crate::store::{AccountStore, BulkStore};
use crate::transfer::json_lines::Writer;

/// Accounts read at once.
const USERS_PAGE: usize = 500;
/// Prompts read at once: with long answers some MiB.
const PROMPTS_PAGE: usize = 200;

/// Writes every account and prompt with an id up to `last`, by rising id, and answers how many.
///
/// Beside a server, each page is of one moment, but not all pages of the same: what is there from the beginning to the end is
/// written once, what is deleted meanwhile may be, and what comes after `last` was read is not. Every prompt's owner is written.
///
/// # Errors
/// Those of the store and of the file.
pub async fn export<W: Write>(
    accounts: &dyn AccountStore,
    bulk: &dyn BulkStore,
    last: LastIds,
    out: &mut Writer<W>,
    meter: &Meter,
) -> Result<Counts, Error> {
    let mut counts = Counts::default();
    let total = |last: i64| u64::try_from(last).unwrap_or(0);
    meter.begin("exporting users", Some(total(last.user.0)));
    let mut after = None;
    loop {
        let page = accounts.list_users(after, USERS_PAGE).await?;
        let mut users = page
            .iter()
            .take_while(|user| user.id <= last.user)
            .peekable();
        if users.peek().is_none() {
            break;
        }
        for user in users {
            out.user(user)?;
            after = Some(user.id);
            counts.users += 1;
            meter.reached(total(user.id.0));
        }
    }
    meter.begin("exporting prompts", Some(total(last.prompt.0)));
    let mut after = None;
    loop {
        let page = bulk.prompt_records(after, PROMPTS_PAGE).await?;
        let mut records = page
            .iter()
            .take_while(|record| record.prompt.id <= last.prompt)
            .peekable();
        if records.peek().is_none() {
            break;
        }
        for record in records {
            out.prompt(record)?;
            after = Some(record.prompt.id);
            counts.prompts += 1;
            meter.reached(total(record.prompt.id.0));
        }
    }
    Ok(counts)
}
