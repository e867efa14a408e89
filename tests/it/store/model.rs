//! Random operations against a naive model of the contract: a few maps.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use prompt_service::domain::{
    Embedding, ModelId, Prompt, PromptId, PromptStatus, RevokedToken, Session, Timestamp, User,
    UserId,
};
use prompt_service::store::{Coverage, DeletedPrompt, Error, Unembedded, VectorPage};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use tokio::runtime::Runtime;

use crate::store::{
    InsertPrompt, NewPrompt, TestableStore, completed, list_users, model, new_user, vector,
};

/// Users, prompts, names and times are drawn from few, so that operations meet.
#[derive(Clone, Debug)]
enum Operation {
    CreateUser {
        name: u8,
    },
    SetActive {
        user: u8,
        active: bool,
        now: i64,
    },
    SetPassword {
        user: u8,
        hash: u8,
        now: i64,
    },
    UpgradeHash {
        user: u8,
        old: u8,
        new: u8,
    },
    CreateSession {
        user: u8,
        expires_at: i64,
    },
    LogOut {
        session: Option<u8>,
        token: Option<(u8, i64)>,
    },
    Purge {
        now: i64,
    },
    Insert {
        user: u8,
        completed: bool,
        embedding: Option<u8>,
    },
    Delete {
        user: u8,
        prompt: u8,
    },
    PutEmbeddings {
        model: u8,
        prompts: Vec<u8>,
        mark: u16,
    },
    Page {
        owner: Option<u8>,
        model: u8,
        at: Option<u8>,
        limit: usize,
    },
}

fn operation() -> impl Strategy<Value = Operation> {
    let small = || 0..4_u8;
    let prompt = || 0..12_u8;
    let time = || 0..20_i64;
    prop_oneof![
        2 => small().prop_map(|name| Operation::CreateUser { name }),
        1 => (small(), any::<bool>(), time())
            .prop_map(|(user, active, now)| Operation::SetActive { user, active, now }),
        1 => (small(), small(), time())
            .prop_map(|(user, hash, now)| Operation::SetPassword { user, hash, now }),
        1 => (small(), small(), small())
            .prop_map(|(user, old, new)| Operation::UpgradeHash { user, old, new }),
        2 => (small(), time())
            .prop_map(|(user, expires_at)| Operation::CreateSession { user, expires_at }),
        1 => (proptest::option::of(prompt()), proptest::option::of((small(), time())))
            .prop_map(|(session, token)| Operation::LogOut { session, token }),
        1 => time().prop_map(|now| Operation::Purge { now }),
        6 => (small(), prop::bool::weighted(0.8), proptest::option::of(0..3_u8))
            .prop_map(|(user, completed, embedding)| Operation::Insert { user, completed, embedding }),
        2 => (small(), prompt()).prop_map(|(user, prompt)| Operation::Delete { user, prompt }),
        2 => (0..3_u8, prop::collection::vec(prompt(), 0..4), 0..9_u16)
            .prop_map(|(model, prompts, mark)| Operation::PutEmbeddings { model, prompts, mark }),
        3 => (proptest::option::of(small()), 0..3_u8, proptest::option::of(prompt()), 0..5_usize)
            .prop_map(|(owner, model, at, limit)| Operation::Page { owner, model, at, limit }),
    ]
}

#[derive(Default)]
struct Model {
    users: Vec<User>,
    sessions: HashMap<[u8; 32], Session>,
    /// Hashes ever given out, which do not repeat.
    hashes: Vec<[u8; 32]>,
    revoked: HashMap<String, Timestamp>,
    prompts: BTreeMap<PromptId, (Prompt, Option<(ModelId, Embedding)>)>,
    /// Ids ever given out.
    ids: Vec<PromptId>,
}

fn named(model_number: u8) -> ModelId {
    model(&format!("m{model_number}"))
}

fn hash(number: u8) -> String {
    // The first is what `new_user` gives.
    ["$argon2id$first", "h1", "h2", "h3"][usize::from(number)].to_owned()
}

