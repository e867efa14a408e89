//! Writing a file of JSON lines.

use std::io::Write;

use super::Error;
use super::lines::{Wire, WireHeader, WirePrompt, WireUser};
use crate::domain::{LastIds, PromptRecord, Timestamp, User};

/// What is written beside the plain fields.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// The hashes of passwords, which whoever has the file can try to guess the passwords from.
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
    /// Begins a file with its header. `last`: the highest ids ever given out, so that a store that takes the file in does not
    /// give out those of deleted rows again.
    ///
    /// # Errors
    /// `Io`.
    pub fn begin(out: W, options: Options, last: LastIds, now: Timestamp) -> Result<Self, Error> {
        let mut writer = Self { out, options };
        writer.line(&Wire::Header(WireHeader::new(last, now)))?;
        Ok(writer)
    }

    /// Writes one account.
    ///
    /// # Errors
    /// `Io`.
    pub fn user(&mut self, user: &User) -> Result<(), Error> {
        self.line(&Wire::User(WireUser::new(
            user,
            self.options.password_hashes,
        )))
    }

    /// Writes one prompt.
    ///
    /// # Errors
    /// `Io`.
    pub fn prompt(&mut self, record: &PromptRecord) -> Result<(), Error> {
        self.line(&Wire::Prompt(WirePrompt::new(
            record,
            self.options.embeddings,
        )))
    }

    /// Ends the file: everything has been handed to the system.
    ///
    /// # Errors
    /// `Io`.
    pub fn finish(mut self) -> Result<(), Error> {
        Ok(self.out.flush()?)
    }

    fn line(&mut self, line: &Wire) -> Result<(), Error> {
        serde_json::to_writer(&mut self.out, line).map_err(std::io::Error::from)?;
        Ok(self.out.write_all(b"\n")?)
    }
}
