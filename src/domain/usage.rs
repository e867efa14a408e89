//! What calls of upstreams use and cost.

use std::sync::Arc;

use super::{ApiKeyId, Budget, Picodollars, PromptId, PromptSource, Timestamp, UserId};

/// The tokens of one attempt, in kinds that do not overlap: each token is in exactly one of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TokenUsage {
    /// Of the input, those that were neither read from the upstream's cache nor written to it.
    pub input: u64,
    /// Of the input, those that were read from the upstream's cache.
    pub cache_read: u64,
    /// Of the input, those that were written to the upstream's cache.
    pub cache_write: u64,
    /// Of the output, those that the answer shows.
    pub output: u64,
    /// Of the output, those of the model's reasoning.
    pub reasoning: u64,
}

impl TokenUsage {
    /// The most tokens of a kind that one attempt can have: a thousand times what any model takes.
    /// A greater figure is a mistake, and would spoil the sums that it is added to.
    pub const MOST: u64 = 1_000_000_000;

    /// All tokens of the input.
    pub fn total_input(&self) -> u64 {
        self.input
            .saturating_add(self.cache_read)
            .saturating_add(self.cache_write)
    }

    fn add(&mut self, other: Self) {
        for (sum, tokens) in [
            (&mut self.input, other.input),
            (&mut self.cache_read, other.cache_read),
            (&mut self.cache_write, other.cache_write),
            (&mut self.output, other.output),
            (&mut self.reasoning, other.reasoning),
        ] {
            *sum = sum.saturating_add(tokens);
        }
    }

    /// All tokens of the output.
    pub fn total_output(&self) -> u64 {
        self.output.saturating_add(self.reasoning)
    }
}

/// How an attempt ended, as far as its cost is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum UsageOutcome {
    /// The upstream answered.
    Answered,
    /// The upstream failed after it may have done work that costs.
    Failed,
    /// The caller left, and such calls are cancelled.
    Cancelled,
    /// The process that ran the call ended. What the upstream did is not known.
    Interrupted,
}

impl UsageOutcome {
    const ALL: [Self; 4] = [
        Self::Answered,
        Self::Failed,
        Self::Cancelled,
        Self::Interrupted,
    ];

    /// The word used in the store and for operators.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Interrupted => "interrupted",
        }
    }

    /// The outcome behind a stored word; `None` for any other word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|outcome| outcome.as_str() == word)
    }
}

/// What one attempt at an upstream used and cost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsageEntry {
    /// The name of the upstream; empty where it is not known.
    pub upstream: String,
    /// The model that was asked for.
    pub model_asked: String,
    /// The model that answered; where none did, the one that was asked for.
    pub model: String,
    /// The tokens; `None` where the upstream has not said them and nothing was counted.
    pub tokens: Option<TokenUsage>,
    /// The cost; `None` where no price is known, or no tokens.
    pub cost: Option<Picodollars>,
    /// The table of the price.
    pub price_version: Option<Arc<str>>,
    /// How the attempt ended.
    pub outcome: UsageOutcome,
    /// Whether tokens and cost were counted from above, because the upstream has not said them.
    pub is_estimated: bool,
}

impl UsageEntry {
    /// The entry of a call whose process ended.
    pub fn interrupted(model: impl Into<String>) -> Self {
        let model = model.into();
        Self {
            upstream: String::new(),
            model_asked: model.clone(),
            model,
            tokens: None,
            cost: None,
            price_version: None,
            outcome: UsageOutcome::Interrupted,
            is_estimated: false,
        }
    }
}

/// An attempt and the call that it belongs to: one row of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsageRecord {
    /// Positive, increasing, never reused.
    pub id: i64,
    /// Whose call it was.
    pub user_id: UserId,
    /// The key with which it was made, if any.
    pub api_key_id: Option<ApiKeyId>,
    /// The prompt, which may be deleted.
    pub prompt_id: PromptId,
    /// The front door.
    pub source: PromptSource,
    /// When the call began.
    pub begun_at: Timestamp,
    /// What the attempt used and cost.
    pub entry: UsageEntry,
}

