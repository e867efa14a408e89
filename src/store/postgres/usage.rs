//! Usage, sums and budgets in PostgreSQL.
//!
//! Rows of spend are locked in one order everywhere, so that no two transactions wait for each
//! other: the service, users by id, keys by id; of each the sum of all days before any day. Whoever
//! has the sum of a subject locked is the only one that changes the subject's days.

use async_trait::async_trait;

use super::pool::{Arguments, Connection, LONG_PATIENCE};
use super::{PostgresStore, all, first, sql_limit};
use crate::domain::{
    Budget, Picodollars, Spend, Subject, UsageEntry, UsageGroups, UsageSum, UserId, without_nul,
};
use crate::store::rows;
use crate::store::usage::{days_from, usage_sums};
use crate::store::{Error, NewCall, UsageFilter, UsageStore};

/// A sum of money, at most [`MOST_SPENT`](crate::store::usage::MOST_SPENT); 0 of no rows. The sum
/// itself is a `numeric`, which no number of rows makes too large.
macro_rules! sum {
    ($column:literal) => {
        concat!(
            "least(coalesce(sum(",
            $column,
            "), 0), ",
            $crate::store::usage::most_spent!(),
            ")::bigint"
        )
    };
}
pub(super) use sum;

/// Adds the cost of a row that exists already to the one that is stored, in the same way. `least`
/// alone would be too late: a sum of two `bigint` fails if it leaves their range.
macro_rules! add {
    ($table:literal, $column:literal) => {
        concat!(
            $column,
            " = least(",
            $table,
            ".",
            $column,
            "::numeric + excluded.",
            $column,
            ", ",
            $crate::store::usage::most_spent!(),
            ")::bigint"
        )
    };
}
pub(super) use add;

/// Follows a list of `WITH` that has `released`, rows of running_call that are deleted, and
/// `entry`, what their attempts used. Adds rows of usage, then changes the sums of their days, then
/// what is spent and reserved; the counts between them make that order certain.
macro_rules! metering {
    () => {
        concat!(
            ", used AS (
             INSERT INTO usage (user_id, api_key_id, prompt_id, source, begun_at, day, upstream,
                 model_asked, model, input, cache_read, cache_write, output, reasoning, cost,
                 price_version, outcome, is_estimated)
             SELECT r.user_id, r.api_key_id, r.prompt_id, r.source, r.begun_at,
                 floor(r.begun_at / 86400000000.0)::bigint, e.upstream, e.model_asked, e.model,
                 e.input, e.cache_read, e.cache_write, e.output, e.reasoning, e.cost,
                 e.price_version, e.outcome, e.is_estimated
             FROM released r JOIN entry e ON e.prompt_id = r.prompt_id WHERE r.user_id IS NOT NULL
             RETURNING *
         ), summed AS (
             INSERT INTO usage_day (user_id, day, api_key_id, model, attempts, input, cache_read,
                 cache_write, output, reasoning, cost, unpriced)
             SELECT user_id, day, coalesce(api_key_id, ''), model, count(*),
                 coalesce(sum(input), 0), coalesce(sum(cache_read), 0),
                 coalesce(sum(cache_write), 0), coalesce(sum(output), 0),
                 coalesce(sum(reasoning), 0), ",
            $crate::store::postgres::usage::sum!("cost"),
            ",
                 count(*) FILTER (WHERE cost IS NULL)
             FROM used GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4
             ON CONFLICT (user_id, day, api_key_id, model) DO UPDATE SET
                 attempts = usage_day.attempts + excluded.attempts,
                 input = usage_day.input + excluded.input,
                 cache_read = usage_day.cache_read + excluded.cache_read,
                 cache_write = usage_day.cache_write + excluded.cache_write,
                 output = usage_day.output + excluded.output,
                 reasoning = usage_day.reasoning + excluded.reasoning,
                 ",
            $crate::store::postgres::usage::add!("usage_day", "cost"),
            ",
                 unpriced = usage_day.unpriced + excluded.unpriced
             RETURNING 1
         ), change AS (
             SELECT r.user_id, r.api_key_id, floor(r.begun_at / 86400000000.0)::bigint AS day,
                 coalesce((SELECT sum(u.cost) FROM used u WHERE u.prompt_id = r.prompt_id), 0)
                     AS settled,
                 -r.reserved AS reserved
             FROM released r WHERE r.user_id IS NOT NULL AND (SELECT count(*) FROM summed) >= 0
         ), spent AS (
             INSERT INTO spend (kind, subject_id, day, settled, reserved)
             SELECT s.kind, s.id, d.day, ",
            $crate::store::postgres::usage::sum!("c.settled"),
            ", sum(c.reserved)
             FROM change c
             CROSS JOIN LATERAL (VALUES (1, 'service', 0, ''), (2, 'user', c.user_id, c.user_id::text),
                                        (3, 'key', 0, c.api_key_id)) AS s (place, kind, number, id)
             CROSS JOIN LATERAL (VALUES (-1), (c.day)) AS d (day)
             WHERE s.id IS NOT NULL AND (c.settled <> 0 OR c.reserved <> 0)
               AND (s.place > 1 OR EXISTS (SELECT FROM spend t
                    WHERE t.kind = 'service' AND t.subject_id = '' AND t.day = -1))
             GROUP BY s.place, s.kind, s.number, s.id, d.day
             ORDER BY s.place, s.number, s.id, d.day
             ON CONFLICT (kind, subject_id, day) DO UPDATE SET
                 ",
            $crate::store::postgres::usage::add!("spend", "settled"),
            ",
                 reserved = spend.reserved + excluded.reserved
         )"
        )
    };
}
pub(super) use metering;

