//! One slab's life: not loaded, being loaded, ready.
//!
//! What is written while rows are being read is recorded and applied afterwards. A row can reach a slab twice, by the reading
//! and by its own report, in either order; it is taken in once, because every insertion looks for its id first.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::watch;

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

/// How a load ended, for all who wait for it; `None` until then.
pub(super) type Outcome = Option<Result<(), Arc<dyn Error + Send + Sync>>>;

struct Inner {
    state: State,
    /// How many rows were put into the ready slab: an id that was looked for without the lock and not found is still not there
    /// if this has not changed.
    insertions: u64,
    /// How often what was read came into doubt: a load during which this changes begins again.
    doubts: u64,
    /// Of the load that is under way or waits for its turn.
    load: Option<Arc<watch::Sender<Outcome>>>,
}

/// A slab that may not be there yet.
pub(super) struct Cell {
    inner: Mutex<Inner>,
    /// Of the ready slab, else 0.
    bytes: AtomicUsize,
    rows: AtomicUsize,
    /// Of the rows read so far by a load, else 0.
    loading_bytes: AtomicUsize,
}

/// What a caller gets who asks for the slab.
pub(super) enum Access {
    /// It is ready.
    Ready(Arc<Slab>),
    /// Somebody loads it.
    Wait(watch::Receiver<Outcome>),
    /// Nobody loads it: the caller is to see that it is done.
    Load(Load, watch::Receiver<Outcome>),
}

/// A load, from before its turn until its end. Dropped without an end, it leaves the cell not loaded, and those who wait are
/// told by the closed channel.
pub(super) struct Load {
    cell: Arc<Cell>,
    outcome: Arc<watch::Sender<Outcome>>,
    doubts: u64,
    ended: bool,
}

impl Cell {
    pub(super) fn new() -> Self {
        Self {
            inner: Mutex::new(Inner {
                state: State::Idle,
                insertions: 0,
                doubts: 0,
                load: None,
            }),
            bytes: AtomicUsize::new(0),
            rows: AtomicUsize::new(0),
            loading_bytes: AtomicUsize::new(0),
        }
    }

    /// The slab, or the way to it.
    pub(super) fn access(self: &Arc<Self>) -> Access {
        let mut inner = self.lock();
        if let State::Ready(slab) = &inner.state {
            return Access::Ready(Arc::clone(slab));
        }
        if let Some(load) = &inner.load {
            return Access::Wait(load.subscribe());
        }
        let (outcome, ended) = watch::channel(None);
        let outcome = Arc::new(outcome);
        inner.load = Some(Arc::clone(&outcome));
        let load = Load {
            cell: Arc::clone(self),
            outcome,
            doubts: inner.doubts,
            ended: false,
        };
        Access::Load(load, ended)
    }

    /// The slab as it is now, if it is ready.
    pub(super) fn slab(&self) -> Option<Arc<Slab>> {
        match &self.lock().state {
            State::Ready(slab) => Some(Arc::clone(slab)),
            State::Idle | State::Loading(_) => None,
        }
    }

    /// Whether the slab is ready.
    pub(super) fn is_ready(&self) -> bool {
        self.bytes.load(Ordering::Relaxed) > 0
    }

