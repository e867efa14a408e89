//! One request and its answer: what the client sees of it, what the breaker learns from it, and its
//! line in the log.

use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use hyper::HeaderMap;
use hyper::body::Incoming;
use hyper::header::CONTENT_ENCODING;

use super::answer::{self, Deltas};
use super::breaker::{Pass, Verdict};
use super::endpoint::Endpoint;
use super::fault::{Fault, Kind};
use super::reader::{Answer, Progress, Reader};
use super::{error_message, retry};
use crate::memory_budget::Reservation;

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
    /// The upstream's error message, as it came.
    message: Option<String>,
    /// Events of the answer that could not be read.
    skipped: u64,
    is_alive: bool,
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
            message: None,
            skipped: 0,
            is_alive: false,
        }
    }

    /// Whether a streamed answer has brought a sign of life.
    pub fn is_alive(&self) -> bool {
        self.is_alive
    }

    /// Events of the answer that could not be read and were left out.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Sends the request and reads its answer.
    ///
    /// # Errors
    /// What went wrong; see [`Kind`].
    pub async fn run(
        &mut self,
        body: Bytes,
        deltas: &mut Deltas<'_>,
        memory: &mut Reservation,
    ) -> Result<Answer, Fault> {
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
            self.message = error_message::find(&answer::read_error(body).await);
            return Err(Fault {
                kind: Kind::Status(head.status.as_u16()),
                retry_after: retry::retry_after(&head.headers, SystemTime::now()),
                should_retry: retry::should_retry(&head.headers),
            });
        }
        match self.read(body, deltas, memory).await {
            // A body that cannot be read may be compressed. The header alone proves nothing.
            Err(fault) if fault.kind == Kind::Malformed && is_encoded(&head.headers) => {
                Err(Kind::Encoded.into())
            }
            answer => answer,
        }
    }

    async fn read(
        &mut self,
        body: Incoming,
        deltas: &mut Deltas<'_>,
        memory: &mut Reservation,
    ) -> Result<Answer, Fault> {
        if !deltas.are_wanted() {
            self.pass.prove();
        }
        let mut reader = Reader::new(self.limits.text_bytes);
        let on_piece = |reader: &Reader, progress: Progress| {
            memory.resize(reader.held_bytes());
            if progress.is_alive {
                self.is_alive = true;
                self.pass.prove();
            }
        };
        let answer = answer::read(body, &self.limits, &mut reader, deltas, on_piece).await;
        self.skipped = reader.skipped();
        self.message = reader.error().and_then(error_message::find);
        answer
    }

    /// Reports the end to the breaker and the log. `prompts` are the texts that were sent; they are
    /// not logged.
    pub fn settle(
        self,
        answer: &Result<Answer, Fault>,
        verdict: Verdict,
        chance: f64,
        prompts: &[&str],
    ) {
        let Self {
            endpoint,
            number: attempt,
            pass,
            began,
            status,
            request_id: upstream_request_id,
            message,
            skipped,
            ..
        } = self;
        pass.settle(verdict, Instant::now(), chance);
        let (upstream, duration_ms) = (&endpoint.name, began.elapsed().as_millis() as u64);
        let skipped_events = (skipped > 0).then_some(skipped);
        let Err(fault) = answer else {
            tracing::info!(
                upstream,
                attempt,
                status,
                upstream_request_id,
                skipped_events,
                duration_ms,
                "upstream answered"
            );
            return;
        };
        let (url, error_type) = (endpoint.url(), fault.error_type());
        let key = endpoint.config.api_key.as_ref().map(|key| key.expose());
        let upstream_message =
            message.map(|message| error_message::presentable(&message, prompts, key));
        if fault.is_misconfiguration() {
            tracing::error!(
                upstream,
                url,
                attempt,
                status,
                upstream_request_id,
                upstream_message,
                error_type,
                skipped_events,
                duration_ms,
                "upstream refused: check its address, its key and its model"
            );
        } else {
            tracing::warn!(
                upstream,
                url,
                attempt,
                status,
                upstream_request_id,
                upstream_message,
                error_type,
                skipped_events,
                duration_ms,
                "upstream failed"
            );
        }
    }
}

/// Whether the headers say that the body is compressed. Some servers misuse the header.
fn is_encoded(headers: &HeaderMap) -> bool {
    const PLAIN: [&str; 5] = ["", "identity", "none", "utf-8", "utf8"];
    let values = headers.get_all(CONTENT_ENCODING).iter();
    values
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
        .any(|value| {
            let value = value.trim_ascii();
            PLAIN
                .iter()
                .all(|plain| !value.eq_ignore_ascii_case(plain.as_bytes()))
        })
}

/// The upstream's name for the request, if it is one that can be logged.
fn request_id(headers: &HeaderMap) -> Option<String> {
    let id = headers.get("x-request-id")?.to_str().ok()?;
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.:/+=".contains(c);
    (id.len() <= REQUEST_ID_BYTES && id.chars().all(is_plain)).then(|| id.to_owned())
}
