//! The threads that read, each with a connection of its own.
//!
//! Threads of our own rather than the runtime's blocking pool: a connection then stays where its statements are prepared,
//! nothing has to be borrowed from a pool, and long reads of others cannot take all the blocking threads. It is no slower
//! either: the bench `store` compares the two.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle, Thread};

use parking_lot::Mutex;
use rusqlite::Connection;
use tokio::sync::{Semaphore, oneshot};

use super::connection::Database;
use super::error::{Closed, Defect, Failure};
use crate::store::Error;

/// Reads that may wait for a thread; further callers wait for a place.
const QUEUE: usize = 1024;

/// A read and its caller. Answers whether the connection may be used again.
type Job = Box<dyn FnOnce(rusqlite::Result<&Connection>) -> bool + Send>;

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    /// Threads that wait for a job, the one that worked last on top. It is woken first: its caches are warm, where a
    /// condition variable would go round all threads in turn.
    idle: Vec<Thread>,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
}

impl Shared {
    /// The next job, or `None` when the queue is closed and empty.
    fn next(&self) -> Option<Job> {
        let this = thread::current();
        loop {
            let mut queue = self.queue.lock();
            // Still there after a wake-up that no one meant.
            queue.idle.retain(|idle| idle.id() != this.id());
            if let Some(job) = queue.jobs.pop_front() {
                return Some(job);
            }
            if queue.closed {
                return None;
            }
            queue.idle.push(this.clone());
            drop(queue);
            thread::park();
        }
    }
}

/// The queue before the reading threads. Dropping it ends them once the queue is empty.
pub(super) struct Readers {
    shared: Arc<Shared>,
    places: Semaphore,
}

impl Readers {
    /// Starts a thread for each of the given connections.
    pub fn start(
        database: &Database,
        connections: Vec<Connection>,
    ) -> std::io::Result<(Self, Vec<JoinHandle<()>>)> {
        let readers = Self {
            shared: Arc::default(),
            places: Semaphore::new(QUEUE),
        };
        let threads = connections
            .into_iter()
            .map(|connection| {
                let shared = Arc::clone(&readers.shared);
                let database = database.clone();
                thread::Builder::new()
                    .name("store-reader".to_owned())
                    .spawn(move || work_off(&shared, &database, connection))
            })
            .collect::<std::io::Result<_>>()?;
        Ok((readers, threads))
    }

    /// Runs `work` on a reading connection. A `work` of more than one statement must begin a transaction itself.
    pub async fn read<T, F>(&self, work: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<T, Failure> + Send + 'static,
    {
        let _place = self.places.acquire().await.map_err(|_| Closed)?;
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move |connection| {
            let result = match connection {
                Ok(connection) => catch_unwind(AssertUnwindSafe(|| work(connection)))
                    .unwrap_or_else(|_| Err(Defect::Panicked.into())),
                Err(error) => Err(error.into()),
            };
            let keep = result.is_ok();
            // Without a receiver the caller is gone.
            let _ = reply.send(result.map_err(Error::from));
            keep
        });
        let idle = {
            let mut queue = self.shared.queue.lock();
            if queue.closed {
                return Err(Closed.into());
            }
            queue.jobs.push_back(job);
            queue.idle.pop()
        };
        if let Some(thread) = idle {
            thread.unpark();
        }
        answer.await.unwrap_or_else(|_| Err(Closed.into()))
    }

    /// Takes no more reads; those queued are still answered. Then the threads end.
    pub fn close(&self) {
        let mut queue = self.shared.queue.lock();
        queue.closed = true;
        for thread in queue.idle.drain(..) {
            thread.unpark();
        }
    }

    /// Reads in the queue just now.
    pub fn queued(&self) -> usize {
        self.shared.queue.lock().jobs.len()
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.close();
    }
}

fn work_off(shared: &Shared, database: &Database, connection: Connection) {
    let mut connection = Some(connection);
    while let Some(job) = shared.next() {
        let opened = match connection.take() {
            Some(connection) => Ok(connection),
            None => database.reader(),
        };
        match opened {
            // After any failure another connection is opened, whatever the failure left in this one.
            Ok(open) => connection = job(Ok(&open)).then_some(open),
            Err(error) => {
                job(Err(error));
            }
        }
    }
}
