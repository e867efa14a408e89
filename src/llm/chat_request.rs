//! A chat request as a client sent it: checked as far as the service needs, and passed on with all
//! its members.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use bytes::Bytes;
use serde::de::{Deserializer, Error, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::json_member::{offset, with_member};
use super::openai::{JsonValue, decoded, string_end};
use crate::config::is_model_name;

/// How deep arrays and objects may be nested. The schema of a tool has about ten levels; many
/// parsers, serde's too, end at 128.
const MOST_DEPTH: usize = 128;
/// Members of a request. OpenAI's protocol has about forty. A bound keeps the search for members
/// that come twice quick.
const MOST_MEMBERS: usize = 256;
/// Choices of one answer, as in OpenAI's protocol.
const MOST_CHOICES: u32 = 128;

/// What stands in messages that have images, audio, video or files. The escapes are other spellings
/// of the same letters, which no usual client writes.
const MEDIA: [&str; 12] = [
    "\"image_url\"",
    "\"image\"",
    "\"input_audio\"",
    "\"audio_url\"",
    "\"audio\"",
    "\"video_url\"",
    "\"document_url\"",
    "\"document\"",
    "\"file\"",
    r"\u006",
    r"\u007",
    r"\u005",
];
/// Types of the parts of a content that are texts.
const TEXT_PARTS: [&str; 6] = [
    "text",
    "input_text",
    "output_text",
    "refusal",
    "thinking",
    "reasoning",
];
/// Members by which the upstream adds to the input: results of searches, texts of files.
const ADDING_MEMBERS: [&str; 2] = ["web_search_options", "plugins"];
/// Types of tools that the caller runs. Others run at the upstream, which adds their results.
const TOOLS_OF_CALLER: [&str; 2] = ["function", "custom"];

/// A chat request: a JSON object. Its members are kept as they came.
#[derive(Clone, Debug)]
pub struct ChatRequest {
    body: Bytes,
    /// The name of each member, and where its value is in the body.
    members: Vec<(String, Range<usize>)>,
    model: String,
    is_streamed: bool,
    wants_usage: bool,
    most_output_tokens: Option<u64>,
    choices: u32,
    may_exceed_bytes: bool,
}

/// Why a chat request cannot be used. The text quotes nothing of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ChatRequestProblem {
    /// A sentence for humans.
    pub message: &'static str,
    /// The member with the problem; `None` if it is the request as a whole.
    pub param: Option<&'static str>,
}

impl ChatRequestProblem {
    fn whole(message: &'static str) -> Self {
        Self {
            message,
            param: None,
        }
    }

    fn of(param: &'static str, message: &'static str) -> Self {
        Self {
            message,
            param: Some(param),
        }
    }
}

impl ChatRequest {
    /// Reads a request. Members that the service does not need are not looked at.
    ///
    /// # Errors
    /// It is not a JSON object, is nested too deep, has a member twice (readers differ in which of
    /// the two counts), or lacks `model` or `messages`; or a member that the service reads has
    /// another type.
    pub fn parse(body: Bytes) -> Result<Self, ChatRequestProblem> {
        if is_too_deep(&body) {
            return Err(ChatRequestProblem::whole(
                "The body is nested too deep: more than 128 levels.",
            ));
        }
        let members = read_members(&body)?;
        let mut request = Self {
            body,
            members,
            model: String::new(),
            is_streamed: false,
            wants_usage: false,
            most_output_tokens: None,
            choices: 1,
            may_exceed_bytes: false,
        };
        request.model = request.read_model()?;
        request.check_messages()?;
        request.is_streamed = request.read_flag("stream")?;
        request.wants_usage = request.read_wants_usage()?;
        let most = request.read_count("max_completion_tokens")?;
        let older = request.read_count("max_tokens")?;
        // Upstreams differ in which of the two they follow.
        request.most_output_tokens = most.max(older);
        request.choices = request.read_choices()?;
        request.may_exceed_bytes = request.has_media() || request.has_additions();
        Ok(request)
    }

    /// The model that is asked for.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// Whether the answer is to be streamed.
    pub fn is_streamed(&self) -> bool {
        self.is_streamed
    }

    /// Whether the stream is to end with the usage (`stream_options.include_usage`).
    pub fn wants_usage(&self) -> bool {
        self.wants_usage
    }

    /// The JSON of `messages`, a list that is not empty.
    pub fn messages(&self) -> &str {
        self.member("messages").unwrap_or("[]")
    }

    /// The text of the last message of the user: its content, or the texts among its parts, joined
    /// by line feeds. Without NUL. Empty if there is none.
    pub fn last_user_text(&self) -> String {
        let messages = self.each_message();
        let of_user = messages.filter_map(|message| {
            let [role, content] = message.object(["role", "content"]).members;
            (role?.text()? == "user").then_some(content)
        });
        let mut texts = Vec::new();
        if let Some(content) = of_user.last().flatten() {
            push_texts(content, &mut texts);
        }
        texts.join("\n")
    }

