//! One request and its answer: what is seen of it on the way, what the breaker is told, and its line in the log.

use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use hyper::HeaderMap;
use hyper::body::Incoming;
use hyper::header::{CONTENT_ENCODING, CONTENT_TYPE};

use super::answer::{self, Deltas};
use super::breaker::{Pass, Verdict};
use super::endpoint::Endpoint;
use super::fault::{Fault, Kind};
use super::retry;
use super::wire::Answer;

/// Longest request id that is logged, in bytes.
const REQUEST_ID_BYTES: usize = 128;

/// How long and how large an answer may be.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// When a streamed answer must have brought its first token.
    pub first_token_by: Instant,
    /// Longest silence after that.
    pub token_timeout: Duration,
    /// When all of it must be there, and what it is called if it is not.
    pub whole_by: (Instant, Kind),
    /// Bytes of text.
    pub text_bytes: usize,
}

/// An attempt under way. Dropped, it says nothing about the upstream.
pub struct Attempt<'a> {
    endpoint: &'a Endpoint,
    /// Its number within the call, from 1.
    number: u32,
    limits: Limits,
    pass: Pass<'a>,
    began: Instant,
    status: Option<u16>,
    request_id: Option<String>,
    has_token: bool,
}

impl<'a> Attempt<'a> {
    /// Makes ready; `number` counts the attempts of a call from 1.
    pub fn new(endpoint: &'a Endpoint, number: u32, limits: Limits, pass: Pass<'a>) -> Self {
        Self {
            endpoint,
            number,
            limits,
            pass,
            began: Instant::now(),
            status: None,
            request_id: None,
            has_token: false,
        }
    }

    /// Whether a streamed answer has brought a token or a thought.
    pub fn has_token(&self) -> bool {
        self.has_token
    }

    /// Sends the request and reads its answer.
    ///
    /// # Errors
    /// What went wrong; see [`Kind`].
    pub async fn run(&mut self, body: Bytes, deltas: &mut Deltas<'_>) -> Result<Answer, Fault> {
        let is_streamed = deltas.are_wanted();
        let (endpoint, limits) = (self.endpoint, self.limits);
        let (head_by, too_late) = if is_streamed && limits.first_token_by < limits.whole_by.0 {
            (limits.first_token_by, Kind::FirstTokenTimeout)
        } else {
            limits.whole_by
        };
        let sending = endpoint.transport.send(endpoint.request(body, is_streamed));
        let response = tokio::time::timeout_at(head_by.into(), sending)
            .await
            .map_err(|_| too_late)??;
        let (head, body) = response.into_parts();
        self.status = Some(head.status.as_u16());
        self.request_id = request_id(&head.headers);
        if !head.status.is_success() {
            answer::drain(body).await;
            return Err(Fault {
                kind: Kind::Status(head.status.as_u16()),
                retry_after: retry::retry_after(&head.headers, SystemTime::now()),
            });
        }
        if head
            .headers
            .get_all(CONTENT_ENCODING)
            .iter()
            .any(|encoding| !encoding.as_bytes().eq_ignore_ascii_case(b"identity"))
        {
            return Err(Kind::Encoded.into());
        }
        self.read(&head.headers, body, deltas).await
    }

    async fn read(
        &mut self,
        headers: &HeaderMap,
        body: Incoming,
        deltas: &mut Deltas<'_>,
    ) -> Result<Answer, Fault> {
        let kind = headers
            .get(CONTENT_TYPE)
            .map(|kind| kind.as_bytes().to_ascii_lowercase())
            .unwrap_or_default();
        if !deltas.are_wanted() {
            self.pass.prove();
            return answer::read_whole(body, &self.limits).await;
        }
        if kind.starts_with(b"text/event-stream") {
            let on_token = || {
                self.has_token = true;
                self.pass.prove();
            };
            return answer::read_stream(body, &self.limits, deltas, on_token).await;
        }
        // Some servers do not stream though asked to: their answer is one piece, or an error object.
        if kind.starts_with(b"application/json") {
            let answer = answer::read_whole(body, &self.limits).await?;
            deltas.hand_over(&answer.text);
            return Ok(answer);
        }
        Err(Kind::Malformed.into())
    }

    /// Tells the breaker and the log how it ended.
    pub fn settle(self, answer: &Result<Answer, Fault>, verdict: Verdict, chance: f64) {
        let Self {
            endpoint,
            number: attempt,
            pass,
            began,
            status,
            request_id: upstream_request_id,
            ..
        } = self;
        pass.settle(verdict, Instant::now(), chance);
        let (upstream, duration_ms) = (&endpoint.name, began.elapsed().as_millis() as u64);
        let Err(fault) = answer else {
            tracing::info!(
                upstream,
                attempt,
                status,
                upstream_request_id,
                duration_ms,
                "upstream answered"
            );
            return;
        };
        let error_type = fault.error_type();
        if fault.is_misconfiguration() {
            tracing::error!(
                upstream,
                attempt,
                status,
                upstream_request_id,
                error_type,
                duration_ms,
                "upstream refused: check its address, its key and its model"
            );
        } else {
            tracing::warn!(
                upstream,
                attempt,
                status,
                upstream_request_id,
                error_type,
                duration_ms,
                "upstream failed"
            );
        }
    }
}

/// The upstream's name for the request, if it is one that can be logged.
fn request_id(headers: &HeaderMap) -> Option<String> {
    let id = headers.get("x-request-id")?.to_str().ok()?;
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.:/+=".contains(c);
    (id.len() <= REQUEST_ID_BYTES && id.chars().all(is_plain)).then(|| id.to_owned())
}