/// Sessions that one user may have: few, so that the limit is reached.
const SESSIONS: usize = 2;

impl Model {
    /// Makes room for one more session, as the contract says.
    fn end_oldest_sessions(&mut self, user_id: UserId, now: Timestamp) {
        let mut live: Vec<_> = self
            .sessions
            .values()
            .filter(|session| session.user_id == user_id && session.expires_at > now)
            .map(|session| (session.created_at, session.token_hash))
            .collect();
        live.sort_unstable();
        for (_, hash) in live.iter().rev().skip(SESSIONS - 1) {
            self.sessions.remove(hash);
        }
    }

    /// The account of that number, or an id that no account has.
    fn user(&self, number: u8) -> UserId {
        let user = self.users.get(usize::from(number));
        user.map_or(UserId(1_000_000), |user| user.id)
    }

    fn prompt(&self, number: u8) -> PromptId {
        let id = self.ids.get(usize::from(number));
        id.copied().unwrap_or(PromptId(1_000_000))
    }

    fn user_mut(&mut self, id: UserId) -> Option<&mut User> {
        self.users.iter_mut().find(|user| user.id == id)
    }

    fn end_tokens(&mut self, id: UserId, now: Timestamp) {
        if let Some(user) = self.user_mut(id) {
            user.tokens_valid_from = user.tokens_valid_from.max(now);
        }
        self.sessions.retain(|_, session| session.user_id != id);
    }

    fn coverage(&self, model: &ModelId, owner: Option<UserId>) -> Coverage {
        let mut coverage = Coverage::default();
        for (prompt, vector) in self.prompts.values() {
            if prompt.status == PromptStatus::Completed
                && owner.is_none_or(|owner| owner == prompt.user_id)
            {
                coverage.completed += 1;
                coverage.embedded += u64::from(vector.as_ref().is_some_and(|(of, _)| of == model));
            }
        }
        coverage
    }

