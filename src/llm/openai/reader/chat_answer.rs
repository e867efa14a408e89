//! The whole answer to a chat request, put together from what came: one `chat.completion`.
//!
//! The answer that came as one object stays as it came. The chunks of a stream are merged, as
//! OpenAI's own libraries do it: texts are joined, the entries of a list are found by their
//! `index`, entries without one are added. Values stay as they were written: numbers with all their
//! digits, texts with their escapes.

use super::json::JsonValue;
use super::text::decoded;
use crate::llm::json_member::with_member;
use crate::llm::openai::fault::FaultKind;

/// How deep values are merged. A tool call's arguments are four levels deep in a message. Deeper
/// values replace each other.
const MERGE_DEPTH: u32 = 16;
/// How deep a value is written again that is no valid JSON.
const REPAIR_DEPTH: u32 = 64;
/// Entries or members of a value among which others are searched. A search in more would take too
/// long.
const MOST_SEARCHED: usize = 1024;
/// Choices that are kept: twice as many as can be requested.
const MOST_CHOICES: usize = 256;
/// Bytes that a value takes beside its own.
const AROUND: usize = 64;
/// Members that name things: another value replaces the one before.
const LABELS: [&[u8]; 6] = [b"role", b"type", b"id", b"index", b"object", b"format"];

/// Puts one answer together.
#[derive(Debug)]
pub struct ChatAnswer {
    most_bytes: usize,
    /// The only object that has come, if it stood alone.
    whole: Option<Vec<u8>>,
    /// All members but the choices.
    members: Members,
    choices: Vec<ChatChoice>,
    /// Bytes that are held.
    bytes: usize,
}

#[derive(Debug, Default)]
struct ChatChoice {
    index: i64,
    message: Members,
    came_as_deltas: bool,
    /// All members but the message and the index.
    members: Members,
}

/// The members of an object, each key as it is written between its quotes.
type Members = Vec<(Vec<u8>, Node)>;

/// By how many bytes something has grown.
type Growth = isize;

/// A value. It is taken apart only when something is merged into it.
#[derive(Debug)]
enum Node {
    /// As it came.
    Raw(Vec<u8>),
    /// A text, as it is written between its quotes.
    Text(Vec<u8>),
    List(Vec<Node>),
    Object(Members),
}

impl ChatAnswer {
    /// For an answer of at most that many bytes.
    pub fn new(most_bytes: usize) -> Self {
        Self {
            most_bytes,
            whole: None,
            members: Vec::new(),
            choices: Vec::new(),
            bytes: 0,
        }
    }

    /// Bytes of memory that are held.
    pub fn held_bytes(&self) -> usize {
        self.bytes
    }

    /// Takes the next object. `is_alone`: it is complete, and was not packed as an event.
    ///
    /// # Errors
    /// `TooLong`.
    pub fn take(&mut self, json: &[u8], is_alone: bool) -> Result<(), FaultKind> {
        if is_alone && self.bytes == 0 {
            self.whole = Some(json.to_vec());
            self.bytes = json.len();
            return Ok(());
        }
        self.take_apart();
        self.merge(json);
        match self.bytes > self.most_bytes {
            true => Err(FaultKind::TooLong),
            false => Ok(()),
        }
    }

    /// Ends the answer. It is valid JSON.
    pub fn finish(mut self) -> Vec<u8> {
        if let Some(whole) = &self.whole
            && is_whole_answer(whole)
            && is_valid(whole)
        {
            return self.whole.unwrap_or_default();
        }
        self.take_apart();
        self.choices.sort_by_key(|choice| choice.index);
        let written = self.write(Writing::AsItCame);
        match is_valid(&written) {
            true => written,
            false => self.write(Writing::Repaired),
        }
    }

    /// Merges the object that stood alone: another one has come, or it is to be written anew.
    fn take_apart(&mut self) {
        if let Some(whole) = self.whole.take() {
            self.bytes = 0;
            self.merge(&whole);
        }
    }

