//! The meaning of a line's fields.

use std::collections::BTreeMap;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::value::RawValue;

use super::fields::{Fields, LineProblem};
use super::{FORMAT, MAX_ID, NO_PASSWORD};
use crate::domain::{
    CallDetails, ChatTexts, FailureCode, LastIds, ModelId, Picodollars, Prompt, PromptId,
    PromptRecord, PromptSource, PromptStatus, Record, Timestamp, User, UserId, VectorRecord,
};

/// The model of a response whose line names none.
const UNKNOWN_MODEL: &str = "unknown";

const TEXT: &str = "text";
const TEXT_OR_NULL: &str = "text or null";
const NUMBER: &str = "a whole number";
const COUNT_OR_NULL: &str = "a whole number from 0 to 4294967295, or null";
const TIME: &str = "a time such as 2026-11-24T12:00:00Z";
const KIND: &str = "\"user\" or \"prompt\"";
const CHAT: &str = "{\"messages\": LIST, \"request\": OBJECT, \"metadata\": OBJECT OF TEXTS, \"answer\": OBJECT or null}";
const EMBEDDING: &str = "{\"model\": NAME, \"f16\": BASE64}";

/// A header's version, and the highest ids that it names. `None` if the line is not a header.
pub(super) fn header(line: &[u8]) -> Result<Option<(u32, LastIds)>, LineProblem> {
    let Ok(mut fields) = Fields::of(line) else {
        return Ok(None);
    };
    let kind = fields.take::<String>("type", KIND);
    let format = fields.take::<String>("format", TEXT);
    let is_ours = matches!((kind, format), (Ok(Some(kind)), Ok(Some(format)))
        if kind == "header" && format == FORMAT);
    if !is_ours {
        return Ok(None);
    }
    let version = fields.need("version", NUMBER)?;
    let mut last_id = |field| {
        const ID: &str = "a whole number from 0 to 9007199254740991";
        let id = fields.take::<i64>(field, ID)?.unwrap_or(0);
        if (0..=MAX_ID).contains(&id) {
            Ok(id)
        } else {
            Err(wrong(field, ID))
        }
    };
    let last = LastIds {
        user: UserId(last_id("last_user_id")?),
        prompt: PromptId(last_id("last_prompt_id")?),
    };
    // Further fields are for readers that know them.
    Ok(Some((version, last)))
}

/// A row.
pub(super) fn row(line: &[u8]) -> Result<Record, LineProblem> {
    let mut fields = Fields::of(line)?;
    let kind: String = fields.need("type", KIND)?;
    let record = match kind.as_str() {
        "user" => Record::User(user(&mut fields)?),
        "prompt" => Record::Prompt(prompt(&mut fields)?),
        _ => return Err(wrong("type", KIND)),
    };
    fields.end()?;
    Ok(record)
}

fn user(fields: &mut Fields<'_>) -> Result<User, LineProblem> {
    let password_hash: Option<String> = optional(fields, "password_hash", TEXT_OR_NULL)?;
    let valid_from: Option<String> = optional(fields, "tokens_valid_from", TIME)?;
    let valid_from = valid_from.map(|text| time("tokens_valid_from", &text));
    Ok(User {
        id: UserId(fields.need("id", NUMBER)?),
        username: fields.need("username", TEXT)?,
        email: fields.take("email", TEXT)?.unwrap_or_default(),
        password_hash: password_hash.unwrap_or_else(|| NO_PASSWORD.to_owned()),
        is_active: fields.take("is_active", "true or false")?.unwrap_or(true),
        tokens_valid_from: valid_from.transpose()?.unwrap_or(Timestamp(0)),
        created_at: created_at(fields)?,
    })
}

