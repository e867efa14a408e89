//! Migrates the database to the schema this program knows, after checking that its server can do
//! what is needed.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Transaction};

use super::OpenError;
use super::requirements::examine;
use super::session::NO_TIMEOUTS;

/// Each migration leads from the version before it to its own position in the list, counted from 1.
/// Never edited once released.
const MIGRATIONS: [&str; 6] = [
    include_str!("../../../migrations/postgres/0001_initial.sql"),
    include_str!("../../../migrations/postgres/0002_running_calls.sql"),
    include_str!("../../../migrations/postgres/0003_purge_horizon.sql"),
    include_str!("../../../migrations/postgres/0004_api_keys.sql"),
    include_str!("../../../migrations/postgres/0005_chat_calls.sql"),
    include_str!("../../../migrations/postgres/0006_usage.sql"),
];

/// All tables that the migrations create. A database that has one of them without the first belongs
/// to another program.
pub(super) const TABLES: [&str; 16] = [
    "chat_call",
    "prompt_service_schema",
    "account",
    "session",
    "revoked_token",
    "prompt",
    "embedding_model",
    "prompt_embedding",
    "running_call",
    "idempotency_key",
    "upstream_day",
    "api_key",
    "usage",
    "usage_day",
    "spend",
    "user_budget",
];

/// The schema this program works with.
pub(super) const SCHEMA_VERSION: i32 = MIGRATIONS.len() as i32;

/// The oldest schema whose programs can use a database of [`SCHEMA_VERSION`]. A migration that
/// removes or changes what earlier programs rely on raises it to its own number. A migration that
/// only adds leaves it, so that those programs run beside newer ones and an operator can go back to
/// them. No program of schema 1 was ever released.
const OLDEST_USABLE: i32 = 2;

/// The oldest server, as `server_version_num` counts.
pub(super) const OLDEST_SERVER: i32 = 140_000;

/// Held by the server that migrates: servers that start together migrate one after another.
/// "PrmSmigr".
const MIGRATION_LOCK: i64 = 0x5072_6d53_6d69_6772;

/// How long a change of a table may wait for transactions that use it, and hold up those behind it:
/// less than a call's patience.
const TABLE_WAIT: &str = "1s";
/// The pause before the next attempt, in which other transactions go on.
const ATTEMPT_PAUSE: Duration = Duration::from_secs(2);
/// How long this is attempted.
const ATTEMPTS: Duration = Duration::from_secs(600);

/// The largest dimension of a vector in the covering index, whose entries may take 2,704 bytes at
/// most.
const MOST_COVERED: usize = 1_280;

/// A version of pgvector: major, minor.
pub(super) type VectorVersion = (u32, u32);

/// The first version with half-precision vectors.
const OLDEST_VECTOR: VectorVersion = (0, 7);

/// Checks the server, applies the missing migrations in one transaction, and sets the dimension of
/// vectors if `dimension` is given. Other servers may be doing the same, and others may be serving.
/// Returns the version of pgvector.
pub(super) async fn migrate(
    client: &mut Client,
    dimension: Option<usize>,
) -> Result<VectorVersion, OpenError> {
    examine(client, dimension).await?;
    let deadline = Instant::now() + ATTEMPTS;
    loop {
        match attempt(client, dimension).await {
            Err(OpenError::TablesInUse) if Instant::now() < deadline => {
                tracing::info!(
                    "the schema is to be changed and a long transaction uses its tables; trying again"
                );
                sleep(ATTEMPT_PAUSE).await;
            }
            ended => return ended,
        }
    }
}

async fn attempt(
    client: &mut Client,
    dimension: Option<usize>,
) -> Result<VectorVersion, OpenError> {
    let transaction = client.transaction().await?;
    // Another server may be changing a large table; waiting here holds up no other call.
    transaction
        .batch_execute(&format!("{NO_TIMEOUTS}; SET LOCAL lock_timeout = '10min'"))
        .await?;
    transaction
        .execute("SELECT pg_advisory_xact_lock($1)", &[&MIGRATION_LOCK])
        .await?;
    // From here on waiting does hold up others: behind a change of a table that waits for one long
    // reader, every later call waits too.
    transaction
        .batch_execute(&format!("SET LOCAL lock_timeout = '{TABLE_WAIT}'"))
        .await?;
    let vector = vector_extension(&transaction).await?;
    apply_missing(&transaction).await?;
    if let Some(dimension) = dimension {
        settle_dimension(&transaction, dimension).await?;
    }
    transaction.commit().await?;
    Ok(vector)
}