    /// The texts of all messages, joined by line feeds.
    pub(super) fn text(&self) -> String {
        let mut texts = Vec::new();
        for message in self.each_message() {
            let [content] = message.object(["content"]).members;
            if let Some(content) = content {
                push_texts(content, &mut texts);
            }
        }
        texts.join("\n")
    }

    /// All texts of the request, keys too, joined by line feeds: none of them may be logged. `None`
    /// if the request has more than `most` bytes.
    pub(super) fn every_text(&self, most: usize) -> Option<String> {
        if self.body.len() > most {
            return None;
        }
        let mut texts = String::new();
        let mut rest: &[u8] = &self.body;
        while let Some(start) = rest.iter().position(|byte| *byte == b'"') {
            let string = &rest[start..];
            let end = string_end(string)?;
            texts.push_str(&decoded(&string[1..end - 1]));
            texts.push('\n');
            rest = &string[end..];
        }
        Some(texts)
    }

    fn each_message(&self) -> impl Iterator<Item = JsonValue<'_>> {
        JsonValue::new(self.messages().as_bytes()).items()
    }

    /// The most tokens that the answer may have: the greater of `max_completion_tokens` and
    /// `max_tokens`.
    pub fn most_output_tokens(&self) -> Option<u64> {
        self.most_output_tokens
    }

    /// How many answers are wanted (`n`), from 1 to 128.
    pub fn choices(&self) -> u32 {
        self.choices
    }

    /// Whether the input may have more tokens than the request has bytes: it may have images,
    /// audio, video or files, or lets the upstream search. A text that speaks of them can count
    /// too.
    pub fn may_exceed_bytes(&self) -> bool {
        self.may_exceed_bytes
    }

    /// The service tier that is asked for, if it can be read.
    pub fn service_tier(&self) -> Option<Cow<'_, str>> {
        let raw = self.member("service_tier").filter(|raw| *raw != "null")?;
        // What is no text names a tier that nobody knows.
        let tier = serde_json::from_str::<String>(raw).map_or(Cow::Borrowed(raw), Cow::Owned);
        Some(tier)
    }

    /// The JSON of a member, as it came.
    pub fn member(&self, name: &str) -> Option<&str> {
        let mut members = self.members();
        members.find_map(|(known, value)| (known == name).then_some(value))
    }

    /// The name of each member, with its JSON, in the order in which they came.
    pub fn members(&self) -> impl Iterator<Item = (&str, &str)> {
        let members = self.members.iter();
        members.map(|(name, place)| (name.as_str(), self.text_at(place)))
    }

    /// The whole request, as it came.
    pub fn body(&self) -> &Bytes {
        &self.body
    }

    /// The body that an upstream gets, which is asked for `model`. A streamed answer is to end with
    /// the usage. All other bytes are as they came.
    pub(crate) fn body_for(&self, model: &str) -> Bytes {
        let name = serde_json::to_vec(model).expect("a string can be written as JSON");
        let body = match self.model == model {
            true => self.body.clone(),
            false => with_member(&self.body, "model", &name).into(),
        };
        if !self.is_streamed || self.wants_usage {
            return body;
        }
        let options = self.member("stream_options").filter(|raw| *raw != "null");
        let options = with_member(options.unwrap_or("{}").as_bytes(), "include_usage", b"true");
        with_member(&body, "stream_options", &options).into()
    }

    fn text_at(&self, place: &Range<usize>) -> &str {
        // Checked when the members were read.
        std::str::from_utf8(&self.body[place.clone()]).unwrap_or_default()
    }

    fn has_media(&self) -> bool {
        let messages = self.messages();
        let is_text = |part: JsonValue<'_>| {
            let [kind] = part.object(["type"]).members;
            is_one_of(kind, &TEXT_PARTS)
        };
        MEDIA.iter().any(|word| messages.contains(word))
            || self.each_message().any(|message| {
                let [content] = message.object(["content"]).members;
                content.is_some_and(|content| !content.items().all(is_text))
            })
    }

    fn has_additions(&self) -> bool {
        let has = |name: &&str| self.member(name).is_some_and(|raw| raw != "null");
        let tools = JsonValue::new(self.member("tools").unwrap_or_default().as_bytes());
        ADDING_MEMBERS.iter().any(has)
            || tools.items().any(|tool| {
                let [kind] = tool.object(["type"]).members;
                !is_one_of(kind, &TOOLS_OF_CALLER)
            })
    }

    fn read_model(&self) -> Result<String, ChatRequestProblem> {
        let problem = |message| ChatRequestProblem::of("model", message);
        let raw = self
            .member("model")
            .ok_or_else(|| problem("The member model is missing."))?;
        let model: String =
            serde_json::from_str(raw).map_err(|_| problem("model must be a text."))?;
        match is_model_name(&model) {
            true => Ok(model),
            false => Err(problem(
                "model must have 1 to 200 bytes, without control characters.",
            )),
        }
    }

    fn check_messages(&self) -> Result<(), ChatRequestProblem> {
        let problem = |message| ChatRequestProblem::of("messages", message);
        let raw = self
            .member("messages")
            .ok_or_else(|| problem("The member messages is missing."))?;
        let messages = JsonValue::new(raw.as_bytes());
        if !messages.is_array() {
            return Err(problem("messages must be a list."));
        }
        if messages.items().next().is_none() {
            return Err(problem("messages must not be empty."));
        }
        match messages.items().all(JsonValue::is_object) {
            true => Ok(()),
            false => Err(problem("messages must be a list of objects.")),
        }
    }

    fn read_flag(&self, name: &'static str) -> Result<bool, ChatRequestProblem> {
        match self.member(name) {
            Some("true") => Ok(true),
            Some("false" | "null") | None => Ok(false),
            Some(_) => Err(ChatRequestProblem::of(name, "must be true or false.")),
        }
    }

    fn read_wants_usage(&self) -> Result<bool, ChatRequestProblem> {
        const NAME: &str = "stream_options";
        let Some(raw) = self.member(NAME).filter(|raw| *raw != "null") else {
            return Ok(false);
        };
        let options = JsonValue::new(raw.as_bytes());
        if !options.is_object() {
            return Err(ChatRequestProblem::of(
                NAME,
                "stream_options must be an object.",
            ));
        }
        let [wants] = options.object(["include_usage"]).members;
        match wants.map(JsonValue::bytes) {
            Some(b"true") => Ok(true),
            Some(b"false" | b"null") | None => Ok(false),
            Some(_) => Err(ChatRequestProblem::of(
                NAME,
                "include_usage in stream_options must be true or false.",
            )),
        }
    }

    fn read_count(&self, name: &'static str) -> Result<Option<u64>, ChatRequestProblem> {
        let Some(raw) = self.member(name).filter(|raw| *raw != "null") else {
            return Ok(None);
        };
        let whole = |number: f64| (number >= 0.0 && number.fract() == 0.0).then_some(number as u64);
        let count = raw.parse().ok().or_else(|| whole(raw.parse().ok()?));
        match count {
            Some(count) => Ok(Some(count)),
            None => Err(ChatRequestProblem::of(
                name,
                "must be a whole number that is not negative.",
            )),
        }
    }

    fn read_choices(&self) -> Result<u32, ChatRequestProblem> {
        let count = self.read_count("n")?.unwrap_or(1);
        u32::try_from(count)
            .ok()
            .filter(|count| (1..=MOST_CHOICES).contains(count))
            .ok_or_else(|| ChatRequestProblem::of("n", "must be from 1 to 128."))
    }
}

