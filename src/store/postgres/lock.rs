//! Locks between servers: advisory locks of the database, held by a transaction that is kept open and does nothing else.
//!
//! A transaction rather than a session, because a transaction is what a pooler gives a server connection to and leaves it for.
//! An open transaction that has no snapshot holds up neither vacuum nor the building of an index.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use super::error::Cause;
use super::pool::{CONNECT, Connector};

/// The lock of a server that has the database for itself. "PrmSsole".
pub(super) const SOLE_SERVER: i64 = 0x5072_6d53_736f_6c65;
/// The lock of the server that gives stored prompts vectors of a new model. "PrmSembd".
pub(super) const REEMBEDDING: i64 = 0x5072_6d53_656d_6264;

/// How often the holder looks whether it still has its lock.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long the server may take to answer that.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long to wait before trying again to take a lock that was lost.
const RETAKE_EVERY: Duration = Duration::from_millis(250);
/// How long a starting server waits for one that is just stopping.
const START_WAIT: Duration = Duration::from_secs(3);

/// A lock that is held for as long as this lives and its connection does.
#[derive(Debug)]
pub(super) struct Held {
    client: Client,
    /// Process and start of the server's end of the connection, which tell it from all others.
    backend: (i32, String),
}

/// What came of an attempt.
pub(super) enum Attempt {
    /// It is ours.
    Held(Held),
    /// Another server has it.
    Taken,
}

/// Tries once. `previous` names an earlier connection of this server that may still hold the lock unknown to itself, as after
/// a broken network: it is ended.
pub(super) async fn attempt(
    connector: &Connector,
    lock: i64,
    previous: Option<&(i32, String)>,
) -> Result<Attempt, Cause> {
    timeout(CONNECT, try_once(connector, lock, previous))
        .await
        .map_err(|_| Cause::TimedOut)?
        .map_err(|error| match error.code() {
            Some(code) => Cause::Server(code.code().to_owned()),
            None => super::error::connection_failure(&error),
        })
}

async fn try_once(
    connector: &Connector,
    lock: i64,
    previous: Option<&(i32, String)>,
) -> Result<Attempt, tokio_postgres::Error> {
    let (client, _task) = connector.connect().await?;
    // The server is to notice soon if this host is gone, and to leave the idle transaction alone.
    client
        .batch_execute(
            "BEGIN; SET LOCAL idle_in_transaction_session_timeout = 0; SET LOCAL tcp_keepalives_idle = 5;
             SET LOCAL tcp_keepalives_interval = 2; SET LOCAL tcp_keepalives_count = 3",
        )
        .await?;
    if let Some((pid, started)) = previous {
        client
            .execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                 WHERE pid = $1 AND backend_start::text = $2",
                &[pid, started],
            )
            .await?;
    }
    let row = client
        .query_one(
            "SELECT pg_try_advisory_xact_lock($1), pid, backend_start::text FROM pg_stat_activity
             WHERE pid = pg_backend_pid()",
            &[&lock],
        )
        .await?;
    if !row.try_get::<_, bool>(0)? {
        return Ok(Attempt::Taken);
    }
    let backend = (row.try_get(1)?, row.try_get(2)?);
    Ok(Attempt::Held(Held { client, backend }))
}

/// Keeps every other server that would be the only one out of the database.
///
/// While the lock is not held, for example because the database was restarted, the store serves nothing: whoever takes the lock
/// in between is then alone too.
pub struct SoleServer {
    held: Held,
    connector: Connector,
    suspended: Arc<AtomicBool>,
}

impl SoleServer {
    /// Takes the lock; `None` if another server has it and keeps it for three seconds.
    pub(super) async fn take(
        connector: Connector,
        suspended: Arc<AtomicBool>,
    ) -> Result<Option<Self>, Cause> {
        let deadline = Instant::now() + START_WAIT;
        loop {
            match attempt(&connector, SOLE_SERVER, None).await? {
                Attempt::Held(held) => {
                    return Ok(Some(Self {
                        held,
                        connector,
                        suspended,
                    }));
                }
                Attempt::Taken if Instant::now() >= deadline => return Ok(None),
                Attempt::Taken => sleep(RETAKE_EVERY).await,
            }
        }
    }

    /// Holds the lock until `stop`, and takes it again when it was lost. Returns early, with `false`, if another server has
    /// taken it meanwhile: this one must then stop. The store stays suspended in that case.
    pub async fn hold(mut self, stop: CancellationToken) -> bool {
        loop {
            tokio::select! {
                () = stop.cancelled() => return true,
                () = lost(&self.held) => {}
            }
            self.suspended.store(true, Ordering::Release);
            tracing::warn!("the lock of the only server was lost; taking it again");
            let previous = self.held.backend.clone();
            let retaken = tokio::select! {
                () = stop.cancelled() => return true,
                retaken = retake(&self.connector, &previous) => retaken,
            };
            let Some(held) = retaken else {
                return false;
            };
            self.held = held;
            self.suspended.store(false, Ordering::Release);
            tracing::info!("the lock of the only server is held again");
        }
    }
}

/// Resolves when the connection, and with it the lock, is gone or does not answer.
async fn lost(held: &Held) {
    loop {
        sleep(LOOK_EVERY).await;
        let answer = timeout(PATIENCE, held.client.simple_query("SELECT 1")).await;
        if !matches!(answer, Ok(Ok(_))) {
            return;
        }
    }
}

/// Tries until the lock is held again; `None` if another server has it.
async fn retake(connector: &Connector, previous: &(i32, String)) -> Option<Held> {
    let mut refused = 0;
    loop {
        match attempt(connector, SOLE_SERVER, Some(previous)).await {
            Ok(Attempt::Held(held)) => return Some(held),
            // Ending an earlier connection of our own takes the server a moment.
            Ok(Attempt::Taken) if refused > 8 => return None,
            Ok(Attempt::Taken) => refused += 1,
            Err(_) => {}
        }
        sleep(RETAKE_EVERY).await;
    }
}
