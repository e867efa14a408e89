//! One slab's life: not loaded, being loaded, ready.
//!
//! What is written while rows are being read is recorded and applied afterwards. A row can reach a slab twice, by the reading
//! and by its own report, in either order; it is taken in once, because every insertion looks for its id first.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::slab::Slab;
use crate::domain::PromptId;

enum State {
    /// Nothing is in memory, and nothing needs to be recorded: a later load reads it.
    Idle,
    /// Rows are being read. These changes came since the reading began, in this order.
    Loading(Vec<Change>),
    /// Complete, and kept so by every change.
    Ready(Arc<Slab>),
}

enum Change {
    Inserted(PromptId, Vec<u8>),
    Deleted(PromptId),
}

/// A slab that may not be there yet.
pub(super) struct Cell {
    state: Mutex<State>,
    /// Held by the one caller that loads; the others wait for it, and the next takes over if it gives up.
    loader: tokio::sync::Mutex<()>,
    /// Of the ready slab, else 0.
    bytes: AtomicUsize,
    rows: AtomicUsize,
}

/// A load in progress. Dropped without `finish`, it leaves the cell not loaded.
pub(super) struct Loading<'a> {
    cell: &'a Cell,
    finished: bool,
}

impl Cell {
    pub(super) fn new() -> Self {
        Self {
            state: Mutex::new(State::Idle),
            loader: tokio::sync::Mutex::new(()),
            bytes: AtomicUsize::new(0),
            rows: AtomicUsize::new(0),
        }
    }

    /// The slab as it is now, if it is ready.
    pub(super) fn slab(&self) -> Option<Arc<Slab>> {
        match &*self.state() {
            State::Ready(slab) => Some(Arc::clone(slab)),
            State::Idle | State::Loading(_) => None,
        }
    }

    /// Bytes of the slab; 0 exactly if it is not ready.
    pub(super) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Rows of the slab, 0 if it is not ready.
    pub(super) fn rows(&self) -> usize {
        self.rows.load(Ordering::Relaxed)
    }

    /// Waits for the right to load.
    pub(super) async fn lock_loader(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.loader.lock().await
    }

    /// From here on changes are recorded. Call it before the first row is read, with the loader locked.
    pub(super) fn begin_loading(&self) -> Loading<'_> {
        *self.state() = State::Loading(Vec::new());
        Loading {
            cell: self,
            finished: false,
        }
    }

    /// Takes in a row unless it is there or `is_deleted` says that its deletion came first.
    pub(super) fn insert(&self, id: PromptId, stored: Vec<u8>, is_deleted: impl FnOnce() -> bool) {
        let mut state = self.state();
        // Asked under the lock: a deletion is remembered before it is applied, so one that is not known yet
        // will find the row here.
        if is_deleted() {
            return;
        }
        match &mut *state {
            State::Idle => {}
            State::Loading(changes) => changes.push(Change::Inserted(id, stored)),
            State::Ready(slab) => {
                insert(slab, id, &stored);
                self.measure(slab);
            }
        }
    }

    /// Drops a row if it is there.
    pub(super) fn remove(&self, id: PromptId) {
        // Looking through a million ids takes some 0.3 ms, so it is done on a copy first, and only checked under the lock.
        let likely = self.slab().and_then(|slab| slab.find(id));
        let mut state = self.state();
        match &mut *state {
            State::Idle => {}
            State::Loading(changes) => changes.push(Change::Deleted(id)),
            State::Ready(slab) => {
                remove(slab, id, likely);
                self.measure(slab);
            }
        }
    }

    fn measure(&self, slab: &Slab) {
        self.bytes.store(slab.bytes(), Ordering::Relaxed);
        self.rows.store(slab.n_rows(), Ordering::Relaxed);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic while the lock was held cannot leave the state half changed in a way that matters more than going on.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Loading<'_> {
    /// Applies what was recorded to the rows read, and makes them the cell's slab.
    pub(super) fn finish(mut self, slab: Slab) -> Arc<Slab> {
        self.finished = true;
        let mut state = self.cell.state();
        let mut slab = Arc::new(slab);
        if let State::Loading(changes) = std::mem::replace(&mut *state, State::Idle) {
            for change in changes {
                match change {
                    Change::Inserted(id, stored) => insert(&mut slab, id, &stored),
                    Change::Deleted(id) => remove(&mut slab, id, None),
                }
            }
        }
        self.cell.measure(&slab);
        *state = State::Ready(Arc::clone(&slab));
        slab
    }
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        if !self.finished {
            *self.cell.state() = State::Idle;
        }
    }
}

fn insert(slab: &mut Arc<Slab>, id: PromptId, stored: &[u8]) {
    if slab.find(id).is_none() {
        Arc::make_mut(slab).extend(&[id], stored);
    }
}

fn remove(slab: &mut Arc<Slab>, id: PromptId, likely: Option<usize>) {
    let at = likely.filter(|at| slab.id(*at) == Some(id));
    if let Some(at) = at.or_else(|| slab.find(id)) {
        Arc::make_mut(slab).swap_remove(at);
    }
}
