//! Failed logins counted over several replicas, in Redis and on its clock.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use sha2::{Digest, Sha256};
use tokio::runtime::Handle;

use super::{
    LocalLoginRateLimiter, LoginAttempt, LoginRateLimiter, LoginRefused, MAX_FAILURES_OF_CLIENT,
    MAX_FAILURES_OF_NAME, MAX_FAILURES_OF_SITE, WINDOW,
};
use crate::credentials::hex;
use crate::domain::ClientNetwork;
use crate::redis::{Connection, Error, Script, micros, script_with_clock};
use crate::telemetry::Metrics;

/// KEYS: a site's failures, scored by their time, and its attempts in flight, scored by the time
/// after which they count as lost. ARGV: the client, its name, the attempt, the window and the time
/// for an attempt in microseconds, the bounds of a name, a client and a site. A member is client,
/// name and attempt in one text, so members that count together begin with the same text. Returns 0
/// to try, 1 to wait for attempts in flight, or 2 and how long an attempt will be refused.
const BEGIN: &str = "
local failed, under_way, attempt = KEYS[1], KEYS[2], ARGV[3]
local window, hold = tonumber(ARGV[4]), tonumber(ARGV[5])
local function at(time) return string.format('%.0f', time) end
redis.call('ZREMRANGEBYSCORE', failed, '-inf', at(now - window))
redis.call('ZREMRANGEBYSCORE', under_way, '-inf', at(now))

