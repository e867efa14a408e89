//! What waits, and in which order it is taken. A plain data structure: no threads, no clock.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use tokio::sync::oneshot;

use super::admission::Permit;
use super::{Class, Error};
use crate::domain::{Embedding, UserId};

/// Batches of posts in a row that a waiting search lets pass, so that posts go first and searches still go on.
const PATIENCE: u32 = 8;

/// Bytes of text a token stands for. English has 4 to 5; texts with fewer are packed anew once their tokens are counted.
const BYTES_PER_TOKEN: usize = 4;

/// A caller waiting for a vector.
pub(super) struct Waiter {
    pub(super) permit: Permit,
    pub(super) reply: oneshot::Sender<Result<Embedding, Error>>,
}

/// One text of one user and all who wait for its vector.
pub(super) struct Job {
    pub(super) user: UserId,
    pub(super) text: Arc<str>,
    /// By the number that `submit` gave.
    pub(super) waiters: Vec<(u64, Waiter)>,
    class: Class,
    running: bool,
}

/// Where a caller waits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Place {
    job: u64,
    waiter: u64,
    /// Whether the text was waiting or running for the same user already.
    pub(super) joined: bool,
}

/// Texts taken to be embedded together, by the number of their job.
pub(super) type Batch = Vec<(u64, Arc<str>)>;

/// Short and long texts of one class. Both kinds waiting, they take turns: a long text never holds up a short one for more
/// than one batch, nor do short ones keep a long one waiting for ever.
#[derive(Default)]
struct Lanes {
    short: Lane,
    long: Lane,
    long_is_next: bool,
}

/// Jobs of many users, taken one user after the other.
#[derive(Default)]
struct Lane {
    /// Users with something in `jobs`, the next one first.
    turns: VecDeque<UserId>,
    jobs: HashMap<UserId, VecDeque<(u64, usize)>>,
    /// Estimated tokens of all.
    tokens: usize,
}

/// Jobs that wait and jobs that run.
pub(super) struct Queue {
    batch_tokens: usize,
    workers: usize,
    numbers: u64,
    jobs: HashMap<u64, Job>,
    /// Finds the job of a text. The user is part of the key: work is never shared across users.
    by_text: HashMap<(UserId, Arc<str>), u64>,
    posts: Lanes,
    searches: Lanes,
    /// Batches of posts taken while a search waited, since the last batch of searches.
    posts_in_a_row: u32,
    waiting: usize,
}

/// Tokens of a text, guessed from its length, with the two that frame it.
fn estimated_tokens(text: &str) -> usize {
    2 + text.len().div_ceil(BYTES_PER_TOKEN)
}

