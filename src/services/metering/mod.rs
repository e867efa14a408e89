//! What calls may cost before they are made, and what they have cost afterwards.
//!
//! The most that a call can cost is counted from above: a tokenizer that works on bytes makes no
//! more tokens than there are bytes, and the body of a request has more bytes around each message
//! than the upstream adds tokens.

mod candidates;

use std::collections::HashMap;

pub use self::candidates::Candidate;
use crate::config::UpstreamConfig;
use crate::domain::{Budget, Picodollars, TokenUsage, UsageEntry, UsageOutcome};
use crate::llm::{self, Attempt, Content, Route};
use crate::pricing::{Found, PriceTable, ServiceTier, provider_of_host};
use crate::store::CallBudgets;

/// Tokens that upstreams add to a prompt and a system prompt: names of roles and separators, about
/// ten, with room to spare.
const FRAMING_TOKENS: u64 = 64;

/// The prices in force, and the budget of the service.
#[derive(Debug)]
pub struct Metering {
    prices: PriceTable,
    /// Who sells the models of each upstream, where its address says that.
    providers: HashMap<String, Option<&'static str>>,
    /// Whether calls go to the mock, which costs nothing.
    is_mock: bool,
    /// Most tokens of the answer to a prompt, by setting.
    max_tokens: Option<u64>,
    /// Bytes that are sent before each prompt.
    system_bytes: u64,
    service: Option<Budget>,
}

/// How much a call can use at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Size {
    /// Tokens of the input; `None` if it is as much as the model takes.
    input: Option<u64>,
    /// Tokens of each answer; `None` if it is as much as the model makes.
    output: Option<u64>,
    /// How many answers.
    choices: u64,
    tier: ServiceTier,
}

/// What came of a call, as far as its cost is concerned.
#[derive(Clone, Copy, Debug)]
pub struct CallEnd {
    /// The bytes of the whole answer, if there is one.
    pub answer_bytes: Option<usize>,
    /// The most that the call can cost, as [`Metering::budgets`] said.
    pub most_cost: Option<Picodollars>,
}

impl Metering {
    /// Meters calls of the configured upstreams; `None` is the mock.
    pub fn new(
        prices: PriceTable,
        upstream: Option<&UpstreamConfig>,
        service: Option<Budget>,
    ) -> Self {
        let endpoints = upstream.iter().flat_map(|config| &config.endpoints);
        let providers = endpoints.map(|endpoint| {
            let provider = provider_of_host(endpoint.base_url.host());
            (endpoint.name.clone(), provider)
        });
        let system = upstream.and_then(|config| config.system_prompt.as_ref());
        Self {
            prices,
            providers: providers.collect(),
            is_mock: upstream.is_none(),
            max_tokens: upstream.and_then(|config| config.max_tokens).map(u64::from),
            system_bytes: system.map_or(0, |text| bytes(text.len())),
            service,
        }
    }

    /// The budget of the service.
    pub fn service_budget(&self) -> Option<Budget> {
        self.service
    }

    /// The most that a call can cost, and the budgets in force beside the user's.
    pub fn budgets(&self, route: &Route, content: Content<'_>, key: Option<Budget>) -> CallBudgets {
        CallBudgets {
            most_cost: self.most_cost(route, self.size(content)),
            key,
            service: self.service,
        }
    }

    fn size(&self, content: Content<'_>) -> Size {
        match content {
            Content::Prompt(text) => Size {
                input: Some(bytes(text.len()) + self.system_bytes + FRAMING_TOKENS),
                output: self.max_tokens,
                choices: 1,
                tier: ServiceTier::Standard,
            },
            Content::Chat(request) => {
                let body = request.body();
                let tier = request.service_tier();
                Size {
                    input: (!request.may_exceed_bytes())
                        .then(|| bytes(body.len()) + FRAMING_TOKENS),
                    output: request.most_output_tokens(),
                    choices: u64::from(request.choices()),
                    tier: match tier.as_deref() {
                        // Of the two that a request may get, the dearer one.
                        Some("flex") => ServiceTier::Standard,
                        word => ServiceTier::of(word),
                    },
                }
            }
        }
    }

