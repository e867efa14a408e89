//! Reads an answer from the bytes of a body, whole or streamed. It reads what is needed and skips
//! what it does not understand.
//!
//! Servers of this protocol agree on the essentials only, and every answer was paid for. So the
//! reader refuses no answer because of a part that is not needed. It knows neither time nor
//! connections: bytes go in, text comes out.

mod chat_answer;
mod choice;
mod documents;
mod error_object;
mod event_lines;
mod json;
mod nesting;
mod text;
mod usage;

use std::collections::BTreeMap;

use self::chat_answer::ChatAnswer;
pub use self::chat_answer::as_chunk;
use self::choice::Choice;
use self::documents::{BodySplitter, Document, Item, Origin};
use self::error_object::reports_error;
pub use self::json::{JsonValue, string_end};
pub use self::text::decoded;
use self::usage::UsageCounts;
use super::fault::FaultKind;
use super::line::one_line;
use crate::llm::Completion;

/// Longest name of a model that is kept, in characters.
const MODEL_CHARS: usize = 200;
/// JSON around the text of an answer, or in an event of a stream.
const JSON_AROUND: usize = 64 * 1024;
/// A byte of text may be written with six, as `\u0001`.
const JSON_PER_TEXT: usize = 6;
/// Bytes that a body may have for each byte of text. Servers send a few hundred with every token of
/// a stream.
const BODY_PER_TEXT: usize = 512;

/// Choices whose ends are waited for.
const MOST_CHOICES: usize = 256;

/// Takes each JSON object of an answer to a chat request, as it came.
pub type OnObject<'a> = dyn FnMut(&[u8]) + 'a;

/// What a piece of the body brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// A JSON object came, or a part of a plain one: the upstream is at work. Comments only keep a
    /// connection open.
    pub is_alive: bool,
    /// Something came that belongs to the answer: text, a thought, usage, or the reason for the
    /// end.
    pub is_news: bool,
}

/// Reads one body.
#[derive(Debug)]
pub struct AnswerReader {
    documents: BodySplitter,
    /// What has come so far.
    pub gathered: Gathered,
    /// Bytes that the body may still have.
    pub room: usize,
    /// Bytes of the text that `new_text` has returned.
    given: usize,
}

/// What the objects of a body have brought so far.
#[derive(Debug, Default)]
pub struct Gathered {
    most_text: usize,
    /// The model and the usage; the text and the reason are in `choice`.
    pub answer: Completion,
    usage: UsageCounts,
    /// Of an answer to a chat request.
    chat: Option<ChatParts>,
    /// The choice that is the answer as things stand, and its index: the first that came, until one
    /// with the index 0 comes.
    choice: Option<(i64, Choice)>,
    /// Whether `[DONE]` has come.
    pub is_done: bool,
    /// Objects that were read.
    objects: u64,
    /// How the first was packed.
    origin: Option<Origin>,
    /// Events and objects that could not be read and were left out.
    pub skipped: u64,
    failed: Option<FaultKind>,
    /// The JSON of the error that the upstream sent in place of an answer, or in the middle of one.
    pub error: Option<Vec<u8>>,
    received: Received,
}

/// What is kept of an answer to a chat request beside its first choice.
#[derive(Debug)]
struct ChatParts {
    answer: ChatAnswer,
    /// How many choices were requested.
    wanted: usize,
    /// The choices, and whether each has said why it ended.
    ends: BTreeMap<i64, bool>,
}

impl AnswerReader {
    /// For the answer to a chat request that wants so many choices: all of it is kept.
    pub fn chat(most_text: usize, choices: u32) -> Self {
        let mut reader = Self::new(most_text);
        reader.gathered.chat = Some(ChatParts {
            answer: ChatAnswer::new(most_text * JSON_PER_TEXT + JSON_AROUND),
            wanted: choices as usize,
            ends: BTreeMap::new(),
        });
        reader
    }

    /// For one body with at most `most_text` bytes of text.
    pub fn new(most_text: usize) -> Self {
        Self {
            documents: BodySplitter::new(most_text * JSON_PER_TEXT + JSON_AROUND),
            gathered: Gathered {
                most_text,
                ..Gathered::default()
            },
            room: most_text.saturating_mul(BODY_PER_TEXT) + JSON_AROUND,
            given: 0,
        }
    }

    /// Bytes of memory that the reader holds.
    pub fn held_bytes(&self) -> usize {
        let chat = self.gathered.chat.as_ref();
        let chat = chat.map_or(0, |parts| parts.answer.held_bytes());
        self.documents.held_bytes() + self.gathered.text_bytes() + chat
    }

