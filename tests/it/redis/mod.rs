//! What replicas share over Redis, held to its contract on a real server: in good days, and with the server stopped, restarted,
//! standing still and slow.

mod events;
mod guesses;
mod link;
mod service;
mod throttle;
mod tickets;

use std::sync::Arc;
use std::time::{Duration, Instant};

use prompt_service::config::RedisConfig;
use prompt_service::redis::{Keeper, Link};
use prompt_service::telemetry::Metrics;

use crate::support::redis::RedisServer;

/// What the contract allows for recovery once Redis is back.
const RECOVERY: Duration = Duration::from_secs(5);

/// One replica's link, and what it counts.
struct Replica {
    link: Link,
    metrics: Arc<Metrics>,
    keeper: Keeper,
}

impl Replica {
    async fn of(server: &RedisServer) -> Self {
        Self::at(&server.config()).await
    }

    async fn at(config: &RedisConfig) -> Self {
        let metrics = Arc::new(Metrics::new());
        let (link, keeper) = Link::connect(config, Arc::clone(&metrics)).await.unwrap();
        Self {
            link,
            metrics,
            keeper,
        }
    }

    /// Waits until the link knows that Redis is away.
    async fn is_down(&self) {
        eventually!(!self.link.is_up());
    }

    /// Waits until the link is up again, which it must be in time.
    async fn is_up_in_time(&self) {
        let since = Instant::now();
        eventually!(self.link.is_up());
        assert!(since.elapsed() < RECOVERY, "{:?}", since.elapsed());
    }
}
