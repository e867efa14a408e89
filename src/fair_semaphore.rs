//! A semaphore whose waiters take turns by key, so that one user's many requests do not hold up
//! another user's one.

use std::hash::Hash;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::turns::Turns;

/// The queue is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("too many wait")]
pub struct Full;

/// A fixed number of permits. The callers that wait for one take turns by their key: one of each
/// key, then a second of each.
#[derive(Debug)]
pub struct FairSemaphore<K> {
    state: Mutex<SemaphoreState<K>>,
}

#[derive(Debug)]
struct SemaphoreState<K> {
    free: usize,
    waiting: Turns<K, oneshot::Sender<()>>,
}

/// One permit, returned when this is dropped.
#[derive(Debug)]
#[must_use = "a permit that is dropped at once permits nothing"]
pub struct FairPermit<K: Eq + Hash + Clone>(Arc<FairSemaphore<K>>);

impl<K: Eq + Hash + Clone> FairSemaphore<K> {
    /// A semaphore of `permits`. At most `queue` callers may wait for one.
    pub fn new(permits: usize, queue: usize) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(SemaphoreState {
                free: permits,
                waiting: Turns::new(queue),
            }),
        })
    }

    /// Waits for a permit. Cancel safe: a caller that leaves loses only its turn.
    ///
    /// # Errors
    /// [`Full`] if the queue is full and no other key has more of it.
    pub async fn acquire(self: &Arc<Self>, key: K) -> Result<FairPermit<K>, Full> {
        let granted = {
            let mut state = self.state.lock();
            if state.free > 0 {
                state.free -= 1;
                return Ok(FairPermit(Arc::clone(self)));
            }
            let (grant, granted) = oneshot::channel();
            // When the sender of another caller is dropped, that caller learns that there is no
            // room.
            drop(state.waiting.push(key, grant));
            granted
        };
        // The message transfers the permit, so it must be returned if the message is not received.
        let waiting = WaitingCaller {
            semaphore: self,
            granted,
        };
        waiting.permit().await
    }

    fn release(&self) {
        let mut state = self.state.lock();
        while let Some(next) = state.waiting.pop() {
            if next.send(()).is_ok() {
                return;
            }
        }
        state.free += 1;
    }
}

impl<K: Eq + Hash + Clone> Drop for FairPermit<K> {
    fn drop(&mut self) {
        self.0.release();
    }
}

/// A caller that waits. If it is dropped after its turn came and before it took the permit, the
/// permit goes to the next caller.
struct WaitingCaller<'a, K: Eq + Hash + Clone> {
    semaphore: &'a Arc<FairSemaphore<K>>,
    granted: oneshot::Receiver<()>,
}

impl<K: Eq + Hash + Clone> WaitingCaller<'_, K> {
    async fn permit(mut self) -> Result<FairPermit<K>, Full> {
        (&mut self.granted).await.map_err(|_| Full)?;
        Ok(FairPermit(Arc::clone(self.semaphore)))
    }
}

impl<K: Eq + Hash + Clone> Drop for WaitingCaller<'_, K> {
    fn drop(&mut self) {
        self.granted.close();
        if self.granted.try_recv().is_ok() {
            self.semaphore.release();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::pin::Pin;
    use std::task::Poll;

    use super::*;

    type Acquiring<'a> = Pin<Box<dyn Future<Output = Result<FairPermit<char>, Full>> + 'a>>;

    /// Starts to wait for a permit; fails if there is one at once.
    async fn wait(semaphore: &Arc<FairSemaphore<char>>, key: char) -> Acquiring<'_> {
        let mut acquiring: Acquiring<'_> = Box::pin(semaphore.acquire(key));
        assert!(is_waiting(&mut acquiring).await);
        acquiring
    }

    async fn is_waiting(acquiring: &mut Acquiring<'_>) -> bool {
        poll_fn(|context| Poll::Ready(acquiring.as_mut().poll(context).is_pending())).await
    }

    #[tokio::test]
    async fn keys_take_turns_for_free_permits() {
        let semaphore = FairSemaphore::new(1, 9);
        let first = semaphore.acquire('a').await.unwrap();
        let mut second = wait(&semaphore, 'a').await;
        let mut third = wait(&semaphore, 'a').await;
        let mut other = wait(&semaphore, 'b').await;
        drop(first);
        let second = {
            assert!(is_waiting(&mut third).await && is_waiting(&mut other).await);
            second.as_mut().await.unwrap()
        };
        drop(second);
        assert!(is_waiting(&mut third).await, "it is the other key's turn");
        drop(other.as_mut().await.unwrap());
        drop(third.as_mut().await.unwrap());
        assert_eq!(semaphore.state.lock().free, 1);
    }

    #[tokio::test]
    async fn a_caller_that_leaves_keeps_no_permit() {
        let semaphore = FairSemaphore::new(1, 9);
        let first = semaphore.acquire('a').await.unwrap();
        let left_waiting = wait(&semaphore, 'b').await;
        let left_at_its_turn = wait(&semaphore, 'c').await;
        drop(left_waiting);
        drop(first);
        assert_eq!(
            semaphore.state.lock().free,
            0,
            "it is with the one at its turn"
        );
        drop(left_at_its_turn);
        assert_eq!(semaphore.state.lock().free, 1);
    }

    #[tokio::test]
    async fn a_full_queue_refuses_the_key_that_fills_it() {
        let semaphore = FairSemaphore::new(1, 2);
        let _held = semaphore.acquire('a').await.unwrap();
        let _first = wait(&semaphore, 'a').await;
        let last = wait(&semaphore, 'a').await;
        assert_eq!(semaphore.acquire('a').await.unwrap_err(), Full);
        let _other = wait(&semaphore, 'b').await;
        assert_eq!(
            last.await.unwrap_err(),
            Full,
            "it made room for another key"
        );
    }
}
