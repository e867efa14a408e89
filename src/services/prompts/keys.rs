//! Idempotency keys: which request a key stands for, and what a repeated one is told.

use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::live::Reader;
use super::{CreatePrompt, Created, Inner, Parts};
use crate::domain::Prompt;
use crate::error::{Error, KeyProblem};
use crate::memory_budget::Owner;
use crate::store::{KeyClaim, KeyState, KnownKey};

/// What the store knows a request's key by. Whether the answer is streamed is not part of a request's meaning: a client that lost a
/// stream may fetch the answer whole.
pub(super) fn claim(new: &CreatePrompt) -> Option<KeyClaim> {
    let key = new.key.as_ref()?;
    let mut meaning = Sha256::new();
    meaning.update([u8::from(new.announce)]);
    meaning.update(new.prompt.as_bytes());
    Some(KeyClaim {
        key_hash: Sha256::digest(key.as_bytes()).into(),
        fingerprint: meaning.finalize().into(),
    })
}

/// What is answered to a request whose key is known; `None` if it is to be served like a new one.
pub(super) async fn known(inner: &Inner, new: &CreatePrompt) -> Result<Option<Created>, Error> {
    let Some(claim) = claim(new) else {
        return Ok(None);
    };
    let parts = &inner.parts;
    let known = parts.call_store.known_key(new.user_id, &claim.key_hash);
    let Some(mut known) = known.await? else {
        return Ok(None);
    };
    if let KeyState::Lapsed(id) = known.state
        && inner.live().contains_key(&id)
    {
        // The store was away for longer than the lease, but the call is in this process's hands.
        known.state = KeyState::InFlight(id);
    }
    answer(parts, new.is_streamed, &claim, known)
}

/// The same of a key that the store has looked up already.
pub(super) fn answer(
    parts: &Parts,
    is_streamed: bool,
    claim: &KeyClaim,
    known: KnownKey,
) -> Result<Option<Created>, Error> {
    if known.fingerprint != claim.fingerprint {
        return Err(Error::IdempotencyKey(KeyProblem::OtherRequest));
    }
    match known.state {
        KeyState::Completed(prompt) => replay(parts, is_streamed, prompt).map(Some),
        KeyState::InFlight(_) => Err(Error::IdempotencyKey(KeyProblem::InFlight)),
        KeyState::Deleted => Err(Error::IdempotencyKey(KeyProblem::Deleted)),
        // Beginning takes its row over.
        KeyState::Lapsed(_) => Ok(None),
    }
}

/// Returns a stored answer as that of a repeated request. Nothing is paid for it, so it needs room
/// in the memory in flight.
fn replay(parts: &Parts, is_streamed: bool, prompt: Prompt) -> Result<Created, Error> {
    let owner = Owner::user(prompt.user_id);
    let memory = parts.memory.reserve(owner, prompt.text_bytes())?;
    parts.metrics.idempotent_replays.inc();
    Ok(if is_streamed {
        Created::Streaming {
            reader: Reader::stored(prompt, None, Arc::clone(&parts.store), memory),
            is_replayed: true,
        }
    } else {
        Created::Answered {
            prompt: prompt.into(),
            upstream: None,
            is_replayed: true,
        }
    })
}