    async fn step(&mut self, store: &dyn TestableStore, operation: Operation) {
        match operation {
            Operation::CreateUser { name } => {
                let new = new_user(&format!("u{name}"));
                let taken = self.users.iter().any(|user| user.username == new.username);
                match store.create_user(new).await {
                    Ok(user) => {
                        assert!(!taken && self.users.iter().all(|other| other.id < user.id));
                        self.users.push(user);
                    }
                    Err(error) => assert!(taken && matches!(error, Error::UsernameTaken)),
                }
            }
            Operation::SetActive { user, active, now } => {
                let (id, now) = (self.user(user), Timestamp(now));
                let found = store.set_active(id, active, now).await.unwrap();
                assert_eq!(found, self.user_mut(id).is_some());
                if let Some(user) = self.user_mut(id) {
                    user.is_active = active;
                }
                if !active {
                    self.end_tokens(id, now);
                }
            }
            Operation::SetPassword {
                user,
                hash: number,
                now,
            } => {
                let (id, now) = (self.user(user), Timestamp(now));
                let found = store.set_password(id, &hash(number), now).await.unwrap();
                assert_eq!(found, self.user_mut(id).is_some());
                if let Some(user) = self.user_mut(id) {
                    user.password_hash = hash(number);
                }
                self.end_tokens(id, now);
            }
            Operation::UpgradeHash { user, old, new } => {
                let (id, old, new) = (self.user(user), hash(old), hash(new));
                let changed = store.upgrade_password_hash(id, &old, &new).await.unwrap();
                let same = self.user_mut(id).filter(|user| user.password_hash == old);
                assert_eq!(changed, same.is_some());
                if let Some(user) = same {
                    user.password_hash = new;
                }
            }
            Operation::CreateSession { user, expires_at } => {
                let session = Session {
                    token_hash: [u8::try_from(self.hashes.len()).unwrap(); 32],
                    user_id: self.user(user),
                    created_at: Timestamp(0),
                    expires_at: Timestamp(expires_at),
                };
                let stored = store.create_session(session.clone(), SESSIONS).await;
                let stored = stored.is_ok();
                assert_eq!(stored, self.user_mut(session.user_id).is_some());
                self.hashes.push(session.token_hash);
                if stored {
                    self.end_oldest_sessions(session.user_id, session.created_at);
                    self.sessions.insert(session.token_hash, session);
                }
            }
            Operation::LogOut { session, token } => {
                let session: Vec<_> = session.map(|number| [number; 32]).into_iter().collect();
                let token = token.map(|(jti, expires_at)| RevokedToken {
                    jti: format!("j{jti}"),
                    expires_at: Timestamp(expires_at),
                });
                store.log_out(&session, token.clone()).await.unwrap();
                self.sessions.retain(|hash, _| !session.contains(hash));
                if let Some(token) = token {
                    let known = self.revoked.entry(token.jti).or_insert(token.expires_at);
                    *known = token.expires_at.max(*known);
                }
            }
            Operation::Purge { now } => {
                let now = Timestamp(now);
                let before = self.sessions.len() + self.revoked.len();
                self.sessions.retain(|_, session| session.expires_at > now);
                self.revoked.retain(|_, expires_at| *expires_at > now);
                let gone = before - self.sessions.len() - self.revoked.len();
                assert_eq!(store.purge_expired(now).await.unwrap(), gone as u64);
            }
            Operation::Insert {
                user,
                completed: done,
                embedding,
            } => {
                let owner = self.user(user);
                let mark = u16::try_from(self.ids.len()).unwrap();
                let embedding = embedding.map(|number| (named(number), vector(mark)));
                let mut new = completed(owner, &format!("p{mark}"));
                new.embedding = embedding.clone();
                if !done {
                    new = NewPrompt {
                        status: PromptStatus::Failed,
                        response: None,
                        ..new
                    };
                }
                match store.insert_prompt(new).await {
                    Ok(prompt) => {
                        assert!(self.user_mut(owner).is_some());
                        assert!(self.ids.last().is_none_or(|last| *last < prompt.id));
                        self.ids.push(prompt.id);
                        self.prompts
                            .insert(prompt.id, (prompt, embedding.filter(|_| done)));
                    }
                    Err(_) => assert!(self.user_mut(owner).is_none()),
                }
            }
            Operation::Delete { user, prompt } => {
                let (owner, id) = (self.user(user), self.prompt(prompt));
                let own = self
                    .prompts
                    .get(&id)
                    .is_some_and(|(prompt, _)| prompt.user_id == owner);
                let expected =
                    own.then(|| self.prompts.remove(&id))
                        .flatten()
                        .map(|(_, vector)| DeletedPrompt {
                            embedding_model: vector.map(|(model, _)| model),
                        });
                assert_eq!(store.delete_prompt(owner, id).await.unwrap(), expected);
            }
            Operation::PutEmbeddings {
                model,
                prompts,
                mark,
            } => {
                let model = named(model);
                let mut rows = Vec::new();
                let mut expected = Vec::new();
                for number in prompts {
                    let id = self.prompt(number);
                    rows.push((id, vector(mark)));
                    if let Some((prompt, row)) = self.prompts.get_mut(&id)
                        && prompt.status == PromptStatus::Completed
                    {
                        *row = Some((model.clone(), vector(mark)));
                        expected.push(id);
                    }
                }
                assert_eq!(store.put_embeddings(&model, rows).await.unwrap(), expected);
            }
            Operation::Page {
                owner,
                model,
                at,
                limit,
            } => {
                self.check_pages(store, owner, &named(model), at, limit)
                    .await;
            }
        }
    }

