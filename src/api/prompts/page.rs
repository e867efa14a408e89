//! One page of a list, bounded in bytes as well as in rows.

use axum::http::StatusCode;
use axum::response::Response;

use super::{PromptListResponse, PromptResponse, encode_cursor, json_bytes};
use crate::api::error::ApiError;
use crate::api::json_response::json_response;
use crate::api::state::AppState;
use crate::domain::{PromptId, UserId};
use crate::error::Error;
use crate::memory_budget::Owner;
use crate::services::prompts::READ_BYTES;

/// The most bytes of a page, as texts and as JSON, unless its first prompt alone is larger. A
/// hundred prompts of the greatest length, with their answers, would be over 100 MiB.
const PAGE_BYTES: usize = 1 << 20;

/// Up to `limit` of the user's prompts older than `before`, newest first. The page ends early where
/// it would be too long, or where there is no memory for a longer one.
///
/// # Errors
/// `Overloaded` if there is no memory for a page, or too many wait to read; those of the store.
pub async fn answer(
    state: &AppState,
    user_id: UserId,
    owner: Owner,
    before: Option<PromptId>,
    limit: usize,
) -> Result<Response, ApiError> {
    let read = async {
        let turn = state.reads.acquire(user_id).await?;
        let mut memory = state.memory.reserve(owner, 2 * READ_BYTES)?;
        let list = |bytes| state.prompts.list(user_id, before, limit, bytes);
        let mut page = list(READ_BYTES).await?;
        let is_cut = page.has_more && page.prompts.len() < limit;
        if is_cut && memory.try_resize(2 * PAGE_BYTES).is_ok() {
            page = list(PAGE_BYTES).await?;
        }
        Ok::<_, Error>((page, memory, turn))
    };
    let (mut page, mut memory, _turn) = read.await?;
    let (mut bytes, mut fitting) = (0, 0);
    for prompt in &page.prompts {
        bytes += json_bytes(prompt);
        if bytes > PAGE_BYTES && fitting > 0 {
            page.has_more = true;
            break;
        }
        fitting += 1;
    }
    page.prompts.truncate(fitting);
    let text_bytes: usize = page.prompts.iter().map(|prompt| prompt.text_bytes()).sum();
    memory.try_resize(bytes + text_bytes).map_err(Error::from)?;
    let next = page.prompts.last().filter(|_| page.has_more);
    let next = next.map(|prompt| encode_cursor(prompt.id));
    let results = page.prompts.into_iter().map(PromptResponse::from).collect();
    let body = PromptListResponse { results, next };
    Ok(json_response(StatusCode::OK, &body, memory))
}
