use std::future::Future;
use std::pin::Pin;
use std::sync::mpsc;
use std::task::{Context, Waker};

use parking_lot::Mutex;

use super::*;

/// How long a test waits for a step. Only a defect takes so long.
const DEADLINE: Duration = Duration::from_secs(20);

/// What the encoder is to do with a batch.
enum EncoderStep {
    Embed,
    /// One vector too few.
    Shorten,
}

/// Sends each batch to the test and waits for its step. Ids are characters. A text with `!` panics.
struct Gated {
    entered: mpsc::Sender<Vec<String>>,
    steps: Mutex<mpsc::Receiver<EncoderStep>>,
}

fn vector(text: &str) -> Embedding {
    Embedding(text.chars().map(|c| u32::from(c) as f32).collect())
}

impl Encode for Gated {
    type Scratch = ();

    fn scratch(&self) {}

    fn tokenize(&self, text: &str) -> Vec<u32> {
        assert!(!text.contains('?'), "the tokenizer does not like this text");
        text.chars().map(u32::from).collect()
    }

    fn embed(&self, batch: &[&[u32]], (): &mut ()) -> Vec<Embedding> {
        let text = |ids: &&[u32]| ids.iter().copied().filter_map(char::from_u32).collect();
        let texts: Vec<String> = batch.iter().map(text).collect();
        let mut embeddings: Vec<_> = texts.iter().map(|text| vector(text)).collect();
        let spoilt = texts.iter().any(|text| text.contains('!'));
        self.entered.send(texts).unwrap();
        let step = self.steps.lock().recv_timeout(DEADLINE);
        match step.unwrap() {
            EncoderStep::Embed => assert!(!spoilt, "the model does not like this text"),
            EncoderStep::Shorten => drop(embeddings.pop()),
        }
        embeddings
    }
}

/// An embedder whose encoder waits for the test at each batch.
struct Fixture {
    embedder: Arc<Embedder>,
    metrics: Arc<Metrics>,
    entered: mpsc::Receiver<Vec<String>>,
    steps: mpsc::Sender<EncoderStep>,
    runtime: tokio::runtime::Runtime,
}

type Asked = Pin<Box<dyn Future<Output = Result<Embedding, Error>>>>;

impl Fixture {
    fn new(workers: usize) -> Fixture {
        Self::with(EmbedderSettings {
            workers,
            capacity: 64,
            batch_tokens: 64,
            cache_bytes: 1 << 16,
        })
    }

    fn with(settings: EmbedderSettings) -> Fixture {
        let (entered_sender, entered) = mpsc::channel();
        let (steps, steps_receiver) = mpsc::channel();
        let encoder = Arc::new(Gated {
            entered: entered_sender,
            steps: Mutex::new(steps_receiver),
        });
        let metrics = Arc::<Metrics>::default();
        let embedder = Embedder::start(encoder, &settings, Arc::clone(&metrics)).unwrap();
        Fixture {
            embedder: Arc::new(embedder),
            metrics,
            entered,
            steps,
            runtime: tokio::runtime::Builder::new_current_thread()
                .enable_time()
                .build()
                .unwrap(),
        }
    }

    /// Admits a text, and returns when it is in the queue.
    fn ask(&self, user: i64, class: Class, text: &str) -> Asked {
        let permit = self.embedder.admit(UserId(user), class).unwrap();
        let (embedder, text) = (Arc::clone(&self.embedder), Arc::from(text));
        let mut asked: Asked = Box::pin(async move { embedder.embed(permit, text).await });
        let mut context = Context::from_waker(Waker::noop());
        assert!(asked.as_mut().poll(&mut context).is_pending());
        asked
    }

    fn answer(&self, asked: Asked) -> Result<Embedding, Error> {
        let in_time = async { tokio::time::timeout(DEADLINE, asked).await };
        self.runtime.block_on(in_time).unwrap()
    }

    /// The next batch of a worker, which holds it until `release`.
    fn batch(&self) -> Vec<String> {
        self.entered.recv_timeout(DEADLINE).unwrap()
    }

