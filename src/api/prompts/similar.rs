//! The results of a search as JSON: as one piece if they are short, which is nearly always so,
//! otherwise piece by piece.

use std::sync::Arc;

use axum::body::Body;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;

use super::{SimilarPrompt, SimilarResponse, json_bytes};
use crate::api::json_response::{json_len, json_response, reserved_bytes};
use crate::api::state::AppState;
use crate::domain::{Prompt, UserId};
use crate::error::Error;
use crate::memory_budget::{Owner, Reservation};
use crate::services::search::{READ_BYTES, Similar, Unread};

/// The memory for a byte of text: the byte itself, and up to six bytes as JSON.
const MEMORY_PER_TEXT: usize = 7;
/// What a result takes as JSON beside its texts, in bytes: names, numbers and a time.
const AROUND: usize = 256;

/// Searches, and responds with the results.
///
/// # Errors
/// `Overloaded` if there is no memory for the first results; those of the search.
pub async fn answer(
    state: &AppState,
    user_id: UserId,
    owner: Owner,
    query: &str,
    k: usize,
) -> Result<(Response, Option<f64>), Error> {
    let searching = state.searches.similar(user_id, owner, query.to_owned(), k);
    let Similar {
        results,
        rest,
        coverage,
        mut memory,
        turn,
    } = searching.await?;
    let bytes = json_len(query) + results.iter().map(measure).sum::<usize>();
    memory.try_resize(bytes)?;
    let body = SimilarResponse {
        query: query.to_owned(),
        results: results.into_iter().map(SimilarPrompt::from).collect(),
    };
    let response = if rest.is_empty() {
        json_response(StatusCode::OK, &body, memory)
    } else {
        let rest = Rest {
            state: Arc::clone(state),
            user_id,
            owner,
            unread: rest.into(),
            is_first: body.results.is_empty(),
        };
        rest.answer(&body, memory)
    };
    drop(turn);
    Ok((response, coverage))
}

/// The memory that a result needs: its texts, and the same as JSON.
fn measure((prompt, _): &(Prompt, f32)) -> usize {
    prompt.text_bytes() + json_bytes(prompt)
}

/// Results that are read from the store while the response is written. If the client stops reading,
/// the store is not read either.
struct Rest {
    state: AppState,
    user_id: UserId,
    owner: Owner,
    unread: std::collections::VecDeque<Unread>,
    /// Whether no result was written yet.
    is_first: bool,
}

impl Rest {
    fn answer(self, body: &SimilarResponse, memory: Reservation) -> Response {
        let mut beginning = serde_json::to_vec(body).expect("a struct of texts is JSON");
        // The last piece ends the list and the object.
        beginning.truncate(beginning.len() - END.len());
        let beginning = reserved_bytes(beginning, memory);
        let pieces = futures_util::stream::unfold(
            (Some(beginning), Some(self)),
            |(beginning, rest)| async move {
                if let Some(beginning) = beginning {
                    return Some((Ok(beginning), (None, rest)));
                }
                let mut rest = rest?;
                if rest.unread.is_empty() {
                    return Some((Ok(Bytes::from_static(END)), (None, None)));
                }
                let piece = rest.next().await.inspect_err(|error| {
                    // The status was sent, so the client sees a response that breaks off.
                    tracing::warn!(%error, "a response broke off: its results could not be read");
                });
                let next = piece.is_ok().then_some(rest);
                Some((piece, (None, next)))
            },
        );
        let kind = [(CONTENT_TYPE, "application/json")];
        (kind, Body::from_stream(pieces)).into_response()
    }

    /// The next results as JSON, each but the first after a comma. Empty if they were deleted
    /// meanwhile.
    async fn next(&mut self) -> Result<Bytes, Error> {
        let mut group = Vec::new();
        let mut bytes = 0;
        while let Some(unread) = self.unread.front()
            && (group.is_empty() || bytes + unread.text_bytes <= READ_BYTES)
        {
            bytes += unread.text_bytes;
            group.extend(self.unread.pop_front());
        }
        let wanted = bytes * MEMORY_PER_TEXT + group.len() * AROUND;
        let memory = self
            .state
            .memory
            .reserve_when_free(self.owner, wanted)
            .await;
        let (results, _turn) = self.state.searches.read_rest(self.user_id, &group).await?;
        let mut json = Vec::new();
        for result in results {
            if !std::mem::take(&mut self.is_first) {
                json.push(b',');
            }
            let result = SimilarPrompt::from(result);
            serde_json::to_writer(&mut json, &result).map_err(Error::internal)?;
        }
        Ok(reserved_bytes(json, memory))
    }
}

/// The end of the response.
const END: &[u8] = b"]}";
