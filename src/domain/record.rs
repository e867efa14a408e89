//! Whole rows of a store, as they move from one place to another.

use std::fmt;

use half::f16;

use super::{
    ApiKey, ApiKeyId, ChatTexts, FailureCode, ModelId, Prompt, PromptId, PromptStatus, Timestamp,
    UsageDay, UsageRecord, User, UserBudget, UserId,
};

/// A row of a store, with its id or its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// An account.
    User(User),
    /// A prompt, with its vector.
    Prompt(PromptRecord),
    /// An idempotency key.
    Key(KeyRecord),
    /// A day's count of calls of the upstream.
    UpstreamDay(UpstreamDay),
    /// A browser session.
    Session(Session),
    /// A refresh token that was revoked.
    RevokedToken(RevokedToken),
    /// An API key.
    ApiKey(ApiKeyRecord),
    /// What an attempt at an upstream used and cost.
    Usage(UsageRecord),
    /// The sums of a day's usage.
    UsageDay(UsageDay),
    /// The budget of a user.
    UserBudget(UserBudget),
}

/// A kind of row, and the key after which its rows are read; `None` is before the first row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecordCursor {
    /// Accounts, by rising id.
    Users(Option<UserId>),
    /// Prompts of all users, by rising id.
    Prompts(Option<PromptId>),
    /// Idempotency keys, by rising user and hash.
    Keys(Option<(UserId, [u8; 32])>),
    /// Counts of calls, by rising day.
    UpstreamDays(Option<i64>),
    /// Sessions, by rising hash.
    Sessions(Option<[u8; 32]>),
    /// Revoked tokens, by rising bytes of the `jti`.
    RevokedTokens(Option<String>),
    /// API keys, by rising bytes of the id.
    ApiKeys(Option<ApiKeyId>),
    /// Usage, by rising id.
    Usage(Option<i64>),
    /// Sums of usage, by rising user, day, key and model.
    UsageDays(Option<(UserId, i64, Option<ApiKeyId>, String)>),
    /// Budgets, by rising user.
    UserBudgets(Option<UserId>),
}

impl RecordCursor {
    /// Before the first row of each kind. A row refers only to rows of the kinds before its own.
    pub const STARTS: [Self; 10] = [
        Self::Users(None),
        Self::Prompts(None),
        Self::Keys(None),
        Self::UpstreamDays(None),
        Self::Sessions(None),
        Self::RevokedTokens(None),
        Self::ApiKeys(None),
        Self::Usage(None),
        Self::UsageDays(None),
        Self::UserBudgets(None),
    ];
}

impl Record {
    /// The id of an account or a prompt; other rows have none.
    pub fn id(&self) -> Option<i64> {
        match self {
            Self::User(user) => Some(user.id.0),
            Self::Prompt(record) => Some(record.prompt.id.0),
            Self::Key(_)
            | Self::UpstreamDay(_)
            | Self::Session(_)
            | Self::RevokedToken(_)
            | Self::ApiKey(_)
            | Self::Usage(_)
            | Self::UsageDay(_)
            | Self::UserBudget(_) => None,
        }
    }

    /// The cursor of the rows after this one.
    pub fn cursor(&self) -> RecordCursor {
        match self {
            Self::User(user) => RecordCursor::Users(Some(user.id)),
            Self::Prompt(record) => RecordCursor::Prompts(Some(record.prompt.id)),
            Self::Key(key) => RecordCursor::Keys(Some((key.user_id, key.key_hash))),
            Self::UpstreamDay(day) => RecordCursor::UpstreamDays(Some(day.day)),
            Self::Session(session) => RecordCursor::Sessions(Some(session.token_hash)),
            Self::RevokedToken(token) => RecordCursor::RevokedTokens(Some(token.jti.clone())),
            Self::ApiKey(record) => RecordCursor::ApiKeys(Some(record.key.id)),
            Self::Usage(record) => RecordCursor::Usage(Some(record.id)),
            Self::UsageDay(day) => RecordCursor::UsageDays(Some((
                day.user_id,
                day.day,
                day.api_key_id,
                day.model.clone(),
            ))),
            Self::UserBudget(budget) => RecordCursor::UserBudgets(Some(budget.user_id)),
        }
    }
}

/// A vector in its stored form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VectorRecord {
    /// The model that made it.
    pub model: ModelId,
    /// `[dimension]` IEEE 754 half-precision numbers, little-endian, 2 bytes each.
    pub f16_bytes: Vec<u8>,
}

impl VectorRecord {
    /// Whether these are `dimension` numbers of unit length, as far as half precision shows it.
    pub fn is_unit(&self, dimension: usize) -> bool {
        let (halves, rest) = self.f16_bytes.as_chunks::<2>();
        let square = |half: &[u8; 2]| f16::from_le_bytes(*half).to_f32().powi(2);
        let square: f32 = halves.iter().map(square).sum();
        halves.len() == dimension && rest.is_empty() && (square - 1.0).abs() < 0.01
    }
}

/// Everything that is kept of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptRecord {
    /// What its owner sees of it.
    pub prompt: Prompt,
    /// Its vector, if it has one; only a completed prompt has.
    pub vector: Option<VectorRecord>,
    /// What is kept of it besides, if it came in a chat call.
    pub chat: Option<ChatTexts>,
}

