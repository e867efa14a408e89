//! The connection: starting, noticing outages, recovering, closing.

use prompt_service::config::{RedisConfig, Secret};
use prompt_service::redis::{Connection, Script};
use std::sync::Arc;
use tokio::time::timeout;

use super::Replica;
use crate::support::redis::{Proxy, RedisServer, config_at};
use crate::support::{DEADLINE, Log};

/// How many clients the server has, without the one that asks here.
fn clients(server: &RedisServer) -> usize {
    let list = server.command(&["CLIENT", "LIST"]);
    list.matches("addr=").count() - list.matches("laddr=").count() - 1
}

async fn ask(replica: &Replica) -> Result<u64, prompt_service::redis::Error> {
    let script = Script::new("return 42");
    let patience = replica.redis.patience();
    replica
        .redis
        .run("test", patience, &script.key("key"))
        .await
}

#[tokio::test]
async fn start_without_redis_fails_with_a_message_that_hides_the_url() {
    let mut server = RedisServer::start();
    let plain = server.impatient_config();
    // TLS with a server that does not support it.
    let tls = RedisConfig {
        url: Secret::new(format!("rediss://:hunter2@{}", server.addr())),
        ..plain.clone()
    };
    // A server that runs and refuses the password.
    let locked = RedisConfig {
        url: Secret::new(format!("redis://:hunter2@{}", server.addr())),
        ..plain.clone()
    };
    let nonsense = RedisConfig {
        url: Secret::new("redis://[hunter2"),
        ..plain.clone()
    };
    for config in [&tls, &locked, &nonsense] {
        refused(config).await;
    }
    server.pause();
    refused(&plain).await;
    server.stop();
    refused(&plain).await;
}

async fn refused(config: &RedisConfig) {
    let connected = timeout(DEADLINE, Connection::connect(config, Arc::default())).await;
    let error = connected
        .expect("a server that does not reply is not waited for")
        .err()
        .expect("nothing to connect to")
        .to_string();
    let host = "127.0.0.1";
    assert!(
        !error.contains("hunter2") && !error.contains(host),
        "{error}"
    );
    assert!(!error.contains('\n'), "{error}");
}

#[tokio::test]
async fn redis_that_refuses_writes_fails_the_start_and_later_counts_as_down() {
    let server = RedisServer::start();
    let replica = Replica::of(&server).await;
    // A read-only copy replies to pings.
    server.command(&["REPLICAOF", "127.0.0.1", "1"]);
    replica.is_down().await;
    refused(&server.config()).await;
    server.command(&["REPLICAOF", "NO", "ONE"]);
    replica.is_up().await;
}

/// Asserts that commands fail at once: none is sent, so none waits.
async fn assert_costs_nothing(replica: &Replica) {
    let sent = replica.sent("test");
    for _ in 0..1000 {
        assert!(ask(replica).await.is_err());
    }
    assert_eq!(replica.sent("test"), sent);
}

#[tokio::test]
async fn outage_is_noticed_at_once_costs_nothing_and_its_end_is_noticed_in_time() {
    let mut server = RedisServer::start();
    let log = Log::default();
    let _logs = tracing::dispatcher::set_default(&log.dispatch());
    let replica = Replica::of(&server).await;
    assert_eq!(ask(&replica).await.unwrap(), 42);
    for _ in 0..2 {
        server.stop();
        replica.is_down().await;
        assert_costs_nothing(&replica).await;
        let up = replica.metrics.backend_up.with_label_values(&["redis"]);
        assert_eq!(up.get(), 0.0);
        server.restart();
        replica.is_up().await;
        assert_eq!(up.get(), 1.0);
        assert_eq!(ask(&replica).await.unwrap(), 42);
    }
    let text = log.text();
    assert_eq!(text.matches("Redis is away").count(), 2, "{text}");
    assert_eq!(text.matches("Redis is back").count(), 2, "{text}");
    assert!(!text.contains("127.0.0.1"), "{text}");
}

#[tokio::test]
async fn paused_redis_costs_one_timeout_and_then_nothing() {
    let server = RedisServer::start();
    let replica = Replica::at(&server.impatient_config()).await;
    server.pause();
    // Both loops end although Redis does not reply.
    timeout(DEADLINE, async {
        while ask(&replica).await.is_err() && replica.redis.is_up() {}
        assert_costs_nothing(&replica).await;
    })
    .await
    .unwrap();
    server.resume();
    replica.is_up().await;
    assert_eq!(ask(&replica).await.unwrap(), 42);
}

#[tokio::test]
async fn script_that_redis_no_longer_has_is_loaded_again() {
    let server = RedisServer::start();
    let replica = Replica::of(&server).await;
    assert_eq!(ask(&replica).await.unwrap(), 42);
    server.command(&["SCRIPT", "FLUSH"]);
    assert_eq!(ask(&replica).await.unwrap(), 42);
}

#[tokio::test]
async fn outages_and_closing_leave_no_connections_open() {
    let server = RedisServer::start();
    let proxy = Proxy::start(server.addr());
    let replica = Replica::at(&config_at(proxy.addr)).await;
    for _ in 0..5 {
        proxy.cut();
        replica.is_down().await;
        proxy.mend();
        replica.is_up().await;
    }
    eventually!(clients(&server) == 1, "{}", clients(&server));
    replica.manager.close().await;
    drop(replica.redis);
    eventually!(clients(&server) == 0, "{}", clients(&server));
}
