//! Tokens, as upstreams count them and as they are paid for.

/// The tokens of one attempt in kinds that do not overlap, so that each token has one price.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TokenUsage {
    /// Of the request, without those that a cache was asked for or filled with.
    pub input: u64,
    /// Of the request, read from the upstream's cache.
    pub cache_read: u64,
    /// Of the request, written into the upstream's cache.
    pub cache_write: u64,
    /// Of the answer, without thoughts.
    pub output: u64,
    /// Of thoughts.
    pub reasoning: u64,
}
