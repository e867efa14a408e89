//! The threads that hash passwords.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use tokio::sync::oneshot;

use crate::credentials::passwords::{self, MalformedHash, SALT_BYTES, Verified, Workspace};
use crate::domain::{ClientNetwork, ClientSite};
use crate::threads::lower_priority;
use crate::turns::Turns;

/// How long an idle thread keeps its 19 MiB: long enough for a busy second's pauses, short enough
/// that a quiet service is small.
const KEEP_WORKSPACE: Duration = Duration::from_secs(1);

/// Why a password was not hashed or compared.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The queue is full; nothing was done, and the same call may work later.
    #[error("too many passwords are being hashed")]
    Overloaded,
    /// The pool has been stopped.
    #[error("the password threads have been stopped")]
    Stopped,
    /// The stored hash cannot be compared with anything.
    #[error(transparent)]
    MalformedHash(#[from] MalformedHash),
    /// The system gave no random bytes for a salt.
    #[error("no random bytes for a salt")]
    Randomness(#[source] getrandom::Error),
}

/// Threads of lowered priority with a bounded queue, in which the sites that clients come from take
/// turns: a burst from some addresses keeps nobody else waiting, and if it fills the queue, its own
/// calls are refused. A call that is dropped before its turn costs nothing more.
///
/// Dropping the pool stops it.
#[derive(Debug)]
pub struct HashPool {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    /// Notified when a job arrives or the pool stops.
    changed: Condvar,
    /// Bytes that idle and busy threads hold for Argon2.
    workspace_bytes: Arc<AtomicUsize>,
}

#[derive(Debug)]
struct Queue {
    jobs: Turns<ClientSite, Job>,
    stopped: bool,
}

enum Job {
    Hash {
        password: String,
        salt: [u8; SALT_BYTES],
        reply: oneshot::Sender<Result<String, Error>>,
    },
    Verify {
        password: String,
        stored: Option<String>,
        reply: oneshot::Sender<Result<Verified, Error>>,
    },
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Job(hidden)")
    }
}

impl HashPool {
    /// Starts the threads, at least one; one a core is best. `queue`: how many calls may wait for a
    /// thread.
    ///
    /// # Errors
    /// The system starts no more threads.
    pub fn start(threads: usize, queue: usize) -> io::Result<Self> {
        let pool = Self::without_threads(queue);
        for i in 0..threads.max(1) {
            let shared = Arc::clone(&pool.shared);
            let thread = thread::Builder::new()
                .name(format!("password-{i}"))
                .spawn(move || {
                    // Logins must not slow prompts down.
                    lower_priority();
                    shared.work();
                })?;
            pool.threads.lock().push(thread);
        }
        Ok(pool)
    }

    fn without_threads(queue: usize) -> Self {
        Self {
            shared: Arc::new(Shared {
                queue: Mutex::new(Queue {
                    jobs: Turns::new(queue),
                    stopped: false,
                }),
                changed: Condvar::new(),
                workspace_bytes: Arc::default(),
            }),
            threads: Mutex::default(),
        }
    }

    /// Hashes a new password of `client` with a fresh salt. Returns the Argon2id PHC string to be
    /// stored.
    pub async fn hash(&self, password: String, client: ClientNetwork) -> Result<String, Error> {
        let mut salt = [0; SALT_BYTES];
        getrandom::fill(&mut salt).map_err(Error::Randomness)?;
        let (reply, outcome) = oneshot::channel();
        let job = Job::Hash {
            password,
            salt,
            reply,
        };
        self.shared.submit(client.site(), job)?;
        outcome.await.unwrap_or(Err(Error::Stopped))
    }

