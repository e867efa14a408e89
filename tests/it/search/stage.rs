//! Searches with an index that the test controls: how many may run at once, and how hits of deleted
//! prompts are replaced.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use async_trait::async_trait;
use prompt_service::config::SimilarScope;
use prompt_service::domain::{Embedding, ModelId, PromptId, UserId};
use prompt_service::embed::{Class, Embedder, EmbedderSettings, Encode};
use prompt_service::error::Error;
use prompt_service::fair_semaphore::FairSemaphore;
use prompt_service::memory_budget::{MemoryBudget, Owner};
use prompt_service::search::{self, Hit, IndexStatus, Similarity};
use prompt_service::services::reembedding::ReembeddingProgress;
use prompt_service::services::search::{Searches, Similar};
use prompt_service::telemetry::Metrics;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::delete;
use crate::store::{InsertPrompt, completed, user};
use crate::support::{Folder, spawn_app};

/// Gives every text the same vector.
struct OneVector;

impl Encode for OneVector {
    type Scratch = ();

    fn scratch(&self) {}

    fn tokenize(&self, _: &str) -> Vec<u32> {
        vec![0]
    }

    fn embed(&self, batch: &[&[u32]], (): &mut ()) -> Vec<Embedding> {
        batch
            .iter()
            .map(|_| Embedding([1.0].as_slice().into()))
            .collect()
    }
}

/// Returns a list, when the gate permits it.
struct Listed {
    ids: Vec<PromptId>,
    gate: Semaphore,
    asked: AtomicUsize,
}

impl Listed {
    fn new(ids: Vec<PromptId>, permits: usize) -> Arc<Self> {
        Arc::new(Self {
            ids,
            gate: Semaphore::new(permits),
            asked: AtomicUsize::new(0),
        })
    }
}

#[async_trait]
impl Similarity for Listed {
    async fn nearest(&self, _: UserId, _: &Embedding, k: usize) -> Result<Vec<Hit>, search::Error> {
        self.asked.fetch_add(1, SeqCst);
        self.gate.acquire().await.unwrap().forget();
        let nearest = self.ids.iter().take(k);
        Ok(nearest
            .map(|id| Hit {
                id: *id,
                score: 0.5,
            })
            .collect())
    }

    fn inserted(&self, _: UserId, _: PromptId, _: &Embedding) {}

    fn deleted(&self, _: UserId, _: PromptId) {}

    fn invalidate(&self, _: UserId) {}

    fn status(&self) -> IndexStatus {
        IndexStatus::default()
    }

    async fn prepare(&self, _: CancellationToken) {}
}

/// Searches on the folder's store, with permits for eight texts: six for searches, three of them
/// for one user.
async fn searches(folder: &Folder, similarity: &Arc<Listed>) -> Arc<Searches> {
    let settings = EmbedderSettings {
        workers: 1,
        capacity: 8,
        ..EmbedderSettings::default()
    };
    Arc::new(Searches {
        reads: FairSemaphore::new(16, 1024),
        memory: MemoryBudget::new(64 << 20),
        store: folder.store().await,
        embedder: Arc::new(
            Embedder::start(Arc::new(OneVector), &settings, Arc::default()).unwrap(),
        ),
        model: ModelId(Arc::from("one-vector")),
        similarity: Arc::clone(similarity) as _,
        scope: SimilarScope::Own,
        reembedding: Arc::new(ReembeddingProgress::default()),
        metrics: Arc::new(Metrics::new()),
    })
}

type Searching = JoinSet<Result<Similar, Error>>;

fn search(tasks: &mut Searching, searches: &Arc<Searches>, user: i64) {
    let searches = Arc::clone(searches);
    tasks.spawn(async move {
        searches
            .similar(UserId(user), Owner::default(), "a query".to_owned(), 5)
            .await
    });
}

