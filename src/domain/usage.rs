//! What a call of an upstream uses.

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
    /// All tokens of the input.
    pub fn total_input(&self) -> u64 {
        self.input
            .saturating_add(self.cache_read)
            .saturating_add(self.cache_write)
    }

    /// All tokens of the output.
    pub fn total_output(&self) -> u64 {
        self.output.saturating_add(self.reasoning)
    }
}
