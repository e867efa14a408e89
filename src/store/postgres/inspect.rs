//! Inspects a database and changes nothing.

use super::open_error::within;
use super::pool::{CONNECT, LONG_PATIENCE};
use super::requirements::{DatabaseState, examine};
use super::{OpenError, connect};

/// Inspects the database at the URL, also beside servers that use it, for vectors of `dimension`
/// numbers if that is given.
///
/// # Errors
/// The errors of opening, as far as reading shows them.
pub async fn inspect(url: &str, dimension: Option<usize>) -> Result<DatabaseState, OpenError> {
    let inspected = async {
        let (_, client) = connect(url).await?;
        examine(&client, dimension).await
    };
    within(CONNECT, inspected).await
}

/// Counts the accounts of a database of this service, and estimates its prompts: counting millions
/// would take long, and the server has an estimate.
///
/// # Errors
/// As for [`inspect`].
pub async fn count_rows(url: &str) -> Result<(i64, i64), OpenError> {
    let count = async {
        let (_, client) = connect(url).await?;
        let row = client
            .query_one(
                "SELECT (SELECT count(*) FROM account),
                        (SELECT greatest(reltuples, 0)::bigint FROM pg_class WHERE oid = 'prompt'::regclass)",
                &[],
            )
            .await?;
        Ok((row.try_get(0)?, row.try_get(1)?))
    };
    within(LONG_PATIENCE, count).await
}