#[tokio::test]
async fn waiting_searches_keep_their_permits_and_further_ones_are_refused_at_once() {
    let folder = Folder::new();
    let index = Listed::new(Vec::new(), 0);
    let searches = searches(&folder, &index).await;
    let mut tasks = Searching::new();
    let mut waiting = 0;
    for caller in [1, 2] {
        // The first of a user comes from the model, the others from the cache.
        for _ in 0..3 {
            search(&mut tasks, &searches, caller);
            waiting += 1;
            eventually!(index.asked.load(SeqCst) == waiting);
        }
        // The user has no more permits.
        let refused = searches.similar(UserId(caller), Owner::default(), "a query".to_owned(), 5);
        assert!(matches!(refused.await, Err(Error::Overloaded(_))));
    }
    // No user has more permits for searches, but there are some for posts.
    let refused = searches.similar(UserId(3), Owner::default(), "a query".to_owned(), 5);
    assert!(matches!(refused.await, Err(Error::Overloaded(_))));
    for caller in [1, 3] {
        let post = searches.embedder.admit(UserId(caller), Class::Post);
        assert!(post.is_ok(), "{caller}");
    }
    // The permit of a caller that leaves goes to the next.
    tasks.abort_all();
    while tasks.join_next().await.is_some() {}
    assert_eq!(searches.embedder.admitted(), 0);
    index.gate.add_permits(1);
    search(&mut tasks, &searches, 1);
    assert!(tasks.join_next().await.unwrap().unwrap().is_ok());
    assert_eq!(searches.embedder.admitted(), 0);
}

#[tokio::test]
async fn hits_of_deleted_prompts_are_replaced_however_many_they_are() {
    let folder = Folder::new();
    let store = folder.store().await;
    let alice = user(&*store, "alice").await.id;
    let mut ids = Vec::new();
    for n in 0..10 {
        let prompt = completed(alice, &format!("prompt {n}"));
        ids.push(store.insert_prompt(prompt).await.unwrap().id);
    }
    // Prompts that the index has and the store has not: one before each stored prompt, and 40
    // before all of them.
    let gone = |n: i64| PromptId(1_000_000 + n);
    let mixed = ids.iter().flat_map(|id| [gone(id.0), *id]);
    for index in [
        mixed.clone().collect::<Vec<_>>(),
        (0..40).map(gone).chain(mixed).collect(),
    ] {
        let index = Listed::new(index, Semaphore::MAX_PERMITS);
        let searches = searches(&folder, &index).await;
        for (k, expected) in [(1, 1), (5, 5), (10, 10), (100, 10)] {
            let found = searches
                .similar(alice, Owner::default(), "a query".to_owned(), k)
                .await;
            let found = found.unwrap().results.into_iter();
            let found: Vec<PromptId> = found.map(|(prompt, _)| prompt.id).collect();
            assert_eq!(found, ids[..expected], "k = {k}");
        }
    }
}

#[tokio::test]
async fn a_search_beside_deletions_finds_as_many_as_requested() {
    const KEPT: usize = 12;
    let app = spawn_app(|_| ()).await;
    let user = Arc::new(app.user("alice").await);
    let mut ids = Vec::new();
    for n in 0..3 * KEPT {
        ids.push(user.prompt(&format!("prompt number {n}")).await);
    }
    let doomed = ids.split_off(KEPT);
    let mut deletions = JoinSet::new();
    for some in doomed.chunks(KEPT) {
        let (user, some) = (Arc::clone(&user), some.to_vec());
        deletions.spawn(async move {
            for id in some {
                delete(&user, id).await;
            }
        });
    }
    loop {
        let over = deletions.is_empty();
        assert_eq!(user.similar("prompt number 1", KEPT).await.len(), KEPT);
        if over {
            break;
        }
        while deletions.try_join_next().is_some() {}
    }
    let mut left = user.similar("prompt number 1", 100).await;
    left.sort_unstable();
    assert_eq!(left, ids);
}
