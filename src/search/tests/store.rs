//! The store that the tests' index reads.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Semaphore;

use super::super::Hit;
use super::naive_nearest;
use crate::domain::{Embedding, ModelId, Prompt, PromptId, UserId};
use crate::store::{
    Access, Claim, Coverage, DeletedPrompt, Error, PromptPage, PromptStore, PromptsRead, Stats,
    Unembedded, VectorCursor, VectorPage,
};

/// A store of vectors in memory. Tests can hold up its reads and make them fail.
pub struct Store {
    pub rows: Mutex<BTreeMap<(UserId, PromptId), Embedding>>,
    /// A permit for each page that may be read.
    pub gate: Semaphore,
    pub fail: AtomicBool,
    /// What every read returns, if it is given.
    pub damage: Mutex<Option<VectorPage>>,
    /// Pages whose reading has begun.
    pub pages_begun: AtomicUsize,
}

impl Store {
    /// A store whose reads are never held up.
    pub fn open() -> Arc<Self> {
        Self::with_gate(Semaphore::MAX_PERMITS)
    }

    /// A store whose reads wait for permits of `gate`.
    pub fn held_up() -> Arc<Self> {
        Self::with_gate(0)
    }

    fn with_gate(permits: usize) -> Arc<Self> {
        Arc::new(Self {
            rows: Mutex::default(),
            gate: Semaphore::new(permits),
            fail: AtomicBool::new(false),
            damage: Mutex::default(),
            pages_begun: AtomicUsize::new(0),
        })
    }

    pub fn insert(&self, user: UserId, id: PromptId, embedding: &Embedding) {
        self.rows
            .lock()
            .unwrap()
            .insert((user, id), embedding.clone());
    }

    pub fn delete(&self, user: UserId, id: PromptId) {
        self.rows.lock().unwrap().remove(&(user, id));
    }

    pub fn nearest(&self, owner: Option<UserId>, query: &Embedding, k: usize) -> Vec<Hit> {
        let rows = self.rows.lock().unwrap();
        let own = rows
            .iter()
            .filter(|((user, _), _)| owner.is_none_or(|owner| owner == *user));
        naive_nearest(own.map(|((_, id), row)| (*id, row)), query, k)
    }

    /// Waits until the reading of so many pages has begun.
    pub async fn wait_for_pages(&self, pages: usize) {
        let asked = async {
            while self.pages_begun.load(SeqCst) < pages {
                tokio::task::yield_now().await;
            }
        };
        let deadline = Duration::from_secs(30);
        tokio::time::timeout(deadline, asked)
            .await
            .expect("the pages are asked for");
    }
}

#[async_trait]
impl PromptStore for Store {
    async fn vectors(
        &self,
        _: &ModelId,
        owner: Option<UserId>,
        after: Option<VectorCursor>,
        limit: usize,
    ) -> Result<VectorPage, Error> {
        // Read first, then held up: the page is as old as it can be when it arrives.
        let page = {
            let rows = self.rows.lock().unwrap();
            let wanted = rows.iter().filter(|(key, _)| {
                owner.is_none_or(|owner| owner == key.0) && after.is_none_or(|after| after < **key)
            });
            let mut page = VectorPage::default();
            for (key, row) in wanted.take(limit) {
                page.ids.push(*key);
                page.f16_bytes.extend(row.to_f16_bytes());
            }
            page
        };
        self.pages_begun.fetch_add(1, SeqCst);
        self.gate.acquire().await.unwrap().forget();
        if self.fail.load(SeqCst) {
            return Err(Error::Unavailable("the store is unavailable".into()));
        }
        Ok(self.damage.lock().unwrap().clone().unwrap_or(page))
    }

    async fn has_room(&self, _: UserId, _: u32) -> Result<bool, Error> {
        unreachable!("an index only reads vectors")
    }

    async fn prompt(&self, _: UserId, _: PromptId) -> Result<Option<Prompt>, Error> {
        unreachable!("an index only reads vectors")
    }

    async fn list_prompts(
        &self,
        _: UserId,
        _: Option<PromptId>,
        _: usize,
        _: usize,
    ) -> Result<PromptPage, Error> {
        unreachable!("an index only reads vectors")
    }

    async fn prompts(
        &self,
        _: Option<UserId>,
        _: &[PromptId],
        _: usize,
    ) -> Result<PromptsRead, Error> {
        unreachable!("an index only reads vectors")
    }

    async fn delete_prompt(&self, _: UserId, _: PromptId) -> Result<Option<DeletedPrompt>, Error> {
        unreachable!("an index only reads vectors")
    }

    async fn coverage(&self, _: &ModelId, _: Option<UserId>) -> Result<Coverage, Error> {
        unreachable!("an index only reads vectors")
    }

    async fn unembedded(
        &self,
        _: &ModelId,
        _: Option<PromptId>,
        _: usize,
    ) -> Result<Vec<Unembedded>, Error> {
        unreachable!("an index only reads vectors")
    }

    async fn put_embeddings(
        &self,
        _: &ModelId,
        _: Vec<(PromptId, Embedding)>,
    ) -> Result<Vec<PromptId>, Error> {
        unreachable!("an index only reads vectors")
    }

    async fn claim_reembedding(&self) -> Result<Option<Claim>, Error> {
        unreachable!("an index only reads vectors")
    }

    async fn ping(&self) -> Result<Access, Error> {
        unreachable!("an index only reads vectors")
    }

    fn stats(&self) -> Stats {
        unreachable!("an index only reads vectors")
    }
}
