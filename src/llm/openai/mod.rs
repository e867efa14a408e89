//! The chat-completions protocol of OpenAI and of everything that speaks it: one call, over however many attempts and upstreams it takes.
//!
//! Attempts end with the first piece of text: what a caller has been given is never asked for again. `docs/UPSTREAM.md` says when
//! there is another one.

mod answer;
mod breaker;
mod endpoint;
mod fault;
mod retry;
mod sse;
mod transport;
mod wire;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use hyper::HeaderMap;
use hyper::body::Incoming;
use hyper::header::{CONTENT_ENCODING, CONTENT_TYPE};

use self::answer::{Deltas, Limits};
use self::endpoint::Endpoint;
use self::fault::{Fault, Kind};
use self::wire::Answer;
use super::{Asked, Completion, Event, Failure, Observer};
use crate::config::UpstreamConfig;

/// Where there is another upstream to ask, a longer wait for this one is not worth it.
const PATIENCE: Duration = Duration::from_secs(2);
/// Longest request id that is logged, in bytes.
const REQUEST_ID_BYTES: usize = 128;

/// The upstreams, in the order in which they are asked.
pub struct Upstreams {
    config: UpstreamConfig,
    endpoints: Vec<Endpoint>,
    observer: Arc<dyn Observer>,
}

impl std::fmt::Debug for Upstreams {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Upstreams")
            .field("endpoints", &self.endpoints)
            .finish_non_exhaustive()
    }
}

/// A client cannot be made from these settings on this machine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// TLS cannot be set up.
    #[error("TLS cannot be set up")]
    Tls(#[from] rustls::Error),
    /// An upstream is reached over TLS, and nobody is trusted.
    #[error(
        "no certificate authorities were found to trust: install the system's ca-certificates, or set SSL_CERT_FILE"
    )]
    NoRoots,
    /// An address or a key cannot be sent.
    #[error("an address or a key cannot be sent")]
    Unsendable(#[from] hyper::http::Error),
}

/// How a call ended without an answer.
enum Ended {
    /// The upstream was not asked: its breaker stays open that long.
    Refused(Duration),
    /// The last attempt's failure.
    Failed(Fault),
}

/// One call as it goes from attempt to attempt.
struct Call<'a, 'd> {
    prompt: &'a str,
    deltas: Deltas<'d>,
    began: Instant,
    attempts: u32,
}

/// What one attempt's answer said of itself, for the log.
#[derive(Default)]
struct Seen {
    status: Option<u16>,
    request_id: Option<String>,
}

