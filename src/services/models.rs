//! The models that callers can ask.

use std::sync::Arc;
use std::time::SystemTime;

use crate::llm;

/// A model that this service serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServedModel {
    /// Its name.
    pub id: String,
    /// When it was made, in seconds since 1970, if that is known.
    pub created: Option<u64>,
    /// Who has made it, or the upstream that serves it.
    pub owned_by: String,
    /// When it ends, if that is known.
    pub shutdown: Option<SystemTime>,
}

/// Lists models.
pub struct Models {
    /// The upstreams.
    pub llm: Arc<llm::Client>,
    /// The name of the model that makes embeddings.
    pub embedding_model: String,
}

impl Models {
    /// The models of all upstreams, in the order of the configuration, then that of embeddings.
    pub async fn list(&self) -> Vec<ServedModel> {
        let listed = self.llm.models().await.into_iter();
        let mut models: Vec<_> = listed
            .map(|model| ServedModel {
                id: model.id,
                created: model.created,
                owned_by: model.owned_by.unwrap_or(model.upstream),
                shutdown: model.shutdown,
            })
            .collect();
        models.push(ServedModel {
            id: self.embedding_model.clone(),
            created: None,
            owned_by: "prompt-service".to_owned(),
            shutdown: None,
        });
        models
    }
}
