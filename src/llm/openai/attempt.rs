//! One request and its answer: what the breaker learns from it, and its line in the log.

use std::borrow::Cow;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use hyper::HeaderMap;
use hyper::body::Incoming;
use hyper::header::CONTENT_ENCODING;

use super::answer::{self, Handover};
use super::breaker::{AttemptOutcome, AttemptPermit};
use super::endpoint::UpstreamEndpoint;
use super::fault::{Fault, FaultKind};
use super::reader::{AnswerReader, Received};
use super::{error_message, retry};
use crate::llm::{Completion, Content, UpstreamError};
use crate::memory_budget::Reservation;

/// Longest chat request that is compared with an error message, in bytes. With a longer one, which
/// has images, no message is logged.
const MOST_COMPARED: usize = 256 * 1024;
/// Longest request id that is logged, in bytes.
const REQUEST_ID_BYTES: usize = 128;

/// The limits of an answer's time and size.
#[derive(Clone, Copy, Debug)]
pub struct AnswerLimits {
    /// When the first token of a streamed answer is due.
    pub first_token_by: Instant,
    /// The longest silence after that.
    pub token_timeout: Duration,
    /// When the whole answer is due, and the kind of failure if it does not come.
    pub whole_by: (Instant, FaultKind),
    /// Bytes of text.
    pub text_bytes: usize,
}

/// A running attempt. If it is dropped, the breaker learns nothing.
pub struct UpstreamAttempt<'a> {
    endpoint: &'a UpstreamEndpoint,
    limits: AnswerLimits,
    permit: AttemptPermit<'a>,
    began: Instant,
    /// Bytes of a chat request that are held until the attempt ends.
    sent: usize,
    /// The upstream's error message, as it came.
    message: Option<String>,
    /// Events of the answer that could not be read and were left out.
    pub skipped: u64,
    /// Whether a streamed answer has brought a sign of life.
    pub is_alive: bool,
    /// The upstream's refusal of a chat request, for its caller.
    pub refusal: Option<UpstreamError>,
    /// The model and the usage, as far as a failed answer has told them.
    pub seen: Completion,
}

impl<'a> UpstreamAttempt<'a> {
    /// A new attempt.
    pub fn new(
        endpoint: &'a UpstreamEndpoint,
        limits: AnswerLimits,
        permit: AttemptPermit<'a>,
    ) -> Self {
        Self {
            endpoint,
            limits,
            permit,
            began: Instant::now(),
            sent: 0,
            message: None,
            skipped: 0,
            is_alive: false,
            refusal: None,
            seen: Completion::default(),
        }
    }

    /// Sends the request and reads its answer. `is_sent` becomes true as soon as there is a
    /// connection for it.
    ///
    /// # Errors
    /// What went wrong; see [`FaultKind`].
    pub async fn run(
        &mut self,
        body: Bytes,
        handover: &mut Handover<'_>,
        memory: &mut Reservation,
        is_sent: &mut bool,
    ) -> Result<Completion, Fault> {
        let is_streamed = handover.is_streamed();
        if handover.is_chat() {
            self.sent = body.len();
            memory.resize(self.sent);
        }
        let (endpoint, limits) = (self.endpoint, self.limits);
        let (head_by, too_late) = if is_streamed && limits.first_token_by < limits.whole_by.0 {
            (limits.first_token_by, FaultKind::FirstTokenTimeout)
        } else {
            limits.whole_by
        };
        let request = endpoint.request(body, is_streamed);
        let sending = endpoint.transport.send(request, || *is_sent = true);
        let response = tokio::time::timeout_at(head_by.into(), sending)
            .await
            .map_err(|_| too_late)??;
        let (head, body) = response.into_parts();
        let span = tracing::Span::current();
        span.record("status", head.status.as_u16());
        span.record("upstream_request_id", request_id(&head.headers));
        if !head.status.is_success() {
            let body = answer::read_error(body).await;
            let status = head.status.as_u16();
            let fault = Fault {
                kind: FaultKind::Status(status),
                retry_after: retry::retry_after(&head.headers, SystemTime::now()),
                should_retry: retry::should_retry(&head.headers),
            };
            if handover.is_chat() && fault.is_refusal() {
                let key = endpoint.config.api_key.as_ref();
                let key = key.map(|key| key.expose());
                let refusal = error_message::refusal(status, &body, key);
                self.refusal = Some(refusal).filter(|refusal| !refusal.is_of_operator());
            }
            self.message = error_message::find(&body);
            return Err(fault);
        }
        match self.read(body, handover, memory).await {
            // A body that cannot be read may be compressed. The header alone proves nothing.
            Err(fault) if fault.kind == FaultKind::Malformed && is_encoded(&head.headers) => {
                Err(FaultKind::Encoded.into())
            }
            answer => answer,
        }
    }

