//! The chat-completions protocol of OpenAI and of everything that speaks it: one call, over however many attempts and upstreams it takes.
//!
//! Attempts end with the first piece of text: what a caller has been given is never asked for again. `docs/UPSTREAM.md` says when
//! there is another one.

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

use self::answer::Deltas;
use self::attempt::{Attempt, Limits};
use self::breaker::Verdict;
use self::endpoint::Endpoint;
use self::fault::{Fault, Kind};
pub use self::models::{Finding, Look};
use self::reader::{Answer, End, Reader};
use super::measure::CallLabels;
use super::{Completion, Failure};
use crate::config::UpstreamConfig;
use crate::memory_budget::Reservation;
use crate::telemetry::Metrics;

/// Where there is another upstream to ask, a longer wait for this one is not worth it.
const PATIENCE: Duration = Duration::from_secs(2);

/// The upstreams, in the order in which they are asked.
pub struct Upstreams {
    config: UpstreamConfig,
    endpoints: Vec<Endpoint>,
    metrics: Arc<Metrics>,
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

/// One call as it goes from attempt to attempt. Dropped before its end, it is counted as given up: it was paid for all the same.
struct Call<'a, 'd> {
    prompt: &'a str,
    memory: Reservation,
    deltas: Deltas<'d>,
    began: Instant,
    attempts: u32,
    /// Who was asked last; before that, who is first in line.
    endpoint: &'a Endpoint,
    metrics: &'a Metrics,
    is_over: bool,
}

impl Call<'_, '_> {
    fn end(&mut self, error_type: Option<&'static str>, answer: Option<&Answer>) {
        self.is_over = true;
        let labels = self.endpoint.labels();
        if let Some(first_at) = self.deltas.first_at() {
            let after = first_at.saturating_duration_since(self.began);
            labels.first_chunk(self.metrics, after);
        }
        let tokens = answer.map_or([None, None], |answer| {
            [answer.prompt_tokens, answer.completion_tokens]
        });
        labels.ended(self.metrics, self.began.elapsed(), error_type, tokens);
    }
}

impl Drop for Call<'_, '_> {
    fn drop(&mut self) {
        if !self.is_over {
            self.end(Some("cancelled"), None);
        }
    }
}

impl Upstreams {
    /// Makes ready to ask; nothing is connected yet.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn new(config: &UpstreamConfig, metrics: Arc<Metrics>) -> Result<Self, Error> {
        let needs_tls = config.endpoints.iter().any(|each| each.base_url.is_https());
        let tls = Arc::new(if needs_tls {
            transport::tls_config()?.ok_or(Error::NoRoots)?
        } else {
            transport::no_tls()?
        });
        let endpoints = config.endpoints.iter().enumerate().map(|(at, endpoint)| {
            let tls = Arc::clone(&tls);
            Endpoint::new(at, endpoint, tls, config.connect_timeout, &metrics)
        });
        let endpoints: Vec<_> = endpoints.collect::<Result<_, _>>()?;
        for endpoint in &endpoints {
            endpoint.labels().announce(&metrics);
        }
        Ok(Self {
            endpoints,
            config: config.clone(),
            metrics,
        })
    }

