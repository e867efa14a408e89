//! The chat-completions protocol of OpenAI and of compatible servers. A call makes as many
//! attempts, at as many upstreams, as it needs.
//!
//! There is no further attempt after the first piece of text, because the caller has it, nor after
//! an answer whose cost its upstream has told.
//! `docs/UPSTREAM.md` says when there is another attempt.

mod answer;
mod attempt;
mod breaker;
mod endpoint;
pub(crate) mod error_message;
mod fault;
mod line;
mod models;
mod reader;
mod request;
mod retry;
mod transport;

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use tracing::Instrument;

use self::answer::Handover;
use self::attempt::{AnswerLimits, UpstreamAttempt};
use self::breaker::AttemptOutcome;
use self::endpoint::UpstreamEndpoint;
use self::fault::{Fault, FaultKind};
pub use self::models::{ListedModel, ModelFinding, UpstreamCheck};
use self::reader::AnswerReader;
pub use self::reader::{JsonValue, decoded, string_end};
use super::attempts::{Attempt, CANCELLED, COMPLETED};
use super::measure::CallLabels;
use super::route::{self, Hop};
use super::{AnswerSink, Completion, Failure, Question, UpstreamError};
use crate::config::UpstreamConfig;
use crate::memory_budget::Reservation;
use crate::telemetry::Metrics;

/// The longest wait before a retry if another upstream can be asked.
const PATIENCE: Duration = Duration::from_secs(2);

/// The upstreams, in the order of the configuration.
#[derive(Debug)]
pub struct Upstreams {
    /// Their configuration.
    pub config: UpstreamConfig,
    endpoints: Vec<UpstreamEndpoint>,
    metrics: Arc<Metrics>,
}

/// A client cannot be made from these settings on this machine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// TLS cannot be set up.
    #[error("TLS cannot be set up")]
    Tls(#[from] rustls::Error),
    /// An upstream is reached over TLS, and no certificate authority is trusted.
    #[error(
        "no certificate authorities were found to trust: install the system's ca-certificates, or set SSL_CERT_FILE"
    )]
    NoRoots,
    /// No upstream has the default model.
    #[error("no upstream has the default model")]
    NoDefault,
    /// An address or a key cannot be sent.
    #[error("an address or a key cannot be sent")]
    Unsendable(#[from] hyper::http::Error),
}

/// Why an upstream has given no answer.
enum NoAnswer {
    /// The upstream was not asked. Its breaker stays open for so long.
    Refused(Duration),
    /// The failure of the last attempt, and what the caller is told of it.
    Failed(Fault, Option<UpstreamError>),
}

/// One call with all its attempts. If it is dropped before its end, it is counted as cancelled,
/// because it was paid for nevertheless.
struct UpstreamCall<'a, 'd> {
    question: &'a Question<'a>,
    memory: Reservation,
    handover: Handover<'d>,
    began: Instant,
    attempts: u32,
    /// The upstream that was asked last; at first, the first one of the route.
    hop: &'a Hop,
    /// Whether an attempt is running whose request has had a connection to go out on.
    is_sent: bool,
    /// Whether an upstream has told what its failed answer cost.
    is_paid: bool,
    upstreams: &'a Upstreams,
    is_over: bool,
}

impl UpstreamCall<'_, '_> {
    fn end(&mut self, error_type: Option<&'static str>, answer: Option<&Completion>) {
        self.is_over = true;
        let metrics = &self.upstreams.metrics;
        let labels = self.upstreams.labels(self.hop);
        if let Some(first_at) = self.handover.first_at() {
            let after = first_at.saturating_duration_since(self.began);
            labels.first_chunk(metrics, after);
        }
        let tokens = answer.map_or([None, None], |answer| {
            [answer.prompt_tokens, answer.completion_tokens]
        });
        labels.ended(metrics, self.began.elapsed(), error_type, tokens);
    }

    /// Whether nobody may be asked any more: the caller has a piece of the answer, or an answer
    /// was paid for, and only what one of them costs was reserved.
    fn is_final(&self) -> bool {
        self.is_paid || self.handover.first_at().is_some()
    }

