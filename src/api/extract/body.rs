//! Request bodies: bounded in size and time, and read as what their content type says.

use std::collections::HashMap;
use std::time::Duration;

use axum::extract::{FromRequest, Request};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE, EXPECT};
use axum::http::{HeaderMap, StatusCode};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::Body as _;
use serde_json::value::RawValue;

use super::fields::{Field, Fields};
use crate::api::error::ApiError;

/// The largest body that is taken, in bytes.
pub const MAX_BODY_BYTES: usize = 1 << 20;
/// How long a body may take to arrive. A megabyte in this time is 35 kB/s, slower than any network worth serving.
const READ_DEADLINE: Duration = Duration::from_secs(30);
/// What is read and thrown away of a body that is too large, so that its sender gets to read the answer.
const MAX_DRAINED_BYTES: usize = 16 << 20;
/// How long that may take.
const DRAIN_DEADLINE: Duration = Duration::from_secs(5);

/// A request's fields, whatever form they came in: JSON, form-encoded or multipart. An empty body has none.
pub struct Body(pub Fields);

impl<S: Send + Sync> FromRequest<S> for Body {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let headers = request.headers().clone();
        let body = request.into_body();
        if body.is_end_stream() {
            return Ok(Self(Fields::default()));
        }
        let form = Form::of(&headers)?;
        let bytes = read(&headers, body).await?;
        if bytes.is_empty() {
            return Ok(Self(Fields::default()));
        }
        let fields = match form {
            Form::Json => json_fields(&bytes)?,
            Form::UrlEncoded => form_urlencoded::parse(&bytes)
                .map(|(name, value)| (name.into_owned(), Field::Text(value.into_owned())))
                .collect(),
            Form::Multipart { boundary } => multipart_fields(bytes, boundary).await?,
        };
        Ok(Self(fields))
    }
}

enum Form {
    Json,
    UrlEncoded,
    Multipart { boundary: String },
}

impl Form {
    fn of(headers: &HeaderMap) -> Result<Self, ApiError> {
        let unsupported = || {
            ApiError::plain(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "Unsupported media type in request.",
            )
        };
        let text = headers
            .get(CONTENT_TYPE)
            .and_then(|value| value.to_str().ok())
            .ok_or_else(unsupported)?;
        let essence = text.split(';').next().unwrap_or_default().trim();
        if essence.eq_ignore_ascii_case("application/json") {
            Ok(Self::Json)
        } else if essence.eq_ignore_ascii_case("application/x-www-form-urlencoded") {
            Ok(Self::UrlEncoded)
        } else if essence.eq_ignore_ascii_case("multipart/form-data") {
            multer::parse_boundary(text)
                .map(|boundary| Self::Multipart { boundary })
                .map_err(|_| {
                    ApiError::bad_request(
                        "Multipart form parse error - the boundary is missing or invalid.",
                    )
                })
        } else {
            Err(unsupported())
        }
    }
}

async fn read(headers: &HeaderMap, mut body: axum::body::Body) -> Result<Bytes, ApiError> {
    let too_large = || {
        ApiError::plain(
            StatusCode::PAYLOAD_TOO_LARGE,
            "The request body is larger than 1 MiB.",
        )
    };
    let declared = headers
        .get(CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    let is_too_large = declared.is_some_and(|length| length > MAX_BODY_BYTES as u64);
    // Who asks before sending is told at once and sends nothing.
    if is_too_large && headers.contains_key(EXPECT) {
        return Err(too_large());
    }
    if is_too_large {
        drain(&mut body).await;
        return Err(too_large());
    }
    let mut bytes = BytesMut::new();
    let deadline = tokio::time::Instant::now() + READ_DEADLINE;
    loop {
        let frame = tokio::time::timeout_at(deadline, body.frame())
            .await
            .map_err(|_| {
                ApiError::plain(
                    StatusCode::REQUEST_TIMEOUT,
                    "The request body did not arrive in time.",
                )
                .closing()
            })?;
        match frame {
            None => return Ok(bytes.freeze()),
            // A broken chunk, or a client that went away in the middle.
            Some(Err(_)) => {
                return Err(ApiError::bad_request("The request body could not be read.").closing());
            }
            Some(Ok(frame)) => {
                let Ok(data) = frame.into_data() else {
                    continue;
                };
                if bytes.len() + data.len() > MAX_BODY_BYTES {
                    drain(&mut body).await;
                    return Err(too_large());
                }
                // A body in one piece, which is nearly every one, is not copied by hand twice.
                bytes.extend_from_slice(&data);
            }
        }
    }
}

/// Reads on and forgets: a connection that is closed under unread data is reset, and the answer with it lost. Answers whether
/// the end was reached within the bounds.
pub async fn drain<B: hyper::body::Body<Data = Bytes> + Unpin>(body: &mut B) -> bool {
    let mut drained = 0;
    let reading = async {
        while let Some(frame) = body.frame().await {
            drained += match frame {
                Ok(frame) => frame.data_ref().map_or(0, Bytes::len),
                Err(_) => return false,
            };
            if drained > MAX_DRAINED_BYTES {
                return false;
            }
        }
        true
    };
    tokio::time::timeout(DRAIN_DEADLINE, reading)
        .await
        .unwrap_or(false)
}

/// Reads an object's fields as they were written, whatever their depth: nothing is built of what nobody asks for.
fn json_fields(bytes: &[u8]) -> Result<Fields, ApiError> {
    let whole: &RawValue = serde_json::from_slice(bytes).map_err(parse_error)?;
    let kind = match first_byte(whole) {
        b'{' => {
            let fields: HashMap<String, &RawValue> =
                serde_json::from_str(whole.get()).map_err(parse_error)?;
            return fields
                .into_iter()
                .map(|(name, value)| Ok((name, json_field(value)?)))
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

fn json_field(value: &RawValue) -> Result<Field, ApiError> {
    Ok(match first_byte(value) {
        b'n' => Field::Null,
        b't' => Field::Flag(true),
        b'f' => Field::Flag(false),
        b'"' => Field::Text(serde_json::from_str(value.get()).map_err(parse_error)?),
        b'[' | b'{' => Field::NotText,
        _ => Field::Number(value.get().to_owned()),
    })
}

/// A JSON value begins with the byte that says its kind.
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

async fn multipart_fields(bytes: Bytes, boundary: String) -> Result<Fields, ApiError> {
    let broken = |_: multer::Error| {
        ApiError::bad_request("Multipart form parse error - the body is malformed.")
    };
    let whole =
        futures_util::stream::once(std::future::ready(Ok::<_, std::convert::Infallible>(bytes)));
    let mut multipart = multer::Multipart::new(whole, boundary);
    let mut fields = Fields::default();
    while let Some(part) = multipart.next_field().await.map_err(broken)? {
        let Some(name) = part.name().map(str::to_owned) else {
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
