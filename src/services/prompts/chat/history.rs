//! Stored chat calls: reading, listing and labelling them. They are deleted like any prompt.

use std::collections::BTreeMap;

use serde_json::json;

use super::texts::{is_label, may_have_labels};
use crate::domain::{PromptId, UserId};
use crate::error::Error;
use crate::memory_budget::Reservation;
use crate::services::prompts::{Prompts, READ_BYTES};
use crate::store::{ChatCall, ChatFilter, ChatPage, ChatRead};

impl Prompts {
    /// The user's answered chat call of that id. `memory` has at least [`READ_BYTES`]; from now on
    /// it accounts for the call's texts.
    ///
    /// # Errors
    /// `NotFound` if there is none, or it is another user's; `Overloaded` if there is no memory for
    /// its texts.
    pub async fn chat_call(
        &self,
        user_id: UserId,
        id: PromptId,
        memory: &mut Reservation,
    ) -> Result<ChatCall, Error> {
        let store = &self.0.deps.chat_store;
        let mut most = READ_BYTES;
        loop {
            match store.chat_call(user_id, id, most).await? {
                Some(ChatRead::Whole(call)) => {
                    memory.resize(call.text_bytes());
                    return Ok(*call);
                }
                // Other labels may make it larger again before the next reading.
                Some(ChatRead::Larger(bytes)) => {
                    memory.try_resize_any(bytes)?;
                    most = bytes;
                }
                None => return Err(Error::NotFound),
            }
        }
    }

    /// Deletes the user's answered chat call of that id. Its texts are not read.
    ///
    /// # Errors
    /// `NotFound` if there is none, or it is another user's, or a prompt of the other front door.
    pub async fn delete_chat_call(&self, user_id: UserId, id: PromptId) -> Result<(), Error> {
        let found = self.0.deps.chat_store.chat_call(user_id, id, 0).await?;
        match found {
            Some(ChatRead::Whole(_) | ChatRead::Larger(_)) => self.delete(user_id, id).await,
            None => Err(Error::NotFound),
        }
    }

    /// Up to `limit` of the user's answered chat calls that pass the filter. Stops before their
    /// texts exceed `text_bytes` together, but returns at least one call.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn chat_calls(
        &self,
        user_id: UserId,
        filter: ChatFilter,
        limit: usize,
        text_bytes: usize,
    ) -> Result<ChatPage, Error> {
        let store = &self.0.deps.chat_store;
        Ok(store
            .list_chat_calls(user_id, filter, limit, text_bytes)
            .await?)
    }

    /// Replaces the labels of the user's chat call; returns their JSON.
    ///
    /// # Errors
    /// `InvalidFields` if there are too many, or one is too long. `NotFound` if there is no such
    /// call, or it is another user's.
    pub async fn set_chat_labels(
        &self,
        user_id: UserId,
        id: PromptId,
        labels: BTreeMap<String, String>,
    ) -> Result<String, Error> {
        let are_kept = may_have_labels(labels.len())
            && labels.iter().all(|(name, value)| is_label(name, value));
        if !are_kept {
            return Err(Error::field(
                "metadata",
                "At most 16 labels, names of at most 64 characters, values of at most 512.",
            ));
        }
        let store = &self.0.deps.chat_store;
        let metadata = json!(labels).to_string();
        let stored = metadata.clone();
        match store.set_chat_metadata(user_id, id, stored).await? {
            true => Ok(metadata),
            false => Err(Error::NotFound),
        }
    }
}
