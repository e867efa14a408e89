//! The connections: made when needed, probed when they have been idle, closed at the first doubt.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use deadpool_postgres::{
    Connect, Hook, HookError, Manager, ManagerConfig, Object, PoolError, RecyclingMethod, Runtime,
    Timeouts,
};
use futures_util::future::BoxFuture;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Config, Row};
use tokio_postgres_rustls::MakeRustlsConnect;
use tokio_util::task::TaskTracker;

use super::error::{Cause, from_server, spoils_connection};
use super::session::{BEGIN_LONG, SESSION};
use crate::store::{Error, Stats};

/// How long a call may take, waiting for a connection included.
pub(super) const PATIENCE: Duration = Duration::from_secs(4);
/// The same for calls that read many rows and that no client waits for.
pub(super) const LONG_PATIENCE: Duration = Duration::from_secs(60);
/// How long a call may wait for a free connection.
const POOL_WAIT: Duration = Duration::from_secs(2);
/// How long making a connection may take, the handshakes included.
pub(super) const CONNECT: Duration = Duration::from_secs(3);
/// A connection that was idle for longer is probed before it is used.
const TRUSTED_IDLE: Duration = Duration::from_secs(1);
/// How long that probe may take.
const PROBE: Duration = Duration::from_secs(1);
/// How long cancelling a statement on the server may take.
const CANCEL: Duration = Duration::from_secs(1);

/// Makes connections, and tracks their tasks.
#[derive(Clone)]
pub(super) struct Connector {
    config: Config,
    tls: MakeRustlsConnect,
    tasks: TaskTracker,
}

impl Connector {
    pub fn new(config: Config, tls: MakeRustlsConnect) -> Self {
        Self {
            config,
            tls,
            tasks: TaskTracker::new(),
        }
    }

    /// A new connection and the task that moves its bytes. The task ends with the client.
    pub async fn connect(
        &self,
    ) -> Result<(tokio_postgres::Client, JoinHandle<()>), tokio_postgres::Error> {
        let (client, connection) = self.config.connect(self.tls.clone()).await?;
        let task = self.tasks.spawn(async move {
            if let Err(error) = connection.await {
                let cause = Cause::from(&error);
                tracing::debug!(%cause, "a connection to the database ended");
            }
        });
        client.batch_execute(SESSION).await?;
        Ok((client, task))
    }

    /// Cancels the statement on the server, without waiting for that. If only the connection ended,
    /// a backend that computes or waits for a lock would notice that much later.
    fn cancel(&self, client: &tokio_postgres::Client) {
        // Outside a runtime the cancellation cannot be sent; then the server's own limits end the
        // statement.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        let (token, tls) = (client.cancel_token(), self.tls.clone());
        self.tasks.spawn_on(
            async move {
                let _ = timeout(CANCEL, token.cancel_query(tls)).await;
            },
            &runtime,
        );
    }

    /// Waits until the tasks behind all connections have ended.
    async fn drained(&self) {
        self.tasks.close();
        // A paused server must not keep the process from ending.
        let _ = timeout(PROBE, self.tasks.wait()).await;
    }
}

impl Connect for Connector {
    fn connect(
        &self,
        _: &Config,
    ) -> BoxFuture<'_, Result<(tokio_postgres::Client, JoinHandle<()>), tokio_postgres::Error>>
    {
        Box::pin(Self::connect(self))
    }
}

/// Writes since the store was opened.
#[derive(Debug, Default)]
struct WriteCounters {
    written: AtomicU64,
    failed: AtomicU64,
}

/// A bounded set of connections.
pub(super) struct Pool {
    pool: deadpool_postgres::Pool,
    pub connector: Connector,
    writes: Arc<WriteCounters>,
    /// While set, calls are refused: see [`ServerLock`](super::ServerLock).
    pub suspended: Arc<AtomicBool>,
}

