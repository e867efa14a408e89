//! The state that handlers share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::http::HeaderValue;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::ServerConfig;
use crate::domain::{ClientSite, UserId};
use crate::fair_semaphore::FairSemaphore;
use crate::memory_budget::MemoryBudget;
use crate::realtime::{Broker, Hub};
use crate::services::accounts::Accounts;
use crate::services::embeddings::Embeddings;
use crate::services::health::Health;
use crate::services::models::Models;
use crate::services::prompts::Prompts;
use crate::services::search::Searches;
use crate::services::usage::Usages;
use crate::telemetry::Metrics;
use crate::throttle::Throttle;

/// Everything that handlers share. Cheap to clone.
pub type AppState = Arc<State>;

/// The use cases and settings that the routes use.
pub struct State {
    /// Listening, limits, starting and stopping.
    pub server: ServerConfig,
    /// Accounts, tokens, sessions.
    pub accounts: Arc<Accounts>,
    /// Posting, listing, reading, deleting.
    pub prompts: Prompts,
    /// What calls used and cost.
    pub usages: Usages,
    /// Finding by meaning.
    pub searches: Arc<Searches>,
    /// Embedding texts for callers.
    pub embeddings: Embeddings,
    /// Readiness of the dependencies.
    pub health: Arc<Health>,
    /// The open sockets.
    pub hub: Arc<Hub>,
    /// Delivers events to the sockets.
    pub broker: Arc<dyn Broker>,
    /// Counts the posts of each user.
    pub prompt_throttle: Arc<dyn Throttle<UserId>>,
    /// Counts the calls of `/v1` of each user.
    pub v1_throttle: Arc<dyn Throttle<UserId>>,
    /// Lists the models that can be asked.
    pub models: Models,
    /// The throttle's rates as a header's value; `None` if the throttle is off.
    pub prompt_policy: Option<HeaderValue>,
    /// The memory budget of requests in flight.
    pub memory: Arc<MemoryBudget>,
    /// Permits for reading prompts from the store; users take turns.
    pub reads: Arc<FairSemaphore<UserId>>,
    /// Counts the registrations of each client site.
    pub register_throttle: Arc<dyn Throttle<ClientSite>>,
    /// The longest prompt or query, in characters.
    pub max_prompt_chars: usize,
    /// The metrics.
    pub metrics: Arc<Metrics>,
    /// Whether and how the service stops.
    pub lifecycle: Lifecycle,
}

/// How far the service is on its way to stopping.
#[derive(Clone, Debug, Default)]
pub struct Lifecycle {
    draining: Arc<AtomicBool>,
    /// Cancelled when the listener closes. From then on a request must not wait for a distant
    /// event: it would only delay the stop.
    pub closing: CancellationToken,
    /// Cancelled when sockets and background tasks must end.
    pub stopping: CancellationToken,
    /// Tasks that must finish before the process ends.
    pub tasks: TaskTracker,
}

impl Lifecycle {
    /// Begins the stop: from now on the service is not ready for new clients.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Release);
    }

    /// Whether the stop has begun.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }
}
