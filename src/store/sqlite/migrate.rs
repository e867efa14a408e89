//! Checks that the file belongs to this program, and migrates it to the present schema.

use std::time::{Duration, Instant};

use rusqlite::{Connection, ErrorCode, TransactionBehavior};

use super::OpenError;
use super::connection::PAGE_SIZE;

/// Marks our files, in SQLite's field for that: "PrmS".
pub(super) const APPLICATION_ID: i32 = 0x5072_6d53;

/// Each migration leads from the version before it to its own position in the list, counted from 1.
/// Never edited once released.
const MIGRATIONS: [&str; 7] = [
    include_str!("../../../migrations/sqlite/0001_initial.sql"),
    include_str!("../../../migrations/sqlite/0002_running_calls.sql"),
    include_str!("../../../migrations/sqlite/0003_purge_horizon.sql"),
    include_str!("../../../migrations/sqlite/0004_names_as_in_postgres.sql"),
    include_str!("../../../migrations/sqlite/0005_api_keys.sql"),
    include_str!("../../../migrations/sqlite/0006_chat_calls.sql"),
    include_str!("../../../migrations/sqlite/0007_usage.sql"),
];

/// The schema this program works with.
pub(super) const SCHEMA_VERSION: i32 = MIGRATIONS.len() as i32;

/// The table of accounts in a file of that version.
pub(super) fn account_table(version: i32) -> &'static str {
    if version < 4 { "user" } else { "account" }
}

/// Checks that the file is ours (or empty), switches it to write-ahead logging and applies the
/// missing migrations, each in one transaction. Other processes may be doing the same.
pub(super) fn migrate(connection: &mut Connection, timeout: Duration) -> Result<(), OpenError> {
    // Nothing may be written to the file before it is known to be ours: even switching the log
    // would change it.
    schema_version(connection)?;
    // Takes effect only while the file is empty.
    connection.pragma_update(None, "page_size", PAGE_SIZE)?;
    use_write_ahead_log(connection, timeout)?;
    // A migration may rebuild a table that others refer to, which enforcement would forbid.
    // References are checked at the end of each migration.
    connection.pragma_update(None, "foreign_keys", false)?;
    while apply_next(connection)? {}
    connection.pragma_update(None, "foreign_keys", true)?;
    Ok(())
}

/// Applies one migration; `false` if none was missing.
fn apply_next(connection: &mut Connection) -> Result<bool, OpenError> {
    if schema_version(connection)? == SCHEMA_VERSION {
        return Ok(false);
    }
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    // Read again under the lock: another process may have been first.
    let version = schema_version(&transaction)?;
    let missing = usize::try_from(version)
        .ok()
        .and_then(|index| MIGRATIONS.get(index));
    let Some(migration) = missing else {
        return Ok(false);
    };
    transaction.execute_batch(migration)?;
    if transaction
        .prepare("PRAGMA foreign_key_check")?
        .exists([])?
    {
        return Err(OpenError::BrokenReferences);
    }
    transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
    transaction.pragma_update(None, "user_version", version + 1)?;
    transaction.commit()?;
    Ok(true)
}

/// The version of our file, 0 for an empty one.
pub(super) fn schema_version(connection: &Connection) -> Result<i32, OpenError> {
    // One statement, so that it sees one state of a file that another process may just be making.
    let (application_id, version, objects) = connection.query_row(
        "SELECT application_id, user_version, (SELECT count(*) FROM sqlite_schema)
         FROM pragma_application_id, pragma_user_version",
        [],
        |row| {
            Ok((
                row.get::<_, i32>(0)?,
                row.get::<_, i32>(1)?,
                row.get::<_, i64>(2)?,
            ))
        },
    )?;
    match (application_id, version, objects) {
        (0, 0, 0) => Ok(0),
        (APPLICATION_ID, 1..=SCHEMA_VERSION, _) => Ok(version),
        (APPLICATION_ID, _, _) if version > SCHEMA_VERSION => Err(OpenError::Newer {
            found: version,
            known: SCHEMA_VERSION,
        }),
        _ => Err(OpenError::Foreign),
    }
}

/// Write-ahead logging is a property of the file. Switching to it needs the file alone for a
/// moment. If two processes try at the same time, SQLite reports "busy" at once, without waiting.
fn use_write_ahead_log(connection: &Connection, timeout: Duration) -> Result<(), OpenError> {
    let began = Instant::now();
    loop {
        let switched = connection
            .pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get::<_, String>(0));
        match switched {
            Ok(mode) if mode == "wal" => return Ok(()),
            // The file system cannot share memory between processes, as network file systems
            // cannot.
            Ok(_) => return Err(OpenError::NoSharedMemory),
            Err(error)
                if error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy)
                    && began.elapsed() < timeout =>
            {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => return Err(error.into()),
        }
    }
}
