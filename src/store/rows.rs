//! Rows as both backends read them: their columns have the same names and meanings.

use super::{ChatCall, Error, ExpiredCall, KeyClaim, KeyState, Unembedded};
use crate::domain::{
    ApiKey, ApiKeyId, ApiKeyRecord, Budget, CallDetails, ChatTexts, FailureCode, KeyRecord,
    LastIds, Period, Picodollars, PreviousSecret, Prompt, PromptId, PromptSource, PromptStatus,
    Record, RevokedToken, Scopes, Session, Spend, Timestamp, TokenUsage, UpstreamDay, UsageDay,
    UsageEntry, UsageOutcome, UsageRecord, UsageSum, UsageTotals, User, UserBudget, UserId,
};

/// A stored or given value that this program must never have stored or passed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Defect {
    /// A stored value that this program cannot have written.
    #[error("a stored value is not one of its column's")]
    UnknownValue,
    /// A vector of another dimension than those of its model.
    #[error("a vector of {given} numbers where the model's have {expected}")]
    Dimension {
        /// Of the vector.
        given: usize,
        /// Of the model's others.
        expected: usize,
    },
    /// A defect of this program.
    #[error("the operation panicked")]
    Panicked,
}

impl From<Defect> for Error {
    fn from(defect: Defect) -> Self {
        Self::Internal(Box::new(defect))
    }
}

/// A row with columns of the type `T`.
pub(super) trait Column<T> {
    /// The value of the column of that name.
    fn read(&self, column: &str) -> Result<T, Error>;
}

/// A row of either backend.
pub(super) trait StoredRow:
    Column<i64>
    + Column<bool>
    + Column<String>
    + Column<Vec<u8>>
    + Column<Option<i64>>
    + Column<Option<Vec<u8>>>
    + Column<Option<String>>
{
}

/// Reads the columns of [`account_columns`](super::account_columns).
pub(super) fn user(row: &dyn StoredRow) -> Result<User, Error> {
    Ok(User {
        id: UserId(row.read("id")?),
        username: row.read("username")?,
        email: row.read("email")?,
        password_hash: row.read("password_hash")?,
        is_active: row.read("is_active")?,
        tokens_valid_from: Timestamp(row.read("tokens_valid_from")?),
        created_at: Timestamp(row.read("created_at")?),
    })
}

/// Reads the columns of [`prompt_columns`](super::prompt_columns).
pub(super) fn prompt(row: &dyn StoredRow) -> Result<Prompt, Error> {
    let error: Option<String> = row.read("error")?;
    let number = |column| -> Result<Option<u32>, Error> {
        let number: Option<i64> = row.read(column)?;
        let number = number.map(u32::try_from).transpose();
        Ok(number.map_err(|_| Defect::UnknownValue)?)
    };
    Ok(Prompt {
        id: PromptId(row.read("id")?),
        user_id: UserId(row.read("user_id")?),
        created_at: Timestamp(row.read("created_at")?),
        status: status(row.read("status")?)?,
        error: error
            .map(|word| FailureCode::parse(&word).ok_or(Defect::UnknownValue))
            .transpose()?,
        model: row.read("model")?,
        source: source(row.read("source")?)?,
        prompt: row.read("prompt")?,
        response: row.read("response")?,
        call: CallDetails {
            duration_ms: number("llm_duration_ms")?,
            prompt_tokens: number("prompt_tokens")?,
            completion_tokens: number("completion_tokens")?,
            finish_reason: row.read("finish_reason")?,
            cost: row
                .read("cost")
                .map(|cost: Option<i64>| cost.map(Picodollars))?,
        },
    })
}

/// The status behind a stored word.
fn status(word: String) -> Result<PromptStatus, Defect> {
    PromptStatus::parse(&word).ok_or(Defect::UnknownValue)
}

/// A SHA-256, where there is one.
fn optional_hash(row: &dyn StoredRow, column: &str) -> Result<Option<[u8; 32]>, Error> {
    let bytes: Option<Vec<u8>> = row.read(column)?;
    let hash = bytes.map(<[u8; 32]>::try_from).transpose();
    Ok(hash.map_err(|_| Defect::UnknownValue)?)
}

