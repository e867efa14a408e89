//! Reads rows from the store into a slab.
//!
//! A load runs in its own task and goes on when its caller has left. So a caller with a short
//! timeout finds the slab the next time, and no load begins from the first row again and again.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use prompt_service_engine::scan::{RowShape, Slab};
use tokio::sync::Semaphore;

use super::BoxError;
use super::slab_cache::{RecentDeletions, SlabCache, SlabOwner};
use super::slot::{Load, SlabSlot};
use crate::domain::{ModelId, PromptId, UserId};
use crate::store::{PromptStore, VectorCursor, VectorPage};

/// Rows of a page: 1.5 MiB at 384 dimensions.
const PAGE_ROWS: usize = 2048;

/// A page of up to so many rows is unpacked on the async thread, in less than 0.1 ms. A longer one
/// is unpacked on a blocking thread.
const UNPACKED_IN_PLACE_ROWS: usize = 128;

/// How long to wait before a retry while the store is unavailable.
const PAUSE: Duration = Duration::from_millis(500);

/// Fills the slabs in memory from the store.
pub(super) struct Loader {
    pub(super) shape: RowShape,
    pub(super) store: Arc<dyn PromptStore>,
    /// The model in use: vectors of others are not comparable.
    pub(super) model: ModelId,
    pub(super) slabs: SlabCache,
    pub(super) deletions: Mutex<RecentDeletions>,
    /// A permit for each load that reads. First come, first served: a user has one load at most.
    pub(super) turns: Semaphore,
    /// How many loads have succeeded.
    pub(super) loads: AtomicU64,
}

impl Loader {
    /// Whether that deletion was reported recently.
    pub(super) fn is_deleted(&self, id: PromptId) -> bool {
        self.deletions.lock().contains(id)
    }

    /// Waits for its turn, reads the owner's rows, and notifies all callers that wait.
    pub(super) async fn load(&self, owner: SlabOwner, mut load: Load) {
        let _turn = self.turns.acquire().await;
        let outcome = self.fill(owner, &mut load).await;
        if outcome.is_err() {
            load.cancel();
        } else {
            self.loads.fetch_add(1, Ordering::Relaxed);
        }
        self.slabs.account(owner, &load.slot);
        load.announce(outcome.map_err(Arc::from));
    }

    async fn fill(&self, owner: SlabOwner, load: &mut Load) -> Result<(), BoxError> {
        loop {
            load.begin();
            let slab = self.read_all(owner, load).await?;
            if load.finish(slab) {
                return Ok(());
            }
        }
    }

    async fn read_all(&self, owner: SlabOwner, load: &Load) -> Result<Slab, BoxError> {
        let mut slab = Slab::new(self.shape);
        let mut after = None;
        loop {
            let page = self.page(owner, after).await?;
            let rows = page.ids.len();
            let last = page.ids.last().copied();
            slab = unpacked(slab, page).await?;
            if rows < PAGE_ROWS {
                return Ok(slab);
            }
            // Counted while it grows, so that other slabs are evicted in time.
            load.note_bytes(slab.bytes());
            self.slabs.account(owner, &load.slot);
            after = last;
        }
    }

    /// Inserts those of the user's rows that the shared slab lacks. Retries while the store is
    /// unavailable.
    pub(super) async fn reconcile(&self, user: UserId, slot: &Arc<SlabSlot>) {
        let mut after = None;
        loop {
            let page = match self.page(Some(user), after).await {
                Ok(page) => page,
                Err(error) => {
                    tracing::warn!(%error, "rows whose write may have been committed cannot be read yet");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            let rows = page.f16_bytes.chunks_exact(self.shape.stored_bytes());
            for ((_, id), stored) in page.ids.iter().zip(rows) {
                slot.insert(*id, stored.to_vec(), || self.is_deleted(*id));
                tokio::task::coop::consume_budget().await;
            }
            self.slabs.account(None, slot);
            if page.ids.len() < PAGE_ROWS {
                return;
            }
            after = page.ids.last().copied();
        }
    }

    /// Reads a page and checks it: wrong rows would mix users, or the load would never end.
    async fn page(
        &self,
        owner: SlabOwner,
        after: Option<VectorCursor>,
    ) -> Result<VectorPage, BoxError> {
        let read = self.store.vectors(&self.model, owner, after, PAGE_ROWS);
        let page = read.await?;
        let rising = page.ids.is_sorted_by(|a, b| a < b);
        let onward = page.ids.first().is_none_or(|first| Some(*first) > after);
        let own = owner.is_none_or(|owner| page.ids.iter().all(|(user, _)| *user == owner));
        let sized = page.f16_bytes.len() == page.ids.len() * self.shape.stored_bytes();
        if rising && onward && own && sized {
            Ok(page)
        } else {
            Err("the store returned rows of another order, owner or size".into())
        }
    }
}

/// Returns the slab with the page's rows at its end.
async fn unpacked(mut slab: Slab, page: VectorPage) -> Result<Slab, BoxError> {
    let in_place = page.ids.len() <= UNPACKED_IN_PLACE_ROWS;
    let unpack = move || {
        let ids: Vec<i64> = page.ids.iter().map(|(_, id)| id.0).collect();
        slab.extend(&ids, &page.f16_bytes);
        slab
    };
    if in_place {
        Ok(unpack())
    } else {
        Ok(tokio::task::spawn_blocking(unpack).await?)
    }
}
