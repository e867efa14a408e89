//! The connection to the Redis (6.2 or newer, or Valkey) that several replicas share, and whether
//! it is up.
//!
//! One connection carries all commands of the process. A task probes it twice a second and replaces
//! it when it fails. While the connection is known to be down, every command fails at once, so an
//! unavailable Redis costs a request nothing.

mod manager;
mod script;

use std::fmt;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use redis::aio::MultiplexedConnection;
use redis::{Client, FromRedisValue};
use tokio::sync::{Notify, watch};
use tokio::time::error::Elapsed;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use self::manager::{ConnectError, ConnectionManager};
pub use self::script::{CLOCK, micros, script_with_clock, timed};
use crate::telemetry::Metrics;
pub use redis::Script;

/// How long a reply that has arrived at the socket may take to reach the task that waits for it.
const TURN: Duration = Duration::from_millis(50);

/// Why a command has no reply.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The connection is known to be down; nothing was sent.
    #[error("Redis is unavailable")]
    Unavailable,
    /// No reply in time. The command may have been carried out, or may still be.
    #[error("Redis did not answer in time")]
    TimedOut,
    /// The connection broke, or Redis refused the command. After a break it may have been carried
    /// out.
    #[error("Redis failed a command: {0}")]
    Failed(ErrorSummary),
}

/// What went wrong, in words that name neither hosts nor keys nor values.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ErrorSummary(String);

impl From<&redis::RedisError> for ErrorSummary {
    fn from(error: &redis::RedisError) -> Self {
        let code = error.code().unwrap_or_default();
        Self(format!("{} {code}", error.category()).trim_end().to_owned())
    }
}

/// The connection to the Redis that replicas share. Cheap to clone.
#[derive(Clone)]
pub struct Connection(Arc<ConnectionState>);

struct ConnectionState {
    client: Client,
    prefix: String,
    patience: Duration,
    connection: watch::Sender<Option<NumberedConnection>>,
    up: watch::Sender<bool>,
    /// When the last outage ended.
    last_outage_end: watch::Sender<Option<Instant>>,
    /// Notified when a command failed: the connection should be probed now.
    suspected: Notify,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

#[derive(Clone)]
struct NumberedConnection {
    connection: MultiplexedConnection,
    /// Distinguishes this connection from earlier ones.
    number: u64,
}

impl Connection {
    /// Whether commands are being sent; if not, they fail at once.
    pub fn is_up(&self) -> bool {
        *self.0.up.borrow()
    }

    /// Whether the connection is up, with its changes.
    pub fn watch(&self) -> watch::Receiver<bool> {
        self.0.up.subscribe()
    }

    /// Waits until commands can be sent. Returns the number of the connection, which distinguishes
    /// it from earlier ones.
    pub async fn connected(&self) -> u64 {
        let mut connection = self.0.connection.subscribe();
        loop {
            if let Some(connected) = &*connection.borrow_and_update() {
                return connected.number;
            }
            // The sender lives as long as `self`.
            let _ = connection.changed().await;
        }
    }

    /// Waits until the connection of that number is no longer in use: it broke, or its server no
    /// longer takes writes.
    pub async fn replaced(&self, number: u64) {
        let mut connection = self.0.connection.subscribe();
        let is_another = |current: &Option<NumberedConnection>| {
            current.as_ref().is_none_or(|known| known.number != number)
        };
        let _ = connection.wait_for(is_another).await;
    }

    /// When the last outage ended; `None` if there was none. Redis may have lost what it held
    /// before.
    pub fn last_outage_end(&self) -> Option<Instant> {
        *self.0.last_outage_end.borrow()
    }

    /// How long a command may take that the caller depends on.
    pub fn patience(&self) -> Duration {
        self.0.patience
    }

    /// The key of that name. All keys of this service begin with its prefix.
    pub fn key(&self, name: fmt::Arguments<'_>) -> String {
        format!("{}{name}", self.0.prefix)
    }

    /// The channel of that name. Unlike keys, channels are common to all databases of a Redis, so
    /// the name includes the database: a service on another database must not receive the events of
    /// this one.
    pub fn channel(&self, name: &str) -> String {
        let database = self.0.client.get_connection_info().redis_settings().db();
        self.key(format_args!("{database}:{name}"))
    }

