//! Random callers that submit, wait and leave, and the invariants that hold whatever they do.

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Waker};

use proptest::prelude::*;

use super::*;

const BATCH_TOKENS: usize = 32;

fn vector(text: &str) -> Embedding {
    Embedding(text.bytes().map(f32::from).collect())
}

/// Gives one id per byte, and checks each batch.
struct Checking;

impl Encode for Checking {
    type Scratch = ();

    fn scratch(&self) {}

    fn tokenize(&self, text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    fn embed(&self, batch: &[&[u32]], (): &mut ()) -> Vec<Embedding> {
        let tokens: usize = batch.iter().map(|ids| ids.len()).sum();
        assert!(batch.len() == 1 || tokens <= BATCH_TOKENS);
        batch
            .iter()
            .map(|ids| Embedding(ids.iter().map(|&id| id as f32).collect()))
            .collect()
    }
}

/// A random number generator (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) as usize % limit
    }
}

#[test]
fn callers_on_many_threads_get_their_own_vectors_and_all_permits_are_returned() {
    let settings = EmbedderSettings {
        workers: 3,
        capacity: 24,
        batch_tokens: BATCH_TOKENS,
        cache_bytes: 4096,
    };
    let embedder = Embedder::start(Arc::new(Checking), &settings, Arc::default()).unwrap();
    let answered: usize = std::thread::scope(|scope| {
        let callers: Vec<_> = (0..4)
            .map(|seed| {
                scope.spawn({
                    let embedder = &embedder;
                    move || call_at_random(embedder, Random(seed))
                })
            })
            .collect();
        callers
            .into_iter()
            .map(|caller| caller.join().unwrap())
            .sum()
    });
    assert!(answered > 100);
    assert!(embedder.shutdown(Instant::now() + Duration::from_secs(20)));
    assert_eq!((embedder.queue_depth(), embedder.admitted()), (0, 0));
}

type Asked<'a> = Pin<Box<dyn Future<Output = Result<Embedding, Error>> + 'a>>;

/// Returns how many vectors it got.
fn call_at_random(embedder: &Embedder, mut random: Random) -> usize {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    let mut context = Context::from_waker(Waker::noop());
    let mut asked: Vec<(Arc<str>, Asked<'_>)> = Vec::new();
    let mut answered = 0;
    for _ in 0..3000 {
        let class = [Class::Post, Class::Search, Class::Bulk][random.below(3)];
        match random.below(4) {
            0 | 1 => {
                let user = random.below(6);
                assert!(embedder.admitted() <= 24);
                if let Ok(permit) = embedder.admit(UserId(user as i64), class) {
                    let text: Arc<str> = format!("{user}:{}", "x".repeat(random.below(60))).into();
                    let mut future = Box::pin(embedder.embed(permit, Arc::clone(&text)));
                    match future.as_mut().poll(&mut context) {
                        std::task::Poll::Ready(result) => {
                            assert_eq!(result.unwrap(), vector(&text))
                        }
                        std::task::Poll::Pending => asked.push((text, future)),
                    }
                }
            }
            2 if !asked.is_empty() => drop(asked.swap_remove(random.below(asked.len()))),
            _ if !asked.is_empty() => {
                let (text, future) = asked.swap_remove(random.below(asked.len()));
                let in_time = async { tokio::time::timeout(Duration::from_secs(20), future).await };
                assert_eq!(runtime.block_on(in_time).unwrap().unwrap(), vector(&text));
                answered += 1;
            }
            _ => (),
        }
    }
    answered
}

#[derive(Clone, Debug)]
enum Step {
    Ask {
        user: i64,
        post: bool,
        length: usize,
    },
    Leave(usize),
    Take,
    Finish(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0_i64..5, any::<bool>(), 0_usize..200)
            .prop_map(|(user, post, length)| Step::Ask { user, post, length }),
        1 => any::<usize>().prop_map(Step::Leave),
        2 => Just(Step::Take),
        2 => any::<usize>().prop_map(Step::Finish),
    ]
}

