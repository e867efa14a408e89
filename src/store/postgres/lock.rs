//! Locks between servers: advisory locks of the database, each held by a transaction that is kept
//! open and does nothing else.
//!
//! It is a transaction and not a session, because a pooler gives a server connection to a
//! transaction and leaves it there until the end. An open transaction without a snapshot holds up
//! neither vacuum nor the building of an index.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use super::error::Cause;
use super::pool::{CONNECT, Connector, Pool};
use super::session::NO_TIMEOUTS;

/// A lock by its number, and how it is taken.
#[derive(Clone, Copy, Debug)]
pub(super) struct AdvisoryLock {
    number: i64,
    is_shared: bool,
}

/// Held by a server that has the database for itself. "PrmSsole".
pub(super) const SOLE_SERVER: AdvisoryLock = AdvisoryLock {
    number: 0x5072_6d53_736f_6c65,
    is_shared: false,
};
/// Held by each server that uses the database together with others. It is the same lock in shared
/// mode, so the two kinds of servers exclude each other.
pub(super) const REPLICA: AdvisoryLock = AdvisoryLock {
    is_shared: true,
    ..SOLE_SERVER
};
/// Held by the server that embeds stored prompts with a new model. "PrmSembd".
pub(super) const REEMBEDDING: AdvisoryLock = AdvisoryLock {
    number: 0x5072_6d53_656d_6264,
    is_shared: false,
};

/// How often the holder checks whether it still has its lock.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long the reply to that check may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// The pause between attempts to take a lock again that was lost.
const RETAKE_EVERY: Duration = Duration::from_millis(250);
/// How long a starting server waits for one that is stopping.
const START_WAIT: Duration = Duration::from_secs(3);

/// A lock that is held while this and its connection live.
#[derive(Debug)]
pub(super) struct HeldLock {
    client: Client,
    /// The process id and the start time of the backend of this connection, which identify it.
    backend: (i32, String),
}

/// Tries once; `None` if another server has the lock. `previous` names an earlier connection of
/// this server that may still hold the lock, for example after a broken network: its backend is
/// terminated.
pub(super) async fn attempt(
    connector: &Connector,
    lock: AdvisoryLock,
    previous: Option<&(i32, String)>,
) -> Result<Option<HeldLock>, Cause> {
    timeout(CONNECT, try_once(connector, lock, previous))
        .await
        .map_err(|_| Cause::TimedOut)?
        .map_err(|error| Cause::from(&error))
}

async fn try_once(
    connector: &Connector,
    lock: AdvisoryLock,
    previous: Option<&(i32, String)>,
) -> Result<Option<HeldLock>, tokio_postgres::Error> {
    let (client, _task) = connector.connect().await?;
    // The keepalives let the database notice soon if this host is gone. No timeout may end the
    // transaction.
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
        return Ok(None);
    }
    let backend = (row.try_get(1)?, row.try_get(2)?);
    Ok(Some(HeldLock { client, backend }))
}

/// A server's lock of the database: alone, or together with replicas that share a Redis. The two
/// kinds of servers exclude each other, because they would not share what each counts (throttles,
/// failed logins).
///
/// A server that is alone serves no calls while it does not hold its lock, for example because the
/// database was restarted: another server may take the lock in between. A replica goes on serving
/// meanwhile, because other replicas do no harm, until it finds that a server has locked the
/// database for itself.
pub struct ServerLock {
    lock: AdvisoryLock,
    held: HeldLock,
    connector: Connector,
    suspended: Arc<AtomicBool>,
}

impl ServerLock {
    /// Takes the lock; `None` if another server has it and keeps it for three seconds.
    pub(super) async fn take(pool: &Pool, lock: AdvisoryLock) -> Result<Option<Self>, Cause> {
        let deadline = Instant::now() + START_WAIT;
        loop {
            if let Some(held) = attempt(&pool.connector, lock, None).await? {
                return Ok(Some(Self {
                    lock,
                    held,
                    connector: pool.connector.clone(),
                    suspended: Arc::clone(&pool.suspended),
                }));
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
            sleep(RETAKE_EVERY).await;
        }
    }

    /// Holds the lock until `stop`, and takes it again when it was lost. Returns early, with
    /// `false`, if a server of the other kind, or another server that is alone, has taken the lock
    /// meanwhile: then this server must stop, and the store stays suspended.
    pub async fn hold(mut self, stop: CancellationToken) -> bool {
        loop {
            if stop.run_until_cancelled(lost(&self.held)).await.is_none() {
                return true;
            }
            if self.lock.is_shared {
                tracing::debug!("the lock of a replica was lost; taking it again");
            } else {
                self.suspended.store(true, Ordering::Release);
                tracing::warn!("the lock of the only server was lost; taking it again");
            }
            match stop.run_until_cancelled(self.retake()).await {
                Some(Some(held)) => self.held = held,
                Some(None) => return false,
                None => return true,
            }
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
                Ok(Some(held)) => return Some(held),
                Ok(None) => {
                    self.suspended.store(true, Ordering::Release);
                    // Terminating our earlier connection takes the database a moment.
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

/// Returns when the connection, and with it the lock, is lost or does not reply.
async fn lost(held: &HeldLock) {
    loop {
        sleep(LOOK_EVERY).await;
        let answer = timeout(PATIENCE, held.client.simple_query("SELECT 1")).await;
        if !matches!(answer, Ok(Ok(_))) {
            return;
        }
    }
}
