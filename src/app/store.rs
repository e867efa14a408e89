//! Which store stands behind the use cases, and what each kind needs besides: a lock, an index, something to load.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::api::Lifecycle;
use crate::config::{SearchConfig, SimilarScope, StoreConfig};
use crate::data_dir::{self, DataDir};
use crate::embed::Engine;
use crate::search::{self, ScopeMode, Similarity, SlabIndex, SlabOptions};
use crate::services::stored_similarity::StoredSimilarity;
use crate::services::vectors::StoredVectors;
use crate::store::postgres::{self, PostgresStore, ServerLock};
use crate::store::sqlite::{self, FileState, SqliteStore};
use crate::store::{AccountStore, BulkStore, CallStore, PromptStore};

/// How long a search in shared scope waits for the vectors to be loaded after a start.
const LOAD_WAIT: Duration = Duration::from_secs(5);

/// An open store.
pub(super) struct Store {
    /// Accounts and sessions.
    pub accounts: Arc<dyn AccountStore>,
    /// Prompts and vectors.
    pub prompts: Arc<dyn PromptStore>,
    /// Running calls and idempotency keys.
    pub calls: Arc<dyn CallStore>,
    /// Whole rows, for the operator's commands.
    pub bulk: Arc<dyn BulkStore>,
    kind: Kind,
}

enum Kind {
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
                let store = Arc::new(open_sqlite(path)?);
                Self {
                    accounts: Arc::clone(&store) as _,
                    prompts: Arc::clone(&store) as _,
                    calls: Arc::clone(&store) as _,
                    bulk: Arc::clone(&store) as _,
                    kind: Kind::Sqlite(store),
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
                    prompts: Arc::clone(&store) as _,
                    calls: Arc::clone(&store) as _,
                    bulk: Arc::clone(&store) as _,
                    kind: Kind::Postgres(store),
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
            Kind::Sqlite(_) => None,
            Kind::Postgres(store) if shares_redis => Some(store.lock_shared().await?),
            Kind::Postgres(store) => Some(store.lock_exclusive().await?),
        })
    }

    /// What finds near prompts in this store. What it does beside requests runs in the tasks of `lifecycle`.
    pub fn similarity(
        &self,
        engine: &Engine,
        config: &SearchConfig,
        cores: usize,
        lifecycle: &Lifecycle,
    ) -> Finder {
        let model = engine.model_id().clone();
        match &self.kind {
            Kind::Postgres(store) => Finder::Stored {
                similarity: Arc::new(StoredSimilarity {
                    store: Arc::clone(store) as _,
                    model,
                    dimension: engine.dimension(),
                }),
                store: Arc::clone(store),
                scope: config.scope,
            },
            Kind::Sqlite(_) => {
                let options = SlabOptions {
                    dimension: engine.dimension(),
                    mode: match config.scope {
                        SimilarScope::Own => ScopeMode::Own,
                        SimilarScope::Shared => ScopeMode::Shared,
                    },
                    memory_bytes: usize::try_from(config.memory_bytes).unwrap_or(usize::MAX),
                    concurrent_scans: cores,
                    load_wait: LOAD_WAIT,
                    kernel: search::kernel::Kernel::detect(),
                };
                let vectors = StoredVectors {
                    store: Arc::clone(&self.prompts),
                    model,
                };
                let (tasks, stop) = (lifecycle.tasks.clone(), lifecycle.stopping.clone());
                Finder::InMemory(Arc::new(SlabIndex::new(
                    options,
                    Arc::new(vectors),
                    tasks,
                    stop,
                )))
            }
        }
    }

    /// Closes it; everything answered is durable already.
    pub async fn close(&self) {
        match &self.kind {
            Kind::Sqlite(store) => store.close().await,
            Kind::Postgres(store) => store.close().await,
        }
    }
}

/// What finds near prompts, and what it does in the background.
pub(super) enum Finder {
    /// From memory, loaded from the store.
    InMemory(Arc<SlabIndex>),
    /// By the store itself.
    Stored {
        similarity: Arc<StoredSimilarity>,
        store: Arc<PostgresStore>,
        scope: SimilarScope,
    },
}

impl Finder {
    /// The seam.
    pub fn similarity(&self) -> Arc<dyn Similarity> {
        match self {
            Self::InMemory(index) => Arc::clone(index) as _,
            Self::Stored { similarity, .. } => Arc::clone(similarity) as _,
        }
    }

    /// Starts what it does beside serving.
    pub fn start(&self, tasks: &TaskTracker, stop: CancellationToken) {
        match self {
            Self::InMemory(index) => {
                let index = Arc::clone(index);
                tasks.spawn(async move {
                    tokio::select! {
                        () = stop.cancelled() => {}
                        () = load(&index) => {}
                    }
                });
            }
            Self::Stored {
                store,
                scope: SimilarScope::Shared,
                ..
            } => {
                let store = Arc::clone(store);
                tasks.spawn(async move { store.index_meaning(stop).await });
            }
            Self::Stored {
                scope: SimilarScope::Own,
                ..
            } => {}
        }
    }
}

/// Loads all vectors where they must all be there; tries again for as long as it takes, and readiness says so meanwhile.
async fn load(index: &SlabIndex) {
    while let Err(error) = index.load_all().await {
        tracing::warn!(%error, "the vectors could not be loaded; trying again");
        tokio::time::sleep(Duration::from_secs(1)).await;
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

fn open_sqlite(path: &Path) -> anyhow::Result<SqliteStore> {
    SqliteStore::open(path, sqlite::OpenOptions::default())
        .with_context(|| format!("DATABASE_URL: {}", path.display()))
}

/// Takes the data folder and the database file, where that is SQLite's: either alone would let a second server in that names the same
/// file from another folder. With a database elsewhere the folder holds the generated key at most, which any number of servers may read.
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
