//! Ids, value types and rules that need no I/O. Uses nothing else of this crate.

pub mod account;
pub mod api_key;
pub mod budget;
pub mod client;
pub mod ids;
pub mod prompt;
pub mod rate;
pub mod record;
pub mod timestamp;
pub mod usage;
pub mod user;

pub use api_key::{ApiKey, ApiKeyChange, ApiKeyId, Scope, Scopes};
pub use budget::{Budget, Period, Picodollars};
pub use client::{ClientNetwork, ClientSite};
pub use ids::{PromptId, UserId};
pub use prompt::{CallDetails, ChatTexts, FailureCode, Prompt, PromptSource, PromptStatus};
pub use prompt_service_engine::{Embedding, ModelId};
pub use rate::{Rate, Rates};
pub use record::{
    ApiKeyRecord, KeyRecord, LastIds, PreviousSecret, PromptRecord, Record, RecordCursor,
    RevokedToken, Session, UpstreamDay, VectorRecord, without_nul,
};
pub use timestamp::Timestamp;
pub use usage::{
    Spend, Subject, TokenUsage, UsageDay, UsageEntry, UsageGroups, UsageOutcome, UsageRecord,
    UsageSum, UsageTotals, UserBudget,
};
pub use user::{CLOCK_TOLERANCE, CredentialState, User};
