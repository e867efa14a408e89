//! API keys: making, changing, rotating and revoking them, and authentication by one.

mod known_api_keys;
mod uses;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::credentials::ApiKeyText;
use crate::domain::api_key::MAX_LIVE_KEYS;
use crate::domain::{
    ApiKey, ApiKeyChange, ApiKeyId, ApiKeyRecord, Budget, Rates, Scopes, Timestamp, UserId,
};
use crate::error::{ApiKeyProblem, Error, Unauthenticated};
use crate::store::{ApiKeyStore, NewSecret};

use self::known_api_keys::{KnownApiKey, KnownApiKeys, NEVER};
use self::uses::Uses;

/// How long the text before a rotation may be used, unless the rotation says something else.
pub const DEFAULT_GRACE: Duration = Duration::from_secs(86_400);
/// The longest that a text may be used after its rotation.
pub const MAX_GRACE: Duration = Duration::from_secs(30 * 86_400);

/// Refuses the period of a budget that is not there.
pub const PERIOD_WITHOUT_BUDGET: &str = "A period needs a budget_usd.";

/// An API key to be made.
#[derive(Clone, Debug)]
pub struct NewApiKey {
    /// Valid: see [`parse_name`](crate::domain::api_key::parse_name).
    pub name: String,
    /// What it may be used for.
    pub scopes: Scopes,
    /// Valid: see [`parse_models`](crate::domain::api_key::parse_models).
    pub models: Vec<String>,
    /// How often it may be used.
    pub rates: Option<Rates>,
    /// How much it may spend.
    pub budget: Option<Budget>,
    /// When it expires.
    pub expires_at: Option<Timestamp>,
}

/// A key together with its text, which is known only now.
#[derive(Debug)]
pub struct IssuedApiKey {
    /// The key.
    pub key: ApiKey,
    /// Its text.
    pub text: ApiKeyText,
    /// Until when the text before it may be used; `None` if there is none.
    pub previous_until: Option<Timestamp>,
}

/// A key whose text was presented, and how long it is valid.
#[derive(Clone, Debug)]
pub struct VerifiedApiKey {
    /// The key, at most a second old.
    pub key: Arc<ApiKey>,
    /// SHA-256 of the presented text, by which it can be verified again.
    pub key_hash: [u8; 32],
    /// From this instant on the presented text is refused.
    pub expires_at: Timestamp,
}

/// The use cases of API keys.
pub struct ApiKeys {
    store: Arc<dyn ApiKeyStore>,
    known: KnownApiKeys,
    uses: Arc<Uses>,
}

impl ApiKeys {
    /// Over this store. `tasks`: must finish before the process ends.
    pub fn new(store: Arc<dyn ApiKeyStore>, tasks: tokio_util::task::TaskTracker) -> Self {
        Self {
            uses: Uses::new(Arc::clone(&store), tasks),
            known: KnownApiKeys::default(),
            store,
        }
    }

    /// Makes a key.
    ///
    /// # Errors
    /// `InvalidFields` if it would have expired already; `TooManyApiKeys`.
    pub async fn create(
        &self,
        user_id: UserId,
        new: NewApiKey,
        now: Timestamp,
    ) -> Result<IssuedApiKey, Error> {
        check_expiry(new.expires_at, now)?;
        let text = ApiKeyText::random().map_err(Error::internal)?;
        let key = ApiKey {
            id: text.id(),
            user_id,
            name: new.name,
            scopes: new.scopes,
            models: new.models,
            rates: some_rates(new.rates),
            budget: new.budget,
            expires_at: new.expires_at,
            created_at: now,
            last_used_at: None,
            last_four: text.last_four().to_owned(),
        };
        let record = ApiKeyRecord {
            key: key.clone(),
            key_hash: text.hash(),
            previous: None,
            revoked_at: None,
        };
        let created = self.store.create_api_key(record, MAX_LIVE_KEYS, now);
        created.await?;
        Ok(IssuedApiKey {
            key,
            text,
            previous_until: None,
        })
    }