    fn release(&self) {
        self.steps.send(EncoderStep::Embed).unwrap();
    }

    /// Occupies a worker, so that the next texts wait.
    fn occupy(&self) -> Asked {
        let asked = self.ask(1000, Class::Post, "occupied");
        assert_eq!(self.batch(), ["occupied"]);
        asked
    }

    /// Releases batches one by one. Returns the texts of each.
    fn batches(&self, number: usize) -> Vec<Vec<String>> {
        let next = |_| {
            self.release();
            self.batch()
        };
        (0..number).map(next).collect()
    }

    /// Texts that needed no computing, for that reason.
    fn saved(&self, how: &str) -> u64 {
        self.metrics.embedding_saved.with_label_values(&[how]).get()
    }
}

/// A text too long to share a batch.
fn long(c: char) -> String {
    c.to_string().repeat(300)
}

#[test]
fn an_idle_worker_takes_a_text_at_once() {
    let fixture = Fixture::new(2);
    let first = fixture.ask(1, Class::Search, "first");
    assert_eq!(fixture.batch(), ["first"]);
    let second = fixture.ask(1, Class::Search, "second");
    assert_eq!(fixture.batch(), ["second"]);
    fixture.release();
    fixture.release();
    assert_eq!(fixture.answer(first).unwrap(), vector("first"));
    assert_eq!(fixture.answer(second).unwrap(), vector("second"));
}

#[test]
fn waiting_texts_are_batched_up_to_the_token_budget() {
    let fixture = Fixture::new(1);
    let _occupied = fixture.occupy();
    // 18 tokens by estimate, so that three are taken together; 64 by count, so that each goes to
    // the model alone.
    let texts: Vec<String> = (0..7).map(|n| format!("{n}").repeat(64)).collect();
    let short: Vec<String> = (0..7).map(|n| format!("{n}").repeat(15)).collect();
    let _long: Vec<_> = texts
        .iter()
        .map(|text| fixture.ask(1, Class::Post, text))
        .collect();
    for batch in fixture.batches(7) {
        assert_eq!(batch.len(), 1);
    }
    let _short: Vec<_> = short
        .iter()
        .map(|text| fixture.ask(2, Class::Post, text))
        .collect();
    // 6 tokens by estimate, so that all are taken together; 15 by count, of which 4 fit the budget.
    assert_eq!(fixture.batches(2), [&short[..4], &short[4..]]);
    fixture.release();
}

#[test]
fn two_workers_share_the_waiting_texts() {
    let fixture = Fixture::new(2);
    let _occupied = (
        fixture.occupy(),
        fixture.ask(1001, Class::Post, "occupied too"),
    );
    fixture.batch();
    let asked: Vec<_> = (10..18)
        .map(|n| fixture.ask(1, Class::Search, &n.to_string()))
        .collect();
    fixture.release();
    assert_eq!(fixture.batch().len(), 4);
    fixture.release();
    // Half of the texts that the first one left, so that the other worker finds some too.
    assert_eq!(fixture.batch().len(), 2);
    for _ in 0..4 {
        fixture.release();
    }
    for answer in asked {
        fixture.answer(answer).unwrap();
    }
}

#[test]
fn long_texts_delay_a_short_one_by_one_batch_at_most() {
    let fixture = Fixture::new(1);
    let _occupied = fixture.occupy();
    let _long: Vec<_> = ['a', 'b', 'c']
        .map(|c| fixture.ask(1, Class::Search, &long(c)))
        .into();
    let _short = fixture.ask(1, Class::Search, "short");
    let _other = fixture.ask(2, Class::Search, "other");
    assert_eq!(
        fixture.batches(4),
        [
            vec!["short".to_owned(), "other".to_owned()],
            vec![long('a')],
            vec![long('b')],
            vec![long('c')]
        ]
    );
    let _later = fixture.ask(1, Class::Search, "later");
    assert_eq!(fixture.batches(1), [["later"]]);
    fixture.release();
}

