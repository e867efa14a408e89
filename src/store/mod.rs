//! Durable state: accounts, sessions, API keys, prompts and their vectors.
//!
//! Traits, split by use. Every method is one transaction: it happens wholly or not at all, and once
//! it has returned `Ok` it survives `kill -9` and power loss. Methods may be called from many tasks
//! at once. A method whose future is dropped may or may not take effect. Ids given twice in one
//! list count once, unless a method says otherwise. Every method has cases in the conformance suite
//! (`tests/it/store`), which runs on each backend.

mod api_keys;
mod bulk;
mod calls;
mod chats;
pub mod django;
pub mod postgres;
mod rows;
pub mod sqlite;
mod usage;

use std::time::Duration;

use async_trait::async_trait;

pub(crate) use self::api_keys::api_key_columns;
pub use self::api_keys::{ApiKeyStore, NewSecret, USE_NOTED_EVERY};
pub use self::bulk::BulkStore;
pub use self::usage::{CallBudgets, UsageFilter, UsageStore};
use crate::domain::{
    Embedding, ModelId, Prompt, PromptId, RevokedToken, Session, Timestamp, User, UserId,
};

pub use self::chats::{ChatCall, ChatFilter, ChatPage, ChatRead, ChatStore};

pub use self::calls::{
    Begun, CallOutcome, CallStore, DailyLimit, ExpiredCall, Holder, KEY_LIFETIME, KeyClaim,
    KeyState, NewCall,
};

/// The columns of a prompt's row, the same in both schemas.
macro_rules! prompt_columns {
    () => {
        "id, user_id, created_at, status, error, model, prompt, response, llm_duration_ms, \
         prompt_tokens, completion_tokens, finish_reason, source, cost"
    };
}
pub(crate) use prompt_columns;

/// The columns of an account's row, the same in both schemas.
macro_rules! account_columns {
    () => {
        "id, username, email, password_hash, is_active, tokens_valid_from, created_at"
    };
}
pub(crate) use account_columns;

/// A statement that [`rows::user`] reads.
macro_rules! select_user {
    ($rest:literal) => {
        concat!(
            "SELECT ",
            $crate::store::account_columns!(),
            " FROM account ",
            $rest
        )
    };
}
pub(crate) use select_user;

