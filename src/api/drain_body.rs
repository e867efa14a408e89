//! Request bodies that the handler did not read.
//!
//! A response such as 401 or 415 may be ready before the body has come. The HTTP library then
//! closes the connection, unless the rest of the body is there already. A client that keeps the
//! connection open would fail at its next request, or lose this response to a reset.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::Body;
use axum::extract::Request;
use axum::http::HeaderValue;
use axum::http::header::{CONNECTION, EXPECT};
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use hyper::body::{Body as _, Frame, SizeHint};
use parking_lot::{Mutex, MutexGuard};

use super::extract::drain;

/// Reads the rest of the request's body before the response is sent, within bounds. Beyond the
/// bounds the response says that the connection closes.
pub async fn drain_unread(request: Request, next: Next) -> Response {
    if request.body().is_end_stream() {
        return next.run(request).await;
    }
    // A client with `Expect: 100-continue` sends no body if the response comes first.
    let waits = request.headers().contains_key(EXPECT);
    let (parts, body) = request.into_parts();
    let mut body = SharedBody(Arc::new(Mutex::new(body)));
    let mut response = next
        .run(Request::from_parts(parts, Body::new(body.clone())))
        .await;
    // A response with this header has decided already.
    if response.headers().contains_key(CONNECTION) || body.is_end_stream() {
        return response;
    }
    if waits || !drain(&mut body).await {
        response
            .headers_mut()
            .insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// A body that this layer still holds after the handler has dropped it.
#[derive(Clone)]
struct SharedBody(Arc<Mutex<Body>>);

impl SharedBody {
    fn lock(&self) -> MutexGuard<'_, Body> {
        self.0.lock()
    }
}

impl hyper::body::Body for SharedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut *self.lock()).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.lock().is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.lock().size_hint()
    }
}
