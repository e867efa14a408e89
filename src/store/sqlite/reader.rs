//! The threads that read. Each has its own connection.
//!
//! They are not threads of the runtime's blocking pool. So a connection stays on the thread where
//! its statements are prepared, nothing has to be borrowed from a pool, and long reads of others
//! cannot occupy all blocking threads. It is no slower either: the bench `store` compares the two.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use rusqlite::Connection;
use tokio::sync::{Semaphore, oneshot};

use super::connection::Database;
use super::error::Closed;
use crate::store::Error;
use crate::store::rows::Defect;
use crate::threads::{JobQueue, Next, ThreadGroup};

/// Reads that may wait in the queue; further callers wait for room in it.
const QUEUE: usize = 1024;

/// A read and its caller. Returns whether the connection may be used again.
type ReadJob = Box<dyn FnOnce(rusqlite::Result<&Connection>) -> bool + Send>;

/// The queue of the reading threads. Dropping it ends them once the queue is empty.
pub(super) struct Readers {
    queue: Arc<JobQueue<VecDeque<ReadJob>>>,
    places: Semaphore,
    threads: ThreadGroup,
}

impl Readers {
    /// Starts a thread for each of the given connections.
    pub fn start(database: &Database, connections: Vec<Connection>) -> std::io::Result<Self> {
        let readers = Self {
            queue: Arc::new(JobQueue::new(VecDeque::new())),
            places: Semaphore::new(QUEUE),
            threads: ThreadGroup::default(),
        };
        for connection in connections {
            let (queue, database) = (Arc::clone(&readers.queue), database.clone());
            let work = move || serve(&queue, &database, connection);
            readers.threads.spawn("store-reader".to_owned(), work)?;
        }
        Ok(readers)
    }

    /// Runs `work` on a reading connection. A `work` of more than one statement must begin a
    /// transaction itself.
    pub async fn read<T, F>(&self, work: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<T, Error> + Send + 'static,
    {
        let _place = self.places.acquire().await.map_err(|_| Closed)?;
        let (reply, answer) = oneshot::channel();
        let job: ReadJob = Box::new(move |connection| {
            let result = match connection {
                Ok(connection) => catch_unwind(AssertUnwindSafe(|| work(connection)))
                    .unwrap_or_else(|_| Err(Defect::Panicked.into())),
                Err(error) => Err(error.into()),
            };
            let keep = result.is_ok();
            // The caller may have left.
            let _ = reply.send(result);
            keep
        });
        self.queue
            .add(|jobs| jobs.push_back(job))
            .map_err(|_| Closed)?;
        answer.await.unwrap_or_else(|_| Err(Closed.into()))
    }

    /// Accepts no more reads, and returns when those in the queue are done and the threads have
    /// ended.
    pub async fn close(&self) {
        self.queue.close(|_| ());
        self.threads.joined().await;
    }

    /// Reads in the queue at the moment.
    pub fn queued(&self) -> usize {
        self.queue.jobs().len()
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.queue.close(|_| ());
    }
}

fn serve(queue: &JobQueue<VecDeque<ReadJob>>, database: &Database, connection: Connection) {
    let mut connection = Some(connection);
    while let Next::Job(job) = queue.next(None, VecDeque::pop_front) {
        let opened = match connection.take() {
            Some(connection) => Ok(connection),
            None => database.reader(),
        };
        match opened {
            // After any failure a new connection is opened, because this one may be in any state.
            Ok(open) => connection = job(Ok(&open)).then_some(open),
            Err(error) => {
                job(Err(error));
            }
        }
    }
}