/// Why a store could not do what was requested.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The username belongs to another account.
    #[error("the username is taken")]
    UsernameTaken,
    /// The user keeps as many prompts as allowed.
    #[error("the user keeps as many prompts as allowed")]
    QuotaExceeded,
    /// The user has as many live API keys as allowed.
    #[error("the user has as many live API keys as allowed")]
    TooManyApiKeys,
    /// The call may cost more than is left of a budget.
    #[error("the call may cost more than is left of a budget")]
    BudgetExceeded,
    /// A budget is in force, and the most that the call can cost is not known.
    #[error("a budget is in force, and the most that the call can cost is not known")]
    PriceUnknown,
    /// The store cannot be used just now (locked, full, gone); the same call may work later.
    #[error("the store is unavailable")]
    Unavailable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A defect, ours or of the stored data.
    #[error("the store failed")]
    Internal(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// An account to be made.
#[derive(Clone, Debug)]
pub struct NewUser {
    /// Valid and normalised.
    pub username: String,
    /// Valid.
    pub email: String,
    /// The hash, never the password.
    pub password_hash: String,
    /// When it is made.
    pub created_at: Timestamp,
}

/// Accounts, sessions and revoked tokens.
#[async_trait]
pub trait AccountStore: Send + Sync {
    /// Makes an active account with `tokens_valid_from` at the epoch. `UsernameTaken` if the name
    /// (compared byte by byte) exists; nothing is changed then.
    async fn create_user(&self, user: NewUser) -> Result<User, Error>;

    /// The account of that id, or `None`.
    async fn user(&self, id: UserId) -> Result<Option<User>, Error> {
        Ok(self.users(&[id]).await?.pop())
    }

    /// The account of exactly that name, or `None`.
    async fn user_by_username(&self, username: &str) -> Result<Option<User>, Error>;

    /// Those of the given accounts that exist, in no order. An empty slice gives an empty list.
    async fn users(&self, ids: &[UserId]) -> Result<Vec<User>, Error>;

    /// Enables or disables an account. Disabling also sets `tokens_valid_from` to `now` (never
    /// back) and deletes its sessions. `false` if there is no such account.
    async fn set_active(&self, id: UserId, active: bool, now: Timestamp) -> Result<bool, Error>;

    /// Gives an account another password hash, sets `tokens_valid_from` to `now` (never back) and
    /// deletes its sessions. `false` if there is no such account.
    async fn set_password(
        &self,
        id: UserId,
        password_hash: &str,
        now: Timestamp,
    ) -> Result<bool, Error>;

    /// Replaces `old_hash` by `new_hash` of the same password: tokens and sessions stay. Returns
    /// `false` and changes nothing if the account's hash is not `old_hash` any more.
    async fn upgrade_password_hash(
        &self,
        id: UserId,
        old_hash: &str,
        new_hash: &str,
    ) -> Result<bool, Error>;

    /// Stores a session and deletes the account's oldest ones beyond `limit`, of those that have
    /// not expired when the new one is created; of sessions created at the same time, those with
    /// the lower hash. The new one stays. However many race, no more than `limit` are left. Its
    /// hash is new (32 random bytes do not repeat). `Internal` if there is no such account.
    async fn create_session(&self, session: Session, limit: usize) -> Result<(), Error>;

    /// Those sessions of the given hashes that are stored, expired or not, in no order.
    async fn sessions(&self, hashes: &[[u8; 32]]) -> Result<Vec<Session>, Error>;

    /// Deletes the sessions of the given hashes and remembers a token as revoked, if one is given;
    /// absent or repeated ones are no error. Of a token given twice the later expiry counts.
    async fn log_out(&self, hashes: &[[u8; 32]], token: Option<RevokedToken>) -> Result<(), Error>;

    /// Moves the time up to which what has expired is forgotten, and returns it: to `latest`, also
    /// back, but forward by no more than `step`. Where there is none yet it is `latest`.
    async fn move_purge_horizon(
        &self,
        latest: Timestamp,
        step: Duration,
    ) -> Result<Timestamp, Error>;

    /// Whether a token of that `jti` was revoked (and not yet forgotten by `purge_expired`).
    async fn is_token_revoked(&self, jti: &str) -> Result<bool, Error>;

    /// Forgets sessions and revoked tokens that expired at or before `horizon`; returns how many.
    async fn purge_expired(&self, horizon: Timestamp) -> Result<u64, Error>;
}

/// The parts that a deletion removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeletedPrompt {
    /// The model of its vector, if it had one.
    pub embedding_model: Option<ModelId>,
}

/// Where a scan of vectors goes on: after this row, in the order of `(user_id, prompt_id)`.
pub type VectorCursor = (UserId, PromptId);

/// Consecutive vectors of one model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct VectorPage {
    /// Owner and prompt of each row, rising.
    pub ids: Vec<VectorCursor>,
    /// The rows' stored forms one after another: `[ids.len()][dimension]` f16, little-endian.
    pub f16_bytes: Vec<u8>,
}

/// How far the vectors of one model cover the prompts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Coverage {
    /// Completed prompts with a vector of the model.
    pub embedded: u64,
    /// Completed prompts in all.
    pub completed: u64,
}

/// A completed prompt that has no vector of the model in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unembedded {
    /// Identifies the prompt.
    pub id: PromptId,
    /// Its owner.
    pub user_id: UserId,
    /// The text to embed.
    pub prompt: String,
}

/// One page of a user's prompts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PromptPage {
    /// Newest first.
    pub prompts: Vec<Prompt>,
    /// Whether there are older ones.
    pub has_more: bool,
}

/// The result of reading several prompts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PromptsRead {
    /// The first ones.
    pub whole: Vec<Prompt>,
    /// Those after them, with the bytes of each one's texts.
    pub rest: Vec<(PromptId, usize)>,
}

/// What a store that returns rows can do besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It takes writes.
    ReadWrite,
    /// A prompt could not be stored now: the disk is full or read-only, or the database is a
    /// standby.
    ReadOnly,
}