    /// Notes an attempt that may have cost money. `seen`: what came of its answer.
    fn note_attempt(&mut self, outcome: &'static str, seen: Option<&Completion>) {
        let answering = seen.map(|seen| seen.model.as_str());
        self.question.attempts.push(Attempt {
            upstream: self.hop.upstream.clone(),
            model: self.hop.model.clone(),
            answering_model: answering.filter(|name| !name.is_empty()).map(str::to_owned),
            usage: seen.and_then(|seen| seen.usage),
            outcome,
        });
    }
}

impl Drop for UpstreamCall<'_, '_> {
    fn drop(&mut self) {
        if !self.is_over {
            if self.is_sent {
                self.note_attempt(CANCELLED, None);
            }
            self.end(Some(CANCELLED), None);
        }
    }
}

impl Upstreams {
    /// A client of the upstreams. It does not connect yet.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn new(config: &UpstreamConfig, metrics: Arc<Metrics>) -> Result<Self, Error> {
        let needs_tls = config.endpoints.iter().any(|each| each.base_url.is_https());
        let tls = transport::tls_config(needs_tls)?;
        let endpoints = config.endpoints.iter().map(|endpoint| {
            UpstreamEndpoint::new(endpoint, &tls, config.connect_timeout, &metrics)
        });
        let endpoints: Vec<_> = endpoints.collect::<Result<_, _>>()?;
        for endpoint in &endpoints {
            for model in route::labels(&endpoint.config, &config.default_model) {
                let provider = endpoint.provider;
                CallLabels { provider, model }.announce(&metrics);
            }
        }
        Ok(Self {
            endpoints,
            config: config.clone(),
            metrics,
        })
    }

    /// The labels of the metrics of calls that go to an upstream of a route.
    pub fn labels<'a>(&'a self, hop: &'a Hop) -> CallLabels<'a> {
        CallLabels {
            provider: self.endpoints[hop.endpoint].provider,
            model: &hop.label,
        }
    }

    /// Asks each upstream which models it has; see [`super::Client::check_models`].
    pub async fn check_models(&self) -> Vec<UpstreamCheck> {
        let endpoints = self.endpoints.iter().enumerate();
        let default = &self.config.default_model;
        let checks = endpoints.map(|(index, endpoint)| models::check(index, endpoint, default));
        join_all(checks).await.into_iter().flatten().collect()
    }

    /// The models of all upstreams; see [`super::Client::models`].
    pub async fn models(&self) -> Vec<ListedModel> {
        models::all(&self.config, &self.endpoints).await
    }

    /// Answers a question; see [`super::Client::complete`].
    pub async fn complete(
        &self,
        memory: Reservation,
        question: Question<'_>,
        sink: Option<&mut dyn AnswerSink>,
    ) -> Result<Completion, Failure> {
        let hops = question.route.hops();
        let Some(first) = hops.first() else {
            // A route to the mock, which only a client of the mock gives.
            return Err(fault::all_open(Duration::ZERO));
        };
        let mut call = UpstreamCall {
            question: &question,
            memory,
            handover: Handover::new(question.content, sink),
            began: Instant::now(),
            attempts: 0,
            hop: first,
            is_sent: false,
            is_paid: false,
            upstreams: self,
            is_over: false,
        };
        let mut last: Option<Fault> = None;
        let mut refusal: Option<UpstreamError> = None;
        let is_chat = call.handover.is_chat();
        let mut wait: Option<Duration> = None;
        for (at, hop) in hops.iter().enumerate() {
            match self.ask(hop, &hops[at + 1..], &mut call).await {
                Ok(mut answer) => {
                    call.end(None, Some(&answer));
                    if answer.model.is_empty() {
                        answer.model.clone_from(&hop.model);
                    }
                    answer.upstream_duration = call.began.elapsed();
                    answer.attempts = question.attempts.attempts();
                    return Ok(answer);
                }
                Err(NoAnswer::Refused(more)) => {
                    wait = Some(wait.map_or(more, |wait| wait.min(more)));
                }
                Err(NoAnswer::Failed(fault, told)) => {
                    last = Some(fault);
                    refusal = told;
                    if call.is_final() || !fault.may_succeed_elsewhere(is_chat) {
                        break;
                    }
                }
            }
        }
        let error_type = last.map_or("breaker_open", |fault| fault.error_type());
        call.end(Some(error_type), None);
        let failure = match last {
            Some(fault) => fault.into_failure(),
            None => fault::all_open(wait.unwrap_or_default()),
        };
        Err(Failure {
            upstream_error: refusal,
            attempts: question.attempts.attempts(),
            ..failure
        })
    }

    /// Asks one upstream until it answers or a retry is useless. `others` may be asked after it.
    async fn ask<'a>(
        &self,
        hop: &'a Hop,
        others: &[Hop],
        call: &mut UpstreamCall<'a, '_>,
    ) -> Result<Completion, NoAnswer> {
        let endpoint = &self.endpoints[hop.endpoint];
        let is_streamed = call.handover.is_streamed();
        let content = call.question.content;
        let body = request::request(
            &self.config,
            &endpoint.config,
            &hop.model,
            content,
            is_streamed,
        );
        let whole_by = call.began + self.config.total_timeout;
        let has_next = |now| {
            let mut others = others.iter();
            others.any(|each| self.endpoints[each.endpoint].breaker.would_admit(now))
        };
        let (mut retries, mut last) = (0, None::<Fault>);
        loop {
            let now = Instant::now();
            if now >= whole_by {
                let fault = last.unwrap_or_else(|| FaultKind::TotalTimeout.into());
                return Err(NoAnswer::Failed(fault, None));
            }
            let permit = match endpoint.breaker.admit(now) {
                Ok(permit) => permit,
                Err(wait) => {
                    let failed = |fault| NoAnswer::Failed(fault, None);
                    return Err(last.map_or(NoAnswer::Refused(wait), failed));
                }
            };
            if retries == 0 {
                endpoint.budget.note_call();
            }
            // The head of a whole answer comes when the answer is ready, so an upstream that hangs
            // looks like one that works. Half of the time that is left is for the other upstreams.
            let whole_by = if !is_streamed && has_next(now) {
                (now + (whole_by - now) / 2, FaultKind::AnswerTimeout)
            } else {
                (whole_by, FaultKind::TotalTimeout)
            };
            let limits = AnswerLimits {
                first_token_by: now + self.config.first_token_timeout,
                token_timeout: self.config.token_timeout,
                whole_by,
                text_bytes: self.config.max_response_bytes,
            };
            call.attempts += 1;
            call.hop = hop;
            // At the level of errors, as the spans around it, so that no filter separates a line
            // from its ids.
            let span = tracing::error_span!(
                "attempt",
                attempt = call.attempts,
                upstream = endpoint.config.name,
                status = tracing::field::Empty,
                upstream_request_id = tracing::field::Empty,
            );
            let mut attempt = UpstreamAttempt::new(endpoint, limits, permit);
            let (handover, memory) = (&mut call.handover, &mut call.memory);
            let answer = attempt
                .run(body.clone(), handover, memory, &mut call.is_sent)
                .instrument(span.clone())
                .await;
            let is_sent = std::mem::take(&mut call.is_sent);
            // If other attempts have used up the time, its end says nothing about this upstream.
            let is_short = call.attempts > 1 && limits.first_token_by > whole_by.0;
            let outcome = outcome(&answer, attempt.is_alive, is_short);
            if attempt.skipped > 0 {
                self.metrics
                    .upstream_events_skipped
                    .with_label_values(&[&endpoint.config.name])
                    .inc_by(attempt.skipped);
            }
            match &answer {
                Ok(answer) => call.note_attempt(COMPLETED, Some(answer)),
                Err(fault) if is_sent && fault.may_have_cost() => {
                    call.is_paid |= attempt.seen.usage.is_some();
                    call.note_attempt(fault.error_type(), Some(&attempt.seen));
                }
                Err(_) => {}
            }
            let refusal = attempt.refusal.take();
            let system = self.config.system_prompt.as_deref();
            span.in_scope(|| attempt.settle(&answer, outcome, chance(), content, system));
            let fault = match answer {
                Ok(answer) => return Ok(answer),
                Err(fault) => fault,
            };
            last = Some(fault);
            retries += 1;
            if call.is_final() || !fault.is_retryable() || retries > self.config.max_retries {
                return Err(NoAnswer::Failed(fault, refusal));
            }
            let wait = retry::backoff(retries, fault.retry_after, chance());
            let now = Instant::now();
            let is_too_late = now + wait >= call.began + self.config.total_timeout;
            if is_too_late || (wait > PATIENCE && has_next(now)) || !endpoint.budget.take(now) {
                return Err(NoAnswer::Failed(fault, refusal));
            }
            self.metrics
                .upstream_retries
                .with_label_values(&[endpoint.config.name.as_str(), fault.error_type()])
                .inc();
            tokio::time::sleep(wait).await;
        }
    }
}