    /// What is asked first.
    pub fn first(&self) -> CallLabels<'_> {
        self.endpoints[0].labels()
    }

    /// Asks each upstream which models it has; see [`super::Client::look`].
    pub async fn look(&self) -> Vec<Look> {
        let looks = self.endpoints.iter().enumerate();
        join_all(looks.map(|(place, endpoint)| models::look(place, endpoint))).await
    }

    /// Answers a prompt; see [`super::Client::complete`].
    pub async fn complete(
        &self,
        memory: Reservation,
        prompt: &str,
        on_delta: Option<&mut (dyn FnMut(&str) + Send)>,
    ) -> Result<Completion, Failure> {
        let mut call = Call {
            prompt,
            memory,
            deltas: Deltas::new(on_delta),
            began: Instant::now(),
            attempts: 0,
            endpoint: &self.endpoints[0],
            metrics: &self.metrics,
            is_over: false,
        };
        let mut last: Option<Fault> = None;
        let mut wait: Option<Duration> = None;
        for (at, endpoint) in self.endpoints.iter().enumerate() {
            let others = &self.endpoints[at + 1..];
            match self.ask(endpoint, others, &mut call).await {
                Ok(answer) => {
                    call.end(None, Some(&answer));
                    return Ok(completion(answer, endpoint, call.began));
                }
                Err(Ended::Refused(more)) => {
                    wait = Some(wait.map_or(more, |wait| wait.min(more)));
                }
                Err(Ended::Failed(fault)) => {
                    last = Some(fault);
                    if call.deltas.first_at().is_some() || !fault.may_mend_elsewhere() {
                        break;
                    }
                }
            }
        }
        let error_type = last.map_or("breaker_open", |fault| fault.error_type());
        call.end(Some(error_type), None);
        Err(match last {
            Some(fault) => fault.into_failure(),
            None => fault::all_open(wait.unwrap_or_default()),
        })
    }

    /// Asks one upstream until it answers, or there is no sense in asking it again. `others` may be asked after it.
    async fn ask<'a>(
        &self,
        endpoint: &'a Endpoint,
        others: &[Endpoint],
        call: &mut Call<'a, '_>,
    ) -> Result<Answer, Ended> {
        let is_streamed = call.deltas.are_wanted();
        let prompts = [
            call.prompt,
            self.config.system_prompt.as_deref().unwrap_or_default(),
        ];
        let body = request::request(&self.config, &endpoint.config, call.prompt, is_streamed);
        let whole_by = call.began + self.config.total_timeout;
        let has_next = |now| others.iter().any(|each| each.breaker.would_admit(now));
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
            if retries == 0 {
                endpoint.budget.note_call();
            }
            // The head of a whole answer comes when the answer is ready, so a hang looks like work. Half of the time left is for
            // who can still be asked.
            let whole_by = if !is_streamed && has_next(now) {
                (now + (whole_by - now) / 2, Kind::AnswerTimeout)
            } else {
                (whole_by, Kind::TotalTimeout)
            };
            let limits = Limits {
                first_token_by: now + self.config.first_token_timeout,
                token_timeout: self.config.token_timeout,
                whole_by,
                text_bytes: self.config.max_response_bytes,
            };
            call.attempts += 1;
            call.endpoint = endpoint;
            let mut attempt = Attempt::new(endpoint, call.attempts, limits, pass);
            let answer = attempt
                .run(body.clone(), &mut call.deltas, &mut call.memory)
                .await;
            // What others have left it is too little to judge it by.
            let is_short = call.attempts > 1 && limits.first_token_by > whole_by.0;
            let verdict = verdict(&answer, attempt.is_alive(), is_short);
            if attempt.skipped() > 0 {
                self.metrics
                    .upstream_events_skipped
                    .with_label_values(&[&endpoint.name])
                    .inc_by(attempt.skipped());
            }
            attempt.settle(&answer, verdict, chance(), &prompts);
            let fault = match answer {
                Ok(answer) => return Ok(answer),
                Err(fault) => fault,
            };
            last = Some(fault);
            retries += 1;
            if call.deltas.first_at().is_some()
                || !fault.is_retryable()
                || retries > self.config.max_retries
            {
                return Err(Ended::Failed(fault));
            }
            let wait = retry::backoff(retries, fault.retry_after, chance());
            let now = Instant::now();
            let is_too_late = now + wait >= call.began + self.config.total_timeout;
            if is_too_late || (wait > PATIENCE && has_next(now)) || !endpoint.budget.take(now) {
                return Err(Ended::Failed(fault));
            }
            self.metrics
                .upstream_retries
                .with_label_values(&[endpoint.name.as_str(), fault.error_type()])
                .inc();
            tokio::time::sleep(wait).await;
        }
    }
}

/// What the client makes of an answer's body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reading {
    /// The text that is handed over piece by piece, put together.
    pub deltas: String,
    /// The answer, or the word under which its failure is counted.
    pub answer: Result<Completion, &'static str>,
    /// Events that could not be read and were left out.
    pub skipped: u64,
}

/// Reads the body of an answer as the client does, in the pieces in which it comes. A function of
/// its own for tests and fuzzing, which need neither a connection nor a clock.
///
/// `most_text`: bytes of text that the answer may have. `is_cut`: the body breaks off after the
/// last piece.
#[doc(hidden)]
pub fn read_answer<'a>(
    pieces: impl IntoIterator<Item = &'a [u8]>,
    most_text: usize,
    is_cut: bool,
) -> Reading {
    let (mut reader, mut deltas) = (Reader::new(most_text), String::new());
    let mut end = if is_cut { End::Cut } else { End::Orderly };
    let mut failure = None;
    for piece in pieces {
        let fed = reader.feed(piece);
        deltas.push_str(reader.new_text());
        if let Err(kind) = fed {
            (end, failure) = (End::Cut, Some(kind));
            break;
        }
    }
    let answer = reader.finish(end).map(|(answer, rest)| {
        deltas.push_str(&rest);
        Completion {
            text: answer.text,
            model: answer.model.unwrap_or_default(),
            finish_reason: answer.finish_reason,
            prompt_tokens: answer.prompt_tokens,
            completion_tokens: answer.completion_tokens,
            upstream_duration: Duration::ZERO,
        }
    });
    Reading {
        deltas,
        answer: answer.map_err(|kind| Fault::from(failure.unwrap_or(kind)).error_type()),
        skipped: reader.skipped(),
    }
}

/// What an attempt says of its upstream. The deadline of the whole call is the client's: it says something only of an upstream that
/// had its time and did not even begin.
fn verdict(answer: &Result<Answer, Fault>, is_alive: bool, is_short: bool) -> Verdict {
    match answer {
        Ok(_) => Verdict::Well,
        Err(fault) if fault.kind == Kind::TotalTimeout && is_alive => Verdict::Well,
        Err(fault)
            if matches!(fault.kind, Kind::TotalTimeout | Kind::AnswerTimeout) && is_short =>
        {
            Verdict::Unknown
        }
        Err(fault) if fault.is_outage() => Verdict::Ill,
        Err(_) => Verdict::Well,
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

/// A number from 0 to 1, evenly spread. If the system has no randomness to give, the middle spreads nothing and harms nothing.
fn chance() -> f64 {
    getrandom::u32().map_or(0.5, |number| f64::from(number) / f64::from(u32::MAX))
}