/// What the calls of one day used and cost: of one user, made with one key or none, at one model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsageDay {
    /// Whose calls they were.
    pub user_id: UserId,
    /// On which they began, counted from 1970-01-01 UTC.
    pub day: i64,
    /// The key with which they were made, if any.
    pub api_key_id: Option<ApiKeyId>,
    /// The model that answered.
    pub model: String,
    /// The sums.
    pub totals: UsageTotals,
}

/// Sums over attempts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UsageTotals {
    /// How many attempts.
    pub attempts: u64,
    /// Their tokens, as far as they are known.
    pub tokens: TokenUsage,
    /// Their cost, as far as it is known.
    pub cost: Picodollars,
    /// Attempts whose cost is not known.
    pub unpriced: u64,
}

impl std::ops::AddAssign for UsageTotals {
    fn add_assign(&mut self, other: Self) {
        self.tokens.add(other.tokens);
        self.attempts += other.attempts;
        self.unpriced += other.unpriced;
        self.cost = Picodollars(self.cost.0.saturating_add(other.cost.0));
    }
}

impl UsageTotals {
    /// Adds an attempt.
    pub fn add(&mut self, entry: &UsageEntry) {
        *self += Self {
            attempts: 1,
            tokens: entry.tokens.unwrap_or_default(),
            cost: entry.cost.unwrap_or_default(),
            unpriced: u64::from(entry.cost.is_none()),
        };
    }
}

/// By what sums of usage are told apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UsageGroups {
    /// By day.
    pub by_day: bool,
    /// By user.
    pub by_user: bool,
    /// By key.
    pub by_key: bool,
    /// By model.
    pub by_model: bool,
}

/// The sums of one group. What the groups are not told apart by is `None`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UsageSum {
    /// The day, counted from 1970-01-01 UTC.
    pub day: Option<i64>,
    /// Whose calls.
    pub user_id: Option<UserId>,
    /// The key: the inner `None` stands for calls without one.
    pub api_key_id: Option<Option<ApiKeyId>>,
    /// The model that answered.
    pub model: Option<String>,
    /// The sums.
    pub totals: UsageTotals,
}

/// Whose budget it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Subject {
    /// All calls together.
    Service,
    /// A user's calls.
    User(UserId),
    /// The calls that are made with a key.
    Key(ApiKeyId),
}

impl Subject {
    /// The word for its kind, in the store.
    pub fn kind(self) -> &'static str {
        match self {
            Self::Service => "service",
            Self::User(_) => "user",
            Self::Key(_) => "key",
        }
    }

    /// Its id as text; empty for the service.
    pub fn id(self) -> String {
        match self {
            Self::Service => String::new(),
            Self::User(id) => id.to_string(),
            Self::Key(id) => id.to_string(),
        }
    }
}

/// What the calls of a subject have cost, and what those that run may still cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spend {
    /// The cost of the calls that have ended.
    pub settled: Picodollars,
    /// The most that the calls that run can cost, as far as a budget was in force when they began.
    pub reserved: Picodollars,
}

/// The budget of a user, as it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UserBudget {
    /// The user.
    pub user_id: UserId,
    /// The budget.
    pub budget: Budget,
}

/// The day of that text, such as `2026-11-30`, counted from 1970-01-01. `None` for any other text.
pub fn parse_day(text: &str) -> Option<i64> {
    if text.len() != 10 {
        return None;
    }
    let midnight = Timestamp::parse_rfc3339(&format!("{text}T00:00:00Z"))?;
    let day = midnight.unix_day();
    (day_text(day) == text).then_some(day)
}

/// A day counted from 1970-01-01, as text such as `2026-11-30`.
pub fn day_text(day: i64) -> String {
    let mut text = Timestamp::from_unix_day(day).to_string();
    text.truncate(text.find('T').unwrap_or(text.len()));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_read_and_written() {
        for (text, day) in [
            ("1970-01-01", 0),
            ("2026-11-30", 20_787),
            ("2028-02-29", 21_243),
        ] {
            assert_eq!(parse_day(text), Some(day), "{text}");
            assert_eq!(day_text(day), text);
        }
        for text in [
            "",
            "2026-11-31",
            "2026-1-1",
            "20261130",
            "2026-11-30T",
            "1969-12-31",
            "yesterday!",
        ] {
            assert_eq!(parse_day(text), None, "{text}");
        }
    }
}
