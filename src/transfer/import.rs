//! Importing the rows of a source into the store.

use std::collections::{HashMap, HashSet};

use futures_util::stream::{self, Stream, StreamExt, TryStreamExt};

use super::json_lines::NO_PASSWORD;
use super::pipe::pipe;
use super::rules::Rules;
use super::source::Source;
use super::{Error, Fault, Location, Meter, Problem, Row, RowCounts};
use crate::credentials::is_known_hash;
use crate::domain::{
    ModelId, Prompt, PromptId, PromptRecord, PromptStatus, Record, User, UserId, VectorRecord,
};
use crate::embed::BackgroundEmbedder;
use crate::store::{AccountStore, BulkStore, PromptStore};

/// Prompts embedded and committed together: what `kill -9` costs at most, times the batches under
/// way.
const BATCH: usize = 64;
/// Batches under way for each embedder, so that it has the next one when the last one is done.
const AHEAD: usize = 2;
/// Faults that are kept one by one. Further ones are only counted.
const FAULTS_KEPT: usize = 100;

/// The store that receives the rows.
#[derive(Clone, Copy)]
pub struct Import<'a> {
    /// Its accounts.
    pub accounts: &'a dyn AccountStore,
    /// Its prompts.
    pub prompts: &'a dyn PromptStore,
    /// Its rows in bulk.
    pub bulk: &'a dyn BulkStore,
    /// The longest text that is imported, in characters.
    pub max_prompt_chars: usize,
    /// Shows the progress.
    pub meter: &'a Meter,
}

/// What makes the vectors.
#[derive(Clone, Copy)]
pub struct Embedders<'a> {
    /// As many as cores; each works on a separate batch.
    pub embedders: &'a [BackgroundEmbedder],
    /// The model behind them.
    pub model: &'a ModelId,
    /// Numbers in a vector.
    pub dimension: usize,
}

/// What an import would do, or has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Rows that are not in the store yet, or were not.
    pub new: RowCounts,
    /// Rows that are in the store already, and are left as they are.
    pub present: RowCounts,
    /// Accounts among the new ones whose password is hashed in a way unknown here: they are
    /// imported without a password.
    pub lost_passwords: u64,
    /// Rows that cannot be imported.
    pub faults: u64,
    /// The first of them.
    pub first_faults: Vec<Fault>,
}

impl Report {
    fn fault(&mut self, location: Location, problem: Problem) {
        self.faults += 1;
        if self.first_faults.len() < FAULTS_KEPT {
            self.first_faults.push(Fault { location, problem });
        }
    }
}

impl Import<'_> {
    /// Reads the whole source and reports what an import would do. Changes nothing.
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
            let read = rows.len() as u64;
            sieve.sift(rows).await?;
            self.meter.advance(read);
        }
    }

    /// Stores every sound row that is not in the store yet, with its vector. `new_prompts`: how
    /// many there are, by [`check`](Self::check).
    ///
    /// Rows are committed in batches, in the order of the source: interrupted at any moment, the
    /// same call continues with the first row that is missing.
    ///
    /// # Errors
    /// Those of the source and of the store.
    pub async fn run(
        &self,
        source: &mut dyn Source,
        embedders: Embedders<'_>,
        new_prompts: u64,
    ) -> Result<Report, Error> {
        self.meter.begin("importing", Some(new_prompts));
        source.rewind().await?;
        // Before any row: an interrupted import must not leave ids to be given out that old tokens
        // may still name.
        self.bulk.raise_ids(source.last_ids()).await?;
        let mut sieve = Sieve::new(*self);
        let mut turns = embedders.embedders.iter().cycle();
        let embedded = new_batches(source, &mut sieve)
            .map_ok(|batch| embedded(batch, embedders, turns.next()))
            .try_buffered(AHEAD * embedders.embedders.len());
        pipe(embedded, async |batch| {
            let prompts = RowCounts::of(&batch).prompts;
            self.bulk.put(batch).await?;
            self.meter.advance(prompts);
            Ok(())
        })
        .await?;
        Ok(sieve.report)
    }
}

/// The new rows of a source in their order: the users of a page together, prompts in batches.
fn new_batches<'a>(
    source: &'a mut dyn Source,
    sieve: &'a mut Sieve<'_>,
) -> impl Stream<Item = Result<Vec<Record>, Error>> {
    let pages = stream::try_unfold((source, sieve), |(source, sieve)| async move {
        let rows = source.read().await?;
        if rows.is_empty() {
            return Ok(None);
        }
        let new = sieve.sift(rows).await?;
        let batches = stream::iter(in_batches(new)).map(Ok);
        Ok::<_, Error>(Some((batches, (source, sieve))))
    });
    pages.try_flatten()
}

fn in_batches(mut users: Vec<Record>) -> Vec<Vec<Record>> {
    let is_user = |record: &Record| matches!(record, Record::User(_));
    let prompts = users.split_off(users.partition_point(is_user));
    let mut batches = Vec::from_iter((!users.is_empty()).then_some(users));
    let mut prompts = prompts.into_iter();
    while prompts.len() > 0 {
        batches.push(prompts.by_ref().take(BATCH).collect());
    }
    batches
}

