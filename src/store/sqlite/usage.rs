//! Usage, sums and budgets in SQLite. One writer runs all transactions one after another, so a
//! check and what follows from it are never apart.

use async_trait::async_trait;
use rusqlite::{Connection, params};

use super::SqliteStore;
use super::sql_limit;
use super::statements::{all, execute, one};
use crate::domain::{
    Budget, Picodollars, Spend, Subject, TokenUsage, UsageDay, UsageEntry, UsageGroups,
    UsageRecord, UsageSum, UsageTotals, UserId,
};
use crate::store::rows::{self, RunningCall};
use crate::store::usage::{ALL_DAYS, MOST_SPENT, days_from, most_spent, usage_sums};
use crate::store::{Error, NewCall, UsageFilter, UsageStore};

/// A sum of money, at most [`MOST_SPENT`]. Integers whose sum leaves their range become a floating
/// number in SQLite, and `min` then picks the bound; but the aggregate `sum` fails. Each of its
/// parts, of which no number of rows is too large, does not.
macro_rules! sum {
    ($column:literal) => {
        concat!(
            "min(sum(",
            $column,
            " / 1000000000) * 1000000000 + sum(",
            $column,
            " % 1000000000), ",
            most_spent!(),
            ")"
        )
    };
}

const INSERT_USAGE: &str = "INSERT INTO usage (user_id, api_key_id, prompt_id, source, begun_at,
        day, upstream, model_asked, model, input, cache_read, cache_write, output, reasoning, cost,
        price_version, outcome, is_estimated)
    VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18)";

const ADD_TO_DAY: &str = concat!(
    "INSERT INTO usage_day (user_id, day, api_key_id, model, attempts, input,
        cache_read, cache_write, output, reasoning, cost, unpriced)
    VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)
    ON CONFLICT DO UPDATE SET attempts = attempts + excluded.attempts,
        input = input + excluded.input, cache_read = cache_read + excluded.cache_read,
        cache_write = cache_write + excluded.cache_write, output = output + excluded.output,
        reasoning = reasoning + excluded.reasoning, cost = min(cost + excluded.cost, ",
    most_spent!(),
    "), unpriced = unpriced + excluded.unpriced"
);