/// Whether a value is one of these texts.
fn is_one_of(value: Option<JsonValue<'_>>, words: &[&str]) -> bool {
    let text = value.and_then(JsonValue::text);
    text.is_some_and(|text| words.contains(&text.as_str()))
}

/// Adds the text of a content, or the texts among its parts. Without NUL.
fn push_texts(content: JsonValue<'_>, texts: &mut Vec<String>) {
    if let Some(text) = content.string() {
        texts.push(decoded(text));
        return;
    }
    for part in content.items() {
        let [text] = part.object(["text"]).members;
        if let Some(text) = text.and_then(JsonValue::string) {
            texts.push(decoded(text));
        }
    }
}

/// Whether arrays and objects are nested deeper than they may be.
fn is_too_deep(json: &[u8]) -> bool {
    let (mut depth, mut is_in_string, mut is_escaped) = (0_usize, false, false);
    for byte in json {
        match byte {
            _ if std::mem::take(&mut is_escaped) => {}
            b'\\' if is_in_string => is_escaped = true,
            b'"' => is_in_string = !is_in_string,
            b'{' | b'[' if !is_in_string => {
                depth += 1;
                if depth > MOST_DEPTH {
                    return true;
                }
            }
            b'}' | b']' if !is_in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    false
}

/// The members of the object: their names, and where their values are.
fn read_members(body: &[u8]) -> Result<Vec<(String, Range<usize>)>, ChatRequestProblem> {
    let not_json = || ChatRequestProblem::whole("The body is not valid JSON.");
    let whole: &RawValue = serde_json::from_slice(body).map_err(|_| not_json())?;
    let text = whole.get();
    if !text.starts_with('{') {
        return Err(ChatRequestProblem::whole("The body is not a JSON object."));
    }
    let mut read = serde_json::Deserializer::from_str(text);
    let members = read.deserialize_map(Members).map_err(|error| {
        let is_ours = error.is_data();
        match is_ours {
            true => ChatRequestProblem::whole("The body has more than 256 members."),
            false => not_json(),
        }
    })?;
    let mut places: Vec<(String, Range<usize>)> = Vec::with_capacity(members.len());
    for (name, value) in members {
        if places.iter().any(|(known, _)| *known == name) {
            return Err(ChatRequestProblem::whole(
                "A member of the body comes twice.",
            ));
        }
        let start = offset(body, value.get().as_bytes());
        places.push((name, start..start + value.get().len()));
    }
    Ok(places)
}

/// Reads the members of an object in their order.
struct Members;

impl<'de> Visitor<'de> for Members {
    type Value = Vec<(String, &'de RawValue)>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut members = Vec::new();
        while let Some(member) = map.next_entry()? {
            if members.len() == MOST_MEMBERS {
                return Err(A::Error::custom("too many members"));
            }
            members.push(member);
        }
        Ok(members)
    }
}
