//! A slot for one slab, which is not loaded, being loaded, or ready.
//!
//! Changes that come while rows are being read are recorded and applied afterwards. A row can reach
//! a slab twice, by the reading and by its report, in either order. It is inserted once, because
//! every insertion looks for its id first.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use prompt_service_engine::scan::Slab;

use tokio::sync::watch;

use crate::domain::PromptId;

#[derive(Default)]
enum SlotState {
    /// No row is in memory, and changes need not be recorded: a later load reads them.
    #[default]
    Idle,
    /// Rows are being read. These changes have come since the reading began, in this order.
    Loading(Vec<Change>),
    /// All rows are in memory, and every change is applied.
    Ready(Arc<Slab>),
}

enum Change {
    Inserted(PromptId, Vec<u8>),
    Deleted(PromptId),
}

/// How a load ended, for all callers that wait for it; `None` until then.
pub(super) type LoadOutcome = Option<Result<(), Arc<dyn Error + Send + Sync>>>;

#[derive(Default)]
struct SlotInner {
    state: SlotState,
    /// Rows inserted into the ready slab. An id that was not found without the lock is still not
    /// there if this has not changed.
    insertions: u64,
    /// Calls of `invalidate`. A load during which this changes begins again.
    invalidations: u64,
    /// The load that is running or waits for its turn.
    load: Option<Arc<watch::Sender<LoadOutcome>>>,
}

/// A slab that may not be loaded yet.
#[derive(Default)]
pub(super) struct SlabSlot {
    inner: Mutex<SlotInner>,
    /// The size of the ready slab, otherwise 0.
    bytes: AtomicUsize,
    rows: AtomicUsize,
    /// The size of the rows that a load has read so far, otherwise 0.
    loading_bytes: AtomicUsize,
}

/// The result of asking for the slab.
pub(super) enum SlabAccess {
    /// The slab is ready.
    Ready(Arc<Slab>),
    /// Another caller loads it.
    Wait(watch::Receiver<LoadOutcome>),
    /// Nobody loads it: this caller must.
    Load(Load, watch::Receiver<LoadOutcome>),
}

/// A load, from before its turn until its end. If it is dropped without an end, the slot is not
/// loaded, and the closed channel notifies the callers that wait.
pub(super) struct Load {
    /// The slot that it fills.
    pub(super) slot: Arc<SlabSlot>,
    outcome: Arc<watch::Sender<LoadOutcome>>,
    invalidations: u64,
    ended: bool,
}

impl SlotInner {
    fn ready(&self) -> Option<Arc<Slab>> {
        match &self.state {
            SlotState::Ready(slab) => Some(Arc::clone(slab)),
            SlotState::Idle | SlotState::Loading(_) => None,
        }
    }
}

impl SlabSlot {
    /// The slab, or a way to wait for it.
    pub(super) fn access(self: &Arc<Self>) -> SlabAccess {
        let mut inner = self.inner.lock();
        if let Some(slab) = inner.ready() {
            return SlabAccess::Ready(slab);
        }
        if let Some(load) = &inner.load {
            return SlabAccess::Wait(load.subscribe());
        }
        let (outcome, ended) = watch::channel(None);
        let outcome = Arc::new(outcome);
        inner.load = Some(Arc::clone(&outcome));
        let load = Load {
            slot: Arc::clone(self),
            outcome,
            invalidations: inner.invalidations,
            ended: false,
        };
        SlabAccess::Load(load, ended)
    }

    /// The slab as it is now, if it is ready.
    pub(super) fn slab(&self) -> Option<Arc<Slab>> {
        self.inner.lock().ready()
    }

    /// Whether the slab is ready.
    pub(super) fn is_ready(&self) -> bool {
        self.bytes.load(Ordering::Relaxed) > 0
    }

