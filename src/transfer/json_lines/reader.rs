//! Reading a file of JSON lines, row by row.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};

use super::fields::LineProblem;
use super::parse;
use super::{Error, VERSION};
use crate::domain::LastIds;
use crate::transfer::{Location, Problem, Row};

/// The longest line read: a prompt and a response of several MiB each. A file without line ends
/// must not fill the memory.
const MAX_LINE_BYTES: u64 = 64 << 20;

/// The first bytes of a file compressed by gzip.
const GZIP: [u8; 2] = [0x1f, 0x8b];
/// The byte order mark, in UTF-8.
const BOM: &[u8] = b"\xef\xbb\xbf";

/// Reads rows in the order of the file. Needs memory for one line.
#[derive(Debug)]
pub struct Reader<F = File> {
    input: BufReader<F>,
    start: u64,
    last: LastIds,
    number: u64,
    buffer: Vec<u8>,
}

impl<F: Read + Seek> Reader<F> {
    /// Reads the header of a file, from the file's current position. The file must be seekable.
    ///
    /// # Errors
    /// `Io`; any other one if the file is not of this format.
    pub fn new(mut file: F) -> Result<Self, Error> {
        let mut reader = Self {
            start: file.stream_position()?,
            input: BufReader::new(file),
            last: LastIds::NONE,
            number: 0,
            buffer: Vec::new(),
        };
        reader.read_header()?;
        Ok(reader)
    }

    /// The highest ids ever given out where the file was written, if its header names them.
    pub fn last_ids(&self) -> LastIds {
        self.last
    }

    /// Goes back to the first row.
    ///
    /// # Errors
    /// As for `new`.
    pub fn rewind(&mut self) -> Result<(), Error> {
        self.input.seek(SeekFrom::Start(self.start))?;
        self.number = 0;
        self.read_header()
    }

    /// The next row; `None` at the end. Empty lines are skipped.
    ///
    /// # Errors
    /// `Io`.
    pub fn read_row(&mut self) -> Result<Option<Row>, Error> {
        while self.read_line()? {
            let number = self.number;
            // Spaces before the JSON count in the columns of problems.
            let text = self.buffer.trim_ascii_end();
            if text.is_empty() {
                continue;
            }
            let record = if self.is_cut() {
                self.skip_line()?;
                Err(LineProblem::TooLong)
            } else {
                parse::row(text)
            };
            return Ok(Some(Row {
                location: Location::Line(number),
                record: record.map_err(Problem::Line),
            }));
        }
        Ok(None)
    }

    fn read_header(&mut self) -> Result<(), Error> {
        if !self.read_line()? {
            return Err(Error::NoHeader);
        }
        if self.buffer.starts_with(&GZIP) {
            return Err(Error::Compressed);
        }
        // Windows programs write it, before the first line only.
        let line = self.buffer.strip_prefix(BOM).unwrap_or(&self.buffer);
        match parse::header(line).map_err(Error::Header)? {
            None => Err(Error::NoHeader),
            Some((version, _)) if version > VERSION => Err(Error::Newer(version)),
            Some((_, last)) => {
                self.last = last;
                Ok(())
            }
        }
    }

    /// Reads up to the next line end, or as much as a line may have. `false` at the end of the
    /// file.
    fn read_line(&mut self) -> Result<bool, Error> {
        self.buffer.clear();
        let mut limited = (&mut self.input).take(MAX_LINE_BYTES);
        let read = limited.read_until(b'\n', &mut self.buffer)?;
        self.number += 1;
        Ok(read > 0)
    }

    /// Whether the line is longer than what was read of it.
    fn is_cut(&self) -> bool {
        self.buffer.len() as u64 == MAX_LINE_BYTES && !self.buffer.ends_with(b"\n")
    }

    /// Skips the rest of a line that is too long.
    fn skip_line(&mut self) -> Result<(), Error> {
        let number = self.number;
        while self.is_cut() && self.read_line()? {}
        self.number = number;
        self.buffer = Vec::new();
        Ok(())
    }
}
