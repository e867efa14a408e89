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
        let mut read = store.chat_call(user_id, id, READ_BYTES).await?;
        if let Some(ChatRead::Larger(bytes)) = read {
            memory.try_resize(bytes)?;
            read = store.chat_call(user_id, id, bytes).await?;
        }
        match read {
            Some(ChatRead::Whole(call)) => {
                memory.try_resize(call.text_bytes())?;
                Ok(*call)
            }
            // Its texts do not grow, so it was not read because it is gone.
            Some(ChatRead::Larger(_)) | None => Err(Error::NotFound),
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

    /// Replaces the labels of the user's chat call.
    ///
    /// # Errors
    /// `InvalidFields` if there are too many, or one is too long. `NotFound` if there is no such
    /// call, or it is another user's.
    pub async fn set_chat_labels(
        &self,
        user_id: UserId,
        id: PromptId,
        labels: BTreeMap<String, String>,
    ) -> Result<(), Error> {
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
        match store.set_chat_metadata(user_id, id, metadata).await? {
            true => Ok(()),
            false => Err(Error::NotFound),
        }
    }
}
