//! Limits how often passwords may be guessed.
//!
//! The first failures of a minute are reported as such. After them even the right password is
//! refused for a while, so that somebody who guesses learns nothing more. Failures are counted by
//! client and name, by client, and by the site that the client belongs to. They are never counted
//! by name alone, so an attacker cannot lock out a user who logs in from elsewhere.

mod redis_login_rate_limiter;

use std::collections::hash_map::RandomState;
use std::collections::{HashMap, VecDeque};
use std::hash::BuildHasher;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use hashlink::LinkedHashMap;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::sync::futures::OwnedNotified;

pub use self::redis_login_rate_limiter::RedisLoginRateLimiter;
use self::redis_login_rate_limiter::SharedAttempt;
use crate::domain::{ClientNetwork, ClientSite};

/// Failures of one name from one client within [`WINDOW`] that are reported as failures.
const MAX_FAILURES_OF_NAME: usize = 10;
/// Failures of all names from one client within [`WINDOW`] that are reported as failures.
const MAX_FAILURES_OF_CLIENT: usize = 100;
/// Failures of all clients of one site within [`WINDOW`] that are reported as failures. A site has
/// 65,536 IPv6 networks, each of them a client: this bounds what changing between them gains to
/// three times what one client may do. The bound also stops honest neighbours in the same site, so
/// it is not as low as the bound of one client. An IPv4 site is one client and never reaches it.
const MAX_FAILURES_OF_SITE: usize = 300;
const WINDOW: Duration = Duration::from_secs(60);
/// Sites whose failures are remembered. A failure takes 40 bytes and costs a hash, of which two
/// cores do fewer than 10,000 in a [`WINDOW`], so the table stays under a few megabytes.
const MAX_SITES: usize = 10_000;
/// Attempts of one site that may wait for the outcome of its other attempts.
const MAX_WAITING: usize = 256;

/// Whether two attempts are counted together.
type CountsWith = fn(AttemptKey, AttemptKey) -> bool;
/// For each limit: which attempts count together, and how many failures of them are reported.
const BOUNDS: [(CountsWith, usize); 3] = [
    (|one, other| one == other, MAX_FAILURES_OF_NAME),
    (
        |one, other| one.client == other.client,
        MAX_FAILURES_OF_CLIENT,
    ),
    (|_, _| true, MAX_FAILURES_OF_SITE),
];

/// Why a password may not be tried now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoginRefused {
    /// Too many failures.
    #[error("too many failed attempts")]
    TooMany {
        /// An attempt after this time is not refused.
        retry_after: Duration,
    },
    /// Too many attempts of this site wait for its other attempts.
    #[error("too many attempts at once")]
    Overloaded,
}

/// Limits wrong passwords in a minute: ten for one name from one client, a hundred from one client,
/// three hundred from one site.
#[async_trait]
pub trait LoginRateLimiter: Send + Sync {
    /// Asks to try a password for `name`, in its canonical form, and registers the attempt before
    /// the password is hashed. While the failures and the attempts in flight together reach a
    /// limit, this waits for outcomes. So of any number of parallel attempts exactly as many are
    /// reported as failed as the limit allows, and right passwords are not refused because many are
    /// tried at once.
    ///
    /// `clock` is read at each decision; an implementation that shares its counts uses the clock of
    /// the shared store instead. Dropping the future withdraws the request. An unavailable shared
    /// store never means that there is no limit.
    async fn begin(
        self: Arc<Self>,
        client: ClientNetwork,
        name: &str,
        clock: &(dyn Fn() -> Instant + Send + Sync),
    ) -> Result<LoginAttempt, LoginRefused>;
}

/// Failed attempts of the last minute, and attempts whose outcome is not known yet, in the memory
/// of this process.
///
/// Names are kept as keyed 64-bit hashes. A collision, which cannot be caused on purpose, would
/// make two names of one client share their ten failures.
#[derive(Debug)]
pub struct LocalLoginRateLimiter {
    epoch: Instant,
    name_hash: RandomState,
    table: Mutex<SiteTable>,
}

/// Time since the epoch of the [`LocalLoginRateLimiter`].
type Moment = Duration;
type NameHash = u64;

/// Whose password is tried, and from where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct AttemptKey {
    client: ClientNetwork,
    name: NameHash,
}

/// Failures of a site by rising time, at most [`MAX_FAILURES_OF_SITE`].
type Failures = VecDeque<(Moment, AttemptKey)>;

#[derive(Debug, Default)]
struct SiteTable {
    /// Sites with failures, at most [`MAX_SITES`]. The site that failed last comes last.
    failures: LinkedHashMap<ClientSite, Failures>,
    /// Sites with attempts that are under way or wait.
    active: HashMap<ClientSite, ActiveSite>,
}

#[derive(Debug, Default)]
struct ActiveSite {
    /// Attempts that were allowed and have not ended; together with the failures within the bounds.
    in_flight: Vec<AttemptKey>,
    waiting: usize,
    /// Notified when an attempt ends.
    ended: Arc<Notify>,
}

enum Decision {
    Try,
    Wait,
    Refuse(Duration),
}

impl LocalLoginRateLimiter {
    /// Nothing is counted yet. `epoch`: no later than any instant to come.
    pub fn new(epoch: Instant) -> Arc<Self> {
        Arc::new(Self {
            epoch,
            name_hash: RandomState::new(),
            table: Mutex::default(),
        })
    }

    fn wait_slot(
        self: &Arc<Self>,
        table: &mut SiteTable,
        site: ClientSite,
    ) -> Result<(WaitSlot, OwnedNotified), LoginRefused> {
        let known = table.active.entry(site).or_default();
        if known.waiting >= MAX_WAITING {
            return Err(LoginRefused::Overloaded);
        }
        known.waiting += 1;
        let place = WaitSlot {
            limiter: Arc::clone(self),
            site,
        };
        // Registered under the lock, so that no later outcome is missed.
        Ok((place, Arc::clone(&known.ended).notified_owned()))
    }

