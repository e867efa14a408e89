//! The lines' JSON, and what it means.

use std::sync::Arc;
use std::time::SystemTime;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use super::{FORMAT, MAX_ID, NO_PASSWORD, Record, VERSION};
use crate::domain::{
    CallDetails, FailureCode, LastIds, ModelId, Prompt, PromptId, PromptRecord, PromptStatus,
    Timestamp, User, UserId, VectorRecord,
};

/// The model of an answer whose line does not name one.
const UNKNOWN_MODEL: &str = "unknown";

/// Any line.
#[derive(Deserialize, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum Wire {
    Header(WireHeader),
    User(WireUser),
    Prompt(WirePrompt),
}

#[derive(Deserialize, Serialize)]
pub(super) struct WireHeader {
    pub format: String,
    pub version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    exported_at: Option<String>,
    #[serde(default)]
    last_user_id: i64,
    #[serde(default)]
    last_prompt_id: i64,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WireUser {
    id: i64,
    username: String,
    #[serde(default)]
    email: String,
    #[serde(default = "yes")]
    is_active: bool,
    created_at: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tokens_valid_from: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    password_hash: Option<String>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WirePrompt {
    id: i64,
    user_id: i64,
    prompt: String,
    #[serde(default)]
    response: Option<String>,
    #[serde(default = "unknown_model")]
    model: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    status: Option<String>,
    #[serde(default)]
    error: Option<String>,
    created_at: String,
    #[serde(default)]
    llm_duration_ms: Option<u32>,
    #[serde(default)]
    prompt_tokens: Option<u32>,
    #[serde(default)]
    completion_tokens: Option<u32>,
    #[serde(default)]
    finish_reason: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    embedding: Option<WireEmbedding>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct WireEmbedding {
    model: String,
    f16: String,
}

fn yes() -> bool {
    true
}

fn unknown_model() -> String {
    UNKNOWN_MODEL.to_owned()
}

impl WireHeader {
    pub fn new(last: LastIds, now: Timestamp) -> Self {
        Self {
            format: FORMAT.to_owned(),
            version: VERSION,
            exported_at: Some(now.to_string()),
            last_user_id: last.user.0,
            last_prompt_id: last.prompt.0,
        }
    }

    /// `None` if they are none.
    pub fn last_ids(&self) -> Option<LastIds> {
        let is_id = |id: i64| (0..=MAX_ID).contains(&id);
        (is_id(self.last_user_id) && is_id(self.last_prompt_id)).then_some(LastIds {
            user: UserId(self.last_user_id),
            prompt: PromptId(self.last_prompt_id),
        })
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

    /// Errors: the field that says nothing this program understands.
    pub fn record(self) -> Result<Record, &'static str> {
        let since = self.tokens_valid_from.as_deref().map(time).transpose();
        Ok(Record::User(User {
            id: UserId(self.id),
            username: self.username,
            email: self.email,
            password_hash: self.password_hash.unwrap_or_else(|| NO_PASSWORD.to_owned()),
            is_active: self.is_active,
            tokens_valid_from: since
                .map_err(|()| "tokens_valid_from")?
                .unwrap_or(Timestamp(0)),
            created_at: time(&self.created_at).map_err(|()| "created_at")?,
        }))
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
            status: Some(prompt.status.as_str().to_owned()),
            error: prompt.error.map(|code| code.as_str().to_owned()),
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

    /// Errors: the field that says nothing this program understands.
    pub fn record(self) -> Result<Record, &'static str> {
        let status = match &self.status {
            Some(word) => PromptStatus::parse(word).ok_or("status")?,
            None if self.response.is_some() => PromptStatus::Completed,
            None => PromptStatus::Failed,
        };
        let code = self
            .error
            .map(|word| FailureCode::parse(&word).ok_or("error"));
        let embedding = self.embedding.map(|embedding| -> Result<_, &str> {
            let bytes = STANDARD.decode(embedding.f16).map_err(|_| "embedding")?;
            Ok(VectorRecord {
                model: ModelId(Arc::from(embedding.model)),
                f16_bytes: bytes,
            })
        });
        Ok(Record::Prompt(PromptRecord {
            prompt: Prompt {
                id: PromptId(self.id),
                user_id: UserId(self.user_id),
                prompt: self.prompt,
                response: self.response,
                model: self.model,
                status,
                error: code.transpose()?,
                created_at: time(&self.created_at).map_err(|()| "created_at")?,
                call: CallDetails {
                    finish_reason: self.finish_reason,
                    prompt_tokens: self.prompt_tokens,
                    completion_tokens: self.completion_tokens,
                    duration_ms: self.llm_duration_ms,
                },
            },
            vector: embedding.transpose()?,
        }))
    }
}

/// Reads an RFC 3339 time in UTC, such as `2026-11-24T17:00:00.123456Z`.
fn time(text: &str) -> Result<Timestamp, ()> {
    let time: SystemTime = humantime::parse_rfc3339(text).map_err(|_| ())?;
    Ok(time.into())
}
