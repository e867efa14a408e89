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
use super::session::NO_TIMEOUTS;

/// A lock by its number, and how it is taken.
#[derive(Clone, Copy, Debug)]
pub(super) struct AdvisoryLock {
    number: i64,
    is_shared: bool,
}

/// Of a server that has the database for itself. "PrmSsole".
const SOLE_SERVER: AdvisoryLock = AdvisoryLock {
    number: 0x5072_6d53_736f_6c65,
    is_shared: false,
};
/// Of each server that has it together with others: the same lock, so that neither kind is there beside the other.
const REPLICA: AdvisoryLock = AdvisoryLock {
    is_shared: true,
    ..SOLE_SERVER
};
/// Of the server that gives stored prompts vectors of a new model. "PrmSembd".
pub(super) const REEMBEDDING: AdvisoryLock = AdvisoryLock {
    number: 0x5072_6d53_656d_6264,
    is_shared: false,
};

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
pub(super) struct HeldLock {
    client: Client,
    /// Process and start of the server's end of the connection, which tell it from all others.
    backend: (i32, String),
}

/// What came of an attempt.
pub(super) enum LockAttempt {
    /// It is ours.
    Held(HeldLock),
    /// Another server has it.
    Taken,
}

/// Tries once. `previous` names an earlier connection of this server that may still hold the lock unknown to itself, as after
/// a broken network: it is ended.
pub(super) async fn attempt(
    connector: &Connector,
    lock: AdvisoryLock,
    previous: Option<&(i32, String)>,
) -> Result<LockAttempt, Cause> {
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
    lock: AdvisoryLock,
    previous: Option<&(i32, String)>,
) -> Result<LockAttempt, tokio_postgres::Error> {
    let (client, _task) = connector.connect().await?;
    // The server is to notice soon if this host is gone, and to leave the transaction alone.
    client
        .batch_execute(&format!(
            "BEGIN; {NO_TIMEOUTS}; SET LOCAL tcp_keepalives_idle = 5;
             SET LOCAL tcp_keepalives_interval = 2; SET LOCAL tcp_keepalives_count = 3"
        ))
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
            "SELECT CASE WHEN $2 THEN pg_try_advisory_xact_lock_shared($1) ELSE pg_try_advisory_xact_lock($1) END,
                    pid, backend_start::text
             FROM pg_stat_activity WHERE pid = pg_backend_pid()",
            &[&lock.number, &lock.is_shared],
        )
        .await?;
    if !row.try_get::<_, bool>(0)? {
        return Ok(LockAttempt::Taken);
    }
    let backend = (row.try_get(1)?, row.try_get(2)?);
    Ok(LockAttempt::Held(HeldLock { client, backend }))
}

/// A server's place at the database: alone, or among replicas that share a Redis. Servers of the two kinds do not mix, because
/// what one counts (throttles, guesses) the others would not know.
///
/// A server alone serves nothing while it does not hold its lock, for example because the database was restarted: whoever takes
/// the lock in between is then alone too. A replica goes on meanwhile, since others like it do no harm, until it finds
/// that a server alone has come in between.
pub struct ServerLock {
    lock: AdvisoryLock,
    held: HeldLock,
    connector: Connector,
    suspended: Arc<AtomicBool>,
}

impl ServerLock {
    /// Of a server alone; `None` if another server is there and stays for three seconds.
    pub(super) async fn alone(
        connector: Connector,
        suspended: Arc<AtomicBool>,
    ) -> Result<Option<Self>, Cause> {
        Self::take(SOLE_SERVER, connector, suspended).await
    }

    /// Of a replica; `None` if a server alone is there and stays for three seconds.
    pub(super) async fn among_replicas(
        connector: Connector,
        suspended: Arc<AtomicBool>,
    ) -> Result<Option<Self>, Cause> {
        Self::take(REPLICA, connector, suspended).await
    }

    async fn take(
        lock: AdvisoryLock,
        connector: Connector,
        suspended: Arc<AtomicBool>,
    ) -> Result<Option<Self>, Cause> {
        let deadline = Instant::now() + START_WAIT;
        loop {
            match attempt(&connector, lock, None).await? {
                LockAttempt::Held(held) => {
                    return Ok(Some(Self {
                        lock,
                        held,
                        connector,
                        suspended,
                    }));
                }
                LockAttempt::Taken if Instant::now() >= deadline => return Ok(None),
                LockAttempt::Taken => sleep(RETAKE_EVERY).await,
            }
        }
    }

    /// Holds the place until `stop`, and takes it again when it was lost. Returns early, with `false`, if a server that it
    /// cannot be beside has come meanwhile: this one must then stop. The store stays suspended in that case.
    pub async fn hold(mut self, stop: CancellationToken) -> bool {
        loop {
            tokio::select! {
                () = stop.cancelled() => return true,
                () = lost(&self.held) => {}
            }
            if self.lock.is_shared {
                tracing::debug!("the lock of a replica was lost; taking it again");
            } else {
                self.suspended.store(true, Ordering::Release);
                tracing::warn!("the lock of the only server was lost; taking it again");
            }
            let retaken = tokio::select! {
                () = stop.cancelled() => return true,
                retaken = self.retake() => retaken,
            };
            let Some(held) = retaken else {
                return false;
            };
            self.held = held;
            self.suspended.store(false, Ordering::Release);
            if self.lock.is_shared {
                tracing::debug!("the lock of a replica is held again");
            } else {
                tracing::info!("the lock of the only server is held again");
            }
        }
    }

    /// Tries until the lock is held again; `None` if another server has it.
    async fn retake(&self) -> Option<HeldLock> {
        let mut refused = 0;
        loop {
            match attempt(&self.connector, self.lock, Some(&self.held.backend)).await {
                Ok(LockAttempt::Held(held)) => return Some(held),
                Ok(LockAttempt::Taken) => {
                    self.suspended.store(true, Ordering::Release);
                    // Ending an earlier connection of our own takes the server a moment.
                    if refused > 8 {
                        return None;
                    }
                    refused += 1;
                }
                Err(_) => {}
            }
            sleep(RETAKE_EVERY).await;
        }
    }
}

/// Resolves when the connection, and with it the lock, is gone or does not answer.
async fn lost(held: &HeldLock) {
    loop {
        sleep(LOOK_EVERY).await;
        let answer = timeout(PATIENCE, held.client.simple_query("SELECT 1")).await;
        if !matches!(answer, Ok(Ok(_))) {
            return;
        }
    }
}
