//! Extractors: from a request's parts to typed values.

mod address;
mod body;
mod fields;
mod formats;
mod owner;
mod query;
mod root;

pub use address::{ClientAddress, Peer, is_tls};
pub(crate) use body::form;
pub use body::{Body, Form, drain, read_json};
#[cfg(test)]
pub use fields::Field;
pub use fields::{Fields, Scalar};
pub use owner::RequestOwner;
pub use query::Query;
pub use root::Root;
