//! Tokens, as upstreams count them and as they are paid for.

pub use crate::domain::TokenUsage;
