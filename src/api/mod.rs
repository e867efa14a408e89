//! HTTP and WebSocket: the only layer that knows status codes, headers and JSON.

mod accept;
mod accounts;
mod authenticate;
mod cross_origin;
mod error;
mod extract;
mod health;
mod held_json;
mod list_header;
mod oauth;
mod observe;
mod openapi;
mod page_origin;
mod pages;
mod prompts;
mod router;
mod server;
mod session_cookie;
mod state;
mod unread;
mod ws;
mod yaml;

pub use openapi::Documents;
pub use prompts::EVENT_ENCODERS;
pub use router::{metrics_router, router};
pub use server::{Bounds, Connections, Limits, serve};
pub use state::{AppState, Lifecycle, State};
