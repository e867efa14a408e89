//! Writing a file of JSON lines.

use std::borrow::Cow;
use std::io::Write;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use serde_json::value::RawValue;

use super::{Error, FORMAT, VERSION};
use crate::domain::{LastIds, PromptRecord, Record, Timestamp, User};

/// The parts that are written beside the plain fields.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// The hashes of passwords, from which a reader of the file can try to guess the passwords.
    pub password_hashes: bool,
    /// The vectors, with the name of the model that made them.
    pub embeddings: bool,
}

/// Writes users, then prompts. The caller keeps the order.
#[derive(Debug)]
pub struct Writer<W> {
    out: W,
    options: Options,
}

impl<W: Write> Writer<W> {
    /// Begins a file with its header. `last`: the highest ids ever given out, so that a store that
    /// imports the file does not give out the ids of deleted rows again.
    ///
    /// # Errors
    /// `Io`.
    pub fn begin(out: W, options: Options, last: LastIds, now: Timestamp) -> Result<Self, Error> {
        let mut writer = Self { out, options };
        writer.line(&Line::Header {
            format: FORMAT,
            version: VERSION,
            exported_at: now.to_string(),
            last_user_id: last.user.0,
            last_prompt_id: last.prompt.0,
        })?;
        Ok(writer)
    }

    /// Writes a user or a prompt; rows of other kinds are not part of such files.
    ///
    /// # Errors
    /// `Io`.
    pub fn row(&mut self, record: &Record) -> Result<(), Error> {
        let options = self.options;
        match record {
            Record::User(user) => self.line(&user_line(user, options)),
            Record::Prompt(record) => self.line(&prompt_line(record, options)?),
            Record::Key(_)
            | Record::UpstreamDay(_)
            | Record::Session(_)
            | Record::RevokedToken(_)
            | Record::ApiKey(_)
            | Record::Usage(_)
            | Record::UsageDay(_)
            | Record::UserBudget(_) => Ok(()),
        }
    }

    /// Ends the file: everything has been given to the system.
    ///
    /// # Errors
    /// `Io`.
    pub fn finish(mut self) -> Result<(), Error> {
        Ok(self.out.flush()?)
    }

    fn line(&mut self, line: &Line<'_>) -> Result<(), Error> {
        serde_json::to_writer(&mut self.out, line).map_err(std::io::Error::from)?;
        Ok(self.out.write_all(b"\n")?)
    }
}

/// Any line.
#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Line<'a> {
    Header {
        format: &'static str,
        version: u32,
        exported_at: String,
        last_user_id: i64,
        last_prompt_id: i64,
    },
    User {
        id: i64,
        username: &'a str,
        email: &'a str,
        is_active: bool,
        created_at: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        tokens_valid_from: Option<String>,
        #[serde(skip_serializing_if = "Option::is_none")]
        password_hash: Option<&'a str>,
    },
    Prompt {
        id: i64,
        user_id: i64,
        prompt: &'a str,
        response: Option<&'a str>,
        model: &'a str,
        status: &'static str,
        error: Option<&'static str>,
        created_at: String,
        llm_duration_ms: Option<u32>,
        prompt_tokens: Option<u32>,
        completion_tokens: Option<u32>,
        finish_reason: Option<&'a str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        cost_picodollars: Option<i64>,
        source: &'static str,
        #[serde(skip_serializing_if = "Option::is_none")]
        chat: Option<Box<Chat<'a>>>,
        #[serde(skip_serializing_if = "Option::is_none")]
        embedding: Option<Embedding<'a>>,
    },
}

/// The texts of a chat call, each as the JSON that it is.
#[derive(Serialize)]
struct Chat<'a> {
    messages: Cow<'a, RawValue>,
    request: Cow<'a, RawValue>,
    metadata: Cow<'a, RawValue>,
    answer: Option<Cow<'a, RawValue>>,
}

#[derive(Serialize)]
struct Embedding<'a> {
    model: &'a str,
    f16: String,
}

fn user_line(user: &User, options: Options) -> Line<'_> {
    let valid_from = Some(user.tokens_valid_from).filter(|time| *time != Timestamp(0));
    Line::User {
        id: user.id.0,
        username: &user.username,
        email: &user.email,
        is_active: user.is_active,
        created_at: user.created_at.to_string(),
        tokens_valid_from: valid_from.map(|time| time.to_string()),
        password_hash: options.password_hashes.then_some(&user.password_hash),
    }
}

/// # Errors
/// `Io` if a text of a chat call is not JSON.
fn prompt_line(record: &PromptRecord, options: Options) -> Result<Line<'_>, Error> {
    let prompt = &record.prompt;
    let chat = record.chat.as_ref().map(|chat| -> Result<_, Error> {
        Ok(Box::new(Chat {
            messages: raw(&chat.messages)?,
            request: raw(&chat.request)?,
            metadata: raw(&chat.metadata)?,
            answer: chat.answer.as_deref().map(raw).transpose()?,
        }))
    });
    let vector = record.vector.as_ref().filter(|_| options.embeddings);
    Ok(Line::Prompt {
        id: prompt.id.0,
        user_id: prompt.user_id.0,
        prompt: &prompt.prompt,
        response: prompt.response.as_deref(),
        model: &prompt.model,
        status: prompt.status.as_str(),
        error: prompt.error.map(|code| code.as_str()),
        created_at: prompt.created_at.to_string(),
        llm_duration_ms: prompt.call.duration_ms,
        prompt_tokens: prompt.call.prompt_tokens,
        completion_tokens: prompt.call.completion_tokens,
        finish_reason: prompt.call.finish_reason.as_deref(),
        cost_picodollars: prompt.call.cost.map(|cost| cost.0),
        source: prompt.source.as_str(),
        chat: chat.transpose()?,
        embedding: vector.map(|vector| Embedding {
            model: &vector.model.0,
            f16: STANDARD.encode(&vector.f16_bytes),
        }),
    })
}

/// JSON in one line. A line end in it can only stand between two of its parts.
fn raw(json: &str) -> Result<Cow<'_, RawValue>, Error> {
    let read = match json.contains(['\n', '\r']) {
        true => RawValue::from_string(json.replace(['\n', '\r'], " ")).map(Cow::Owned),
        false => serde_json::from_str(json).map(Cow::Borrowed),
    };
    read.map_err(|error| std::io::Error::from(error).into())
}
