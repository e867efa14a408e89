//! Keeps the connection up: connects, probes, reconnects.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, RedisResult, Script};
use tokio::sync::{Notify, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Connection, ConnectionState, ErrorSummary, NumberedConnection, patiently};
use crate::config::RedisConfig;
use crate::telemetry::Metrics;

/// How often the connection is probed.
const PROBE_EVERY: Duration = Duration::from_millis(500);
/// Pauses between attempts to connect: the first, doubled up to the last. With a timeout of a
/// second for each attempt, the connection is up again within 2 s after Redis has returned.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_secs(1);
/// Commands that wait in the process while the connection sends others. Beyond it, callers wait
/// until their time is over.
const PIPELINE_COMMANDS: usize = 512;
/// A probe writes, and by a script, as all commands that matter do. A Redis that is a read-only
/// copy, is out of memory or forbids scripts still replies to a plain ping.
const PROBE: &str = "return redis.call('SET', KEYS[1], '1', 'PX', '1000')";

/// Why there is no connection at the start.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The URL cannot be used.
    #[error("it is not redis://HOST:PORT or rediss://HOST:PORT")]
    Url,
    /// No reply in time.
    #[error("nothing answered there within {} s; check that Redis runs and is reachable", .0.as_secs())]
    TimedOut(Duration),
    /// The server's certificate is not trusted.
    #[error(
        "the server's certificate is not trusted: it must be made out to the URL's host and come from an authority that this system trusts; SSL_CERT_FILE names another file of authorities"
    )]
    Distrusted,
    /// The connection failed, or Redis refused to be written to.
    #[error(
        "the connection failed ({0}); check that Redis runs, is reachable, and lets this user run scripts that write"
    )]
    Failed(ErrorSummary),
}

/// Keeps a [`Connection`] up. Dropping it takes the connection down for good.
pub struct ConnectionManager {
    state: Arc<ConnectionState>,
}

impl Connection {
    /// Connects, and keeps the connection up from then on.
    ///
    /// # Errors
    /// Redis cannot be reached or written to now. The text holds no part of the URL.
    pub async fn connect(
        config: &RedisConfig,
        metrics: Arc<Metrics>,
    ) -> Result<(Self, ConnectionManager), ConnectError> {
        let client = Client::open(config.url.expose()).map_err(|_| ConnectError::Url)?;
        let state = Arc::new(ConnectionState {
            client,
            prefix: config.prefix.clone(),
            patience: config.patience,
            connection: watch::Sender::new(None),
            up: watch::Sender::new(false),
            last_outage_end: watch::Sender::new(None),
            suspected: Notify::new(),
            metrics,
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        });
        let connected = patiently(config.patience, state.connect(0)).await;
        match connected {
            Ok(Ok(connected)) => state.set_up(connected),
            Ok(Err(error)) if is_distrust(&error) => return Err(ConnectError::Distrusted),
            Ok(Err(error)) => return Err(ConnectError::Failed(ErrorSummary::from(&error))),
            Err(_) => return Err(ConnectError::TimedOut(config.patience)),
        }
        let kept = Arc::clone(&state);
        let keep = async move { kept.stop.run_until_cancelled(kept.keep()).await };
        state.tasks.spawn(keep);
        let connection = Self(Arc::clone(&state));
        Ok((connection, ConnectionManager { state }))
    }
}

/// Whether a certificate was refused.
fn is_distrust(error: &redis::RedisError) -> bool {
    let held = || {
        // The client library gives the `Arc` as the source, not the error in it.
        let state = std::error::Error::source(error)?;
        let state = state.downcast_ref::<Arc<dyn std::error::Error + Send + Sync>>()?;
        let system = state.downcast_ref::<io::Error>()?;
        system.get_ref()?.downcast_ref::<rustls::Error>()
    };
    matches!(held(), Some(rustls::Error::InvalidCertificate(_)))
}

impl ConnectionManager {
    /// Ends the tasks of the connection and closes what they have open. Events that wait are
    /// published first, if Redis takes them soon.
    pub async fn close(self) {
        self.state.stop.cancel();
        self.state.tasks.close();
        self.state.tasks.wait().await;
    }
}

impl Drop for ConnectionManager {
    fn drop(&mut self) {
        self.state.stop.cancel();
    }
}

impl ConnectionState {
    /// Probes and replaces the connection, for ever.
    async fn keep(&self) {
        let mut number = 0;
        loop {
            // After the pause and after a failed command alike, the connection is probed.
            let _ = timeout(PROBE_EVERY, self.suspected.notified()).await;
            let current = self.connection.borrow().clone();
            if let Some(current) = current {
                match patiently(self.patience, self.probe(current.connection)).await {
                    Ok(Ok(())) => continue,
                    Ok(Err(_)) | Err(_) => self.set_down(current.number),
                }
            }
            number += 1;
            let connected = self.reconnect(number).await;
            self.set_up(connected);
        }
    }

    async fn reconnect(&self, number: u64) -> NumberedConnection {
        let mut pause = FIRST_PAUSE;
        loop {
            match patiently(self.patience, self.connect(number)).await {
                Ok(Ok(connected)) => return connected,
                Ok(Err(error)) => {
                    tracing::debug!(error = %ErrorSummary::from(&error), "Redis is still unavailable");
                }
                Err(_) => tracing::debug!("Redis still does not reply"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }

    async fn connect(&self, number: u64) -> RedisResult<NumberedConnection> {
        // Each command has its own timeout, and so has the caller of this.
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(None)
            .set_response_timeout(None)
            .set_pipeline_buffer_size(PIPELINE_COMMANDS);
        let connection = self
            .client
            .get_multiplexed_async_connection_with_config(&config)
            .await?;
        self.probe(connection.clone()).await?;
        Ok(NumberedConnection { connection, number })
    }

    async fn probe(&self, mut connection: MultiplexedConnection) -> RedisResult<()> {
        let (probe, key) = (Script::new(PROBE), format!("{}probe", self.prefix));
        probe.key(key).invoke_async(&mut connection).await
    }
}
