//! Use cases: what the service does, by means of its capabilities. No HTTP, no JSON, no particular
//! backend.

pub mod accounts;
pub mod api_keys;
pub mod embeddings;
pub mod health;
pub mod metering;
pub mod models;
pub mod prompts;
pub mod purge;
pub mod reembedding;
pub mod search;
pub mod sockets;
pub mod usage;

use crate::error::Error;
use crate::{embed::pipeline, search as similarity, store};

impl From<store::Error> for Error {
    fn from(error: store::Error) -> Self {
        match error {
            store::Error::Unavailable(source) => Self::unavailable(source),
            store::Error::QuotaExceeded => Self::QuotaExceeded,
            store::Error::BudgetExceeded => Self::BudgetExceeded,
            store::Error::PriceUnknown => Self::PriceUnknown,
            store::Error::TooManyApiKeys => Self::TooManyApiKeys,
            // Use cases that can meet a taken name handle it themselves.
            error @ (store::Error::UsernameTaken | store::Error::Internal(_)) => {
                Self::internal(error)
            }
        }
    }
}

impl From<pipeline::Error> for Error {
    fn from(error: pipeline::Error) -> Self {
        match error {
            pipeline::Error::Overloaded { retry_after } => Self::Overloaded(retry_after),
            pipeline::Error::Stopped => Self::unavailable(error),
            pipeline::Error::Failed => Self::internal(error),
        }
    }
}

impl From<similarity::Error> for Error {
    fn from(error: similarity::Error) -> Self {
        match error {
            similarity::Error::Loading | similarity::Error::Source(_) => Self::unavailable(error),
            similarity::Error::Failed(_)
            | similarity::Error::Dimension { .. }
            | similarity::Error::Interrupted(_) => Self::internal(error),
        }
    }
}