impl Queue {
    /// A queue for that many workers, whose batches hold about `batch_tokens` tokens; a text longer than that goes alone.
    pub(super) fn new(batch_tokens: usize, workers: usize) -> Queue {
        Queue {
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

    /// Jobs that nobody has taken yet.
    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    /// Adds a caller: to the job of its user with the same text if there is one, or to a new one.
    pub(super) fn submit(&mut self, text: Arc<str>, waiter: Waiter) -> Place {
        let (user, class) = (waiter.permit.user(), waiter.permit.class());
        let number = self.number();
        let key = (user, text);
        if let Some(&job) = self.by_text.get(&key) {
            self.join(job, number, waiter);
            return Place {
                job,
                waiter: number,
                joined: true,
            };
        }
        let job = self.number();
        let text = Arc::clone(&key.1);
        self.lane(class, &text)
            .push(user, job, estimated_tokens(&text));
        self.waiting += 1;
        self.by_text.insert(key, job);
        let waiters = vec![(number, waiter)];
        self.jobs.insert(
            job,
            Job {
                user,
                text,
                waiters,
                class,
                running: false,
            },
        );
        Place {
            job,
            waiter: number,
            joined: false,
        }
    }

    fn join(&mut self, number: u64, waiter_number: u64, waiter: Waiter) {
        let Some(job) = self.jobs.get_mut(&number) else {
            return;
        };
        let is_post = waiter.permit.class() == Class::Post;
        job.waiters.push((waiter_number, waiter));
        if is_post && job.class == Class::Search && !job.running {
            // A post does not wait as long as the search it shares the work with.
            job.class = Class::Post;
            let (user, text) = (job.user, Arc::clone(&job.text));
            let tokens = estimated_tokens(&text);
            self.lane(Class::Search, &text).remove(user, number, tokens);
            self.lane(Class::Post, &text).push(user, number, tokens);
        }
    }

    /// Takes a caller's name off. True if its job was waiting for nobody else: it is gone then. A running job is not
    /// disturbed, and its permits stay out until it is done.
    pub(super) fn leave(&mut self, place: Place) -> bool {
        let Some(job) = self.jobs.get_mut(&place.job).filter(|job| !job.running) else {
            return false;
        };
        job.waiters.retain(|(number, _)| *number != place.waiter);
        if !job.waiters.is_empty() {
            return false;
        }
        let Some(job) = self.finish(place.job) else {
            return false;
        };
        let tokens = estimated_tokens(&job.text);
        self.lane(job.class, &job.text)
            .remove(job.user, place.job, tokens);
        self.waiting -= 1;
        true
    }

    /// Takes what one worker should do next: one long text, or short ones of one class within the token budget, and of
    /// those no more than this worker's share, so that the others find work too.
    pub(super) fn take(&mut self) -> Option<Batch> {
        let class = self.next_class()?;
        let lanes = match class {
            Class::Post => &mut self.posts,
            Class::Search => &mut self.searches,
        };
        let numbers = lanes.take(self.batch_tokens, self.workers);
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

    /// Ends a job; whoever asks for its text from now on starts another.
    pub(super) fn finish(&mut self, number: u64) -> Option<Job> {
        let job = self.jobs.remove(&number)?;
        self.by_text.remove(&(job.user, Arc::clone(&job.text)));
        Some(job)
    }

    /// Empties the queue of all that is not running.
    pub(super) fn clear(&mut self) -> Vec<Job> {
        let waiting: Vec<u64> = self
            .jobs
            .iter()
            .filter(|(_, job)| !job.running)
            .map(|(&number, _)| number)
            .collect();
        self.posts = Lanes::default();
        self.searches = Lanes::default();
        self.waiting = 0;
        waiting
            .into_iter()
            .filter_map(|number| self.finish(number))
            .collect()
    }

    fn lane(&mut self, class: Class, text: &str) -> &mut Lane {
        let lanes = match class {
            Class::Post => &mut self.posts,
            Class::Search => &mut self.searches,
        };
        if estimated_tokens(text) <= self.batch_tokens {
            &mut lanes.short
        } else {
            &mut lanes.long
        }
    }

    fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }
}

impl Lanes {
    fn is_empty(&self) -> bool {
        self.short.turns.is_empty() && self.long.turns.is_empty()
    }

    fn take(&mut self, batch_tokens: usize, workers: usize) -> Vec<u64> {
        let take_long =
            self.short.turns.is_empty() || self.long_is_next && !self.long.turns.is_empty();
        self.long_is_next = !take_long;
        if take_long {
            return self
                .long
                .pop(usize::MAX)
                .into_iter()
                .map(|(number, _)| number)
                .collect();
        }
        let share = self.short.tokens.div_ceil(workers).min(batch_tokens);
        let mut taken = Vec::new();
        let mut tokens = 0;
        // The first is taken whatever its size, the others if they fit.
        while let Some((number, more)) = self.short.pop(if taken.is_empty() {
            usize::MAX
        } else {
            share.saturating_sub(tokens)
        }) {
            taken.push(number);
            tokens += more;
        }
        taken
    }
}

impl Lane {
    fn push(&mut self, user: UserId, job: u64, tokens: usize) {
        let own = self.jobs.entry(user).or_default();
        if own.is_empty() {
            self.turns.push_back(user);
        }
        own.push_back((job, tokens));
        self.tokens += tokens;
    }

    /// The next job, with its tokens, if it has at most `limit` of them. Its user goes to the end of the line.
    fn pop(&mut self, limit: usize) -> Option<(u64, usize)> {
        let &user = self.turns.front()?;
        let own = self.jobs.get_mut(&user)?;
        let (job, tokens) = own.pop_front_if(|(_, tokens)| *tokens <= limit)?;
        self.tokens -= tokens;
        self.turns.pop_front();
        if own.is_empty() {
            self.jobs.remove(&user);
        } else {
            self.turns.push_back(user);
        }
        Some((job, tokens))
    }

    fn remove(&mut self, user: UserId, job: u64, tokens: usize) {
        let Some(own) = self.jobs.get_mut(&user) else {
            return;
        };
        if let Some(at) = own.iter().position(|&(number, _)| number == job) {
            own.remove(at);
            self.tokens -= tokens;
        }
        if own.is_empty() {
            self.jobs.remove(&user);
            self.turns.retain(|&other| other != user);
        }
    }
}
