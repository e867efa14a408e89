//! The rules for an imported row, by itself and after the rows before it.

use std::collections::HashSet;

use super::Problem;
use super::json_lines::MAX_ID;
use crate::domain::account::{Username, trimmed};
use crate::domain::{FailureCode, LastIds, PromptRecord, PromptStatus, Record, Timestamp, User};

/// Characters of a mail address, as at registration. Its form is not checked: an account may have
/// no address.
const MAX_EMAIL_CHARS: usize = 254;
/// The end of the year 9999, beyond which times cannot be shown.
const MAX_TIME: Timestamp = Timestamp(253_402_300_799_999_999);

/// Checks rows in their order. Remembers the names of the accounts it has seen.
#[derive(Debug)]
pub(super) struct Rules {
    max_prompt_chars: usize,
    last: LastIds,
    names: HashSet<Box<str>>,
}

impl Rules {
    pub fn new(max_prompt_chars: usize) -> Self {
        Self {
            max_prompt_chars,
            last: LastIds::NONE,
            names: HashSet::new(),
        }
    }

    /// Returns the row as it may be stored.
    pub fn check(&mut self, record: Record) -> Result<Record, Problem> {
        match record {
            Record::User(user) => self.user(user).map(Record::User),
            Record::Prompt(record) => self.prompt(record).map(Record::Prompt),
            // No source has others.
            other @ (Record::Key(_)
            | Record::UpstreamDay(_)
            | Record::Session(_)
            | Record::RevokedToken(_)
            | Record::ApiKey(_)
            | Record::Usage(_)
            | Record::UsageDay(_)
            | Record::UserBudget(_)) => Ok(other),
        }
    }

    fn user(&mut self, user: User) -> Result<User, Problem> {
        check_id(user.id.0, &mut self.last.user.0)?;
        if self.last.prompt.0 > 0 {
            return Err(Problem::IdNotRising);
        }
        // A login looks for the normal form: an account under another form could never log in.
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
        Ok(user)
    }

    fn prompt(&mut self, mut record: PromptRecord) -> Result<PromptRecord, Problem> {
        let prompt = &mut record.prompt;
        check_id(prompt.id.0, &mut self.last.prompt.0)?;
        // The prompt of a chat call is a part of its messages, to which these rules do not apply.
        let is_chat = record.chat.is_some();
        if !is_chat && trimmed(&prompt.prompt).is_empty() {
            return Err(Problem::Blank);
        }
        // A character takes at least one byte, so short texts need no counting.
        let limit = self.max_prompt_chars;
        if !is_chat && prompt.prompt.len() > limit && prompt.prompt.chars().count() > limit {
            return Err(Problem::TooLong);
        }
        if prompt.prompt.contains('\0') {
            return Err(Problem::Nul);
        }
        check_time("created_at", prompt.created_at)?;
        match (prompt.status, &prompt.response, prompt.error) {
            (PromptStatus::Completed, Some(_), None)
            | (PromptStatus::Failed, None, Some(_))
            | (PromptStatus::Running, None, None) => {}
            (PromptStatus::Failed, None, None) => prompt.error = Some(FailureCode::UpstreamFailed),
            (PromptStatus::Completed | PromptStatus::Failed | PromptStatus::Running, _, _) => {
                return Err(Problem::Status);
            }
        }
        record.interrupt();
        record.replace_nul();
        Ok(record)
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
