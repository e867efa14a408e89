//! Idempotency keys: which request a key belongs to, and the response to a repeated request.

use std::sync::Arc;

use bytes::Bytes;
use sha2::{Digest, Sha256};

use super::stream::StreamReader;
use super::{CreatePrompt, Created, Inner, Post, Prompts, READ_BYTES};
use crate::domain::PromptId;
use crate::error::{Error, KeyProblem};
use crate::memory_budget::{Owner, Reservation};
use crate::store::{KeyClaim, KeyState};

/// The key of a request as the store knows it. The fingerprint leaves out whether the answer is
/// streamed: a client whose stream broke may repeat the request to get the answer whole.
pub(super) fn claim(new: &CreatePrompt) -> Option<KeyClaim> {
    let key = new.key.as_ref()?;
    let mut fingerprint = Sha256::new();
    fingerprint.update([u8::from(new.announce)]);
    match &new.post {
        Post::Prompt(text) => fingerprint.update(text.as_bytes()),
        Post::Chat(chat) => {
            // No prompt begins with NUL, so the two kinds of posts have no fingerprint in common.
            fingerprint.update([0]);
            fingerprint.update(chat.fingerprint);
        }
    }
    Some(KeyClaim {
        key_hash: Sha256::digest(key.as_bytes()).into(),
        fingerprint: fingerprint.finalize().into(),
    })
}

impl Prompts {
    /// The response to a post whose idempotency key was claimed before; `None` if the post has no
    /// key, or is to be served as a new one.
    ///
    /// # Errors
    /// `IdempotencyKey`, and those of the store.
    pub async fn replay(&self, new: &CreatePrompt) -> Result<Option<Created>, Error> {
        let Some(claim) = claim(new) else {
            return Ok(None);
        };
        let inner = &self.0;
        let state = inner.deps.call_store.key_state(new.user_id, &claim).await?;
        match state {
            // While the store is unavailable for longer than a lease, this process's own calls look
            // expired.
            Some(KeyState::Expired(id)) if inner.streams.lock().contains_key(&id) => {
                Err(Error::IdempotencyKey(KeyProblem::InFlight))
            }
            // Beginning takes its row over.
            Some(KeyState::Expired(_)) | None => Ok(None),
            Some(state) => respond(inner, new, state).await.map(Some),
        }
    }
}

/// The response to a request whose key is in that state.
pub(super) async fn respond(
    inner: &Arc<Inner>,
    new: &CreatePrompt,
    state: KeyState,
) -> Result<Created, Error> {
    match state {
        KeyState::Completed(id) => completed(inner, new, id).await,
        // Beginning takes an expired call over, so one that is returned here expired at this very
        // moment; a retry takes it over.
        KeyState::InFlight(_) | KeyState::Expired(_) => {
            Err(Error::IdempotencyKey(KeyProblem::InFlight))
        }
        KeyState::OtherRequest => Err(Error::IdempotencyKey(KeyProblem::OtherRequest)),
        KeyState::Deleted => Err(Error::IdempotencyKey(KeyProblem::Deleted)),
    }
}

/// The stored answer as the response to a repeated request. Nothing is paid for it, so it needs
/// room in the memory budget.
async fn completed(inner: &Arc<Inner>, new: &CreatePrompt, id: PromptId) -> Result<Created, Error> {
    let deps = &inner.deps;
    let mut memory = deps.memory.reserve(Owner::user(new.user_id), READ_BYTES)?;
    let prompts = Prompts(Arc::clone(inner));
    let prompt = prompts.get(new.user_id, id, &mut memory).await;
    if let Err(Error::NotFound) = prompt {
        return Err(Error::IdempotencyKey(KeyProblem::Deleted));
    }
    let prompt = prompt?;
    let answer = match &new.post {
        Post::Prompt(_) => None,
        Post::Chat(_) => Some(chat_answer(inner, new, id, &mut memory).await?),
    };
    deps.metrics.idempotent_replays.inc();
    if new.is_streamed && answer.is_none() {
        return Ok(Created::Streaming {
            reader: StreamReader::stored(prompt, None, Arc::clone(&deps.store), memory),
            is_replayed: true,
        });
    }
    Ok(Created::Answered {
        prompt: prompt.into(),
        answer,
        upstream: None,
        is_replayed: true,
    })
}

/// The stored answer to a chat call.
async fn chat_answer(
    inner: &Arc<Inner>,
    new: &CreatePrompt,
    id: PromptId,
    memory: &mut Reservation,
) -> Result<Bytes, Error> {
    let prompts = Prompts(Arc::clone(inner));
    let call = prompts.chat_call(new.user_id, id, memory).await;
    let deleted = || Error::IdempotencyKey(KeyProblem::Deleted);
    match call {
        Ok(call) => Ok(call.texts.answer.ok_or_else(deleted)?.into()),
        Err(Error::NotFound) => Err(deleted()),
        Err(error) => Err(error),
    }
}
