//! Threads beside the async runtime: groups that are joined together, the queues that they take
//! their jobs from, and their priority.

use std::io;
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

use parking_lot::{MappedMutexGuard, Mutex, MutexGuard};

/// How much nicer background threads are than the rest of the process. At 10 a thread gets about a
/// tenth of a core that another thread needs, and all of a core that is idle.
const NICENESS: i32 = 10;

/// Lowers the priority of the calling thread, for good.
pub fn lower_priority() {
    // A system that refuses runs the thread at normal priority. On Linux the call concerns the
    // calling thread; elsewhere it would slow the whole process.
    #[cfg(target_os = "linux")]
    let _ = rustix::process::nice(NICENESS);
}

/// Threads that are joined together. Dropping the group leaves them to themselves.
#[derive(Debug, Default)]
pub struct ThreadGroup(Mutex<Vec<JoinHandle<()>>>);

impl ThreadGroup {
    /// Starts a thread.
    ///
    /// # Errors
    /// The system has no threads left.
    pub fn spawn(&self, name: String, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let thread = thread::Builder::new().name(name).spawn(work)?;
        self.0.lock().push(thread);
        Ok(())
    }

    /// Waits until all threads have ended. Blocks. Calling it again does nothing.
    pub fn join(&self) {
        join_all(std::mem::take(&mut *self.0.lock()));
    }

    /// Does the same off the async threads. Needs a Tokio runtime.
    pub async fn joined(&self) {
        let threads = std::mem::take(&mut *self.0.lock());
        // Only a runtime that is shutting down cancels the wait.
        let _ = tokio::task::spawn_blocking(|| join_all(threads)).await;
    }
}

fn join_all(threads: Vec<JoinHandle<()>>) {
    for thread in threads {
        // A thread that panicked has ended too.
        let _ = thread.join();
    }
}

/// A queue of the kind `Q`, from which threads take their jobs until it is closed.
///
/// Of the threads that wait, the one that worked last is woken first, because its caches are warm.
/// A condition variable would wake all threads in turn.
#[derive(Debug)]
pub struct JobQueue<Q>(Mutex<QueueState<Q>>);

#[derive(Debug)]
struct QueueState<Q> {
    jobs: Q,
    /// Threads that wait for a job, the one that worked last at the end.
    idle: Vec<Thread>,
    is_closed: bool,
}

/// The queue takes no more jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueClosed;

/// What a thread does next.
#[derive(Debug, PartialEq, Eq)]
pub enum Next<T> {
    /// Work off this job.
    Job(T),
    /// Free what it keeps for its work: no job came in time.
    Idle,
    /// End.
    End,
}

impl<Q> JobQueue<Q> {
    /// A queue with these jobs.
    pub fn new(jobs: Q) -> Self {
        Self(Mutex::new(QueueState {
            jobs,
            idle: Vec::new(),
            is_closed: false,
        }))
    }

    /// The jobs that wait. While this guard lives, no job is added or taken.
    pub fn jobs(&self) -> MappedMutexGuard<'_, Q> {
        MutexGuard::map(self.0.lock(), |state| &mut state.jobs)
    }

    /// Changes the queue by `add`, and wakes a thread.
    ///
    /// # Errors
    /// The queue is closed; `add` was not called.
    pub fn add<R>(&self, add: impl FnOnce(&mut Q) -> R) -> Result<R, QueueClosed> {
        let mut state = self.0.lock();
        if state.is_closed {
            return Err(QueueClosed);
        }
        let added = add(&mut state.jobs);
        let idle = state.idle.pop();
        drop(state);
        if let Some(thread) = idle {
            thread.unpark();
        }
        Ok(added)
    }

    /// Waits until `take` finds a job, for `patience` at most if that is given. Jobs that are left
    /// in a closed queue are still taken.
    pub fn next<T>(
        &self,
        patience: Option<Duration>,
        mut take: impl FnMut(&mut Q) -> Option<T>,
    ) -> Next<T> {
        let this = thread::current();
        let deadline = patience.map(|patience| Instant::now() + patience);
        loop {
            let mut state = self.0.lock();
            // It is still listed after a timeout and after a spurious wake-up.
            state.idle.retain(|idle| idle.id() != this.id());
            if let Some(job) = take(&mut state.jobs) {
                return Next::Job(job);
            }
            if state.is_closed {
                return Next::End;
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Next::Idle;
            }
            state.idle.push(this.clone());
            drop(state);
            match left {
                Some(left) => thread::park_timeout(left),
                None => thread::park(),
            }
        }
    }

    /// Takes no more jobs from now on. The threads end when they have worked off what `last` leaves
    /// in the queue. Returns what `last` returns.
    pub fn close<R>(&self, last: impl FnOnce(&mut Q) -> R) -> R {
        let mut state = self.0.lock();
        state.is_closed = true;
        for thread in state.idle.drain(..) {
            thread.unpark();
        }
        last(&mut state.jobs)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn closed_queue_is_worked_off_before_the_threads_end() {
        let queue = Arc::new(JobQueue::new(VecDeque::new()));
        let (threads, sum) = (ThreadGroup::default(), Arc::new(AtomicU32::new(0)));
        for n in 0..4 {
            let (queue, sum) = (Arc::clone(&queue), Arc::clone(&sum));
            let work = move || {
                while let Next::Job(job) = queue.next(None, VecDeque::pop_front) {
                    sum.fetch_add(job, Ordering::Relaxed);
                }
            };
            threads.spawn(format!("test-{n}"), work).unwrap();
        }
        for job in 1..=1000 {
            queue.add(|jobs| jobs.push_back(job)).unwrap();
        }
        queue.close(|_| ());
        assert_eq!(queue.add(|jobs| jobs.push_back(1)), Err(QueueClosed));
        threads.join();
        threads.join();
        assert_eq!(sum.load(Ordering::Relaxed), 500_500);
    }

    #[test]
    fn thread_without_a_job_is_idle_after_its_patience() {
        let queue = JobQueue::new(VecDeque::from([7]));
        let patience = Some(Duration::from_millis(1));
        assert_eq!(queue.next(patience, VecDeque::pop_front), Next::Job(7));
        assert_eq!(queue.next(patience, VecDeque::pop_front), Next::Idle);
        assert_eq!(queue.close(|jobs| jobs.len()), 0);
        assert_eq!(queue.next(patience, VecDeque::pop_front), Next::End);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn only_the_thread_that_asks_becomes_nicer() {
        let nice = || rustix::process::getpriority_process(None).unwrap();
        let before = nice();
        let (lowered, beside) = thread::scope(|scope| {
            let lowered = scope.spawn(|| {
                lower_priority();
                nice()
            });
            (lowered.join().unwrap(), nice())
        });
        assert_eq!(lowered, (before + NICENESS).min(19));
        assert_eq!(beside, before);
    }
}
