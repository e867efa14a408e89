//! Request bodies: bounded in size, time and memory, and read by their content type.

use std::marker::PhantomData;
use std::time::Duration;

use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE, EXPECT};
use axum::http::{HeaderMap, StatusCode};
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::Body as _;

use super::fields::Fields;
use super::formats::{form_fields, json_fields, multipart_fields};
use super::owner::RequestOwner;
use crate::api::error::ApiError;
use crate::api::state::AppState;
use crate::error::Error;
use crate::memory_budget::Reservation;

/// The largest body of a route that takes names, passwords and tokens, in bytes: a password has up
/// to 4 KiB of UTF-8, and JSON may write it with three times as many bytes.
const SMALL_BODY_BYTES: usize = 16 << 10;
/// How long a body may take to arrive. A megabyte in this time is 35 kB/s, slower than any usual
/// network.
const READ_DEADLINE: Duration = Duration::from_secs(30);
/// The most bytes of a body that are read and dropped, so that its sender can read the response.
const MAX_DRAINED_BYTES: usize = 16 << 20;
/// How long reading and dropping may take.
const DRAIN_DEADLINE: Duration = Duration::from_secs(5);
/// The buffer's size for a body of which nothing has come yet, in bytes.
const FIRST_ROOM: usize = 4 << 10;

/// The fields and the size of a route's request body.
pub trait Form: Send {
    /// The names of the fields. Other fields are skipped and take no memory.
    const FIELDS: &'static [&'static str];
    /// The most bytes of the body.
    const MAX_BYTES: usize = SMALL_BODY_BYTES;
    /// Whether the body must be JSON. Forms have neither lists nor null.
    const IS_JSON_ONLY: bool = false;
}

/// Declares how a request's struct is read from a body: which of [`Fields`]' methods reads each
/// field, the most bytes of the body if it may be large, and whether it must be JSON. After
/// `read`, [`Fields::check`] reports the fields that broke a rule.
macro_rules! form {
    ($request:ident { $($field:ident: $read:ident),+ } $(, max_bytes: $max_bytes:expr)?
     $(, json_only: $json_only:expr)?) => {
        impl $crate::api::extract::Form for $request {
            const FIELDS: &'static [&'static str] = &[$(stringify!($field)),+];
            $(const MAX_BYTES: usize = $max_bytes;)?
            $(const IS_JSON_ONLY: bool = $json_only;)?
        }

        impl $request {
            fn read(fields: &mut $crate::api::extract::Fields) -> Self {
                Self { $($field: fields.$read(stringify!($field)),)+ }
            }
        }
    };
}
pub(crate) use form;

/// A request's fields, from JSON, a form or multipart. An empty body has none.
pub struct Body<F> {
    /// Those of the route's fields that came.
    pub fields: Fields,
    /// The body's reservation in the memory budget.
    pub memory: Reservation,
    form: PhantomData<fn() -> F>,
}

impl<F: Form> FromRequest<AppState> for Body<F> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, ApiError> {
        let (mut parts, body) = request.into_parts();
        let Ok(RequestOwner(owner)) = RequestOwner::from_request_parts(&mut parts, state).await;
        let memory = state.memory.hold(owner, 0);
        Self::read(&parts.headers, body, memory).await
    }
}

impl<F: Form> Body<F> {
    /// Reads the body of a request with these headers. `memory` becomes the reservation of its
    /// bytes.
    ///
    /// # Errors
    /// 400, 408, 413, 415, or 503 if there is no memory for the body.
    pub async fn read(
        headers: &HeaderMap,
        body: axum::body::Body,
        memory: Reservation,
    ) -> Result<Self, ApiError> {
        let mut read = Self {
            fields: Fields::default(),
            memory,
            form: PhantomData,
        };
        if body.is_end_stream() {
            return Ok(read);
        }
        let encoding = Encoding::of(headers, F::IS_JSON_ONLY)?;
        let bytes = read_bytes(headers, body, F::MAX_BYTES, &mut read.memory).await?;
        let length = bytes.len();
        if length > 0 {
            read.fields = match encoding {
                Encoding::Json => json_fields(&bytes, F::FIELDS)?,
                Encoding::UrlEncoded => form_fields(&bytes, F::FIELDS)?,
                Encoding::Multipart { boundary } => {
                    multipart_fields(bytes.into(), boundary, F::FIELDS).await?
                }
            };
        }
        // The fields' texts are copies, and the bytes of the body are dropped. A form's texts can
        // be three times as long: each byte that is no UTF-8 becomes a replacement character.
        read.memory
            .try_resize(read.fields.text_bytes())
            .map_err(Error::from)?;
        Ok(read)
    }
}

