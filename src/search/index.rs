//! The index in memory: it finds the caller's slab, loads it if necessary, and scans it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use parking_lot::Mutex;
use prompt_service_engine::scan::kernel::Kernel;
use prompt_service_engine::scan::{self, Plan, PreparedQuery, RowShape, Slab};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::loading::Loader;
use super::slab_cache::{RecentDeletions, SlabCache, SlabOwner, drop_aside};
use super::slot::SlabAccess;
use super::{Error, Hit, IndexStatus, Similarity, check_dimension};
use crate::config::SimilarScope;
use crate::domain::{Embedding, ModelId, PromptId, UserId};
use crate::store::PromptStore;

/// Slabs that are read at once. Two, so that one long list does not delay all users with short
/// ones. A slab that is being read counts as memory in use but cannot be evicted, so the budget may
/// be exceeded by so many slabs.
const CONCURRENT_LOADS: usize = 2;

/// How long to wait before the vectors are loaded again after a failure.
const RETRY_LOAD_AFTER: Duration = Duration::from_secs(1);

/// The settings of a [`SlabIndex`].
#[derive(Clone, Debug)]
pub struct SlabOptions {
    /// Numbers of a vector.
    pub dimension: usize,
    /// Whose prompts a search finds.
    pub scope: SimilarScope,
    /// In own scope, the bytes to keep in memory, including rows that are being read. A single
    /// larger slab is kept nevertheless, and so are up to two slabs that are being read. In shared
    /// scope everything is kept.
    pub memory_bytes: usize,
    /// Scans at once on the blocking threads, at least 1. More than the number of cores gain
    /// nothing.
    pub concurrent_scans: usize,
    /// In shared scope, how long a search waits until the rows are loaded. Then it is refused.
    pub load_wait: Duration,
    /// The instruction set: [`Kernel::detect`], except in tests.
    pub kernel: Kernel,
}

/// Similarity over slabs in memory, see the [module](super).
pub struct SlabIndex {
    shape: RowShape,
    scope: SimilarScope,
    kernel: Kernel,
    load_wait: Duration,
    loader: Arc<Loader>,
    scans: Arc<Semaphore>,
    /// Whether the shared slab is loaded.
    loaded: watch::Sender<bool>,
    /// The tasks of loads. A load goes on when its caller has left.
    tasks: TaskTracker,
    /// Ends them.
    stop: CancellationToken,
}