    /// The user's keys, expired ones included, the newest first.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn list(&self, user_id: UserId) -> Result<Vec<ApiKey>, Error> {
        Ok(self.store.api_keys(user_id).await?)
    }

    /// One of the user's keys.
    ///
    /// # Errors
    /// `NotFound`, also if it is another user's or was revoked.
    pub async fn get(&self, user_id: UserId, id: ApiKeyId) -> Result<ApiKey, Error> {
        let record = self.store.api_key(id).await?;
        record
            .filter(|record| record.key.user_id == user_id && record.revoked_at.is_none())
            .map(|record| record.key)
            .ok_or(Error::NotFound)
    }

    /// The user of a key that was not revoked, for the operator.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn owner(&self, id: ApiKeyId) -> Result<UserId, Error> {
        let record = self.store.api_key(id).await?;
        record
            .filter(|record| record.revoked_at.is_none())
            .map(|record| record.key.user_id)
            .ok_or(Error::NotFound)
    }

    /// Changes one of the user's keys.
    ///
    /// # Errors
    /// `NotFound`; `InvalidFields` if the key would have expired already, or if a period is given
    /// for no budget; `TooManyApiKeys` if the change would make an expired key live again.
    pub async fn change(
        &self,
        user_id: UserId,
        id: ApiKeyId,
        mut change: ApiKeyChange,
        now: Timestamp,
    ) -> Result<ApiKey, Error> {
        check_expiry(change.expires_at.flatten(), now)?;
        // The default period asks for nothing, so it needs no budget.
        if change.budget_period.flatten().is_some() {
            let keeps_budget = match change.budget {
                Some(amount) => amount.is_some(),
                None => self.get(user_id, id).await?.budget.is_some(),
            };
            if !keeps_budget {
                return Err(Error::field("budget_period", PERIOD_WITHOUT_BUDGET));
            }
        }
        change.rates = change.rates.map(some_rates);
        let changed = self
            .store
            .change_api_key(user_id, id, change, MAX_LIVE_KEYS, now)
            .await?;
        self.known.forget(id);
        changed.ok_or(Error::NotFound)
    }

    /// Gives one of the user's keys another text. The present one may be used for `grace`, any
    /// earlier one no longer.
    ///
    /// # Errors
    /// `NotFound`; `InvalidFields` if the grace is longer than [`MAX_GRACE`], or if the key has
    /// expired.
    pub async fn rotate(
        &self,
        user_id: UserId,
        id: ApiKeyId,
        grace: Duration,
        now: Timestamp,
    ) -> Result<IssuedApiKey, Error> {
        if grace > MAX_GRACE {
            return Err(Error::field("grace", "The grace is at most 30 days."));
        }
        if self.get(user_id, id).await?.has_expired(now) {
            let message = "The key has expired. Set a later expires_at first.";
            return Err(Error::field("expires_at", message));
        }
        let text = ApiKeyText::with_id(id).map_err(Error::internal)?;
        let previous_until = (!grace.is_zero()).then(|| now.plus(grace));
        let secret = NewSecret {
            key_hash: text.hash(),
            last_four: text.last_four().to_owned(),
            previous_until,
        };
        let rotated = self.store.rotate_api_key(user_id, id, secret).await?;
        self.known.forget(id);
        Ok(IssuedApiKey {
            key: rotated.ok_or(Error::NotFound)?,
            text,
            previous_until,
        })
    }

    /// Revokes one of the user's keys.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn revoke(&self, user_id: UserId, id: ApiKeyId, now: Timestamp) -> Result<(), Error> {
        let is_revoked = self.store.revoke_api_key(user_id, id, now).await?;
        self.known.forget(id);
        if is_revoked {
            Ok(())
        } else {
            Err(Error::NotFound)
        }
    }

    /// The key behind a bearer token.
    ///
    /// # Errors
    /// `ApiKey`. A malformed key is refused without a look at the store.
    pub async fn authenticate(&self, token: &str, now: Timestamp) -> Result<VerifiedApiKey, Error> {
        let text =
            ApiKeyText::parse(token).ok_or(Unauthenticated::ApiKey(ApiKeyProblem::Invalid))?;
        self.verify(text.id(), text.hash(), now).await
    }

    /// Notes that a key was used, in the background.
    pub fn note_use(&self, key: &ApiKey, now: Timestamp) {
        self.uses.note(key, now);
    }

    /// Whether a text of that hash is valid for the key. What the store said up to a second ago
    /// counts.
    ///
    /// # Errors
    /// `ApiKey`.
    pub async fn verify(
        &self,
        id: ApiKeyId,
        key_hash: [u8; 32],
        now: Timestamp,
    ) -> Result<VerifiedApiKey, Error> {
        let refused = |problem| Err(Unauthenticated::ApiKey(problem).into());
        let Some((known, until)) = self.find(id, &key_hash).await? else {
            // Only who has the text learns more about the key.
            return refused(ApiKeyProblem::Invalid);
        };
        if known.is_revoked {
            return refused(ApiKeyProblem::Revoked);
        }
        let expires_at = until.min(known.key.expires_at.unwrap_or(NEVER));
        if expires_at <= now {
            return refused(ApiKeyProblem::Expired);
        }
        Ok(VerifiedApiKey {
            key: Arc::clone(&known.key),
            key_hash,
            expires_at,
        })
    }

    /// The key with a text of that hash, and until when that text may be used.
    ///
    /// A text that is none of the remembered key's may be newer: another replica may have rotated
    /// the key a moment ago. Then the store decides.
    async fn find(
        &self,
        id: ApiKeyId,
        key_hash: &[u8; 32],
    ) -> Result<Option<(KnownApiKey, Timestamp)>, Error> {
        let now = Instant::now();
        if let Some(known) = self.known.remembered(id, now)
            && let Some(until) = known.end_of(key_hash)
        {
            return Ok(Some((known, until)));
        }
        let known = self.known.read(id, &*self.store, now).await?;
        Ok(known.and_then(|known| {
            let until = known.end_of(key_hash)?;
            Some((known, until))
        }))
    }
}

