//! Prompts that were stored without a vector get one while the service runs.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use prompt_service::domain::{Embedding, PromptId, UserId};
use prompt_service::embed::{BackgroundEmbedder, Encode};
use prompt_service::search::{Error, Hit, IndexStatus, Similarity};
use prompt_service::services::reembedding::{Reembedding, ReembeddingProgress};
use prompt_service::telemetry::Metrics;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::store::{InsertPrompt, completed, model, new_user, vector};
use crate::support::Folder;

/// A model that gives every text the same vector.
struct Constant;

impl Encode for Constant {
    type Scratch = ();

    fn scratch(&self) {}

    fn tokenize(&self, _: &str) -> Vec<u32> {
        vec![1]
    }

    fn embed(&self, batch: &[&[u32]], (): &mut ()) -> Vec<Embedding> {
        batch.iter().map(|_| vector(1)).collect()
    }
}

/// An index that remembers the inserted prompts.
#[derive(Default)]
struct InsertedIds(Mutex<Vec<PromptId>>);

#[async_trait]
impl Similarity for InsertedIds {
    async fn nearest(&self, _: UserId, _: &Embedding, _: usize) -> Result<Vec<Hit>, Error> {
        Ok(Vec::new())
    }

    fn inserted(&self, _: UserId, id: PromptId, _: &Embedding) {
        self.0.lock().unwrap().push(id);
    }

    fn deleted(&self, _: UserId, _: PromptId) {}

    fn invalidate(&self, _: UserId) {}

    fn status(&self) -> IndexStatus {
        IndexStatus::default()
    }

    async fn prepare(&self, _: CancellationToken) {}
}

#[tokio::test]
async fn a_prompt_stored_without_a_vector_gets_one_on_request() {
    let folder = Folder::new();
    let store = folder.store().await;
    let alice = store.create_user(new_user("alice")).await.unwrap().id;
    let index = Arc::<InsertedIds>::default();
    let progress = Arc::<ReembeddingProgress>::default();
    let work = Reembedding {
        store: folder.store().await,
        embedder: Arc::new(BackgroundEmbedder::start(Arc::new(Constant)).unwrap()),
        model: model("a"),
        similarity: Arc::clone(&index) as Arc<dyn Similarity>,
        progress: Arc::clone(&progress),
        metrics: Arc::new(Metrics::new()),
    };
    assert_eq!(work.plan().await.unwrap(), 0);
    let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
    let stopped = stop.clone();
    let running = tasks.spawn(async move { work.run(stopped).await });
    for n in 1..=2 {
        let id = store
            .insert_prompt(completed(alice, "late"))
            .await
            .unwrap()
            .id;
        progress.ask();
        // Searches know at once that they do not find every prompt.
        assert!(progress.is_running());
        eventually!(index.0.lock().unwrap().contains(&id));
        eventually!(!progress.is_running());
        let covered = store.coverage(&model("a"), None).await.unwrap();
        assert_eq!((covered.embedded, covered.completed), (n, n));
    }
    stop.cancel();
    running.await.unwrap();
}
