//! `POST /v1/embeddings`.

use std::convert::Infallible;
use std::fmt;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::de::{Deserializer, IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;
use utoipa::ToSchema;
use utoipa::openapi::schema::{ArrayBuilder, ObjectBuilder, OneOfBuilder, Schema, Type};

use super::errors::OpenAiErrorResponse;
use super::limits::Limits;
use crate::api::authenticate::{EmbeddingsScope, Permitted};
use crate::api::error::ApiError;
use crate::api::extract::{RequestOwner, read_json};
use crate::api::json_response::reserved_bytes;
use crate::api::state::AppState;
use crate::error::Error;
use crate::memory_budget::Reservation;
use crate::services::embeddings::EmbeddedTexts;
use crate::services::prompts::chat::by_length;

/// Texts of one request: OpenAI's bound.
const MOST_TEXTS: usize = 2048;

/// What a number takes at most as JSON, with its comma, in bytes.
const NUMBER_BYTES: usize = 17;
/// What a vector takes as JSON beside its numbers, in bytes.
const AROUND: usize = 64;
/// Vectors that are written as JSON together, so that no thread is held up by thousands.
const VECTORS_PER_PIECE: usize = 8;

/// A request for embeddings. Other members are ignored.
#[derive(Serialize, ToSchema)]
pub struct EmbeddingRequest {
    /// The model of this service, as `GET /v1/models` lists it.
    #[schema(example = "all-MiniLM-L6-v2")]
    model: String,
    /// One text, or 1 to 2,048 texts. None is empty. Token ids are refused.
    #[schema(schema_with = input_schema)]
    input: Value,
    /// Whether each vector is a list of numbers, or the base64 of its little-endian 32-bit floats.
    #[schema(default = "float", required = false)]
    encoding_format: Option<EncodingFormat>,
    /// How many numbers each vector has: the first ones, brought to length 1 again. From 1 to the
    /// model's 384.
    #[schema(minimum = 1, maximum = 384, default = 384, required = false)]
    dimensions: Option<usize>,
}

/// One text or several.
fn input_schema() -> Schema {
    let text = || {
        ObjectBuilder::new()
            .schema_type(Type::String)
            .min_length(Some(1))
    };
    let texts = ArrayBuilder::new()
        .items(text())
        .min_items(Some(1))
        .max_items(Some(MOST_TEXTS));
    let both = OneOfBuilder::new().item(text()).item(texts);
    both.examples(["hello world"]).build().into()
}

/// How a vector is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum EncodingFormat {
    /// A list of numbers.
    Float,
    /// The base64 of its little-endian 32-bit floats.
    Base64,
}

/// The vectors.
#[derive(Serialize, ToSchema)]
pub struct EmbeddingListResponse {
    /// Always `list`.
    #[schema(example = "list")]
    object: &'static str,
    /// In the order of the texts.
    data: Vec<EmbeddingResponse>,
    /// The model's name.
    #[schema(example = "all-MiniLM-L6-v2")]
    model: String,
    usage: EmbeddingUsage,
}

/// The vector of a text.
#[derive(Serialize, ToSchema)]
pub struct EmbeddingResponse {
    /// Always `embedding`.
    #[schema(example = "embedding")]
    object: &'static str,
    /// The place of its text, from 0 on.
    index: usize,
    embedding: WrittenVector,
}

/// The numbers of a vector, of length 1.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub enum WrittenVector {
    /// As numbers.
    Numbers(Vec<f32>),
    /// As base64.
    Base64(String),
}

/// What the model has read.
#[derive(Clone, Copy, Serialize, ToSchema)]
pub struct EmbeddingUsage {
    /// Tokens that the model has read of all texts: each with the two that frame it, and without
    /// those beyond the model's limit.
    prompt_tokens: usize,
    /// The same.
    total_tokens: usize,
}

