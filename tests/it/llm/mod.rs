//! The client of the upstream, against one that behaves well, badly, slowly or not at all.

mod answers;
mod breaker;
mod calls;
mod faults;
mod retries;
mod secrecy;
mod signs;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use prompt_service::config::{BaseUrl, Endpoint, Secret, UpstreamConfig};
use prompt_service::domain::UserId;
use prompt_service::llm::{Client, Completion, Event, Failure, Observer};
use prompt_service::memory_budget::{MemoryBudget, Owner, Reservation};

use crate::support::{DEADLINE, Upstream};

/// Whose calls they are.
const USER: UserId = UserId(1);
const MS: Duration = Duration::from_millis(1);

/// What a call holds, of an account that is never full.
fn memory() -> Reservation {
    MemoryBudget::new(usize::MAX).hold(Owner::default(), 0)
}

/// An endpoint with a key.
pub fn endpoint(url: &str, model: &str, key: Option<&str>) -> Endpoint {
    Endpoint {
        model: model.to_owned(),
        base_url: BaseUrl::parse(url).unwrap(),
        api_key: key.map(Secret::new),
    }
}

/// One upstream, no retries, and more time than anything takes.
pub fn config(upstream: &Upstream) -> UpstreamConfig {
    UpstreamConfig {
        endpoints: vec![endpoint(&upstream.url(), "asked-1", Some("sk-primary"))],
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

/// A client whose events are kept, each as its debug form.
struct Watched {
    client: Client,
    events: Arc<Events>,
}

#[derive(Default)]
struct Events(Mutex<Vec<String>>);

impl Observer for Events {
    fn observe(&self, event: Event<'_>) {
        self.0.lock().unwrap().push(format!("{event:?}"));
    }
}

impl Watched {
    fn new(config: &UpstreamConfig) -> Self {
        let events = Arc::new(Events::default());
        let client = Client::new(config, Arc::clone(&events) as _).unwrap();
        Self { client, events }
    }

    /// How many events have that in them.
    fn count(&self, part: &str) -> usize {
        let events = self.events.0.lock().unwrap();
        events.iter().filter(|event| event.contains(part)).count()
    }

    /// The states of the breaker, in the order in which they were told.
    fn breaker_states(&self) -> Vec<String> {
        let events = self.events.0.lock().unwrap();
        let states = events.iter().filter_map(|event| {
            let (_, state) = event.split_once("Breaker { upstream: \"primary\", state: ")?;
            Some(state.trim_end_matches([' ', '}']).to_owned())
        });
        states.collect()
    }

    /// A whole answer.
    async fn ask(&self) -> Result<Completion, Failure> {
        let permit = self.client.admit(USER).unwrap();
        let call = self.client.complete(permit, memory(), "the-prompt", None);
        tokio::time::timeout(DEADLINE, call).await.unwrap()
    }

    /// A streamed answer, with the pieces that were handed over.
    async fn stream(&self) -> (Vec<String>, Result<Completion, Failure>) {
        let mut pieces = Vec::new();
        let mut keep = |piece: &str| pieces.push(piece.to_owned());
        let permit = self.client.admit(USER).unwrap();
        let call = self
            .client
            .complete(permit, memory(), "the-prompt", Some(&mut keep));
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