impl PromptRecord {
    /// Replaces NUL in the upstream's words, so that every store can keep them. The prompt itself
    /// has no NUL: a post with one is refused.
    pub fn replace_nul(&mut self) {
        let words = self.prompt.response.iter_mut();
        let words = words.chain([&mut self.prompt.model]);
        for text in words.chain(&mut self.prompt.call.finish_reason) {
            *text = without_nul(std::mem::take(text));
        }
    }

    /// Ends a running call as the next server would end it: no process works on it any more.
    pub fn interrupt(&mut self) {
        if self.prompt.status == PromptStatus::Running {
            self.prompt.status = PromptStatus::Failed;
            self.prompt.error = Some(FailureCode::Interrupted);
        }
    }
}

/// The text with U+FFFD in place of NUL, which PostgreSQL cannot keep.
pub fn without_nul(text: String) -> String {
    if text.contains('\0') {
        text.replace('\0', "\u{fffd}")
    } else {
        text
    }
}

/// An idempotency key as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRecord {
    /// The user who sent it.
    pub user_id: UserId,
    /// SHA-256 of the key.
    pub key_hash: [u8; 32],
    /// SHA-256 of what its request meant.
    pub fingerprint: [u8; 32],
    /// The prompt behind it, which may be deleted.
    pub prompt_id: PromptId,
    /// When it was claimed, or last taken over.
    pub claimed_at: Timestamp,
}

/// The calls of the upstream that were counted on a day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UpstreamDay {
    /// Days since 1970-01-01 UTC.
    pub day: i64,
    /// How many; not negative.
    pub calls: i64,
}

/// A browser session. The cookie's secret is kept as its SHA-256 only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// SHA-256 of the cookie's 32 random bytes.
    pub token_hash: [u8; 32],
    /// The user whose session it is.
    pub user_id: UserId,
    /// When it was made.
    pub created_at: Timestamp,
    /// From this instant on it no longer counts.
    pub expires_at: Timestamp,
}

/// A refresh token that is refused before its time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RevokedToken {
    /// The token's `jti` claim, at most 255 bytes.
    pub jti: String,
    /// The token's `exp` claim: remembered until then.
    pub expires_at: Timestamp,
}

/// An API key as the store keeps it. Its `Debug` form hides the hashes.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKeyRecord {
    /// What its user sees of it.
    pub key: ApiKey,
    /// SHA-256 of the whole text of the key.
    pub key_hash: [u8; 32],
    /// What the key was before its last rotation, if that may still be used.
    pub previous: Option<PreviousSecret>,
    /// When it was revoked; `None`: it was not.
    pub revoked_at: Option<Timestamp>,
}

/// The text of an API key before its last rotation.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PreviousSecret {
    /// SHA-256 of the text.
    pub key_hash: [u8; 32],
    /// From this instant on it is refused.
    pub until: Timestamp,
}

impl fmt::Debug for ApiKeyRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiKeyRecord")
            .field("key", &self.key)
            .field(
                "previous_until",
                &self.previous.map(|previous| previous.until),
            )
            .field("revoked_at", &self.revoked_at)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for PreviousSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PreviousSecret")
            .field("until", &self.until)
            .finish_non_exhaustive()
    }
}

/// The highest ids that were ever given out; 0 where none was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LastIds {
    /// Among accounts.
    pub user: UserId,
    /// Among prompts.
    pub prompt: PromptId,
}

impl LastIds {
    /// The highest id of the cursor's kind; `None` for a kind without ids.
    pub fn of(self, kind: &RecordCursor) -> Option<i64> {
        match kind {
            RecordCursor::Users(_) => Some(self.user.0),
            RecordCursor::Prompts(_) => Some(self.prompt.0),
            RecordCursor::Keys(_)
            | RecordCursor::UpstreamDays(_)
            | RecordCursor::Sessions(_)
            | RecordCursor::RevokedTokens(_)
            | RecordCursor::ApiKeys(_)
            | RecordCursor::Usage(_)
            | RecordCursor::UsageDays(_)
            | RecordCursor::UserBudgets(_) => None,
        }
    }

    /// No id was given out yet.
    pub const NONE: Self = Self {
        user: UserId(0),
        prompt: PromptId(0),
    };
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::domain::Embedding;

    fn record(numbers: &[f32]) -> VectorRecord {
        VectorRecord {
            model: ModelId(Arc::from("a")),
            f16_bytes: Embedding(numbers.into()).to_f16_bytes(),
        }
    }

    #[test]
    fn unit_vector_is_recognised() {
        assert!(record(&[0.6, -0.8]).is_unit(2));
        assert!(!record(&[0.6, -0.8]).is_unit(3));
        assert!(!record(&[0.6, 0.6]).is_unit(2));
        assert!(!record(&[0.0, 0.0]).is_unit(2));
        assert!(!record(&[f32::NAN, 1.0]).is_unit(2));
        assert!(!record(&[f32::INFINITY, 1.0]).is_unit(2));
        let mut odd = record(&[0.6, -0.8]);
        odd.f16_bytes.push(0);
        assert!(!odd.is_unit(2));
    }
}