/// The batch with a vector of the model for each completed prompt. A prompt that the model fails on
/// stays without: the server embeds it when it starts, or reports that it cannot.
async fn embedded(
    mut batch: Vec<Record>,
    embedders: Embedders<'_>,
    embedder: Option<&BackgroundEmbedder>,
) -> Result<Vec<Record>, Error> {
    let is_usable = |vector: &VectorRecord| {
        vector.model == *embedders.model && vector.is_unit(embedders.dimension)
    };
    let mut unembedded = Vec::new();
    for record in &mut batch {
        if let Record::Prompt(record) = record {
            record.vector = record.vector.take().filter(is_usable);
            if record.vector.is_none() && record.prompt.status == PromptStatus::Completed {
                unembedded.push(record);
            }
        }
    }
    let text = |record: &&mut PromptRecord| record.prompt.prompt.clone();
    let texts: Vec<String> = unembedded.iter().map(text).collect();
    if let Some(embedder) = embedder
        && !texts.is_empty()
    {
        let vectors = embedder.embed(texts).await;
        for (record, vector) in unembedded.into_iter().zip(vectors) {
            record.vector = vector.map(|vector| VectorRecord {
                model: embedders.model.clone(),
                f16_bytes: vector.to_f16_bytes(),
            });
        }
    }
    Ok(batch)
}

/// Separates new rows from those in the store already and from faulty ones.
struct Sieve<'a> {
    import: Import<'a>,
    rules: Rules,
    /// Accounts that prompts may belong to: those of the source, and those in the store as far as
    /// rows have named them.
    owners: HashSet<UserId>,
    report: Report,
}

impl<'a> Sieve<'a> {
    fn new(import: Import<'a>) -> Self {
        Self {
            import,
            rules: Rules::new(import.max_prompt_chars),
            owners: HashSet::new(),
            report: Report::default(),
        }
    }

    /// Returns the rows to be stored.
    async fn sift(&mut self, rows: Vec<Row>) -> Result<Vec<Record>, Error> {
        let (users, prompts) = self.stored(&rows).await?;
        let mut new = Vec::new();
        for Row { location, record } in rows {
            let checked = record.and_then(|record| self.rules.check(record));
            let judged = match checked {
                Ok(Record::User(mut user)) => {
                    let stored = users.get(&user.id);
                    let is_new = self.is_new_user(&mut user, stored).await?;
                    is_new.map(|is_new| (is_new, Record::User(user)))
                }
                Ok(Record::Prompt(record)) => {
                    let is_new = self.is_new_prompt(&record.prompt, &prompts);
                    is_new.map(|is_new| (is_new, Record::Prompt(record)))
                }
                // No source has others.
                Ok(_) => continue,
                Err(problem) => Err(problem),
            };
            match judged {
                Ok((true, record)) => {
                    self.report.new += RowCounts::of([&record]);
                    new.push(record);
                }
                Ok((false, record)) => self.report.present += RowCounts::of([&record]),
                Err(problem) => self.report.fault(location, problem),
            }
        }
        Ok(new)
    }

    /// What the store has under the ids of these rows: the names of accounts, and prompts. Notes
    /// which owners of prompts are in the store.
    async fn stored(
        &mut self,
        rows: &[Row],
    ) -> Result<(HashMap<UserId, String>, HashMap<PromptId, Prompt>), Error> {
        let (mut users, mut prompts) = (HashSet::new(), Vec::new());
        for record in rows.iter().filter_map(|row| row.record.as_ref().ok()) {
            if let Record::User(user) = record {
                users.insert(user.id);
            }
            if let Record::Prompt(PromptRecord { prompt, .. }) = record {
                prompts.push(prompt.id);
                if !self.owners.contains(&prompt.user_id) {
                    users.insert(prompt.user_id);
                }
            }
        }
        let import = self.import;
        let users: Vec<UserId> = users.into_iter().collect();
        let users = import.accounts.users(&users).await?.into_iter();
        let users: HashMap<UserId, String> = users.map(|user| (user.id, user.username)).collect();
        self.owners.extend(users.keys());
        let prompts = import.prompts.prompts(None, &prompts, usize::MAX).await?;
        let prompts = prompts.whole.into_iter();
        Ok((users, prompts.map(|prompt| (prompt.id, prompt)).collect()))
    }

    /// Whether the account is not in the store yet. Takes the password of a new account away if no
    /// login could check it.
    async fn is_new_user(
        &mut self,
        user: &mut User,
        stored: Option<&String>,
    ) -> Result<Result<bool, Problem>, Error> {
        if let Some(name) = stored {
            let is_same = *name == user.username;
            return Ok(is_same.then_some(false).ok_or(Problem::IdTaken));
        }
        let namesake = self.import.accounts.user_by_username(&user.username);
        if namesake.await?.is_some() {
            return Ok(Err(Problem::NameTaken));
        }
        self.owners.insert(user.id);
        if !user.password_hash.starts_with(NO_PASSWORD) && !is_known_hash(&user.password_hash) {
            NO_PASSWORD.clone_into(&mut user.password_hash);
            self.report.lost_passwords += 1;
        }
        Ok(Ok(true))
    }

    /// Whether the prompt is not in the store yet.
    fn is_new_prompt(
        &self,
        prompt: &Prompt,
        stored: &HashMap<PromptId, Prompt>,
    ) -> Result<bool, Problem> {
        if !self.owners.contains(&prompt.user_id) {
            return Err(Problem::NoOwner);
        }
        let key = |prompt: &Prompt| (prompt.user_id, prompt.created_at);
        match stored.get(&prompt.id) {
            None => Ok(true),
            Some(stored) if key(stored) == key(prompt) && stored.prompt == prompt.prompt => {
                Ok(false)
            }
            Some(_) => Err(Problem::IdTaken),
        }
    }
}
