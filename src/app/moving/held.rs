//! The configured store, kept from servers for as long as a command works on it.

use std::path::PathBuf;

use anyhow::{Context, bail};
use tokio_util::sync::CancellationToken;

use super::super::store::{Store, lock_files};
use crate::config::StoreConfig;
use crate::data_dir::{self, DataDir};
use crate::store::postgres::ServerLock;

/// An open store whose files, if it has any, no server can take.
pub struct Held {
    pub store: Store,
    _locks: Vec<data_dir::FileLock>,
    // After the others, which have files open in it.
    _folder: Option<TemporaryFolder>,
}

impl Held {
    /// Opens the store for vectors of `dimension` numbers. On PostgreSQL it comes with what keeps
    /// servers out, for [`alone`].
    ///
    /// # Errors
    /// One line that says who has the store, or names the setting at fault.
    pub async fn open(
        config: &StoreConfig,
        dimension: usize,
    ) -> anyhow::Result<(Self, Option<ServerLock>)> {
        let locks = lock_files(config)?;
        let store = Store::open(config, Some(dimension)).await?;
        let place = store.lock_server(false).await?;
        Ok((
            Self {
                store,
                _locks: locks,
                _folder: None,
            },
            place,
        ))
    }

    /// Opens an empty store in a temporary folder, which goes with it: what a dry run works on
    /// where there is no store yet.
    ///
    /// # Errors
    /// One line that says why there is no such folder.
    pub async fn open_temporary(dimension: usize) -> anyhow::Result<Self> {
        let folder = TemporaryFolder::new().context("no temporary folder can be made")?;
        let data_dir = folder.0.clone();
        let path = data_dir.join("dry-run.sqlite3");
        let (held, _) = Self::open(&StoreConfig::Sqlite { data_dir, path }, dimension).await?;
        Ok(Self {
            _folder: Some(folder),
            ..held
        })
    }
}

/// A folder that is removed with what is in it when this is dropped.
struct TemporaryFolder(PathBuf);

impl TemporaryFolder {
    fn new() -> anyhow::Result<Self> {
        let path = std::env::temp_dir().join(format!("prompt-service-{:016x}", getrandom::u64()?));
        DataDir::open(&path)?;
        Ok(Self(path))
    }
}

impl Drop for TemporaryFolder {
    fn drop(&mut self) {
        // One that cannot be removed is only clutter.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Does the work for as long as no server takes the database.
///
/// # Errors
/// The work's own, or that a server has taken the database.
pub async fn alone<T>(
    place: Option<ServerLock>,
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