impl SlabIndex {
    /// An index without rows. In own scope it serves at once; in shared scope after
    /// [`load_all`](Self::load_all). Vectors of `model` are read from `store` in tasks of `tasks`,
    /// which end when `stop` is cancelled.
    pub fn new(
        options: SlabOptions,
        store: Arc<dyn PromptStore>,
        model: ModelId,
        tasks: TaskTracker,
        stop: CancellationToken,
    ) -> Self {
        let budget = match options.scope {
            SimilarScope::Own => options.memory_bytes,
            SimilarScope::Shared => usize::MAX,
        };
        let shape = RowShape::new(options.dimension);
        Self {
            shape,
            scope: options.scope,
            kernel: options.kernel,
            load_wait: options.load_wait,
            loader: Arc::new(Loader {
                shape,
                store,
                model,
                slabs: SlabCache::new(budget),
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

    /// In shared scope, reads every row. Searches are served once this has returned `Ok`. After an
    /// error it may be called again. Does nothing in own scope.
    pub async fn load_all(&self) -> Result<(), Error> {
        if self.scope == SimilarScope::Shared {
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

    async fn slab_of(&self, owner: SlabOwner) -> Result<Arc<Slab>, Error> {
        loop {
            let slot = self.loader.slabs.touch(owner);
            let mut outcome = match slot.access() {
                SlabAccess::Ready(slab) => return Ok(slab),
                SlabAccess::Wait(outcome) => outcome,
                SlabAccess::Load(load, outcome) => {
                    let (loader, stop) = (Arc::clone(&self.loader), self.stop.clone());
                    self.tasks.spawn(async move {
                        stop.run_until_cancelled(loader.load(owner, load)).await
                    });
                    outcome
                }
            };
            let ended = outcome.wait_for(Option::is_some).await;
            match ended.ok().and_then(|ended| (*ended).clone()) {
                Some(Ok(())) => {}
                Some(Err(error)) => return Err(Error::Source(Box::new(error))),
                None => return Err(Error::Source("the rows are no longer read".into())),
            }
            // From the slot, not from the cache: a slab that was evicted since is still complete.
            if let Some(slab) = slot.slab() {
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
        let slot = self.loader.slabs.get(None);
        slot.and_then(|slot| slot.slab()).ok_or(Error::Loading)
    }

    async fn scan(
        &self,
        slab: Arc<Slab>,
        query: PreparedQuery,
        k: usize,
    ) -> Result<Vec<scan::Hit>, Error> {
        let plan = Plan::of(slab.n_rows(), k);
        let kernel = self.kernel;
        if plan.cost_bytes(self.shape, slab.n_rows()) < kernel.bytes_in_place() {
            return Ok(scan::nearest(kernel, &slab, &query, k, plan));
        }
        let scans = Arc::clone(&self.scans);
        let permit = scans.acquire_owned().await;
        let permit = permit.expect("the semaphore is never closed");
        let scan = tokio::task::spawn_blocking(move || {
            // The scan keeps the permit, because it goes on when its caller has left.
            let _permit = permit;
            scan::nearest(kernel, &slab, &query, k, plan)
        });
        scan.await.map_err(Error::Interrupted)
    }

    async fn load_until_done(&self) {
        while let Err(error) = self.load_all().await {
            tracing::warn!(%error, "the vectors could not be loaded; trying again");
            tokio::time::sleep(RETRY_LOAD_AFTER).await;
        }
    }
}

#[async_trait]
impl Similarity for SlabIndex {
    async fn nearest(
        &self,
        caller: UserId,
        query: &Embedding,
        k: usize,
    ) -> Result<Vec<Hit>, Error> {
        check_dimension(self.shape.dimension, query)?;
        let slab = match self.scope {
            SimilarScope::Own => self.slab_of(Some(caller)).await?,
            SimilarScope::Shared => self.shared_slab().await?,
        };
        let query = PreparedQuery::new(self.shape, &query.0);
        let hits = self.scan(slab, query, k).await?.into_iter();
        Ok(hits
            .map(|scan::Hit { id, score }| Hit {
                id: PromptId(id),
                score,
            })
            .collect())
    }

    fn inserted(&self, user: UserId, id: PromptId, embedding: &Embedding) {
        if let Err(error) = check_dimension(self.shape.dimension, embedding) {
            tracing::error!(%error, "a row of another model was not inserted into the index");
            return;
        }
        let owner = self.scope.owner(user);
        if let Some(slot) = self.loader.slabs.get(owner) {
            slot.insert(id, embedding.to_f16_bytes(), || self.loader.is_deleted(id));
            self.loader.slabs.account(owner, &slot);
        }
    }

    fn deleted(&self, user: UserId, id: PromptId) {
        // Remembered whether the row is found or not: its insertion may be reported later, to a
        // slab that is loaded later.
        self.loader.deletions.lock().insert(id);
        let owner = self.scope.owner(user);
        if let Some(slot) = self.loader.slabs.get(owner) {
            slot.remove(id);
            self.loader.slabs.account(owner, &slot);
        }
    }

    fn invalidate(&self, user: UserId) {
        let owner = self.scope.owner(user);
        let Some(slot) = self.loader.slabs.get(owner) else {
            return;
        };
        match self.scope {
            SimilarScope::Own => {
                slot.invalidate();
                let bytes = slot.bytes();
                drop_aside(slot.take(), bytes);
                self.loader.slabs.account(owner, &slot);
            }
            // Only this user's rows are read again, because reading everybody's takes long.
            SimilarScope::Shared => {
                let (loader, stop) = (Arc::clone(&self.loader), self.stop.clone());
                self.tasks.spawn(async move {
                    stop.run_until_cancelled(loader.reconcile(user, &slot))
                        .await
                });
            }
        }
    }

    fn status(&self) -> IndexStatus {
        IndexStatus {
            ready: self.scope == SimilarScope::Own || *self.loaded.borrow(),
            loads: self.loader.loads.load(Ordering::Relaxed),
            ..self.loader.slabs.totals()
        }
    }

    /// In shared scope, loads all vectors.
    async fn prepare(&self, stop: CancellationToken) {
        stop.run_until_cancelled(self.load_until_done()).await;
    }
}
