//! The index in memory: finds a scope's slab, loads it if need be, scans it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::cell::Access;
use super::kernel::Kernel;
use super::loading::Loader;
use super::residents::{Owner, RecentDeletions, Residents, drop_aside};
use super::scan::{self, Plan, Query};
use super::slab::{Shape, Slab};
use super::{Error, Hit, Scope, ScopeMode, Similarity, Status, VectorSource};
use crate::domain::{Embedding, PromptId, UserId};

/// Slabs read at once. Two, so that one long list does not hold up all who have short ones. What is being read counts as memory
/// in use, but cannot be evicted: so many slabs there may be beyond the budget.
const CONCURRENT_LOADS: usize = 2;

/// The settings of a [`SlabIndex`].
#[derive(Clone, Debug)]
pub struct SlabOptions {
    /// Numbers of a vector.
    pub dimension: usize,
    /// Which scope it serves.
    pub mode: ScopeMode,
    /// In own scope, the bytes kept in memory, rows being read included; a single larger slab is kept all the same, and so are the
    /// two at most that are being read. In shared scope everything is kept.
    pub memory_bytes: usize,
    /// Scans at once on the blocking threads, at least 1. More than there are cores gain nothing.
    pub concurrent_scans: usize,
    /// In shared scope, how long a search waits for the rows to be loaded before it is refused.
    pub load_wait: Duration,
    /// The instruction set; [`Kernel::detect`] but in tests.
    pub kernel: Kernel,
}

/// Similarity over slabs in memory, see the [module](super).
pub struct SlabIndex {
    shape: Shape,
    mode: ScopeMode,
    kernel: Kernel,
    load_wait: Duration,
    loader: Arc<Loader>,
    scans: Arc<Semaphore>,
    /// Whether the shared slab is loaded.
    loaded: watch::Sender<bool>,
    /// Where loads run: they outlive the callers that want them.
    tasks: TaskTracker,
    /// Ends them.
    stop: CancellationToken,
}

impl SlabIndex {
    /// An index without rows. In own scope it serves at once; in shared scope after [`load_all`](Self::load_all).
    /// Rows are read in tasks of `tasks`, which end when `stop` is cancelled.
    pub fn new(
        options: SlabOptions,
        source: Arc<dyn VectorSource>,
        tasks: TaskTracker,
        stop: CancellationToken,
    ) -> Self {
        let budget = match options.mode {
            ScopeMode::Own => options.memory_bytes,
            ScopeMode::Shared => usize::MAX,
        };
        let shape = Shape::new(options.dimension);
        Self {
            shape,
            mode: options.mode,
            kernel: options.kernel,
            load_wait: options.load_wait,
            loader: Arc::new(Loader {
                shape,
                source,
                residents: Residents::new(budget),
                deletions: Mutex::new(RecentDeletions::default()),
                turns: Semaphore::new(CONCURRENT_LOADS),
                loads: AtomicU64::new(0),
            }),
            scans: Arc::new(Semaphore::new(options.concurrent_scans.max(1))),
            loaded: watch::Sender::new(false),
            tasks,
            stop,
        }
    }

    /// In shared scope, reads every row; once it has returned `Ok`, searches are answered. After an error it may be called again.
    /// Does nothing in own scope.
    pub async fn load_all(&self) -> Result<(), Error> {
        if self.mode == ScopeMode::Shared {
            let begun = Instant::now();
            let slab = self.slab_of(None).await?;
            self.loaded.send_replace(true);
            tracing::info!(
                rows = slab.n_rows(),
                bytes = slab.bytes(),
                duration_ms = begun.elapsed().as_millis() as u64,
                kernel = self.kernel.name(),
                "all vectors are loaded"
            );
        }
        Ok(())
    }

    fn owner(&self, user: UserId) -> Owner {
        match self.mode {
            ScopeMode::Own => Some(user),
            ScopeMode::Shared => None,
        }
    }

    async fn slab_of(&self, owner: Owner) -> Result<Arc<Slab>, Error> {
        loop {
            let cell = self.loader.residents.touch(owner);
            let mut outcome = match cell.access() {
                Access::Ready(slab) => return Ok(slab),
                Access::Wait(outcome) => outcome,
                Access::Load(load, outcome) => {
                    let (loader, stop) = (Arc::clone(&self.loader), self.stop.clone());
                    self.tasks.spawn(async move {
                        tokio::select! {
                            () = stop.cancelled() => {}
                            () = loader.load(owner, load) => {}
                        }
                    });
                    outcome
                }
            };
            let ended = match outcome.wait_for(Option::is_some).await {
                Ok(ended) => (*ended).clone(),
                Err(_) => None,
            };
            match ended {
                Some(Ok(())) => {}
                Some(Err(error)) => return Err(Error::Source(Box::new(error))),
                None => return Err(Error::Source("the rows are no longer read".into())),
            }
            // The cell's, not the index's: the slab may have been evicted since, and is as good for who waited for it.
            if let Some(slab) = cell.slab() {
                return Ok(slab);
            }
        }
    }