/// What the client reads from an answer's body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnswerReading {
    /// The pieces of text that are handed over, joined.
    pub deltas: String,
    /// The objects that are handed over, if it is the answer to a chat request.
    pub objects: Vec<Vec<u8>>,
    /// The answer, or the word under which the failure is counted.
    pub answer: Result<Completion, &'static str>,
    /// Events that could not be read and were left out.
    pub skipped: u64,
}

/// Reads the body of an answer to a prompt as the client does, in the given pieces. For tests and
/// fuzzing, which need neither a connection nor a clock.
///
/// `most_text`: bytes of text that the answer may have. `is_cut`: the body is cut off after
/// the last piece.
#[doc(hidden)]
pub fn read_answer<'a>(
    pieces: impl IntoIterator<Item = &'a [u8]>,
    most_text: usize,
    is_cut: bool,
) -> AnswerReading {
    read_with(AnswerReader::new(most_text), pieces, is_cut)
}

/// The same for the answer to a chat request that wants so many choices.
#[doc(hidden)]
pub fn read_chat_answer<'a>(
    pieces: impl IntoIterator<Item = &'a [u8]>,
    most_text: usize,
    is_cut: bool,
    choices: u32,
) -> AnswerReading {
    read_with(AnswerReader::chat(most_text, choices), pieces, is_cut)
}

