//! `/v1`: OpenAI's protocol. `docs/V1.md` says what differs from OpenAI.

mod create;
mod embeddings;
mod errors;
mod history;
mod limits;
mod models;
mod stored_call;
mod stream;

use std::time::{SystemTime, UNIX_EPOCH};

use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

pub use self::errors::{OpenAiErrorResponse, speak_openai};
use super::state::AppState;
use crate::domain::PromptId;

/// What the id of a chat completion begins with.
const ID_PREFIX: &str = "chatcmpl-";

/// The routes of OpenAI's protocol; all need a credential.
pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(
            create::create_chat_completion,
            history::list_chat_completions
        ))
        .routes(routes!(
            history::show_chat_completion,
            history::update_chat_completion,
            history::delete_chat_completion
        ))
        .routes(routes!(history::list_chat_messages))
        .routes(routes!(embeddings::create_embeddings))
        .routes(routes!(models::list_models))
        .routes(routes!(models::show_model))
}

/// The id of a prompt's chat completion.
fn chat_id(id: PromptId) -> String {
    format!("{ID_PREFIX}{id}")
}

/// The prompt behind the id of a chat completion.
fn parse_chat_id(text: &str) -> Option<PromptId> {
    let digits = text.strip_prefix(ID_PREFIX)?;
    let is_number = digits.bytes().all(|byte| byte.is_ascii_digit());
    digits.parse().ok().filter(|_| is_number).map(PromptId)
}

/// A time in whole seconds since 1970, as the protocol writes it.
fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
