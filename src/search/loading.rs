//! Reads a scope's rows into its slab.
//!
//! A load runs in a task of its own: it goes on when the caller that wanted it has left, so that callers of little patience find
//! the slab the next time, instead of beginning from the first row for ever.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Semaphore;

use super::cell::{Cell, Load};
use super::residents::{Owner, RecentDeletions, Residents};
use super::slab::{Shape, Slab};
use super::{BoxError, Page, VectorSource};
use crate::domain::{PromptId, UserId};

/// Rows read at once: 1.5 MiB at 384 dimensions.
const PAGE_ROWS: usize = 2048;

/// So many rows are unpacked where they were read, in less than 0.1 ms; more on a blocking thread.
const UNPACKED_IN_PLACE_ROWS: usize = 128;

/// How long to step back when the source is away.
const PAUSE: Duration = Duration::from_millis(500);

/// The slabs in memory and what fills them.
pub(super) struct Loader {
    pub(super) shape: Shape,
    pub(super) source: Arc<dyn VectorSource>,
    pub(super) residents: Residents,
    pub(super) deletions: Mutex<RecentDeletions>,
    /// For those who read. First come, first served: a user has one load at most.
    pub(super) turns: Semaphore,
    /// How many were finished.
    pub(super) loads: AtomicU64,
}

impl Loader {
    /// Whether that deletion was reported lately.
    pub(super) fn is_deleted(&self, id: PromptId) -> bool {
        self.deletions.lock().contains(id)
    }

    /// Waits for its turn, reads the owner's rows, and tells all who wait.
    pub(super) async fn load(&self, owner: Owner, mut load: Load) {
        let _turn = self.turns.acquire().await;
        let outcome = self.fill(owner, &mut load).await;
        if outcome.is_err() {
            load.give_up();
        } else {
            self.loads.fetch_add(1, Ordering::Relaxed);
        }
        self.residents.account(owner, load.cell());
        load.announce(outcome.map_err(Arc::from));
    }

    async fn fill(&self, owner: Owner, load: &mut Load) -> Result<(), BoxError> {
        loop {
            load.begin();
            let slab = self.read_all(owner, load).await?;
            if load.finish(slab) {
                return Ok(());
            }
        }
    }

    async fn read_all(&self, owner: Owner, load: &Load) -> Result<Slab, BoxError> {
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
            // Counted while it grows, so that others make room for it and not only for the whole.
            load.note_bytes(slab.bytes());
            self.residents.account(owner, load.cell());
            after = last;
        }
    }

    /// Takes in those of the user's rows that the slab of everybody's lacks, however long the source is away.
    pub(super) async fn make_good(&self, user: UserId, cell: &Arc<Cell>) {
        let mut after = None;
        loop {
            let page = match self.page(Some(user), after).await {
                Ok(page) => page,
                Err(error) => {
                    tracing::warn!(%error, "rows in doubt cannot be read yet");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            let rows = page.f16_bytes.chunks_exact(self.shape.stored_bytes());
            for ((_, id), stored) in page.ids.iter().zip(rows) {
                cell.insert(*id, stored.to_vec(), || self.is_deleted(*id));
                tokio::task::coop::consume_budget().await;
            }
            self.residents.account(None, cell);
            if page.ids.len() < PAGE_ROWS {
                return;
            }
            after = page.ids.last().copied();
        }
    }

    /// A page of other rows than those asked for would mix users or never end.
    async fn page(
        &self,
        owner: Owner,
        after: Option<(UserId, PromptId)>,
    ) -> Result<Page, BoxError> {
        let page = self.source.page(owner, after, PAGE_ROWS).await?;
        let rising = page.ids.is_sorted_by(|a, b| a < b);
        let onward = page.ids.first().is_none_or(|first| Some(*first) > after);
        let own = owner.is_none_or(|owner| page.ids.iter().all(|(user, _)| *user == owner));
        let sized = page.f16_bytes.len() == page.ids.len() * self.shape.stored_bytes();
        if rising && onward && own && sized {
            Ok(page)
        } else {
            Err("the source answered with rows of another order, owner or size".into())
        }
    }
}

/// The slab with a page's rows at its end.
async fn unpacked(mut slab: Slab, page: Page) -> Result<Slab, BoxError> {
    let in_place = page.ids.len() <= UNPACKED_IN_PLACE_ROWS;
    let unpack = move || {
        let ids: Vec<PromptId> = page.ids.iter().map(|(_, id)| *id).collect();
        slab.extend(&ids, &page.f16_bytes);
        slab
    };
    if in_place {
        Ok(unpack())
    } else {
        Ok(tokio::task::spawn_blocking(unpack).await?)
    }
}
