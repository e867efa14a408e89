//! Taking the rows of a source into the store.

use std::collections::{HashMap, HashSet, VecDeque};

use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;

use super::rules::{Fault, Place, Problem, Rules, Sound};
use super::source::{Row, Source};
use super::{Error, Meter};
use crate::domain::{
    ModelId, Prompt, PromptId, PromptRecord, PromptStatus, User, UserId, VectorRecord,
};
use crate::embed::BackgroundEmbedder;
use crate::store::{AccountStore, BulkStore, PromptStore};

/// Prompts embedded and committed together: what `kill -9` costs at most, times the batches under way.
const BATCH: usize = 64;
/// Batches under way for each embedder, so that it finds the next one when it is done with the last.
const AHEAD: usize = 2;
/// Faults that are kept one by one. More are only counted.
const FAULTS_KEPT: usize = 100;

/// The store that takes the rows in.
#[derive(Clone, Copy)]
pub struct Import<'a> {
    /// Its accounts.
    pub accounts: &'a dyn AccountStore,
    /// Its prompts.
    pub prompts: &'a dyn PromptStore,
    /// Its bulk side.
    pub bulk: &'a dyn BulkStore,
    /// The longest text that is taken, in characters.
    pub max_prompt_chars: usize,
    /// Told how far it has come.
    pub meter: &'a Meter,
}

/// What makes the vectors.
#[derive(Clone, Copy)]
pub struct Embedding<'a> {
    /// As many as cores; each works on a batch of its own.
    pub embedders: &'a [BackgroundEmbedder],
    /// The model behind them.
    pub model: &'a ModelId,
    /// Numbers in a vector.
    pub dimension: usize,
}

/// Rows of both kinds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Accounts.
    pub users: u64,
    /// Prompts.
    pub prompts: u64,
}

/// What an import would do, or has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Rows that are not here yet, or were not.
    pub new: Counts,
    /// Rows that are here already, and are left alone.
    pub present: Counts,
    /// Accounts among the new ones whose password is hashed in a way unknown here: they come without a password.
    pub lost_passwords: u64,
    /// Rows that cannot be taken over.
    pub faults: u64,
    /// The first of them.
    pub first_faults: Vec<Fault>,
}

impl Report {
    fn fault(&mut self, place: Place, problem: Problem) {
        self.faults += 1;
        if self.first_faults.len() < FAULTS_KEPT {
            self.first_faults.push(Fault { place, problem });
        }
    }
}

impl Import<'_> {
    /// Reads the whole source and says what an import would do. Changes nothing.
    ///
    /// # Errors
    /// Those of the source and of the store.
    pub async fn check(&self, source: &mut dyn Source) -> Result<Report, Error> {
        self.meter.begin("checking", None);
        source.rewind().await?;
        let mut sieve = Sieve::new(*self);
        loop {
            let rows = source.read().await?;
            if rows.is_empty() {
                return Ok(sieve.report);
            }
            let read = rows.len();
            sieve.sift(rows).await?;
            self.meter.advance(read);
        }
    }

    /// Takes in every sound row that is not here yet, with its vector. `new_prompts`: how many there are, by [`check`](Self::check).
    ///
    /// Rows are committed in batches, in the order of the source: cut off at any moment, the same call goes on with the first row
    /// that is missing.
    ///
    /// # Errors
    /// Those of the source and of the store.
    pub async fn run(
        &self,
        source: &mut dyn Source,
        embedding: Embedding<'_>,
        new_prompts: u64,
    ) -> Result<Report, Error> {
        self.meter.begin("importing", Some(new_prompts));
        source.rewind().await?;
        // Before any row: an import that is cut off must not leave ids to be given out that old tokens may still name.
        self.bulk.raise_ids(source.last_ids()).await?;
        let mut sieve = Sieve::new(*self);
        let mut waiting: VecDeque<Vec<PromptRecord>> = VecDeque::new();
        let mut underway = FuturesOrdered::new();
        let mut turns = embedding.embedders.iter().cycle();
        let mut is_read = false;
        loop {
            while underway.len() < AHEAD * embedding.embedders.len() {
                if let Some(batch) = waiting.pop_front() {
                    underway.push_back(embedded(batch, embedding, turns.next()));
                } else if is_read {
                    break;
                } else {
                    let rows = source.read().await?;
                    is_read = rows.is_empty();
                    let (users, prompts) = sieve.sift(rows).await?;
                    if !users.is_empty() {
                        self.bulk.put_users(users).await?;
                    }
                    waiting.extend(in_batches(prompts));
                }
            }
            let Some(batch) = underway.next().await else {
                return Ok(sieve.report);
            };
            let rows = batch.len();
            self.bulk.put_prompts(batch).await?;
            self.meter.advance(rows);
        }
    }
}

fn in_batches(prompts: Vec<PromptRecord>) -> impl Iterator<Item = Vec<PromptRecord>> {
    let mut rest = prompts.into_iter();
    std::iter::from_fn(move || {
        let batch: Vec<PromptRecord> = rest.by_ref().take(BATCH).collect();
        (!batch.is_empty()).then_some(batch)
    })
}

