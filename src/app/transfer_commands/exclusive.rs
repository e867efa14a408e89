//! The configured store, kept from servers for as long as a command works on it.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, bail};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use super::super::store::{Store, lock_files};
use crate::config::StoreConfig;
use crate::data_dir;
use crate::store::postgres::ServerLock;

/// An open store whose files, if it has any, no server can open.
pub struct ExclusiveStore {
    pub store: Store,
    /// Keeps servers out of a PostgreSQL database, for [`unless_taken`].
    pub lock: Option<ServerLock>,
    _locks: Vec<data_dir::FileLock>,
    // Last, because the other fields have files open in it.
    _folder: Option<TempDir>,
}

impl ExclusiveStore {
    /// Opens the store for vectors of `dimension` numbers.
    ///
    /// # Errors
    /// One line that says who has the store, or names the setting at fault.
    pub async fn open(config: &StoreConfig, dimension: usize) -> anyhow::Result<Self> {
        let locks = lock_files(config)?;
        let store = Store::open(config, Some(dimension)).await?;
        Ok(Self {
            lock: store.lock_server(false).await?,
            store,
            _locks: locks,
            _folder: None,
        })
    }

    /// Opens an empty store in a temporary folder, which is removed with it. A dry run works on it
    /// where there is no store yet.
    ///
    /// # Errors
    /// One line that says why there is no such folder.
    pub async fn open_temporary(dimension: usize) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("prompt-service-")
            .permissions(Permissions::from_mode(0o700))
            .tempdir()
            .context("no temporary folder can be made")?;
        let data_dir = folder.path().to_owned();
        let path = data_dir.join("dry-run.sqlite3");
        let mut store = Self::open(&StoreConfig::Sqlite { data_dir, path }, dimension).await?;
        store._folder = Some(folder);
        Ok(store)
    }
}

/// Does the work for as long as no server takes the database.
///
/// # Errors
/// The work's own, or that a server has taken the database.
pub async fn unless_taken<T>(
    lock: Option<ServerLock>,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    let Some(lock) = lock else {
        return work.await;
    };
    tokio::select! {
        biased;
        done = work => done,
        _ = lock.hold(CancellationToken::new()) => {
            bail!("a server has taken the database meanwhile: stop it, and run the command again")
        }
    }
}
