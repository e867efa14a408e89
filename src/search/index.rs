//! The index in memory: finds a scope's slab, loads it if need be, scans it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::sync::{Semaphore, watch};

use super::cell::Cell;
use super::kernel::Kernel;
use super::residents::{Owner, RecentDeletions, Residents};
use super::scan::{self, Plan, Query};
use super::slab::{Shape, Slab};
use super::{BoxError, Error, Hit, Page, Scope, ScopeMode, Similarity, Status, VectorSource};
use crate::domain::{Embedding, PromptId, UserId};

/// Rows read at once: 1.5 MiB at 384 dimensions, unpacked in under a millisecond.
const PAGE_ROWS: usize = 2048;

/// Scans that read less than this run where they are called: 0.3 ms at 25 GB/s, about a millisecond in the portable kernel.
/// Longer ones go to the blocking threads, for which the hand-over of some 20 µs is a small price.
const INLINE_BYTES: usize = 8 << 20;

/// The settings of a [`SlabIndex`].
#[derive(Clone, Debug)]
pub struct SlabOptions {
    /// Numbers of a vector.
    pub dimension: usize,
    /// Which scope it serves.
    pub mode: ScopeMode,
    /// In own scope, the bytes kept in memory; a single larger slab is kept all the same. In shared scope everything is kept.
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
    source: Arc<dyn VectorSource>,
    residents: Residents,
    deletions: Mutex<RecentDeletions>,
    scans: Arc<Semaphore>,
    /// Whether the shared slab is loaded.
    loaded: watch::Sender<bool>,
    loads: AtomicU64,
}

impl SlabIndex {
    /// An index without rows. In own scope it serves at once; in shared scope after [`load_all`](Self::load_all).
    pub fn new(options: SlabOptions, source: Arc<dyn VectorSource>) -> Self {
        let budget = match options.mode {
            ScopeMode::Own => options.memory_bytes,
            ScopeMode::Shared => usize::MAX,
        };
        Self {
            shape: Shape::new(options.dimension),
            mode: options.mode,
            kernel: options.kernel,
            load_wait: options.load_wait,
            source,
            residents: Residents::new(budget),
            deletions: Mutex::default(),
            scans: Arc::new(Semaphore::new(options.concurrent_scans.max(1))),
            loaded: watch::Sender::new(false),
            loads: AtomicU64::new(0),
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
        let cell = self.residents.touch(owner);
        if let Some(slab) = cell.slab() {
            return Ok(slab);
        }
        let _loader = cell.lock_loader().await;
        // Another may have loaded it meanwhile.
        if let Some(slab) = cell.slab() {
            return Ok(slab);
        }
        let slab = self.load(owner, &cell).await?;
        self.loads.fetch_add(1, Ordering::Relaxed);
        self.residents.account(owner, &cell);
        Ok(slab)
    }

    async fn load(&self, owner: Owner, cell: &Cell) -> Result<Arc<Slab>, Error> {
        let loading = cell.begin_loading();
        let mut slab = Slab::new(self.shape);
        let mut after = None;
        loop {
            let page = self.source.page(owner, after, PAGE_ROWS).await;
            let page = page.map_err(Error::Source)?;
            self.check(owner, after, &page).map_err(Error::Source)?;
            let ids: Vec<PromptId> = page.ids.iter().map(|(_, id)| *id).collect();
            slab.extend(&ids, &page.f16_bytes);
            if page.ids.len() < PAGE_ROWS {
                return Ok(loading.finish(slab));
            }
            after = page.ids.last().copied();
        }
    }

    /// A page of other rows than those asked for would mix users or never end.
    fn check(
        &self,
        owner: Owner,
        after: Option<(UserId, PromptId)>,
        page: &Page,
    ) -> Result<(), BoxError> {
        let rising = page.ids.is_sorted_by(|a, b| a < b);
        let onward = page.ids.first().is_none_or(|first| Some(*first) > after);
        let own = owner.is_none_or(|owner| page.ids.iter().all(|(user, _)| *user == owner));
        let sized = page.f16_bytes.len() == page.ids.len() * self.shape.stored_bytes();
        if rising && onward && own && sized {
            Ok(())
        } else {
            Err("the source answered with rows of another order, owner or size".into())
        }
    }

    async fn shared_slab(&self) -> Result<Arc<Slab>, Error> {
        let mut loaded = self.loaded.subscribe();
        let waited = tokio::time::timeout(self.load_wait, loaded.wait_for(|loaded| *loaded)).await;
        if !matches!(waited, Ok(Ok(_))) {
            return Err(Error::Loading);
        }
        let cell = self.residents.get(None);
        cell.and_then(|cell| cell.slab()).ok_or(Error::Loading)
    }

    async fn scan(&self, slab: Arc<Slab>, query: Query, k: usize) -> Result<Vec<Hit>, Error> {
        let plan = Plan::of(slab.n_rows(), k);
        let kernel = self.kernel;
        if plan.cost_bytes(self.shape, slab.n_rows()) < INLINE_BYTES {
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
        if let Some(cell) = self.residents.get(owner) {
            cell.insert(id, embedding.to_f16_bytes(), || {
                let deletions = self.deletions.lock();
                deletions
                    .unwrap_or_else(PoisonError::into_inner)
                    .contains(id)
            });
            self.residents.account(owner, &cell);
        }
    }

    fn deleted(&self, user: UserId, id: PromptId) {
        // Remembered whether or not the row is found: its insertion may be reported after this, to a slab loaded after this.
        let deletions = self.deletions.lock();
        deletions.unwrap_or_else(PoisonError::into_inner).insert(id);
        let owner = self.owner(user);
        if let Some(cell) = self.residents.get(owner) {
            cell.remove(id);
            self.residents.account(owner, &cell);
        }
    }

    fn status(&self) -> Status {
        let totals = self.residents.totals();
        Status {
            ready: self.mode == ScopeMode::Own || *self.loaded.borrow(),
            rows: totals.rows as u64,
            bytes: totals.bytes as u64,
            slabs: totals.slabs as u64,
            loads: self.loads.load(Ordering::Relaxed),
            evictions: totals.evictions,
        }
    }
}
