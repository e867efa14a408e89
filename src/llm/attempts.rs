//! What the attempts of a call may have cost.

use std::sync::Arc;

use parking_lot::Mutex;

use super::TokenUsage;

/// The outcome of an attempt that brought the answer.
pub const COMPLETED: &str = "completed";
/// The outcome of an attempt whose caller left.
pub const CANCELLED: &str = "cancelled";

/// One attempt that may have cost money: its request was sent, and its upstream did not refuse it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// The upstream's name.
    pub upstream: String,
    /// The model that was asked.
    pub model: String,
    /// The model that answered, if the upstream named it.
    pub answering_model: Option<String>,
    /// What the upstream counted, if it did.
    pub usage: Option<TokenUsage>,
    /// How it ended: [`COMPLETED`], [`CANCELLED`], or what failed, in one of a few words.
    pub outcome: &'static str,
}

/// The attempts of one call. Whoever keeps a clone can read the attempts of a call that was
/// cancelled, too. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct AttemptLog(Arc<Mutex<Vec<Attempt>>>);

impl AttemptLog {
    /// The attempts so far, in their order.
    pub fn attempts(&self) -> Vec<Attempt> {
        self.0.lock().clone()
    }

    pub(super) fn push(&self, attempt: Attempt) {
        self.0.lock().push(attempt);
    }
}