/// The batch with a vector of the model for each completed prompt. One that the model fails on comes without: the server makes up
/// for it, or says so, when it starts.
async fn embedded(
    mut batch: Vec<PromptRecord>,
    embedding: Embedding<'_>,
    embedder: Option<&BackgroundEmbedder>,
) -> Vec<PromptRecord> {
    let mut wanting = Vec::new();
    for (at, record) in batch.iter_mut().enumerate() {
        let usable = |vector: &VectorRecord| {
            vector.model == *embedding.model && vector.is_unit(embedding.dimension)
        };
        if record.vector.as_ref().is_some_and(usable) {
            continue;
        }
        record.vector = None;
        if record.prompt.status == PromptStatus::Completed {
            wanting.push(at);
        }
    }
    let texts: Vec<String> = wanting
        .iter()
        .map(|at| batch[*at].prompt.prompt.clone())
        .collect();
    if let Some(embedder) = embedder
        && !texts.is_empty()
    {
        let made = embedder.embed(texts).await;
        for (at, vector) in wanting.into_iter().zip(made) {
            batch[at].vector = vector.map(|vector| VectorRecord {
                model: embedding.model.clone(),
                f16_bytes: vector.to_f16_bytes(),
            });
        }
    }
    batch
}

/// Tells new rows from those here already and from faulty ones.
struct Sieve<'a> {
    import: Import<'a>,
    rules: Rules,
    /// Accounts that are here and not in the source, as far as prompts have asked for them.
    owners_here: HashSet<UserId>,
    report: Report,
}

impl<'a> Sieve<'a> {
    fn new(import: Import<'a>) -> Self {
        Self {
            import,
            rules: Rules::new(import.max_prompt_chars),
            owners_here: HashSet::new(),
            report: Report::default(),
        }
    }

    /// The rows to be stored.
    async fn sift(&mut self, rows: Vec<Row>) -> Result<(Vec<User>, Vec<PromptRecord>), Error> {
        let told = self.report.first_faults.len();
        let (mut users, mut prompts) = (Vec::new(), Vec::new());
        for row in rows {
            let place = row.place;
            match self.rules.judge(row) {
                Ok(Sound::User {
                    user,
                    lost_password,
                }) => users.push((place, user, lost_password)),
                Ok(Sound::Prompt(record)) => prompts.push((place, record)),
                Err(fault) => self.report.fault(fault.place, fault.problem),
            }
        }
        let users = self.new_users(users).await?;
        let prompts = self.new_prompts(prompts).await?;
        self.report.first_faults[told..].sort_by_key(|fault| fault.place);
        Ok((users, prompts))
    }

    async fn new_users(&mut self, users: Vec<(Place, User, bool)>) -> Result<Vec<User>, Error> {
        let accounts = self.import.accounts;
        let ids: Vec<UserId> = users.iter().map(|(_, user, _)| user.id).collect();
        let here: HashMap<UserId, String> = accounts
            .users(&ids)
            .await?
            .into_iter()
            .map(|user| (user.id, user.username))
            .collect();
        let mut new = Vec::new();
        for (place, user, lost_password) in users {
            let problem = match here.get(&user.id) {
                Some(name) if *name == user.username => {
                    self.report.present.users += 1;
                    continue;
                }
                Some(_) => Some(Problem::IdTaken),
                None => {
                    let namesake = accounts.user_by_username(&user.username).await?;
                    namesake.map(|_| Problem::NameTaken)
                }
            };
            if let Some(problem) = problem {
                self.rules.forget_user(user.id);
                self.report.fault(place, problem);
                continue;
            }
            self.report.new.users += 1;
            self.report.lost_passwords += u64::from(lost_password);
            new.push(user);
        }
        Ok(new)
    }

    async fn new_prompts(
        &mut self,
        prompts: Vec<(Place, PromptRecord)>,
    ) -> Result<Vec<PromptRecord>, Error> {
        self.ask_for_owners(&prompts).await?;
        let ids: Vec<PromptId> = prompts.iter().map(|(_, record)| record.prompt.id).collect();
        let here: HashMap<PromptId, Prompt> = self
            .import
            .prompts
            .prompts(None, &ids, usize::MAX)
            .await?
            .whole
            .into_iter()
            .map(|prompt| (prompt.id, prompt))
            .collect();
        let mut new = Vec::new();
        for (place, record) in prompts {
            let prompt = &record.prompt;
            let owner = prompt.user_id;
            if !self.rules.has_user(owner) && !self.owners_here.contains(&owner) {
                self.report.fault(place, Problem::NoOwner);
                continue;
            }
            match here.get(&prompt.id) {
                None => {
                    self.report.new.prompts += 1;
                    new.push(record);
                }
                Some(known) if is_same(known, prompt) => self.report.present.prompts += 1,
                Some(_) => self.report.fault(place, Problem::IdTaken),
            }
        }
        Ok(new)
    }

    async fn ask_for_owners(&mut self, prompts: &[(Place, PromptRecord)]) -> Result<(), Error> {
        let unknown: HashSet<UserId> = prompts
            .iter()
            .map(|(_, record)| record.prompt.user_id)
            .filter(|id| !self.rules.has_user(*id) && !self.owners_here.contains(id))
            .collect();
        if !unknown.is_empty() {
            let unknown: Vec<UserId> = unknown.into_iter().collect();
            let found = self.import.accounts.users(&unknown).await?;
            self.owners_here
                .extend(found.into_iter().map(|user| user.id));
        }
        Ok(())
    }
}

/// What [`BulkStore::put_prompts`] counts as the same.
fn is_same(known: &Prompt, prompt: &Prompt) -> bool {
    known.user_id == prompt.user_id
        && known.created_at == prompt.created_at
        && known.prompt == prompt.prompt
}
