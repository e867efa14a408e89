use std::convert::Infallible;

use axum::body::Body as HttpBody;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderValue};
use axum::response::IntoResponse;
use serde_json::{Map, Value};

use super::{block_on, first_line, pieces};
use crate::api::extract::{Body, Form};
use crate::domain::account::{NOT_A_STRING, NOT_NULL, REQUIRED};
use crate::memory_budget::{MemoryBudget, Owner};

/// A form like those of the routes.
struct AnyForm;

impl Form for AnyForm {
    const FIELDS: &'static [&'static str] = &["prompt", "username", "websocket"];
    const MAX_BYTES: usize = 4 << 10;
}

/// The fields that were read, or the status of the refusal.
#[derive(Debug, PartialEq, Eq)]
struct Read {
    texts: Vec<Result<String, &'static str>>,
    flag: Option<bool>,
}

/// The boundary of the multipart bodies that are made here.
const BOUNDARY: &str = "----fuzzing-boundary";

/// The body of a request. The first byte cuts it, the first line is its content type.
///
/// The cuts of a body make no difference. A refusal is a 4xx, and no memory stays reserved. JSON is
/// read as a JSON parser reads it. The same texts are read from all three kinds of bodies.
pub fn request_bodies(data: &[u8]) {
    let [cuts, rest @ ..] = data else {
        return;
    };
    let (content_type, body) = first_line(rest);
    let Ok(content_type) = HeaderValue::from_bytes(content_type) else {
        return;
    };
    let whole = read(&content_type, &[body]);
    let in_pieces = read(&content_type, &pieces(body, *cuts));
    assert_eq!(whole, in_pieces, "cut and whole");
    if content_type == "application/json" && body.len() <= AnyForm::MAX_BYTES {
        compare_with_parser(&whole, body);
    }
    if let Ok(read) = whole {
        send_again(&read);
    }
}

fn read(content_type: &HeaderValue, pieces: &[&[u8]]) -> Result<Read, u16> {
    let budget = MemoryBudget::new(1 << 20);
    let memory = budget.hold(Owner::default(), 0);
    let headers: HeaderMap = [(CONTENT_TYPE, content_type.clone())].into_iter().collect();
    let pieces = pieces.iter().filter(|piece| !piece.is_empty());
    let pieces: Vec<_> = pieces
        .map(|piece| Ok::<_, Infallible>(bytes::Bytes::copy_from_slice(piece)))
        .collect();
    let body = HttpBody::from_stream(futures_util::stream::iter(pieces));
    let read = block_on(Body::<AnyForm>::read(&headers, body, memory));
    let read = read.map_err(|error| {
        let status = error.into_response().status();
        assert!(status.is_client_error(), "{status}");
        status.as_u16()
    });
    let read = read.map(|mut body| {
        let held = budget.held();
        assert_eq!(held, body.fields.text_bytes());
        // In a form, a byte that is no UTF-8 becomes a character of three bytes.
        assert!(held <= 3 * AnyForm::MAX_BYTES);
        let flag = body.fields.optional_flag("websocket");
        let texts = ["prompt", "username"].map(|name| body.fields.raw_text(name));
        Read {
            texts: texts.into(),
            flag,
        }
    });
    assert_eq!(budget.held(), 0);
    read
}

fn compare_with_parser(read: &Result<Read, u16>, body: &[u8]) {
    let Ok(json) = serde_json::from_slice::<Value>(body) else {
        return;
    };
    let Value::Object(members) = json else {
        assert_eq!(*read, Err(400));
        return;
    };
    let texts = &read.as_ref().expect("an object is a form").texts;
    for (name, text) in ["prompt", "username"].into_iter().zip(texts) {
        let expected = match members.get(name) {
            None => Err(REQUIRED),
            Some(Value::Null) => Err(NOT_NULL),
            Some(Value::Bool(_) | Value::Array(_) | Value::Object(_)) => Err(NOT_A_STRING),
            Some(Value::String(text)) => Ok(text.clone()),
            Some(Value::Number(number)) => {
                // The parser may be wrong in the last digit; the service keeps all of them.
                let parsed = number.as_f64().expect("every number is one of these");
                let same = |text: &String| {
                    let written = text.parse::<f64>().expect("a number");
                    (written - parsed).abs() <= parsed.abs() * 1e-12
                };
                assert!(text.as_ref().is_ok_and(same), "{number} is not {text:?}");
                continue;
            }
        };
        assert_eq!(*text, expected);
    }
}

/// Sends the same fields in each kind of body.
fn send_again(read: &Read) {
    let fields: Vec<(&str, &str)> = ["prompt", "username"]
        .into_iter()
        .zip(&read.texts)
        .filter_map(|(name, text)| Some((name, text.as_deref().ok()?)))
        .collect();
    let json: Map<String, Value> = fields
        .iter()
        .map(|(name, text)| ((*name).to_owned(), (*text).into()))
        .collect();
    let json = serde_json::to_vec(&json).expect("texts are JSON");
    check_again("application/json", &json, &fields);
    let form = form_urlencoded::Serializer::new(String::new())
        .extend_pairs(&fields)
        .finish();
    check_again(
        "application/x-www-form-urlencoded",
        form.as_bytes(),
        &fields,
    );
    if fields.iter().any(|(_, text)| text.contains(BOUNDARY)) {
        return;
    }
    let part = |(name, text): &(&str, &str)| {
        format!("--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{text}\r\n")
    };
    let multipart = fields.iter().map(part).collect::<String>() + &format!("--{BOUNDARY}--\r\n");
    let content_type = format!("multipart/form-data; boundary={BOUNDARY}");
    check_again(&content_type, multipart.as_bytes(), &fields);
}

fn check_again(content_type: &str, body: &[u8], fields: &[(&str, &str)]) {
    if body.len() > AnyForm::MAX_BYTES {
        return;
    }
    let content_type = HeaderValue::from_str(content_type).expect("visible ASCII");
    let again = read(&content_type, &[body]).expect("a body of this service's own is sound");
    for (name, text) in ["prompt", "username"].into_iter().zip(again.texts) {
        let sent = fields.iter().find(|field| field.0 == name);
        let expected = sent.map(|field| field.1.to_owned()).ok_or(REQUIRED);
        assert_eq!(text, expected, "{content_type:?}");
    }
}
