//! Opens the configured store, with what each kind needs besides: a lock, an index, vectors to
//! load.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};

use crate::api::Lifecycle;
use crate::config::{SearchConfig, StoreConfig};
use crate::data_dir::{self, DataDir};
use crate::embed::Engine;
use crate::search::{PostgresSimilarity, Similarity, SlabIndex, SlabOptions};
use crate::store::postgres::{self, PostgresStore, ServerLock};
use crate::store::sqlite::{self, FileState, SqliteStore};
use crate::store::{
    AccountStore, ApiKeyStore, BulkStore, CallStore, ChatStore, PromptStore, UsageStore,
};

/// How long a search in shared scope waits for the vectors to be loaded after a start.
const LOAD_WAIT: Duration = Duration::from_secs(5);

/// An open store.
pub(super) struct Store {
    /// Accounts and sessions.
    pub accounts: Arc<dyn AccountStore>,
    /// API keys.
    pub api_keys: Arc<dyn ApiKeyStore>,
    /// Prompts and vectors.
    pub prompts: Arc<dyn PromptStore>,
    /// Running calls and idempotency keys.
    pub calls: Arc<dyn CallStore>,
    /// What is kept of chat calls.
    pub chats: Arc<dyn ChatStore>,
    /// Usage and budgets.
    pub usage: Arc<dyn UsageStore>,
    /// Whole rows, for the operator's commands.
    pub bulk: Arc<dyn BulkStore>,
    kind: StoreKind,
}

enum StoreKind {
    Sqlite(Arc<SqliteStore>),
    Postgres(Arc<PostgresStore>),
}

impl Store {
    /// Opens the configured store. `dimension`: of the model in use, if one is.
    ///
    /// # Errors
    /// One line that names the setting at fault and the repair.
    pub async fn open(config: &StoreConfig, dimension: Option<usize>) -> anyhow::Result<Self> {
        Ok(match config {
            StoreConfig::Sqlite { path, .. } => {
                let store = SqliteStore::open(path, sqlite::OpenOptions::default())
                    .with_context(|| format!("DATABASE_URL: {}", path.display()))?;
                let store = Arc::new(store);
                Self {
                    accounts: Arc::clone(&store) as _,
                    api_keys: Arc::clone(&store) as _,
                    prompts: Arc::clone(&store) as _,
                    calls: Arc::clone(&store) as _,
                    chats: Arc::clone(&store) as _,
                    usage: Arc::clone(&store) as _,
                    bulk: Arc::clone(&store) as _,
                    kind: StoreKind::Sqlite(store),
                }
            }
            StoreConfig::Postgres { url, pool_size, .. } => {
                let options = postgres::OpenOptions {
                    pool_size: *pool_size,
                    dimension,
                };
                let store = Arc::new(PostgresStore::open(url.expose(), options).await?);
                Self {
                    accounts: Arc::clone(&store) as _,
                    api_keys: Arc::clone(&store) as _,
                    prompts: Arc::clone(&store) as _,
                    calls: Arc::clone(&store) as _,
                    chats: Arc::clone(&store) as _,
                    usage: Arc::clone(&store) as _,
                    bulk: Arc::clone(&store) as _,
                    kind: StoreKind::Postgres(store),
                }
            }
        })
    }

    /// Locks a store that several servers could use: for this server alone, or, if they share a
    /// Redis, together with other replicas. Returns the lock.
    ///
    /// # Errors
    /// One line that names the server that has the lock.
    pub async fn lock_server(&self, shares_redis: bool) -> anyhow::Result<Option<ServerLock>> {
        Ok(match &self.kind {
            // Its files are locked already.
            StoreKind::Sqlite(_) => None,
            StoreKind::Postgres(store) if shares_redis => Some(store.lock_shared().await?),
            StoreKind::Postgres(store) => Some(store.lock_exclusive().await?),
        })
    }