    fn moment(&self, now: Instant) -> Moment {
        now.saturating_duration_since(self.epoch)
    }
}

#[async_trait]
impl LoginRateLimiter for LocalLoginRateLimiter {
    async fn begin(
        self: Arc<Self>,
        client: ClientNetwork,
        name: &str,
        clock: &(dyn Fn() -> Instant + Send + Sync),
    ) -> Result<LoginAttempt, LoginRefused> {
        let key = AttemptKey {
            client,
            name: self.name_hash.hash_one(name),
        };
        let site = client.site();
        loop {
            let (_place, ended) = {
                let mut table = self.table.lock();
                let now = self.moment(clock());
                match table.decide(site, key, now) {
                    Decision::Refuse(retry_after) => {
                        return Err(LoginRefused::TooMany { retry_after });
                    }
                    Decision::Try => {
                        let known = table.active.entry(site).or_default();
                        known.in_flight.push(key);
                        return Ok(LoginAttempt {
                            limiter: Arc::clone(&self),
                            key,
                            failed_at: None,
                            shared: None,
                        });
                    }
                    Decision::Wait => self.wait_slot(&mut table, site)?,
                }
            };
            ended.await;
        }
    }
}

impl SiteTable {
    fn decide(&mut self, site: ClientSite, key: AttemptKey, now: Moment) -> Decision {
        let is_old = |at: &Moment| *at + WINDOW <= now;
        while let Some((_, failures)) = self.failures.front()
            && failures.back().is_none_or(|(last, _)| is_old(last))
        {
            self.failures.pop_front();
        }
        if self.failures.capacity() > 64 && self.failures.capacity() / 8 > self.failures.len() {
            self.failures.shrink_to_fit();
        }
        let mut none = VecDeque::new();
        let failures = self.failures.get_mut(&site).unwrap_or(&mut none);
        failures.drain(..failures.partition_point(|(at, _)| is_old(at)));
        let active = self.active.get(&site);
        let (mut refused_for, mut must_wait) = (Duration::ZERO, false);
        for (counts_with, bound) in BOUNDS {
            let of_bound = |other: AttemptKey| counts_with(key, other);
            let failures = failures.iter().filter(|(_, other)| of_bound(*other));
            let failed = failures.clone().count();
            if failed >= bound {
                // Once this failure has left the window, one more attempt is allowed.
                let next_to_go = failures.clone().nth(failed - bound);
                let wait = next_to_go.map(|(at, _)| (*at + WINDOW).saturating_sub(now));
                refused_for = refused_for.max(wait.unwrap_or_default());
            } else {
                let in_flight = active.iter().flat_map(|active| &active.in_flight);
                must_wait |= failed + in_flight.filter(|other| of_bound(**other)).count() >= bound;
            }
        }
        if refused_for > Duration::ZERO {
            Decision::Refuse(refused_for)
        } else if must_wait {
            Decision::Wait
        } else {
            Decision::Try
        }
    }

    fn end(&mut self, key: AttemptKey, failed_at: Option<Moment>) {
        let site = key.client.site();
        if let Some(at) = failed_at {
            let mut failures = self.failures.remove(&site).unwrap_or_default();
            // Callers read their clock before they call this; the order of the calls counts.
            let at = failures.back().map_or(at, |(last, _)| at.max(*last));
            failures.push_back((at, key));
            self.failures.insert(site, failures);
            if self.failures.len() > MAX_SITES {
                self.failures.pop_front();
            }
        }
        self.change(site, |active| {
            if let Some(at) = active.in_flight.iter().position(|other| *other == key) {
                active.in_flight.swap_remove(at);
            }
            active.ended.notify_waiters();
        });
    }

    /// Changes what is known of a site's attempts, and forgets the site if it has none left.
    fn change(&mut self, site: ClientSite, change: impl FnOnce(&mut ActiveSite)) {
        if let Some(active) = self.active.get_mut(&site) {
            change(active);
            if active.in_flight.is_empty() && active.waiting == 0 {
                self.active.remove(&site);
            }
        }
    }
}

/// A password that is about to be tried. An attempt that is dropped without an outcome counts
/// neither as a failure nor as a success: nothing was learnt from it.
#[must_use = "an attempt that is dropped at once limits nothing"]
pub struct LoginAttempt {
    limiter: Arc<LocalLoginRateLimiter>,
    key: AttemptKey,
    failed_at: Option<Moment>,
    /// The attempt as registered in Redis for the other replicas.
    shared: Option<SharedAttempt>,
}

impl LoginAttempt {
    /// The password was wrong, or there is no such account.
    pub fn failed(mut self, now: Instant) {
        self.failed_at = Some(self.limiter.moment(now));
        if let Some(shared) = &mut self.shared {
            shared.has_failed = true;
        }
    }

    /// The password was right. Earlier failures stay counted.
    pub fn succeeded(self) {}
}

impl Drop for LoginAttempt {
    fn drop(&mut self) {
        let mut table = self.limiter.table.lock();
        table.end(self.key, self.failed_at);
    }
}

/// One of the slots of waiting attempts. Dropping it frees the slot.
struct WaitSlot {
    limiter: Arc<LocalLoginRateLimiter>,
    site: ClientSite,
}

impl Drop for WaitSlot {
    fn drop(&mut self) {
        let mut table = self.limiter.table.lock();
        table.change(self.site, |active| active.waiting -= 1);
    }
}

#[cfg(test)]
mod tests;
