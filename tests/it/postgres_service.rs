//! A service on PostgreSQL: what its clients see while the database is unavailable, and who may use
//! it.

use prompt_service::config::{Config, Secret, StoreConfig};

use crate::support::postgres::{Database, Postgres};
use crate::support::redis::RedisServer;
use crate::support::{Folder, spawn_app, try_spawn_app_in};

/// Puts the service's data into the database of that URL.
fn store_at(url: String) -> impl FnOnce(&mut Config) {
    move |config| {
        config.store = StoreConfig::Postgres {
            data_dir: config.store.data_dir().to_owned(),
            url: Secret::new(url),
            pool_size: 8,
        };
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_database_is_a_503_in_seconds_and_the_service_recovers_by_itself() {
    let server = Postgres::start(false);
    let app = spawn_app(store_at(server.url("postgres"))).await;
    let alice = app.user("alice").await;
    let before = alice.prompt("the first").await;
    server.signal("STOP");
    // Each is answered while the database still stands still.
    for answer in [
        alice.try_prompt("meanwhile").await,
        alice.get("/api/prompts/similar/?q=first").send().await,
        app.try_login("alice", crate::support::PASSWORD).await,
    ] {
        assert_eq!(answer.status, 503, "{answer:?}");
        assert!(answer.header("retry-after").is_some(), "{answer:?}");
    }
    let ready = app.get("/readyz").send().await;
    assert_eq!(ready.status, 503, "{ready:?}");
    assert_eq!(ready.json()["parts"]["store"], "down", "{ready:?}");

    let store_up = async || app.metric("backend_up{backend=\"store\"}").await;
    eventually!(store_up().await == Some(0.0));

    server.signal("CONT");
    eventually!(app.get("/readyz").send().await.status == 200);
    eventually!(alice.try_prompt("afterwards").await.status == 201);
    assert!(alice.similar("the first", 5).await.contains(&before));
    eventually!(store_up().await == Some(1.0));
    for message in ["the store does not answer", "the store answers again"] {
        let lines = app.log.lines().into_iter();
        let count = lines.filter(|line| line["message"] == message).count();
        assert_eq!(count, 1, "{message}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_server_without_redis_is_refused_and_may_start_when_the_first_has_gone() {
    let database = Database::migrated().await;
    let first = spawn_app(store_at(database.url())).await;
    let refused = try_spawn_app_in(Folder::new(), store_at(database.url())).await;
    let refused = refused.err().map(|error| format!("{error:#}")).unwrap();
    assert!(
        refused.starts_with("DATABASE_URL: another prompt-service"),
        "{refused}"
    );
    assert!(!refused.contains("127.0.0.1"), "{refused}");
    let alice = first.user("alice").await;
    let id = alice.prompt("kept").await;
    first.stop().await;
    let second = spawn_app(store_at(database.url())).await;
    let (access, _) = second.login("alice").await;
    let answer = second
        .get(&format!("/api/prompts/{id}/"))
        .bearer(&access)
        .send()
        .await;
    assert_eq!(answer.json()["prompt"], "kept");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_with_and_without_redis_do_not_share_a_database() {
    let database = Database::migrated().await;
    let redis = RedisServer::start();
    let with_redis = || {
        let (at, redis) = (store_at(database.url()), redis.config());
        |config: &mut Config| {
            at(config);
            config.redis = Some(redis);
            config.accounts.secret_key = Some(Secret::new("one key for all replicas of this test"));
        }
    };
    let alone = spawn_app(store_at(database.url())).await;
    let refused = try_spawn_app_in(Folder::new(), with_redis()).await;
    let refused = refused.err().map(|error| format!("{error:#}")).unwrap();
    assert!(
        refused.starts_with("DATABASE_URL: a prompt-service without REDIS_URL"),
        "{refused}"
    );
    alone.stop().await;

    let one = spawn_app(with_redis()).await;
    let other = spawn_app(with_redis()).await;
    let refused = try_spawn_app_in(Folder::new(), store_at(database.url())).await;
    let refused = refused.err().map(|error| format!("{error:#}")).unwrap();
    assert!(
        refused.starts_with("DATABASE_URL: another prompt-service"),
        "{refused}"
    );
    assert!(refused.contains("REDIS_URL"), "{refused}");
    let id = one.user("alice").await.prompt("on one").await;
    let on_other = other.login("alice").await.0;
    let answer = other
        .get(&format!("/api/prompts/{id}/"))
        .bearer(&on_other)
        .send()
        .await;
    assert_eq!(answer.json()["prompt"], "on one");
}
