//! HTTP and WebSocket: the only layer that knows status codes, headers and JSON.

mod accounts;
pub(crate) mod authenticate;
mod content_negotiation;
mod cross_origin;
mod dollars;
mod drain_body;
mod error;
pub(crate) mod extract;
mod health;
mod json_response;
mod keys;
mod list_header;
mod oauth;
mod openapi;
pub(crate) mod page_origin;
mod pages;
mod post;
pub(crate) mod prompts;
mod request_log;
mod router;
mod server;
pub(crate) mod session_cookie;
mod state;
mod usage;
mod v1;
pub(crate) mod ws;

pub use pages::Documents;
pub use prompts::encode_event;
pub use router::{metrics_router, router};
pub use server::{Bounds, Connections, ServerDeps, serve};
pub use state::{AppState, Lifecycle, State};