local failures = redis.call('ZRANGE', failed, 0, -1, 'WITHSCORES')
local attempts = redis.call('ZRANGE', under_way, 0, -1)
local wait, is_full = 0, false
for bound, counted in ipairs({ARGV[1] .. ARGV[2], ARGV[1], ''}) do
  local limit = tonumber(ARGV[5 + bound])
  local function counts(member) return string.sub(member, 1, #counted) == counted end
  local times, pending = {}, 0
  for i = 1, #failures, 2 do
    if counts(failures[i]) then times[#times + 1] = tonumber(failures[i + 1]) end
  end
  for _, member in ipairs(attempts) do
    if counts(member) then pending = pending + 1 end
  end
  if #times >= limit then wait = math.max(wait, times[#times - limit + 1] + window - now) end
  if #times + pending >= limit then is_full = true end
end
if wait > 0 then return {2, wait} end
if is_full then return {1, 0} end
redis.call('ZADD', under_way, at(now + hold), ARGV[1] .. ARGV[2] .. attempt)
redis.call('PEXPIRE', under_way, at(math.ceil(hold / 1000)))
return {0, 0}
";

/// KEYS as above. ARGV: the member, 1 if the attempt failed, the window in microseconds, the bound
/// of a site.
const END: &str = "
redis.call('ZREM', KEYS[2], ARGV[1])
if ARGV[2] == '1' then
  redis.call('ZADD', KEYS[1], string.format('%.0f', now), ARGV[1])
  redis.call('ZREMRANGEBYRANK', KEYS[1], 0, -1 - tonumber(ARGV[4]))
  redis.call('PEXPIRE', KEYS[1], string.format('%.0f', math.ceil(tonumber(ARGV[3]) / 1000)))
end
return 1
";

/// How long an attempt may be in flight: waiting for a thread and hashing take a few seconds at
/// worst. An attempt that is never ended, because its replica died, counts for this long.
const HOLD: Duration = Duration::from_secs(30);
/// How often an attempt that waits for others asks Redis again. At most 100 attempts of one client
/// do so on a replica.
const ASK_EVERY: Duration = Duration::from_millis(50);
/// The longest time that an attempt waits.
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// The limits of [`LocalLoginRateLimiter`] over all replicas. Each replica also keeps them by
/// itself, and only by itself while Redis is unavailable. In Redis a site has two keys, of at most
/// 300 members each, which expire with the window. Each failed attempt costs a replica a hash,
/// which bounds how many keys there can be.
pub struct RedisLoginRateLimiter {
    redis: Connection,
    begin: Script,
    end: Arc<Script>,
    local: Arc<LocalLoginRateLimiter>,
    /// Distinguishes the attempts of this process from those of others.
    process: u64,
    attempts: AtomicU64,
    metrics: Arc<Metrics>,
}

/// An attempt as registered in Redis. Dropping it ends the attempt there.
pub(super) struct SharedAttempt {
    redis: Connection,
    end: Arc<Script>,
    keys: [String; 2],
    member: String,
    pub(super) has_failed: bool,
}

enum RedisDecision {
    Try(SharedAttempt),
    Wait,
    Refuse(Duration),
}

impl RedisLoginRateLimiter {
    /// A limiter in the Redis of `redis`. `epoch`: no later than any instant to come.
    pub fn new(redis: Connection, epoch: Instant, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self {
            redis,
            begin: script_with_clock(BEGIN),
            end: Arc::new(script_with_clock(END)),
            local: LocalLoginRateLimiter::new(epoch),
            process: RandomState::new().hash_one(0),
            attempts: AtomicU64::new(0),
            metrics,
        })
    }

    async fn ask(&self, client: ClientNetwork, name: &str) -> Result<RedisDecision, Error> {
        let site = client.site();
        let keys = ["failed", "under_way"]
            .map(|kind| self.redis.key(format_args!("guesses:{{{site}}}:{kind}")));
        let attempt = self.attempts.fetch_add(1, Ordering::Relaxed);
        let attempt = format!("{:016x}-{attempt}", self.process);
        // The space ends the client, so that no client is a prefix of another.
        let client = format!("{client} ");
        // Made before Redis is asked: this future may be dropped while Redis registers the attempt.
        let mut shared = SharedAttempt {
            redis: self.redis.clone(),
            end: Arc::clone(&self.end),
            keys: keys.clone(),
            member: format!("{client}{name}{attempt}"),
            has_failed: false,
        };
        let mut call = self.begin.key(&keys[0]);
        call.key(&keys[1])
            .arg(&client)
            .arg(name)
            .arg(&attempt)
            .arg(micros(WINDOW))
            .arg(micros(HOLD))
            .arg(MAX_FAILURES_OF_NAME)
            .arg(MAX_FAILURES_OF_CLIENT)
            .arg(MAX_FAILURES_OF_SITE);
        let patience = self.redis.patience();
        // After an error the script may have run, or may still run. Dropping `shared` ends the
        // attempt then.
        let (reply, wait): (u64, u64) = self.redis.run("guess_begin", patience, &call).await?;
        if reply == 0 {
            return Ok(RedisDecision::Try(shared));
        }
        // Redis has not registered the attempt: there is nothing to end.
        shared.member.clear();
        Ok(match reply {
            1 => RedisDecision::Wait,
            _ => RedisDecision::Refuse(Duration::from_micros(wait)),
        })
    }
}

#[async_trait]
impl LoginRateLimiter for RedisLoginRateLimiter {
    async fn begin(
        self: Arc<Self>,
        client: ClientNetwork,
        name: &str,
        clock: &(dyn Fn() -> Instant + Send + Sync),
    ) -> Result<LoginAttempt, LoginRefused> {
        let local = Arc::clone(&self.local);
        let mut attempt = local.begin(client, name, clock).await?;
        let name = name_hash(name);
        let deadline = tokio::time::Instant::now() + LONGEST_WAIT;
        loop {
            match self.ask(client, &name).await {
                Ok(RedisDecision::Try(shared)) => {
                    attempt.shared = Some(shared);
                    return Ok(attempt);
                }
                Ok(RedisDecision::Refuse(retry_after)) => {
                    return Err(LoginRefused::TooMany { retry_after });
                }
                Ok(RedisDecision::Wait) if tokio::time::Instant::now() < deadline => {
                    tokio::time::sleep(ASK_EVERY).await;
                }
                Ok(RedisDecision::Wait) => return Err(LoginRefused::Overloaded),
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

impl Drop for SharedAttempt {
    fn drop(&mut self) {
        // Without a runtime the process is ending; the attempt in Redis expires.
        if self.member.is_empty() || Handle::try_current().is_err() {
            return;
        }
        let (redis, end) = (self.redis.clone(), Arc::clone(&self.end));
        let (keys, member) = (
            std::mem::take(&mut self.keys),
            std::mem::take(&mut self.member),
        );
        let has_failed = u8::from(self.has_failed);
        // No caller waits for this. Until it is done, the attempt counts as in flight, which keeps
        // the limits too.
        self.redis.spawn(|_| async move {
            let mut call = end.key(&keys[0]);
            call.key(&keys[1])
                .arg(member)
                .arg(has_failed)
                .arg(micros(WINDOW))
                .arg(MAX_FAILURES_OF_SITE);
            // The connection counts a failed command in the metrics, and the attempt in Redis then
            // expires.
            let _: Result<u64, _> = redis.run("guess_end", redis.patience(), &call).await;
        });
    }
}

/// 128 bits of the name's SHA-256, so that Redis does not hold people's names.
fn name_hash(name: &str) -> String {
    let digest: [u8; 32] = Sha256::digest(name).into();
    hex(&digest[..16])
}