/// The `entry` of [`metering`] for calls whose process ended.
macro_rules! interrupted {
    () => {
        ", entry AS (
             SELECT prompt_id, ''::text AS upstream, model AS model_asked, model,
                 NULL::bigint AS input, NULL::bigint AS cache_read, NULL::bigint AS cache_write,
                 NULL::bigint AS output, NULL::bigint AS reasoning, NULL::bigint AS cost,
                 NULL::text AS price_version, 'interrupted'::text AS outcome,
                 false AS is_estimated
             FROM released
         )"
    };
}
pub(super) use interrupted;

/// Of users alone, whatever else is in force.
const USER_BUDGET: &str = "SELECT amount, period FROM user_budget WHERE user_id = $1";

/// Locks the sums of the subjects, and makes those that are missing; that of the service only if it
/// is tracked. Returns the kinds of those that are locked.
const LOCK_SPEND: &str = "
    INSERT INTO spend (kind, subject_id, day, settled, reserved)
    SELECT s.kind, s.id, -1, 0, 0
    FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS s (kind, id, place)
    WHERE s.kind <> 'service' OR EXISTS (SELECT FROM spend t
        WHERE t.kind = 'service' AND t.subject_id = '' AND t.day = -1)
    ORDER BY s.place
    ON CONFLICT (kind, subject_id, day) DO UPDATE SET settled = spend.settled
    RETURNING kind";

const SPEND: &str = concat!(
    "SELECT ",
    sum!("settled"),
    " AS settled, ",
    sum!("reserved"),
    " AS reserved
    FROM spend WHERE kind = $1 AND subject_id = $2 AND day BETWEEN $3 AND $4"
);

/// Adds to what the locked subjects have reserved.
const RESERVE: &str = "
    INSERT INTO spend (kind, subject_id, day, settled, reserved)
    SELECT s.kind, s.id, d.day, 0, $4
    FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS s (kind, id, place)
    CROSS JOIN LATERAL (VALUES (-1), ($3::bigint)) AS d (day)
    WHERE s.kind <> 'service' OR EXISTS (SELECT FROM spend t
        WHERE t.kind = 'service' AND t.subject_id = '' AND t.day = -1)
    ORDER BY s.place, d.day
    ON CONFLICT (kind, subject_id, day) DO UPDATE SET
        reserved = spend.reserved + excluded.reserved
    RETURNING 1";

/// Of all users together, which is what the service spends.
const TRACK_SERVICE: &str = concat!(
    "INSERT INTO spend (kind, subject_id, day, settled, reserved)
    SELECT 'service', '', day, ",
    sum!("settled"),
    ", ",
    sum!("reserved"),
    " FROM (SELECT day, settled, reserved FROM spend WHERE kind = 'user'
          UNION ALL SELECT -1, 0, 0) AS users
    GROUP BY day RETURNING 1"
);

