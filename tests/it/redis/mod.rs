//! What replicas share over Redis, held to its contract on a real server: in good days, and with the server stopped, restarted,
//! standing still and slow.

mod events;
mod guesses;
mod link;
mod service;
mod throttle;
mod tickets;
mod tls;

use std::sync::Arc;

use prompt_service::config::RedisConfig;
use prompt_service::redis::{Keeper, Link};
use prompt_service::telemetry::Metrics;

use crate::support::redis::RedisServer;

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

    /// Waits until the link is up again.
    async fn is_up(&self) {
        eventually!(self.link.is_up());
    }

    /// How many commands of that name have been sent.
    fn sent(&self, command: &str) -> u64 {
        let durations = &self.metrics.redis_command_duration;
        durations.with_label_values(&[command]).get_sample_count()
    }
}
