//! What replicas share over Redis, tested on a real server: while it runs, and while it is stopped,
//! restarted, paused and slow.

mod connection;
mod events;
mod login_rate_limiter;
mod service;
mod throttle;
mod tickets;
mod tls;

use std::sync::Arc;

use prompt_service::config::RedisConfig;
use prompt_service::redis::{Connection, ConnectionManager};
use prompt_service::telemetry::Metrics;

use crate::support::redis::RedisServer;

/// One replica's connection, and its metrics.
struct Replica {
    redis: Connection,
    metrics: Arc<Metrics>,
    manager: ConnectionManager,
}

impl Replica {
    async fn of(server: &RedisServer) -> Self {
        Self::at(&server.config()).await
    }

    async fn at(config: &RedisConfig) -> Self {
        let metrics = Arc::new(Metrics::new());
        let (redis, manager) = Connection::connect(config, Arc::clone(&metrics))
            .await
            .unwrap();
        Self {
            redis,
            metrics,
            manager,
        }
    }

    /// Waits until the connection is known to be down.
    async fn is_down(&self) {
        eventually!(!self.redis.is_up());
    }

    /// Waits until the connection is up again.
    async fn is_up(&self) {
        eventually!(self.redis.is_up());
    }

    /// How many commands of that name have been sent.
    fn sent(&self, command: &str) -> u64 {
        let durations = &self.metrics.redis_command_duration;
        durations.with_label_values(&[command]).get_sample_count()
    }
}
