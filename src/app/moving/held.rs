//! The configured store, kept from servers for as long as a command works on it.

use anyhow::bail;
use tokio_util::sync::CancellationToken;

use super::super::store::{Store, lock_files};
use crate::config::Config;
use crate::data_dir;
use crate::store::postgres::Place;

/// An open store whose files, if it has any, no server can take.
pub struct Held {
    pub store: Store,
    _locks: Vec<data_dir::Lock>,
}

impl Held {
    /// Opens the store for vectors of `dimension` numbers. On PostgreSQL it comes with what keeps servers out, for [`alone`].
    ///
    /// # Errors
    /// One line that says who has the store, or names the setting at fault.
    pub async fn open(config: &Config, dimension: usize) -> anyhow::Result<(Self, Option<Place>)> {
        let locks = lock_files(&config.store)?;
        let store = Store::open(&config.store, Some(dimension)).await?;
        let place = store.take_place(false).await?;
        Ok((
            Self {
                store,
                _locks: locks,
            },
            place,
        ))
    }
}

/// Does the work for as long as no server takes the database.
///
/// # Errors
/// The work's own, or that a server has taken the database.
pub async fn alone<T>(
    place: Option<Place>,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    let Some(place) = place else {
        return work.await;
    };
    tokio::select! {
        biased;
        done = work => done,
        _ = place.hold(CancellationToken::new()) => {
            bail!("a server has taken the database meanwhile: stop it, and run the command again")
        }
    }
}
