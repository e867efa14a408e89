//! Guesses counted over several replicas, in Redis and on its clock.

use std::collections::hash_map::RandomState;
use std::fmt::Write;
use std::hash::BuildHasher;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use sha2::{Digest, Sha256};
use tokio::runtime::Handle;

use super::{
    Attempt, GuessLimit, Guesses, MAX_FAILURES_OF_CLIENT, MAX_FAILURES_OF_NAME, Refused, WINDOW,
};
use crate::domain::ClientNetwork;
use crate::redis::{Error, Link, Script};
use crate::telemetry::Metrics;

/// KEYS: a client's failures, scored by their time, and its attempts under way, scored by the time after which they are taken
/// for lost. Members are the name's hash and an attempt's number. ARGV: the name's hash, the attempt, the window and the time
/// for an attempt in microseconds, the limits of a name and of a client.
/// Answers 0 to try, 1 to wait for attempts under way, or 2 and how long until a try is answered.
const BEGIN: &str = "
local failed, under_way, name = KEYS[1], KEYS[2], ARGV[1]
local window, hold = tonumber(ARGV[3]), tonumber(ARGV[4])
local of_name, of_client = tonumber(ARGV[5]), tonumber(ARGV[6])
local function at(time) return string.format('%.0f', time) end
local function is_of_name(member) return string.sub(member, 1, #name) == name end
redis.call('ZREMRANGEBYSCORE', failed, '-inf', at(now - window))
redis.call('ZREMRANGEBYSCORE', under_way, '-inf', at(now))

local all, own = {}, {}
local failures = redis.call('ZRANGE', failed, 0, -1, 'WITHSCORES')
for i = 1, #failures, 2 do
  all[#all + 1] = tonumber(failures[i + 1])
  if is_of_name(failures[i]) then own[#own + 1] = tonumber(failures[i + 1]) end
end
local wait = 0
if #own >= of_name then wait = own[#own - of_name + 1] + window - now end
if #all >= of_client then wait = math.max(wait, all[#all - of_client + 1] + window - now) end
if wait > 0 then return {2, wait} end

local attempts = redis.call('ZRANGE', under_way, 0, -1)
local attempts_of_name = 0
for _, member in ipairs(attempts) do
  if is_of_name(member) then attempts_of_name = attempts_of_name + 1 end
end
if #own + attempts_of_name >= of_name or #all + #attempts >= of_client then return {1, 0} end
redis.call('ZADD', under_way, at(now + hold), name .. ARGV[2])
redis.call('PEXPIRE', under_way, at(math.ceil(hold / 1000)))
return {0, 0}
";

/// KEYS as above. ARGV: the name's hash with the attempt, 1 if it failed, the window in microseconds, the limit of a client.
const END: &str = "
redis.call('ZREM', KEYS[2], ARGV[1])
if ARGV[2] == '1' then
  redis.call('ZADD', KEYS[1], string.format('%.0f', now), ARGV[1])
  redis.call('ZREMRANGEBYRANK', KEYS[1], 0, -1 - tonumber(ARGV[4]))
  redis.call('PEXPIRE', KEYS[1], string.format('%.0f', math.ceil(tonumber(ARGV[3]) / 1000)))
end
return 1
";

/// How long an attempt may be under way: waiting for a thread and hashing take a few seconds at worst. One that is never ended,
/// because its replica died, holds its place for as long.
const HOLD: Duration = Duration::from_secs(30);
/// How often an attempt that waits for others asks again. At most 100 of one client do so on a replica.
const ASK_EVERY: Duration = Duration::from_millis(50);
/// After this long an attempt waits no more.
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// The limits of [`Guesses`] over all replicas. Each replica keeps them by itself as well, and by itself alone while Redis is
/// away. In Redis a client has two keys, of at most 100 members each, which expire with the window; a client that fails costs a
/// replica the hashing of a password each time, which bounds how many of them there can be.
pub struct RedisGuesses {
    link: Link,
    begin: Script,
    end: Arc<Script>,
    local: Arc<Guesses>,
    /// Tells this process's attempts from others'.
    process: u64,
    attempts: AtomicU64,
    metrics: Arc<Metrics>,
}

/// A place among the attempts under way in Redis, given back when dropped.
pub(super) struct Reservation {
    link: Link,
    end: Arc<Script>,
    keys: [String; 2],
    member: String,
    pub(super) has_failed: bool,
}

enum Decision {
    Try(Reservation),
    Wait,
    Refuse(Duration),
}

impl RedisGuesses {
    /// Guesses in the Redis behind `link`. `epoch`: no later than any instant to come.
    pub fn new(link: Link, epoch: Instant, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self {
            link,
            begin: Script::with_clock(BEGIN),
            end: Arc::new(Script::with_clock(END)),
            local: Guesses::new(epoch),
            process: RandomState::new().hash_one(0),
            attempts: AtomicU64::new(0),
            metrics,
        })
    }

    async fn ask(&self, client: ClientNetwork, name: &str) -> Result<Decision, Error> {
        let keys = ["failed", "under_way"]
            .map(|kind| self.link.key(format_args!("guesses:{{{client}}}:{kind}")));
        let attempt = self.attempts.fetch_add(1, Ordering::Relaxed);
        let attempt = format!("{:016x}-{attempt}", self.process);
        let mut call = self.begin.on(&keys[0]);
        call.key(&keys[1])
            .arg(name)
            .arg(&attempt)
            .arg(micros(WINDOW))
            .arg(micros(HOLD))
            .arg(MAX_FAILURES_OF_NAME)
            .arg(MAX_FAILURES_OF_CLIENT);
        let patience = self.link.patience();
        let answer = self.link.run("guess_begin", patience, &call).await?;
        Ok(match answer {
            (0_u64, _) => Decision::Try(Reservation {
                link: self.link.clone(),
                end: Arc::clone(&self.end),
                keys,
                member: format!("{name}{attempt}"),
                has_failed: false,
            }),
            (1, _) => Decision::Wait,
            (_, wait) => Decision::Refuse(Duration::from_micros(wait)),
        })
    }
}

#[async_trait]
impl GuessLimit for RedisGuesses {
    async fn begin(
        self: Arc<Self>,
        client: ClientNetwork,
        name: &str,
        clock: &(dyn Fn() -> Instant + Send + Sync),
    ) -> Result<Attempt, Refused> {
        let local = Arc::clone(&self.local);
        let mut attempt = local.begin(client, name, clock).await?;
        let name = name_hash(name);
        let gives_up = tokio::time::Instant::now() + LONGEST_WAIT;
        loop {
            match self.ask(client, &name).await {
                Ok(Decision::Try(reservation)) => {
                    attempt.reservation = Some(reservation);
                    return Ok(attempt);
                }
                Ok(Decision::Refuse(retry_after)) => return Err(Refused::TooMany { retry_after }),
                Ok(Decision::Wait) if tokio::time::Instant::now() < gives_up => {
                    tokio::time::sleep(ASK_EVERY).await;
                }
                Ok(Decision::Wait) => return Err(Refused::Overloaded),
                Err(_) => {
                    self.metrics
                        .degraded_decisions
                        .with_label_values(&["guesses"])
                        .inc();
                    return Ok(attempt);
                }
            }
        }
    }
}

impl std::fmt::Debug for Reservation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reservation")
            .field("has_failed", &self.has_failed)
            .finish_non_exhaustive()
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // Without a runtime the process is ending; the place is given back by its time.
        if Handle::try_current().is_err() {
            return;
        }
        let (link, end) = (self.link.clone(), Arc::clone(&self.end));
        let (keys, member) = (
            std::mem::take(&mut self.keys),
            std::mem::take(&mut self.member),
        );
        let has_failed = u8::from(self.has_failed);
        // Nobody waits for this: until it is done the attempt counts as under way, which keeps the limits as well.
        self.link.spawn(|_| async move {
            let mut call = end.on(&keys[0]);
            call.key(&keys[1])
                .arg(member)
                .arg(has_failed)
                .arg(micros(WINDOW))
                .arg(MAX_FAILURES_OF_CLIENT);
            // A failure is counted by the link, and the place is then given back by its time.
            let _: Result<u64, _> = link.run("guess_end", link.patience(), &call).await;
        });
    }
}

/// 128 bits of the name's SHA-256: names of people are not left lying in Redis as such.
fn name_hash(name: &str) -> String {
    let digest: [u8; 32] = Sha256::digest(name).into();
    digest[..16].iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
