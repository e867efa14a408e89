//! What an imported row must be like, by itself and beside the rows before it.

use std::collections::HashSet;
use std::fmt;

use super::source::{Content, Row};
use crate::credentials::is_known_hash;
use crate::domain::account::{Username, trimmed};
use crate::domain::{
    FailureCode, LastIds, PromptId, PromptRecord, PromptStatus, Timestamp, User, UserId,
};
use crate::transfer::json_lines::{LineProblem, MAX_ID};

/// Characters of a mail address, as at registration. Its form is not looked at: an account may have none.
const MAX_EMAIL_CHARS: usize = 254;
/// The end of the year 9999, beyond which times cannot be shown.
const MAX_TIME: Timestamp = Timestamp(253_402_300_799_999_999);

/// Where a row was found. Ordered as in the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// An account, by its id.
    User(UserId),
    /// A prompt, by its id.
    Prompt(PromptId),
    /// A line of a file, from 1.
    Line(u64),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User(id) => write!(f, "user {id}"),
            Self::Prompt(id) => write!(f, "prompt {id}"),
            Self::Line(number) => write!(f, "line {number}"),
        }
    }
}

/// Why a row cannot be taken over, by the names of its fields in a file. Never quotes it.
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
    /// Its status says another thing than its answer or error.
    #[error(
        "`status` must fit `response` and `error`: completed has a response and no error, failed an error and no response"
    )]
    Status,
    /// Its user is neither in the source nor here.
    #[error("its user is not imported and not here")]
    NoOwner,
    /// The id belongs to another row here.
    #[error("its id belongs to another one here")]
    IdTaken,
    /// The name belongs to another account here.
    #[error("its name belongs to another account here")]
    NameTaken,
}

/// A row that cannot be taken over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Where it was found.
    pub place: Place,
    /// Why.
    pub problem: Problem,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.problem)
    }
}

/// Reads rows in their order and tells the sound ones from the others. Remembers the accounts it has seen: some 100 bytes each.
#[derive(Debug)]
pub(super) struct Rules {
    max_prompt_chars: usize,
    last: LastIds,
    users: HashSet<UserId>,
    names: HashSet<Box<str>>,
}

/// A row that keeps the rules.
#[derive(Clone, Debug)]
pub(super) enum Sound {
    User {
        user: User,
        /// Its password's hash is of no kind known here, and was replaced by none.
        lost_password: bool,
    },
    Prompt(PromptRecord),
}

impl Rules {
    pub fn new(max_prompt_chars: usize) -> Self {
        Self {
            max_prompt_chars,
            last: LastIds::NONE,
            users: HashSet::new(),
            names: HashSet::new(),
        }
    }

    /// Whether that account came by and was sound.
    pub fn has_user(&self, id: UserId) -> bool {
        self.users.contains(&id)
    }

    /// Takes an account back that turned out to be another's here, so that its prompts have no owner.
    pub fn forget_user(&mut self, id: UserId) {
        self.users.remove(&id);
    }

    pub fn judge(&mut self, row: Row) -> Result<Sound, Fault> {
        let place = row.place;
        row.content
            .and_then(|content| match content {
                Content::User(user) => self.user(user),
                Content::Prompt(record) => self.prompt(record),
            })
            .map_err(|problem| Fault { place, problem })
    }

    fn user(&mut self, mut user: User) -> Result<Sound, Problem> {
        check_id(user.id.0, &mut self.last.user.0)?;
        if self.last.prompt.0 > 0 {
            return Err(Problem::IdNotRising);
        }
        // A login looks for the normal form: an account under another could never log in.
        if Username::parse(&user.username).map_or(true, |name| name.as_str() != user.username) {
            return Err(Problem::Name);
        }
        if user.email.contains('\0') || user.email.chars().count() > MAX_EMAIL_CHARS {
            return Err(Problem::Email);
        }
        check_time("created_at", user.created_at)?;
        check_time("tokens_valid_from", user.tokens_valid_from)?;
        if !self.names.insert(user.username.clone().into_boxed_str()) {
            return Err(Problem::NameTwice);
        }
        self.users.insert(user.id);
        let has_password = !user.password_hash.starts_with('!');
        let lost_password = has_password && !is_known_hash(&user.password_hash);
        if lost_password {
            "!".clone_into(&mut user.password_hash);
        }
        Ok(Sound::User {
            user,
            lost_password,
        })
    }

    fn prompt(&mut self, mut record: PromptRecord) -> Result<Sound, Problem> {
        let prompt = &mut record.prompt;
        check_id(prompt.id.0, &mut self.last.prompt.0)?;
        if trimmed(&prompt.prompt).is_empty() {
            return Err(Problem::Blank);
        }
        // A character takes at least one byte, so short texts need no counting.
        let limit = self.max_prompt_chars;
        if prompt.prompt.len() > limit && prompt.prompt.chars().count() > limit {
            return Err(Problem::TooLong);
        }
        if prompt.prompt.contains('\0') {
            return Err(Problem::Nul);
        }
        let words = prompt.response.iter_mut().chain([&mut prompt.model]);
        for text in words.chain(&mut prompt.call.finish_reason) {
            keep_in_any_store(text);
        }
        let prompt = &mut record.prompt;
        check_time("created_at", prompt.created_at)?;
        match (prompt.status, &prompt.response, prompt.error) {
            (PromptStatus::Completed, Some(_), None) | (PromptStatus::Failed, None, Some(_)) => {}
            // No process is at work on it any more.
            (PromptStatus::Running, None, None) => {
                prompt.status = PromptStatus::Failed;
                prompt.error = Some(FailureCode::Interrupted);
            }
            (PromptStatus::Failed, None, None) => prompt.error = Some(FailureCode::UpstreamFailed),
            (PromptStatus::Completed | PromptStatus::Failed | PromptStatus::Running, _, _) => {
                return Err(Problem::Status);
            }
        }
        Ok(Sound::Prompt(record))
    }
}

/// An upstream's words may hold what not every store can keep.
pub(super) fn keep_in_any_store(text: &mut String) {
    if text.contains('\0') {
        *text = text.replace('\0', "\u{fffd}");
    }
}

fn check_id(id: i64, last: &mut i64) -> Result<(), Problem> {
    if id < 1 {
        return Err(Problem::IdNotPositive);
    }
    if id > MAX_ID {
        return Err(Problem::IdTooHigh);
    }
    if id <= *last {
        return Err(Problem::IdNotRising);
    }
    *last = id;
    Ok(())
}

fn check_time(field: &'static str, time: Timestamp) -> Result<(), Problem> {
    if (Timestamp(0)..=MAX_TIME).contains(&time) {
        Ok(())
    } else {
        Err(Problem::Time(field))
    }
}