#[test]
fn posts_go_before_searches_which_still_get_their_turn() {
    let fixture = Fixture::new(1);
    let _occupied = fixture.occupy();
    let _search = fixture.ask(1, Class::Search, "search");
    let _posts: Vec<_> = ('a'..='j')
        .map(|c| fixture.ask(i64::from(u32::from(c)), Class::Post, &long(c)))
        .collect();
    let order: Vec<String> = fixture.batches(11).concat();
    let expected: Vec<String> = ('a'..='h')
        .map(long)
        .chain(["search".to_owned(), long('i'), long('j')])
        .collect();
    assert_eq!(order, expected);
    fixture.release();
}

#[test]
fn users_take_turns() {
    let fixture = Fixture::new(1);
    let _occupied = fixture.occupy();
    let _many: Vec<_> = ['a', 'b', 'c']
        .map(|c| fixture.ask(1, Class::Search, &long(c)))
        .into();
    let _few = (
        fixture.ask(2, Class::Search, &long('d')),
        fixture.ask(3, Class::Search, &long('e')),
        fixture.ask(2, Class::Search, &long('f')),
    );
    let order: String = fixture
        .batches(6)
        .concat()
        .iter()
        .map(|text| &text[..1])
        .collect();
    assert_eq!(order, "adebfc");
    fixture.release();
}

#[test]
fn the_same_text_is_computed_once_for_each_user() {
    let fixture = Fixture::new(1);
    let _occupied = fixture.occupy();
    let waiting =
        [Class::Search, Class::Search, Class::Post].map(|class| fixture.ask(1, class, "same"));
    assert_eq!(fixture.embedder.queue_depth(), 1);
    let other = fixture.ask(2, Class::Search, "same");
    assert_eq!(fixture.embedder.queue_depth(), 2);
    // The post made the shared job a post. The other user's stays a search.
    assert_eq!(fixture.batches(1), [["same"]]);
    let running = fixture.ask(1, Class::Search, "same");
    assert_eq!(fixture.embedder.queue_depth(), 1);
    assert_eq!(fixture.batches(1), [["same"]]);
    fixture.release();
    for asked in waiting.into_iter().chain([running, other]) {
        assert_eq!(fixture.answer(asked).unwrap(), vector("same"));
    }
    assert_eq!(fixture.saved("coalesced"), 3);
    assert_eq!(fixture.embedder.admitted(), 0);
}

#[test]
fn a_text_whose_callers_have_left_is_not_computed() {
    let fixture = Fixture::new(1);
    let _occupied = fixture.occupy();
    let kept = fixture.ask(1, Class::Search, "shared");
    let left = [
        ("shared", Class::Post),
        ("gone", Class::Search),
        (&long('g'), Class::Post),
    ]
    .map(|(text, class)| fixture.ask(1, class, text));
    assert_eq!(
        (fixture.embedder.queue_depth(), fixture.embedder.admitted()),
        (3, 5)
    );
    drop(left);
    assert_eq!(
        (fixture.embedder.queue_depth(), fixture.embedder.admitted()),
        (1, 2)
    );
    assert_eq!(fixture.saved("caller_left"), 2);
    assert_eq!(fixture.batches(1), [["shared"]]);
    fixture.release();
    fixture.answer(kept).unwrap();
    assert!(fixture.embedder.shutdown(Instant::now() + DEADLINE));
    assert!(fixture.entered.try_recv().is_err());
}

#[test]
fn the_permit_of_a_running_text_is_returned_when_it_is_done() {
    let fixture = Fixture::new(1);
    let occupied = fixture.occupy();
    drop(occupied);
    assert_eq!(fixture.embedder.admitted(), 1);
    let next = fixture.ask(1, Class::Post, "next");
    assert_eq!(fixture.batches(1), [["next"]]);
    assert_eq!(fixture.embedder.admitted(), 1);
    fixture.release();
    fixture.answer(next).unwrap();
}

