//! Slows down the guessing of passwords.
//!
//! The first failures of a minute are answered as such; after them even the right password is refused for a while, so that a
//! guesser learns nothing more. Failures are counted by client and name, and by client alone: nobody can lock another out.

mod redis_guesses;

use std::collections::hash_map::RandomState;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::hash::BuildHasher;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::sync::Notify;
use tokio::sync::futures::OwnedNotified;

pub use self::redis_guesses::RedisGuesses;
use self::redis_guesses::Reservation;
use crate::domain::ClientNetwork;

/// Failures of one name from one client within [`WINDOW`] that are answered.
const MAX_FAILURES_OF_NAME: usize = 10;
/// Failures of all names from one client within [`WINDOW`] that are answered.
const MAX_FAILURES_OF_CLIENT: usize = 100;
const WINDOW: Duration = Duration::from_secs(60);
/// Clients whose failures are remembered: some 150 would have to fail every second to fill the table, more than two cores can
/// hash. Each takes at most 2 KiB (100 failures of 16 bytes), so the table ends at about 20 MB, and is usually near nothing.
const MAX_CLIENTS: usize = 10_000;
/// Attempts of one client that may wait for others of its own.
const MAX_WAITING: usize = 256;

/// Why a password may not be tried now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Too many failures; a try after this long is answered.
    #[error("too many failed attempts")]
    TooMany {
        /// How long.
        retry_after: Duration,
    },
    /// Too many attempts of this client wait for others of its own.
    #[error("too many attempts at once")]
    Overloaded,
}

/// How often passwords may be guessed: the first ten failures a minute of one name from one client, and the first hundred of
/// one client, are answered.
#[async_trait]
pub trait GuessLimit: Send + Sync {
    /// Asks to try a password for `name`, in its canonical form, and registers the attempt before it is hashed. While the
    /// failures and the attempts under way together reach a limit, waits for outcomes: so of any number of parallel
    /// attempts exactly as many fail with an answer as the limit says, and right ones are not refused for their number.
    ///
    /// `clock` is read at each decision; an implementation whose counts are shared goes by the clock of whatever keeps them.
    /// Dropping the future withdraws the question. Keepers that cannot be reached never mean no limit.
    async fn begin(
        self: Arc<Self>,
        client: ClientNetwork,
        name: &str,
        clock: &(dyn Fn() -> Instant + Send + Sync),
    ) -> Result<Attempt, Refused>;
}

/// Failed attempts of the last minute, and attempts whose outcome is not known yet.
///
/// Names are kept as keyed 64-bit hashes: a collision, which nobody can bring about, would make two names of one client share
/// their ten failures.
#[derive(Debug)]
pub struct Guesses {
    epoch: Instant,
    name_hash: RandomState,
    table: Mutex<Table>,
}

/// Time since the epoch of the [`Guesses`].
type Moment = Duration;
type NameHash = u64;

#[derive(Debug, Default)]
struct Table {
    clients: HashMap<ClientNetwork, Client>,
    /// Every client with failures, by the last of them.
    by_last_failure: BTreeSet<(Moment, ClientNetwork)>,
}

#[derive(Debug, Default)]
struct Client {
    /// Rising, at most [`MAX_FAILURES_OF_CLIENT`].
    failures: VecDeque<(Moment, NameHash)>,
    /// Attempts that have been let through and have not ended; with `failures` within the limits.
    in_flight: Vec<NameHash>,
    waiting: usize,
    /// Rings when an attempt ends.
    ended: Arc<Notify>,
}

enum Decision {
    Try,
    Wait,
    Refuse(Duration),
}

impl Guesses {
    /// Nobody has failed yet. `epoch`: no later than any instant to come.
    pub fn new(epoch: Instant) -> Arc<Self> {
        Arc::new(Self {
            epoch,
            name_hash: RandomState::new(),
            table: Mutex::default(),
        })
    }

    /// Clients that are remembered at the moment, at most some 10,000 besides those with attempts in flight.
    pub fn tracked_clients(&self) -> usize {
        self.lock().clients.len()
    }

    fn wait_place(
        self: &Arc<Self>,
        table: &mut Table,
        client: ClientNetwork,
    ) -> Result<(WaitPlace, OwnedNotified), Refused> {
        let known = table.clients.entry(client).or_default();
        if known.waiting >= MAX_WAITING {
            return Err(Refused::Overloaded);
        }
        known.waiting += 1;
        let place = WaitPlace {
            guesses: Arc::clone(self),
            client,
        };
        // Made under the lock, so that no outcome from here on is missed.
        Ok((place, Arc::clone(&known.ended).notified_owned()))
    }

    fn moment(&self, now: Instant) -> Moment {
        now.saturating_duration_since(self.epoch)
    }

    /// Nothing panics while the table is locked; if it did, the counts would still be whole.
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl GuessLimit for Guesses {
    async fn begin(
        self: Arc<Self>,
        client: ClientNetwork,
        name: &str,
        clock: &(dyn Fn() -> Instant + Send + Sync),
    ) -> Result<Attempt, Refused> {
        let name = self.name_hash.hash_one(name);
        loop {
            let (_place, ended) = {
                let mut table = self.lock();
                let now = self.moment(clock());
                match table.decide(client, name, now) {
                    Decision::Refuse(retry_after) => return Err(Refused::TooMany { retry_after }),
                    Decision::Try => {
                        table
                            .clients
                            .entry(client)
                            .or_default()
                            .in_flight
                            .push(name);
                        return Ok(Attempt {
                            guesses: Arc::clone(&self),
                            client,
                            name,
                            failed_at: None,
                            reservation: None,
                        });
                    }
                    Decision::Wait => self.wait_place(&mut table, client)?,
                }
            };
            ended.await;
        }
    }
}

impl Table {
    fn decide(&mut self, client: ClientNetwork, name: NameHash, now: Moment) -> Decision {
        self.forget_old(now);
        match self.clients.get_mut(&client) {
            None => Decision::Try,
            Some(known) => known.decide(name, now),
        }
    }

