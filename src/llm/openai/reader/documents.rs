//! The JSON objects in the body of an answer, however they are packed.
//!
//! Neither the content type nor the request determines how a body is packed: servers label streams
//! as JSON, and send JSON, one object a line or a list of objects where a stream was requested. So
//! the bytes decide, line by line. A line belongs to a server-sent event (the HTML standard,
//! section 9.2.6), or a plain object begins there.

use super::event_lines::{data_of, is_done, is_other_field, trim_between, trim_blanks};
use super::json::{JsonValue, Object};
use super::nesting::{Nesting, find_either};
use crate::llm::openai::fault::FaultKind;

/// The members of an object that an answer is read from.
pub const MEMBERS: [&str; 5] = ["choices", "usage", "model", "error", "object"];

/// What a body consists of.
#[derive(Debug)]
pub enum Item<'a> {
    /// A JSON object, and how it is packed.
    Object(Document<'a>, Origin),
    /// The beginning of a JSON object whose end did not come.
    CutObject(Document<'a>),
    /// `[DONE]`.
    Done,
    /// The data of an event that is not JSON, or something else that begins like an object.
    Unreadable,
}

/// Takes each item. It returns whether the item has a choice, or an error that ends the reading.
pub type Sink<'a> = dyn FnMut(Item<'_>) -> Result<bool, FaultKind> + 'a;

/// A JSON object.
#[derive(Debug)]
pub struct Document<'a> {
    /// Its bytes.
    pub json: &'a [u8],
    /// Its [`MEMBERS`].
    pub object: Object<'a, { MEMBERS.len() }>,
}

impl<'a> Document<'a> {
    /// Reads the object at the start of `data`. Without its end, all of `data` is taken as the
    /// object.
    fn new(data: &'a [u8]) -> Self {
        let object = JsonValue::new(data).object(MEMBERS);
        Self { json: data, object }
    }

    /// The same, with the bytes after the object. `None` if the object is not complete.
    fn complete(data: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let mut document = Self::new(data);
        let length = document.object.length;
        let length = length.or_else(|| Nesting::checked().end(data))?;
        let (json, rest) = data.split_at(length);
        document.json = json;
        Some((document, rest))
    }
}

/// How an object was packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// As the data of an event.
    Event,
    /// Without anything around it.
    Plain,
}

/// Splits a body into items, which go to a [`Sink`]. Pieces of the body may end anywhere: in a line
/// ending, in a character.
#[derive(Debug)]
pub struct BodySplitter {
    /// Bytes that a line and an incomplete object may have together.
    limit: usize,
    /// The line that has begun, without the blanks before it.
    line: Vec<u8>,
    /// The object that has begun. The lines of an event's data are joined by LF, as the standard
    /// says.
    object: Vec<u8>,
    nesting: Nesting,
    /// How the object that has begun is packed.
    origin: Origin,
    /// The last piece ended in CR: an LF at the beginning of the next belongs to it.
    after_cr: bool,
}