    fn merge(&mut self, json: &[u8]) {
        for (key, value) in JsonValue::new(json).members() {
            match &*plain_key(key) {
                b"choices" => self.merge_choices(value),
                // `error` is null or says nothing, or the answer is none. `obfuscation` is padding.
                b"object" | b"error" | b"obfuscation" => {}
                _ => {
                    let growth = replace(&mut self.members, key, value);
                    self.grow(growth);
                }
            }
        }
    }

    fn grow(&mut self, growth: Growth) {
        self.bytes = self.bytes.saturating_add_signed(growth);
    }

    fn merge_choices(&mut self, choices: JsonValue<'_>) {
        if choices.is_array() {
            for (place, choice) in choices.items().enumerate() {
                self.merge_choice(place, choice);
            }
        } else if super::is_choice(choices) {
            self.merge_choice(0, choices);
        } else {
            for (place, (_, choice)) in choices.members().enumerate() {
                self.merge_choice(place, choice);
            }
        }
    }

    fn merge_choice(&mut self, place: usize, value: JsonValue<'_>) {
        if !value.is_object() {
            return;
        }
        let names = ["index", "delta", "message", "text"];
        let [index, delta, message, text] = value.object(names).members;
        let index = index.and_then(JsonValue::number);
        let index = index.map_or(place as i64, |index| index as i64);
        let known = self.choices.iter().rposition(|each| each.index == index);
        if known.is_none() && self.choices.len() == MOST_CHOICES {
            return;
        }
        let at = known.unwrap_or_else(|| {
            self.choices.push(ChatChoice {
                index,
                ..ChatChoice::default()
            });
            self.bytes += size_of::<ChatChoice>();
            self.choices.len() - 1
        });
        let choice = &mut self.choices[at];
        let mut growth = 0;
        let part = match delta.filter(|delta| !delta.is_null()) {
            Some(delta) => {
                choice.came_as_deltas = true;
                Some(delta)
            }
            // After deltas it repeats all of them.
            None if choice.came_as_deltas => None,
            None => message.or(text),
        };
        if let Some(part) = part {
            growth += if part.is_object() {
                merge_members(&mut choice.message, part, MERGE_DEPTH)
            } else {
                merge_member(&mut choice.message, b"content", part, MERGE_DEPTH)
            };
        }
        for (key, value) in value.members() {
            growth += match &*plain_key(key) {
                b"index" | b"delta" | b"message" | b"text" | b"error" => 0,
                b"logprobs" => merge_member(&mut choice.members, key, value, MERGE_DEPTH),
                _ => replace(&mut choice.members, key, value),
            };
        }
        self.grow(growth);
    }

    fn write(&self, writing: Writing) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.bytes);
        let is_first = |(key, _): &&(Vec<u8>, Node)| key == b"id";
        let is_last = |(key, _): &&(Vec<u8>, Node)| key == b"usage";
        let between = |member: &&(Vec<u8>, Node)| !is_first(member) && !is_last(member);
        out.push(b'{');
        for member in self.members.iter().filter(is_first) {
            writing.member(member, &mut out);
            out.push(b',');
        }
        out.extend_from_slice(br#""object":"chat.completion""#);
        for member in self.members.iter().filter(between) {
            out.push(b',');
            writing.member(member, &mut out);
        }
        out.extend_from_slice(br#","choices":["#);
        for (at, choice) in self.choices.iter().enumerate() {
            if at > 0 {
                out.push(b',');
            }
            choice.write(writing, &mut out);
        }
        out.push(b']');
        for member in self.members.iter().filter(is_last) {
            out.push(b',');
            writing.member(member, &mut out);
        }
        out.push(b'}');
        out
    }
}