fn read_with<'a>(
    mut reader: AnswerReader,
    pieces: impl IntoIterator<Item = &'a [u8]>,
    is_cut: bool,
) -> AnswerReading {
    let (mut deltas, mut objects) = (String::new(), Vec::new());
    let mut on_object = |json: &[u8]| objects.push(json.to_vec());
    let mut failure = None;
    for piece in pieces {
        let fed = reader.feed(piece, &mut on_object);
        deltas.push_str(reader.new_text());
        if let Err(kind) = fed {
            failure = Some(kind);
            break;
        }
    }
    let answer = reader
        .finish(is_cut || failure.is_some(), &mut on_object)
        .map(|(answer, rest)| {
            deltas.push_str(&rest);
            answer
        });
    AnswerReading {
        deltas,
        objects,
        answer: answer.map_err(|kind| Fault::from(failure.unwrap_or(kind)).error_type()),
        skipped: reader.gathered.skipped,
    }
}

/// What an attempt shows about its upstream. The deadline of the whole call is the client's. If it
/// has passed, that is a failure only of an upstream that had enough time and did not even begin.
fn outcome(answer: &Result<Completion, Fault>, is_alive: bool, is_short: bool) -> AttemptOutcome {
    let Err(fault) = answer else {
        return AttemptOutcome::Success;
    };
    let is_late = matches!(
        fault.kind,
        FaultKind::TotalTimeout | FaultKind::AnswerTimeout
    );
    if fault.kind == FaultKind::TotalTimeout && is_alive {
        AttemptOutcome::Success
    } else if is_late && is_short {
        AttemptOutcome::Unknown
    } else if fault.is_outage() {
        AttemptOutcome::Failure
    } else {
        AttemptOutcome::Success
    }
}

/// A random number from 0 to 1. If the system has no randomness, 0.5 does no harm.
fn chance() -> f64 {
    getrandom::u32().map_or(0.5, |number| f64::from(number) / f64::from(u32::MAX))
}
