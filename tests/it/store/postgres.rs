//! The suite on PostgreSQL, and what its store promises beyond it.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use prompt_service::domain::{Embedding, UserId};
use prompt_service::store::postgres::{OpenError, OpenOptions, PostgresStore};
use prompt_service::store::{Access, AccountStore, Error, PromptStore};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::store::model::compare_with_naive_model;
use crate::store::{
    InsertPrompt, NewPrompt, TestableStore, completed, embedded, model, newest, user,
};
use crate::support::DEADLINE;
use crate::support::postgres::{Database, Postgres, Release, connect};

async fn open() -> (Arc<dyn TestableStore>, Database) {
    let database = Database::migrated().await;
    let store = open_on(&database, None).await.unwrap();
    (Arc::new(store), database)
}

async fn open_on(
    database: &Database,
    dimension: Option<usize>,
) -> Result<PostgresStore, OpenError> {
    let options = OpenOptions {
        dimension,
        ..OpenOptions::default()
    };
    PostgresStore::open(&database.url(), options).await
}

/// The same on the newest server of the tests.
async fn open_newest() -> (Arc<dyn TestableStore>, Database) {
    let database = Database::migrated_on(Release::Eighteen).await;
    let store = open_on(&database, None).await.unwrap();
    (Arc::new(store), database)
}

mod suite {
    conformance_suite!(crate::store::postgres::open);
}

mod suite_on_18 {
    conformance_suite!(crate::store::postgres::open_newest);
}