impl BodySplitter {
    /// For one body whose objects have at most `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            line: Vec::new(),
            object: Vec::new(),
            nesting: Nesting::checked(),
            origin: Origin::Plain,
            after_cr: false,
        }
    }

    /// Bytes of memory that are held of what has begun.
    pub fn held_bytes(&self) -> usize {
        self.line.capacity() + self.object.capacity()
    }

    /// Whether a plain object has begun: then each further byte is a part of an answer.
    pub fn is_in_plain_object(&self) -> bool {
        self.nesting.is_open() && self.origin == Origin::Plain
    }

    /// Takes the next piece of the body, and passes on each item that it completes.
    ///
    /// # Errors
    /// `TooLong`, or the first error of the sink.
    pub fn feed(&mut self, mut piece: &[u8], sink: &mut Sink<'_>) -> Result<(), FaultKind> {
        while !piece.is_empty() {
            piece = if self.is_in_plain_object() {
                self.feed_object(piece, sink)?
            } else {
                self.feed_line(piece, sink)?
            };
        }
        Ok(())
    }

    /// Ends the body: takes a last line without its line ending, and an object that is not
    /// complete.
    ///
    /// # Errors
    /// As [`Self::feed`].
    pub fn finish(&mut self, sink: &mut Sink<'_>) -> Result<(), FaultKind> {
        let line = std::mem::take(&mut self.line);
        self.take_line(&line, sink)?;
        self.abandon(sink)
    }

    /// Adds bytes to the plain object. Returns the bytes after its end.
    fn feed_object<'a>(
        &mut self,
        piece: &'a [u8],
        sink: &mut Sink<'_>,
    ) -> Result<&'a [u8], FaultKind> {
        // Mostly the whole object is in one piece.
        if !self.nesting.is_open()
            && let Some((document, rest)) = Document::complete(piece)
            && document.json.len() <= self.limit
        {
            sink(Item::Object(document, Origin::Plain))?;
            return Ok(rest);
        }
        let end = self.nesting.end(piece);
        if self.nesting.is_broken {
            return self.skip_line(piece, sink);
        }
        let (part, rest) = piece.split_at(end.unwrap_or(piece.len()));
        self.extend_object(part)?;
        if end.is_some() {
            sink(Item::Object(Document::new(&self.object), Origin::Plain))?;
            self.object.clear();
        }
        Ok(rest)
    }

    /// Skips a line that is not an object although it begins like one: a bracket, blanks, and then
    /// neither a key nor the other bracket. The blanks may end the line. Returns the bytes to go on
    /// with.
    fn skip_line<'a>(
        &mut self,
        piece: &'a [u8],
        sink: &mut Sink<'_>,
    ) -> Result<&'a [u8], FaultKind> {
        self.nesting = Nesting::checked();
        self.line = std::mem::take(&mut self.object);
        if self.line.contains(&b'\n') || self.line.contains(&b'\r') {
            self.line.clear();
            sink(Item::Unreadable)?;
            return Ok(piece);
        }
        let begins = usize::from(self.line.is_empty());
        self.line.extend_from_slice(&piece[..begins]);
        Ok(&piece[begins..])
    }

    /// Adds bytes to the line. Returns the bytes after its end.
    fn feed_line<'a>(
        &mut self,
        mut piece: &'a [u8],
        sink: &mut Sink<'_>,
    ) -> Result<&'a [u8], FaultKind> {
        if std::mem::take(&mut self.after_cr) {
            piece = piece.strip_prefix(b"\n").unwrap_or(piece);
        }
        if self.line.is_empty() {
            if self.nesting.is_open() {
                piece = trim_blanks(piece);
            } else {
                piece = trim_between(piece);
                if piece.starts_with(b"{") {
                    self.origin = Origin::Plain;
                    return self.feed_object(piece, sink);
                }
            }
        }
        let Some(end) = find_either(piece, b'\n', b'\r') else {
            self.extend_line(piece)?;
            return Ok(&[]);
        };
        let (part, mut rest) = (&piece[..end], &piece[end + 1..]);
        if piece[end] == b'\r' {
            self.after_cr = rest.is_empty();
            rest = rest.strip_prefix(b"\n").unwrap_or(rest);
        }
        if self.line.is_empty() {
            self.take_line(part, sink)?;
        } else {
            self.extend_line(part)?;
            let mut line = std::mem::take(&mut self.line);
            self.take_line(&line, sink)?;
            line.clear();
            self.line = line;
        }
        Ok(rest)
    }

    /// Takes a complete line, without its line ending and without the blanks before it.
    fn take_line(&mut self, line: &[u8], sink: &mut Sink<'_>) -> Result<(), FaultKind> {
        if line.is_empty() {
            return self.abandon(sink);
        }
        let is_open = self.nesting.is_open();
        match data_of(line) {
            Some(data) if is_open => self.extend_event(data, sink),
            Some(data) => self.take_data(data, sink),
            None if is_other_field(line) => Ok(()),
            // Some servers spread an object over lines and write `data` before the first only.
            None if is_open => self.extend_event(line, sink),
            None if is_done(line) => sink(Item::Done).map(drop),
            // It looked like an object when it began.
            None if line.starts_with(b"{") => sink(Item::Unreadable).map(drop),
            None => Ok(()),
        }
    }

    /// Takes the first line of an event's data. An object goes to the sink as soon as it is
    /// complete, because some servers send no blank line after it.
    fn take_data(&mut self, data: &[u8], sink: &mut Sink<'_>) -> Result<(), FaultKind> {
        let (mut rest, _) = take_complete(data, Origin::Event, sink)?;
        // Some proxies lose the line endings between two events.
        while let Some(next) = data_of(rest) {
            rest = take_complete(next, Origin::Event, sink)?.0;
        }
        if rest.is_empty() {
            return Ok(());
        }
        if rest.starts_with(b"{") {
            self.origin = Origin::Event;
            return self.extend_event(rest, sink);
        }
        let item = match is_done(rest) {
            true => Item::Done,
            false => Item::Unreadable,
        };
        sink(item).map(drop)
    }

    /// Adds a line of data to the object of an event, which begins with it or is open.
    fn extend_event(&mut self, data: &[u8], sink: &mut Sink<'_>) -> Result<(), FaultKind> {
        if !self.object.is_empty() {
            self.extend_object(b"\n")?;
        }
        let end = self.nesting.end(data);
        if self.nesting.is_broken {
            self.nesting = Nesting::checked();
            self.object.clear();
            return sink(Item::Unreadable).map(drop);
        }
        let (part, rest) = data.split_at(end.unwrap_or(data.len()));
        self.extend_object(part)?;
        if end.is_none() {
            return Ok(());
        }
        let mut object = std::mem::take(&mut self.object);
        sink(Item::Object(Document::new(&object), Origin::Event))?;
        object.clear();
        self.object = object;
        self.take_data(rest, sink)
    }

    /// Gives up an object that is not complete. Its lines may be several objects, of which only one
    /// is incomplete. Otherwise its beginning may have all that is needed.
    fn abandon(&mut self, sink: &mut Sink<'_>) -> Result<(), FaultKind> {
        if !self.nesting.is_open() {
            return Ok(());
        }
        self.nesting = Nesting::checked();
        let object = std::mem::take(&mut self.object);
        let mut has_choice = false;
        if object.contains(&b'\n') || object.contains(&b'\r') {
            for line in object.split(|byte| matches!(byte, b'\n' | b'\r')) {
                let line = trim_blanks(line);
                let line = data_of(line).unwrap_or(line);
                has_choice |= take_complete(line, self.origin, sink)?.1;
            }
        }
        if has_choice || !sink(Item::CutObject(Document::new(&object)))? {
            sink(Item::Unreadable)?;
        }
        Ok(())
    }

    fn extend_line(&mut self, bytes: &[u8]) -> Result<(), FaultKind> {
        self.make_room(bytes)?;
        self.line.extend_from_slice(bytes);
        Ok(())
    }

    fn extend_object(&mut self, bytes: &[u8]) -> Result<(), FaultKind> {
        self.make_room(bytes)?;
        self.object.extend_from_slice(bytes);
        Ok(())
    }

    fn make_room(&self, bytes: &[u8]) -> Result<(), FaultKind> {
        if self.line.len() + self.object.len() + bytes.len() > self.limit {
            return Err(FaultKind::TooLong);
        }
        Ok(())
    }
}

/// Hands over the complete objects at the start of `data`. Returns the bytes after them, and
/// whether they have a choice.
fn take_complete<'a>(
    data: &'a [u8],
    origin: Origin,
    sink: &mut Sink<'_>,
) -> Result<(&'a [u8], bool), FaultKind> {
    let (mut rest, mut has_choice) = (trim_between(data), false);
    while rest.starts_with(b"{")
        && let Some((document, after)) = Document::complete(rest)
    {
        has_choice |= sink(Item::Object(document, origin))?;
        rest = trim_between(after);
    }
    Ok((rest, has_choice))
}