    async fn shared_slab(&self) -> Result<Arc<Slab>, Error> {
        let mut loaded = self.loaded.subscribe();
        let waited = tokio::time::timeout(self.load_wait, loaded.wait_for(|loaded| *loaded)).await;
        if !matches!(waited, Ok(Ok(_))) {
            return Err(Error::Loading);
        }
        let cell = self.loader.residents.get(None);
        cell.and_then(|cell| cell.slab()).ok_or(Error::Loading)
    }

    async fn scan(&self, slab: Arc<Slab>, query: Query, k: usize) -> Result<Vec<Hit>, Error> {
        let plan = Plan::of(slab.n_rows(), k);
        let kernel = self.kernel;
        if plan.cost_bytes(self.shape, slab.n_rows()) < kernel.bytes_in_place() {
            return Ok(scan::nearest(kernel, &slab, &query, k, plan));
        }
        let scans = Arc::clone(&self.scans);
        let permit = scans.acquire_owned().await;
        let permit = permit.expect("the semaphore is never closed");
        let scan = tokio::task::spawn_blocking(move || {
            // The permit goes with the scan, which runs on when its caller has left.
            let _permit = permit;
            scan::nearest(kernel, &slab, &query, k, plan)
        });
        scan.await.map_err(Error::Interrupted)
    }

    fn fits(&self, embedding: &Embedding) -> Result<(), Error> {
        let (expected, actual) = (self.shape.dimension, embedding.0.len());
        if expected == actual {
            Ok(())
        } else {
            Err(Error::Dimension { expected, actual })
        }
    }
}

#[async_trait]
impl Similarity for SlabIndex {
    async fn nearest(&self, scope: Scope, query: &Embedding, k: usize) -> Result<Vec<Hit>, Error> {
        self.fits(query)?;
        let slab = match (scope, self.mode) {
            (Scope::Own(user), ScopeMode::Own) => self.slab_of(Some(user)).await?,
            (Scope::Shared, ScopeMode::Shared) => self.shared_slab().await?,
            (Scope::Own(_), ScopeMode::Shared) | (Scope::Shared, ScopeMode::Own) => {
                return Err(Error::ScopeNotServed);
            }
        };
        self.scan(slab, Query::new(self.shape, &query.0), k).await
    }

    fn inserted(&self, user: UserId, id: PromptId, embedding: &Embedding) {
        if let Err(error) = self.fits(embedding) {
            tracing::error!(%error, "a row of another model was not taken into the index");
            return;
        }
        let owner = self.owner(user);
        if let Some(cell) = self.loader.residents.get(owner) {
            cell.insert(id, embedding.to_f16_bytes(), || self.loader.is_deleted(id));
            self.loader.residents.account(owner, &cell);
        }
    }

    fn deleted(&self, user: UserId, id: PromptId) {
        // Remembered whether or not the row is found: its insertion may be reported after this, to a slab loaded after this.
        self.loader.deletions.lock().insert(id);
        let owner = self.owner(user);
        if let Some(cell) = self.loader.residents.get(owner) {
            cell.remove(id);
            self.loader.residents.account(owner, &cell);
        }
    }

    fn doubted(&self, user: UserId) {
        let owner = self.owner(user);
        let Some(cell) = self.loader.residents.get(owner) else {
            return;
        };
        match self.mode {
            ScopeMode::Own => {
                cell.doubt();
                let bytes = cell.bytes();
                drop_aside(cell.take(), bytes);
                self.loader.residents.account(owner, &cell);
            }
            // Everybody's rows are not read anew for one that may be missing.
            ScopeMode::Shared => {
                let (loader, stop) = (Arc::clone(&self.loader), self.stop.clone());
                self.tasks.spawn(async move {
                    tokio::select! {
                        () = stop.cancelled() => {}
                        () = loader.make_good(user, &cell) => {}
                    }
                });
            }
        }
    }

    fn status(&self) -> Status {
        let totals = self.loader.residents.totals();
        Status {
            ready: self.mode == ScopeMode::Own || *self.loaded.borrow(),
            rows: totals.rows as u64,
            bytes: totals.bytes as u64,
            slabs: totals.slabs as u64,
            loads: self.loader.loads.load(Ordering::Relaxed),
            evictions: totals.evictions,
        }
    }
}