/// The source behind a stored word.
fn source(word: String) -> Result<PromptSource, Defect> {
    PromptSource::parse(&word).ok_or(Defect::UnknownValue)
}

/// Reads the columns of [`chat_columns`](super::chats::chat_columns).
pub(super) fn chat_texts(row: &dyn StoredRow) -> Result<ChatTexts, Error> {
    Ok(ChatTexts {
        messages: row.read("messages")?,
        request: row.read("request")?,
        metadata: row.read("metadata")?,
        answer: row.read("answer")?,
    })
}

pub(super) fn chat_call(row: &dyn StoredRow) -> Result<ChatCall, Error> {
    Ok(ChatCall {
        prompt: prompt(row)?,
        texts: chat_texts(row)?,
    })
}

/// The texts of a chat call, or `None` where the prompt is of no chat call.
pub(super) fn chat_texts_if_any(row: &dyn StoredRow) -> Result<Option<ChatTexts>, Error> {
    let messages: Option<String> = row.read("messages")?;
    messages.map(|_| chat_texts(row)).transpose()
}

/// A SHA-256.
fn hash(row: &dyn StoredRow, column: &str) -> Result<[u8; 32], Error> {
    let bytes: Vec<u8> = row.read(column)?;
    Ok(bytes.try_into().map_err(|_| Defect::UnknownValue)?)
}

/// The state of a key for a request that claims it.
pub(super) fn key_state(row: &dyn StoredRow, claim: &KeyClaim) -> Result<KeyState, Error> {
    let (fingerprint, id) = (hash(row, "fingerprint")?, row.read("prompt_id")?);
    let word: Option<String> = row.read("status")?;
    let status = word.map(status).transpose()?;
    Ok(claim.state(fingerprint, PromptId(id), status, row.read("is_leased")?))
}

/// A call that runs, or has just ended: what its rows of usage take from it.
pub(super) struct RunningCall {
    pub prompt_id: PromptId,
    /// `None` for a call that an earlier version of this program has begun: it is not metered.
    pub user_id: Option<UserId>,
    pub api_key_id: Option<String>,
    pub source: String,
    /// The model that was asked first.
    pub model: String,
    pub begun_at: Timestamp,
    /// In picodollars.
    pub reserved: i64,
}

/// The columns of a running call that [`running_call`] reads.
macro_rules! running_call_columns {
    () => {
        "prompt_id, user_id, api_key_id, source, model, begun_at, reserved"
    };
}
pub(super) use running_call_columns;

pub(super) fn running_call(row: &dyn StoredRow) -> Result<RunningCall, Error> {
    let user_id: Option<i64> = row.read("user_id")?;
    Ok(RunningCall {
        prompt_id: PromptId(row.read("prompt_id")?),
        user_id: user_id.map(UserId),
        api_key_id: row.read("api_key_id")?,
        source: row.read("source")?,
        model: row.read("model")?,
        begun_at: Timestamp(row.read("begun_at")?),
        reserved: row.read("reserved")?,
    })
}

pub(super) fn spend(row: &dyn StoredRow) -> Result<Spend, Error> {
    Ok(Spend {
        settled: Picodollars(row.read("settled")?),
        reserved: Picodollars(row.read("reserved")?),
    })
}

pub(super) fn budget(row: &dyn StoredRow) -> Result<Budget, Error> {
    let period: String = row.read("period")?;
    Ok(Budget {
        amount: Picodollars(row.read("amount")?),
        period: Period::parse(&period).ok_or(Defect::UnknownValue)?,
    })
}

/// A count, which is never negative.
fn count(row: &dyn StoredRow, column: &str) -> Result<u64, Error> {
    let number: i64 = row.read(column)?;
    Ok(u64::try_from(number).map_err(|_| Defect::UnknownValue)?)
}

