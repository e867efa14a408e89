//! A look at a database that changes nothing.

use tokio::time::timeout;

use super::error::Cause;
use super::migrate::SCHEMA_VERSION;
use super::open_error::at_connection;
use super::pool::{CONNECT, Connector};
use super::requirements::{Usable, examine};
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

/// Looks at the database behind the URL, also beside servers that use it, for vectors of `dimension`
/// numbers if that is given.
///
/// # Errors
/// Those that opening would meet, as far as reading tells.
pub async fn inspect(url: &str, dimension: Option<usize>) -> Result<DatabaseState, OpenError> {
    timeout(CONNECT, look(url, dimension))
        .await
        .map_err(|_| OpenError::Unreachable(Box::new(Cause::TimedOut)))?
}

async fn look(url: &str, dimension: Option<usize>) -> Result<DatabaseState, OpenError> {
    let (config, tls) = driver(url)?;
    let (client, _task) = Connector::new(config, tls)
        .connect()
        .await
        .map_err(at_connection)?;
    let Usable {
        schema,
        max_connections,
        is_encrypted,
    } = examine(&client, dimension).await?;
    let mut state = DatabaseState {
        is_encrypted,
        max_connections,
        schema,
        known: SCHEMA_VERSION,
        users: 0,
        prompts: 0,
    };
    if schema > 0 {
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
