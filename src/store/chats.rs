//! What is kept of chat calls: calls of `/v1/chat/completions`.

use async_trait::async_trait;

use super::Error;
use crate::domain::{ChatTexts, Prompt, PromptId, UserId};

/// A stored chat call that was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatCall {
    /// Its prompt.
    pub prompt: Prompt,
    /// What is kept beside the prompt's texts.
    pub texts: ChatTexts,
}

impl ChatCall {
    /// Bytes of all texts.
    pub fn text_bytes(&self) -> usize {
        self.prompt.text_bytes() + self.texts.text_bytes()
    }
}

/// The result of reading one chat call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChatRead {
    /// The call.
    Whole(Box<ChatCall>),
    /// Its texts have so many bytes, which is more than was allowed.
    Larger(usize),
}

/// Which chat calls a list has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChatFilter {
    /// The model that answered.
    pub model: Option<String>,
    /// Labels, each of which the call has with that value.
    pub metadata: Vec<(String, String)>,
    /// The call after which the list goes on.
    pub after: Option<PromptId>,
    /// Newest first, rather than oldest first.
    pub is_newest_first: bool,
}

/// One page of chat calls.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChatPage {
    /// In the order of the filter.
    pub calls: Vec<ChatCall>,
    /// Whether there are more after them.
    pub has_more: bool,
}

/// Answered chat calls. Running and failed ones are not seen here; the methods of the other traits
/// see their prompts.
#[async_trait]
pub trait ChatStore: Send + Sync {
    /// The user's answered chat call of that id, if its texts have at most `text_bytes`; `None` if
    /// there is none or it is another user's.
    async fn chat_call(
        &self,
        user_id: UserId,
        id: PromptId,
        text_bytes: usize,
    ) -> Result<Option<ChatRead>, Error>;

    /// Up to `limit` of the user's answered chat calls that pass the filter, by id. Ends before
    /// their texts are more than `text_bytes` together, but holds one call at least if there is
    /// one.
    async fn list_chat_calls(
        &self,
        user_id: UserId,
        filter: ChatFilter,
        limit: usize,
        text_bytes: usize,
    ) -> Result<ChatPage, Error>;

    /// Replaces the labels of the user's answered chat call. `metadata`: a JSON object of strings.
    /// `false` if there is none or it is another user's.
    async fn set_chat_metadata(
        &self,
        user_id: UserId,
        id: PromptId,
        metadata: String,
    ) -> Result<bool, Error>;
}

/// The columns of a chat call beside those of its prompt, the same in both schemas.
macro_rules! chat_columns {
    () => {
        "c.messages, c.request, c.metadata, c.answer"
    };
}
pub(super) use chat_columns;

/// The columns of its prompt.
macro_rules! chat_prompt_columns {
    () => {
        "p.id, p.user_id, p.created_at, p.status, p.error, p.model, p.prompt, p.response, \
         p.llm_duration_ms, p.prompt_tokens, p.completion_tokens, p.finish_reason, p.source, \
         p.cost"
    };
}
pub(super) use chat_prompt_columns;

/// The bytes of all texts of a chat call.
macro_rules! chat_text_bytes {
    () => {
        "octet_length(p.prompt) + coalesce(octet_length(p.response), 0) + octet_length(c.messages)
         + octet_length(c.request) + octet_length(c.metadata) + coalesce(octet_length(c.answer), 0)"
    };
}
pub(super) use chat_text_bytes;