#[tokio::test]
async fn newest_server_has_the_expected_version() {
    let database = Database::migrated_on(Release::Eighteen).await;
    let version: i32 = database
        .client()
        .await
        .query_one("SELECT current_setting('server_version_num')::int", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(version / 10_000, 18);
}

#[test]
fn random_operations_agree_with_a_naive_model() {
    compare_with_naive_model(open);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_that_start_together_migrate_once() {
    let database = Database::empty().await;
    let url = database.url();
    let mut starters = JoinSet::new();
    for _ in 0..4 {
        let url = url.clone();
        starters.spawn(async move {
            let options = OpenOptions {
                dimension: Some(384),
                ..OpenOptions::default()
            };
            PostgresStore::open(&url, options).await.map(drop)
        });
    }
    for started in starters.join_all().await {
        started.unwrap();
    }
    let rows = database
        .client()
        .await
        .query("SELECT version FROM prompt_service_schema", &[])
        .await
        .unwrap();
    assert_eq!(rows.len(), 1);
}

#[tokio::test]
async fn database_of_a_newer_version_is_used_unless_that_version_forbids_it() {
    let database = Database::migrated().await;
    let client = database.client().await;
    // The state after a migration that only adds.
    let added = client
        .batch_execute(
            "ALTER TABLE prompt ADD COLUMN mood text; UPDATE prompt_service_schema SET version = 1000",
        )
        .await;
    added.unwrap();
    let store = open_on(&database, Some(384)).await.unwrap();
    let alice = user(&store, "alice").await.id;
    let made = store.insert_prompt(completed(alice, "p")).await.unwrap();
    assert_eq!(store.prompt(alice, made.id).await.unwrap(), Some(made));
    let seen = prompt_service::store::postgres::inspect(&database.url(), None).await;
    assert_eq!(seen.unwrap().schema, 1000);
    let version = "SELECT version FROM prompt_service_schema";
    let version: i32 = client.query_one(version, &[]).await.unwrap().get(0);
    assert_eq!(version, 1000, "it is not taken back");

    let raised = client
        .batch_execute("UPDATE prompt_service_schema SET oldest_usable = 1000")
        .await;
    raised.unwrap();
    let refused = open_on(&database, None).await;
    assert!(
        matches!(refused, Err(OpenError::Newer { found: 1000, .. })),
        "{refused:?}"
    );
    let refused = prompt_service::store::postgres::inspect(&database.url(), None).await;
    assert!(
        matches!(refused, Err(OpenError::Newer { found: 1000, .. })),
        "{refused:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn change_of_the_schema_that_has_to_wait_delays_no_other_call() {
    let database = Database::migrated().await;
    let serving = open_on(&database, None).await.unwrap();
    let alice = user(&serving, "alice").await.id;
    // For example a report that reads for a long time.
    let reader = database.client().await;
    let began = reader.batch_execute("BEGIN; SELECT FROM prompt_embedding");
    began.await.unwrap();
    let mut starting = JoinSet::new();
    let url = database.url();
    starting.spawn(async move {
        let options = OpenOptions {
            dimension: Some(4),
            ..OpenOptions::default()
        };
        PostgresStore::open(&url, options).await.map(drop)
    });
    // Longer than an attempt and its pause.
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(5) {
        let asked = Instant::now();
        serving
            .insert_prompt(embedded(alice, "p", 1))
            .await
            .unwrap();
        assert!(
            asked.elapsed() < Duration::from_secs(3),
            "{:?}",
            asked.elapsed()
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(starting.try_join_next().is_none(), "it still waits");
    reader.batch_execute("COMMIT").await.unwrap();
    starting.join_next().await.unwrap().unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn abandoned_statements_are_cancelled_on_the_server() {
    const SIZE: usize = 4;
    let database = Database::migrated().await;
    let options = OpenOptions {
        pool_size: SIZE,
        ..OpenOptions::default()
    };
    let store = PostgresStore::open(&database.url(), options).await.unwrap();
    let store = Arc::new(store);
    let alice = user(&*store, "alice").await.id;
    let client = database.client().await;
    let locked = client.batch_execute("BEGIN; LOCK TABLE prompt");
    locked.await.unwrap();
    let sql = "SELECT count(*) FROM pg_stat_activity
               WHERE datname = current_database() AND application_name = 'prompt-service'";
    // In another session: within a transaction the server shows the others as they were at the
    // first read.
    let watcher = database.client().await;
    let mut most = 0;
    for _ in 0..12 {
        let mut callers = JoinSet::new();
        for _ in 0..SIZE {
            let store = Arc::clone(&store);
            callers.spawn(async move {
                let call = store.insert_prompt(completed(alice, "p"));
                // Long enough for the statement to run; then its caller leaves.
                tokio::time::timeout(Duration::from_millis(250), call)
                    .await
                    .is_err()
            });
        }
        assert!(callers.join_all().await.into_iter().all(|gave_up| gave_up));
        let backends: i64 = watcher.query_one(sql, &[]).await.unwrap().get(0);
        most = most.max(backends);
    }
    assert!(
        most <= 3 * SIZE as i64,
        "{most} backends for a pool of {SIZE}"
    );
    eventually!(watcher.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == 0);
    client.batch_execute("COMMIT").await.unwrap();
    eventually!(store.insert_prompt(completed(alice, "p")).await.is_ok());
    let stored = newest(&*store, alice, 100).await;
    assert!(
        stored.len() <= 2,
        "what was given up was not done later: {}",
        stored.len()
    );
}

#[tokio::test]
async fn database_of_another_program_is_not_changed() {
    let database = Database::empty().await;
    let client = database.client().await;
    client
        .batch_execute("CREATE TABLE account (name text)")
        .await
        .unwrap();
    let refused = open_on(&database, None).await;
    assert!(matches!(refused, Err(OpenError::Foreign)), "{refused:?}");
    let tables = "SELECT 1 FROM pg_tables WHERE schemaname = 'public'";
    assert_eq!(client.query(tables, &[]).await.unwrap().len(), 1);
}

#[tokio::test]
async fn another_dimension_than_the_stored_one_is_refused_with_the_fix() {
    let database = Database::migrated().await;
    open_on(&database, Some(384)).await.unwrap();
    open_on(&database, Some(384)).await.unwrap();
    let refused = open_on(&database, Some(4)).await.unwrap_err().to_string();
    assert!(refused.starts_with("EMBEDDING_MODEL_DIR: "), "{refused}");
    assert!(
        refused.contains('4') && refused.contains("384"),
        "{refused}"
    );
    // The operator's commands use no model.
    open_on(&database, None).await.unwrap();
}

#[tokio::test]
async fn vectors_too_long_for_the_covering_index_are_stored_and_found() {
    let database = Database::migrated().await;
    let store = open_on(&database, Some(3_000)).await.unwrap();
    let alice = user(&store, "alice").await.id;
    let long = |at: usize| {
        let mut numbers = vec![0.0; 3_000];
        numbers[at] = 1.0;
        Embedding(numbers.into())
    };
    let mut made = Vec::new();
    for at in 0..3 {
        let new = NewPrompt {
            embedding: Some((model("long"), long(at))),
            ..completed(alice, "p")
        };
        made.push(store.insert_prompt(new).await.unwrap().id);
    }
    let found = store
        .nearest(&model("long"), Some(alice), &long(1), 1)
        .await;
    assert_eq!(found.unwrap(), [(made[1], 1.0)]);
}

#[tokio::test]
async fn failed_start_names_the_setting_and_hides_the_secret() {
    let database = Database::empty().await;
    let url = database.url();
    let with_password = url.replace("postgres@", "postgres:hunter2@");
    let (address, _) = with_password.rsplit_once('/').unwrap();
    let nobody_listens = "postgres://postgres:hunter2@127.0.0.1:1/x".to_owned();
    for bad in [
        format!("{address}/absent_hunter2"),
        format!("{with_password}?sslmode=require"),
        format!("{with_password}?sslmode=verify-full&sslrootcert=/absent/hunter2.pem"),
        nobody_listens,
        "postgres://hunter2".to_owned(),
    ] {
        let error = PostgresStore::open(&bad, OpenOptions::default()).await;
        let error = format!("{:#}", anyhow::Error::from(error.unwrap_err()));
        assert!(error.starts_with("DATABASE_URL: "), "{error}");
        assert!(
            !error.contains("hunter2") && !error.contains('\n'),
            "{error}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ids_of_many_connections_are_unique_and_rise_for_each() {
    let database = Database::migrated().await;
    let (one, other) = (
        Arc::new(open_on(&database, None).await.unwrap()),
        Arc::new(open_on(&database, None).await.unwrap()),
    );
    let alice = user(&*one, "alice").await.id;
    let mut tasks = JoinSet::new();
    for n in 0..24 {
        let store = Arc::clone(if n % 2 == 0 { &one } else { &other });
        tasks.spawn(async move {
            let mut ids = Vec::new();
            for _ in 0..20 {
                let made = store.insert_prompt(embedded(alice, "p", 1)).await.unwrap();
                // What one server has acknowledged, the other reads.
                ids.push(made.id);
            }
            ids
        });
    }
    let mut all = HashSet::new();
    for ids in tasks.join_all().await {
        assert!(ids.is_sorted());
        all.extend(ids);
    }
    assert_eq!(all.len(), 24 * 20);
    let listed = other
        .list_prompts(alice, None, usize::MAX, usize::MAX)
        .await
        .unwrap()
        .prompts;
    assert_eq!(listed.len(), all.len());
}

/// 20,000 rows of 2,000 users, created by the server, with vectors around 400 directions; user 1
/// has 10 of them.
const MANY_ROWS: &str = "
    INSERT INTO account (username, email, password_hash, is_active, tokens_valid_from, created_at)
        SELECT 'u' || i, 'e', 'h', true, 0, 0 FROM generate_series(1, 2000) i;
    INSERT INTO embedding_model (name, dimension) VALUES ('m', 384);
    INSERT INTO prompt (user_id, created_at, status, model, prompt, response)
        SELECT CASE WHEN i % 2000 = 0 THEN 1 ELSE 2 + i % 1999 END, 0, 'completed', 'mock', 'p', 'r'
        FROM generate_series(1, 20000) i;
    CREATE TEMPORARY TABLE direction AS
        SELECT b, l2_normalize(array_agg((random() - 0.5)::real)::halfvec) AS v
        FROM generate_series(0, 399) b, generate_series(1, 384) d GROUP BY b;
    INSERT INTO prompt_embedding
        SELECT p.id, p.user_id, 1, l2_normalize(a.v + b.v)
        FROM prompt p JOIN direction a ON a.b = p.id % 400 JOIN direction b ON b.b = (p.id / 400 + 7 * p.id) % 400;
    DROP TABLE direction;";

async fn many_rows() -> (Database, PostgresStore) {
    let database = Database::migrated().await;
    let store = open_on(&database, Some(384)).await.unwrap();
    let client = database.client().await;
    client.batch_execute("SELECT setseed(0.5)").await.unwrap();
    client.batch_execute(MANY_ROWS).await.unwrap();
    (database, store)
}

/// The stored vector of a prompt, as a query.
async fn stored_vector(client: &tokio_postgres::Client, id: i64) -> Embedding {
    let sql = "SELECT embedding::real[] FROM prompt_embedding WHERE prompt_id = $1";
    let row = client.query_one(sql, &[&id]).await.unwrap();
    let numbers: Vec<f32> = row.get(0);
    Embedding(numbers.into())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn search_of_one_owner_reads_only_the_covering_index_and_misses_nothing() {
    let (database, store) = many_rows().await;
    let client = database.client().await;
    // The approximate index exists too, and must not be used.
    let stop = CancellationToken::new();
    store.build_hnsw_index(stop).await;
    client.batch_execute("VACUUM ANALYZE").await.unwrap();

    for mode in ["force_custom_plan", "force_generic_plan"] {
        let plan = client
            .batch_execute(&format!(
                "DEALLOCATE ALL; SET plan_cache_mode = {mode};
                 PREPARE own (halfvec, int, bigint, bigint) AS {}",
                PostgresStore::OWN_SEARCH
            ))
            .await;
        plan.unwrap();
        let vector = format!("[{}]", ["0.05"; 384].join(","));
        let explain = format!("EXPLAIN (ANALYZE, COSTS OFF) EXECUTE own ('{vector}', 1, 1, 10)");
        let mut plan: String;
        // While a transaction is open in any database, a vacuum may leave rows that have to be
        // looked up.
        eventually!(
            {
                client.batch_execute("VACUUM").await.unwrap();
                let explained = client.simple_query(&explain).await.unwrap();
                plan = explained
                    .iter()
                    .filter_map(|message| {
                        let tokio_postgres::SimpleQueryMessage::Row(row) = message else {
                            return None;
                        };
                        row.get(0)
                    })
                    .collect::<Vec<_>>()
                    .join("\n");
                plan.contains("Heap Fetches: 0")
            },
            "{mode}: {plan}"
        );
        assert!(
            plan.contains("Index Only Scan using prompt_embedding_by_owner"),
            "{mode}: {plan}"
        );
        assert!(!plan.contains("by_meaning"), "{mode}: {plan}");
    }

    // Few among many: all ten, in the order that a plain computation returns.
    let query = stored_vector(&client, 5).await;
    let found = store
        .nearest(&model("m"), Some(UserId(1)), &query, 10)
        .await
        .unwrap();
    let exact = client
        .query(
            "SELECT prompt_id FROM prompt_embedding WHERE user_id = 1
             ORDER BY embedding <#> (SELECT embedding FROM prompt_embedding WHERE prompt_id = 5), prompt_id",
            &[],
        )
        .await
        .unwrap();
    assert_eq!(found.len(), 10);
    assert_eq!(
        found.iter().map(|(id, _)| id.0).collect::<Vec<_>>(),
        exact.iter().map(|row| row.get(0)).collect::<Vec<i64>>()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shared_search_is_exact_without_its_index_and_nearly_exact_with_it() {
    let (database, store) = many_rows().await;
    let client = database.client().await;
    let queries = [5_i64, 777, 4_242, 12_345, 19_999];
    let mut exact = Vec::new();
    for id in queries {
        let query = stored_vector(&client, id).await;
        let found = store.nearest(&model("m"), None, &query, 100).await.unwrap();
        assert_eq!(found.len(), 100);
        assert!(found.is_sorted_by(|a, b| a.1 > b.1 || (a.1 == b.1 && a.0 < b.0)));
        exact.push(found);
    }
    // Half of an index, which a crash has left, is replaced. Two servers that build it make one
    // index.
    let broken = client
        .batch_execute(
            "CREATE INDEX prompt_embedding_by_meaning ON prompt_embedding USING hnsw (embedding halfvec_ip_ops)
                 WITH (m = 4, ef_construction = 8);
             UPDATE pg_index SET indisvalid = false
                 WHERE indexrelid = 'prompt_embedding_by_meaning'::regclass",
        )
        .await;
    broken.unwrap();
    let other = open_on(&database, Some(384)).await.unwrap();
    tokio::join!(
        store.build_hnsw_index(CancellationToken::new()),
        other.build_hnsw_index(CancellationToken::new())
    );
    let sql = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'prompt_embedding_by_meaning'::regclass";
    assert!(client.query_one(sql, &[]).await.unwrap().get::<_, bool>(0));
    client.batch_execute("ANALYZE").await.unwrap();

    let mut hits = 0;
    for (id, exact) in queries.into_iter().zip(&exact) {
        let query = stored_vector(&client, id).await;
        let found = store.nearest(&model("m"), None, &query, 100).await.unwrap();
        assert_eq!(found.len(), 100, "never fewer than asked for");
        let exact: HashSet<_> = exact.iter().map(|(id, _)| id).collect();
        hits += found.iter().filter(|(id, _)| exact.contains(id)).count();
    }
    assert!(hits >= 400, "{hits} of 500");
}

#[tokio::test]
async fn equal_scores_are_sorted_by_rising_id() {
    let database = Database::migrated().await;
    let store = open_on(&database, None).await.unwrap();
    let alice = user(&store, "alice").await.id;
    let mut made = Vec::new();
    for _ in 0..6 {
        let new = embedded(alice, "p", 1);
        made.push(store.insert_prompt(new).await.unwrap().id);
    }
    let query = Embedding(vec![0.6, 0.8, 0.0, 0.0].into());
    for owner in [Some(alice), None] {
        let found = store.nearest(&model("a"), owner, &query, 4).await.unwrap();
        let ids: Vec<_> = found.iter().map(|(id, _)| *id).collect();
        assert_eq!(ids, made[..4]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restarted_server_is_used_again_and_no_acknowledged_write_is_lost() {
    let mut server = Postgres::start(true);
    let url = server.url("postgres");
    let store = Arc::new(
        PostgresStore::open(&url, OpenOptions::default())
            .await
            .unwrap(),
    );
    let alice = user(&*store, "alice").await.id;
    let stop = CancellationToken::new();
    let mut writers = JoinSet::new();
    for _ in 0..4 {
        let (store, stop) = (Arc::clone(&store), stop.clone());
        writers.spawn(async move {
            let (mut acknowledged, mut refused) = (Vec::new(), 0);
            while !stop.is_cancelled() {
                match store.insert_prompt(completed(alice, "p")).await {
                    Ok(made) => acknowledged.push(made.id),
                    Err(Error::Unavailable(_)) => {
                        refused += 1;
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                    Err(error) => panic!("{error:?}"),
                }
            }
            (acknowledged, refused)
        });
    }
    eventually!(newest(&*store, alice, 50).await.len() == 50);
    server.stop();
    assert!(matches!(store.ping().await, Err(Error::Unavailable(_))));
    server.resume();
    eventually!(store.ping().await.is_ok());
    // All connections work again, not only one.
    let before = store.stats().committed_operations;
    eventually!(store.stats().committed_operations > before + 50);
    stop.cancel();
    let mut doubts = 0;
    let mut all = Vec::new();
    for (acknowledged, refused) in writers.join_all().await {
        all.extend(acknowledged);
        doubts += refused;
    }
    let stored: HashSet<_> = store
        .list_prompts(alice, None, usize::MAX, usize::MAX)
        .await
        .unwrap()
        .prompts
        .into_iter()
        .map(|prompt| prompt.id)
        .collect();
    assert!(all.iter().all(|id| stored.contains(id)));
    assert!(doubts > 0, "the restart was noticed");
    // Besides the acknowledged writes, only writes whose reply was lost may be stored: one for each
    // connection in use.
    assert!(
        stored.len() <= all.len() + 4,
        "{} of {}",
        stored.len(),
        all.len()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn paused_server_is_unavailable_within_seconds_and_used_again_when_it_resumes() {
    let server = Postgres::start(false);
    let url = server.url("postgres");
    let store = Arc::new(
        PostgresStore::open(&url, OpenOptions::default())
            .await
            .unwrap(),
    );
    let alice = user(&*store, "alice").await.id;
    server.signal("STOP");
    let mut calls = JoinSet::new();
    for n in 0..40 {
        let store = Arc::clone(&store);
        calls.spawn(async move {
            if n % 2 == 0 {
                store.insert_prompt(embedded(alice, "p", 1)).await.map(drop)
            } else {
                store.user(alice).await.map(drop)
            }
        });
    }
    // All calls return while the server is still paused.
    for answer in timeout(DEADLINE, calls.join_all()).await.unwrap() {
        assert!(matches!(answer, Err(Error::Unavailable(_))), "{answer:?}");
    }
    server.signal("CONT");
    eventually!(store.insert_prompt(embedded(alice, "p", 2)).await.is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn read_only_database_is_reported_until_it_is_writable_again() {
    let database = Database::migrated().await;
    let store = open_on(&database, None).await.unwrap();
    let client = database.client().await;
    for (value, expected) in [("on", Access::ReadOnly), ("off", Access::ReadWrite)] {
        let name = database.name();
        client
            .batch_execute(&format!(
                "SET transaction_read_only = off;
                 ALTER DATABASE \"{name}\" SET default_transaction_read_only = {value};
                 SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
                     WHERE datname = current_database() AND application_name = 'prompt-service'"
            ))
            .await
            .unwrap();
        eventually!(store.ping().await.is_ok_and(|access| access == expected));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connection_that_the_server_ended_is_not_used_again() {
    let database = Database::migrated().await;
    let store = open_on(&database, None).await.unwrap();
    let client = database.client().await;
    for _ in 0..5 {
        store.ping().await.unwrap();
        let ended = client
            .query(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
                 WHERE datname = current_database() AND application_name = 'prompt-service'",
                &[],
            )
            .await
            .unwrap();
        assert!(!ended.is_empty());
        // The end of the connection arrives as fast as anything on it. A call that is faster may
        // fail; the next one does not.
        eventually!(store.ping().await.is_ok());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_one_server_holds_the_exclusive_lock() {
    let database = Database::migrated().await;
    let first = open_on(&database, None).await.unwrap();
    let second = open_on(&database, None).await.unwrap();
    let stop = CancellationToken::new();
    let held = first.lock_exclusive().await.unwrap();
    let mut holding = JoinSet::new();
    holding.spawn(held.hold(stop.clone()));
    let refused = second.lock_exclusive().await.err();
    assert!(matches!(refused, Some(OpenError::InUse)), "{refused:?}");
    // The open transaction of the lock holds up no vacuum.
    let client = database.client().await;
    let sql = "SELECT a.backend_xmin IS NULL FROM pg_locks l JOIN pg_stat_activity a USING (pid)
               WHERE l.locktype = 'advisory' AND a.datname = current_database()";
    assert!(client.query_one(sql, &[]).await.unwrap().get::<_, bool>(0));

    // Its connection is cut: it takes the lock again and goes on serving.
    let cut =
        "SELECT pg_terminate_backend(l.pid) FROM pg_locks l JOIN pg_stat_activity a USING (pid)
               WHERE l.locktype = 'advisory' AND a.datname = current_database()";
    let holder = "SELECT l.pid FROM pg_locks l JOIN pg_stat_activity a USING (pid)
                  WHERE l.locktype = 'advisory' AND l.granted AND a.datname = current_database()";
    let before: i32 = client.query_one(holder, &[]).await.unwrap().get(0);
    client.query(cut, &[]).await.unwrap();
    eventually!(
        client
            .query_opt(holder, &[])
            .await
            .unwrap()
            .is_some_and(|row| row.get::<_, i32>(0) != before)
    );
    eventually!(first.ping().await.is_ok());
    assert!(holding.try_join_next().is_none());

    stop.cancel();
    assert_eq!(holding.join_all().await, [true]);
    let held = second.lock_exclusive().await.unwrap();
    drop(held);
}

/// Takes the exclusive lock from its holders: waits for it, and then ends their connections. So the
/// lock goes to this client before they can take it again, however long that takes. Held while the
/// client lives.
async fn take_over(database: &Database) -> tokio_postgres::Client {
    let (heir, other) = (database.client().await, database.client().await);
    let heirs = heir.query_one("SELECT pg_backend_pid()", &[]).await;
    let heirs: i32 = heirs.unwrap().get(0);
    let take = heir.execute("SELECT pg_advisory_lock($1)", &[&0x5072_6d53_736f_6c65_i64]);
    let cut = async {
        let waits = "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND pid = $1)";
        eventually!(
            other
                .query_one(waits, &[&heirs])
                .await
                .unwrap()
                .get::<_, bool>(0)
        );
        let cut =
            "SELECT pg_terminate_backend(l.pid) FROM pg_locks l JOIN pg_stat_activity a USING (pid)
                   WHERE l.locktype = 'advisory' AND l.granted AND a.datname = current_database()";
        other.query(cut, &[]).await.unwrap();
    };
    let (taken, ()) = timeout(DEADLINE, async { tokio::join!(take, cut) })
        .await
        .unwrap();
    taken.unwrap();
    heir
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_whose_lock_was_taken_stops_serving() {
    let database = Database::migrated().await;
    let first = open_on(&database, None).await.unwrap();
    let stop = CancellationToken::new();
    let mut holding = JoinSet::new();
    holding.spawn(first.lock_exclusive().await.unwrap().hold(stop.clone()));
    let _heir = take_over(&database).await;
    let still_alone = timeout(DEADLINE, holding.join_all()).await;
    assert_eq!(still_alone.unwrap(), [false]);
    assert!(matches!(first.ping().await, Err(Error::Unavailable(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_share_the_lock_and_exclude_a_server_alone() {
    let database = Database::migrated().await;
    let first = open_on(&database, None).await.unwrap();
    let second = open_on(&database, None).await.unwrap();
    let places = (
        first.lock_shared().await.unwrap(),
        second.lock_shared().await.unwrap(),
    );
    let third = open_on(&database, None).await.unwrap();
    let refused = third.lock_exclusive().await.err();
    assert!(matches!(refused, Some(OpenError::InUse)), "{refused:?}");
    drop(places);
    let alone = third.lock_exclusive().await.unwrap();
    let refused = first.lock_shared().await.err();
    assert!(
        matches!(refused, Some(OpenError::InUseAlone)),
        "{refused:?}"
    );
    drop(alone);
    first.lock_shared().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replica_that_lost_its_lock_serves_until_a_server_alone_has_taken_it() {
    let database = Database::migrated().await;
    let replica = open_on(&database, None).await.unwrap();
    let other = open_on(&database, None).await.unwrap();
    let mut holding = JoinSet::new();
    let place = replica.lock_shared().await.unwrap();
    holding.spawn(place.hold(CancellationToken::new()));
    let client = database.client().await;
    let holder = "SELECT l.pid FROM pg_locks l JOIN pg_stat_activity a USING (pid)
                  WHERE l.locktype = 'advisory' AND l.granted AND a.datname = current_database()";
    let before: i32 = client.query_one(holder, &[]).await.unwrap().get(0);
    // Cut while another replica is there: it takes the lock again beside it.
    let beside = other.lock_shared().await.unwrap();
    let cut = "SELECT pg_terminate_backend($1)";
    client.query(cut, &[&before]).await.unwrap();
    eventually!({
        replica.ping().await.unwrap();
        let held = client.query(holder, &[]).await.unwrap();
        held.len() == 2 && held.iter().all(|row| row.get::<_, i32>(0) != before)
    });
    assert!(holding.try_join_next().is_none());

    // Cut, and a server alone takes the lock before this one can.
    drop(beside);
    eventually!(client.query(holder, &[]).await.unwrap().len() == 1);
    let _heir = take_over(&database).await;
    let still_there = timeout(DEADLINE, holding.join_all()).await;
    assert_eq!(still_there.unwrap(), [false]);
    assert!(matches!(replica.ping().await, Err(Error::Unavailable(_))));
}

#[tokio::test]
async fn reembedding_is_claimed_by_one_server_at_a_time() {
    let database = Database::migrated().await;
    let first = open_on(&database, None).await.unwrap();
    let second = open_on(&database, None).await.unwrap();
    let claim = first.claim_reembedding().await.unwrap();
    assert!(claim.is_some());
    assert!(second.claim_reembedding().await.unwrap().is_none());
    drop(claim);
    eventually!(second.claim_reembedding().await.unwrap().is_some());
}

#[tokio::test]
async fn nul_characters_in_arguments_are_harmless_and_replaced_in_responses() {
    let database = Database::migrated().await;
    let store = open_on(&database, None).await.unwrap();
    let alice = user(&store, "alice").await.id;
    assert_eq!(store.user_by_username("ali\0ce").await.unwrap(), None);
    assert!(!store.is_token_revoked("j\0ti").await.unwrap());
    let new = NewPrompt {
        response: Some("a\0b".to_owned()),
        ..completed(alice, "p")
    };
    let made = store.insert_prompt(new).await.unwrap();
    assert_eq!(made.response.as_deref(), Some("a\u{fffd}b"));
    assert_eq!(store.prompt(alice, made.id).await.unwrap(), Some(made));
}

#[tokio::test]
async fn closed_store_refuses_further_calls() {
    let database = Database::migrated().await;
    let store = open_on(&database, None).await.unwrap();
    store.close().await;
    assert!(matches!(store.ping().await, Err(Error::Unavailable(_))));
    let client = connect(&database.url()).await;
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()";
    eventually!(client.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == 0);
}