/// Create embeddings
///
/// The vectors of one text or of up to 2,048, by the model that posts and searches use. A text
/// longer than the model reads is cut. Nothing is stored. Throttled for each user by `V1_THROTTLE`.
#[utoipa::path(
    post, path = "/v1/embeddings", tag = "v1", operation_id = "create_embeddings", security(("bearer" = []), ("api_key" = [])),
    request_body(content = EmbeddingRequest, content_type = "application/json"),
    responses(
        (status = 200, description = "The vectors, in the order of the texts.", body = EmbeddingListResponse),
        (status = 400, description = "The body is no such request. Token ids: the message names the client's setting to change.", body = OpenAiErrorResponse),
        (status = 403, description = "The key may not do this.", body = OpenAiErrorResponse),
        (status = 404, description = "This is not the model of this service, or the key may not use it.", body = OpenAiErrorResponse),
        (status = 413, description = "The body is larger than `MAX_V1_BODY`.", body = OpenAiErrorResponse),
        (status = 429, description = "Too many. `Retry-After` and `retry-after-ms` say when one succeeds.", body = OpenAiErrorResponse),
    ),
)]
pub async fn create_embeddings(
    State(state): State<AppState>,
    Permitted { caller, .. }: Permitted<EmbeddingsScope>,
    RequestOwner(owner): RequestOwner,
    limits: Limits,
    request: Request,
) -> Result<Response, ApiError> {
    limits.admit(&state, &caller).await?;
    let (parts, body) = request.into_parts();
    let mut memory = state.memory.hold(owner, 0);
    let most = state.server.max_v1_body;
    let body = read_json(&parts.headers, body, most, &mut memory).await?;
    // The body was admitted. Its texts are no larger, and then it is dropped.
    memory.grow(body.len());
    let wanted = Wanted::read(body)
        .await
        .map_err(|problem| ApiError::invalid_member(problem.message, problem.param))?;
    let embeddings = &state.embeddings;
    if wanted.model != embeddings.model_name() || !caller.may_use_model(&wanted.model) {
        return Err(Error::ModelNotFound.into());
    }
    let dimensions = match wanted.dimensions {
        None => embeddings.dimension,
        Some(dimensions) => usize::try_from(dimensions)
            .ok()
            .filter(|dimensions| (1..=embeddings.dimension).contains(dimensions))
            .ok_or_else(|| {
                let most = embeddings.dimension;
                let message = format!("dimensions must be from 1 to {most}, the model's.");
                ApiError::invalid_member(&message, Some("dimensions"))
            })?,
    };
    let text_bytes: usize = wanted.texts.iter().map(String::capacity).sum();
    let per_text = size_of::<String>() + embeddings.dimension * size_of::<f32>();
    let piece = VECTORS_PER_PIECE * (AROUND + dimensions * NUMBER_BYTES);
    memory
        .try_resize(text_bytes + wanted.texts.len() * per_text + piece)
        .map_err(Error::from)?;
    let embedded = embeddings.embed(caller.user_id(), &wanted.texts, dimensions);
    let embedded = embedded.await?;
    drop(wanted.texts);
    let vector_bytes = embedded.vectors.len() * dimensions * size_of::<f32>();
    memory.resize(vector_bytes + piece);
    Ok(respond(wanted.model, wanted.format, embedded, memory))
}

/// Why a request cannot be used.
#[derive(Debug, PartialEq, Eq)]
struct Problem {
    message: &'static str,
    param: Option<&'static str>,
}

impl Problem {
    fn of(param: &'static str, message: &'static str) -> Self {
        Self {
            message,
            param: Some(param),
        }
    }
}

/// What a request asks for.
#[derive(Debug, PartialEq)]
struct Wanted {
    model: String,
    texts: Vec<String>,
    format: EncodingFormat,
    dimensions: Option<i64>,
}

/// The members that are read. A member that is null counts as missing. They are raw, because a list
/// where a text or a number belongs would take many times its bytes.
#[derive(Deserialize)]
struct Members<'a> {
    #[serde(borrow)]
    model: Option<&'a RawValue>,
    #[serde(borrow)]
    input: Option<&'a RawValue>,
    #[serde(borrow)]
    encoding_format: Option<&'a RawValue>,
    #[serde(borrow)]
    dimensions: Option<&'a RawValue>,
}

/// Reads a member of a known type.
fn read_raw<'a, T: Deserialize<'a>>(raw: &'a RawValue) -> Option<T> {
    serde_json::from_str(raw.get()).ok()
}

impl Wanted {
    async fn read(body: Bytes) -> Result<Self, Problem> {
        by_length(body.len(), move || Self::parse(&body)).await
    }

