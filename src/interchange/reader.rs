//! Reading a file of JSON lines, row by row.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use super::lines::Wire;
use super::{Error, FORMAT, Record, VERSION};
use crate::domain::LastIds;

/// The longest line read: a prompt and an answer of several MiB each. A file without line ends must not fill the memory.
const MAX_LINE_BYTES: u64 = 64 << 20;

/// What is wrong with one line. Never quotes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LineProblem {
    /// No JSON, or text that is not UTF-8.
    #[error("it is not JSON in UTF-8")]
    NotJson,
    /// A field is missing or not known, or its value is of another type.
    #[error("a field is missing, not known, or of another type")]
    Fields,
    /// A value is of the right type, and means nothing.
    #[error("the value of `{0}` is not one of its kind")]
    Value(&'static str),
    /// It goes on and on.
    #[error("it is longer than 64 MiB")]
    TooLong,
}

/// A line that was read.
#[derive(Debug)]
pub struct Line {
    /// Its number, from 1; the header's is 1.
    pub number: u64,
    /// What it says.
    pub record: Result<Record, LineProblem>,
}

/// Reads rows in the order of the file. Needs memory for one line.
#[derive(Debug)]
pub struct Reader {
    input: BufReader<File>,
    last: LastIds,
    number: u64,
    buffer: Vec<u8>,
}

impl Reader {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// `Io`; `NoHeader` or `Newer` if it is no file of this format.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let mut reader = Self {
            input: BufReader::new(File::open(path)?),
            last: LastIds::NONE,
            number: 0,
            buffer: Vec::new(),
        };
        reader.read_header()?;
        Ok(reader)
    }

    /// The highest ids ever given out where the file comes from, as far as its header says.
    pub fn last_ids(&self) -> LastIds {
        self.last
    }

    /// Goes back to the first row.
    ///
    /// # Errors
    /// As for `open`.
    pub fn rewind(&mut self) -> Result<(), Error> {
        self.input.seek(SeekFrom::Start(0))?;
        self.number = 0;
        self.read_header()
    }

    /// The next row; `None` at the end. Empty lines are passed over.
    ///
    /// # Errors
    /// `Io`.
    pub fn read_row(&mut self) -> Result<Option<Line>, Error> {
        while self.read_line()? {
            let number = self.number;
            let text = self.buffer.trim_ascii();
            if text.is_empty() {
                continue;
            }
            let record = if self.is_cut() {
                self.skip_line()?;
                Err(LineProblem::TooLong)
            } else {
                parse(text)
            };
            return Ok(Some(Line { number, record }));
        }
        Ok(None)
    }

    fn read_header(&mut self) -> Result<(), Error> {
        if !self.read_line()? {
            return Err(Error::NoHeader);
        }
        match serde_json::from_slice(&self.buffer) {
            Ok(Wire::Header(header)) if header.format != FORMAT => Err(Error::NoHeader),
            Ok(Wire::Header(header)) if header.version > VERSION => {
                Err(Error::Newer(header.version))
            }
            Ok(Wire::Header(header)) => {
                self.last = header.last_ids().ok_or(Error::NoHeader)?;
                Ok(())
            }
            Ok(Wire::User(_) | Wire::Prompt(_)) | Err(_) => Err(Error::NoHeader),
        }
    }

    /// Reads up to the next line end, or as much as a line may have; `false` at the end of the file.
    fn read_line(&mut self) -> Result<bool, Error> {
        self.buffer.clear();
        let mut limited = (&mut self.input).take(MAX_LINE_BYTES);
        let read = limited.read_until(b'\n', &mut self.buffer)?;
        self.number += 1;
        Ok(read > 0)
    }

    /// Whether the line goes on beyond what was read of it.
    fn is_cut(&self) -> bool {
        self.buffer.len() as u64 == MAX_LINE_BYTES && !self.buffer.ends_with(b"\n")
    }

    /// Passes over the rest of a line that is too long.
    fn skip_line(&mut self) -> Result<(), Error> {
        let number = self.number;
        while self.is_cut() && self.read_line()? {}
        self.number = number;
        self.buffer = Vec::new();
        Ok(())
    }
}

fn parse(text: &[u8]) -> Result<Record, LineProblem> {
    let wire = serde_json::from_slice(text).map_err(|error| {
        if error.is_data() {
            LineProblem::Fields
        } else {
            LineProblem::NotJson
        }
    })?;
    match wire {
        Wire::Header(_) => Err(LineProblem::Value("type")),
        Wire::User(user) => user.record().map_err(LineProblem::Value),
        Wire::Prompt(prompt) => prompt.record().map_err(LineProblem::Value),
    }
}