/// A stored key's id; the empty text stands for none.
fn api_key_id(text: Option<String>) -> Result<Option<ApiKeyId>, Error> {
    match text.as_deref() {
        None | Some("") => Ok(None),
        Some(id) => Ok(Some(ApiKeyId::parse(id).ok_or(Defect::UnknownValue)?)),
    }
}

fn usage_totals(row: &dyn StoredRow) -> Result<UsageTotals, Error> {
    Ok(UsageTotals {
        attempts: count(row, "attempts")?,
        tokens: TokenUsage {
            input: count(row, "input")?,
            cache_read: count(row, "cache_read")?,
            cache_write: count(row, "cache_write")?,
            output: count(row, "output")?,
            reasoning: count(row, "reasoning")?,
        },
        cost: Picodollars(row.read("cost")?),
        unpriced: count(row, "unpriced")?,
    })
}

pub(super) fn usage_sum(row: &dyn StoredRow) -> Result<UsageSum, Error> {
    let user_id: Option<i64> = row.read("user_id")?;
    let key: Option<String> = row.read("api_key_id")?;
    Ok(UsageSum {
        day: row.read("day")?,
        user_id: user_id.map(UserId),
        api_key_id: key.map(|id| api_key_id(Some(id))).transpose()?,
        model: row.read("model")?,
        totals: usage_totals(row)?,
    })
}

pub(super) fn usage_day_record(row: &dyn StoredRow) -> Result<Record, Error> {
    Ok(Record::UsageDay(UsageDay {
        user_id: UserId(row.read("user_id")?),
        day: row.read("day")?,
        api_key_id: api_key_id(row.read("api_key_id")?)?,
        model: row.read("model")?,
        totals: usage_totals(row)?,
    }))
}

pub(super) fn user_budget_record(row: &dyn StoredRow) -> Result<Record, Error> {
    Ok(Record::UserBudget(UserBudget {
        user_id: UserId(row.read("user_id")?),
        budget: budget(row)?,
    }))
}

pub(super) fn usage_record(row: &dyn StoredRow) -> Result<Record, Error> {
    let outcome: String = row.read("outcome")?;
    let cost: Option<i64> = row.read("cost")?;
    let version: Option<String> = row.read("price_version")?;
    // The kinds are known together or not at all.
    let is_known: Option<i64> = row.read("input")?;
    let tokens = is_known.map(|_| -> Result<_, Error> {
        Ok(TokenUsage {
            input: count(row, "input")?,
            cache_read: count(row, "cache_read")?,
            cache_write: count(row, "cache_write")?,
            output: count(row, "output")?,
            reasoning: count(row, "reasoning")?,
        })
    });
    Ok(Record::Usage(UsageRecord {
        id: row.read("id")?,
        user_id: UserId(row.read("user_id")?),
        api_key_id: api_key_id(row.read("api_key_id")?)?,
        prompt_id: PromptId(row.read("prompt_id")?),
        source: source(row.read("source")?)?,
        begun_at: Timestamp(row.read("begun_at")?),
        entry: UsageEntry {
            upstream: row.read("upstream")?,
            model_asked: row.read("model_asked")?,
            model: row.read("model")?,
            tokens: tokens.transpose()?,
            cost: cost.map(Picodollars),
            price_version: version.map(Into::into),
            outcome: UsageOutcome::parse(&outcome).ok_or(Defect::UnknownValue)?,
            is_estimated: row.read("is_estimated")?,
        },
    }))
}

pub(super) fn expired_call(row: &dyn StoredRow) -> Result<ExpiredCall, Error> {
    Ok(ExpiredCall {
        prompt: prompt(row)?,
        announce: row.read("announce")?,
    })
}

pub(super) fn unembedded(row: &dyn StoredRow) -> Result<Unembedded, Error> {
    Ok(Unembedded {
        id: PromptId(row.read("id")?),
        user_id: UserId(row.read("user_id")?),
        prompt: row.read("prompt")?,
    })
}