    async fn read(
        &mut self,
        body: Incoming,
        handover: &mut Handover<'_>,
        memory: &mut Reservation,
    ) -> Result<Completion, Fault> {
        if !handover.is_streamed() {
            self.permit.note_response();
        }
        let mut reader = match handover.is_chat() {
            true => AnswerReader::chat(self.limits.text_bytes, handover.choices),
            false => AnswerReader::new(self.limits.text_bytes),
        };
        let sent = self.sent;
        let on_piece = |reader: &AnswerReader, received: Received| {
            memory.resize(sent + reader.held_bytes());
            if received.is_alive {
                self.is_alive = true;
                self.permit.note_response();
            }
        };
        let answer = answer::read(body, &self.limits, &mut reader, handover, on_piece).await;
        self.skipped = reader.gathered.skipped;
        self.seen = std::mem::take(&mut reader.gathered.answer);
        self.message = reader
            .gathered
            .error
            .as_deref()
            .and_then(error_message::find);
        answer
    }

    /// Reports the end to the breaker and the log. To be called in the span of the attempt.
    /// `content` and the prompt of the `system` are what was sent; they are not logged.
    pub fn settle(
        self,
        answer: &Result<Completion, Fault>,
        outcome: AttemptOutcome,
        chance: f64,
        content: Content<'_>,
        system: Option<&str>,
    ) {
        self.permit.settle(outcome, Instant::now(), chance);
        let duration_ms = self.began.elapsed().as_millis() as u64;
        let skipped_events = (self.skipped > 0).then_some(self.skipped);
        let Err(fault) = answer else {
            tracing::info!(skipped_events, duration_ms, "upstream answered");
            return;
        };
        let (url, error_type) = (self.endpoint.url(), fault.error_type());
        let key = self.endpoint.config.api_key.as_ref();
        let key = key.map(|key| key.expose());
        let message = self.message.as_deref();
        let upstream_message = message.and_then(|text| {
            let sent = match content {
                Content::Prompt(prompt) => Cow::Borrowed(prompt),
                Content::Chat(request) => request.every_text(MOST_COMPARED)?.into(),
            };
            let prompts = [&*sent, system.unwrap_or_default()];
            Some(error_message::presentable(text, &prompts, key))
        });
        // Its fields are those of whichever line follows.
        let _span = tracing::error_span!(
            "fault",
            url,
            upstream_message,
            error_type,
            skipped_events,
            duration_ms
        )
        .entered();
        // The caller of a chat request chooses the model.
        let is_of_caller = matches!(content, Content::Chat(_)) && fault.is_refusal();
        if fault.is_misconfiguration() && !is_of_caller {
            tracing::error!("upstream refused: check its address, its key and its model");
        } else {
            tracing::warn!("upstream failed");
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
fn request_id(headers: &HeaderMap) -> Option<&str> {
    let id = headers.get("x-request-id")?.to_str().ok()?;
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.:/+=".contains(c);
    (id.len() <= REQUEST_ID_BYTES && id.chars().all(is_plain)).then_some(id)
}
