//! Which open sockets may stay open: those whose account and session still stand.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::domain::{User, UserId};
use crate::error::Error;
use crate::realtime::{CloseReason, Hub, Listener};
use crate::store::AccountStore;

/// Marks for closing every socket whose account is gone, disabled or given a new password since, or whose session ended.
///
/// # Errors
/// Those of the store; no socket is touched then.
pub async fn close_ended(hub: &Arc<Hub>, store: &dyn AccountStore) -> Result<(), Error> {
    let listeners = hub.listeners();
    if listeners.is_empty() {
        return Ok(());
    }
    // A set: it is asked once for each socket while the hub is locked.
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
        // A socket opened since the store was asked has nobody to judge it yet; the next round does.
        let known = ids.contains(&listener.user_id)
            && listener
                .session
                .is_none_or(|session| asked.contains(&session));
        known && !stands(listener, users.get(&listener.user_id), &stored)
    });
    Ok(())
}

fn stands(listener: &Listener, user: Option<&User>, sessions: &HashSet<[u8; 32]>) -> bool {
    user.is_some_and(|user| user.is_active && listener.issued_at >= user.tokens_valid_from)
        && listener
            .session
            .is_none_or(|session| sessions.contains(&session))
}