#[test]
fn the_vector_of_a_repeated_query_comes_from_the_users_cache() {
    let fixture = Fixture::new(1);
    let first = fixture.ask(1, Class::Search, "query");
    fixture.batch();
    fixture.release();
    fixture.answer(first).unwrap();

    let permit = fixture.embedder.admit(UserId(1), Class::Search).unwrap();
    let again = fixture.embedder.embed(permit, "query".into());
    assert_eq!(fixture.runtime.block_on(again).unwrap(), vector("query"));
    assert_eq!(fixture.saved("cached"), 1);
    assert_eq!(fixture.embedder.admitted(), 0);

    for (user, class) in [(2, Class::Search), (1, Class::Post)] {
        let asked = fixture.ask(user, class, "query");
        assert_eq!(fixture.batch(), ["query"]);
        fixture.release();
        fixture.answer(asked).unwrap();
    }
}

#[test]
fn a_text_that_breaks_the_encoder_fails_alone() {
    let fixture = Fixture::new(1);
    let _occupied = fixture.occupy();
    let good = ["a", "b"].map(|text| fixture.ask(1, Class::Post, text));
    let bad = ["c!", "d?"].map(|text| fixture.ask(2, Class::Post, text));
    // Together, then one by one.
    assert_eq!(fixture.batches(1), [["a", "c!", "b"]]);
    assert_eq!(fixture.batches(3), [["a"], ["c!"], ["b"]]);
    fixture.release();
    for asked in good {
        fixture.answer(asked).unwrap();
    }
    for asked in bad {
        assert!(matches!(fixture.answer(asked), Err(Error::Failed)));
    }
    let next = fixture.ask(1, Class::Post, "next");
    assert_eq!(fixture.batch(), ["next"]);
    fixture.steps.send(EncoderStep::Shorten).unwrap();
    assert!(matches!(fixture.answer(next), Err(Error::Failed)));
    assert_eq!(fixture.embedder.admitted(), 0);
}

#[test]
fn refusals_are_immediate_and_counted() {
    let fixture = Fixture::new(1);
    let held: Vec<_> = (0..32)
        .map(|_| fixture.embedder.admit(UserId(1), Class::Post).unwrap())
        .collect();
    let refused = fixture.embedder.admit(UserId(1), Class::Post);
    assert!(
        matches!(refused, Err(Error::Overloaded { retry_after }) if retry_after.as_secs() == 1)
    );
    assert_eq!(fixture.metrics.overloaded.get(), 1);
    drop(held);
    assert!(fixture.embedder.admit(UserId(1), Class::Post).is_ok());
}

#[test]
fn shutdown_serves_admitted_callers_and_refuses_new_ones() {
    let fixture = Fixture::new(2);
    let permit = fixture.embedder.admit(UserId(1), Class::Post).unwrap();
    let waiting = fixture.ask(2, Class::Search, "waiting");
    fixture.batch();
    let embedder = Arc::clone(&fixture.embedder);
    let shutdown = std::thread::spawn(move || embedder.shutdown(Instant::now() + DEADLINE));
    let deadline = Instant::now() + DEADLINE;
    while fixture.embedder.admit(UserId(3), Class::Post).is_ok() {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    let late = fixture.embedder.embed(permit, "late".into());
    fixture.release();
    fixture.release();
    assert_eq!(fixture.runtime.block_on(late).unwrap(), vector("late"));
    assert_eq!(fixture.answer(waiting).unwrap(), vector("waiting"));
    assert!(shutdown.join().unwrap());
}

#[test]
fn at_the_deadline_the_running_batch_is_finished_and_the_other_texts_fail() {
    let fixture = Fixture::new(1);
    let permit = fixture.embedder.admit(UserId(1), Class::Post).unwrap();
    let running = fixture.occupy();
    let waiting = fixture.ask(1, Class::Post, "waiting");
    let embedder = Arc::clone(&fixture.embedder);
    let shutdown = std::thread::spawn(move || embedder.shutdown(Instant::now()));
    assert!(matches!(fixture.answer(waiting), Err(Error::Stopped)));
    let late = fixture.embedder.embed(permit, "late".into());
    assert!(matches!(
        fixture.runtime.block_on(late),
        Err(Error::Stopped)
    ));
    fixture.release();
    fixture.answer(running).unwrap();
    assert!(!shutdown.join().unwrap());
    assert!(fixture.embedder.shutdown(Instant::now()));
}
