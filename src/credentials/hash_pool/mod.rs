//! The threads that hash passwords.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::credentials::passwords::{self, MalformedHash, SALT_BYTES, Verified, Workspace};
use crate::domain::{ClientNetwork, ClientSite};
use crate::threads::{JobQueue, Next, ThreadGroup, lower_priority};
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
/// turns: a burst from some addresses does not delay calls from others, and if it fills the queue,
/// only its calls are refused. A call that is dropped before its turn is not worked on.
///
/// Dropping the pool stops it.
pub struct HashPool {
    queue: Arc<JobQueue<Turns<ClientSite, Box<dyn HashJob>>>>,
    threads: ThreadGroup,
    /// Bytes that idle and busy threads hold for Argon2.
    workspace_bytes: Arc<AtomicUsize>,
}

/// A call that waits for a thread.
trait HashJob: Send {
    /// Whether the caller has stopped waiting for the result.
    fn is_abandoned(&self) -> bool;

    /// Does the work and sends the result. Without a workspace the call fails as `Overloaded`.
    fn finish(self: Box<Self>, workspace: Option<&mut Workspace>);
}

struct HashCall<T, F> {
    work: F,
    reply: oneshot::Sender<Result<T, Error>>,
}

impl<T: Send, F> HashJob for HashCall<T, F>
where
    F: FnOnce(&mut Workspace) -> Result<T, Error> + Send,
{
    fn is_abandoned(&self) -> bool {
        self.reply.is_closed()
    }

    fn finish(self: Box<Self>, workspace: Option<&mut Workspace>) {
        let result = workspace.map_or(Err(Error::Overloaded), self.work);
        // The caller may have left meanwhile.
        let _ = self.reply.send(result);
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
            let queue = Arc::clone(&pool.queue);
            let mut workspace = Workspace::counted_in(&pool.workspace_bytes);
            pool.threads.spawn(format!("password-{i}"), move || {
                // Logins must not slow prompts down.
                lower_priority();
                loop {
                    let patience = (!workspace.is_empty()).then_some(KEEP_WORKSPACE);
                    match queue.next(patience, next_job) {
                        Next::Job(job) => job.finish(Some(&mut workspace)),
                        Next::Idle => workspace.free(),
                        Next::End => return,
                    }
                }
            })?;
        }
        Ok(pool)
    }

    fn without_threads(queue: usize) -> Self {
        Self {
            queue: Arc::new(JobQueue::new(Turns::new(queue))),
            threads: ThreadGroup::default(),
            workspace_bytes: Arc::default(),
        }
    }

    /// Hashes a new password of `client` with a fresh salt. Returns the Argon2id PHC string to be
    /// stored.
    pub async fn hash(&self, password: String, client: ClientNetwork) -> Result<String, Error> {
        let mut salt = [0; SALT_BYTES];
        getrandom::fill(&mut salt).map_err(Error::Randomness)?;
        self.run(client, move |workspace| {
            Ok(passwords::hash(&password, salt, workspace))
        })
        .await
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
        self.run(client, move |workspace| {
            Ok(passwords::verify(&password, stored.as_deref(), workspace)?)
        })
        .await
    }

    /// Calls that wait for a thread at the moment.
    pub fn queue_depth(&self) -> usize {
        self.queue.jobs().len()
    }

    /// Bytes that the threads hold for Argon2 at the moment; nothing once they have been idle for a
    /// second.
    pub fn workspace_bytes(&self) -> usize {
        self.workspace_bytes.load(Ordering::Relaxed)
    }

    /// Refuses new calls, lets those that wait fail with [`Error::Stopped`], and returns once those
    /// being worked on are done: blocks for the time of one hash. Calling it again does nothing.
    pub fn stop(&self) {
        // Dropped outside the lock: it wakes the callers.
        drop(
            self.queue
                .close(|jobs| std::mem::replace(jobs, Turns::new(0))),
        );
        self.threads.join();
    }

    async fn run<T: Send + 'static>(
        &self,
        client: ClientNetwork,
        work: impl FnOnce(&mut Workspace) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let (reply, result) = oneshot::channel();
        let call = Box::new(HashCall { work, reply });
        let refused = self.queue.add(|jobs| {
            if jobs.is_full() {
                // Callers that have left must not keep others out.
                jobs.retain(|job| !job.is_abandoned());
            }
            jobs.push(client.site(), call)
        });
        if let Some(refused) = refused.map_err(|_| Error::Stopped)? {
            refused.finish(None);
        }
        result.await.unwrap_or(Err(Error::Stopped))
    }
}

impl Drop for HashPool {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The next job whose caller still waits.
fn next_job(jobs: &mut Turns<ClientSite, Box<dyn HashJob>>) -> Option<Box<dyn HashJob>> {
    std::iter::from_fn(|| jobs.pop()).find(|job| !job.is_abandoned())
}

#[cfg(test)]
mod tests;