impl Pool {
    pub fn new(connector: Connector, size: usize) -> Result<Self, deadpool_postgres::BuildError> {
        let manager = Manager::from_connect(
            connector.config.clone(),
            connector.clone(),
            ManagerConfig {
                recycling_method: RecyclingMethod::Fast,
            },
        );
        let probe = Hook::async_fn(|client: &mut deadpool_postgres::ClientWrapper, metrics| {
            let is_trusted = metrics.last_used() < TRUSTED_IDLE;
            Box::pin(async move {
                if is_trusted {
                    return Ok(());
                }
                match timeout(PROBE, client.simple_query("")).await {
                    Ok(Ok(_)) => Ok(()),
                    Ok(Err(error)) => Err(HookError::Backend(error)),
                    Err(_) => Err(HookError::message("no sign of life")),
                }
            })
        });
        let pool = deadpool_postgres::Pool::builder(manager)
            .max_size(size)
            .timeouts(Timeouts {
                wait: Some(POOL_WAIT),
                create: Some(CONNECT),
                recycle: Some(PROBE),
            })
            .runtime(Runtime::Tokio1)
            .pre_recycle(probe)
            .build()?;
        Ok(Self {
            pool,
            connector,
            writes: Arc::default(),
            suspended: Arc::default(),
        })
    }

    /// A connection for one call, which must end within `patience`.
    pub async fn connection(&self, patience: Duration) -> Result<Connection, Error> {
        if self.suspended.load(Ordering::Acquire) {
            return Err(Cause::Suspended.into());
        }
        let deadline = Instant::now() + patience;
        let client = match timeout_at(deadline, self.pool.get()).await {
            Ok(Ok(client)) => client,
            Ok(Err(error)) => return Err(no_connection(&error).into()),
            Err(_) => return Err(Cause::TimedOut.into()),
        };
        Ok(Connection {
            client: Some(client),
            connector: self.connector.clone(),
            is_long: patience > PATIENCE,
            deadline,
            is_waiting: false,
            in_transaction: false,
            writes: Arc::clone(&self.writes),
        })
    }

    /// The rows of the only statement of a call.
    pub async fn query(&self, sql: &str, arguments: Arguments<'_>) -> Result<Vec<Row>, Error> {
        let mut connection = self.connection(PATIENCE).await?;
        connection.query(sql, arguments).await
    }

    /// Does the same for a statement that changes rows.
    pub async fn write(&self, sql: &str, arguments: Arguments<'_>) -> Result<Vec<Row>, Error> {
        let mut connection = self.connection(PATIENCE).await?;
        connection.write(sql, arguments).await
    }

    pub fn stats(&self) -> Stats {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let written = load(&self.writes.written);
        Stats {
            queued_writes: self.pool.status().waiting,
            queued_reads: 0,
            committed_batches: written,
            committed_operations: written,
            failed_batches: load(&self.writes.failed),
        }
    }

    /// Refuses further calls and closes the connections that are not in use.
    pub async fn close(&self) {
        self.pool.close();
        self.connector.drained().await;
    }
}

/// The cause, without the texts of the library, which quote the server.
fn no_connection(error: &PoolError) -> Cause {
    match error {
        PoolError::Timeout(deadpool_postgres::TimeoutType::Wait) => Cause::PoolExhausted,
        PoolError::Timeout(_) => Cause::TimedOut,
        PoolError::Backend(error) => error.into(),
        PoolError::Closed => Cause::Closed,
        PoolError::NoRuntimeSpecified | PoolError::PostCreateHook(_) => {
            Cause::Connection("no connection was made".to_owned())
        }
    }
}