    /// The dearest of the upstreams that may be asked decides. Only one brings an answer; what
    /// others may have cost is counted within this.
    fn most_cost(&self, route: &Route, size: Size) -> Option<Picodollars> {
        if self.is_mock {
            return Some(Picodollars(0));
        }
        let mut candidates = route.candidates();
        candidates.try_fold(Picodollars(0), |most, (upstream, model)| {
            let row = self.find(upstream, model)?;
            let (input, output) = most_tokens(&row, size)?;
            Some(most.max(row.prices.most_cost(input, output, size.tier)))
        })
    }

    fn find(&self, upstream: &str, model: &str) -> Option<Found<'_>> {
        let provider = self.providers.get(upstream).copied().flatten();
        self.prices.find(provider, model)
    }

    /// The rows of usage of a call that has ended.
    ///
    /// An attempt whose upstream has not said what it used is counted from above, and together such
    /// attempts cost no more than is left of the most that the call can cost.
    pub fn entries(
        &self,
        attempts: &[Attempt],
        content: Content<'_>,
        end: CallEnd,
    ) -> Vec<UsageEntry> {
        let size = self.size(content);
        let mut entries: Vec<UsageEntry> = attempts
            .iter()
            .map(|attempt| self.entry(attempt, size, end.answer_bytes))
            .collect();
        let known = entries.iter().filter(|entry| !entry.is_estimated);
        let known = known.filter_map(|entry| entry.cost).map(|cost| cost.0);
        let known = known.fold(0, i64::saturating_add);
        let mut left = end
            .most_cost
            .map(|most| most.0.saturating_sub(known).max(0));
        for entry in entries.iter_mut().filter(|entry| entry.is_estimated) {
            if let (Some(left), Some(cost)) = (&mut left, &mut entry.cost) {
                cost.0 = cost.0.min(*left);
                *left -= cost.0;
            }
        }
        entries
    }

    fn entry(&self, attempt: &Attempt, size: Size, answer_bytes: Option<usize>) -> UsageEntry {
        let outcome = match attempt.outcome {
            llm::COMPLETED => UsageOutcome::Answered,
            llm::CANCELLED => UsageOutcome::Cancelled,
            _ => UsageOutcome::Failed,
        };
        let answering = attempt.answering_model.as_deref();
        // By the price at which the call was admitted, if it has one: a name of the operator's may
        // have a price of its own, whatever model is behind it.
        let row = self
            .find(&attempt.upstream, &attempt.model)
            .or_else(|| self.find(&attempt.upstream, answering?))
            .filter(|_| !self.is_mock);
        let tokens = attempt.usage.or_else(|| {
            let output = match outcome {
                UsageOutcome::Answered => answer_bytes.map(bytes),
                UsageOutcome::Failed | UsageOutcome::Cancelled | UsageOutcome::Interrupted => None,
            };
            let (input, most) = row.as_ref().and_then(|row| most_tokens(row, size))?;
            Some(TokenUsage {
                input,
                output: output.map_or(most, |output| output.min(most)),
                ..TokenUsage::default()
            })
        });
        let cost = match (&row, &tokens) {
            (Some(row), Some(tokens)) => Some(row.prices.cost(tokens, size.tier)),
            (None, _) if self.is_mock => Some(Picodollars(0)),
            (None, _) | (_, None) => None,
        };
        UsageEntry {
            upstream: attempt.upstream.clone(),
            model_asked: attempt.model.clone(),
            model: answering.unwrap_or(&attempt.model).to_owned(),
            cost,
            price_version: cost.and(row).map(|row| row.version.clone()),
            outcome,
            is_estimated: attempt.usage.is_none() && tokens.is_some(),
            tokens,
        }
    }
}

/// The most tokens of input and output; `None` if neither the request nor the table bounds them.
fn most_tokens(row: &Found<'_>, size: Size) -> Option<(u64, u64)> {
    let bounded = |asked: Option<u64>, limit: Option<u64>| match (asked, limit) {
        (Some(asked), Some(limit)) => Some(asked.min(limit)),
        (asked, limit) => asked.or(limit),
    };
    let input = bounded(size.input, row.prices.max_input_tokens)?;
    let output = bounded(size.output, row.prices.max_output_tokens)?;
    let output = output.saturating_mul(size.choices);
    Some((input.min(TokenUsage::MOST), output.min(TokenUsage::MOST)))
}

fn bytes(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
