//! What calls used and cost: sums for a user.

use std::sync::Arc;

use crate::domain::{Timestamp, UsageGroups, UsageSum, UserId};
use crate::error::Error;
use crate::store::{UsageFilter, UsageStore};

/// The most days that are summed up at once: more than a year has.
pub const MOST_DAYS: i64 = 400;
/// The days that are summed up if nothing else is asked for.
pub const USUAL_DAYS: i64 = 30;
/// The most sums in one response.
pub const MOST_SUMS: usize = 10_000;

/// The use cases of usage.
#[derive(Clone)]
pub struct Usages {
    /// Has the sums.
    pub store: Arc<dyn UsageStore>,
}

/// The days and groups that are asked for.
#[derive(Clone, Copy, Debug)]
pub struct UsageQuestion {
    /// The first day; `None` is such that there are [`USUAL_DAYS`] days.
    pub from: Option<i64>,
    /// The last day; `None` is today.
    pub to: Option<i64>,
    /// By what sums are told apart.
    pub groups: UsageGroups,
}

/// The sums, and the days that they are of.
#[derive(Clone, Debug)]
pub struct UsageAnswer {
    /// The first day.
    pub from: i64,
    /// The last day.
    pub to: i64,
    /// The sums.
    pub sums: Vec<UsageSum>,
}

impl Usages {
    /// The sums of a user's usage.
    ///
    /// # Errors
    /// `InvalidFields` if the days are in no order or too many, or there are too many sums; those
    /// of the store.
    pub async fn of_user(
        &self,
        user_id: UserId,
        question: UsageQuestion,
        now: Timestamp,
    ) -> Result<UsageAnswer, Error> {
        let to = question.to.unwrap_or_else(|| now.unix_day());
        let usual = to.saturating_sub(USUAL_DAYS - 1).max(0);
        let from = question.from.unwrap_or(usual);
        if from > to {
            return Err(Error::field("from", "The first day is after the last one."));
        }
        if to - from >= MOST_DAYS {
            let message = format!("At most {MOST_DAYS} days can be summed up at once.");
            return Err(Error::field("from", message));
        }
        let filter = UsageFilter {
            user_id: Some(user_id),
            from,
            to,
        };
        let sums = self.store.usage(filter, question.groups, MOST_SUMS + 1);
        let sums = sums.await?;
        if sums.len() > MOST_SUMS {
            let message =
                format!("There are more than {MOST_SUMS} sums. Ask for fewer days or groups.");
            return Err(Error::field("group_by", message));
        }
        Ok(UsageAnswer { from, to, sums })
    }
}
