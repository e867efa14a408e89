//! The tokens that a call used, as the API shows them.

use serde::Serialize;
use utoipa::ToSchema;

use crate::domain::CallDetails;

/// Tokens as the upstream counted them.
#[derive(Serialize, ToSchema)]
pub struct Usage {
    /// Those of the question.
    #[schema(required = true, example = 12)]
    prompt_tokens: Option<u32>,
    /// Those of the answer.
    #[schema(required = true, example = 34)]
    completion_tokens: Option<u32>,
    /// Both together, if both are known.
    #[schema(required = true, example = 46)]
    total_tokens: Option<u64>,
}

impl Usage {
    /// The counts that are known; `None` if there are none.
    pub fn of(call: &CallDetails) -> Option<Self> {
        let (prompt_tokens, completion_tokens) = (call.prompt_tokens, call.completion_tokens);
        (prompt_tokens.is_some() || completion_tokens.is_some()).then(|| Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens
                .zip(completion_tokens)
                .map(|(asked, answered)| u64::from(asked) + u64::from(answered)),
        })
    }
}
