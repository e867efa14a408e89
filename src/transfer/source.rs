//! Where imported rows come from.

use async_trait::async_trait;

use super::Error;
use super::json_lines;
use super::rules::{Place, Problem};
use crate::domain::{LastIds, PromptRecord, User};
use crate::store::django::{self, DjangoDatabase};

/// Rows read at once.
const PAGE: usize = 512;

/// What a row says.
#[derive(Clone, Debug)]
pub enum Content {
    /// An account.
    User(User),
    /// A prompt.
    Prompt(PromptRecord),
}

/// A row with the place where it was found.
#[derive(Clone, Debug)]
pub struct Row {
    /// For the operator, who has to find it again.
    pub place: Place,
    /// What it says, or why it says nothing.
    pub content: Result<Content, Problem>,
}

/// Users, then prompts, each by rising id. Read twice: once to check, once to import.
#[async_trait]
pub trait Source: Send {
    /// The highest ids ever given out there, as far as known: those of deleted rows are not to be given to others here.
    fn last_ids(&self) -> LastIds;

    /// Goes back to the first row.
    async fn rewind(&mut self) -> Result<(), Error>;

    /// Some further rows; none at the end.
    async fn read(&mut self) -> Result<Vec<Row>, Error>;
}

#[async_trait]
impl Source for DjangoDatabase {
    fn last_ids(&self) -> LastIds {
        DjangoDatabase::last_ids(self)
    }

    async fn rewind(&mut self) -> Result<(), Error> {
        DjangoDatabase::rewind(self);
        Ok(())
    }

    async fn read(&mut self) -> Result<Vec<Row>, Error> {
        let rows = DjangoDatabase::read(self, PAGE).await?;
        Ok(rows
            .into_iter()
            .map(|record| match record {
                django::Record::User(user) => Row {
                    place: Place::User(user.id),
                    content: Ok(Content::User(user)),
                },
                django::Record::Prompt(record) => Row {
                    place: Place::Prompt(record.prompt.id),
                    content: Ok(Content::Prompt(record)),
                },
            })
            .collect())
    }
}

#[async_trait]
impl Source for json_lines::Reader {
    fn last_ids(&self) -> LastIds {
        json_lines::Reader::last_ids(self)
    }

    async fn rewind(&mut self) -> Result<(), Error> {
        Ok(json_lines::Reader::rewind(self)?)
    }

    async fn read(&mut self) -> Result<Vec<Row>, Error> {
        let mut rows = Vec::with_capacity(PAGE);
        while rows.len() < PAGE {
            let Some(line) = self.read_row()? else {
                break;
            };
            let content = match line.record {
                Ok(json_lines::Record::User(user)) => Ok(Content::User(user)),
                Ok(json_lines::Record::Prompt(record)) => Ok(Content::Prompt(record)),
                Err(problem) => Err(Problem::Line(problem)),
            };
            rows.push(Row {
                place: Place::Line(line.number),
                content,
            });
        }
        Ok(rows)
    }
}