    fn parse(body: &[u8]) -> Result<Self, Problem> {
        let members: Members<'_> = serde_json::from_slice(body).map_err(|_| NOT_READ)?;
        let model = members
            .model
            .ok_or(Problem::of("model", "The member model is missing."))?;
        let model =
            read_raw::<String>(model).ok_or(Problem::of("model", "model must be a text."))?;
        let input = members
            .input
            .ok_or(Problem::of("input", "The member input is missing."))?;
        // The body was read, so only what is no text or list is no input.
        let input: Input = serde_json::from_str(input.get()).map_err(|_| NO_TEXTS)?;
        let format = match members.encoding_format.map(read_raw::<String>) {
            None => EncodingFormat::Float,
            Some(Some(name)) if name == "float" => EncodingFormat::Float,
            Some(Some(name)) if name == "base64" => EncodingFormat::Base64,
            Some(_) => {
                let message = "encoding_format must be float or base64.";
                return Err(Problem::of("encoding_format", message));
            }
        };
        let dimensions = match members.dimensions {
            None => None,
            Some(number) => Some(read_raw(number).ok_or(Problem::of(
                "dimensions",
                "dimensions must be a whole number.",
            ))?),
        };
        Ok(Self {
            model,
            texts: input.0?,
            format,
            dimensions,
        })
    }
}

const NOT_READ: Problem = Problem {
    message: "The body is not a JSON object with each member once.",
    param: None,
};
const NO_TEXTS: Problem = Problem {
    message: "input must be a text or a list of texts, all of valid Unicode.",
    param: Some("input"),
};
const EMPTY_TEXT: Problem = Problem {
    message: "input must not be empty, and no text in it either.",
    param: Some("input"),
};
const TOO_MANY: Problem = Problem {
    message: "input has more than 2048 texts. Send them in several requests.",
    param: Some("input"),
};
/// OpenAI's clients send token ids where they count the tokens themselves.
const TOKEN_IDS: Problem = Problem {
    message: "input has token ids, which are those of another model. Send texts: with LangChain's \
              OpenAIEmbeddings, set check_embedding_ctx_length=False.",
    param: Some("input"),
};

/// The texts of a request, or why there are none.
struct Input(Result<Vec<String>, Problem>);

impl<'de> Deserialize<'de> for Input {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(InputVisitor)
    }
}

struct InputVisitor;

impl<'de> Visitor<'de> for InputVisitor {
    type Value = Input;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text or a list of texts")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Input, E> {
        Ok(Input(match text {
            "" => Err(EMPTY_TEXT),
            text => Ok(vec![text.to_owned()]),
        }))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Input, A::Error> {
        let mut texts = Vec::new();
        let mut problem = None;
        while let Some(item) = items.next_element::<Item>()? {
            problem = match item {
                Item::Text(_) if texts.len() == MOST_TEXTS => Some(TOO_MANY),
                Item::Text(text) if text.is_empty() => Some(EMPTY_TEXT),
                Item::Text(text) => {
                    texts.push(text);
                    continue;
                }
                Item::TokenIds => Some(TOKEN_IDS),
                Item::Other => Some(NO_TEXTS),
            };
            break;
        }
        if problem.is_some() {
            while items.next_element::<IgnoredAny>()?.is_some() {}
        } else if texts.is_empty() {
            problem = Some(EMPTY_TEXT);
        }
        Ok(Input(problem.map_or(Ok(texts), Err)))
    }
}

/// An item of the list.
enum Item {
    Text(String),
    /// One, or a list of them.
    TokenIds,
    Other,
}

impl<'de> Deserialize<'de> for Item {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ItemVisitor)
    }
}

struct ItemVisitor;

impl<'de> Visitor<'de> for ItemVisitor {
    type Value = Item;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Item, E> {
        Ok(Item::Text(text.to_owned()))
    }

    fn visit_u64<E: serde::de::Error>(self, _: u64) -> Result<Item, E> {
        Ok(Item::TokenIds)
    }

    fn visit_i64<E: serde::de::Error>(self, _: i64) -> Result<Item, E> {
        Ok(Item::TokenIds)
    }

    fn visit_f64<E: serde::de::Error>(self, _: f64) -> Result<Item, E> {
        Ok(Item::Other)
    }