const ADD_TO_SPEND: &str = concat!(
    "INSERT INTO spend (kind, subject_id, day, settled, reserved)
    VALUES (?1, ?2, ?3, ?4, ?5)
    ON CONFLICT DO UPDATE SET settled = min(settled + excluded.settled, ",
    most_spent!(),
    "), reserved = reserved + excluded.reserved"
);

const SPEND: &str = concat!(
    "SELECT coalesce(",
    sum!("settled"),
    ", 0) AS settled, coalesce(",
    sum!("reserved"),
    ", 0) AS reserved
     FROM spend WHERE kind = ?1 AND subject_id = ?2 AND day BETWEEN ?3 AND ?4"
);

/// Of all users together, which is what the service spends.
const TRACK_SERVICE: &str = concat!(
    "INSERT INTO spend (kind, subject_id, day, settled, reserved)
    SELECT 'service', '', ?1, 0, 0
    UNION ALL
    SELECT 'service', '', day, ",
    sum!("settled"),
    ", ",
    sum!("reserved"),
    " FROM spend
    WHERE kind = 'user' GROUP BY day ORDER BY day
    ON CONFLICT DO UPDATE SET settled = excluded.settled, reserved = excluded.reserved"
);

const USAGE_OF_USER: &str = usage_sums!(sum!("cost"), of one user);
const USAGE_OF_ALL: &str = usage_sums!(sum!("cost"), of all);

/// A count of tokens for a column.
fn count(tokens: u64) -> i64 {
    i64::try_from(tokens).unwrap_or(i64::MAX)
}

fn spend_of(connection: &Connection, subject: Subject, first_day: i64) -> Result<Spend, Error> {
    let (from, to) = days_from(first_day);
    let spend = one(
        connection,
        SPEND,
        params![subject.kind(), subject.id(), from, to],
        rows::spend,
    )?;
    Ok(spend.unwrap_or_default())
}

fn is_service_tracked(connection: &Connection) -> Result<bool, Error> {
    let sql = "SELECT 1 FROM spend WHERE kind = 'service' AND subject_id = '' AND day = ?1";
    Ok(connection.prepare_cached(sql)?.exists([ALL_DAYS])?)
}

fn budget_of(connection: &Connection, user_id: UserId) -> Result<Option<Budget>, Error> {
    let sql = "SELECT amount, period FROM user_budget WHERE user_id = ?1";
    one(connection, sql, [user_id.0], rows::budget)
}

/// Checks a call against the budgets in force, and reserves the most that it can cost. Returns how
/// much was reserved.
pub(super) fn reserve(connection: &Connection, call: &NewCall) -> Result<Picodollars, Error> {
    let budgets = &call.budgets;
    let key = call.api_key_id.map(Subject::Key).zip(budgets.key);
    let user = budget_of(connection, call.user_id)?;
    let in_force = [
        budgets.service.map(|budget| (Subject::Service, budget)),
        user.map(|budget| (Subject::User(call.user_id), budget)),
        key,
    ];
    if in_force.iter().all(Option::is_none) {
        return Ok(Picodollars(0));
    }
    let most = budgets.most_cost.ok_or(Error::PriceUnknown)?;
    if most == Picodollars(0) {
        return Ok(most);
    }
    for (subject, budget) in in_force.into_iter().flatten() {
        if subject == Subject::Service && !is_service_tracked(connection)? {
            track_service(connection, true)?;
        }
        let spend = spend_of(
            connection,
            subject,
            budget.period.first_day(call.created_at),
        )?;
        let sum = spend.settled.0.saturating_add(spend.reserved.0);
        if sum.saturating_add(most.0) > budget.amount.0 {
            return Err(Error::BudgetExceeded);
        }
    }
    let day = call.created_at.unix_day();
    let key = call.api_key_id.map(|id| id.to_string());
    add_to_spend(connection, call.user_id, key.as_deref(), day, 0, most.0)?;
    Ok(most)
}

/// Adds amounts to what the user, the key and the service have settled and reserved.
fn add_to_spend(
    connection: &Connection,
    user_id: UserId,
    api_key_id: Option<&str>,
    day: i64,
    settled: i64,
    reserved: i64,
) -> Result<(), Error> {
    if settled == 0 && reserved == 0 {
        return Ok(());
    }
    let user = user_id.to_string();
    let service = is_service_tracked(connection)?.then_some("");
    let subjects = [
        ("service", service),
        ("user", Some(user.as_str())),
        ("key", api_key_id),
    ];
    for (kind, id) in subjects {
        let Some(id) = id else {
            continue;
        };
        for day in [ALL_DAYS, day] {
            execute(
                connection,
                ADD_TO_SPEND,
                params![kind, id, day, settled, reserved],
            )?;
        }
    }
    Ok(())
}

/// Writes what a call that has ended used, adds it to the sums, and frees what it has reserved.
pub(super) fn meter(
    connection: &Connection,
    call: &RunningCall,
    entries: &[UsageEntry],
) -> Result<(), Error> {
    let Some(user_id) = call.user_id else {
        return Ok(());
    };
    let day = call.begun_at.unix_day();
    for entry in entries {
        put_usage(connection, call, user_id, entry)?;
        let mut totals = UsageTotals::default();
        totals.add(entry);
        totals.cost = totals.cost.min(Picodollars(MOST_SPENT));
        let key = call.api_key_id.as_deref().unwrap_or_default();
        add_to_day(connection, user_id, day, key, &entry.model, &totals)?;
    }
    let costs = entries.iter().filter_map(|entry| entry.cost);
    let settled = costs.fold(0, |sum: i64, cost| {
        sum.saturating_add(cost.0).min(MOST_SPENT)
    });
    let key = call.api_key_id.as_deref();
    add_to_spend(connection, user_id, key, day, settled, -call.reserved)
}

fn put_usage(
    connection: &Connection,
    call: &RunningCall,
    user_id: UserId,
    entry: &UsageEntry,
) -> Result<usize, Error> {
    let tokens = |kind: fn(&TokenUsage) -> u64| entry.tokens.as_ref().map(kind).map(count);
    execute(
        connection,
        INSERT_USAGE,
        params![
            user_id.0,
            call.api_key_id,
            call.prompt_id.0,
            call.source,
            call.begun_at.0,
            call.begun_at.unix_day(),
            entry.upstream,
            entry.model_asked,
            entry.model,
            tokens(|tokens| tokens.input),
            tokens(|tokens| tokens.cache_read),
            tokens(|tokens| tokens.cache_write),
            tokens(|tokens| tokens.output),
            tokens(|tokens| tokens.reasoning),
            entry.cost.map(|cost| cost.0),
            entry.price_version.as_deref(),
            entry.outcome.as_str(),
            entry.is_estimated,
        ],
    )
}

fn add_to_day(
    connection: &Connection,
    user_id: UserId,
    day: i64,
    api_key_id: &str,
    model: &str,
    totals: &UsageTotals,
) -> Result<usize, Error> {
    let tokens = &totals.tokens;
    execute(
        connection,
        ADD_TO_DAY,
        params![
            user_id.0,
            day,
            api_key_id,
            model,
            count(totals.attempts),
            count(tokens.input),
            count(tokens.cache_read),
            count(tokens.cache_write),
            count(tokens.output),
            count(tokens.reasoning),
            totals.cost.0,
            count(totals.unpriced),
        ],
    )
}

fn track_service(connection: &Connection, is_tracked: bool) -> Result<(), Error> {
    execute(connection, "DELETE FROM spend WHERE kind = 'service'", [])?;
    if is_tracked {
        execute(connection, TRACK_SERVICE, [ALL_DAYS])?;
    }
    Ok(())
}

/// Puts a row as it is, unless its id is stored already.
pub(super) fn put_usage_record(
    connection: &Connection,
    record: &UsageRecord,
) -> Result<usize, Error> {
    let is_stored = connection
        .prepare_cached("SELECT 1 FROM usage WHERE id = ?1")?
        .exists([record.id])?;
    if is_stored {
        return Ok(0);
    }
    let call = RunningCall {
        prompt_id: record.prompt_id,
        user_id: Some(record.user_id),
        api_key_id: record.api_key_id.map(|id| id.to_string()),
        source: record.source.as_str().to_owned(),
        model: record.entry.model_asked.clone(),
        begun_at: record.begun_at,
        reserved: 0,
    };
    put_usage(connection, &call, record.user_id, &record.entry)?;
    let sql = "UPDATE usage SET id = ?1 WHERE id = last_insert_rowid()";
    execute(connection, sql, [record.id])
}

/// Puts the sums of a day, and adds them to what budgets are checked against, unless they are
/// stored already.
pub(super) fn put_usage_day(connection: &Connection, day: &UsageDay) -> Result<usize, Error> {
    let key = day.api_key_id.map(|id| id.to_string());
    let stored_key = key.as_deref().unwrap_or_default();
    let is_stored = connection
        .prepare_cached(
            "SELECT 1 FROM usage_day
             WHERE user_id = ?1 AND day = ?2 AND api_key_id = ?3 AND model = ?4",
        )?
        .exists(params![day.user_id.0, day.day, stored_key, day.model])?;
    if is_stored {
        return Ok(0);
    }
    add_to_day(
        connection,
        day.user_id,
        day.day,
        stored_key,
        &day.model,
        &day.totals,
    )?;
    let cost = day.totals.cost.0;
    add_to_spend(connection, day.user_id, key.as_deref(), day.day, cost, 0)?;
    Ok(1)
}

pub(super) const PUT_BUDGET: &str = "INSERT INTO user_budget (user_id, amount, period)
    VALUES (?1, ?2, ?3) ON CONFLICT DO NOTHING";

#[async_trait]
impl UsageStore for SqliteStore {
    async fn usage(
        &self,
        filter: UsageFilter,
        groups: UsageGroups,
        limit: usize,
    ) -> Result<Vec<UsageSum>, Error> {
        let UsageGroups {
            by_day,
            by_user,
            by_key,
            by_model,
        } = groups;
        let UsageFilter { user_id, from, to } = filter;
        let limit = sql_limit(limit);
        self.readers
            .read(move |connection| match user_id {
                Some(UserId(id)) => all(
                    connection,
                    USAGE_OF_USER,
                    params![by_day, by_user, by_key, by_model, id, from, to, limit],
                    rows::usage_sum,
                ),
                None => all(
                    connection,
                    USAGE_OF_ALL,
                    params![by_day, by_user, by_key, by_model, from, to, limit],
                    rows::usage_sum,
                ),
            })
            .await
    }

    async fn user_budget(&self, user_id: UserId) -> Result<Option<Budget>, Error> {
        self.readers
            .read(move |connection| budget_of(connection, user_id))
            .await
    }

    async fn set_user_budget(
        &self,
        user_id: UserId,
        budget: Option<Budget>,
    ) -> Result<bool, Error> {
        self.writer
            .write(move |connection| {
                let exists = connection
                    .prepare_cached("SELECT 1 FROM account WHERE id = ?1")?
                    .exists([user_id.0])?;
                if !exists {
                    return Ok(false);
                }
                let clear = "DELETE FROM user_budget WHERE user_id = ?1";
                execute(connection, clear, [user_id.0])?;
                if let Some(budget) = budget {
                    execute(
                        connection,
                        PUT_BUDGET,
                        params![user_id.0, budget.amount.0, budget.period.as_str()],
                    )?;
                }
                Ok(true)
            })
            .await
    }

    async fn spend(&self, subject: Subject, first_day: i64) -> Result<Spend, Error> {
        self.readers
            .read(move |connection| spend_of(connection, subject, first_day))
            .await
    }

    async fn track_service(&self, is_tracked: bool) -> Result<(), Error> {
        self.writer
            .write(move |connection| track_service(connection, is_tracked))
            .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::sqlite::OpenOptions;

    #[tokio::test]
    async fn the_usage_of_one_user_is_searched_in_the_index_by_user_and_day() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("test.db");
        let store = SqliteStore::open(&path, OpenOptions::default()).unwrap();
        store.close().await;
        let connection = Connection::open(path).unwrap();
        let mut statement = connection
            .prepare(&format!("EXPLAIN QUERY PLAN {USAGE_OF_USER}"))
            .unwrap();
        let plan: Vec<String> = statement
            .query_map(params![true, false, true, true, 1, 2, 3, 4], |row| {
                row.get("detail")
            })
            .unwrap()
            .collect::<Result<_, _>>()
            .unwrap();
        let search = "SEARCH usage_day USING PRIMARY KEY (user_id=? AND day>? AND day<?)";
        assert!(plan.iter().any(|step| step == search), "{plan:?}");
        assert!(
            !plan.iter().any(|step| step.starts_with("SCAN")),
            "{plan:?}"
        );
    }
}
