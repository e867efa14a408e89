//! Posting, listing, reading and deleting prompts.

use std::sync::Arc;
use std::time::Instant;

use tokio_util::task::TaskTracker;

use crate::domain::{ModelId, Prompt, PromptId, PromptStatus, Timestamp, UserId};
use crate::embed::{Class, Embedder, Permit};
use crate::error::Error;
use crate::llm;
use crate::realtime::Broker;
use crate::search::Similarity;
use crate::store::{NewPrompt, PromptStore};
use crate::telemetry::Metrics;

/// Writes the event that tells a user's sockets of a completed prompt. The wire form is the transport's to choose.
pub type EncodeCompleted = fn(&Prompt) -> Arc<str>;

/// A prompt that a user posts.
#[derive(Clone, Debug)]
pub struct CreatePrompt {
    /// Who posts it.
    pub user_id: UserId,
    /// The text: trimmed, not empty, without NUL.
    pub prompt: String,
    /// Whether the user's sockets are told.
    pub announce: bool,
    /// When the post was accepted.
    pub now: Timestamp,
}

/// What the use cases of prompts stand on.
pub struct Parts {
    /// Where prompts are kept.
    pub store: Arc<dyn PromptStore>,
    /// Makes their vectors.
    pub embedder: Arc<Embedder>,
    /// The model behind the embedder.
    pub model: ModelId,
    /// Finds them again.
    pub similarity: Arc<dyn Similarity>,
    /// Answers them.
    pub llm: Arc<llm::Client>,
    /// Tells open sockets.
    pub broker: Arc<dyn Broker>,
    /// Writes what they are told.
    pub encode_completed: EncodeCompleted,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// Tasks that shutdown waits for.
    pub tasks: TaskTracker,
}

/// The use cases of prompts.
#[derive(Clone)]
pub struct Prompts(Arc<Parts>);

impl Prompts {
    /// Puts the use cases on their parts.
    pub fn new(parts: Parts) -> Self {
        Self(Arc::new(parts))
    }

    /// Answers, embeds, stores and announces a prompt; it is durable and searchable when this returns.
    ///
    /// The work goes on in a task of its own: a caller that goes away, dropping this future, loses nothing that was begun.
    ///
    /// # Errors
    /// `Overloaded` at once if too many texts wait; nothing was begun then. Otherwise those of the store.
    pub async fn create(&self, new: CreatePrompt) -> Result<Prompt, Error> {
        let parts = &self.0;
        let permit = parts.embedder.admit(new.user_id, Class::Post)?;
        let call = parts
            .llm
            .admit()
            .map_err(|busy| Error::Overloaded(busy.retry_after))?;
        let run = run(Arc::clone(parts), permit, call, new);
        let task = parts.tasks.spawn(run);
        task.await.map_err(Error::internal)?
    }

    /// The user's prompt of that id.
    ///
    /// # Errors
    /// `NotFound` if there is none, or it is another user's.
    pub async fn get(&self, user_id: UserId, id: PromptId) -> Result<Prompt, Error> {
        self.0
            .store
            .prompt(user_id, id)
            .await?
            .ok_or(Error::NotFound)
    }

    /// Up to `limit` of the user's prompts older than `before`, newest first, and where the next page starts, if there is one.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn list(
        &self,
        user_id: UserId,
        before: Option<PromptId>,
        limit: usize,
    ) -> Result<(Vec<Prompt>, Option<PromptId>), Error> {
        // One more than asked for tells whether there is a next page.
        let mut page = self
            .0
            .store
            .list_prompts(user_id, before, limit + 1)
            .await?;
        let next = (page.len() > limit).then(|| page[limit - 1].id);
        page.truncate(limit);
        Ok((page, next))
    }

    /// Deletes the user's prompt; no search finds it when this returns.
    ///
    /// # Errors
    /// `NotFound` if there is none, or it is another user's.
    pub async fn delete(&self, user_id: UserId, id: PromptId) -> Result<(), Error> {
        let parts = Arc::clone(&self.0);
        // In a task, so that a caller going away cannot come between the store's commit and the index.
        let task = self.0.tasks.spawn(async move {
            let deleted = parts
                .store
                .delete_prompt(user_id, id)
                .await?
                .ok_or(Error::NotFound)?;
            if deleted.embedding_model.as_ref() == Some(&parts.model) {
                parts.similarity.deleted(user_id, id);
            }
            Ok(())
        });
        task.await.map_err(Error::internal)?
    }
}

async fn run(
    parts: Arc<Parts>,
    permit: Permit,
    call: llm::CallPermit,
    new: CreatePrompt,
) -> Result<Prompt, Error> {
    let (completion, embedding) = tokio::join!(
        parts.llm.complete(call, &new.prompt, None),
        embed(&parts, permit, new.prompt.clone()),
    );
    let completion = completion.map_err(Error::unavailable)?;
    let embedding = embedding?;
    let prompt = parts
        .store
        .insert_prompt(NewPrompt {
            user_id: new.user_id,
            prompt: new.prompt,
            response: Some(completion.text),
            model: completion.model,
            status: PromptStatus::Completed,
            error: None,
            finish_reason: None,
            created_at: new.now,
            llm_duration_ms: Some(
                u32::try_from(completion.upstream_duration.as_millis()).unwrap_or(u32::MAX),
            ),
            prompt_tokens: completion.prompt_tokens,
            completion_tokens: completion.completion_tokens,
            embedding: Some((parts.model.clone(), embedding.clone())),
        })
        .await?;
    parts
        .similarity
        .inserted(prompt.user_id, prompt.id, &embedding);
    parts
        .metrics
        .prompts
        .with_label_values(&[prompt.status.as_str()])
        .inc();
    if new.announce {
        parts
            .broker
            .publish(prompt.user_id, (parts.encode_completed)(&prompt));
    }
    Ok(prompt)
}

async fn embed(
    parts: &Parts,
    permit: Permit,
    text: String,
) -> Result<crate::domain::Embedding, Error> {
    let started = Instant::now();
    let embedding = parts.embedder.embed(permit, text.into()).await?;
    parts
        .metrics
        .embedding_duration
        .with_label_values(&["post"])
        .observe(started.elapsed().as_secs_f64());
    Ok(embedding)
}