    /// Takes the next piece of the body. `on_object` gets each object of an answer to a chat
    /// request.
    ///
    /// # Errors
    /// `ErrorObject` or `TooLong`; [`Self::finish`] says whether the answer was whole before that.
    pub fn feed(
        &mut self,
        piece: &[u8],
        on_object: &mut OnObject<'_>,
    ) -> Result<Received, FaultKind> {
        self.gathered.received = Received::default();
        self.room = self
            .room
            .checked_sub(piece.len())
            .ok_or(FaultKind::TooLong)?;
        let gathered = &mut self.gathered;
        self.documents
            .feed(piece, &mut |item| gathered.take(item, on_object))?;
        gathered.received.is_alive |= self.documents.is_in_plain_object();
        Ok(gathered.received)
    }

    /// The text that has come since the last call.
    pub fn new_text(&mut self) -> &str {
        // Of another choice nothing is shown, because index 0 may still come.
        let text = match &self.gathered.choice {
            Some((0, choice)) => choice.text.as_str(),
            Some(_) | None => "",
        };
        let new = &text[self.given..];
        self.given = text.len();
        new
    }

    /// Ends the body. `is_cut`: it was cut off, stopped coming or took too long. Returns the
    /// answer, and the part of its text that `new_text` has not returned. The model is empty if the
    /// upstream does not name it. `on_object`: as for [`Self::feed`].
    ///
    /// # Errors
    /// `Truncated` if the answer has begun and not ended, `Malformed` if there is none, or the
    /// error of [`Self::feed`].
    pub fn finish(
        &mut self,
        is_cut: bool,
        on_object: &mut OnObject<'_>,
    ) -> Result<(Completion, String), FaultKind> {
        let gathered = &mut self.gathered;
        // An error of the sink is kept in `failed`; other errors are not possible here.
        let _ = self
            .documents
            .finish(&mut |item| gathered.take(item, on_object));
        let answer = gathered.finish(is_cut)?;
        let rest = answer.text[self.given..].to_owned();
        Ok((answer, rest))
    }
}

impl Gathered {
    fn text_bytes(&self) -> usize {
        let choice = self.choice.as_ref();
        choice.map_or(0, |(_, choice)| choice.text.len())
    }

    /// Whether the model has said why it stopped, and no text has come since: nothing undoes the
    /// answer then. If several choices were requested, this is said of all of them.
    pub fn has_reason(&self) -> bool {
        let choice = self.choice.as_ref();
        choice.is_some_and(|(_, choice)| choice.reason.is_some())
            && self.others_have_ended()
            && self
                .chat
                .as_ref()
                .is_none_or(|parts| parts.ends.len() >= parts.wanted)
    }

    /// Whether no choice has begun without saying why it ended; of a prompt, only one counts.
    fn others_have_ended(&self) -> bool {
        let chat = self.chat.as_ref();
        chat.is_none_or(|parts| parts.ends.values().all(|has_ended| *has_ended))
    }

    fn take(&mut self, item: Item<'_>, on_object: &mut OnObject<'_>) -> Result<bool, FaultKind> {
        let taken = match item {
            Item::Object(document, origin) => self.take_object(document, Some(origin), on_object),
            Item::CutObject(document) => self.take_object(document, None, on_object),
            Item::Done => {
                self.is_done = true;
                Ok(false)
            }
            Item::Unreadable => {
                self.skipped += 1;
                Ok(false)
            }
        };
        if let Err(kind) = taken {
            self.failed = Some(kind);
        }
        taken
    }

    /// Takes an object. `origin` is `None` if the object is cut off. Returns whether it has a
    /// choice.
    fn take_object(
        &mut self,
        document: Document<'_>,
        origin: Option<Origin>,
        on_object: &mut OnObject<'_>,
    ) -> Result<bool, FaultKind> {
        let [choices, usage, model, error, kind] = document.object.members;
        if !document.object.is_readable {
            // Incomplete objects are counted by `BodySplitter`.
            self.skipped += u64::from(origin.is_some());
            return Ok(false);
        }
        if let Some(origin) = origin {
            self.objects += 1;
            self.origin.get_or_insert(origin);
            self.received.is_alive = true;
        }
        if let Some(usage) = usage {
            self.take_usage(usage);
        }
        if self.is_done {
            if usage.is_some() {
                self.keep(document.json, origin, on_object)?;
            }
            return Ok(false);
        }
        if let Some(model) = model.and_then(JsonValue::string) {
            self.take_model(model);
        }
        let (has_choice, has_broken_down) = match choices {
            Some(choices) => self.take_choices(choices),
            None => (false, false),
        };
        if self.text_bytes() > self.most_text {
            return Err(FaultKind::TooLong);
        }
        let is_error = has_broken_down
            || error.is_some_and(reports_error)
            || kind.and_then(JsonValue::string) == Some(b"error");
        if is_error && !self.has_reason() {
            self.error = Some(document.json.to_vec());
            return Err(FaultKind::ErrorObject);
        }
        if !is_error {
            self.keep(document.json, origin, on_object)?;
        }
        Ok(has_choice)
    }

