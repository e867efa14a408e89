//! Connecting to the old system's database.

use std::time::Duration;

use tokio::time::timeout;
use tokio_postgres::Client;
use tokio_util::task::TaskTracker;

use super::Error;
use crate::config::Secret;
use crate::store::postgres::{UrlFault, driver};

/// How long the server may take. An operator waits for the command, and the server may be distant
/// or busy.
const PATIENCE: Duration = Duration::from_secs(10);

/// Connects, encrypted as the address asks. The connection is served by a task that ends with the
/// client.
pub(super) async fn connect(url: &Secret) -> Result<Client, Error> {
    let (config, tls) = driver(url.expose()).map_err(|fault| match fault {
        UrlFault::Url(source) => Error::Address(source),
        UrlFault::Tls(source) => Error::Tls(source),
    })?;
    let connected = timeout(PATIENCE, config.connect(tls)).await;
    let connected = connected.map_err(|late| Error::Unreachable(late.into()))?;
    let (client, connection) = connected.map_err(|error| {
        if error.code().is_some() {
            error.into()
        } else {
            Error::Unreachable(error.into())
        }
    })?;
    TaskTracker::new().spawn(connection);
    Ok(client)
}