/// The version of pgvector, which is added to the database if it is missing and that is allowed.
async fn vector_extension(transaction: &Transaction<'_>) -> Result<VectorVersion, OpenError> {
    const INSTALLED: &str = "SELECT extversion FROM pg_extension WHERE extname = 'vector'";
    let mut installed = transaction.query_opt(INSTALLED, &[]).await?;
    if installed.is_none() {
        match transaction.batch_execute("CREATE EXTENSION vector").await {
            Ok(()) => {}
            Err(error) if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => {
                return Err(OpenError::VectorNotAllowed);
            }
            Err(error) => return Err(error.into()),
        }
        installed = transaction.query_opt(INSTALLED, &[]).await?;
    }
    let version: String = installed.ok_or(OpenError::NoVector)?.try_get(0)?;
    check_vector_version(&version)
}

/// The version of pgvector in a text such as `0.8.5`, if it is new enough.
pub(super) fn check_vector_version(text: &str) -> Result<VectorVersion, OpenError> {
    let mut numbers = text.split('.').map(|number| number.parse().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < OLDEST_VECTOR {
        return Err(OpenError::VectorTooOld);
    }
    Ok(version)
}

async fn apply_missing(transaction: &Transaction<'_>) -> Result<(), OpenError> {
    let is_ours: bool = transaction
        .query_one(
            "SELECT to_regclass('prompt_service_schema') IS NOT NULL",
            &[],
        )
        .await?
        .try_get(0)?;
    if !is_ours {
        transaction
            .batch_execute(
                "CREATE TABLE prompt_service_schema (version integer NOT NULL, oldest_usable integer NOT NULL);
                 INSERT INTO prompt_service_schema VALUES (0, 0)",
            )
            .await?;
    }
    let row = transaction.query_one(VERSION, &[]).await?;
    let (found, oldest_usable) = (row.try_get(0)?, row.try_get(1)?);
    check_version(found, oldest_usable)?;
    let applied = usize::try_from(found).map_err(|_| OpenError::Foreign)?;
    for migration in MIGRATIONS.iter().skip(applied) {
        transaction.batch_execute(migration).await?;
    }
    if found < SCHEMA_VERSION {
        transaction
            .execute(
                "UPDATE prompt_service_schema SET version = $1, oldest_usable = $2",
                &[&SCHEMA_VERSION, &OLDEST_USABLE],
            )
            .await?;
    }
    Ok(())
}

/// The schema of a database, and the oldest schema whose programs may use it.
pub(super) const VERSION: &str = "SELECT version, oldest_usable FROM prompt_service_schema";

/// Checks whether this program may use a database with these versions.
pub(super) fn check_version(found: i32, oldest_usable: i32) -> Result<(), OpenError> {
    if oldest_usable > SCHEMA_VERSION {
        return Err(OpenError::Newer {
            found,
            known: SCHEMA_VERSION,
        });
    }
    Ok(())
}

/// Whether a column of vectors with that type modifier has the given dimension; `false` if the
/// column can be changed to it.
pub(super) fn check_dimension(dimension: usize, modifier: i32) -> Result<bool, OpenError> {
    let wanted = i32::try_from(dimension).map_err(|_| OpenError::TooLong)?;
    match modifier {
        // A column of vectors of any dimension.
        -1 => Ok(false),
        found if found == wanted => Ok(true),
        found => Err(OpenError::Dimension { found, wanted }),
    }
}

/// Sets the dimension of the table's vectors to the model's, or fails if they have another.
async fn settle_dimension(
    transaction: &Transaction<'_>,
    dimension: usize,
) -> Result<(), OpenError> {
    let found: i32 = transaction
        .query_one(
            "SELECT atttypmod FROM pg_attribute
             WHERE attrelid = 'prompt_embedding'::regclass AND attname = 'embedding'",
            &[],
        )
        .await?
        .try_get(0)?;
    if check_dimension(dimension, found)? {
        return Ok(());
    }
    // Longer vectors do not fit the index, nor, from 4,000 numbers on, a page of the table.
    let (covered, storage) = if dimension > MOST_COVERED {
        ("", "EXTERNAL")
    } else {
        ("INCLUDE (embedding)", "PLAIN")
    };
    transaction
        .batch_execute(&format!(
            "DROP INDEX prompt_embedding_by_owner;
             ALTER TABLE prompt_embedding ALTER COLUMN embedding SET STORAGE {storage},
                 ALTER COLUMN embedding TYPE halfvec({dimension});
             CREATE INDEX prompt_embedding_by_owner ON prompt_embedding (model_id, user_id, prompt_id) {covered}"
        ))
        .await?;
    Ok(())
}
