//! The formats of request bodies. Each is read into the fields that a route asks for.

use bytes::Bytes;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::fields::{Field, Fields};
use crate::api::error::ApiError;

/// The most fields of a form. Django has the same bound.
const MAX_FORM_FIELDS: usize = 1000;

/// Reads the wanted fields of an object as they were written, whatever their depth. If a name comes
/// twice, the last one counts.
pub fn json_fields(bytes: &[u8], wanted: &'static [&'static str]) -> Result<Fields, ApiError> {
    let whole: &RawValue = serde_json::from_slice(bytes).map_err(parse_error)?;
    let kind = match first_byte(whole) {
        b'{' => {
            let mut json = serde_json::Deserializer::from_str(whole.get());
            let members = serde::Deserializer::deserialize_map(&mut json, Members { wanted })
                .map_err(parse_error)?;
            return members
                .into_iter()
                .map(|(name, value)| Ok((name.to_owned(), json_field(value)?)))
                .collect();
        }
        b'n' => return Err(ApiError::non_field("No data provided".to_owned())),
        b'[' => "list",
        b'"' => "str",
        b't' | b'f' => "bool",
        _ if whole.get().contains(['.', 'e', 'E']) => "float",
        _ => "int",
    };
    Err(ApiError::non_field(format!(
        "Invalid data. Expected a dictionary, but got {kind}."
    )))
}

/// Keeps the wanted members of an object, so that one with very many names takes no memory for the
/// others.
struct Members {
    wanted: &'static [&'static str],
}

impl<'de> Visitor<'de> for Members {
    type Value = Vec<(&'static str, &'de RawValue)>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut members: Self::Value = Vec::new();
        while let Some(name) = map.next_key::<Name<'de>>()? {
            let Some(name) = self.wanted.iter().find(|wanted| **wanted == name.0) else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            let value = map.next_value()?;
            match members.iter_mut().find(|(known, _)| known == name) {
                Some(known) => known.1 = value,
                None => members.push((*name, value)),
            }
        }
        Ok(members)
    }
}

/// A member's name; borrowed unless it is written with escapes.
#[derive(serde::Deserialize)]
struct Name<'a>(#[serde(borrow)] std::borrow::Cow<'a, str>);

pub fn form_fields(bytes: &[u8], wanted: &'static [&'static str]) -> Result<Fields, ApiError> {
    let mut fields = Fields::default();
    for (number, (name, value)) in form_urlencoded::parse(bytes).enumerate() {
        check_count(number)?;
        if wanted.contains(&name.as_ref()) {
            fields.insert(name.into_owned(), Field::Text(value.into_owned()));
        }
    }
    Ok(fields)
}

/// Refuses the field of that number, counted from 0, if it is one too many.
fn check_count(number: usize) -> Result<(), ApiError> {
    if number < MAX_FORM_FIELDS {
        Ok(())
    } else {
        Err(ApiError::bad_request("The form has more than 1000 fields."))
    }
}

fn json_field(value: &RawValue) -> Result<Field, ApiError> {
    Ok(match first_byte(value) {
        b'n' => Field::Null,
        b't' => Field::Flag(true),
        b'f' => Field::Flag(false),
        b'"' => Field::Text(serde_json::from_str(value.get()).map_err(parse_error)?),
        b'[' => Field::List(value.get().to_owned()),
        b'{' => Field::NotText,
        _ => Field::Number(value.get().to_owned()),
    })
}

/// The first byte of a JSON value, which shows its type.
fn first_byte(value: &RawValue) -> u8 {
    value.get().bytes().next().unwrap_or_default()
}

/// The parser's own words may quote the input; the place does not.
fn parse_error(error: serde_json::Error) -> ApiError {
    ApiError::bad_request(format!(
        "JSON parse error - line {} column {}",
        error.line(),
        error.column()
    ))
}

pub async fn multipart_fields(
    bytes: Bytes,
    boundary: String,
    wanted: &'static [&'static str],
) -> Result<Fields, ApiError> {
    let broken = |_: multer::Error| {
        ApiError::bad_request("Multipart form parse error - the body is malformed.")
    };
    let whole =
        futures_util::stream::once(std::future::ready(Ok::<_, std::convert::Infallible>(bytes)));
    let mut multipart = multer::Multipart::new(whole, boundary);
    let mut fields = Fields::default();
    let mut number = 0;
    while let Some(part) = multipart.next_field().await.map_err(broken)? {
        check_count(number)?;
        number += 1;
        let name = part.name().filter(|name| wanted.contains(name));
        let Some(name) = name.map(str::to_owned) else {
            continue;
        };
        let is_file = part.file_name().is_some();
        let value = part.bytes().await.map_err(broken)?;
        let text = String::from_utf8(value.into());
        fields.insert(
            name,
            match text {
                Ok(text) if !is_file => Field::Text(text),
                _ => Field::NotText,
            },
        );
    }
    Ok(fields)
}
