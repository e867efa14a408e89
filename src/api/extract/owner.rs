//! The user and network for which a request reserves memory.

use std::convert::Infallible;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;

use super::address::ClientAddress;
use crate::api::state::AppState;
use crate::domain::ClientNetwork;
use crate::memory_budget::Owner;
use crate::services::accounts::Caller;

/// The signed-in user, if there is one, and the network of the client.
#[derive(Clone, Copy, Debug)]
pub struct RequestOwner(pub Owner);

impl FromRequestParts<AppState> for RequestOwner {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, Infallible> {
        let user = parts.extensions.get::<Caller>().map(Caller::user_id);
        let ClientAddress(address) = ClientAddress::from_request_parts(parts, state).await?;
        Ok(Self(Owner {
            user,
            network: Some(ClientNetwork::from(address)),
        }))
    }
}