pub(super) fn session(row: &dyn StoredRow) -> Result<Session, Error> {
    Ok(Session {
        token_hash: hash(row, "token_hash")?,
        user_id: UserId(row.read("user_id")?),
        created_at: Timestamp(row.read("created_at")?),
        expires_at: Timestamp(row.read("expires_at")?),
    })
}

/// Reads the columns of [`api_key_columns`](super::api_keys::api_key_columns).
pub(super) fn api_key(row: &dyn StoredRow) -> Result<ApiKeyRecord, Error> {
    let id: String = row.read("id")?;
    let scopes: String = row.read("scopes")?;
    let models: String = row.read("models")?;
    let rates: Option<String> = row.read("rates")?;
    let rates = rates.map(|rates| rates.parse()).transpose();
    let amount: Option<i64> = row.read("budget")?;
    let word: Option<String> = row.read("budget_period")?;
    let period = word.map(|word| Period::parse(&word).ok_or(Defect::UnknownValue));
    let previous_until: Option<i64> = row.read("previous_until")?;
    let time = |column| -> Result<Option<Timestamp>, Error> {
        let time: Option<i64> = row.read(column)?;
        Ok(time.map(Timestamp))
    };
    Ok(ApiKeyRecord {
        key: ApiKey {
            id: ApiKeyId::parse(&id).ok_or(Defect::UnknownValue)?,
            user_id: UserId(row.read("user_id")?),
            name: row.read("name")?,
            scopes: Scopes::parse(scopes.split(',')).map_err(|_| Defect::UnknownValue)?,
            models: models.lines().map(str::to_owned).collect(),
            rates: rates.map_err(|_| Defect::UnknownValue)?,
            budget: amount
                .zip(period.transpose()?)
                .map(|(amount, period)| Budget {
                    amount: Picodollars(amount),
                    period,
                }),
            expires_at: time("expires_at")?,
            created_at: Timestamp(row.read("created_at")?),
            last_used_at: time("last_used_at")?,
            last_four: row.read("last_four")?,
        },
        key_hash: hash(row, "key_hash")?,
        previous: optional_hash(row, "previous_hash")?
            .zip(previous_until)
            .map(|(key_hash, until)| PreviousSecret {
                key_hash,
                until: Timestamp(until),
            }),
        revoked_at: time("revoked_at")?,
    })
}

pub(super) fn api_key_record(row: &dyn StoredRow) -> Result<Record, Error> {
    api_key(row).map(Record::ApiKey)
}

pub(super) fn key_record(row: &dyn StoredRow) -> Result<Record, Error> {
    Ok(Record::Key(KeyRecord {
        user_id: UserId(row.read("user_id")?),
        key_hash: hash(row, "key_hash")?,
        fingerprint: hash(row, "fingerprint")?,
        prompt_id: PromptId(row.read("prompt_id")?),
        claimed_at: Timestamp(row.read("claimed_at")?),
    }))
}

pub(super) fn session_record(row: &dyn StoredRow) -> Result<Record, Error> {
    session(row).map(Record::Session)
}

pub(super) fn user_record(row: &dyn StoredRow) -> Result<Record, Error> {
    user(row).map(Record::User)
}

/// Reads the `jti` as bytes.
pub(super) fn token_record(row: &dyn StoredRow) -> Result<Record, Error> {
    let jti = String::from_utf8(row.read("jti")?).map_err(|_| Defect::UnknownValue)?;
    let expires_at = Timestamp(row.read("expires_at")?);
    Ok(Record::RevokedToken(RevokedToken { jti, expires_at }))
}

pub(super) fn day_record(row: &dyn StoredRow) -> Result<Record, Error> {
    Ok(Record::UpstreamDay(UpstreamDay {
        day: row.read("day")?,
        calls: row.read("calls")?,
    }))
}

pub(super) fn last_ids(row: &dyn StoredRow) -> Result<LastIds, Error> {
    Ok(LastIds {
        user: UserId(row.read("user_id")?),
        prompt: PromptId(row.read("prompt_id")?),
    })
}