proptest! {
    /// Compares the queue with a model: a list of callers.
    #[test]
    fn every_caller_that_stays_gets_one_vector(
        workers in 1_usize..4,
        steps in proptest::collection::vec(step(), 0..150),
    ) {
        let admission = TextAdmission::new(40, workers);
        let mut queue = TextQueue::new(BATCH_TOKENS, workers);
        // Callers that have no vector and have not left: id, user, length, class, receiver.
        let mut callers: Vec<(WaiterId, i64, usize, Class, oneshot::Receiver<_>)> = Vec::new();
        let mut running: Vec<(u64, Arc<str>)> = Vec::new();
        let finish = |queue: &mut TextQueue, job: u64| {
            for (_, waiter) in queue.finish(job).unwrap().waiters {
                let (embedding, tokens) = (vector("done"), 1);
                let _left = waiter.reply.send(Ok(Embedded { embedding, tokens }));
            }
        };
        for step in steps {
            match step {
                Step::Ask { user, post, length } => {
                    let class = if post { Class::Post } else { Class::Search };
                    let Ok(permit) = admission.admit(UserId(user), class) else { continue };
                    let (reply, receiver) = oneshot::channel();
                    let waiter = Waiter { permit, reply };
                    let waiter = queue.submit("x".repeat(length).into(), waiter);
                    callers.push((waiter, user, length, class, receiver));
                }
                Step::Leave(at) if !callers.is_empty() => {
                    let at = at % callers.len();
                    queue.leave(callers.swap_remove(at).0);
                }
                Step::Take => if let Some(batch) = queue.take() {
                    prop_assert!(!batch.is_empty());
                    prop_assert!(batch.len() == 1 || batch.iter().map(|(_, text)| 2 + text.len().div_ceil(4)).sum::<usize>() <= BATCH_TOKENS);
                    running.extend(batch);
                },
                Step::Finish(at) if !running.is_empty() => {
                    let at = at % running.len();
                    finish(&mut queue, running.swap_remove(at).0);
                    callers.retain_mut(|caller| caller.4.try_recv().is_err());
                }
                Step::Leave(_) | Step::Finish(_) => (),
            }
            // There are as many jobs as different texts of users that a caller waits for or a
            // worker has.
            let wanted: HashSet<(i64, usize)> = callers.iter().map(|caller| (caller.1, caller.2)).collect();
            prop_assert!(queue.waiting() <= wanted.len());
            prop_assert!(queue.waiting() + running.len() >= wanted.len());
            let mut held: HashMap<i64, usize> = HashMap::new();
            for caller in &callers {
                *held.entry(caller.1).or_default() += 1;
            }
            prop_assert!(held.values().all(|&own| own <= 20));
            prop_assert!(admission.in_use() >= callers.len() && admission.in_use() <= 40);
        }
        while let Some(batch) = queue.take() {
            running.extend(batch);
        }
        for (job, _) in running {
            finish(&mut queue, job);
        }
        prop_assert!(callers.iter_mut().all(|caller| caller.4.try_recv().is_ok()));
        prop_assert_eq!((queue.waiting(), admission.in_use()), (0, 0));
    }

    /// While posts wait, at most one batch in nine is of searches.
    #[test]
    fn while_posts_wait_one_batch_in_nine_is_of_searches(posts in 1_usize..60, searches in 1_usize..20) {
        let admission = TextAdmission::new(1000, 1);
        let mut queue = TextQueue::new(BATCH_TOKENS, 1);
        let long = |class: char, number: usize| format!("{class}{}{number}", "x".repeat(200));
        for number in 0..posts.max(searches) {
            for (class, letter, limit) in [(Class::Search, 's', searches), (Class::Post, 'p', posts)] {
                if number < limit {
                    let (reply, _) = oneshot::channel();
                    let permit = admission.admit(UserId(number as i64), class).unwrap();
                    queue.submit(long(letter, number).into(), Waiter { permit, reply });
                }
            }
        }
        let order: String = std::iter::from_fn(|| queue.take()).map(|batch| batch[0].1.chars().next().unwrap()).collect();
        let mut expected = String::new();
        let (mut posts, mut searches) = (posts, searches);
        while posts > 0 || searches > 0 {
            for _ in 0..posts.min(if searches > 0 { 8 } else { posts }) {
                expected.push('p');
                posts -= 1;
            }
            if searches > 0 {
                expected.push('s');
                searches -= 1;
            }
        }
        prop_assert_eq!(order, expected);
    }
}