    /// Keeps an object of an answer to a chat request, and hands it over if it is complete.
    fn keep(
        &mut self,
        json: &[u8],
        origin: Option<Origin>,
        on_object: &mut OnObject<'_>,
    ) -> Result<(), FaultKind> {
        let Some(parts) = &mut self.chat else {
            return Ok(());
        };
        if origin.is_some() {
            on_object(json);
        }
        parts.answer.take(json, origin == Some(Origin::Plain))
    }

    /// Takes the choices: a list, or a single one. Returns whether there is one, and whether the
    /// answer broke down.
    fn take_choices(&mut self, choices: JsonValue<'_>) -> (bool, bool) {
        let mut taken = (false, false);
        let mut each = |place: usize, choice: JsonValue<'_>| {
            if choice.is_object() {
                taken.0 = true;
                taken.1 |= self.take_choice(place, choice);
            }
        };
        if choices.is_array() {
            for (place, choice) in choices.items().enumerate() {
                each(place, choice);
            }
        } else if is_choice(choices) {
            each(0, choices);
        } else {
            // Some servers write a list as an object whose names are the places.
            for (place, (_, choice)) in choices.members().enumerate() {
                each(place, choice);
            }
        }
        taken
    }

    /// Takes a choice. Returns whether the answer broke down.
    fn take_choice(&mut self, place: usize, choice: JsonValue<'_>) -> bool {
        let [delta, message, text, reason, error] = choice::MEMBERS;
        let names = ["index", delta, message, text, reason, error];
        let [index, members @ ..] = choice.object(names).members;
        // Without a readable index, the place in the list counts.
        let index = match index.and_then(JsonValue::number) {
            Some(index) => index as i64,
            None => place as i64,
        };
        if let Some(parts) = &mut self.chat
            && (parts.ends.len() < MOST_CHOICES || parts.ends.contains_key(&index))
        {
            let has_reason = members[REASON].and_then(choice::read_reason).is_some();
            *parts.ends.entry(index).or_default() |= has_reason;
            self.received.is_news = true;
        }
        let is_other = |(known, _): &(i64, Choice)| *known != index;
        if self.choice.as_ref().is_some_and(is_other) {
            if index != 0 {
                return false;
            }
            self.choice = None;
        }
        let new = || (index, Choice::default());
        let brought = self.choice.get_or_insert_with(new).1.take(members);
        self.received.is_news |= brought.work || brought.reason;
        brought.breakdown
    }

    fn take_usage(&mut self, usage: JsonValue<'_>) {
        self.received.is_news |= self.usage.take(usage);
        let answer = &mut self.answer;
        answer.prompt_tokens = self.usage.prompt_tokens();
        answer.completion_tokens = self.usage.completion_tokens();
        answer.usage = self.usage.tokens();
    }

    fn take_model(&mut self, written: &[u8]) {
        // Every event of a stream has it.
        if self.answer.model.as_bytes() == written {
            return;
        }
        let model = one_line(&text::decoded(written), MODEL_CHARS);
        if !model.is_empty() {
            self.answer.model = model;
        }
    }

    fn finish(&mut self, is_cut: bool) -> Result<Completion, FaultKind> {
        if let Some(kind) = self.failed {
            return Err(kind);
        }
        let has_choice = self.choice.is_some();
        let others_have_ended = self.others_have_ended();
        let (_, choice) = self.choice.take().unwrap_or_default();
        // A single complete object needs no reason, because nothing is missing from it. If it looks
        // like the first event of a stream, the body must have ended in order.
        let is_whole = self.objects == 1
            && match (self.origin, choice.came_as_deltas) {
                (Some(Origin::Plain), false) => true,
                (Some(Origin::Plain), true) | (Some(Origin::Event), false) => !is_cut,
                (Some(Origin::Event), true) | (None, _) => false,
            };
        let chat = self.chat.take();
        // A tool call is an answer to a chat request, too.
        let has_content = choice.has_content || (chat.is_some() && choice.has_work);
        let has_ended = choice.reason.is_some() && others_have_ended;
        if !has_ended && !((self.is_done || is_whole) && has_content) {
            return Err(match has_choice && !self.is_done && !is_whole {
                true => FaultKind::Truncated,
                false => FaultKind::Malformed,
            });
        }
        Ok(Completion {
            text: choice.text.finish(),
            finish_reason: choice.reason,
            answer: chat.map(|parts| parts.answer.finish().into()),
            ..std::mem::take(&mut self.answer)
        })
    }
}

/// The place of the reason among the members of a choice.
const REASON: usize = 3;

/// Whether an object is a choice, rather than a list of such.
fn is_choice(value: JsonValue<'_>) -> bool {
    let members = value.object(choice::MEMBERS).members;
    members.iter().any(Option::is_some)
}
