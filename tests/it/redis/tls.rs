//! Redis over TLS, as the program itself sees it: its environment names the trusted authorities.

use std::process::Command;

use prompt_service::config::{RedisConfig, Secret};
use prompt_service::redis::{ConnectError, Connection};
use std::sync::Arc;

use crate::support::postgres::Database;
use crate::support::redis::{RedisServer, config_at};
use crate::support::tls::{TlsProxy, pem};

/// The output of `prompt-service check` for the Redis at `url`, with one trusted authority.
fn check(url: &str, authority: &str, database_url: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let answer = Command::new(env!("CARGO_BIN_EXE_prompt-service"))
        .arg("check")
        .current_dir(folder.path())
        .env_clear()
        .env("DATABASE_URL", database_url)
        .env("REDIS_URL", url)
        .env("SECRET_KEY", "0123456789abcdef0123456789abcdef")
        .env("SSL_CERT_FILE", pem(&format!("{authority}.pem")))
        .output()
        .unwrap();
    let said = String::from_utf8(answer.stdout).unwrap();
    let redis = |line: &&str| {
        line.get(6..)
            .is_some_and(|rest| rest.starts_with("redis: "))
    };
    let line = said.lines().find(redis);
    line.unwrap_or_else(|| panic!("{said}")).to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_over_tls_is_used_if_its_certificate_is_trusted() {
    let server = RedisServer::start();
    let proxy = TlsProxy::to_redis(server.addr().port(), "server");
    let database = Database::migrated().await;
    let url = |host: &str| format!("rediss://{host}:{}/0", proxy.port);
    let trusted = check(&url("localhost"), "authority", &database.url());
    assert!(trusted.starts_with("ok"), "{trusted}");
    assert!(trusted.contains("can be written to"), "{trusted}");
    for (host, authority) in [("localhost", "other"), ("127.0.0.1", "authority")] {
        let refused = check(&url(host), authority, &database.url());
        assert!(
            refused.contains("REDIS_URL") && refused.contains("SSL_CERT_FILE"),
            "{refused}"
        );
        assert!(!refused.contains(host), "{refused}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_with_an_untrusted_certificate_is_distinguished_from_an_unavailable_one() {
    let server = RedisServer::start();
    let proxy = TlsProxy::to_redis(server.addr().port(), "server");
    let config = RedisConfig {
        url: Secret::new(format!("rediss://localhost:{}", proxy.port)),
        ..config_at(server.addr())
    };
    let refused = Connection::connect(&config, Arc::default()).await.err();
    assert!(
        matches!(refused, Some(ConnectError::Distrusted)),
        "{refused:?}"
    );
}
