//! Which slabs are in memory: the least recently used go when the budget is exceeded.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

use super::cell::Cell;
use crate::domain::{PromptId, UserId};

/// Whose rows a slab holds; `None` stands for everybody's.
pub(super) type Owner = Option<UserId>;

/// Bytes a slab costs beside its rows: the cell, its entries in the two maps, and the allocations' own headers.
const OVERHEAD_BYTES: usize = 512;

/// Slabs up to this size are freed where they are let go of: it takes some 50 µs to give so much back to the system.
const DROPPED_IN_PLACE_BYTES: usize = 1 << 20;

/// The slabs in memory, by owner.
pub(super) struct Residents {
    budget_bytes: usize,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    entries: HashMap<Owner, Entry>,
    /// Owners by when they last searched, oldest first.
    by_use: BTreeMap<u64, Owner>,
    next_use: u64,
    bytes: usize,
    rows: usize,
    evictions: u64,
}

struct Entry {
    cell: Arc<Cell>,
    used: u64,
    /// What is counted for it in the sums.
    bytes: usize,
    rows: usize,
}

/// Sums over the slabs in memory.
pub(super) struct Totals {
    pub(super) slabs: usize,
    pub(super) rows: usize,
    pub(super) bytes: usize,
    pub(super) evictions: u64,
}

impl Residents {
    /// Keeps at most `budget_bytes`, or the slab used last and those being loaded if they are larger.
    pub(super) fn new(budget_bytes: usize) -> Self {
        Self {
            budget_bytes,
            inner: Mutex::default(),
        }
    }

    /// The owner's cell, made if there is none, now the most recently used.
    pub(super) fn touch(&self, owner: Owner) -> Arc<Cell> {
        let mut guard = self.inner();
        let inner = &mut *guard;
        let used = inner.next_use;
        inner.next_use += 1;
        let entry = inner.entries.entry(owner).or_insert_with(|| {
            inner.bytes += OVERHEAD_BYTES;
            Entry {
                cell: Arc::new(Cell::new()),
                used,
                bytes: OVERHEAD_BYTES,
                rows: 0,
            }
        });
        inner.by_use.remove(&entry.used);
        inner.by_use.insert(used, owner);
        entry.used = used;
        Arc::clone(&entry.cell)
    }

    /// The owner's cell if there is one. A change that finds none needs no place: whoever makes one reads the rows afterwards.
    pub(super) fn get(&self, owner: Owner) -> Option<Arc<Cell>> {
        self.inner()
            .entries
            .get(&owner)
            .map(|entry| Arc::clone(&entry.cell))
    }

    /// Takes note of the size a cell has now, and evicts what exceeds the budget.
    pub(super) fn account(&self, owner: Owner, cell: &Arc<Cell>) {
        let mut evicted = Vec::new();
        let mut guard = self.inner();
        guard.recount(owner, cell);
        while guard.bytes > self.budget_bytes
            && guard.entries.len() > 1
            && let Some(victim) = guard.oldest_evictable()
        {
            evicted.extend(guard.remove(victim));
        }
        drop(guard);
        // Freeing thousands of pieces takes its time, so it comes after the lock. Scans that hold a slab keep it until they end.
        let bytes = evicted.iter().map(|cell| cell.bytes()).sum();
        drop_aside(evicted, bytes);
    }

    pub(super) fn totals(&self) -> Totals {
        let inner = self.inner();
        Totals {
            slabs: inner.entries.len(),
            rows: inner.rows,
            bytes: inner.bytes,
            evictions: inner.evictions,
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock()
    }
}

impl Inner {
    fn recount(&mut self, owner: Owner, cell: &Arc<Cell>) {
        // An evicted cell may still be written to by someone who got it earlier. It counts no more.
        if let Some(entry) = self.entries.get_mut(&owner)
            && Arc::ptr_eq(&entry.cell, cell)
        {
            let (bytes, rows) = (OVERHEAD_BYTES + cell.bytes(), cell.rows());
            self.bytes = self.bytes - entry.bytes + bytes;
            self.rows = self.rows - entry.rows + rows;
            (entry.bytes, entry.rows) = (bytes, rows);
        }
    }

    /// The least recently used owner whose cell is ready, or not ready and in nobody's hands. A cell that is being loaded
    /// must stay where changes find it.
    fn oldest_evictable(&self) -> Option<Owner> {
        let newest = self.by_use.last_key_value().map(|(_, owner)| *owner);
        self.by_use
            .values()
            .filter(|owner| Some(**owner) != newest)
            .find(|owner| {
                self.entries.get(owner).is_some_and(|entry| {
                    entry.cell.is_ready() || Arc::strong_count(&entry.cell) == 1
                })
            })
            .copied()
    }

    fn remove(&mut self, owner: Owner) -> Option<Arc<Cell>> {
        let entry = self.entries.remove(&owner)?;
        self.by_use.remove(&entry.used);
        self.bytes -= entry.bytes;
        self.rows -= entry.rows;
        if entry.bytes > OVERHEAD_BYTES {
            self.evictions += 1;
        }
        Some(entry.cell)
    }
}

/// Drops what holds `bytes` of slabs, on a blocking thread if that takes long.
pub(super) fn drop_aside<T: Send + 'static>(slabs: T, bytes: usize) {
    match tokio::runtime::Handle::try_current() {
        Ok(runtime) if bytes > DROPPED_IN_PLACE_BYTES => {
            runtime.spawn_blocking(move || drop(slabs));
        }
        Ok(_) | Err(_) => drop(slabs),
    }
}

/// The latest deletions, so that one reported before its row's insertion cancels it.
///
/// The two reports of a row come from different requests. The insertion's is at most a scheduling delay behind its commit, so it
/// suffices to remember as many deletions as can happen in between.
#[derive(Default)]
pub(super) struct RecentDeletions {
    ids: HashSet<PromptId>,
    order: VecDeque<PromptId>,
}

impl RecentDeletions {
    /// At 1,000 deletions a second, a minute's worth; some 2 MB when full.
    const CAPACITY: usize = 65_536;

    pub(super) fn insert(&mut self, id: PromptId) {
        if self.ids.insert(id) {
            self.order.push_back(id);
            if self.order.len() > Self::CAPACITY
                && let Some(oldest) = self.order.pop_front()
            {
                self.ids.remove(&oldest);
            }
        }
    }

    pub(super) fn contains(&self, id: PromptId) -> bool {
        self.ids.contains(&id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_so_many_deletions_are_remembered_the_latest() {
        let mut deletions = RecentDeletions::default();
        let last = RecentDeletions::CAPACITY as i64 + 10;
        for id in 1..=last {
            deletions.insert(PromptId(id));
            deletions.insert(PromptId(id));
        }
        assert!(!deletions.contains(PromptId(10)));
        assert!(deletions.contains(PromptId(11)));
        assert!(deletions.contains(PromptId(last)));
    }
}