/// Whether a bearer token is meant to be an API key, valid or not.
pub fn is_api_key(token: &str) -> bool {
    ApiKeyText::is_meant(token)
}

fn check_expiry(expires_at: Option<Timestamp>, now: Timestamp) -> Result<(), Error> {
    if expires_at.is_some_and(|end| end <= now) {
        return Err(Error::field(
            "expires_at",
            "This time is not in the future.",
        ));
    }
    Ok(())
}

/// `off` limits nothing, like no rates.
fn some_rates(rates: Option<Rates>) -> Option<Rates> {
    rates.filter(|rates| !rates.as_slice().is_empty())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use async_trait::async_trait;
    use tokio_util::task::TaskTracker;

    use super::*;
    use crate::domain::{Period, PreviousSecret};
    use crate::store;

    /// A store of one key that counts how often it is read.
    struct OneKey {
        record: ApiKeyRecord,
        reads: AtomicUsize,
    }

    #[async_trait]
    impl ApiKeyStore for OneKey {
        async fn create_api_key(
            &self,
            _: ApiKeyRecord,
            _: usize,
            _: Timestamp,
        ) -> Result<(), store::Error> {
            panic!("nothing is created")
        }

        async fn api_key(&self, id: ApiKeyId) -> Result<Option<ApiKeyRecord>, store::Error> {
            self.reads.fetch_add(1, Ordering::Relaxed);
            Ok((id == self.record.key.id).then(|| self.record.clone()))
        }

        async fn api_keys(&self, _: UserId) -> Result<Vec<ApiKey>, store::Error> {
            panic!("nothing is listed")
        }

        async fn change_api_key(
            &self,
            _: UserId,
            _: ApiKeyId,
            _: ApiKeyChange,
            _: usize,
            _: Timestamp,
        ) -> Result<Option<ApiKey>, store::Error> {
            panic!("nothing is changed")
        }

        async fn rotate_api_key(
            &self,
            _: UserId,
            _: ApiKeyId,
            _: NewSecret,
        ) -> Result<Option<ApiKey>, store::Error> {
            panic!("nothing is rotated")
        }

        async fn revoke_api_key(
            &self,
            _: UserId,
            _: ApiKeyId,
            _: Timestamp,
        ) -> Result<bool, store::Error> {
            panic!("nothing is revoked")
        }

        async fn note_api_key_use(&self, _: ApiKeyId, _: Timestamp) -> Result<bool, store::Error> {
            panic!("no use is noted")
        }
    }

    /// A key that expires at 100, was rotated with a grace until 50, and its two texts.
    fn one_key(is_revoked: bool) -> (ApiKeys, Arc<OneKey>, ApiKeyText, ApiKeyText) {
        let text = ApiKeyText::random().unwrap();
        let before = ApiKeyText::with_id(text.id()).unwrap();
        let record = ApiKeyRecord {
            key: ApiKey {
                id: text.id(),
                user_id: UserId(1),
                name: String::new(),
                scopes: Scopes::default(),
                models: Vec::new(),
                rates: None,
                budget: None,
                expires_at: Some(Timestamp(100)),
                created_at: Timestamp(0),
                last_used_at: None,
                last_four: String::new(),
            },
            key_hash: text.hash(),
            previous: Some(PreviousSecret {
                key_hash: before.hash(),
                until: Timestamp(50),
            }),
            revoked_at: is_revoked.then_some(Timestamp(1)),
        };
        let store = Arc::new(OneKey {
            record,
            reads: AtomicUsize::new(0),
        });
        let keys = ApiKeys::new(Arc::clone(&store) as _, TaskTracker::new());
        (keys, store, text, before)
    }

    async fn refusal(keys: &ApiKeys, token: &str, now: i64) -> ApiKeyProblem {
        match keys.authenticate(token, Timestamp(now)).await {
            Err(Error::Unauthenticated(Unauthenticated::ApiKey(problem))) => problem,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn malformed_key_is_refused_without_a_look_at_the_store() {
        let (keys, store, text, _) = one_key(false);
        let text = text.expose();
        let other_end = if text.ends_with('0') { "1" } else { "0" };
        for bad in [
            "ps_",
            &text[..48],
            &format!("{}{other_end}", &text[..48]),
            &format!("{text}{text}"),
        ] {
            assert_eq!(refusal(&keys, bad, 10).await, ApiKeyProblem::Invalid);
        }
        assert_eq!(store.reads.load(Ordering::Relaxed), 0);
        let unknown = ApiKeyText::random().unwrap();
        let problem = refusal(&keys, unknown.expose(), 10).await;
        assert_eq!(problem, ApiKeyProblem::Invalid);
        assert_eq!(store.reads.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn key_is_read_once_for_many_requests_of_a_moment() {
        let (keys, store, text, before) = one_key(false);
        for _ in 0..50 {
            for text in [&text, &before] {
                let verified = keys.authenticate(text.expose(), Timestamp(10)).await;
                assert_eq!(verified.unwrap().key.id, text.id());
            }
        }
        // A second may have passed on a busy machine.
        let reads = store.reads.load(Ordering::Relaxed);
        assert!(reads < 10, "{reads}");
        // A text that is not remembered may be that of a rotation elsewhere.
        let other = ApiKeyText::with_id(text.id()).unwrap();
        let problem = refusal(&keys, other.expose(), 10).await;
        assert_eq!(problem, ApiKeyProblem::Invalid);
        assert_eq!(store.reads.load(Ordering::Relaxed), reads + 1);
    }

    #[tokio::test]
    async fn each_text_of_a_key_ends_at_its_time() {
        let (keys, _, text, before) = one_key(false);
        let end = async |text: &ApiKeyText, now| {
            let verified = keys.authenticate(text.expose(), Timestamp(now)).await;
            verified.unwrap().expires_at
        };
        assert_eq!(end(&text, 99).await, Timestamp(100));
        assert_eq!(end(&before, 49).await, Timestamp(50));
        for (text, now) in [(&text, 100), (&before, 50)] {
            let problem = refusal(&keys, text.expose(), now).await;
            assert_eq!(problem, ApiKeyProblem::Expired);
        }
    }

    #[tokio::test]
    async fn a_period_is_refused_for_a_key_that_has_no_budget_after_the_change() {
        // The store panics at a change that reaches it.
        let (keys, store, text, _) = one_key(false);
        for budget in [None, Some(None)] {
            let change = ApiKeyChange {
                budget,
                budget_period: Some(Some(Period::Day)),
                ..ApiKeyChange::default()
            };
            let user = store.record.key.user_id;
            let changed = keys.change(user, text.id(), change, Timestamp(10)).await;
            let is_refused = changed.is_err_and(|error| {
                matches!(error, Error::InvalidFields(fields) if fields[0].0 == "budget_period")
            });
            assert!(is_refused, "{budget:?}");
        }
    }

    #[tokio::test]
    async fn revoked_key_says_so_only_to_who_has_its_text() {
        let (keys, _, text, before) = one_key(true);
        for text in [text.expose(), before.expose()] {
            assert_eq!(refusal(&keys, text, 10).await, ApiKeyProblem::Revoked);
        }
        let other = ApiKeyText::with_id(text.id()).unwrap();
        let problem = refusal(&keys, other.expose(), 10).await;
        assert_eq!(problem, ApiKeyProblem::Invalid);
    }
}
