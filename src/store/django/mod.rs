//! The database of the Django system that this service replaces, read and never written.
//!
//! One transaction from beginning to end, so that everything read belongs to one moment however long the reading takes.

mod connect;

use std::time::SystemTime;

use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Row};

use super::postgres::{NO_TIMEOUTS, meaning};
use crate::config::Secret;
use crate::domain::{
    CallDetails, FailureCode, LastIds, Prompt, PromptId, PromptRecord, PromptStatus, Timestamp,
    User, UserId,
};

/// What the old system's mock put before a prompt to make its answer.
const MOCK_PREFIX: &str = "[mock] You said: ";

/// The prefix of Argon2 hashes as Django writes them; what follows is the usual form.
const DJANGO_ARGON2: &str = "argon2$";

/// Why the old system cannot be read: one line that names neither the server nor the address.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address is none of a Postgres database.
    #[error("the address of the old database must be postgres://USER:PASSWORD@HOST/DATABASE")]
    Address(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// TLS cannot be set up as the address asks.
    #[error("TLS to the old database's server cannot be set up")]
    Tls(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Nobody answers there.
    #[error("the old database's server cannot be reached")]
    Unreachable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The user, or its password, is wrong.
    #[error("the old database's server refuses the user or the password")]
    Refused,
    /// The server has no database of that name.
    #[error("the old database's server has no database of that name")]
    NoDatabase,
    /// The tables are missing.
    #[error(
        "the database has no tables auth_user and prompts_prompt with the old system's columns: is this its database?"
    )]
    NoTables,
    /// The user may not read them.
    #[error(
        "the user may not read the tables auth_user and prompts_prompt: grant it SELECT on both"
    )]
    NotAllowed,
    /// Anything else the server says; by its code alone, because its words may quote rows.
    #[error("the old database's server fails with SQLSTATE {0}: {meaning}", meaning = meaning(.0))]
    Server(String),
    /// The connection broke.
    #[error(
        "the connection to the old database broke: run the command again, and it goes on where it ended"
    )]
    Broken(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A column is of another type.
    #[error("a column of the old database is not of the type that the old system gives it")]
    Type(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl From<tokio_postgres::Error> for Error {
    fn from(error: tokio_postgres::Error) -> Self {
        let Some(state) = error.code() else {
            let source = std::error::Error::source(&error);
            let is_system = source.is_some_and(|source| source.is::<std::io::Error>());
            return if error.is_closed() || is_system {
                Self::Broken(error.into())
            } else {
                Self::Type(error.into())
            };
        };
        match state.code() {
            // invalid_password and invalid_authorization_specification
            "28P01" | "28000" => Self::Refused,
            "3D000" => Self::NoDatabase,
            // undefined_table, undefined_column, undefined_schema
            "42P01" | "42703" | "3F000" => Self::NoTables,
            "42501" => Self::NotAllowed,
            code => Self::Server(code.to_owned()),
        }
    }
}

/// A row that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// An account.
    User(User),
    /// A prompt and its answer.
    Prompt(PromptRecord),
}

/// Where the reading is.
#[derive(Clone, Copy, Debug)]
enum Place {
    Users(i64),
    Prompts(i64),
    End,
}

/// The old system's users by rising id, then its prompts by rising id.
pub struct DjangoDatabase {
    client: Client,
    place: Place,
    unknown_model: String,
    last: LastIds,
}

impl DjangoDatabase {
    /// Connects and begins the transaction. `unknown_model`: what counts as the model of an answer that did not come from
    /// the mock; the old system did not keep it.
    ///
    /// # Errors
    /// Every one.
    pub async fn open(url: &Secret, unknown_model: String) -> Result<Self, Error> {
        let client = connect::connect(url).await?;
        client
            .batch_execute(&format!(
                "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; {NO_TIMEOUTS}"
            ))
            .await?;
        let mut old = Self {
            client,
            place: Place::Users(i64::MIN),
            unknown_model,
            last: LastIds::NONE,
        };
        old.last = LastIds {
            user: UserId(old.last_id("auth_user").await?),
            prompt: PromptId(old.last_id("prompts_prompt").await?),
        };
        Ok(old)
    }

    /// The highest ids that the old system ever gave out, as far as it tells.
    pub fn last_ids(&self) -> LastIds {
        self.last
    }

    /// Goes back to the first row.
    pub fn rewind(&mut self) {
        self.place = Place::Users(i64::MIN);
    }

    /// Up to `limit` further rows; none at the end.
    ///
    /// # Errors
    /// `Broken`, `Server`, `Type`.
    pub async fn read(&mut self, limit: usize) -> Result<Vec<Record>, Error> {
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        loop {
            let records = match self.place {
                Place::Users(after) => self.users(after, limit).await?,
                Place::Prompts(after) => self.prompts(after, limit).await?,
                Place::End => return Ok(Vec::new()),
            };
            self.place = match (records.last(), self.place) {
                (Some(Record::User(user)), _) => Place::Users(user.id.0),
                (Some(Record::Prompt(record)), _) => Place::Prompts(record.prompt.id.0),
                (None, Place::Users(_)) => Place::Prompts(i64::MIN),
                (None, Place::Prompts(_) | Place::End) => Place::End,
            };
            if !records.is_empty() {
                return Ok(records);
            }
        }
    }

    async fn users(&self, after: i64, limit: i64) -> Result<Vec<Record>, Error> {
        let rows = self
            .client
            .query(
                "SELECT id::bigint, username::text, email::text, password::text, is_active, date_joined
                 FROM auth_user WHERE id > $1::bigint ORDER BY id LIMIT $2::bigint",
                &[&after, &limit],
            )
            .await?;
        rows.iter().map(user).collect()
    }

    async fn prompts(&self, after: i64, limit: i64) -> Result<Vec<Record>, Error> {
        let rows = self
            .client
            .query(
                "SELECT id::bigint, coalesce(user_id, 0)::bigint, prompt::text, response::text, created_at
                 FROM prompts_prompt WHERE id > $1::bigint ORDER BY id LIMIT $2::bigint",
                &[&after, &limit],
            )
            .await?;
        rows.iter()
            .map(|row| prompt(row, &self.unknown_model))
            .collect()
    }

    /// The highest id in the table, or the last that its sequence gave out, if that is more and may be read.
    async fn last_id(&self, table: &'static str) -> Result<i64, Error> {
        let sql = format!("SELECT coalesce(max(id), 0)::bigint FROM {table}");
        let highest: i64 = self.client.query_one(&sql, &[]).await?.try_get(0)?;
        self.client.batch_execute("SAVEPOINT sequence").await?;
        let asked = self
            .client
            .query_one(
                "SELECT coalesce(pg_sequence_last_value(pg_get_serial_sequence($1::text, 'id')::regclass), 0)",
                &[&table],
            )
            .await;
        // A user who may read the tables need not be allowed to read their sequences.
        let given = match asked {
            Ok(row) => row.try_get(0).unwrap_or(0),
            Err(error) if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => 0,
            Err(error) => return Err(error.into()),
        };
        self.client
            .batch_execute("ROLLBACK TO SAVEPOINT sequence")
            .await?;
        Ok(highest.max(given))
    }
}

fn user(row: &Row) -> Result<Record, Error> {
    let hash: String = row.try_get(3)?;
    let made: SystemTime = row.try_get(5)?;
    let password_hash = match hash.strip_prefix(DJANGO_ARGON2) {
        Some(usual) => format!("${usual}"),
        None => hash,
    };
    Ok(Record::User(User {
        id: UserId(row.try_get(0)?),
        username: row.try_get(1)?,
        email: row.try_get(2)?,
        password_hash,
        is_active: row.try_get(4)?,
        tokens_valid_from: Timestamp(0),
        created_at: made.into(),
    }))
}

fn prompt(row: &Row, unknown_model: &str) -> Result<Record, Error> {
    let text: String = row.try_get(2)?;
    let response: Option<String> = row.try_get(3)?;
    let asked: SystemTime = row.try_get(4)?;
    let is_mock = response
        .as_deref()
        .and_then(|response| response.strip_prefix(MOCK_PREFIX))
        == Some(&text);
    let model = if is_mock { "mock" } else { unknown_model };
    // The old system stored a prompt only once it was answered; a row without an answer is somebody else's doing.
    let (status, error) = match response {
        Some(_) => (PromptStatus::Completed, None),
        None => (PromptStatus::Failed, Some(FailureCode::UpstreamFailed)),
    };
    Ok(Record::Prompt(PromptRecord {
        prompt: Prompt {
            id: PromptId(row.try_get(0)?),
            user_id: UserId(row.try_get(1)?),
            prompt: text,
            response,
            model: model.to_owned(),
            status,
            error,
            created_at: asked.into(),
            call: CallDetails::default(),
        },
        vector: None,
    }))
}
