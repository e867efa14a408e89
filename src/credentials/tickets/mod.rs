//! One-use tickets that open a WebSocket, for clients that cannot set a header and should not put a
//! token in a URL.

mod redis_tickets;

use std::collections::VecDeque;
use std::time::Duration;

use async_trait::async_trait;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hashlink::LinkedHashMap;
use parking_lot::Mutex;
use sha2::{Digest, Sha256};

pub use self::redis_tickets::RedisTickets;
use crate::domain::{Timestamp, UserId};

/// How long a ticket may be used.
pub const TICKET_LIFETIME: Duration = Duration::from_secs(30);
/// Tickets of one user that are valid at a time. One more invalidates the oldest, rather than being
/// refused: tickets that a page has lost when it was reloaded never lock its user out.
pub const MAX_TICKETS_PER_USER: usize = 20;

/// The length of a ticket: 32 bytes in base64url.
const TICKET_CHARS: usize = 43;

/// The access token that a ticket was issued for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Whose it is.
    pub user_id: UserId,
    /// When the access token was issued, if it says so. A token issued before the account's
    /// `tokens_valid_from` is no longer valid.
    pub issued_at: Option<Timestamp>,
    /// When the access token, and with it the socket, ends.
    pub expires_at: Timestamp,
}

/// Why a ticket could be neither issued nor taken.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Redis cannot be reached, or the system has no randomness; the same call may work later.
    #[error("tickets are unavailable")]
    Unavailable(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Keeps tickets until they are used or expire.
#[async_trait]
pub trait Tickets: Send + Sync {
    /// Issues a ticket, 43 characters of base64url, which is valid for [`TICKET_LIFETIME`] from
    /// `now`. If the user has [`MAX_TICKETS_PER_USER`] already, the oldest of them becomes invalid.
    async fn issue(&self, grant: Grant, now: Timestamp) -> Result<String, Error>;

    /// Uses a ticket up. Returns `None` if there is no such ticket, it was used before, or it has
    /// expired. Of several calls at once one gets it. The caller must check whether the grant is
    /// still valid.
    async fn take(&self, ticket: &str, now: Timestamp) -> Result<Option<Grant>, Error>;
}

/// Tickets in the memory of this process: at most 20 of each user who got one within the last 30 s,
/// some 100 bytes each.
#[derive(Debug, Default)]
pub struct LocalTickets {
    /// Each user's tickets in the order of issue, at most [`MAX_TICKETS_PER_USER`]. The user who
    /// got one last comes last.
    users: Mutex<LinkedHashMap<UserId, VecDeque<Ticket>>>,
}

/// SHA-256 of a ticket's characters: a copy of the memory opens no socket.
type TicketHash = [u8; 32];

#[derive(Debug)]
struct Ticket {
    hash: TicketHash,
    grant: Grant,
    usable_until: Timestamp,
}

#[async_trait]
impl Tickets for LocalTickets {
    async fn issue(&self, grant: Grant, now: Timestamp) -> Result<String, Error> {
        let ticket = make(grant.user_id)?;
        let mut users = self.users.lock();
        while let Some((_, tickets)) = users.front()
            && tickets.back().is_none_or(|last| last.usable_until <= now)
        {
            users.pop_front();
        }
        if users.capacity() > 64 && users.capacity() / 8 > users.len() {
            users.shrink_to_fit();
        }
        let mut tickets = users.remove(&grant.user_id).unwrap_or_default();
        if tickets.len() >= MAX_TICKETS_PER_USER {
            tickets.pop_front();
        }
        tickets.push_back(Ticket {
            hash: hash(&ticket),
            grant,
            usable_until: now.plus(TICKET_LIFETIME),
        });
        users.insert(grant.user_id, tickets);
        Ok(ticket)
    }

    async fn take(&self, ticket: &str, now: Timestamp) -> Result<Option<Grant>, Error> {
        let mut users = self.users.lock();
        let Some((user, tickets)) =
            user_of(ticket).and_then(|user| Some((user, users.get_mut(&user)?)))
        else {
            return Ok(None);
        };
        let hash = hash(ticket);
        let at = tickets.iter().position(|ticket| ticket.hash == hash);
        let taken = at.and_then(|at| tickets.remove(at));
        if tickets.is_empty() {
            users.remove(&user);
        }
        Ok(taken
            .filter(|ticket| now < ticket.usable_until)
            .map(|ticket| ticket.grant))
    }
}

/// A ticket: the id of its user, by which it is found, and 192 random bits.
fn make(user: UserId) -> Result<String, Error> {
    let mut bytes = [0; 32];
    let (id, random) = bytes.split_at_mut(8);
    id.copy_from_slice(&user.0.to_be_bytes());
    getrandom::fill(random).map_err(|error| Error::Unavailable(Box::new(error)))?;
    Ok(URL_SAFE_NO_PAD.encode(bytes))
}

/// The user whose id the ticket begins with. That does not tell whether it is one of that user's
/// tickets. Longer texts are not decoded.
fn user_of(ticket: &str) -> Option<UserId> {
    if ticket.len() != TICKET_CHARS {
        return None;
    }
    let bytes = URL_SAFE_NO_PAD.decode(ticket).ok()?;
    let id = bytes.first_chunk::<8>()?;
    Some(UserId(i64::from_be_bytes(*id)))
}

fn hash(ticket: &str) -> TicketHash {
    Sha256::digest(ticket).into()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::task::JoinSet;

    use super::*;

    fn grant(user: i64) -> Grant {
        Grant {
            user_id: UserId(user),
            issued_at: Some(Timestamp::from_unix_seconds(1000)),
            expires_at: Timestamp::from_unix_seconds(1300),
        }
    }

    /// Tickets in memory, expired ones that have not been removed yet included.
    fn kept(tickets: &LocalTickets) -> usize {
        tickets.users.lock().values().map(VecDeque::len).sum()
    }

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_unix_seconds(seconds)
    }

    #[tokio::test]
    async fn ticket_is_taken_once() {
        let tickets = LocalTickets::default();
        let ticket = tickets.issue(grant(7), at(1000)).await.unwrap();
        assert_eq!(ticket.len(), 43);
        assert_eq!(
            tickets.take(&ticket, at(1001)).await.unwrap(),
            Some(grant(7))
        );
        assert_eq!(tickets.take(&ticket, at(1001)).await.unwrap(), None);
        assert!(kept(&tickets) == 0);
    }

    #[tokio::test]
    async fn ticket_expires_after_thirty_seconds() {
        let tickets = LocalTickets::default();
        let used = tickets.issue(grant(7), at(1000)).await.unwrap();
        let late = tickets.issue(grant(7), at(1000)).await.unwrap();
        assert!(
            tickets
                .take(&used, Timestamp(1_029_999_999))
                .await
                .unwrap()
                .is_some()
        );
        assert_eq!(tickets.take(&late, at(1030)).await.unwrap(), None);
    }

    #[tokio::test]
    async fn twenty_first_ticket_of_a_user_invalidates_the_oldest() {
        let tickets = LocalTickets::default();
        let other = tickets.issue(grant(8), at(1000)).await.unwrap();
        let mut issued = Vec::new();
        for _ in 0..MAX_TICKETS_PER_USER + 1 {
            issued.push(tickets.issue(grant(7), at(1000)).await.unwrap());
        }
        assert_eq!(kept(&tickets), MAX_TICKETS_PER_USER + 1);
        assert_eq!(tickets.take(&issued[0], at(1001)).await.unwrap(), None);
        for ticket in issued[1..].iter().chain([&other]) {
            assert!(tickets.take(ticket, at(1001)).await.unwrap().is_some());
        }
    }

    #[tokio::test]
    async fn other_texts_are_not_tickets() {
        let tickets = LocalTickets::default();
        let ticket = tickets.issue(grant(7), at(1000)).await.unwrap();
        for text in [
            "",
            "x",
            &ticket[1..],
            &format!("{ticket}="),
            &"A".repeat(43),
            &"A".repeat(1 << 20),
        ] {
            assert_eq!(tickets.take(text, at(1000)).await.unwrap(), None);
        }
        assert_eq!(kept(&tickets), 1);
    }

    #[test]
    fn user_id_is_read_from_a_ticket_and_not_from_other_texts() {
        let ticket = make(UserId(i64::MAX)).unwrap();
        assert_eq!(ticket.len(), TICKET_CHARS);
        assert_eq!(user_of(&ticket), Some(UserId(i64::MAX)));
        for bad in [
            "",
            "x",
            &"?".repeat(TICKET_CHARS),
            &"é".repeat(TICKET_CHARS),
        ] {
            assert_eq!(user_of(bad), None, "{bad:?}");
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn one_of_many_racing_takers_gets_the_ticket() {
        let tickets = Arc::new(LocalTickets::default());
        for _ in 0..50 {
            let ticket = Arc::new(tickets.issue(grant(7), at(1000)).await.unwrap());
            let mut takers = JoinSet::new();
            for _ in 0..8 {
                let (tickets, ticket) = (Arc::clone(&tickets), Arc::clone(&ticket));
                takers.spawn(async move { tickets.take(&ticket, at(1000)).await.unwrap() });
            }
            let taken = takers.join_all().await;
            assert_eq!(taken.into_iter().flatten().collect::<Vec<_>>(), [grant(7)]);
        }
    }

    #[tokio::test]
    async fn unused_tickets_are_removed() {
        let tickets = LocalTickets::default();
        for user in 0..5_000 {
            // 100 users a second, five tickets each: 3,000 users within 30 s.
            for _ in 0..5 {
                tickets
                    .issue(grant(user), Timestamp(1_000_000_000 + user * 10_000))
                    .await
                    .unwrap();
            }
            assert!(kept(&tickets) <= 5 * 3_000);
        }
        tickets.issue(grant(1), at(5_000)).await.unwrap();
        assert_eq!(kept(&tickets), 1);
        let users = tickets.users.lock();
        assert_eq!(users.len(), 1);
        assert!(users.capacity() < 256);
    }

    proptest::proptest! {
        /// Against a plain list of tickets with their times.
        #[test]
        fn any_sequence_agrees_with_a_plain_list(
            steps in proptest::collection::vec((0_i64..8, 0_i64..3, proptest::bool::weighted(0.7), 0_usize..40), 1..200),
        ) {
            let tickets = LocalTickets::default();
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            // Ticket, user, time of issue; the oldest first, invalid ones removed.
            let mut live: Vec<(String, i64, i64)> = Vec::new();
            let mut issued: Vec<String> = Vec::new();
            let mut now = 1000;
            for (pause, user, issue, which) in steps {
                now += pause / 2;
                live.retain(|(_, _, since)| now < since + 30);
                if issue {
                    let ticket = runtime.block_on(tickets.issue(grant(user), at(now))).unwrap();
                    issued.push(ticket.clone());
                    live.push((ticket, user, now));
                    if live.iter().filter(|(_, owner, _)| *owner == user).count() > MAX_TICKETS_PER_USER {
                        let oldest = live.iter().position(|(_, owner, _)| *owner == user).unwrap();
                        live.remove(oldest);
                    }
                } else if let Some(ticket) = issued.iter().rev().nth(which) {
                    let expected = live.iter().position(|(text, _, _)| text == ticket).map(|i| live.remove(i).1);
                    let taken = runtime.block_on(tickets.take(ticket, at(now))).unwrap();
                    proptest::prop_assert_eq!(taken.map(|grant| grant.user_id.0), expected);
                }
            }
        }
    }
}
