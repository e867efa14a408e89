//! Tickets that any replica accepts, in Redis and on its clock.

use async_trait::async_trait;

use super::{Error, Grant, MAX_TICKETS_PER_USER, TICKET_LIFETIME, Tickets, hash, make, user_of};
use crate::credentials::hex;
use crate::domain::{Timestamp, UserId};
use crate::redis::{Connection, Script, script_with_clock};

/// One key: a sorted set of a user's valid tickets, scored by the time at which they expire. ARGV:
/// the new ticket, its lifetime in milliseconds, how many a user may have.
const ISSUE: &str = "
local key = KEYS[1]
local function at(time) return string.format('%.0f', time) end
redis.call('ZREMRANGEBYSCORE', key, '-inf', at(now))
local ends = now + tonumber(ARGV[2]) * 1000
-- The order of issue is the order of ending, also within one microsecond or when the clock was set back.
local last = redis.call('ZRANGE', key, -1, -1, 'WITHSCORES')[2]
if last and tonumber(last) >= ends then ends = tonumber(last) + 1 end
redis.call('ZADD', key, at(ends), ARGV[1])
redis.call('ZREMRANGEBYRANK', key, 0, -1 - tonumber(ARGV[3]))
redis.call('PEXPIRE', key, ARGV[2])
return 1
";

/// ARGV: the hash with which a ticket begins. Returns the ticket, and removes it.
const TAKE: &str = "
local key, hash = KEYS[1], ARGV[1]
local live = redis.call('ZRANGEBYSCORE', key, '(' .. string.format('%.0f', now), '+inf')
for _, ticket in ipairs(live) do
  if string.sub(ticket, 1, #hash) == hash then
    redis.call('ZREM', key, ticket)
    return ticket
  end
end
return false
";

/// Tickets in Redis: one key a user, so that a script sees all of them. The key expires with the
/// last ticket. A ticket begins with the id of its user, by which the key is found; the rest is 192
/// random bits. Redis holds the SHA-256 of the ticket, and its grant.
pub struct RedisTickets {
    redis: Connection,
    issue: Script,
    take: Script,
}

impl RedisTickets {
    /// Tickets in the Redis of `redis`.
    pub fn new(redis: Connection) -> Self {
        Self {
            redis,
            issue: script_with_clock(ISSUE),
            take: script_with_clock(TAKE),
        }
    }

    fn key(&self, user: UserId) -> String {
        self.redis.key(format_args!("tickets:{{{user}}}"))
    }
}

#[async_trait]
impl Tickets for RedisTickets {
    /// `now` is ignored: the clock of Redis counts.
    async fn issue(&self, grant: Grant, _now: Timestamp) -> Result<String, Error> {
        let user = grant.user_id;
        let ticket = make(user)?;
        let lifetime_ms = u64::try_from(TICKET_LIFETIME.as_millis()).unwrap_or(u64::MAX);
        let key = self.key(user);
        let mut call = self.issue.key(&key);
        call.arg(encode(&ticket, grant))
            .arg(lifetime_ms)
            .arg(MAX_TICKETS_PER_USER);
        let patience = self.redis.patience();
        let issued: Result<u64, _> = self.redis.run("ticket_issue", patience, &call).await;
        issued.map_err(unavailable)?;
        Ok(ticket)
    }

    async fn take(&self, ticket: &str, _now: Timestamp) -> Result<Option<Grant>, Error> {
        let Some(user) = user_of(ticket) else {
            return Ok(None);
        };
        let key = self.key(user);
        let mut call = self.take.key(&key);
        call.arg(hex(&hash(ticket)));
        let taken: Option<String> = self
            .redis
            .run("ticket_take", self.redis.patience(), &call)
            .await
            .map_err(unavailable)?;
        Ok(taken.and_then(|kept| decode(user, &kept)))
    }
}

fn unavailable(error: crate::redis::Error) -> Error {
    Error::Unavailable(Box::new(error))
}

/// What Redis holds of a ticket: its hash, when its access token was issued if that is known, and
/// when that token expires.
fn encode(ticket: &str, grant: Grant) -> String {
    let issued_at = grant
        .issued_at
        .map_or_else(|| "-".into(), |at| at.0.to_string());
    format!("{} {issued_at} {}", hex(&hash(ticket)), grant.expires_at.0)
}

fn decode(user_id: UserId, kept: &str) -> Option<Grant> {
    let mut words = kept.split(' ').skip(1);
    let issued_at = match words.next()? {
        "-" => None,
        at => Some(Timestamp(at.parse().ok()?)),
    };
    let expires_at = Timestamp(words.next()?.parse().ok()?);
    Some(Grant {
        user_id,
        issued_at,
        expires_at,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_value_holds_the_grant_and_not_the_ticket() {
        for issued_at in [
            None,
            Some(Timestamp(-5)),
            Some(Timestamp(1_700_000_000_000_001)),
        ] {
            let grant = Grant {
                user_id: UserId(7),
                issued_at,
                expires_at: Timestamp(1_700_000_300_000_000),
            };
            let ticket = make(UserId(7)).unwrap();
            let kept = encode(&ticket, grant);
            assert!(!kept.contains(&ticket));
            assert_eq!(decode(UserId(7), &kept), Some(grant));
        }
    }
}
