//! Tickets that any replica accepts.

use prompt_service::config::RedisConfig;
use prompt_service::credentials::tickets::{Error, MAX_TICKETS_PER_USER};
use prompt_service::credentials::{Grant, RedisTickets, Tickets};
use prompt_service::domain::{Timestamp, UserId};
use std::sync::Arc;

use tokio::task::JoinSet;
use tokio::time::timeout;

use super::Replica;
use crate::support::DEADLINE;
use crate::support::redis::RedisServer;

fn grant(user: i64) -> Grant {
    Grant {
        user_id: UserId(user),
        issued_at: Some(Timestamp::from_unix_seconds(1000)),
        expires_at: Timestamp::from_unix_seconds(1300),
    }
}

/// The clock of a replica does not matter.
const NOW: Timestamp = Timestamp(0);

async fn tickets(server: &RedisServer) -> (RedisTickets, Replica) {
    tickets_at(&server.config()).await
}

async fn tickets_at(config: &RedisConfig) -> (RedisTickets, Replica) {
    let replica = Replica::at(config).await;
    (RedisTickets::new(replica.redis.clone()), replica)
}

#[tokio::test]
async fn ticket_of_one_replica_is_taken_once_on_another() {
    let server = RedisServer::start();
    let (one, _kept) = tickets(&server).await;
    let (two, _also_kept) = tickets(&server).await;
    for user in [1, i64::MAX] {
        let ticket = one.issue(grant(user), NOW).await.unwrap();
        assert_eq!(ticket.len(), 43);
        assert_eq!(two.take(&ticket, NOW).await.unwrap(), Some(grant(user)));
        assert_eq!(one.take(&ticket, NOW).await.unwrap(), None);
    }
    for bad in ["", "x", &"A".repeat(43), &"?".repeat(43)] {
        assert_eq!(one.take(bad, NOW).await.unwrap(), None);
    }
    let kept = server.command(&["KEYS", "*ticket*"]);
    assert_eq!(kept, "*0\r\n+OK\r\n", "what was taken is gone");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_many_takers_on_several_replicas_gets_the_ticket() {
    let server = RedisServer::start();
    let mut replicas = Vec::new();
    for _ in 0..3 {
        let (tickets, kept) = tickets(&server).await;
        replicas.push((Arc::new(tickets), kept));
    }
    for _ in 0..20 {
        let ticket = replicas[0].0.issue(grant(7), NOW).await.unwrap();
        let mut takers = JoinSet::new();
        for n in 0..30 {
            let (tickets, ticket) = (Arc::clone(&replicas[n % 3].0), ticket.clone());
            takers.spawn(async move { tickets.take(&ticket, NOW).await.unwrap() });
        }
        let taken: Vec<_> = takers.join_all().await.into_iter().flatten().collect();
        assert_eq!(taken, [grant(7)]);
    }
}

#[tokio::test]
async fn twenty_first_ticket_invalidates_the_oldest_and_none_of_another_user() {
    let server = RedisServer::start();
    let (one, _kept) = tickets(&server).await;
    let (two, _also_kept) = tickets(&server).await;
    let others = one.issue(grant(2), NOW).await.unwrap();
    let mut issued = Vec::new();
    for n in 0..MAX_TICKETS_PER_USER + 2 {
        let tickets = if n % 2 == 0 { &one } else { &two };
        issued.push(tickets.issue(grant(1), NOW).await.unwrap());
    }
    for (n, ticket) in issued.iter().enumerate() {
        let taken = one.take(ticket, NOW).await.unwrap();
        assert_eq!(taken.is_some(), n >= 2, "ticket {n}");
    }
    assert!(two.take(&others, NOW).await.unwrap().is_some());
}

#[tokio::test]
async fn tickets_expire_and_are_not_stored_in_plain_text() {
    let server = RedisServer::start();
    let (tickets, _kept) = tickets(&server).await;
    let ticket = tickets.issue(grant(1), NOW).await.unwrap();
    let members = server.command(&["ZRANGE", "test:tickets:{1}", "0", "-1", "WITHSCORES"]);
    assert!(
        members.contains("1000000000") && !members.contains(&ticket),
        "{members}"
    );
    let left = server.command(&["PTTL", "test:tickets:{1}"]);
    let left: u64 = left[1..].split('\r').next().unwrap().parse().unwrap();
    assert!((1..=30_000).contains(&left), "{left}");
    // Thirty seconds later by Redis's clock: the score of each ticket is its expiry.
    let member = members.lines().nth(2).unwrap();
    server.command(&["ZADD", "test:tickets:{1}", "1", member]);
    assert_eq!(tickets.take(&ticket, NOW).await.unwrap(), None);
}

#[tokio::test]
async fn tickets_are_unavailable_without_redis_and_available_when_it_returns() {
    let mut server = RedisServer::start();
    let (tickets, replica) = tickets_at(&server.impatient_config()).await;
    let ticket = tickets.issue(grant(1), NOW).await.unwrap();
    server.pause();
    // It fails although Redis does not reply.
    let unavailable = timeout(DEADLINE, tickets.take(&ticket, NOW)).await;
    assert!(matches!(unavailable, Ok(Err(Error::Unavailable(_)))));
    replica.is_down().await;
    server.resume();
    replica.is_up().await;
    server.stop();
    replica.is_down().await;
    let unavailable = tickets.issue(grant(1), NOW).await;
    assert!(matches!(unavailable, Err(Error::Unavailable(_))));
    server.restart();
    replica.is_up().await;
    let ticket = tickets.issue(grant(1), NOW).await.unwrap();
    assert_eq!(tickets.take(&ticket, NOW).await.unwrap(), Some(grant(1)));
}
