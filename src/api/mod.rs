//! HTTP and WebSocket: the only layer that knows status codes, headers and JSON.

mod accept;
mod accounts;
pub(crate) mod authenticate;
mod cross_origin;
mod error;
pub(crate) mod extract;
mod health;
mod held_json;
mod list_header;
mod oauth;
mod observe;
mod openapi;
pub(crate) mod page_origin;
mod pages;
pub(crate) mod prompts;
mod router;
mod server;
pub(crate) mod session_cookie;
mod state;
mod unread;
pub(crate) mod ws;
mod yaml;

pub use openapi::Documents;
pub use prompts::encode_event;
pub use router::{metrics_router, router};
pub use server::{Bounds, Connections, Limits, serve};
pub use state::{AppState, Lifecycle, State};