    async fn check_pages(
        &self,
        store: &dyn TestableStore,
        owner: Option<u8>,
        model: &ModelId,
        at: Option<u8>,
        limit: usize,
    ) {
        let owner = owner.map(|number| self.user(number));
        let at = at.map(|number| self.prompt(number));
        let rows = self.prompts.values();
        let own = |prompt: &Prompt| owner.is_none_or(|owner| owner == prompt.user_id);

        let after = at
            .and_then(|id| self.prompts.get(&id))
            .map(|(row, _)| (row.user_id, row.id));
        let mut vectors: Vec<_> = rows.clone().filter(|(prompt, _)| own(prompt)).collect();
        vectors.sort_by_key(|(prompt, _)| (prompt.user_id, prompt.id));
        let mut page = VectorPage::default();
        for (prompt, vector) in vectors {
            let cursor = (prompt.user_id, prompt.id);
            if let Some((of, vector)) = vector
                && of == model
                && after.is_none_or(|after| cursor > after)
                && page.ids.len() < limit
            {
                page.ids.push(cursor);
                page.f16_bytes.extend(vector.to_f16_bytes());
            }
        }
        assert_eq!(
            store.vectors(model, owner, after, limit).await.unwrap(),
            page
        );

        let lacking: Vec<_> = rows
            .clone()
            .filter(|(row, _)| row.status == PromptStatus::Completed)
            .filter(|(row, _)| at.is_none_or(|at| row.id > at))
            .filter(|(_, vector)| vector.as_ref().is_none_or(|(of, _)| of != model))
            .map(|(row, _)| Unembedded {
                id: row.id,
                user_id: row.user_id,
                prompt: row.prompt.clone(),
            })
            .take(limit)
            .collect();
        assert_eq!(store.unembedded(model, at, limit).await.unwrap(), lacking);

        let history: Vec<_> = rows
            .rev()
            .map(|(prompt, _)| prompt)
            .filter(|prompt| owner == Some(prompt.user_id))
            .filter(|prompt| at.is_none_or(|at| prompt.id < at))
            .take(limit)
            .cloned()
            .collect();
        if let Some(owner) = owner {
            assert_eq!(
                store
                    .list_prompts(owner, at, limit, usize::MAX)
                    .await
                    .unwrap()
                    .prompts,
                history
            );
        }
    }

    /// Compares everything that can be asked.
    async fn compare(&self, store: &dyn TestableStore) {
        assert_eq!(list_users(store, None, 99).await, self.users);
        let stored = store.sessions(&self.hashes).await.unwrap();
        let stored: HashMap<_, _> = stored
            .into_iter()
            .map(|session| (session.token_hash, session))
            .collect();
        assert_eq!(stored, self.sessions);
        for number in 0..4 {
            let jti = format!("j{number}");
            let revoked = store.is_token_revoked(&jti).await.unwrap();
            assert_eq!(revoked, self.revoked.contains_key(&jti));
        }
        let mut prompts = store
            .prompts(None, &self.ids, usize::MAX)
            .await
            .unwrap()
            .whole;
        prompts.sort_by_key(|prompt| prompt.id);
        let expected: Vec<_> = self
            .prompts
            .values()
            .map(|(prompt, _)| prompt.clone())
            .collect();
        assert_eq!(prompts, expected);
        for model in (0..3).map(named) {
            for owner in std::iter::once(None).chain((0..5).map(|number| Some(self.user(number)))) {
                let coverage = store.coverage(&model, owner).await.unwrap();
                assert_eq!(coverage, self.coverage(&model, owner));
            }
        }
    }
}

/// `open` returns an empty store, and a value that must live as long as the store.
pub fn compare_with_naive_model<A>(open: impl AsyncFn() -> (Arc<dyn TestableStore>, A)) {
    let runtime = Runtime::new().unwrap();
    let config = Config {
        cases: 48,
        failure_persistence: None,
        ..Config::default()
    };
    let operations = prop::collection::vec(operation(), 1..80);
    TestRunner::new(config)
        .run(&operations, |operations| {
            runtime.block_on(async {
                let (store, _alive) = open().await;
                let mut model = Model::default();
                for operation in operations {
                    model.step(&*store, operation).await;
                }
                model.compare(&*store).await;
            });
            Ok(())
        })
        .unwrap();
}