    /// Forgets clients whose last failure was a window ago.
    fn forget_old(&mut self, now: Moment) {
        while let Some(&(last, client)) = self.by_last_failure.first() {
            if last + WINDOW > now {
                break;
            }
            self.forget_failures(last, client);
        }
    }

    fn forget_failures(&mut self, last: Moment, client: ClientNetwork) {
        self.by_last_failure.remove(&(last, client));
        if let Some(known) = self.clients.get_mut(&client) {
            known.failures = VecDeque::new();
        }
        self.forget_if_idle(client);
    }

    fn forget_if_idle(&mut self, client: ClientNetwork) {
        if self.clients.get(&client).is_some_and(Client::is_idle) {
            self.clients.remove(&client);
            if self.clients.capacity() > 64 && self.clients.capacity() / 8 > self.clients.len() {
                self.clients.shrink_to(self.clients.len() * 2);
            }
        }
    }

    fn end(&mut self, client: ClientNetwork, name: NameHash, failed_at: Option<Moment>) {
        let Some(known) = self.clients.get_mut(&client) else {
            return;
        };
        if let Some(at) = known.in_flight.iter().position(|other| *other == name) {
            known.in_flight.swap_remove(at);
        }
        if let Some(at) = failed_at {
            let last = known.failures.back().map(|(last, _)| *last);
            // Callers read their clock before they come here; the order of arrival counts.
            let at = last.map_or(at, |last| last.max(at));
            known.failures.push_back((at, name));
            if let Some(last) = last {
                self.by_last_failure.remove(&(last, client));
            }
            self.by_last_failure.insert((at, client));
        }
        known.ended.notify_waiters();
        self.forget_if_idle(client);
        if self.by_last_failure.len() > MAX_CLIENTS
            && let Some(&(last, oldest)) = self.by_last_failure.first()
        {
            self.forget_failures(last, oldest);
        }
    }
}

impl Client {
    fn decide(&mut self, name: NameHash, now: Moment) -> Decision {
        let old = self.failures.partition_point(|(at, _)| *at + WINDOW <= now);
        self.failures.drain(..old);
        let mut of_name = self.failures.iter().filter(|(_, other)| *other == name);
        let oldest_of_name = of_name.next();
        let failures_of_name = usize::from(oldest_of_name.is_some()) + of_name.count();
        let until_gone = |failure: Option<&(Moment, NameHash)>| {
            failure.map_or(Duration::ZERO, |(at, _)| (*at + WINDOW).saturating_sub(now))
        };
        let mut refused = Duration::ZERO;
        if failures_of_name >= MAX_FAILURES_OF_NAME {
            refused = until_gone(oldest_of_name);
        }
        if self.failures.len() >= MAX_FAILURES_OF_CLIENT {
            refused = refused.max(until_gone(self.failures.front()));
        }
        if refused > Duration::ZERO {
            return Decision::Refuse(refused);
        }
        let in_flight_of_name = self
            .in_flight
            .iter()
            .filter(|other| **other == name)
            .count();
        if failures_of_name + in_flight_of_name >= MAX_FAILURES_OF_NAME
            || self.failures.len() + self.in_flight.len() >= MAX_FAILURES_OF_CLIENT
        {
            return Decision::Wait;
        }
        Decision::Try
    }

    fn is_idle(&self) -> bool {
        self.failures.is_empty() && self.in_flight.is_empty() && self.waiting == 0
    }
}

/// A password about to be tried. Dropped without a word, it counts neither way: nothing was learnt from it.
#[derive(Debug)]
#[must_use = "an attempt that is dropped at once limits nothing"]
pub struct Attempt {
    guesses: Arc<Guesses>,
    client: ClientNetwork,
    name: NameHash,
    failed_at: Option<Moment>,
    /// The attempt as other replicas see it.
    reservation: Option<Reservation>,
}

impl Attempt {
    /// The password was wrong, or there is no such account.
    pub fn failed(mut self, now: Instant) {
        self.failed_at = Some(self.guesses.moment(now));
        if let Some(reservation) = &mut self.reservation {
            reservation.has_failed = true;
        }
    }

    /// The password was right. Earlier failures stay counted.
    pub fn succeeded(self) {}
}

impl Drop for Attempt {
    fn drop(&mut self) {
        let mut table = self.guesses.lock();
        table.end(self.client, self.name, self.failed_at);
    }
}

/// One of the places to wait in, given back when dropped.
struct WaitPlace {
    guesses: Arc<Guesses>,
    client: ClientNetwork,
}

impl Drop for WaitPlace {
    fn drop(&mut self) {
        let mut table = self.guesses.lock();
        if let Some(known) = table.clients.get_mut(&self.client) {
            known.waiting -= 1;
        }
        table.forget_if_idle(self.client);
    }
}

#[cfg(test)]
mod tests;