fn prompt(fields: &mut Fields<'_>) -> Result<PromptRecord, LineProblem> {
    const STATUS: &str = "completed, failed or running";
    const ERROR: &str = "upstream_failed, upstream_unavailable, upstream_timeout, cancelled, interrupted, internal_error or null";
    let response: Option<String> = optional(fields, "response", TEXT_OR_NULL)?;
    let status = match optional::<String>(fields, "status", STATUS)? {
        Some(word) => PromptStatus::parse(&word).ok_or(wrong("status", STATUS))?,
        None if response.is_some() => PromptStatus::Completed,
        None => PromptStatus::Failed,
    };
    let error: Option<String> = optional(fields, "error", ERROR)?;
    let error = error.map(|word| FailureCode::parse(&word).ok_or(wrong("error", ERROR)));
    let model: Option<String> = fields.take("model", TEXT)?;
    const SOURCE: &str = "api, page or v1";
    let source = match optional::<String>(fields, "source", SOURCE)? {
        Some(word) => PromptSource::parse(&word).ok_or(wrong("source", SOURCE))?,
        None => PromptSource::Api,
    };
    Ok(PromptRecord {
        prompt: Prompt {
            id: PromptId(fields.need("id", NUMBER)?),
            user_id: UserId(fields.need("user_id", NUMBER)?),
            source,
            prompt: fields.need("prompt", TEXT)?,
            response,
            model: model.unwrap_or_else(|| UNKNOWN_MODEL.to_owned()),
            status,
            error: error.transpose()?,
            created_at: created_at(fields)?,
            call: CallDetails {
                cost: cost(fields)?,
                duration_ms: optional(fields, "llm_duration_ms", COUNT_OR_NULL)?,
                prompt_tokens: optional(fields, "prompt_tokens", COUNT_OR_NULL)?,
                completion_tokens: optional(fields, "completion_tokens", COUNT_OR_NULL)?,
                finish_reason: optional(fields, "finish_reason", TEXT_OR_NULL)?,
            },
        },
        vector: vector(fields)?,
        chat: chat(fields)?,
    })
}

fn cost(fields: &mut Fields<'_>) -> Result<Option<Picodollars>, LineProblem> {
    const COST: &str = "a whole number that is not negative, or null";
    let cost: Option<i64> = optional(fields, "cost_picodollars", COST)?;
    match cost {
        Some(cost) if cost < 0 => Err(wrong("cost_picodollars", COST)),
        cost => Ok(cost.map(Picodollars)),
    }
}

fn chat(fields: &mut Fields<'_>) -> Result<Option<ChatTexts>, LineProblem> {
    let problem = wrong("chat", CHAT);
    let raw: Option<Box<RawValue>> = optional(fields, "chat", CHAT)?;
    let Some(raw) = raw else { return Ok(None) };
    // The texts are kept as they are written, so that each number keeps its spelling.
    let text = |raw: Box<RawValue>, opening: char| match raw.get().starts_with(opening) {
        true => Ok(raw.get().to_owned()),
        false => Err(problem.clone()),
    };
    let read = || -> Result<ChatTexts, LineProblem> {
        let mut inner = Fields::of(raw.get().as_bytes())?;
        let metadata: Box<RawValue> = inner.need("metadata", CHAT)?;
        serde_json::from_str::<BTreeMap<String, String>>(metadata.get())
            .map_err(|_| problem.clone())?;
        let answer: Option<Box<RawValue>> = optional(&mut inner, "answer", CHAT)?;
        let texts = ChatTexts {
            messages: text(inner.need("messages", CHAT)?, '[')?,
            request: text(inner.need("request", CHAT)?, '{')?,
            metadata: text(metadata, '{')?,
            answer: answer.map(|answer| text(answer, '{')).transpose()?,
        };
        inner.end()?;
        Ok(texts)
    };
    read().map(Some).map_err(|_| problem)
}

fn vector(fields: &mut Fields<'_>) -> Result<Option<VectorRecord>, LineProblem> {
    let problem = wrong("embedding", EMBEDDING);
    let raw: Option<Box<RawValue>> = optional(fields, "embedding", EMBEDDING)?;
    let Some(raw) = raw else { return Ok(None) };
    let read = || -> Result<VectorRecord, LineProblem> {
        let mut inner = Fields::of(raw.get().as_bytes())?;
        let model: String = inner.need("model", TEXT)?;
        let f16: String = inner.need("f16", TEXT)?;
        inner.end()?;
        Ok(VectorRecord {
            model: ModelId(Arc::from(model)),
            f16_bytes: STANDARD.decode(f16).map_err(|_| problem.clone())?,
        })
    };
    read().map(Some).map_err(|_| problem)
}

/// A value that its field does not take.
fn wrong(field: &'static str, expected: &'static str) -> LineProblem {
    LineProblem::Value { field, expected }
}

/// A field that may be missing or `null`.
fn optional<T: serde::de::DeserializeOwned>(
    fields: &mut Fields<'_>,
    field: &'static str,
    expected: &'static str,
) -> Result<Option<T>, LineProblem> {
    Ok(fields.take::<Option<T>>(field, expected)?.flatten())
}

fn created_at(fields: &mut Fields<'_>) -> Result<Timestamp, LineProblem> {
    let text: String = fields.need("created_at", TIME)?;
    time("created_at", &text)
}

/// Reads an RFC 3339 time in UTC, such as `2026-11-24T17:00:00.123456Z`.
fn time(field: &'static str, text: &str) -> Result<Timestamp, LineProblem> {
    let time = humantime::parse_rfc3339(text).map_err(|_| wrong(field, TIME))?;
    Ok(time.into())
}