    /// Bytes of the slab, or of what has been read of it.
    pub(super) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed) + self.loading_bytes.load(Ordering::Relaxed)
    }

    /// Rows of the slab, 0 if it is not ready.
    pub(super) fn rows(&self) -> usize {
        self.rows.load(Ordering::Relaxed)
    }

    /// Takes in a row unless it is there or `is_deleted` says that its deletion came first.
    pub(super) fn insert(&self, id: PromptId, stored: Vec<u8>, is_deleted: impl FnOnce() -> bool) {
        // As in `remove`. The copy is let go of at once: while it is held, the change below would have to copy what it touches.
        let looked = match &*self.lock() {
            Inner {
                state: State::Ready(slab),
                insertions,
                ..
            } => Some((Arc::clone(slab), *insertions)),
            Inner { .. } => None,
        };
        let looked = looked.map(|(slab, insertions)| (slab.find(id).is_some(), insertions));
        let mut inner = self.lock();
        // Asked under the lock: a deletion is remembered before it is applied, so one that is not known yet
        // will find the row here.
        if is_deleted() {
            return;
        }
        let inner = &mut *inner;
        match &mut inner.state {
            State::Idle => {}
            State::Loading(changes) => changes.push(Change::Inserted(id, stored)),
            State::Ready(slab) => {
                let there = match looked {
                    Some((there, insertions)) if insertions == inner.insertions => there,
                    Some(_) | None => slab.find(id).is_some(),
                };
                if !there {
                    inner.insertions += 1;
                    Arc::make_mut(slab).extend(&[id], &stored);
                    self.measure(slab);
                }
            }
        }
    }

    /// Drops a row if it is there.
    pub(super) fn remove(&self, id: PromptId) {
        // Looking through a million ids takes some 0.3 ms, so it is done on a copy first, and only checked under the lock.
        let likely = self.slab().and_then(|slab| slab.find(id));
        match &mut self.lock().state {
            State::Idle => {}
            State::Loading(changes) => changes.push(Change::Deleted(id)),
            State::Ready(slab) => {
                remove(slab, id, likely);
                self.measure(slab);
            }
        }
    }

    /// Rows may have been committed of which nobody will report: what a load has read counts no more, it begins again.
    pub(super) fn doubt(&self) {
        self.lock().doubts += 1;
    }

    /// Forgets the ready slab, which is the caller's to drop, as what is not ready is forgotten by `doubt`.
    #[must_use = "dropping a large slab takes its time"]
    pub(super) fn take(&self) -> Option<Arc<Slab>> {
        let mut inner = self.lock();
        match std::mem::replace(&mut inner.state, State::Idle) {
            State::Ready(slab) => {
                self.bytes.store(0, Ordering::Relaxed);
                self.rows.store(0, Ordering::Relaxed);
                Some(slab)
            }
            other @ (State::Idle | State::Loading(_)) => {
                inner.state = other;
                None
            }
        }
    }

    fn measure(&self, slab: &Slab) {
        self.bytes.store(slab.bytes(), Ordering::Relaxed);
        self.rows.store(slab.n_rows(), Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock()
    }
}

impl Load {
    /// The cell it fills.
    pub(super) fn cell(&self) -> &Arc<Cell> {
        &self.cell
    }

    /// From here on changes are recorded. Call it before the first row is read, and again before all are read anew.
    pub(super) fn begin(&mut self) {
        let mut inner = self.cell.lock();
        inner.state = State::Loading(Vec::new());
        self.doubts = inner.doubts;
    }

    /// Notes how many bytes have been read.
    pub(super) fn note_bytes(&self, bytes: usize) {
        self.cell.loading_bytes.store(bytes, Ordering::Relaxed);
    }

    /// Applies what was recorded to the rows read, and makes them the cell's slab. `false` if the rows came into doubt since
    /// `begin`: then nothing is done, and they are to be read anew.
    pub(super) fn finish(&mut self, slab: Slab) -> bool {
        let mut inner = self.cell.lock();
        if inner.doubts != self.doubts {
            return false;
        }
        let mut slab = Arc::new(slab);
        if let State::Loading(changes) = std::mem::replace(&mut inner.state, State::Idle) {
            for change in changes {
                match change {
                    Change::Inserted(id, stored) => {
                        if slab.find(id).is_none() {
                            Arc::make_mut(&mut slab).extend(&[id], &stored);
                        }
                    }
                    Change::Deleted(id) => remove(&mut slab, id, None),
                }
            }
        }
        self.cell.loading_bytes.store(0, Ordering::Relaxed);
        self.cell.measure(&slab);
        inner.state = State::Ready(slab);
        inner.insertions += 1;
        inner.load = None;
        self.ended = true;
        true
    }

    /// Leaves the cell not loaded; the next caller tries again.
    pub(super) fn give_up(&mut self) {
        let mut inner = self.cell.lock();
        self.cell.loading_bytes.store(0, Ordering::Relaxed);
        inner.state = State::Idle;
        inner.load = None;
        self.ended = true;
    }

    /// Tells all who wait how it ended.
    pub(super) fn announce(self, outcome: Result<(), Arc<dyn Error + Send + Sync>>) {
        self.outcome.send_replace(Some(outcome));
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        if !self.ended {
            self.give_up();
        }
    }
}

fn remove(slab: &mut Arc<Slab>, id: PromptId, likely: Option<usize>) {
    let at = likely.filter(|at| slab.id(*at) == Some(id));
    if let Some(at) = at.or_else(|| slab.find(id)) {
        Arc::make_mut(slab).swap_remove(at);
    }
}
