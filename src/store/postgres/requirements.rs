//! What the server, the database and the role must provide. It is found out by reading alone, so
//! that `inspect` and a start check the same.

use tokio_postgres::{Client, Row};

use super::OpenError;
use super::migrate::{
    OLDEST_SERVER, SCHEMA_VERSION, TABLES, VERSION, check_dimension, check_vector_version,
    check_version,
};

/// One row: `$1` the names of this program's tables.
///
/// The rights of a table are checked where its name finds it, as every statement does.
const QUERY: &str = "
    WITH ours AS (
        SELECT pg_class.* FROM unnest($1::text[]) AS t (name) JOIN pg_class ON pg_class.oid = to_regclass(t.name)
    ), extension AS (
        SELECT extversion, nspname, has_schema_privilege(pg_namespace.oid, 'USAGE') AS may_use
        FROM pg_extension JOIN pg_namespace ON pg_namespace.oid = extnamespace WHERE extname = 'vector'
    ), available AS (
        SELECT a.default_version, v.trusted, v.superuser
        FROM pg_available_extensions a JOIN pg_available_extension_versions v
             ON v.name = a.name AND v.version = a.default_version
        WHERE a.name = 'vector'
    )
    SELECT pg_is_in_recovery() AS is_standby,
           current_setting('transaction_read_only') = 'on' AS is_read_only,
           getdatabaseencoding()::text AS encoding,
           quote_ident(current_schema()) AS schema,
           coalesce(has_schema_privilege(current_schema(), 'CREATE'), false) AS may_make_tables,
           (SELECT extversion FROM extension) AS vector_version,
           (SELECT quote_ident(nspname) FROM extension WHERE NOT may_use) AS vector_hidden_in,
           (SELECT default_version FROM available) AS vector_available,
           (SELECT NOT superuser OR (SELECT rolsuper FROM pg_roles WHERE rolname = current_user)
                   OR (trusted AND has_database_privilege(current_database(), 'CREATE'))
            FROM available) AS may_add_vector,
           to_regclass('prompt_service_schema') IS NOT NULL AS is_ours,
           EXISTS (SELECT FROM ours WHERE relname <> 'prompt_service_schema') AS has_tables,
           (SELECT min(relname::text) FROM ours
            WHERE NOT (has_table_privilege(oid, 'SELECT') AND has_table_privilege(oid, 'INSERT')
                       AND has_table_privilege(oid, 'UPDATE') AND has_table_privilege(oid, 'DELETE'))) AS forbidden,
           (SELECT bool_and(pg_has_role(relowner, 'USAGE')) FROM ours) AS is_owner,
           (SELECT atttypmod FROM pg_attribute
            WHERE attrelid = to_regclass('prompt_embedding') AND attname = 'embedding') AS dimension,
           current_setting('max_connections')::int AS max_connections,
           coalesce((SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()), false) AS is_encrypted";

/// A database that can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DatabaseState {
    /// Whether the connection is encrypted.
    pub is_encrypted: bool,
    /// The connections that the server takes in all.
    pub max_connections: i32,
    /// The version of the schema; 0 if the first start creates it.
    pub schema: i32,
    /// The version that opening migrates it to.
    pub known: i32,
}

/// Checks whether the database can be used, with vectors of `dimension` numbers if that is given.
///
/// # Errors
/// A missing requirement, with the fix.
pub(super) async fn examine(
    client: &Client,
    dimension: Option<usize>,
) -> Result<DatabaseState, OpenError> {
    // A separate query, because an old server does not know all functions of the next one.
    let sql = "SELECT current_setting('server_version_num')::int";
    let version: i32 = client.query_one(sql, &[]).await?.try_get(0)?;
    if version < OLDEST_SERVER {
        return Err(OpenError::ServerTooOld(version / 10_000));
    }
    let row = client.query_one(QUERY, &[&TABLES.as_slice()]).await?;
    check_server(&row)?;
    check_vector(&row)?;
    let schema = if row.try_get("is_ours")? {
        examine_tables(client, &row, dimension).await?
    } else if row.try_get("has_tables")? {
        return Err(OpenError::Foreign);
    } else {
        0
    };
    // The first start and migrations create tables.
    if schema < SCHEMA_VERSION && !row.try_get::<_, bool>("may_make_tables")? {
        return Err(match row.try_get("schema")? {
            Some(schema) => OpenError::NotAllowed { schema },
            None => OpenError::NoSchema,
        });
    }
    Ok(DatabaseState {
        is_encrypted: row.try_get("is_encrypted")?,
        max_connections: row.try_get("max_connections")?,
        schema,
        known: SCHEMA_VERSION,
    })
}

fn check_server(row: &Row) -> Result<(), OpenError> {
    if row.try_get("is_standby")? {
        return Err(OpenError::Standby);
    }
    if row.try_get("is_read_only")? {
        return Err(OpenError::ReadOnly);
    }
    let encoding: String = row.try_get("encoding")?;
    if encoding != "UTF8" {
        return Err(OpenError::Encoding(encoding));
    }
    Ok(())
}

fn check_vector(row: &Row) -> Result<(), OpenError> {
    let installed: Option<&str> = row.try_get("vector_version")?;
    let available: Option<&str> = row.try_get("vector_available")?;
    let version = installed.or(available).ok_or(OpenError::NoVector)?;
    check_vector_version(version)?;
    if let Some(schema) = row.try_get("vector_hidden_in")? {
        return Err(OpenError::VectorHidden { schema });
    }
    let may_add: Option<bool> = row.try_get("may_add_vector")?;
    if installed.is_none() && may_add != Some(true) {
        return Err(OpenError::VectorNotAllowed);
    }
    Ok(())
}

/// Checks the existing tables; returns the version of their schema.
async fn examine_tables(
    client: &Client,
    row: &Row,
    dimension: Option<usize>,
) -> Result<i32, OpenError> {
    if let Some(table) = row.try_get("forbidden")? {
        return Err(OpenError::NoTableRights { table });
    }
    let found = client.query_one(VERSION, &[]).await?;
    let schema: i32 = found.try_get(0)?;
    check_version(schema, found.try_get(1)?)?;
    let (given, found) = (dimension, row.try_get::<_, Option<i32>>("dimension")?);
    let is_settled = match (given, found) {
        (Some(given), Some(found)) => check_dimension(given, found)?,
        (None, _) | (_, None) => true,
    };
    let is_owner: Option<bool> = row.try_get("is_owner")?;
    if (schema < SCHEMA_VERSION || !is_settled) && is_owner != Some(true) {
        return Err(OpenError::NotOwner);
    }
    Ok(schema)
}
