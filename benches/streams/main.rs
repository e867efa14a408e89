//! The time that the service adds to an upstream's answers: `cargo bench --bench streams`. The
//! option `--short` (after `--`) only checks that the benchmark works.
//!
//! Starts the release binary with a scripted upstream that runs in this process, beside the
//! clients. The upstream stamps each piece by the clock that the clients read, so a piece shows how
//! long it took to arrive. The same clients also ask the upstream directly: the time that this
//! takes is that of this program and of the machine. Everything runs on one machine.

#![expect(clippy::print_stdout, reason = "the table is the program's purpose")]

mod client;
mod service;
mod upstream;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use self::client::{Connection, Seen};
use self::service::Service;
use self::upstream::{Pace, Upstream};

/// Streams held at once.
const STREAMS: usize = 512;
/// Time between two pieces of a stream: ten tokens a second.
const PACE: Duration = Duration::from_millis(100);
/// How long the upstream waits before its first piece, and before a whole answer: long enough for
/// an embedding meanwhile.
const THOUGHT: Duration = Duration::from_millis(50);
/// Time over which streams are opened: faster than users come, slower than a burst.
const RAMP: Duration = Duration::from_secs(6);
/// A silence of this length within a stream is a stall.
const STALL: Duration = Duration::from_secs(1);

fn main() {
    let is_short = std::env::args().any(|argument| argument == "--short");
    let (hold, calls) = match is_short {
        true => (Duration::from_secs(6), 100),
        false => (Duration::from_secs(60), 1000),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime starts");
    runtime.block_on(async {
        streams(hold).await;
        whole_answers(calls).await;
    });
}

/// The value below which that share of the sorted values lies.
fn quantile(sorted: &[Duration], share: f64) -> f64 {
    let at = ((sorted.len() as f64 * share) as usize).min(sorted.len().saturating_sub(1));
    sorted
        .get(at)
        .map_or(f64::NAN, |value| value.as_secs_f64() * 1000.0)
}

fn row(what: &str, mut values: Vec<Duration>) {
    values.sort_unstable();
    let [p50, p99, most] = [0.5, 0.99, 1.0].map(|share| quantile(&values, share));
    println!("| {what} | {p50:.2} | {p99:.2} | {most:.2} |");
}

fn head(title: &str) {
    println!("\n{title}\n\n| milliseconds | p50 | p99 | most |\n| --- | ---: | ---: | ---: |");
}

/// Opens all streams, each for as long as it takes to have all of them open for `hold`.
async fn hold_streams(
    target: SocketAddr,
    access: Option<&str>,
    tell: impl AsyncFnOnce(Arc<AtomicUsize>),
) -> Vec<Seen> {
    let (open, mut tasks) = (Arc::new(AtomicUsize::new(0)), JoinSet::new());
    for number in 0..STREAMS {
        let (open, access) = (Arc::clone(&open), access.map(str::to_owned));
        tasks.spawn(async move {
            tokio::time::sleep(RAMP * number as u32 / STREAMS as u32).await;
            let mut connection = Connection::open(target, access).await;
            let seen = connection
                .stream(&format!("stream {number}"), || {
                    open.fetch_add(1, Ordering::Relaxed);
                })
                .await;
            open.fetch_sub(1, Ordering::Relaxed);
            seen
        });
    }
    tell(open).await;
    tasks.join_all().await
}

fn report(name: &str, pieces: usize, seen: &[Seen]) {
    let whole = seen
        .iter()
        .filter(|each| each.pieces.len() == pieces)
        .count();
    let stalls = seen
        .iter()
        .filter(|each| each.longest_silence > STALL)
        .count();
    println!(
        "{name}: {whole} of {STREAMS} streams arrived whole, {stalls} stalled for more than {STALL:?}"
    );
}

async fn streams(hold: Duration) {
    let pieces = ((hold + RAMP).as_millis() / PACE.as_millis()) as usize;
    let upstream = Upstream::start(Pace {
        thought: THOUGHT,
        pieces,
        pace: PACE,
    })
    .await;
    let direct = hold_streams(upstream.addr, None, async |_| ()).await;
    let service = Service::start(upstream.addr).await;
    let idle = service.memory();
    let mut held = Vec::new();
    let through = hold_streams(service.addr, Some(&service.access), async |open| {
        let began = Instant::now();
        for (name, at) in [
            ("start", RAMP),
            ("middle", RAMP + hold / 2),
            ("end", RAMP + hold * 9 / 10),
        ] {
            tokio::time::sleep_until((began + at).into()).await;
            held.push((name, open.load(Ordering::Relaxed), service.memory()));
        }
    })
    .await;
    println!("\n# {STREAMS} streams of {pieces} pieces each, one in {PACE:?}\n");
    report("direct", pieces, &direct);
    report("through the service", pieces, &through);
    let bytes: usize = through.iter().map(|each| each.bytes).sum();
    println!(
        "\nThe texts, which are kept until they are stored, come to {:.1} MiB.",
        bytes as f64 / 1048576.0
    );
    println!("\n| memory (RSS) | streams open | MiB |\n| --- | ---: | ---: |");
    println!("| before | 0 | {idle:.1} |");
    for (name, open, memory) in held {
        println!("| {name} | {open} | {memory:.1} |");
    }
    println!("| after | 0 | {:.1} |", service.memory());
    head("Time that was added:");
    for (name, seen) in [("direct", &direct), ("through the service", &through)] {
        let first = seen.iter().filter_map(|each| each.pieces.first());
        let firsts = first.zip(seen).map(|(piece, each)| each.asking + *piece);
        row(&format!("to the first piece, {name}"), firsts.collect());
        let all = seen.iter().flat_map(|each| each.pieces.iter().copied());
        row(&format!("to any piece, {name}"), all.collect());
        let silences = seen.iter().map(|each| each.longest_silence);
        row(
            &format!("longest silence of a stream, {name}"),
            silences.collect(),
        );
    }
}

async fn whole_answers(calls: usize) {
    for (name, thought) in [
        ("an upstream that takes 50 ms", THOUGHT),
        ("an upstream that answers at once", Duration::ZERO),
    ] {
        let upstream = Upstream::start(Pace {
            thought,
            pieces: 1,
            pace: Duration::ZERO,
        })
        .await;
        let service = Service::start(upstream.addr).await;
        let mut direct = Connection::open(upstream.addr, None).await;
        let mut through = Connection::open(service.addr, Some(service.access.clone())).await;
        let (mut added_directly, mut added, mut told, mut commits) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for number in 0..calls + 20 {
            let plain = direct.whole(&format!("direct {number}")).await;
            let answer = through.whole(&format!("through {number}")).await;
            let commit = service.commit();
            // The first ones warm everything up.
            if number >= 20 {
                added_directly.push(plain.added);
                added.push(answer.added);
                told.extend(answer.told);
                commits.push(commit);
            }
        }
        head(&format!(
            "Whole answers one after the other, {name}; {calls} calls, time added to the upstream's own:"
        ));
        row("direct", added_directly);
        row("through the service, durable", added);
        row("of it by Server-Timing", told);
        row("a write and fsync of 4 KiB on the same disk", commits);
    }
}
