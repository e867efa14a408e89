//! The lines' JSON, as it is written.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;

use super::{FORMAT, VERSION};
use crate::domain::{LastIds, PromptRecord, Timestamp, User};

/// Any line.
#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum Wire {
    Header(WireHeader),
    User(WireUser),
    Prompt(WirePrompt),
}

#[derive(Serialize)]
pub(super) struct WireHeader {
    format: &'static str,
    version: u32,
    exported_at: String,
    last_user_id: i64,
    last_prompt_id: i64,
}

#[derive(Serialize)]
pub(super) struct WireUser {
    id: i64,
    username: String,
    email: String,
    is_active: bool,
    created_at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    tokens_valid_from: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    password_hash: Option<String>,
}

#[derive(Serialize)]
pub(super) struct WirePrompt {
    id: i64,
    user_id: i64,
    prompt: String,
    response: Option<String>,
    model: String,
    status: &'static str,
    error: Option<&'static str>,
    created_at: String,
    llm_duration_ms: Option<u32>,
    prompt_tokens: Option<u32>,
    completion_tokens: Option<u32>,
    finish_reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    embedding: Option<WireEmbedding>,
}

#[derive(Serialize)]
struct WireEmbedding {
    model: String,
    f16: String,
}

impl WireHeader {
    pub fn new(last: LastIds, now: Timestamp) -> Self {
        Self {
            format: FORMAT,
            version: VERSION,
            exported_at: now.to_string(),
            last_user_id: last.user.0,
            last_prompt_id: last.prompt.0,
        }
    }
}

impl WireUser {
    pub fn new(user: &User, with_password_hash: bool) -> Self {
        Self {
            id: user.id.0,
            username: user.username.clone(),
            email: user.email.clone(),
            is_active: user.is_active,
            created_at: user.created_at.to_string(),
            tokens_valid_from: (user.tokens_valid_from != Timestamp(0))
                .then(|| user.tokens_valid_from.to_string()),
            password_hash: with_password_hash.then(|| user.password_hash.clone()),
        }
    }
}

impl WirePrompt {
    pub fn new(record: &PromptRecord, with_embedding: bool) -> Self {
        let prompt = &record.prompt;
        let vector = record.vector.as_ref().filter(|_| with_embedding);
        Self {
            id: prompt.id.0,
            user_id: prompt.user_id.0,
            prompt: prompt.prompt.clone(),
            response: prompt.response.clone(),
            model: prompt.model.clone(),
            status: prompt.status.as_str(),
            error: prompt.error.map(|code| code.as_str()),
            created_at: prompt.created_at.to_string(),
            llm_duration_ms: prompt.call.duration_ms,
            prompt_tokens: prompt.call.prompt_tokens,
            completion_tokens: prompt.call.completion_tokens,
            finish_reason: prompt.call.finish_reason.clone(),
            embedding: vector.map(|vector| WireEmbedding {
                model: vector.model.to_string(),
                f16: STANDARD.encode(&vector.f16_bytes),
            }),
        }
    }
}
