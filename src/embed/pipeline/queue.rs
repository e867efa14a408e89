//! The texts that wait, and the order in which they are taken. A plain data structure: no threads,
//! no clock.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::oneshot;

use super::admission::Permit;
use super::{Class, Embedded, Error};
use crate::domain::UserId;
use crate::turns::Turns;

/// Batches of posts that are taken in a row while a search waits. Posts go first, and searches
/// still go on.
const PATIENCE: u32 = 8;

/// Bytes of text per token. English has 4 to 5; batches of texts with fewer are divided once their
/// tokens are counted.
const BYTES_PER_TOKEN: usize = 4;

/// A caller waiting for a vector.
pub(super) struct Waiter {
    pub(super) permit: Permit,
    pub(super) reply: oneshot::Sender<Result<Embedded, Error>>,
}

/// One text of one user, and all callers that wait for its vector.
pub(super) struct EmbedJob {
    pub(super) user: UserId,
    pub(super) text: Arc<str>,
    /// Each with its number.
    pub(super) waiters: Vec<(u64, Waiter)>,
    class: Class,
    running: bool,
}

/// Identifies a caller that waits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct WaiterId {
    job: u64,
    waiter: u64,
    /// Whether the same text of the same user was waiting or running already.
    pub(super) joined: bool,
}

/// Texts taken to be embedded together, by the number of their job.
pub(super) type TextBatch = Vec<(u64, Arc<str>)>;

/// Short and long texts of one class. If both wait, they take turns: a long text delays a short one
/// by one batch at most, and short ones do not keep a long one waiting for ever.
#[derive(Default)]
struct Lanes {
    short: Lane,
    long: Lane,
    long_is_next: bool,
}

/// Jobs of many users, who take turns.
struct Lane {
    /// The jobs' numbers and estimated tokens.
    jobs: Turns<UserId, (u64, usize)>,
    /// Estimated tokens of all jobs.
    tokens: usize,
}

/// Jobs that wait and jobs that run.
pub(super) struct TextQueue {
    batch_tokens: usize,
    workers: usize,
    numbers: u64,
    jobs: HashMap<u64, EmbedJob>,
    /// Finds the job of a text. The user is part of the key, because users never share a
    /// computation.
    by_text: HashMap<(UserId, Arc<str>), u64>,
    posts: Lanes,
    searches: Lanes,
    /// Batches of posts taken while a search waited, since the last batch of searches.
    posts_in_a_row: u32,
    waiting: usize,
}

/// The tokens of a text as estimated from its length, with the two that frame it.
fn estimated_tokens(text: &str) -> usize {
    2 + text.len().div_ceil(BYTES_PER_TOKEN)
}

impl TextQueue {
    /// A queue for that many workers, in batches of about `batch_tokens` tokens. A longer text is a
    /// batch by itself.
    pub(super) fn new(batch_tokens: usize, workers: usize) -> Self {
        Self {
            batch_tokens,
            workers: workers.max(1),
            numbers: 0,
            jobs: HashMap::new(),
            by_text: HashMap::new(),
            posts: Lanes::default(),
            searches: Lanes::default(),
            posts_in_a_row: 0,
            waiting: 0,
        }
    }

    /// Jobs that no worker has taken yet.
    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    /// Adds a caller: to the job of its user with the same text if there is one, or to a new one.
    pub(super) fn submit(&mut self, text: Arc<str>, waiter: Waiter) -> WaiterId {
        let (user, class) = (waiter.permit.user(), waiter.permit.class());
        let number = self.number();
        let known = self.by_text.get(&(user, Arc::clone(&text))).copied();
        let job = known.unwrap_or_else(|| self.number());
        if known.is_some() {
            self.join(job, number, waiter);
        } else {
            let tokens = estimated_tokens(&text);
            self.lane(class, &text).push(user, job, tokens);
            self.waiting += 1;
            self.by_text.insert((user, Arc::clone(&text)), job);
            let waiters = vec![(number, waiter)];
            let added = EmbedJob {
                user,
                text,
                waiters,
                class,
                running: false,
            };
            self.jobs.insert(job, added);
        }
        WaiterId {
            job,
            waiter: number,
            joined: known.is_some(),
        }
    }

    fn join(&mut self, number: u64, waiter_number: u64, waiter: Waiter) {
        let Some(job) = self.jobs.get_mut(&number) else {
            return;
        };
        let is_post = waiter.permit.class() == Class::Post;
        job.waiters.push((waiter_number, waiter));
        if is_post && job.class != Class::Post && !job.running {
            // A post must not wait as long as the search with the same text.
            let class = std::mem::replace(&mut job.class, Class::Post);
            let (user, text) = (job.user, Arc::clone(&job.text));
            let tokens = estimated_tokens(&text);
            self.lane(class, &text).remove(number);
            self.lane(Class::Post, &text).push(user, number, tokens);
        }
    }