    /// Bytes of the slab, or of the rows that have been read.
    pub(super) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed) + self.loading_bytes.load(Ordering::Relaxed)
    }

    /// Rows of the slab, 0 if it is not ready.
    pub(super) fn rows(&self) -> usize {
        self.rows.load(Ordering::Relaxed)
    }

    /// Inserts a row, unless it is there or `is_deleted` says that its deletion came first.
    pub(super) fn insert(&self, id: PromptId, stored: Vec<u8>, is_deleted: impl FnOnce() -> bool) {
        // As in `remove`. This reference is dropped at once: while it is held, the change below
        // would have to copy the parts that it changes.
        let looked = {
            let inner = self.inner.lock();
            inner.ready().map(|slab| (slab, inner.insertions))
        };
        let looked = looked.map(|(slab, insertions)| (slab.find(id.0).is_some(), insertions));
        let mut inner = self.inner.lock();
        // Under the lock: a deletion is remembered before it is applied, so a deletion that is not
        // known yet will find the row here.
        if is_deleted() {
            return;
        }
        let inner = &mut *inner;
        match &mut inner.state {
            SlotState::Idle => {}
            SlotState::Loading(changes) => changes.push(Change::Inserted(id, stored)),
            SlotState::Ready(slab) => {
                let there = match looked {
                    Some((there, insertions)) if insertions == inner.insertions => there,
                    Some(_) | None => slab.find(id.0).is_some(),
                };
                if !there {
                    inner.insertions += 1;
                    Arc::make_mut(slab).extend(&[id.0], &stored);
                    self.measure(slab);
                }
            }
        }
    }

    /// Removes a row if it is there.
    pub(super) fn remove(&self, id: PromptId) {
        // Looking through a million ids takes about 0.3 ms. So it is done without the lock first,
        // and only checked under the lock.
        let likely = self.slab().and_then(|slab| slab.find(id.0));
        match &mut self.inner.lock().state {
            SlotState::Idle => {}
            SlotState::Loading(changes) => changes.push(Change::Deleted(id)),
            SlotState::Ready(slab) => {
                remove(slab, id, likely);
                self.measure(slab);
            }
        }
    }

    /// Makes a running load begin again: rows may have been committed that will not be reported.
    pub(super) fn invalidate(&self) {
        self.inner.lock().invalidations += 1;
    }

    /// Takes the ready slab out, for the caller to drop. A load goes on.
    #[must_use = "dropping a large slab takes its time"]
    pub(super) fn take(&self) -> Option<Arc<Slab>> {
        let mut inner = self.inner.lock();
        let slab = inner.ready()?;
        inner.state = SlotState::Idle;
        self.bytes.store(0, Ordering::Relaxed);
        self.rows.store(0, Ordering::Relaxed);
        Some(slab)
    }

    fn measure(&self, slab: &Slab) {
        self.bytes.store(slab.bytes(), Ordering::Relaxed);
        self.rows.store(slab.n_rows(), Ordering::Relaxed);
    }
}

impl Load {
    /// Records changes from now on. Call it before the first row is read, and again before all rows
    /// are read again.
    pub(super) fn begin(&mut self) {
        let mut inner = self.slot.inner.lock();
        inner.state = SlotState::Loading(Vec::new());
        self.invalidations = inner.invalidations;
    }

    /// Notes how many bytes have been read.
    pub(super) fn note_bytes(&self, bytes: usize) {
        self.slot.loading_bytes.store(bytes, Ordering::Relaxed);
    }

    /// Applies the recorded changes to the rows, and makes them the slot's slab. Returns `false` if
    /// the slot was invalidated since `begin`: the rows must be read again then.
    pub(super) fn finish(&mut self, slab: Slab) -> bool {
        let mut inner = self.slot.inner.lock();
        if inner.invalidations != self.invalidations {
            return false;
        }
        let mut slab = Arc::new(slab);
        if let SlotState::Loading(changes) = std::mem::replace(&mut inner.state, SlotState::Idle) {
            for change in changes {
                match change {
                    Change::Inserted(id, stored) => {
                        if slab.find(id.0).is_none() {
                            Arc::make_mut(&mut slab).extend(&[id.0], &stored);
                        }
                    }
                    Change::Deleted(id) => remove(&mut slab, id, None),
                }
            }
        }
        self.slot.loading_bytes.store(0, Ordering::Relaxed);
        self.slot.measure(&slab);
        inner.state = SlotState::Ready(slab);
        inner.insertions += 1;
        inner.load = None;
        self.ended = true;
        true
    }

    /// Leaves the slot not loaded. The next caller tries again.
    pub(super) fn cancel(&mut self) {
        let mut inner = self.slot.inner.lock();
        self.slot.loading_bytes.store(0, Ordering::Relaxed);
        inner.state = SlotState::Idle;
        inner.load = None;
        self.ended = true;
    }

    /// Tells all callers that wait how the load ended.
    pub(super) fn announce(self, outcome: Result<(), Arc<dyn Error + Send + Sync>>) {
        self.outcome.send_replace(Some(outcome));
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        if !self.ended {
            self.cancel();
        }
    }
}

fn remove(slab: &mut Arc<Slab>, id: PromptId, likely: Option<usize>) {
    let at = likely.filter(|at| slab.id(*at) == Some(id.0));
    if let Some(at) = at.or_else(|| slab.find(id.0)) {
        Arc::make_mut(slab).swap_remove(at);
    }
}
