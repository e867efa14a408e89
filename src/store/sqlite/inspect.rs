//! Inspects a database file and changes nothing: neither the file, nor its schema, nor its folder.

use std::path::Path;

use rusqlite::Connection;
use rustix::fs::{Access, access};

use super::connection::Database;
use super::migrate::{SCHEMA_VERSION, account_table, schema_version};
use super::{OpenError, OpenOptions};

/// The state of the path of a database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileState {
    /// Nothing, or an empty file: opening makes a database.
    Absent,
    /// A database of this service.
    Present {
        /// The version of its schema.
        schema: i32,
        /// The version that opening brings it to.
        known: i32,
    },
}

/// Inspects the file, also beside a server that uses it. Blocks.
///
/// # Errors
/// The errors of opening, as far as reading and the modes show them.
pub fn inspect(path: &Path) -> Result<FileState, OpenError> {
    let database = Database::at(path, OpenOptions::default())?;
    let path = &database.path;
    let found = match std::fs::metadata(path) {
        Ok(found) => Some(found),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(error.into()),
    };
    // SQLite makes its log beside the file.
    let folder = path.parent().unwrap_or(Path::new("/"));
    access(folder, Access::WRITE_OK | Access::EXEC_OK).map_err(std::io::Error::from)?;
    match found {
        None => return Ok(FileState::Absent),
        Some(_) => access(path, Access::WRITE_OK).map_err(std::io::Error::from)?,
    }
    if found.is_some_and(|found| found.is_file() && found.len() == 0) {
        return Ok(FileState::Absent);
    }
    match schema_version(&database.traceless_reader()?)? {
        0 => Ok(FileState::Absent),
        schema => Ok(FileState::Present {
            schema,
            known: SCHEMA_VERSION,
        }),
    }
}

/// Counts the accounts and prompts of a database of this service. Blocks, for longer the more there
/// are.
///
/// # Errors
/// As for [`inspect`].
pub fn count_rows(path: &Path) -> Result<(u64, u64), OpenError> {
    let database = Database::at(path, OpenOptions::default())?;
    count(&database.traceless_reader()?)
}

/// The accounts and prompts that a connection sees.
pub(super) fn count(connection: &Connection) -> Result<(u64, u64), OpenError> {
    let accounts = account_table(schema_version(connection)?);
    let counts: (i64, i64) = connection.query_row(
        &format!("SELECT (SELECT count(*) FROM {accounts}), (SELECT count(*) FROM prompt)"),
        [],
        |row| Ok((row.get(0)?, row.get(1)?)),
    )?;
    let whole = |count| u64::try_from(count).unwrap_or(0);
    Ok((whole(counts.0), whole(counts.1)))
}