    /// Compares a password that `client` gave with a stored hash, Argon2id or Django's PBKDF2. Pass
    /// `None` if there is no such account: the password is then wrong, and this takes as long as
    /// for an Argon2id account.
    pub async fn verify(
        &self,
        password: String,
        stored: Option<String>,
        client: ClientNetwork,
    ) -> Result<Verified, Error> {
        let (reply, outcome) = oneshot::channel();
        let job = Job::Verify {
            password,
            stored,
            reply,
        };
        self.shared.submit(client.site(), job)?;
        outcome.await.unwrap_or(Err(Error::Stopped))
    }

    /// Calls that wait for a thread at the moment.
    pub fn queue_depth(&self) -> usize {
        self.shared.queue.lock().jobs.len()
    }

    /// Bytes that the threads hold for Argon2 at the moment; nothing once they have been idle for a
    /// second.
    pub fn workspace_bytes(&self) -> usize {
        self.shared.workspace_bytes.load(Ordering::Relaxed)
    }

    /// Refuses new calls, lets those that wait fail with [`Error::Stopped`], and returns once those
    /// being worked on are done: blocks for the time of one hash. Harmless to repeat.
    pub fn stop(&self) {
        let waiting = {
            let mut queue = self.shared.queue.lock();
            queue.stopped = true;
            std::mem::replace(&mut queue.jobs, Turns::new(0))
        };
        drop(waiting);
        self.shared.changed.notify_all();
        for thread in std::mem::take(&mut *self.threads.lock()) {
            // A thread that panicked has nothing left to wait for.
            drop(thread.join());
        }
    }
}

impl Drop for HashPool {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn submit(&self, site: ClientSite, job: Job) -> Result<(), Error> {
        let refused = {
            let mut queue = self.queue.lock();
            if queue.stopped {
                return Err(Error::Stopped);
            }
            if queue.jobs.is_full() {
                // Callers that have left must not keep others out.
                queue.jobs.retain(|job| !job.is_abandoned());
            }
            queue.jobs.push(site, job)
        };
        if let Some(refused) = refused {
            refused.refuse();
        }
        self.changed.notify_one();
        Ok(())
    }

    fn work(&self) {
        let mut workspace = Workspace::counted_in(&self.workspace_bytes);
        while let Some(job) = self.next_job(&mut workspace) {
            job.run(&mut workspace);
        }
    }

    /// Waits for a job whose caller still waits; `None` when the pool has been stopped. Gives the
    /// memory back after a while.
    fn next_job(&self, workspace: &mut Workspace) -> Option<Job> {
        let mut queue = self.queue.lock();
        loop {
            if queue.stopped {
                return None;
            }
            while let Some(job) = queue.jobs.pop() {
                if !job.is_abandoned() {
                    return Some(job);
                }
            }
            if workspace.is_empty() {
                self.changed.wait(&mut queue);
                continue;
            }
            let waited = self.changed.wait_for(&mut queue, KEEP_WORKSPACE);
            if waited.timed_out() && queue.jobs.is_empty() {
                drop(queue);
                workspace.free();
                queue = self.queue.lock();
            }
        }
    }
}

impl Job {
    /// Whether nobody waits for the outcome any more.
    fn is_abandoned(&self) -> bool {
        match self {
            Self::Hash { reply, .. } => reply.is_closed(),
            Self::Verify { reply, .. } => reply.is_closed(),
        }
    }

    /// Fails the call: there is no room for it.
    fn refuse(self) {
        match self {
            Self::Hash { reply, .. } => drop(reply.send(Err(Error::Overloaded))),
            Self::Verify { reply, .. } => drop(reply.send(Err(Error::Overloaded))),
        }
    }

    fn run(self, workspace: &mut Workspace) {
        // The caller may leave while this runs; nobody takes the outcome then.
        match self {
            Self::Hash {
                password,
                salt,
                reply,
            } => drop(reply.send(Ok(passwords::hash(&password, salt, workspace)))),
            Self::Verify {
                password,
                stored,
                reply,
            } => {
                let verified = passwords::verify(&password, stored.as_deref(), workspace);
                drop(reply.send(verified.map_err(Error::from)));
            }
        }
    }
}

#[cfg(test)]
mod tests;