enum Encoding {
    Json,
    UrlEncoded,
    Multipart { boundary: String },
}

impl Encoding {
    fn of(headers: &HeaderMap, is_json_only: bool) -> Result<Self, ApiError> {
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
        } else if is_json_only {
            Err(unsupported())
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

/// Reads a body of JSON as it comes, of at most `most` bytes. `memory` becomes the reservation of
/// its bytes.
///
/// # Errors
/// 400, 408, 413, 415, or 503 if there is no memory for the body.
pub async fn read_json(
    headers: &HeaderMap,
    body: axum::body::Body,
    most: usize,
    memory: &mut Reservation,
) -> Result<Bytes, ApiError> {
    if Encoding::of(headers, true).is_err() {
        return Err(ApiError::plain(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "The body must be JSON: send Content-Type: application/json.",
        ));
    }
    let bytes = read_bytes(headers, body, most, memory).await?;
    memory.resize(bytes.capacity());
    Ok(bytes.into())
}

/// Reads a body of at most `most` bytes, and reserves them in `memory`.
async fn read_bytes(
    headers: &HeaderMap,
    mut body: axum::body::Body,
    most: usize,
    memory: &mut Reservation,
) -> Result<Vec<u8>, ApiError> {
    let too_large = || {
        ApiError::plain(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("The request body is larger than {}.", size(most)),
        )
    };
    let declared = headers
        .get(CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    let is_too_large = declared.is_some_and(|length| length > most as u64);
    // A client with `Expect: 100-continue` gets the response at once and sends no body.
    if is_too_large && headers.contains_key(EXPECT) {
        return Err(too_large());
    }
    if is_too_large {
        drain(&mut body).await;
        return Err(too_large());
    }
    let mut bytes = Vec::new();
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
            None => return Ok(bytes),
            // A broken chunk, or a client that disconnected in the middle.
            Some(Err(_)) => {
                return Err(ApiError::bad_request("The request body could not be read.").closing());
            }
            Some(Ok(frame)) => {
                let Ok(data) = frame.into_data() else {
                    continue;
                };
                if bytes.len() + data.len() > most {
                    drain(&mut body).await;
                    return Err(too_large());
                }
                make_room(&mut bytes, data.len(), most, memory)?;
                bytes.extend_from_slice(&data);
            }
        }
    }
}

/// Makes room for `more` bytes: doubles the buffer, up to `most` bytes.
fn make_room(
    bytes: &mut Vec<u8>,
    more: usize,
    most: usize,
    memory: &mut Reservation,
) -> Result<(), Error> {
    let (wanted, room) = (bytes.len() + more, bytes.capacity());
    if wanted > room {
        let room_then = (room * 2).max(FIRST_ROOM).min(most).max(wanted);
        memory.try_grow(room_then - room)?;
        bytes.reserve_exact(room_then - bytes.len());
    }
    Ok(())
}

/// A size as error messages write it.
fn size(bytes: usize) -> String {
    if bytes >= 1 << 20 {
        format!("{} MiB", bytes >> 20)
    } else {
        format!("{} KiB", bytes >> 10)
    }
}

/// Reads and drops the rest of a body: a connection that is closed with unread data is reset, and
/// the response is lost. Returns whether the end was reached within the bounds.
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

#[cfg(test)]
mod tests {
    use axum::body::Body as HttpBody;

    use super::*;
    use crate::memory_budget::{MemoryBudget, Owner};

    struct Note;

    impl Form for Note {
        const FIELDS: &'static [&'static str] = &["text"];
        const MAX_BYTES: usize = 1 << 20;
    }

    #[tokio::test]
    async fn form_whose_texts_are_longer_than_itself_is_refused_without_memory_for_them() {
        let body = [&b"text="[..], &[0xff; 100_000]].concat();
        let headers = [(CONTENT_TYPE, "application/x-www-form-urlencoded".parse())];
        let headers = headers.map(|(name, value)| (name, value.unwrap()));
        let headers: HeaderMap = headers.into_iter().collect();
        for (memory, has_room) in [(1 << 20, true), (400_000, false)] {
            let budget = MemoryBudget::new(memory);
            let held = budget.hold(Owner::default(), 0);
            let read = Body::<Note>::read(&headers, HttpBody::from(body.clone()), held).await;
            assert_eq!(read.is_ok(), has_room, "{memory}");
            assert_eq!(budget.held(), if has_room { 300_000 } else { 0 });
        }
    }
}