/// A statement's arguments.
pub(super) type Arguments<'a> = &'a [&'a (dyn ToSql + Sync)];

/// A connection in use by one call. Dropping it returns it to the pool. It is closed instead if a
/// reply is outstanding, if it is broken, or if it is inside a transaction.
pub(super) struct Connection {
    client: Option<Object>,
    connector: Connector,
    /// Whether its statements may take longer than a session usually allows.
    is_long: bool,
    deadline: Instant,
    is_waiting: bool,
    in_transaction: bool,
    writes: Arc<WriteCounters>,
}

impl Connection {
    /// The rows of a statement, which is prepared once for each connection.
    pub async fn query(&mut self, sql: &str, arguments: Arguments<'_>) -> Result<Vec<Row>, Error> {
        if self.is_long && !self.in_transaction {
            return self.query_within(BEGIN_LONG, sql, arguments).await;
        }
        let client = self.client.as_ref().ok_or(Cause::TimedOut)?;
        let answer = async {
            let statement = client.prepare_cached(sql).await?;
            client.query(&statement, arguments).await
        };
        settle(self.deadline, &mut self.is_waiting, answer).await
    }

    /// Runs a statement that changes rows; returns its rows.
    pub async fn write(&mut self, sql: &str, arguments: Arguments<'_>) -> Result<Vec<Row>, Error> {
        let answer = self.query(sql, arguments).await;
        let counter = match &answer {
            Ok(_) => &self.writes.written,
            Err(_) => &self.writes.failed,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        answer
    }

    /// Begins a transaction for the statements that follow. Without [`commit`](Self::commit) it is
    /// rolled back.
    pub async fn begin(&mut self) -> Result<(), Error> {
        self.in_transaction = true;
        let begin = if self.is_long { BEGIN_LONG } else { "BEGIN" };
        self.control(begin).await
    }

    /// Commits the transaction. After an error it may have been committed all the same.
    pub async fn commit(&mut self) -> Result<(), Error> {
        self.control("COMMIT").await?;
        self.in_transaction = false;
        Ok(())
    }

    async fn control(&mut self, sql: &str) -> Result<(), Error> {
        let client = self.client.as_ref().ok_or(Cause::TimedOut)?;
        let answer = client.batch_execute(sql);
        settle(self.deadline, &mut self.is_waiting, answer).await
    }

    /// The rows of a statement in a separate transaction that begins with `begin`. All of it is
    /// sent at once and takes one round trip. It works behind a pooler that gives each transaction
    /// another session.
    pub async fn query_within(
        &mut self,
        begin: &str,
        sql: &str,
        arguments: Arguments<'_>,
    ) -> Result<Vec<Row>, Error> {
        let client = self.client.as_ref().ok_or(Cause::TimedOut)?;
        let answer = async {
            let statement = client.prepare_cached(sql).await?;
            // They are polled in this order, and each sends when it is first polled.
            let (begun, rows, ended) = tokio::join!(
                biased;
                client.batch_execute(begin),
                client.query(&statement, arguments),
                client.batch_execute("COMMIT"),
            );
            begun?;
            let rows = rows?;
            ended?;
            Ok(rows)
        };
        settle(self.deadline, &mut self.is_waiting, answer).await
    }
}

/// Waits for the server's reply until the deadline. `is_waiting` stays set if the connection is of
/// no more use.
async fn settle<T>(
    deadline: Instant,
    is_waiting: &mut bool,
    answer: impl Future<Output = Result<T, tokio_postgres::Error>>,
) -> Result<T, Error> {
    *is_waiting = true;
    match timeout_at(deadline, answer).await {
        Ok(Ok(answer)) => {
            *is_waiting = false;
            Ok(answer)
        }
        Ok(Err(error)) => {
            *is_waiting = spoils_connection(&error);
            Err(from_server(&error))
        }
        Err(_) => Err(Cause::TimedOut.into()),
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(client) = self.client.take()
            && (self.is_waiting || self.in_transaction)
        {
            if self.is_waiting {
                self.connector.cancel(&client);
            }
            // The next call would wait for a reply that may never come, or work inside the
            // transaction of this one.
            drop(Object::take(client));
        }
    }
}
