//! The client of the upstream, with upstreams that behave well, badly, slowly or not at all.

mod answers;
mod breaker;
mod calls;
mod chat;
mod faults;
mod retries;
mod routes;
mod secrecy;
mod signs;

use std::sync::Arc;
use std::time::Duration;

use prompt_service::config::{
    BaseUrl, Endpoint, ModelPattern, Secret, ServedModels, UpstreamConfig,
};
use prompt_service::domain::UserId;
use prompt_service::llm::{AttemptLog, Client, Completion, Content, Failure, Question, TextSink};
use prompt_service::memory_budget::{MemoryBudget, Owner, Reservation};
use prompt_service::telemetry::Metrics;

use crate::support::{DEADLINE, Upstream};

/// The user of the calls.
const USER: UserId = UserId(1);
const MS: Duration = Duration::from_millis(1);

/// The memory of a call, without a limit.
fn memory() -> Reservation {
    MemoryBudget::new(usize::MAX).hold(Owner::default(), 0)
}

/// The only upstream, which serves every model.
pub fn primary(url: &str, key: Option<&str>) -> Endpoint {
    Endpoint {
        name: "primary".to_owned(),
        base_url: BaseUrl::parse(url).unwrap(),
        api_key: key.map(Secret::new),
        models: ServedModels::any(),
        fallback: Vec::new(),
    }
}

/// Adds an upstream that is asked after the others.
pub fn add_fallback(config: &mut UpstreamConfig, url: &str, model: &str, key: Option<&str>) {
    let at = config.endpoints.len();
    config.endpoints[0].fallback.push(at);
    config.endpoints.push(Endpoint {
        name: format!("fallback-{at}"),
        models: ServedModels::Always(model.to_owned()),
        ..primary(url, key)
    });
}

/// An upstream of a list.
pub fn named(
    name: &str,
    upstream: &Upstream,
    patterns: &[&str],
    aliases: &[(&str, &str)],
    fallback: &[usize],
) -> Endpoint {
    let aliases = aliases
        .iter()
        .map(|(alias, model)| ((*alias).to_owned(), (*model).to_owned()));
    Endpoint {
        name: name.to_owned(),
        models: ServedModels::Matching {
            patterns: patterns
                .iter()
                .map(|each| ModelPattern::parse(each).unwrap())
                .collect(),
            aliases: aliases.collect(),
        },
        fallback: fallback.to_vec(),
        ..primary(&upstream.url(), None)
    }
}

/// One upstream, no retries, and more time than any call takes.
pub fn config(upstream: &Upstream) -> UpstreamConfig {
    UpstreamConfig {
        is_list: false,
        endpoints: vec![primary(&upstream.url(), Some("sk-primary"))],
        default_model: "asked-1".to_owned(),
        system_prompt: None,
        max_tokens: None,
        temperature: None,
        top_p: None,
        connect_timeout: DEADLINE,
        first_token_timeout: DEADLINE,
        token_timeout: DEADLINE,
        total_timeout: DEADLINE,
        max_retries: 0,
        // Half of them are for the one user that most tests have.
        max_in_flight: 16,
        max_response_bytes: 4096,
    }
}

/// A client and its metrics.
struct Watched {
    client: Client,
    metrics: Arc<Metrics>,
}

impl Watched {
    fn new(config: &UpstreamConfig) -> Self {
        let metrics = Arc::new(Metrics::new());
        let client = Client::new(config, Arc::clone(&metrics)).unwrap();
        Self { client, metrics }
    }

    /// The sum of the metric's series that have the label.
    fn count(&self, metric: &str, label: &str) -> u64 {
        let text = String::from_utf8(self.metrics.render()).unwrap();
        let lines = text.lines().filter_map(|line| line.strip_prefix(metric));
        let lines = lines.filter(|line| line.starts_with(['{', ' ']) && line.contains(label));
        let values = lines.map(|line| line.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap());
        values.sum::<f64>() as u64
    }

    /// How many calls have ended with the label.
    fn ended(&self, label: &str) -> u64 {
        self.count("gen_ai_client_operation_duration_seconds_count", label)
    }

    fn in_flight(&self) -> i64 {
        self.metrics.upstream_calls_in_flight.get()
    }

    /// The state of the first upstream's breaker.
    fn breaker(&self) -> &'static str {
        let state = &self.metrics.upstream_breaker_state;
        let state = state.with_label_values(&["primary"]).get();
        ["closed", "half-open", "open"][state as usize]
    }

    /// A prompt for the default model.
    fn question<'a>(&'a self, prompt: &'a str) -> Question<'a> {
        Question {
            route: self.client.default_route(),
            content: Content::Prompt(prompt),
            attempts: AttemptLog::default(),
        }
    }

    /// A whole answer.
    async fn ask(&self) -> Result<Completion, Failure> {
        let permit = self.client.admit(USER).unwrap();
        let question = self.question("the-prompt");
        let call = self.client.complete(permit, memory(), question, None);
        tokio::time::timeout(DEADLINE, call).await.unwrap()
    }

    /// A streamed answer, with the pieces that were handed over.
    async fn stream(&self) -> (Vec<String>, Result<Completion, Failure>) {
        let mut pieces = Vec::new();
        let mut keep = TextSink(|piece: &str| pieces.push(piece.to_owned()));
        let permit = self.client.admit(USER).unwrap();
        let question = self.question("the-prompt");
        let call = self
            .client
            .complete(permit, memory(), question, Some(&mut keep));
        let answer = tokio::time::timeout(DEADLINE, call).await.unwrap();
        (pieces, answer)
    }

    /// A streamed or a whole answer, without its pieces.
    async fn call(&self, is_streamed: bool) -> Result<Completion, Failure> {
        match is_streamed {
            true => self.stream().await.1,
            false => self.ask().await,
        }
    }
}