const USAGE_OF_USER: &str = usage_sums!(sum!("cost"), of one user);
const USAGE_OF_ALL: &str = usage_sums!(sum!("cost"), of all);

/// The result of [`reserve`].
pub(super) enum Reserved {
    /// How much was reserved.
    Amount(Picodollars),
    /// Nothing: the service has a budget and is not tracked yet.
    Untracked,
}

/// Checks a call against the budgets in force, and reserves the most that it can cost. Runs inside
/// the transaction that stores the call.
pub(super) async fn reserve(
    connection: &mut Connection,
    call: &NewCall,
) -> Result<Reserved, Error> {
    let budgets = &call.budgets;
    let user = connection.query(USER_BUDGET, &[&call.user_id.0]).await?;
    let user = first(&user, |row| rows::budget(row))?;
    let in_force = [
        budgets.service.map(|budget| (Subject::Service, budget)),
        user.map(|budget| (Subject::User(call.user_id), budget)),
        call.api_key_id.map(Subject::Key).zip(budgets.key),
    ];
    if in_force.iter().all(Option::is_none) {
        return Ok(Reserved::Amount(Picodollars(0)));
    }
    let most = budgets.most_cost.ok_or(Error::PriceUnknown)?;
    if most == Picodollars(0) {
        return Ok(Reserved::Amount(most));
    }
    // Also those without a budget: what this call reserves is reserved for them, too.
    let subjects = [Subject::Service, Subject::User(call.user_id)];
    let subjects = subjects
        .into_iter()
        .chain(call.api_key_id.map(Subject::Key));
    let (kinds, ids): (Vec<&str>, Vec<String>) = subjects
        .map(|subject| (subject.kind(), subject.id()))
        .unzip();
    let locked = connection.write(LOCK_SPEND, &[&kinds, &ids]).await?;
    let locked: Vec<String> = all(&locked, |row| row.read("kind"))?;
    let service = Subject::Service.kind();
    if budgets.service.is_some() && !locked.iter().any(|kind| kind == service) {
        return Ok(Reserved::Untracked);
    }
    for (subject, budget) in in_force.into_iter().flatten() {
        let spend = spend_of(
            connection,
            subject,
            budget.period.first_day(call.created_at),
        )
        .await?;
        let sum = spend.settled.0.saturating_add(spend.reserved.0);
        if sum.saturating_add(most.0) > budget.amount.0 {
            return Err(Error::BudgetExceeded);
        }
    }
    let day = call.created_at.unix_day();
    let arguments: Arguments<'_> = &[&kinds, &ids, &day, &most.0];
    connection.write(RESERVE, arguments).await?;
    Ok(Reserved::Amount(most))
}

async fn spend_of(
    connection: &mut Connection,
    subject: Subject,
    first_day: i64,
) -> Result<Spend, Error> {
    let (from, to) = days_from(first_day);
    let arguments: Arguments<'_> = &[&subject.kind(), &subject.id(), &from, &to];
    let spend = connection.query(SPEND, arguments).await?;
    Ok(first(&spend, |row| rows::spend(row))?.unwrap_or_default())
}

/// A count of tokens for a column.
pub(super) fn count(tokens: u64) -> i64 {
    i64::try_from(tokens).unwrap_or(i64::MAX)
}

/// Rows of usage as columns.
#[derive(Default)]
pub(super) struct UsageColumns {
    pub upstream: Vec<String>,
    pub model_asked: Vec<String>,
    pub model: Vec<String>,
    pub input: Vec<Option<i64>>,
    pub cache_read: Vec<Option<i64>>,
    pub cache_write: Vec<Option<i64>>,
    pub output: Vec<Option<i64>>,
    pub reasoning: Vec<Option<i64>>,
    pub cost: Vec<Option<i64>>,
    pub price_version: Vec<Option<String>>,
    pub outcome: Vec<&'static str>,
    pub is_estimated: Vec<bool>,
}

