//! The order of the steps of a post, the same at both front doors: key, throttle, body.

use super::error::ApiError;
use crate::memory_budget::Reservation;
use crate::services::prompts::{CreatePrompt, Created, Prompts};

/// A request on its way to becoming a call.
pub trait PostRequest {
    /// Asks the throttle, which counts the request.
    ///
    /// # Errors
    /// 429.
    async fn admit(&mut self) -> Result<(), ApiError>;

    /// Reads the body, once. `key`: the request's idempotency key, if it has one.
    ///
    /// # Errors
    /// Why it cannot be used.
    async fn read(&mut self, key: Option<String>) -> Result<(CreatePrompt, Reservation), ApiError>;
}

/// Takes a post: as a new call, or as the repetition of one with the same idempotency key. `key`:
/// that of the request, or why it cannot be used.
///
/// # Errors
/// Those of the request, and of the use case.
pub async fn take_post<R: PostRequest>(
    prompts: &Prompts,
    key: Result<Option<String>, ApiError>,
    request: &mut R,
) -> Result<Created, ApiError> {
    let key = match key {
        Ok(Some(key)) => key,
        without => {
            // The throttle counts a request before any part of it is checked.
            request.admit().await?;
            without?;
            let (new, memory) = request.read(None).await?;
            return Ok(prompts.create(new, memory).await?);
        }
    };
    // A repeated request is not counted by the throttle, so with a key the body is read first.
    let read = request.read(Some(key)).await;
    if let Ok((new, _)) = &read
        && let Some(created) = prompts.replay(new).await?
    {
        return Ok(created);
    }
    if let Err(refused) = request.admit().await {
        // Of several simultaneous posts with one key, the throttle may admit only the first. The
        // others then get that one's state rather than a 429.
        if let Ok((new, _)) = &read
            && let Some(created) = prompts.replay(new).await?
        {
            return Ok(created);
        }
        return Err(refused);
    }
    let (new, memory) = read?;
    Ok(prompts.create(new, memory).await?)
}