    /// Runs a script; `command` names it in the metrics. Loads it first if Redis does not know it.
    ///
    /// A script that takes longer than `patience` fails. If `patience` is at least
    /// [`Self::patience`], the connection then counts as down.
    ///
    /// # Errors
    /// See [`Error`]. After `TimedOut` and `Failed` the script may have run.
    pub async fn run<T: FromRedisValue>(
        &self,
        command: &'static str,
        patience: Duration,
        invocation: &redis::ScriptInvocation<'_>,
    ) -> Result<T, Error> {
        let result = self.try_run(command, patience, invocation).await;
        if result.is_err() {
            let failures = &self.0.metrics.redis_command_failures;
            failures.with_label_values(&[command]).inc();
        }
        result
    }

    async fn try_run<T: FromRedisValue>(
        &self,
        command: &'static str,
        patience: Duration,
        invocation: &redis::ScriptInvocation<'_>,
    ) -> Result<T, Error> {
        let connected = self.0.connection.borrow().clone();
        let NumberedConnection {
            mut connection,
            number,
        } = connected.ok_or(Error::Unavailable)?;
        let started = Instant::now();
        let is_needed = patience >= self.patience();
        let work = invocation.invoke_async(&mut connection);
        let answer = if is_needed {
            patiently(patience, work).await
        } else {
            timeout(patience, work).await
        };
        let durations = &self.0.metrics.redis_command_duration;
        durations
            .with_label_values(&[command])
            .observe(started.elapsed().as_secs_f64());
        let (is_down, is_suspected, error) = match answer {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => {
                let summary = ErrorSummary::from(&error);
                (error.is_unrecoverable_error(), true, Error::Failed(summary))
            }
            Err(_) => (is_needed, is_needed, Error::TimedOut),
        };
        if is_down {
            self.0.set_down(number);
        }
        if is_suspected {
            self.0.suspected.notify_one();
        }
        Err(error)
    }

    /// Opens a separate connection for a subscription to `channel`, which is active when this
    /// returns.
    ///
    /// # Errors
    /// `TimedOut` or `Failed`.
    pub async fn subscribe(&self, channel: &str) -> Result<redis::aio::PubSub, Error> {
        let subscribed = patiently(self.patience(), async {
            let mut subscription = self.0.client.get_async_pubsub().await?;
            subscription.subscribe(channel).await?;
            Ok(subscription)
        });
        match subscribed.await {
            Ok(Ok(subscription)) => Ok(subscription),
            Ok(Err(error)) => Err(Error::Failed(ErrorSummary::from(&error))),
            Err(_) => Err(Error::TimedOut),
        }
    }

    /// Runs a task until the [`ConnectionManager`] is closed. The task must end soon after the
    /// token is cancelled, because closing waits for it.
    pub fn spawn<F>(&self, task: impl FnOnce(CancellationToken) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.0.tasks.spawn(task(self.0.stop.clone()));
    }
}

/// Waits for a reply that the caller depends on. A process that was not scheduled for a while may
/// find that the time is over although the reply has arrived. The task that reads the reply then
/// gets a little more time.
async fn patiently<T>(patience: Duration, work: impl Future<Output = T>) -> Result<T, Elapsed> {
    let mut work = pin!(work);
    match timeout(patience, work.as_mut()).await {
        Ok(answer) => Ok(answer),
        Err(_) => timeout(TURN, work).await,
    }
}

impl ConnectionState {
    /// Stops sending on that connection, if it is the one in use, and logs that once.
    fn set_down(&self, number: u64) {
        let was_up = self.connection.send_if_modified(|current| {
            let is_current = current.as_ref().is_some_and(|known| known.number == number);
            if is_current {
                *current = None;
            }
            is_current
        });
        if was_up {
            self.up.send_replace(false);
            self.metrics
                .backend_up
                .with_label_values(&["redis"])
                .set(0.0);
            tracing::warn!(
                "Redis is away: throttles and guessing limits are this replica's own, tickets are refused, open sockets are closed"
            );
        }
    }

    fn set_up(&self, connected: NumberedConnection) {
        let is_back = connected.number > 0;
        if is_back {
            self.last_outage_end.send_replace(Some(Instant::now()));
        }
        self.connection.send_replace(Some(connected));
        self.up.send_replace(true);
        self.metrics
            .backend_up
            .with_label_values(&["redis"])
            .set(1.0);
        if is_back {
            tracing::warn!("Redis is back: limits, tickets and events are shared again");
        }
    }
}