    /// Removes a caller. Returns true if that cancelled its job, because no other caller waits for
    /// it. A running job goes on, and keeps its permits until it is done.
    pub(super) fn leave(&mut self, waiter: WaiterId) -> bool {
        let Some(job) = self.jobs.get_mut(&waiter.job).filter(|job| !job.running) else {
            return false;
        };
        job.waiters.retain(|(number, _)| *number != waiter.waiter);
        if !job.waiters.is_empty() {
            return false;
        }
        let Some(job) = self.finish(waiter.job) else {
            return false;
        };
        self.lane(job.class, &job.text).remove(waiter.job);
        self.waiting -= 1;
        true
    }

    /// Takes what one worker does next: one long text, or short ones of one class within the token
    /// budget. Of the short ones it takes this worker's share at most, so that the others have work
    /// too.
    pub(super) fn take(&mut self) -> Option<TextBatch> {
        let class = self.next_class()?;
        let (batch_tokens, workers) = (self.batch_tokens, self.workers);
        let numbers = self.lanes(class).take(batch_tokens, workers);
        self.waiting -= numbers.len();
        let batch = numbers.into_iter().filter_map(|number| {
            let job = self.jobs.get_mut(&number)?;
            job.running = true;
            Some((number, Arc::clone(&job.text)))
        });
        Some(batch.collect())
    }

    fn next_class(&mut self) -> Option<Class> {
        match (self.posts.is_empty(), self.searches.is_empty()) {
            (true, true) => None,
            (false, false) if self.posts_in_a_row < PATIENCE => {
                self.posts_in_a_row += 1;
                Some(Class::Post)
            }
            (false, true) => {
                self.posts_in_a_row = 0;
                Some(Class::Post)
            }
            (_, false) => {
                self.posts_in_a_row = 0;
                Some(Class::Search)
            }
        }
    }

    /// Ends a job. The next caller with its text starts another.
    pub(super) fn finish(&mut self, number: u64) -> Option<EmbedJob> {
        let job = self.jobs.remove(&number)?;
        self.by_text.remove(&(job.user, Arc::clone(&job.text)));
        Some(job)
    }

    /// Removes all jobs that are not running.
    pub(super) fn clear(&mut self) -> Vec<EmbedJob> {
        let jobs = self.jobs.iter();
        let waiting = jobs
            .filter(|(_, job)| !job.running)
            .map(|(&number, _)| number);
        let waiting: Vec<u64> = waiting.collect();
        self.posts = Lanes::default();
        self.searches = Lanes::default();
        self.waiting = 0;
        let finished = waiting.into_iter().filter_map(|number| self.finish(number));
        finished.collect()
    }

    fn lanes(&mut self, class: Class) -> &mut Lanes {
        match class {
            Class::Post => &mut self.posts,
            Class::Search | Class::Bulk => &mut self.searches,
        }
    }

    fn lane(&mut self, class: Class, text: &str) -> &mut Lane {
        let is_short = estimated_tokens(text) <= self.batch_tokens;
        let lanes = self.lanes(class);
        match is_short {
            true => &mut lanes.short,
            false => &mut lanes.long,
        }
    }

    fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }
}

impl Lanes {
    fn is_empty(&self) -> bool {
        self.short.jobs.is_empty() && self.long.jobs.is_empty()
    }

    fn take(&mut self, batch_tokens: usize, workers: usize) -> Vec<u64> {
        let take_long =
            self.short.jobs.is_empty() || self.long_is_next && !self.long.jobs.is_empty();
        self.long_is_next = !take_long;
        // The first is taken whatever its size, the other short ones if they fit.
        let (mut room, lane) = match take_long {
            true => (0, &mut self.long),
            false => {
                let share = self.short.tokens.div_ceil(workers).min(batch_tokens);
                (share, &mut self.short)
            }
        };
        let (mut taken, mut limit) = (Vec::new(), usize::MAX);
        while let Some((number, tokens)) = lane.pop(limit) {
            taken.push(number);
            room = room.saturating_sub(tokens);
            limit = room;
        }
        taken
    }
}

impl Default for Lane {
    fn default() -> Self {
        Self {
            // The pipeline admits texts up to a bound, so this needs none.
            jobs: Turns::new(usize::MAX),
            tokens: 0,
        }
    }
}

impl Lane {
    fn push(&mut self, user: UserId, job: u64, tokens: usize) {
        let refused = self.jobs.push(user, (job, tokens));
        debug_assert!(refused.is_none(), "the queue has no bound");
        self.tokens += tokens;
    }

    /// The next job, with its tokens, if it has at most `limit` of them.
    fn pop(&mut self, limit: usize) -> Option<(u64, usize)> {
        let (job, tokens) = self.jobs.pop_if(|(_, tokens)| *tokens <= limit)?;
        self.tokens -= tokens;
        Some((job, tokens))
    }

    fn remove(&mut self, job: u64) {
        self.jobs.retain(|(number, tokens)| {
            let is_other = *number != job;
            if !is_other {
                self.tokens -= tokens;
            }
            is_other
        });
    }
}
