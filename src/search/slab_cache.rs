//! The slabs in memory. The least recently used ones are evicted when the budget is exceeded.

use std::sync::Arc;

use parking_lot::Mutex;

use hashlink::{LinkedHashMap, LinkedHashSet};

use super::IndexStatus;
use super::slot::SlabSlot;
use crate::domain::{PromptId, UserId};

/// Whose rows a slab holds; `None` means everybody's.
pub(super) type SlabOwner = Option<UserId>;

/// Bytes that a slab takes beside its rows: the slot, its entry in the map, and the headers of the
/// allocations.
const OVERHEAD_BYTES: usize = 512;

/// Slabs up to this size are freed at once: returning so much to the system takes about 50 µs.
const DROPPED_IN_PLACE_BYTES: usize = 1 << 20;

/// The slabs in memory, by owner.
pub(super) struct SlabCache {
    budget_bytes: usize,
    inner: Mutex<CacheInner>,
}

#[derive(Default)]
struct CacheInner {
    /// The owner that searched last comes last.
    slots: LinkedHashMap<SlabOwner, CachedSlot>,
    bytes: usize,
    rows: usize,
    evictions: u64,
}

struct CachedSlot {
    slot: Arc<SlabSlot>,
    /// As counted in the sums.
    bytes: usize,
    rows: usize,
}

impl SlabCache {
    /// Keeps at most `budget_bytes`, or the slab that was used last and those that are being loaded
    /// if they are larger.
    pub(super) fn new(budget_bytes: usize) -> Self {
        Self {
            budget_bytes,
            inner: Mutex::default(),
        }
    }

    /// The owner's slot, created if there is none. It is the most recently used one from now on.
    pub(super) fn touch(&self, owner: SlabOwner) -> Arc<SlabSlot> {
        let mut inner = self.inner.lock();
        if let Some(cached) = inner.slots.to_back(&owner) {
            return Arc::clone(&cached.slot);
        }
        let slot = Arc::new(SlabSlot::default());
        let cached = CachedSlot {
            slot: Arc::clone(&slot),
            bytes: OVERHEAD_BYTES,
            rows: 0,
        };
        inner.slots.insert(owner, cached);
        inner.bytes += OVERHEAD_BYTES;
        slot
    }

    /// The owner's slot, if there is one. A change needs no slot: the rows of a new slot are read
    /// after it.
    pub(super) fn get(&self, owner: SlabOwner) -> Option<Arc<SlabSlot>> {
        let inner = self.inner.lock();
        Some(Arc::clone(&inner.slots.get(&owner)?.slot))
    }

    /// Counts the size that a slot has now, and evicts slabs until the budget is kept.
    pub(super) fn account(&self, owner: SlabOwner, slot: &Arc<SlabSlot>) {
        let mut evicted = Vec::new();
        let mut guard = self.inner.lock();
        guard.recount(owner, slot);
        while guard.bytes > self.budget_bytes
            && guard.slots.len() > 1
            && let Some(victim) = guard.oldest_evictable()
        {
            evicted.extend(guard.remove(victim));
        }
        drop(guard);
        // After the lock, because freeing thousands of pieces takes time. A scan keeps its slab
        // until it ends.
        let bytes = evicted.iter().map(|slot| slot.bytes()).sum();
        drop_aside(evicted, bytes);
    }

    /// What the slabs in memory hold, without the state of loading.
    pub(super) fn totals(&self) -> IndexStatus {
        let inner = self.inner.lock();
        IndexStatus {
            slabs: inner.slots.len() as u64,
            rows: inner.rows as u64,
            bytes: inner.bytes as u64,
            evictions: inner.evictions,
            ..IndexStatus::default()
        }
    }
}

impl CacheInner {
    fn recount(&mut self, owner: SlabOwner, slot: &Arc<SlabSlot>) {
        // A caller may still write to a slot that has been evicted, which is not counted any more.
        if let Some(cached) = self.slots.get_mut(&owner)
            && Arc::ptr_eq(&cached.slot, slot)
        {
            let (bytes, rows) = (OVERHEAD_BYTES + slot.bytes(), slot.rows());
            self.bytes = self.bytes - cached.bytes + bytes;
            self.rows = self.rows - cached.rows + rows;
            (cached.bytes, cached.rows) = (bytes, rows);
        }
    }

    /// The least recently used owner whose slot is ready, or not ready and not in use. A slot that
    /// is being loaded must stay where changes find it. The most recently used one stays too.
    fn oldest_evictable(&self) -> Option<SlabOwner> {
        self.slots
            .iter()
            .take(self.slots.len().saturating_sub(1))
            .find(|(_, cached)| cached.slot.is_ready() || Arc::strong_count(&cached.slot) == 1)
            .map(|(owner, _)| *owner)
    }

    fn remove(&mut self, owner: SlabOwner) -> Option<Arc<SlabSlot>> {
        let cached = self.slots.remove(&owner)?;
        self.bytes -= cached.bytes;
        self.rows -= cached.rows;
        if cached.bytes > OVERHEAD_BYTES {
            self.evictions += 1;
        }
        Some(cached.slot)
    }
}

/// Drops a value that holds `bytes` of slabs, on a blocking thread if that takes long.
pub(super) fn drop_aside<T: Send + 'static>(slabs: T, bytes: usize) {
    match tokio::runtime::Handle::try_current() {
        Ok(runtime) if bytes > DROPPED_IN_PLACE_BYTES => {
            runtime.spawn_blocking(move || drop(slabs));
        }
        Ok(_) | Err(_) => drop(slabs),
    }
}

/// The latest deletions: a row is not inserted if its deletion was reported before its insertion.
///
/// The two reports of a row come from different requests. The report of an insertion comes at most
/// a scheduling delay after its commit. So it is enough to remember as many deletions as can happen
/// in that time.
#[derive(Default)]
pub(super) struct RecentDeletions(LinkedHashSet<PromptId>);

impl RecentDeletions {
    /// The deletions of a minute at 1,000 a second; about 2 MB when full.
    const CAPACITY: usize = 65_536;

    pub(super) fn insert(&mut self, id: PromptId) {
        self.0.insert(id);
        if self.0.len() > Self::CAPACITY {
            self.0.pop_front();
        }
    }

    pub(super) fn contains(&self, id: PromptId) -> bool {
        self.0.contains(&id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_latest_deletions_are_remembered() {
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