    /// The search over this store's prompts. Its loads run in the tasks of `lifecycle`.
    pub fn similarity(
        &self,
        engine: &Engine,
        config: &SearchConfig,
        cores: usize,
        lifecycle: &Lifecycle,
    ) -> Arc<dyn Similarity> {
        let model = engine.model_id().clone();
        match &self.kind {
            StoreKind::Postgres(store) => Arc::new(PostgresSimilarity {
                store: Arc::clone(store),
                model,
                dimension: engine.dimension(),
                scope: config.scope,
            }),
            StoreKind::Sqlite(_) => {
                let options = SlabOptions {
                    dimension: engine.dimension(),
                    scope: config.scope,
                    memory_bytes: usize::try_from(config.memory_bytes).unwrap_or(usize::MAX),
                    concurrent_scans: cores,
                    load_wait: LOAD_WAIT,
                    kernel: prompt_service_engine::scan::kernel::Kernel::detect(),
                };
                let (tasks, stop) = (lifecycle.tasks.clone(), lifecycle.stopping.clone());
                let store = Arc::clone(&self.prompts);
                Arc::new(SlabIndex::new(options, store, model, tasks, stop))
            }
        }
    }

    /// Closes it; everything answered is durable already.
    pub async fn close(&self) {
        match &self.kind {
            StoreKind::Sqlite(store) => store.close().await,
            StoreKind::Postgres(store) => store.close().await,
        }
    }
}

/// Looks whether there is a store, and makes none.
///
/// # Errors
/// One line that names the setting and the repair, if what is there cannot be used.
pub(super) async fn is_there(config: &StoreConfig) -> anyhow::Result<bool> {
    Ok(match config {
        StoreConfig::Sqlite { path, .. } => {
            let is_there = path.try_exists().with_context(|| {
                format!(
                    "DATABASE_URL: {}: cannot be looked at; run this as the server's user",
                    path.display()
                )
            })?;
            // The folder may be missing too, which `inspect` refuses.
            is_there
                && sqlite::inspect(path)
                    .with_context(|| format!("DATABASE_URL: {}", path.display()))?
                    != FileState::Absent
        }
        StoreConfig::Postgres { url, .. } => {
            postgres::inspect(url.expose(), None).await?.schema > 0
        }
    })
}

/// Sees to it that a command works on a store that is there. In the wrong folder it would make an
/// empty one, and seem to succeed.
///
/// # Errors
/// One line that names the setting and the repair, if there is none or it cannot be used.
pub(super) async fn find(config: &StoreConfig) -> anyhow::Result<()> {
    if is_there(config).await? {
        Ok(())
    } else {
        Err(absent(config))
    }
}

/// That there is no store, in one line.
pub(super) fn absent(config: &StoreConfig) -> anyhow::Error {
    match config {
        StoreConfig::Sqlite { data_dir, path } if path.starts_with(data_dir) => anyhow!(
            "DATA_DIR: there is no store at {}; run this where the server runs, or name the server's folder with --data-dir",
            path.display()
        ),
        StoreConfig::Sqlite { path, .. } => anyhow!(
            "DATABASE_URL: there is no store at {}; name the server's file (sqlite:///absolute/path), or run this where the server runs",
            path.display()
        ),
        StoreConfig::Postgres { .. } => anyhow!(
            "DATABASE_URL: the database holds no store; name the database that the server uses"
        ),
    }
}

/// With SQLite, locks the data folder and the database file. One lock alone would not stop a second
/// server that names the same file from another folder. With PostgreSQL the folder has at most the
/// generated key, which any number of servers may read.
///
/// # Errors
/// One line that names the folder or the file and the repair.
pub(super) fn lock_files(config: &StoreConfig) -> anyhow::Result<Vec<data_dir::FileLock>> {
    Ok(match config {
        StoreConfig::Sqlite { data_dir, path } => {
            let folder = DataDir::open(data_dir)?.lock()?;
            vec![folder, data_dir::lock_database(path)?]
        }
        StoreConfig::Postgres { .. } => Vec::new(),
    })
}
