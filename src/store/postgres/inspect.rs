//! A look at a database that changes nothing.

use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::Client;

use super::error::Cause;
use super::open_error::at_connection;
use super::pool::{CONNECT, Connector, LONG_PATIENCE};
use super::requirements::{DatabaseState, examine};
use super::{OpenError, driver};

/// Looks at the database behind the URL, also beside servers that use it, for vectors of
/// `dimension` numbers if that is given.
///
/// # Errors
/// Those that opening would meet, as far as reading tells.
pub async fn inspect(url: &str, dimension: Option<usize>) -> Result<DatabaseState, OpenError> {
    let look = async {
        let (client, _task) = connect(url).await?;
        examine(&client, dimension).await
    };
    timeout(CONNECT, look).await.map_err(|_| late())?
}

/// How many accounts a database of ours holds, and about how many prompts: to count millions would
/// take long, and the server has an estimate.
///
/// # Errors
/// As for [`inspect`].
pub async fn count_rows(url: &str) -> Result<(i64, i64), OpenError> {
    let count = async {
        let (client, _task) = connect(url).await?;
        let row = client
            .query_one(
                "SELECT (SELECT count(*) FROM account),
                        (SELECT greatest(reltuples, 0)::bigint FROM pg_class WHERE oid = 'prompt'::regclass)",
                &[],
            )
            .await?;
        Ok((row.try_get(0)?, row.try_get(1)?))
    };
    timeout(LONG_PATIENCE, count).await.map_err(|_| late())?
}

async fn connect(url: &str) -> Result<(Client, JoinHandle<()>), OpenError> {
    let (config, tls) = driver(url)?;
    let connector = Connector::new(config, tls);
    connector.connect().await.map_err(at_connection)
}

fn late() -> OpenError {
    OpenError::Unreachable(Box::new(Cause::TimedOut))
}
