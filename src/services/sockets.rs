//! Closes the open sockets whose account or session has ended.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::domain::{User, UserId};
use crate::error::Error;
use crate::realtime::{CloseReason, Hub, Listener};
use crate::store::AccountStore;

/// Marks each socket for closing whose account was deleted or disabled or got a new password, or
/// whose session has ended.
///
/// # Errors
/// Those of the store; no socket is closed then.
pub async fn close_ended(hub: &Arc<Hub>, store: &dyn AccountStore) -> Result<(), Error> {
    let listeners = hub.listeners();
    if listeners.is_empty() {
        return Ok(());
    }
    // A set, because it is searched once for each socket while the hub is locked.
    let ids: HashSet<UserId> = listeners.iter().map(|listener| listener.user_id).collect();
    let sessions: Vec<[u8; 32]> = listeners
        .iter()
        .filter_map(|listener| listener.session)
        .collect();
    let users: HashMap<UserId, User> = store
        .users(&ids.iter().copied().collect::<Vec<_>>())
        .await?
        .into_iter()
        .map(|user| (user.id, user))
        .collect();
    let stored: HashSet<[u8; 32]> = if sessions.is_empty() {
        HashSet::new()
    } else {
        let stored = store.sessions(&sessions).await?;
        stored.iter().map(|session| session.token_hash).collect()
    };
    let asked: HashSet<[u8; 32]> = sessions.into_iter().collect();
    hub.close_where(CloseReason::CredentialEnded, |listener| {
        // A socket that was opened after the store was asked is checked in the next round.
        let known = ids.contains(&listener.user_id)
            && listener
                .session
                .is_none_or(|session| asked.contains(&session));
        known && !is_valid(listener, users.get(&listener.user_id), &stored)
    });
    Ok(())
}

fn is_valid(listener: &Listener, user: Option<&User>, sessions: &HashSet<[u8; 32]>) -> bool {
    user.is_some_and(|user| user.is_active && listener.issued_at >= user.tokens_valid_from)
        && listener
            .session
            .is_none_or(|session| sessions.contains(&session))
}
