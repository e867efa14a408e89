//! A look at a database that changes nothing.

use tokio::time::timeout;

use super::error::Cause;
use super::migrate::{SCHEMA_VERSION, VERSION, check_version};
use super::pool::{CONNECT, Connector};
use super::{OpenError, driver};

/// What a database holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DatabaseState {
    /// Whether the connection is encrypted.
    pub is_encrypted: bool,
    /// The connections that the server takes in all.
    pub max_connections: i32,
    /// The version of the schema; 0 where the first start makes it.
    pub schema: i32,
    /// The version that opening brings it to.
    pub known: i32,
    /// Accounts in it.
    pub users: i64,
    /// Prompts in it.
    pub prompts: i64,
}

/// Looks at the database behind the URL, also beside servers that use it.
///
/// # Errors
/// Those that opening would meet, as far as reading tells.
pub async fn inspect(url: &str) -> Result<DatabaseState, OpenError> {
    timeout(CONNECT, look(url))
        .await
        .map_err(|_| OpenError::Unreachable(Box::new(Cause::TimedOut)))?
}

async fn look(url: &str) -> Result<DatabaseState, OpenError> {
    let (config, tls) = driver(url)?;
    let (client, _task) = Connector::new(config, tls).connect().await?;
    let row = client
        .query_one(
            "SELECT current_setting('server_version_num')::int, current_setting('max_connections')::int,
                    to_regclass('prompt_service_schema') IS NOT NULL, to_regclass('account') IS NOT NULL,
                    EXISTS (SELECT FROM pg_available_extensions WHERE name = 'vector'),
                    coalesce((SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()), false)",
            &[],
        )
        .await?;
    let version: i32 = row.try_get(0)?;
    if version < super::migrate::OLDEST_SERVER {
        return Err(OpenError::ServerTooOld(version / 10_000));
    }
    let (is_ours, has_account, has_vector): (bool, bool, bool) =
        (row.try_get(2)?, row.try_get(3)?, row.try_get(4)?);
    if has_account && !is_ours {
        return Err(OpenError::Foreign);
    }
    if !has_vector {
        return Err(OpenError::NoVector);
    }
    let mut state = DatabaseState {
        is_encrypted: row.try_get(5)?,
        max_connections: row.try_get(1)?,
        schema: 0,
        known: SCHEMA_VERSION,
        users: 0,
        prompts: 0,
    };
    if is_ours {
        let row = client.query_one(VERSION, &[]).await?;
        state.schema = row.try_get(0)?;
        check_version(state.schema, row.try_get(1)?)?;
    }
    if state.schema > 0 {
        // Counting millions of prompts would take long: what the server estimates will do.
        let row = client
            .query_one(
                "SELECT (SELECT count(*) FROM account),
                        (SELECT greatest(reltuples, 0)::bigint FROM pg_class WHERE oid = 'prompt'::regclass)",
                &[],
            )
            .await?;
        (state.users, state.prompts) = (row.try_get(0)?, row.try_get(1)?);
    }
    Ok(state)
}
