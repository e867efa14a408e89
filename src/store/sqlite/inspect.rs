//! A look at a database file that changes nothing: neither the file, nor its schema, nor its folder.

use std::path::{Path, PathBuf};

use rusqlite::Connection;
use rustix::fs::{Access, access};

use super::connection::Database;
use super::migrate::{SCHEMA_VERSION, account_table, schema_version};
use super::{OpenError, OpenOptions};

/// What stands where a database is expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileState {
    /// Nothing, or an empty file: opening makes a database.
    Absent,
    /// A database of ours.
    Present {
        /// The version of its schema.
        schema: i32,
        /// The version that opening brings it to.
        known: i32,
    },
}

/// Looks at the file, also beside a server that uses it. Blocks.
///
/// # Errors
/// Those that opening would meet, as far as reading and the file's modes show.
pub fn inspect(path: &Path) -> Result<FileState, OpenError> {
    let path = std::path::absolute(path)?;
    let found = match std::fs::metadata(&path) {
        Ok(found) => Some(found),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(error.into()),
    };
    // SQLite makes its log beside the file.
    let folder = path.parent().unwrap_or(Path::new("/"));
    access(folder, Access::WRITE_OK | Access::EXEC_OK).map_err(std::io::Error::from)?;
    match found {
        None => return Ok(FileState::Absent),
        Some(_) => access(&path, Access::WRITE_OK).map_err(std::io::Error::from)?,
    }
    if found.is_some_and(|found| found.is_file() && found.len() == 0) {
        return Ok(FileState::Absent);
    }
    match schema_version(&onlooker(path)?)? {
        0 => Ok(FileState::Absent),
        schema => Ok(FileState::Present {
            schema,
            known: SCHEMA_VERSION,
        }),
    }
}

/// How many accounts and prompts a database of ours holds. Blocks, for longer the more there are.
///
/// # Errors
/// As for [`inspect`].
pub fn count_rows(path: &Path) -> Result<(u64, u64), OpenError> {
    let connection = onlooker(std::path::absolute(path)?)?;
    let accounts = account_table(schema_version(&connection)?);
    let count = |table: &str| {
        let sql = format!("SELECT count(*) FROM {table}");
        connection.query_row(&sql, [], |row| row.get::<_, i64>(0))
    };
    let whole = |count: i64| u64::try_from(count).unwrap_or(0);
    Ok((whole(count(accounts)?), whole(count("prompt")?)))
}

fn onlooker(path: PathBuf) -> rusqlite::Result<Connection> {
    let database = Database {
        path,
        busy_timeout: OpenOptions::default().busy_timeout,
        max_pages: None,
    };
    database.onlooker()
}
