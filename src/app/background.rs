//! Periodic background work, until the service stops.

use std::fmt::Display;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::{Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::{App, check_upstream};
use crate::api::Lifecycle;
use crate::domain::Timestamp;
use crate::services::health::{STORE_CHECK_EVERY, StoreHealth};
use crate::services::purge::Purge;
use crate::services::sockets;

/// How often the accounts and sessions of open sockets are checked; the contract allows 5 s.
const SOCKET_CHECK_EVERY: Duration = Duration::from_secs(2);
/// How often expired sessions, revoked tokens and old idempotency keys are deleted. They are
/// refused anyway; deleting them saves space.
const PURGE_EVERY: Duration = Duration::from_secs(600);
/// How often upstreams are asked whether their models end soon. They announce it months before.
const MODEL_CHECK_EVERY: Duration = Duration::from_secs(86_400);

impl App {
    pub(super) fn start_background(&self, lifecycle: &Lifecycle) {
        let Lifecycle {
            tasks, stopping, ..
        } = lifecycle;
        let (similarity, stop) = (Arc::clone(&self.similarity), stopping.clone());
        tasks.spawn(async move { similarity.prepare(stop).await });
        let (reembedding, stop) = (self.reembedding.clone(), stopping.clone());
        tasks.spawn(async move { reembedding.run(stop).await });

        let hub = Arc::clone(&self.state.hub);
        let accounts = Arc::clone(&self.store.accounts);
        let mut ticks = Ticks::new(SOCKET_CHECK_EVERY, stopping);
        tasks.spawn(async move {
            while ticks.next().await {
                let checked = sockets::close_ended(&hub, &*accounts).await;
                warn_if_failed(checked, "open sockets could not be checked");
            }
        });

        let health = Arc::clone(&self.state.health);
        let mut ticks = Ticks::new(STORE_CHECK_EVERY, stopping);
        tasks.spawn(async move {
            let mut store = StoreHealth::Ok;
            while ticks.next().await {
                // A store that does not respond must not delay the stop.
                let watched = ticks.stop.run_until_cancelled(health.watch_store(store));
                store = watched.await.unwrap_or(store);
            }
        });

        let (accounts, calls) = (&self.store.accounts, &self.store.calls);
        let mut purge = Purge::new(Arc::clone(accounts), Arc::clone(calls), Instant::now());
        let mut ticks = Ticks::new(PURGE_EVERY, stopping);
        tasks.spawn(async move {
            while ticks.next().await {
                let purged = purge.step(Timestamp::now(), Instant::now()).await;
                warn_if_failed(purged, "expired credentials and keys could not be deleted");
            }
        });

        let llm = Arc::clone(&self.llm);
        let mut ticks = Ticks::new(MODEL_CHECK_EVERY, stopping);
        tasks.spawn(async move {
            while ticks.next().await {
                // An upstream that does not respond must not delay the stop.
                let warned = check_upstream::warn_of_endings(&llm);
                ticks.stop.run_until_cancelled(warned).await;
            }
        });

        let prompts = self.state.prompts.clone();
        let mut ticks = Ticks::new(prompts.tend_leases_every(), stopping);
        tasks.spawn(async move {
            while ticks.next().await {
                let tended = prompts.tend_leases().await;
                warn_if_failed(tended, "the leases of running calls could not be renewed");
            }
        });
    }
}

/// Periodic ticks, the first of them now.
struct Ticks {
    interval: Interval,
    stop: CancellationToken,
}

impl Ticks {
    fn new(period: Duration, stop: &CancellationToken) -> Self {
        let mut interval = tokio::time::interval(period);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            interval,
            stop: stop.clone(),
        }
    }

    /// Waits for the next; false once the service stops.
    async fn next(&mut self) -> bool {
        let tick = self.stop.run_until_cancelled(self.interval.tick());
        tick.await.is_some()
    }
}

fn warn_if_failed<T, E: Display>(outcome: Result<T, E>, what: &'static str) {
    if let Err(error) = outcome {
        tracing::warn!(%error, "{what}");
    }
}