impl UsageColumns {
    pub fn of(entries: impl IntoIterator<Item = UsageEntry>) -> Self {
        let mut columns = Self::default();
        for entry in entries {
            let tokens = entry.tokens.as_ref();
            columns.upstream.push(without_nul(entry.upstream));
            columns.model_asked.push(without_nul(entry.model_asked));
            columns.model.push(without_nul(entry.model));
            columns.input.push(tokens.map(|tokens| count(tokens.input)));
            columns
                .cache_read
                .push(tokens.map(|tokens| count(tokens.cache_read)));
            columns
                .cache_write
                .push(tokens.map(|tokens| count(tokens.cache_write)));
            columns
                .output
                .push(tokens.map(|tokens| count(tokens.output)));
            columns
                .reasoning
                .push(tokens.map(|tokens| count(tokens.reasoning)));
            columns.cost.push(entry.cost.map(|cost| cost.0));
            let version = entry.price_version.map(|version| version.to_string());
            columns.price_version.push(version);
            columns.outcome.push(entry.outcome.as_str());
            columns.is_estimated.push(entry.is_estimated);
        }
        columns
    }
}

#[async_trait]
impl UsageStore for PostgresStore {
    async fn usage(
        &self,
        filter: UsageFilter,
        groups: UsageGroups,
        limit: usize,
    ) -> Result<Vec<UsageSum>, Error> {
        let mut connection = self.pool.connection(LONG_PATIENCE).await?;
        let UsageGroups {
            by_day,
            by_user,
            by_key,
            by_model,
        } = &groups;
        let UsageFilter { user_id, from, to } = &filter;
        let limit = &sql_limit(limit);
        let sums = match user_id {
            Some(UserId(id)) => {
                let one: Arguments<'_> = &[by_day, by_user, by_key, by_model, id, from, to, limit];
                connection.query(USAGE_OF_USER, one).await?
            }
            None => {
                let everybody: Arguments<'_> =
                    &[by_day, by_user, by_key, by_model, from, to, limit];
                connection.query(USAGE_OF_ALL, everybody).await?
            }
        };
        all(&sums, |row| rows::usage_sum(row))
    }

    async fn user_budget(&self, user_id: UserId) -> Result<Option<Budget>, Error> {
        let budget = self.pool.query(USER_BUDGET, &[&user_id.0]).await?;
        first(&budget, |row| rows::budget(row))
    }

    async fn set_user_budget(
        &self,
        user_id: UserId,
        budget: Option<Budget>,
    ) -> Result<bool, Error> {
        let user = match budget {
            Some(budget) => {
                self.pool
                    .write(
                        "WITH stored AS (
                             INSERT INTO user_budget (user_id, amount, period)
                             SELECT id, $2, $3 FROM account WHERE id = $1
                             ON CONFLICT (user_id) DO UPDATE SET amount = excluded.amount,
                                 period = excluded.period
                         )
                         SELECT id FROM account WHERE id = $1",
                        &[&user_id.0, &budget.amount.0, &budget.period.as_str()],
                    )
                    .await?
            }
            None => {
                self.pool
                    .write(
                        "WITH gone AS (DELETE FROM user_budget WHERE user_id = $1)
                         SELECT id FROM account WHERE id = $1",
                        &[&user_id.0],
                    )
                    .await?
            }
        };
        Ok(!user.is_empty())
    }

    async fn spend(&self, subject: Subject, first_day: i64) -> Result<Spend, Error> {
        let mut connection = self.pool.connection(super::pool::PATIENCE).await?;
        spend_of(&mut connection, subject, first_day).await
    }

    async fn track_service(&self, is_tracked: bool) -> Result<(), Error> {
        let mut connection = self.pool.connection(LONG_PATIENCE).await?;
        connection.begin().await?;
        // Nobody settles or reserves until the sum is stored.
        connection
            .query("LOCK TABLE spend IN SHARE ROW EXCLUSIVE MODE", &[])
            .await?;
        let forget = "DELETE FROM spend WHERE kind = 'service'";
        connection.write(forget, &[]).await?;
        if is_tracked {
            connection.write(TRACK_SERVICE, &[]).await?;
        }
        connection.commit().await
    }
}