impl Upstreams {
    /// Makes ready to ask; nothing is connected yet.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn new(config: &UpstreamConfig, observer: Arc<dyn Observer>) -> Result<Self, Error> {
        let needs_tls = config.endpoints.iter().any(|each| each.base_url.is_https());
        let tls = Arc::new(if needs_tls {
            transport::tls_config()?.ok_or(Error::NoRoots)?
        } else {
            transport::no_tls()?
        });
        let endpoints = config.endpoints.iter().enumerate().map(|(at, endpoint)| {
            Endpoint::new(at, endpoint, Arc::clone(&tls), config.connect_timeout)
        });
        let upstreams = Self {
            endpoints: endpoints.collect::<Result<_, _>>()?,
            config: config.clone(),
            observer,
        };
        for endpoint in &upstreams.endpoints {
            upstreams
                .observer
                .observe(Event::Announced(endpoint.asked()));
            upstreams.observe_breaker(endpoint);
        }
        Ok(upstreams)
    }

    /// What is asked first.
    pub fn first(&self) -> Asked<'_> {
        self.endpoints[0].asked()
    }

    /// Answers a prompt; see [`super::Client::complete`].
    pub async fn complete(
        &self,
        prompt: &str,
        on_delta: Option<&mut (dyn FnMut(&str) + Send)>,
    ) -> Result<Completion, Failure> {
        let mut call = Call {
            prompt,
            deltas: Deltas::new(on_delta),
            began: Instant::now(),
            attempts: 0,
        };
        let mut asked = &self.endpoints[0];
        let mut last: Option<Fault> = None;
        let mut wait: Option<Duration> = None;
        for (at, endpoint) in self.endpoints.iter().enumerate() {
            let has_next = at + 1 < self.endpoints.len();
            match self.ask(endpoint, &mut call, has_next).await {
                Ok(answer) => {
                    self.observe_end(endpoint, &call, None, Some(&answer));
                    return Ok(completion(answer, endpoint, call.began));
                }
                Err(Ended::Refused(more)) => {
                    wait = Some(wait.map_or(more, |wait| wait.min(more)));
                }
                Err(Ended::Failed(fault)) => {
                    asked = endpoint;
                    last = Some(fault);
                    if call.deltas.first_at().is_some() || !fault.may_mend_elsewhere() {
                        break;
                    }
                }
            }
        }
        let error_type = last.map_or("breaker_open", |fault| fault.error_type());
        self.observe_end(asked, &call, Some(error_type), None);
        Err(match last {
            Some(fault) => fault.into_failure(),
            None => fault::all_open(wait.unwrap_or_default()),
        })
    }

    /// Asks one upstream until it answers, or there is no sense in asking it again.
    async fn ask(
        &self,
        endpoint: &Endpoint,
        call: &mut Call<'_, '_>,
        has_next: bool,
    ) -> Result<Answer, Ended> {
        let is_streamed = call.deltas.are_wanted();
        let body = wire::request(&self.config, &endpoint.config, call.prompt, is_streamed);
        let whole_by = call.began + self.config.total_timeout;
        endpoint.budget.note_call();
        let (mut retries, mut last) = (0, None);
        loop {
            let now = Instant::now();
            if now >= whole_by {
                return Err(Ended::Failed(
                    last.unwrap_or_else(|| Kind::TotalTimeout.into()),
                ));
            }
            let pass = match endpoint.breaker.admit(now) {
                Ok(pass) => pass,
                Err(wait) => return Err(last.map_or(Ended::Refused(wait), Ended::Failed)),
            };
            let limits = Limits {
                first_token_by: now + self.config.first_token_timeout,
                token_timeout: self.config.token_timeout,
                whole_by,
                text_bytes: self.config.max_response_bytes,
            };
            call.attempts += 1;
            let mut seen = Seen::default();
            let answer = attempt(endpoint, body.clone(), &limits, &mut call.deltas, &mut seen);
            let answer = answer.await;
            let is_outage = answer.as_ref().is_err_and(Fault::is_outage);
            pass.settle(is_outage, Instant::now(), chance());
            self.observe_breaker(endpoint);
            let fault = match answer {
                Ok(answer) => {
                    log_answer(endpoint, call.attempts, &seen, now.elapsed());
                    return Ok(answer);
                }
                Err(fault) => fault,
            };
            log_fault(endpoint, call.attempts, &seen, &fault, now.elapsed());
            last = Some(fault);
            retries += 1;
            if call.deltas.first_at().is_some()
                || !fault.is_retryable()
                || retries > self.config.max_retries
            {
                return Err(Ended::Failed(fault));
            }
            let wait = retry::backoff(retries, fault.retry_after, chance());
            let is_too_late = Instant::now() + wait >= whole_by;
            if is_too_late || (has_next && wait > PATIENCE) || !endpoint.budget.take(Instant::now())
            {
                return Err(Ended::Failed(fault));
            }
            self.observer.observe(Event::Retried {
                upstream: &endpoint.name,
                error_type: fault.error_type(),
            });
            tokio::time::sleep(wait).await;
        }
    }

    fn observe_breaker(&self, endpoint: &Endpoint) {
        self.observer.observe(Event::Breaker {
            upstream: &endpoint.name,
            state: endpoint.breaker.state(),
        });
    }

    fn observe_end(
        &self,
        endpoint: &Endpoint,
        call: &Call<'_, '_>,
        error_type: Option<&'static str>,
        answer: Option<&Answer>,
    ) {
        if let Some(first_at) = call.deltas.first_at() {
            let after = first_at.saturating_duration_since(call.began);
            self.observer
                .observe(Event::FirstToken(endpoint.asked(), after));
        }
        self.observer.observe(Event::Ended {
            asked: endpoint.asked(),
            duration: call.began.elapsed(),
            error_type,
            prompt_tokens: answer.and_then(|answer| answer.prompt_tokens),
            completion_tokens: answer.and_then(|answer| answer.completion_tokens),
        });
    }
}

