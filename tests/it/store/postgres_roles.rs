//! Databases and roles that lack something: what works nevertheless, and how the rest is refused.

use prompt_service::config::Secret;
use prompt_service::domain::UserId;
use prompt_service::store::PromptStore;
use prompt_service::store::django::DjangoDatabase;
use prompt_service::store::postgres::{OpenError, OpenOptions, PostgresStore, inspect};
use tokio_util::sync::CancellationToken;

use crate::store::{InsertPrompt, embedded, list_users, model, user, vector};
use crate::support::postgres::{Database, Release};

/// The URL of a database for a new role, which may log in and nothing else. Roles belong to the
/// server; each is named after its database, so no two tests share one.
async fn role(database: &Database) -> String {
    let (name, client) = (database.name(), database.client().await);
    let make = format!("CREATE ROLE {name} LOGIN");
    client.batch_execute(&make).await.unwrap();
    database.url().replace("postgres@", &format!("{name}@"))
}

async fn run(database: &Database, sql: &str) {
    let sql = sql.replace("ROLE_HERE", database.name());
    database.client().await.batch_execute(&sql).await.unwrap();
}

async fn open(url: &str, dimension: Option<usize>) -> Result<PostgresStore, OpenError> {
    let options = OpenOptions {
        dimension,
        ..OpenOptions::default()
    };
    PostgresStore::open(url, options).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pgvector_in_a_schema_that_no_search_path_names_is_found() {
    let database = Database::empty().await;
    let url = role(&database).await;
    run(
        &database,
        "CREATE SCHEMA \"all extensions\"; CREATE EXTENSION vector SCHEMA \"all extensions\";
         GRANT USAGE ON SCHEMA \"all extensions\" TO ROLE_HERE;
         CREATE SCHEMA own AUTHORIZATION ROLE_HERE; ALTER ROLE ROLE_HERE SET search_path = own",
    )
    .await;
    assert_eq!(inspect(&url, Some(384)).await.unwrap().schema, 0);
    let dimension = Some(vector(1).0.len());
    drop(open(&url, dimension).await.unwrap());
    let store = open(&url, dimension).await.unwrap();
    let alice = user(&store, "alice").await.id;
    let made = store.insert_prompt(embedded(alice, "p", 1)).await.unwrap();
    for owner in [Some(alice), None] {
        let found = store.nearest(&model("a"), owner, &vector(1), 5).await;
        assert_eq!(found.unwrap()[0].0, made.id);
    }
    // The index is built over a separate connection.
    let stop = CancellationToken::new();
    store.build_hnsw_index(stop).await;
    let found = store.nearest(&model("a"), None, &vector(1), 5).await;
    assert_eq!(found.unwrap()[0].0, made.id);
    assert!(inspect(&url, dimension).await.unwrap().schema > 0);
    let place = "SELECT schemaname FROM pg_tables WHERE tablename = 'prompt'";
    let place = database.client().await.query_one(place, &[]).await.unwrap();
    assert_eq!(place.get::<_, &str>(0), "own");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn missing_right_or_feature_is_reported_with_its_fix() {
    let vector = "CREATE EXTENSION vector;";
    let owned = "CREATE EXTENSION vector; GRANT CREATE ON SCHEMA public TO ROLE_HERE;";
    for (sql, words) in [
        (
            "CREATE SCHEMA extensions; CREATE EXTENSION vector SCHEMA extensions; GRANT CREATE ON SCHEMA public TO ROLE_HERE"
                .to_owned(),
            &["in the schema extensions", "GRANT USAGE ON SCHEMA extensions"][..],
        ),
        (
            "GRANT CREATE ON SCHEMA public TO ROLE_HERE".to_owned(),
            &["superuser", "CREATE EXTENSION vector"],
        ),
        (
            vector.to_owned(),
            &["make tables in the schema public", "GRANT CREATE ON SCHEMA public"],
        ),
        (
            format!("{owned} ALTER ROLE ROLE_HERE SET default_transaction_read_only = on"),
            &["read-only", "RESET default_transaction_read_only"],
        ),
        (
            format!("{owned} ALTER ROLE ROLE_HERE SET search_path = nowhere"),
            &["search_path", "GRANT USAGE, CREATE ON SCHEMA"],
        ),
        (
            format!("{owned} REVOKE CONNECT ON DATABASE ROLE_HERE FROM PUBLIC"),
            &["may not connect", "GRANT CONNECT"],
        ),
        (
            format!("{owned} ALTER ROLE ROLE_HERE CONNECTION LIMIT 0"),
            &["no connection left", "DATABASE_POOL_SIZE"],
        ),
        (
            format!("{owned} ALTER ROLE ROLE_HERE NOLOGIN"),
            &["refuses the user or the password", "pg_hba.conf"],
        ),
    ] {
        let database = Database::empty().await;
        let url = role(&database).await;
        run(&database, &sql).await;
        assert_refused(&url, words, &sql).await;
        let tables = "SELECT FROM pg_tables WHERE schemaname = 'public'";
        let made = database.client().await.query(tables, &[]).await.unwrap();
        assert_eq!(made.len(), 0, "{sql}");
    }
}

/// `inspect` and a start report the same, in one line that names the setting and more than a
/// number.
async fn assert_refused(url: &str, words: &[&str], about: &str) {
    let looked = inspect(url, Some(384)).await.map(drop);
    let opened = open(url, Some(384)).await.map(drop);
    for refused in [looked, opened] {
        let error = refused.expect_err(about);
        let error = format!("{:#}", anyhow::Error::new(error));
        assert!(error.starts_with("DATABASE_URL: "), "{about}: {error}");
        for word in words {
            assert!(error.contains(word), "{about}: {error}");
        }
        assert!(!error.contains('\n'), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn existing_tables_must_be_writable_and_owned_by_the_role() {
    for (sql, words) in [
        ("", &["read and write the table", "GRANT SELECT"][..]),
        (
            "GRANT SELECT ON ALL TABLES IN SCHEMA public TO ROLE_HERE",
            &["read and write the table", "GRANT SELECT, INSERT"],
        ),
        (
            "GRANT ALL ON ALL TABLES IN SCHEMA public TO ROLE_HERE; REVOKE DELETE ON prompt FROM ROLE_HERE",
            &["the table prompt;"],
        ),
        // The first start with a model sets the dimension of vectors.
        (
            "GRANT ALL ON ALL TABLES IN SCHEMA public TO ROLE_HERE",
            &["owner"],
        ),
    ] {
        let database = Database::migrated().await;
        let url = role(&database).await;
        run(&database, sql).await;
        assert_refused(&url, words, sql).await;
    }
    let database = Database::migrated().await;
    let url = role(&database).await;
    drop(open(&database.url(), Some(384)).await.unwrap());
    let granted =
        "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO ROLE_HERE";
    run(&database, granted).await;
    let store = open(&url, Some(384)).await.unwrap();
    assert_eq!(user(&store, "alice").await.id, UserId(1));
    assert_eq!(list_users(&store, None, 5).await.len(), 1);
    let refused = inspect(&url, Some(4)).await.unwrap_err();
    assert!(
        matches!(refused, OpenError::Dimension { .. }),
        "{refused:?}"
    );
}

#[tokio::test]
async fn database_that_cannot_store_every_text_is_refused() {
    let database = Database::empty().await;
    for encoding in ["LATIN1", "SQL_ASCII"] {
        let name = format!("{}_{}", database.name(), encoding.to_lowercase());
        let made =
            format!("CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0 LOCALE 'C'");
        run(&database, &made).await;
        let url = database.url().replace(database.name(), &name);
        assert_refused(&url, &[encoding, "--encoding=UTF8"], encoding).await;
        run(&database, &format!("DROP DATABASE {name} WITH (FORCE)")).await;
    }
    let url = database.url() + "_nowhere";
    assert_refused(
        &url,
        &["no database of that name", "createdb"],
        "no database",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn time_limits_of_the_role_do_not_end_the_session_that_holds_the_lock() {
    for release in [Release::Usual, Release::Eighteen] {
        let database = Database::migrated_on(release).await;
        let url = role(&database).await;
        let mut limits = vec![
            "idle_in_transaction_session_timeout",
            "idle_session_timeout",
            "statement_timeout",
            "lock_timeout",
        ];
        if release == Release::Eighteen {
            limits.push("transaction_timeout");
        }
        let limits = limits
            .iter()
            .map(|name| format!("ALTER ROLE ROLE_HERE SET {name} = '900ms';"));
        let granted = "GRANT ALL ON ALL TABLES IN SCHEMA public TO ROLE_HERE;";
        run(&database, &(limits.collect::<String>() + granted)).await;
        let store = open(&url, None).await.unwrap();
        let stop = CancellationToken::new();
        let holding = tokio::task::LocalSet::new();
        let place = store.lock_exclusive().await.unwrap();
        let stopping = stop.clone();
        holding
            .run_until(async {
                let held = tokio::task::spawn_local(place.hold(stopping));
                let client = database.client().await;
                let holder = "SELECT l.pid, extract(epoch FROM clock_timestamp() - a.xact_start)::float8
                              FROM pg_locks l JOIN pg_stat_activity a USING (pid)
                              WHERE l.locktype = 'advisory' AND l.granted AND a.datname = current_database()";
                let mut first = None;
                eventually!({
                    let row = client.query_opt(holder, &[]).await.unwrap();
                    let row = row.expect("the lock is held");
                    let (process, age): (i32, f64) = (row.get(0), row.get(1));
                    assert_eq!(*first.get_or_insert(process), process, "the lock was lost on {release:?}");
                    age > 4.0
                });
                assert!(store.ping().await.is_ok());
                stop.cancel();
                assert!(held.await.unwrap());
            })
            .await;
    }
}

#[tokio::test]
async fn time_limits_of_the_role_do_not_end_the_reading_of_the_old_system() {
    let database = Database::migrated_on(Release::Eighteen).await;
    let url = role(&database).await;
    run(
        &database,
        "CREATE TABLE auth_user (id int, username text, email text, password text, is_active bool, date_joined timestamptz);
         CREATE TABLE prompts_prompt (id int, user_id int, prompt text, response text, created_at timestamptz);
         INSERT INTO auth_user VALUES (1, 'alice', '', '!', true, now());
         GRANT SELECT ON auth_user, prompts_prompt TO ROLE_HERE;
         ALTER ROLE ROLE_HERE SET transaction_timeout = '700ms';
         ALTER ROLE ROLE_HERE SET idle_in_transaction_session_timeout = '700ms'",
    )
    .await;
    let mut old = DjangoDatabase::open(&Secret::new(url), "unknown".to_owned())
        .await
        .unwrap();
    let client = database.client().await;
    let age = "SELECT coalesce(max(extract(epoch FROM clock_timestamp() - xact_start)), 9)::float8
               FROM pg_stat_activity WHERE usename = current_database()::text";
    eventually!(client.query_one(age, &[]).await.unwrap().get::<_, f64>(0) > 2.0);
    assert_eq!(old.read(5).await.unwrap().len(), 1);
}