/// The store's counters at one moment. Totals count from its opening.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stats {
    /// Writes that wait for the writer just now.
    pub queued_writes: usize,
    /// Reads that wait for a reader just now.
    pub queued_reads: usize,
    /// Transactions committed.
    pub committed_batches: u64,
    /// Operations in them; over `committed_batches`, the mean size of a batch.
    pub committed_operations: u64,
    /// Transactions that failed as a whole.
    pub failed_batches: u64,
}

/// Prompts and their vectors.
#[async_trait]
pub trait PromptStore: Send + Sync {
    /// Whether the user keeps fewer than `max_prompts` prompts of any status. Reads no more of them
    /// than that.
    async fn has_room(&self, user_id: UserId, max_prompts: u32) -> Result<bool, Error>;

    /// The user's prompt of that id; `None` if there is none or it is another user's.
    async fn prompt(&self, user_id: UserId, id: PromptId) -> Result<Option<Prompt>, Error>;

    /// Up to `limit` of the user's prompts of any status, newest (highest id) first, with ids below
    /// `before` (all if `None`). Ends before their texts are more than `text_bytes` together, but
    /// holds one prompt at least if there is one.
    async fn list_prompts(
        &self,
        user_id: UserId,
        before: Option<PromptId>,
        limit: usize,
        text_bytes: usize,
    ) -> Result<PromptPage, Error>;

    /// Those of the given prompts that exist and, if `owner` is given, belong to it, each once and
    /// in the order given. The first ones come whole, as long as their texts are no more than
    /// `text_bytes` together; of the others only the size is returned.
    async fn prompts(
        &self,
        owner: Option<UserId>,
        ids: &[PromptId],
        text_bytes: usize,
    ) -> Result<PromptsRead, Error>;

    /// Deletes the user's prompt and its vector; `None` if there is none or it is another user's.
    async fn delete_prompt(
        &self,
        user_id: UserId,
        id: PromptId,
    ) -> Result<Option<DeletedPrompt>, Error>;

    /// Up to `limit` vectors of `model` after `after`, of one owner or of all, by rising `(user_id,
    /// prompt_id)`. Fewer than `limit` rows means the end was reached.
    async fn vectors(
        &self,
        model: &ModelId,
        owner: Option<UserId>,
        after: Option<VectorCursor>,
        limit: usize,
    ) -> Result<VectorPage, Error>;

    /// How much of the completed prompts, of one owner or of all, `model` covers.
    async fn coverage(&self, model: &ModelId, owner: Option<UserId>) -> Result<Coverage, Error>;

    /// Up to `limit` completed prompts with ids above `after` that have no vector of `model` (none,
    /// or another model's), by rising id.
    async fn unembedded(
        &self,
        model: &ModelId,
        after: Option<PromptId>,
        limit: usize,
    ) -> Result<Vec<Unembedded>, Error>;

    /// Stores vectors of stored prompts, replacing earlier ones, in one transaction. A prompt that
    /// was deleted, or is not completed, is passed over. Returns the ids whose vector was stored,
    /// in the order given. `Internal` if a vector's length is not that of the model's others;
    /// nothing is stored then.
    async fn put_embeddings(
        &self,
        model: &ModelId,
        rows: Vec<(PromptId, Embedding)>,
    ) -> Result<Vec<PromptId>, Error>;

    /// Claims the work of giving stored prompts vectors of a new model; `None` while another server
    /// has the claim. It ends when it is dropped, or when its server loses the store. Two servers
    /// that work at the same time waste work and break nothing.
    async fn claim_reembedding(&self) -> Result<Option<Claim>, Error>;

    /// Asks the store for a sign of life, by a read that touches it, and for what it can do. It
    /// tries to write only if a write has failed or room is short, and until one succeeds:
    /// `ReadOnly` ends by itself, without a client's write.
    async fn ping(&self) -> Result<Access, Error>;

    /// The counters as they are now. Costs nothing.
    fn stats(&self) -> Stats;
}

/// Something held against other servers, until dropped.
pub type Claim = Box<dyn Send + Sync>;

/// A count for a `LIMIT` clause.
fn sql_limit(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}
