//! Runs statements, each of which is prepared once for a connection.

use rusqlite::types::FromSql;
use rusqlite::{Connection, Params, Row};

use crate::store::Error;
use crate::store::rows::{Column, StoredRow};

impl<T: FromSql> Column<T> for Row<'_> {
    fn read(&self, column: &str) -> Result<T, Error> {
        Ok(self.get(column)?)
    }
}

impl StoredRow for Row<'_> {}

/// Runs a statement that returns no rows. Returns how many rows it has changed.
pub(super) fn execute(
    connection: &Connection,
    sql: &str,
    arguments: impl Params,
) -> Result<usize, Error> {
    Ok(connection.prepare_cached(sql)?.execute(arguments)?)
}

/// The rows of a statement.
pub(super) fn all<T>(
    connection: &Connection,
    sql: &str,
    arguments: impl Params,
    read: impl Fn(&dyn StoredRow) -> Result<T, Error>,
) -> Result<Vec<T>, Error> {
    let mut statement = connection.prepare_cached(sql)?;
    statement
        .query_and_then(arguments, |row| read(row))?
        .collect()
}

/// The row of a statement that returns at most one. The statement is stepped to its end, because
/// only then one that changes rows is complete.
pub(super) fn one<T>(
    connection: &Connection,
    sql: &str,
    arguments: impl Params,
    read: impl Fn(&dyn StoredRow) -> Result<T, Error>,
) -> Result<Option<T>, Error> {
    Ok(all(connection, sql, arguments, read)?.pop())
}
