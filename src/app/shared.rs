//! The parts that replicas share over Redis, or that one process has alone: the throttles, the
//! login rate limiter, the tickets, the broker.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;

use crate::config::Config;
use crate::credentials::{
    LocalLoginRateLimiter, LocalTickets, LoginRateLimiter, RedisLoginRateLimiter, RedisTickets,
    Tickets,
};
use crate::domain::{ClientSite, UserId};
use crate::realtime::{Broker, Hub, LocalBroker, RedisBroker};
use crate::redis::{Connection, ConnectionManager};
use crate::telemetry::Metrics;
use crate::throttle::{KeyWindows, RateSubject, RedisThrottle, SlidingWindows, Throttle};

/// The parts that a replica has in common with others, if there is a Redis to have them in.
pub struct Shared {
    pub prompt_throttle: Arc<dyn Throttle<UserId>>,
    pub v1_throttle: Arc<dyn Throttle<UserId>>,
    pub register_throttle: Arc<dyn Throttle<ClientSite>>,
    pub login_limiter: Arc<dyn LoginRateLimiter>,
    pub tickets: Arc<dyn Tickets>,
    pub broker: Arc<dyn Broker>,
    /// The link behind them, and what keeps it up.
    pub redis: Option<(Connection, ConnectionManager)>,
}

impl Shared {
    /// Builds them as the configuration says, over `redis` if there is one. `started`: no later
    /// than any instant to come.
    ///
    /// # Errors
    /// One line that names the setting, if Redis cannot be used.
    pub async fn build(
        config: &Config,
        redis: Option<(Connection, ConnectionManager)>,
        hub: &Arc<Hub>,
        metrics: &Arc<Metrics>,
        started: Instant,
    ) -> anyhow::Result<Self> {
        let prompt_rates = config.prompt_throttle.clone();
        let v1_rates = config.v1_throttle.clone();
        let register_rates = config.accounts.register_throttle.clone();
        let (hub, metrics) = (Arc::clone(hub), Arc::clone(metrics));
        // A key's rates hold over all front doors: each throttle of users shares these.
        let api_keys = Arc::new(KeyWindows::new(RateSubject::ApiKey, started));
        let Some((connection, manager)) = redis else {
            return Ok(Self {
                prompt_throttle: Arc::new(
                    SlidingWindows::new(prompt_rates, started).sharing(&api_keys),
                ),
                v1_throttle: Arc::new(SlidingWindows::new(v1_rates, started).sharing(&api_keys)),
                register_throttle: Arc::new(SlidingWindows::new(register_rates, started)),
                login_limiter: LocalLoginRateLimiter::new(started),
                tickets: Arc::new(LocalTickets::default()),
                broker: Arc::new(LocalBroker::new(hub, metrics)),
                redis: None,
            });
        };
        let prompt_throttle = RedisThrottle::new(
            connection.clone(),
            "prompts",
            prompt_rates,
            started,
            Arc::clone(&metrics),
        )
        .sharing(&api_keys);
        let v1_throttle = RedisThrottle::new(
            connection.clone(),
            "v1",
            v1_rates,
            started,
            Arc::clone(&metrics),
        )
        .sharing(&api_keys);
        let register_throttle = RedisThrottle::new(
            connection.clone(),
            "register",
            register_rates,
            started,
            Arc::clone(&metrics),
        );
        let broker = RedisBroker::start(connection.clone(), hub, Arc::clone(&metrics))
            .await
            .context("REDIS_URL: events cannot be subscribed to")?;
        Ok(Self {
            prompt_throttle: Arc::new(prompt_throttle),
            v1_throttle: Arc::new(v1_throttle),
            register_throttle: Arc::new(register_throttle),
            login_limiter: RedisLoginRateLimiter::new(connection.clone(), started, metrics),
            tickets: Arc::new(RedisTickets::new(connection.clone())),
            broker: Arc::new(broker),
            redis: Some((connection, manager)),
        })
    }
}