impl ChatChoice {
    fn write(&self, writing: Writing, out: &mut Vec<u8>) {
        let has = |members: &Members, name: &[u8]| members.iter().any(|(key, _)| key == name);
        out.extend_from_slice(format!(r#"{{"index":{},"message":{{"#, self.index).as_bytes());
        let mut separator: &[u8] = b"";
        // Every message has these two.
        for (name, default) in [
            (&b"role"[..], &br#""role":"assistant""#[..]),
            (b"content", br#""content":null"#),
        ] {
            if !has(&self.message, name) {
                out.extend_from_slice(separator);
                out.extend_from_slice(default);
                separator = b",";
            }
        }
        for member in &self.message {
            out.extend_from_slice(separator);
            if member.0 == b"tool_calls" {
                writing.tool_calls(member, out);
            } else {
                writing.member(member, out);
            }
            separator = b",";
        }
        out.push(b'}');
        for member in &self.members {
            out.push(b',');
            writing.member(member, out);
        }
        if !has(&self.members, b"finish_reason") {
            out.extend_from_slice(br#","finish_reason":null"#);
        }
        out.push(b'}');
    }
}

/// How values are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writing {
    AsItCame,
    /// What is no valid JSON is replaced: texts are written anew, and other values are null.
    Repaired,
}

impl Writing {
    fn member(self, (key, value): &(Vec<u8>, Node), out: &mut Vec<u8>) {
        self.text(key, out);
        out.push(b':');
        self.node(value, out);
    }

    /// Writes tool calls without their `index`, which only chunks have.
    fn tool_calls(self, (key, value): &(Vec<u8>, Node), out: &mut Vec<u8>) {
        self.text(key, out);
        out.push(b':');
        let without_index = |node: &Node| {
            let mut node = node.copy_apart();
            if let Node::Object(members) = &mut node {
                members.retain(|(key, _)| key != b"index");
            }
            node
        };
        match value.copy_apart() {
            Node::List(items) => {
                let items = items.iter().map(without_index).collect();
                self.node(&Node::List(items), out);
            }
            other @ (Node::Raw(_) | Node::Text(_) | Node::Object(_)) => self.node(&other, out),
        }
    }

    fn node(self, node: &Node, out: &mut Vec<u8>) {
        match node {
            Node::Raw(json) => match self {
                Self::AsItCame => out.extend_from_slice(json),
                Self::Repaired => repair(JsonValue::new(json), REPAIR_DEPTH, out),
            },
            Node::Text(written) => self.text(written, out),
            Node::List(items) => {
                out.push(b'[');
                for (at, item) in items.iter().enumerate() {
                    if at > 0 {
                        out.push(b',');
                    }
                    self.node(item, out);
                }
                out.push(b']');
            }
            Node::Object(members) => {
                out.push(b'{');
                for (at, member) in members.iter().enumerate() {
                    if at > 0 {
                        out.push(b',');
                    }
                    self.member(member, out);
                }
                out.push(b'}');
            }
        }
    }

    fn text(self, written: &[u8], out: &mut Vec<u8>) {
        let start = out.len();
        out.push(b'"');
        out.extend_from_slice(written);
        out.push(b'"');
        if self == Self::Repaired && !is_valid(&out[start..]) {
            out.truncate(start);
            let text = serde_json::to_vec(&decoded(written));
            out.extend(text.expect("a string can be written as JSON"));
        }
    }
}

impl Node {
    fn raw(value: JsonValue<'_>) -> Self {
        Self::Raw(value.bytes().to_vec())
    }

    fn is_null(&self) -> bool {
        matches!(self, Self::Raw(json) if json == b"null")
    }

    /// Bytes that it holds.
    fn size(&self) -> usize {
        match self {
            Self::Raw(bytes) | Self::Text(bytes) => bytes.len(),
            Self::List(items) => items.iter().map(|item| item.size() + AROUND).sum(),
            Self::Object(members) => members
                .iter()
                .map(|(key, value)| key.len() + value.size() + AROUND)
                .sum(),
        }
    }

    /// Takes a value apart that is as it came.
    fn take_apart(&mut self) -> Growth {
        let Self::Raw(json) = self else {
            return 0;
        };
        let before = json.len();
        *self = self.copy_apart();
        difference(before, self.size())
    }

    /// A copy of which the outermost level is taken apart.
    fn copy_apart(&self) -> Self {
        match self {
            Self::Raw(json) => {
                let value = JsonValue::new(json);
                if let Some(text) = value.string() {
                    Self::Text(text.to_vec())
                } else if value.is_object() {
                    let members = value.members();
                    Self::Object(
                        members
                            .map(|(key, value)| (plain_key(key).into_owned(), Self::raw(value)))
                            .collect(),
                    )
                } else if value.is_array() {
                    Self::List(value.items().map(Self::raw).collect())
                } else {
                    Self::Raw(json.clone())
                }
            }
            Self::Text(text) => Self::Text(text.clone()),
            Self::List(items) => Self::List(items.iter().map(Self::copy).collect()),
            Self::Object(members) => Self::Object(
                members
                    .iter()
                    .map(|(key, value)| (key.clone(), value.copy()))
                    .collect(),
            ),
        }
    }

    fn copy(&self) -> Self {
        match self {
            Self::Raw(json) => Self::Raw(json.clone()),
            Self::Text(_) | Self::List(_) | Self::Object(_) => self.copy_apart(),
        }
    }

    /// Whether it is a part of a content that has a text.
    fn is_text_part(&self) -> bool {
        let is_text = |value: &Self| match value {
            Self::Raw(json) => JsonValue::new(json).string() == Some(b"text"),
            Self::Text(text) => text == b"text",
            Self::List(_) | Self::Object(_) => false,
        };
        match self {
            Self::Raw(json) => {
                let [kind] = JsonValue::new(json).object(["type"]).members;
                kind.and_then(JsonValue::string) == Some(b"text")
            }
            Self::Object(members) => members
                .iter()
                .any(|(key, value)| key == b"type" && is_text(value)),
            Self::Text(_) | Self::List(_) => false,
        }
    }

    /// Its `index`, if it is an object that has one.
    fn index(&self) -> Option<f64> {
        match self {
            Self::Raw(json) => index_of(JsonValue::new(json)),
            Self::Object(members) => {
                let index = members.iter().find(|(key, _)| key == b"index")?;
                match &index.1 {
                    Self::Raw(json) => JsonValue::new(json).number(),
                    Self::Text(_) | Self::List(_) | Self::Object(_) => None,
                }
            }
            Self::Text(_) | Self::List(_) => None,
        }
    }

    /// Merges a value into this one.
    fn merge(&mut self, value: JsonValue<'_>, depth: u32) -> Growth {
        if value.is_null() {
            return 0;
        }
        let Some(depth) = depth.checked_sub(1) else {
            return self.replace(value);
        };
        if self.is_null() && is_indexed(value) {
            *self = Self::List(Vec::new());
        }
        let apart = match self.is_null() {
            true => 0,
            false => self.take_apart(),
        };
        apart
            + match self {
                Self::Text(text) => {
                    if let Some(more) = value.string() {
                        text.extend_from_slice(more);
                        difference(0, more.len())
                    } else if value.is_array() {
                        let part = text_part(text);
                        let growth = difference(text.len(), part.len() + AROUND);
                        *self = Self::List(vec![Self::Raw(part)]);
                        growth + self.merge(value, depth)
                    } else {
                        self.replace(value)
                    }
                }
                Self::List(items) if value.is_array() => {
                    let each = value.items();
                    each.map(|item| merge_item(items, item, depth)).sum()
                }
                Self::List(items) if value.string().is_some() => {
                    let text = value.string().unwrap_or_default();
                    merge_text_part(items, text, depth)
                }
                Self::Object(members) if value.is_object() && members.len() <= MOST_SEARCHED => {
                    merge_members(members, value, depth)
                }
                Self::Raw(_) | Self::List(_) | Self::Object(_) => self.replace(value),
            }
    }

    fn replace(&mut self, value: JsonValue<'_>) -> Growth {
        let before = self.size();
        *self = Self::raw(value);
        difference(before, self.size())
    }
}

fn difference(before: usize, after: usize) -> Growth {
    // No value has more bytes than an `isize` can count.
    after.cast_signed() - before.cast_signed()
}

/// Merges an entry into a list.
fn merge_item(items: &mut Vec<Node>, item: JsonValue<'_>, depth: u32) -> Growth {
    let index = index_of(item).filter(|_| items.len() <= MOST_SEARCHED);
    let known = index.and_then(|index| {
        let mut items = items.iter_mut().rev();
        items.find(|known| known.index() == Some(index))
    });
    match known {
        Some(known) => known.merge(item, depth),
        None => push(items, item),
    }
}

fn push(items: &mut Vec<Node>, item: JsonValue<'_>) -> Growth {
    items.push(Node::raw(item));
    difference(0, item.bytes().len() + AROUND)
}

/// Adds a text to a list of parts: to its last part, if that is a text. Some servers send thoughts
/// as parts and then the answer as text.
fn merge_text_part(items: &mut Vec<Node>, text: &[u8], depth: u32) -> Growth {
    let part = text_part(text);
    let part = JsonValue::new(&part);
    let is_text = items.last().is_some_and(Node::is_text_part);
    match items.last_mut().filter(|_| is_text) {
        Some(last) => last.merge(part, depth),
        None => push(items, part),
    }
}

/// The part of a content that has the text, as it is written between its quotes.
fn text_part(text: &[u8]) -> Vec<u8> {
    [br#"{"type":"text","text":""#, text, br#""}"#].concat()
}

fn merge_members(members: &mut Members, object: JsonValue<'_>, depth: u32) -> Growth {
    object
        .members()
        .map(|(key, value)| merge_member(members, key, value, depth))
        .sum()
}

fn merge_member(members: &mut Members, key: &[u8], value: JsonValue<'_>, depth: u32) -> Growth {
    let key = plain_key(key);
    if LABELS.contains(&&*key) {
        return replace(members, &key, value);
    }
    match members.iter_mut().find(|(known, _)| *known == *key) {
        Some((_, node)) => node.merge(value, depth),
        None if is_indexed(value) => {
            // One chunk can have several pieces for the same index.
            let growth = insert(members, &key, JsonValue::new(b"[]"));
            let list = members.last_mut().filter(|(last, _)| *last == *key);
            growth + list.map_or(0, |(_, node)| node.merge(value, depth))
        }
        None => insert(members, &key, value),
    }
}

/// Whether it is a list of which an entry has an index.
fn is_indexed(value: JsonValue<'_>) -> bool {
    value.is_array() && value.items().any(|item| index_of(item).is_some())
}

/// Sets a member, unless the new value says nothing.
fn replace(members: &mut Members, key: &[u8], value: JsonValue<'_>) -> Growth {
    let key = plain_key(key);
    match members.iter_mut().find(|(known, _)| *known == *key) {
        None => insert(members, &key, value),
        Some((_, Node::Raw(known))) if known == value.bytes() => 0,
        Some(_) if value.is_null() || value.string() == Some(b"") => 0,
        Some((_, node)) => node.replace(value),
    }
}

/// Adds a member, unless there are too many.
fn insert(members: &mut Members, key: &[u8], value: JsonValue<'_>) -> Growth {
    if members.len() > MOST_SEARCHED {
        return 0;
    }
    members.push((key.to_vec(), Node::raw(value)));
    difference(0, key.len() + value.bytes().len() + AROUND)
}

fn index_of(value: JsonValue<'_>) -> Option<f64> {
    let [index] = value.object(["index"]).members;
    index.filter(|index| index.is_number())?.number()
}

/// A key in its usual form: without escapes that it does not need.
fn plain_key(key: &[u8]) -> std::borrow::Cow<'_, [u8]> {
    if !key.contains(&b'\\') {
        return key.into();
    }
    let text = serde_json::to_vec(&decoded(key)).expect("a string can be written as JSON");
    text[1..text.len() - 1].to_vec().into()
}

/// Whether an object has its choices as messages, as a whole answer has.
fn is_whole_answer(json: &[u8]) -> bool {
    let [choices] = JsonValue::new(json).object(["choices"]).members;
    let mut choices = choices.into_iter().flat_map(JsonValue::items);
    choices.all(|choice| {
        let [delta, message] = choice.object(["delta", "message"]).members;
        delta.is_none() && message.is_some_and(JsonValue::is_object)
    })
}

/// A whole answer as the one chunk of a stream: its messages become deltas. `None` if it is no
/// whole answer.
pub fn as_chunk(json: &[u8]) -> Option<Vec<u8>> {
    let value = JsonValue::new(json);
    let [choices] = value.object(["choices"]).members;
    choices?.items().next()?;
    if !is_whole_answer(json) {
        return None;
    }
    let mut out = Vec::with_capacity(json.len() + 64);
    write_members(value, &mut out, |key, value, out| match key {
        b"object" => out.extend_from_slice(br#""object":"chat.completion.chunk""#),
        b"choices" => {
            out.extend_from_slice(br#""choices":"#);
            write_items(value, out, |_, choice, out| {
                write_members(choice, out, |key, value, out| match key {
                    b"message" => {
                        out.extend_from_slice(br#""delta":"#);
                        write_members(value, out, write_delta_member);
                    }
                    _ => write_member(key, value, out),
                });
            });
        }
        _ => write_member(key, value, out),
    });
    Some(out)
}

/// In a chunk each tool call has its index.
fn write_delta_member(key: &[u8], value: JsonValue<'_>, out: &mut Vec<u8>) {
    if key != b"tool_calls" || !value.is_array() {
        return write_member(key, value, out);
    }
    out.extend_from_slice(br#""tool_calls":"#);
    write_items(value, out, |at, call, out| {
        let index = at.to_string();
        out.extend(with_member(call.bytes(), "index", index.as_bytes()));
    });
}

fn write_member(key: &[u8], value: JsonValue<'_>, out: &mut Vec<u8>) {
    out.push(b'"');
    out.extend_from_slice(key);
    out.extend_from_slice(b"\":");
    out.extend_from_slice(value.bytes());
}

fn write_members(
    object: JsonValue<'_>,
    out: &mut Vec<u8>,
    mut each: impl FnMut(&[u8], JsonValue<'_>, &mut Vec<u8>),
) {
    out.push(b'{');
    for (at, (key, value)) in object.members().enumerate() {
        if at > 0 {
            out.push(b',');
        }
        each(key, value, out);
    }
    out.push(b'}');
}

fn write_items(
    list: JsonValue<'_>,
    out: &mut Vec<u8>,
    mut each: impl FnMut(usize, JsonValue<'_>, &mut Vec<u8>),
) {
    out.push(b'[');
    for (at, item) in list.items().enumerate() {
        if at > 0 {
            out.push(b',');
        }
        each(at, item, out);
    }
    out.push(b']');
}

fn is_valid(json: &[u8]) -> bool {
    serde_json::from_slice::<&serde_json::value::RawValue>(json).is_ok()
}

/// Writes a value so that it is valid JSON.
fn repair(value: JsonValue<'_>, depth: u32, out: &mut Vec<u8>) {
    if is_valid(value.bytes()) {
        out.extend_from_slice(value.bytes());
        return;
    }
    let node = Node::raw(value).copy_apart();
    match node {
        Node::Text(written) => Writing::Repaired.text(&written, out),
        Node::List(items) if depth > 0 => {
            out.push(b'[');
            for (at, item) in items.iter().enumerate() {
                if at > 0 {
                    out.push(b',');
                }
                repair_node(item, depth - 1, out);
            }
            out.push(b']');
        }
        Node::Object(members) if depth > 0 => {
            out.push(b'{');
            for (at, (key, value)) in members.iter().enumerate() {
                if at > 0 {
                    out.push(b',');
                }
                Writing::Repaired.text(key, out);
                out.push(b':');
                repair_node(value, depth - 1, out);
            }
            out.push(b'}');
        }
        Node::Raw(_) | Node::List(_) | Node::Object(_) => out.extend_from_slice(b"null"),
    }
}

fn repair_node(node: &Node, depth: u32, out: &mut Vec<u8>) {
    if let Node::Raw(json) = node {
        repair(JsonValue::new(json), depth, out);
    }
}
