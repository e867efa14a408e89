//! A row of a source: where it was found, what it holds, and why it cannot be imported.

use std::fmt;

use super::json_lines::LineProblem;
use crate::domain::{PromptId, Record, UserId};

/// A row with the place where it was found.
#[derive(Clone, Debug)]
pub struct Row {
    /// For the operator, who has to find the row again.
    pub location: Location,
    /// What it holds, or why it cannot be read.
    pub record: Result<Record, Problem>,
}

/// Where a row was found. Ordered as in the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Location {
    /// An account, by its id.
    User(UserId),
    /// A prompt, by its id.
    Prompt(PromptId),
    /// A line of a file, from 1.
    Line(u64),
}

impl Location {
    /// The location of a row that is found by its id; `None` for rows of kinds that no source has.
    pub(super) fn of(record: &Record) -> Option<Self> {
        match record {
            Record::User(user) => Some(Self::User(user.id)),
            Record::Prompt(record) => Some(Self::Prompt(record.prompt.id)),
            Record::Key(_)
            | Record::UpstreamDay(_)
            | Record::Session(_)
            | Record::RevokedToken(_)
            | Record::ApiKey(_)
            | Record::Usage(_)
            | Record::UsageDay(_)
            | Record::UserBudget(_) => None,
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User(id) => write!(f, "user {id}"),
            Self::Prompt(id) => write!(f, "prompt {id}"),
            Self::Line(number) => write!(f, "line {number}"),
        }
    }
}

/// Why a row cannot be imported, by the names of its fields in a file. Never quotes the row.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// It cannot be read.
    #[error("{0}")]
    Line(LineProblem),
    /// Ids count from 1.
    #[error("`id` must be 1 or more")]
    IdNotPositive,
    /// Ids are exact in every client's JSON up to 2^53.
    #[error("`id` must be at most 9007199254740991")]
    IdTooHigh,
    /// An earlier row of its kind has this id or a higher one.
    #[error("`id` must be above those before it: users, then prompts, come by rising id")]
    IdNotRising,
    /// No account can have this name.
    #[error("`username` must be 1 to 150 letters, digits and @.+-_, in the normal form NFKC")]
    Name,
    /// Another account of the source has its name.
    #[error("`username` is that of another user before it")]
    NameTwice,
    /// Too long, or with a null character.
    #[error("`email` must be at most 254 characters, without a null character")]
    Email,
    /// Before 1970 or after 9999.
    #[error("`{0}` must be in the years 1970 to 9999")]
    Time(&'static str),
    /// White space only.
    #[error("`prompt` must not be blank")]
    Blank,
    /// More than `MAX_PROMPT_CHARS`.
    #[error(
        "`prompt` is longer than MAX_PROMPT_CHARS: raise that setting for the import to take it"
    )]
    TooLong,
    /// No store can keep it.
    #[error("`prompt` must not have a null character")]
    Nul,
    /// Its status does not fit its response or its error.
    #[error(
        "`status` must fit `response` and `error`: completed has a response and no error, failed an error and no response"
    )]
    Status,
    /// Its user is neither in the source nor in the store.
    #[error("its user is not imported and not here")]
    NoOwner,
    /// The id belongs to another row here.
    #[error("its id belongs to another one here")]
    IdTaken,
    /// The name belongs to another account here.
    #[error("its name belongs to another account here")]
    NameTaken,
}

/// A row that cannot be imported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Where it was found.
    pub location: Location,
    /// Why.
    pub problem: Problem,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.location, self.problem)
    }
}