    fn visit_bool<E: serde::de::Error>(self, _: bool) -> Result<Item, E> {
        Ok(Item::Other)
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<Item, E> {
        Ok(Item::Other)
    }

    fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Item, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Item::Other)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Item, A::Error> {
        let first = items.next_element::<&RawValue>()?;
        while items.next_element::<IgnoredAny>()?.is_some() {}
        let is_id = first.is_some_and(|first| {
            let begins = first.get().as_bytes()[0];
            begins == b'-' || begins.is_ascii_digit()
        });
        Ok(if is_id { Item::TokenIds } else { Item::Other })
    }
}

/// The vectors as JSON: as one piece if there are few, which is nearly always so, otherwise piece
/// by piece as the client takes them. `memory` counts the vectors and a piece.
fn respond(
    model: String,
    format: EncodingFormat,
    embedded: EmbeddedTexts,
    memory: Reservation,
) -> Response {
    let writer = Writer {
        model,
        format,
        embedded,
        written: 0,
    };
    let kind = [(CONTENT_TYPE, "application/json")];
    if writer.embedded.vectors.len() <= VECTORS_PER_PIECE {
        let whole = writer.collect::<Vec<_>>().concat();
        return (kind, Body::from(reserved_bytes(whole, memory))).into_response();
    }
    let pieces = writer.map(move |piece| {
        // Kept as long as there are pieces to write.
        let _ = &memory;
        Ok::<_, Infallible>(Bytes::from(piece))
    });
    let pieces = Body::from_stream(futures_util::stream::iter(pieces));
    (kind, pieces).into_response()
}

/// The pieces of the JSON.
struct Writer {
    model: String,
    format: EncodingFormat,
    embedded: EmbeddedTexts,
    /// Vectors that were written.
    written: usize,
}

impl Iterator for Writer {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        let (from, all) = (self.written, self.embedded.vectors.len());
        if from == all {
            return None;
        }
        let to = all.min(from + VECTORS_PER_PIECE);
        let mut piece = Vec::new();
        for index in from..to {
            piece.extend_from_slice(if index == 0 { BEGINNING } else { b"," });
            push_json(&mut piece, &self.vector(index));
        }
        if to == all {
            piece.extend_from_slice(b"],\"model\":");
            push_json(&mut piece, &self.model);
            piece.extend_from_slice(b",\"usage\":");
            let tokens = self.embedded.tokens;
            let usage = EmbeddingUsage {
                prompt_tokens: tokens,
                total_tokens: tokens,
            };
            push_json(&mut piece, &usage);
            piece.push(b'}');
        }
        self.written = to;
        Some(piece)
    }
}

const BEGINNING: &[u8] = b"{\"object\":\"list\",\"data\":[";

impl Writer {
    fn vector(&self, index: usize) -> EmbeddingResponse {
        let vector = &self.embedded.vectors[index];
        let embedding = match self.format {
            EncodingFormat::Float => WrittenVector::Numbers(vector.0.to_vec()),
            EncodingFormat::Base64 => {
                let bytes: Vec<u8> = vector.0.iter().flat_map(|x| x.to_le_bytes()).collect();
                WrittenVector::Base64(STANDARD.encode(bytes))
            }
        };
        EmbeddingResponse {
            object: "embedding",
            index,
            embedding,
        }
    }
}

