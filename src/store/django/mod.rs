//! The database of the Django system that this service replaces, read and never written.
//!
//! One transaction from beginning to end, so that everything read belongs to one moment, however
//! long the reading takes.

mod connect;

use std::time::SystemTime;

use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Row};

use super::postgres::{NO_TIMEOUTS, meaning};
use crate::config::Secret;
use crate::domain::{
    CallDetails, FailureCode, LastIds, Prompt, PromptId, PromptRecord, PromptSource, PromptStatus,
    Record, RecordCursor, Timestamp, User, UserId,
};

/// What the old system's mock put before a prompt to make its answer.
const MOCK_PREFIX: &str = "[mock] You said: ";

/// The prefix of Argon2 hashes as Django writes them; what follows is the usual form.
const DJANGO_ARGON2: &str = "argon2$";

/// Why the old system cannot be read: one line that names neither the server nor the address.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address is not that of a Postgres database.
    #[error("the address of the old database must be postgres://USER:PASSWORD@HOST/DATABASE")]
    Address(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// TLS cannot be set up as the address asks.
    #[error("TLS to the old database's server cannot be set up")]
    Tls(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// No server responds there.
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
    /// Any other error of the server; its code alone, because its words may quote rows.
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

/// The old system's users by rising id, then its prompts by rising id.
pub struct DjangoDatabase {
    client: Client,
    /// Where the next page begins; `None` after the last one.
    next: Option<RecordCursor>,
    unknown_model: String,
    last: LastIds,
}

impl DjangoDatabase {
    /// Connects and begins the transaction. `unknown_model`: the model that is stored with a
    /// response that is not the mock's; the old system did not keep it.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub async fn open(url: &Secret, unknown_model: String) -> Result<Self, Error> {
        let client = connect::connect(url).await?;
        client
            .batch_execute(&format!(
                "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; {NO_TIMEOUTS}"
            ))
            .await?;
        let mut database = Self {
            client,
            next: Some(RecordCursor::Users(None)),
            unknown_model,
            last: LastIds::NONE,
        };
        database.last = LastIds {
            user: UserId(database.last_id("auth_user").await?),
            prompt: PromptId(database.last_id("prompts_prompt").await?),
        };
        Ok(database)
    }

    /// The highest ids that the old system ever gave out, as far as it shows them.
    pub fn last_ids(&self) -> LastIds {
        self.last
    }

    /// Goes back to the first row.
    pub fn rewind(&mut self) {
        self.next = Some(RecordCursor::Users(None));
    }

    /// Up to `limit` further rows; none at the end.
    ///
    /// # Errors
    /// `Broken`, `Server`, `Type`.
    pub async fn read(&mut self, limit: usize) -> Result<Vec<Record>, Error> {
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        while let Some(next) = self.next.take() {
            let (records, after_last) = match next {
                RecordCursor::Users(after) => {
                    let after = after.map_or(i64::MIN, |id| id.0);
                    let records = self.users(after, limit).await?;
                    (records, Some(RecordCursor::Prompts(None)))
                }
                RecordCursor::Prompts(after) => {
                    let after = after.map_or(i64::MIN, |id| id.0);
                    (self.prompts(after, limit).await?, None)
                }
                // The old system has none of these.
                RecordCursor::Keys(_)
                | RecordCursor::UpstreamDays(_)
                | RecordCursor::Sessions(_)
                | RecordCursor::RevokedTokens(_)
                | RecordCursor::ApiKeys(_)
                | RecordCursor::Usage(_)
                | RecordCursor::UsageDays(_)
                | RecordCursor::UserBudgets(_) => (Vec::new(), None),
            };
            self.next = records.last().map(Record::cursor).or(after_last);
            if !records.is_empty() {
                return Ok(records);
            }
        }
        Ok(Vec::new())
    }

    async fn users(&self, after: i64, limit: i64) -> Result<Vec<Record>, Error> {
        let rows = self
            .client
            .query(
                "SELECT id::bigint AS id, username::text AS username, email::text AS email,
                        password::text AS password, is_active, date_joined
                 FROM auth_user WHERE id > $1::bigint ORDER BY auth_user.id LIMIT $2::bigint",
                &[&after, &limit],
            )
            .await?;
        rows.iter().map(user).collect()
    }

    async fn prompts(&self, after: i64, limit: i64) -> Result<Vec<Record>, Error> {
        let rows = self
            .client
            .query(
                "SELECT id::bigint AS id, coalesce(user_id, 0)::bigint AS user_id,
                        prompt::text AS prompt, response::text AS response, created_at
                 FROM prompts_prompt WHERE id > $1::bigint ORDER BY prompts_prompt.id LIMIT $2::bigint",
                &[&after, &limit],
            )
            .await?;
        rows.iter()
            .map(|row| prompt(row, &self.unknown_model))
            .collect()
    }

    /// The highest id in the table, or the last one that its sequence gave out, if that one is
    /// higher and may be read.
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
    let hash: String = row.try_get("password")?;
    let created_at: SystemTime = row.try_get("date_joined")?;
    let password_hash = match hash.strip_prefix(DJANGO_ARGON2) {
        Some(usual) => format!("${usual}"),
        None => hash,
    };
    Ok(Record::User(User {
        id: UserId(row.try_get("id")?),
        username: row.try_get("username")?,
        email: row.try_get("email")?,
        password_hash,
        is_active: row.try_get("is_active")?,
        tokens_valid_from: Timestamp(0),
        created_at: created_at.into(),
    }))
}

fn prompt(row: &Row, unknown_model: &str) -> Result<Record, Error> {
    let text: String = row.try_get("prompt")?;
    let response: Option<String> = row.try_get("response")?;
    let created_at: SystemTime = row.try_get("created_at")?;
    let is_mock = response
        .as_deref()
        .and_then(|response| response.strip_prefix(MOCK_PREFIX))
        == Some(&text);
    let model = if is_mock { "mock" } else { unknown_model };
    // The old system stored a prompt only after its answer; a row without an answer was made by
    // something else.
    let (status, error) = match response {
        Some(_) => (PromptStatus::Completed, None),
        None => (PromptStatus::Failed, Some(FailureCode::UpstreamFailed)),
    };
    Ok(Record::Prompt(PromptRecord {
        prompt: Prompt {
            id: PromptId(row.try_get("id")?),
            user_id: UserId(row.try_get("user_id")?),
            source: PromptSource::Api,
            prompt: text,
            response,
            model: model.to_owned(),
            status,
            error,
            created_at: created_at.into(),
            call: CallDetails::default(),
        },
        vector: None,
        chat: None,
    }))
}
