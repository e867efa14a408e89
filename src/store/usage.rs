//! What calls used and cost, and the budgets that bound them.
//!
//! Rows of usage are written by the transaction that ends a call ([`CallStore`](super::CallStore)),
//! together with the sums of their day and with what budgets are checked against. The three are
//! never apart.

use async_trait::async_trait;

use super::Error;
use crate::domain::{Budget, Picodollars, Spend, Subject, UsageGroups, UsageSum, UserId};

/// The day under which [`Spend`] keeps the sum of all days.
pub(super) const ALL_DAYS: i64 = -1;

/// [`MOST_SPENT`], for the text of statements.
macro_rules! most_spent {
    () => {
        9_000_000_000_000_000_000
    };
}
pub(super) use most_spent;

/// The largest sum of costs, in picodollars: nine million US dollars, nine times the largest
/// budget. A sum that would be larger stays at it. Without a bound, one row with an absurd price
/// would make each later sum of its user fail, and with it each call and each listing.
///
/// Reservations have no bound, because what was added has to be taken away again exactly. Each fits
/// into a budget, so ten of the largest would be needed to leave the range of a column; then the
/// last one fails, and nothing else does.
pub(super) const MOST_SPENT: i64 = most_spent!();

/// What a call may cost, and the budgets that it has to fit into beside its user's, which the store
/// knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CallBudgets {
    /// The most that the call can cost; `None` if that is not known.
    pub most_cost: Option<Picodollars>,
    /// The budget of the key with which it is made.
    pub key: Option<Budget>,
    /// The budget of the service.
    pub service: Option<Budget>,
}

/// Which usage is summed up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsageFilter {
    /// Whose; `None` is everybody's.
    pub user_id: Option<UserId>,
    /// The first day, counted from 1970-01-01 UTC.
    pub from: i64,
    /// The last day.
    pub to: i64,
}

/// Usage and budgets. Each method is one transaction, as with the other traits of the store.
#[async_trait]
pub trait UsageStore: Send + Sync {
    /// The sums of the usage that the filter selects, up to `limit` groups, by rising day, user,
    /// key and model. Calls without a key come before the keys.
    async fn usage(
        &self,
        filter: UsageFilter,
        groups: UsageGroups,
        limit: usize,
    ) -> Result<Vec<UsageSum>, Error>;

    /// The budget of a user; `None` if there is none.
    async fn user_budget(&self, user_id: UserId) -> Result<Option<Budget>, Error>;

    /// Gives a user a budget, or takes it away. It holds for calls that begin afterwards, and
    /// counts what was spent in its period before. `false` if there is no such account.
    async fn set_user_budget(&self, user_id: UserId, budget: Option<Budget>)
    -> Result<bool, Error>;

    /// What a subject has spent and reserved from `first_day` on; with a day before 1970, in all.
    /// Of the service it is nothing while it is not tracked.
    async fn spend(&self, subject: Subject, first_day: i64) -> Result<Spend, Error>;

    /// Begins to keep what the whole service spends, or stops. At the beginning it is the sum of
    /// what all users spend. It is kept only while the service has a budget, because otherwise all
    /// calls would wait for each other to change one row.
    async fn track_service(&self, is_tracked: bool) -> Result<(), Error>;
}

/// The first and the last day of rows of spend that make up what is spent from `first_day` on.
pub(super) fn days_from(first_day: i64) -> (i64, i64) {
    if first_day < 0 {
        (ALL_DAYS, ALL_DAYS)
    } else {
        (first_day, i64::MAX)
    }
}

/// The sums by group, the same text for both backends except the sum of the cost. SQLite takes `$1`
/// for a name, and binds names in the order in which they first stand in the text. One user's sums
/// are a statement of their own: only without a "whoever it is" does SQLite search the index.
macro_rules! usage_sums {
    ($cost:expr, of one user) => {
        usage_sums!($cost, "user_id = $5 AND day BETWEEN $6 AND $7", "$8")
    };
    ($cost:expr, of all) => {
        usage_sums!($cost, "day BETWEEN $5 AND $6", "$7")
    };
    ($cost:expr, $which:literal, $limit:literal) => {
        concat!(
            "SELECT CASE WHEN CAST($1 AS boolean) THEN day END AS day,
           CASE WHEN CAST($2 AS boolean) THEN user_id END AS user_id,
           CASE WHEN CAST($3 AS boolean) THEN api_key_id END AS api_key_id,
           CASE WHEN CAST($4 AS boolean) THEN model END AS model,
           CAST(sum(attempts) AS bigint) AS attempts,
           CAST(sum(input) AS bigint) AS input,
           CAST(sum(cache_read) AS bigint) AS cache_read,
           CAST(sum(cache_write) AS bigint) AS cache_write,
           CAST(sum(output) AS bigint) AS output,
           CAST(sum(reasoning) AS bigint) AS reasoning,
           ",
            $cost,
            " AS cost,
           CAST(sum(unpriced) AS bigint) AS unpriced
    FROM usage_day
    WHERE ",
            $which,
            " GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4 LIMIT ",
            $limit
        )
    };
}
pub(super) use usage_sums;