fn push_json(piece: &mut Vec<u8>, value: &impl Serialize) {
    serde_json::to_writer(piece, value).expect("a struct of texts and numbers is JSON");
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::domain::Embedding;

    fn read(body: &Value) -> Result<Wanted, Problem> {
        Wanted::parse(body.to_string().as_bytes())
    }

    fn with_input(input: Value) -> Result<Vec<String>, Problem> {
        read(&json!({ "model": "m", "input": input })).map(|wanted| wanted.texts)
    }

    #[test]
    fn a_text_and_a_list_of_texts_are_input() {
        assert_eq!(with_input(json!("one")).unwrap(), ["one"]);
        assert_eq!(
            with_input(json!(["one", "\0 two"])).unwrap(),
            ["one", "\0 two"]
        );
        let most = vec!["a"; MOST_TEXTS];
        assert_eq!(with_input(json!(most)).unwrap().len(), MOST_TEXTS);
        let more = vec!["a"; MOST_TEXTS + 1];
        assert_eq!(with_input(json!(more)).unwrap_err(), TOO_MANY);
    }

    #[test]
    fn an_input_without_texts_is_refused_with_the_reason() {
        for empty in [json!(""), json!([]), json!([""]), json!(["a", ""])] {
            assert_eq!(with_input(empty).unwrap_err(), EMPTY_TEXT);
        }
        for ids in [
            json!([1, 2]),
            json!([[1, 2], [3]]),
            json!(["a", 3]),
            json!([[-1]]),
            json!([[0, []], "a"]),
        ] {
            assert_eq!(with_input(ids).unwrap_err(), TOKEN_IDS);
        }
        for other in [
            json!(1),
            json!({}),
            json!(true),
            json!([null]),
            json!([{}]),
            json!([[]]),
            json!([[[0, 0]]]),
        ] {
            assert_eq!(with_input(other).unwrap_err(), NO_TEXTS);
        }
        let missing = with_input(Value::Null).unwrap_err();
        assert_eq!(missing.message, "The member input is missing.");
    }

    #[test]
    fn members_that_are_null_or_unknown_count_for_nothing() {
        let wanted = read(&json!({
            "model": "m", "input": "a", "encoding_format": null, "dimensions": null, "user": 1, "x": {},
        }));
        let expected = Wanted {
            model: "m".to_owned(),
            texts: vec!["a".to_owned()],
            format: EncodingFormat::Float,
            dimensions: None,
        };
        assert_eq!(wanted.unwrap(), expected);
    }

    #[test]
    fn a_wrong_member_is_named() {
        for (name, value) in [
            ("model", json!(1)),
            ("model", Value::Null),
            ("encoding_format", json!("int8")),
            ("dimensions", json!("3")),
            ("dimensions", json!(1.5)),
            ("dimensions", json!([0, 0])),
            ("dimensions", json!(u64::MAX)),
            ("model", json!([0])),
            ("encoding_format", json!(["float"])),
        ] {
            let mut body = json!({ "model": "m", "input": "a" });
            body[name] = value;
            assert_eq!(read(&body).unwrap_err().param, Some(name));
        }
        for (json, param) in [
            (r#"{"model":"\ud83d","input":"a"}"#, "model"),
            (r#"{"model":"m","input":"\ud83d"}"#, "input"),
            (
                r#"{"model":"m","input":"a","dimensions":1e400}"#,
                "dimensions",
            ),
        ] {
            let problem = Wanted::parse(json.as_bytes()).unwrap_err();
            assert_eq!(problem.param, Some(param), "{json}");
        }
        for body in [
            "",
            "[]",
            "{",
            "{\"model\":\"m\",\"model\":\"m\",\"input\":\"a\"}",
        ] {
            assert_eq!(
                Wanted::parse(body.as_bytes()).unwrap_err(),
                NOT_READ,
                "{body}"
            );
        }
    }

    #[test]
    fn the_pieces_are_the_json_of_the_list_and_within_their_bound() {
        for (format, number) in [(EncodingFormat::Float, 1), (EncodingFormat::Base64, 20)] {
            let dimensions = 3;
            let vector = Embedding([-1.175_494_4e-38_f32, -0.000_012_345_678, 0.5][..].into());
            let writer = Writer {
                model: "m".to_owned(),
                format,
                embedded: EmbeddedTexts {
                    vectors: vec![vector.clone(); number],
                    tokens: 7,
                },
                written: 0,
            };
            let pieces: Vec<_> = writer.collect();
            assert_eq!(pieces.len(), number.div_ceil(VECTORS_PER_PIECE));
            let most = VECTORS_PER_PIECE * (AROUND + dimensions * NUMBER_BYTES) + 100;
            assert!(pieces.iter().all(|piece| piece.len() <= most));
            let list: Value = serde_json::from_slice(&pieces.concat()).unwrap();
            let written = match format {
                EncodingFormat::Float => json!([-1.175_494_4e-38, -0.000_012_345_678, 0.5]),
                EncodingFormat::Base64 => json!("AACAgEkgT7cAAAA/"),
            };
            let data: Vec<Value> = (0..number)
                .map(|n| json!({ "object": "embedding", "index": n, "embedding": written }))
                .collect();
            let usage = json!({ "prompt_tokens": 7, "total_tokens": 7 });
            let expected = json!({ "object": "list", "data": data, "model": "m", "usage": usage });
            assert_eq!(list, expected);
        }
    }
}