fn completion(answer: Answer, endpoint: &Endpoint, began: Instant) -> Completion {
    Completion {
        text: answer.text,
        model: answer
            .model
            .unwrap_or_else(|| endpoint.config.model.clone()),
        finish_reason: answer.finish_reason,
        prompt_tokens: answer.prompt_tokens,
        completion_tokens: answer.completion_tokens,
        upstream_duration: began.elapsed(),
    }
}

/// One request and its answer.
async fn attempt(
    endpoint: &Endpoint,
    body: Bytes,
    limits: &Limits,
    deltas: &mut Deltas<'_>,
    seen: &mut Seen,
) -> Result<Answer, Fault> {
    let is_streamed = deltas.are_wanted();
    // A whole answer's head comes when the answer is ready, so only the total deadline can tell a hang from work.
    let (head_by, too_late) = if is_streamed && limits.first_token_by < limits.whole_by {
        (limits.first_token_by, Kind::FirstTokenTimeout)
    } else {
        (limits.whole_by, Kind::TotalTimeout)
    };
    let sending = endpoint.transport.send(endpoint.request(body, is_streamed));
    let response = tokio::time::timeout_at(head_by.into(), sending)
        .await
        .map_err(|_| too_late)??;
    let (head, body) = response.into_parts();
    seen.status = Some(head.status.as_u16());
    seen.request_id = request_id(&head.headers);
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
    read(&head.headers, body, limits, deltas, is_streamed).await
}

async fn read(
    headers: &HeaderMap,
    body: Incoming,
    limits: &Limits,
    deltas: &mut Deltas<'_>,
    is_streamed: bool,
) -> Result<Answer, Fault> {
    let kind = headers
        .get(CONTENT_TYPE)
        .map(|kind| kind.as_bytes().to_ascii_lowercase())
        .unwrap_or_default();
    if !is_streamed {
        return answer::read_whole(body, limits).await;
    }
    if kind.starts_with(b"text/event-stream") {
        return answer::read_stream(body, limits, deltas).await;
    }
    // Some servers do not stream though asked to: their answer is one piece, or an error object.
    if kind.starts_with(b"application/json") {
        let answer = answer::read_whole(body, limits).await?;
        deltas.hand_over(&answer.text);
        return Ok(answer);
    }
    Err(Kind::Malformed.into())
}

/// The upstream's name for the request, if it is one that can be logged.
fn request_id(headers: &HeaderMap) -> Option<String> {
    let id = headers.get("x-request-id")?.to_str().ok()?;
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.:/+=".contains(c);
    (id.len() <= REQUEST_ID_BYTES && id.chars().all(is_plain)).then(|| id.to_owned())
}

fn log_answer(endpoint: &Endpoint, attempt: u32, seen: &Seen, took: Duration) {
    tracing::info!(
        upstream = endpoint.name,
        attempt,
        status = seen.status,
        upstream_request_id = seen.request_id,
        duration_ms = took.as_millis() as u64,
        "upstream answered"
    );
}

fn log_fault(endpoint: &Endpoint, attempt: u32, seen: &Seen, fault: &Fault, took: Duration) {
    let (duration_ms, error_type) = (took.as_millis() as u64, fault.error_type());
    let (upstream, upstream_request_id) = (&endpoint.name, &seen.request_id);
    if fault.is_misconfiguration() {
        tracing::error!(
            upstream,
            attempt,
            status = seen.status,
            upstream_request_id,
            error_type,
            duration_ms,
            "upstream refused: check its address, its key and its model"
        );
    } else {
        tracing::warn!(
            upstream,
            attempt,
            status = seen.status,
            upstream_request_id,
            error_type,
            duration_ms,
            "upstream failed"
        );
    }
}

/// A number from 0 to 1, evenly spread. If the system has no randomness to give, the middle spreads nothing and harms nothing.
fn chance() -> f64 {
    getrandom::u32().map_or(0.5, |number| f64::from(number) / f64::from(u32::MAX))
}
