//! The time that gateways add to chat completions: `make bench-gateway`, which starts them.
//!
//!     gateway PORT NAME=ADDRESS,KEY … [--short] [--commit-dir FOLDER]
//!
//! A scripted upstream runs in this process at the port, beside the clients. It stamps each piece
//! by the clock that the clients read, so a piece shows how long it took to arrive. The same
//! clients also ask the upstream directly: the time that this takes is that of this program and of
//! the machine. The targets take turns, round by round. Everything runs on one machine.

#![expect(clippy::print_stdout, reason = "the table is the program's purpose")]

mod client;
mod http;
mod upstream;

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::net::TcpListener;
use tokio::task::JoinSet;

use self::client::{Client, Seen, Target};

/// Clients at once.
const CLIENTS: [usize; 2] = [1, 64];
/// Calls of each client that warm everything up.
const WARM: usize = 10;
/// Streams held at once.
const STREAMS: usize = 512;
/// Time between two pieces of a held stream: ten tokens a second.
const PACE: Duration = Duration::from_millis(100);
/// Time over which held streams are opened: faster than users come, slower than a burst.
const RAMP: Duration = Duration::from_secs(6);
/// A silence of this length within a stream is a stall.
const STALL: Duration = Duration::from_secs(1);

/// How long everything takes.
struct Plan {
    rounds: usize,
    seconds: Duration,
    hold: Duration,
}

fn main() {
    let mut targets = Vec::new();
    let (mut port, mut is_short, mut commit_dir) = (None, false, None);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            // Cargo gives it to every benchmark.
            "--bench" => (),
            "--short" => is_short = true,
            "--commit-dir" => commit_dir = arguments.next(),
            text => match (text.split_once('='), text.parse::<u16>()) {
                (Some((name, rest)), _) => targets.push(target(name, rest)),
                (None, Ok(number)) => port = Some(number),
                (None, Err(_)) => panic!("neither a port nor a target: {text}"),
            },
        }
    }
    let Some(port) = port else {
        println!("gateway: started by `make bench-gateway`, which starts what is measured");
        return;
    };
    let plan = match is_short {
        true => Plan {
            rounds: 1,
            seconds: Duration::from_secs(1),
            hold: Duration::from_secs(6),
        },
        false => Plan {
            rounds: 5,
            seconds: Duration::from_secs(4),
            hold: Duration::from_secs(60),
        },
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime starts");
    runtime.block_on(async {
        let listener = TcpListener::bind(("127.0.0.1", port)).await;
        let listener = listener.expect("the port is free");
        let direct = format!("{},none", listener.local_addr().expect("an address"));
        let _serving = upstream::serve(listener);
        targets.insert(0, target("direct", &direct));
        if let Some(folder) = commit_dir {
            commits(Path::new(&folder));
        }
        for clients in CLIENTS {
            for (what, is_streamed) in [("whole answers", false), ("first pieces", true)] {
                added(&targets, &plan, clients, what, is_streamed).await;
            }
        }
        for target in &targets {
            hold_streams(target, &plan).await;
        }
    });
}

fn target(name: &str, rest: &str) -> Target {
    let (addr, key) = rest.split_once(',').expect("an address and a key");
    Target {
        name: name.to_owned(),
        addr: addr.parse().expect("an address with a port"),
        key: key.to_owned(),
    }
}

/// The value in milliseconds below which that share of the sorted values lies.
fn quantile(sorted: &[Duration], share: f64) -> f64 {
    let at = ((sorted.len() as f64 * share) as usize).min(sorted.len().saturating_sub(1));
    sorted
        .get(at)
        .map_or(f64::NAN, |value| value.as_secs_f64() * 1000.0)
}

fn quantiles(values: impl Iterator<Item = Duration>) -> [f64; 3] {
    let mut sorted: Vec<Duration> = values.collect();
    sorted.sort_unstable();
    [0.5, 0.99, 1.0].map(|share| quantile(&sorted, share))
}

/// How long the disk takes to keep something.
fn commits(folder: &Path) {
    let file = std::fs::File::create(folder.join("commit"));
    let mut file = file.expect("a file");
    let times = (0..200).map(|_| {
        let began = Instant::now();
        file.write_all(&[0; 4096]).expect("room");
        file.sync_data().expect("a disk");
        began.elapsed()
    });
    let [p50, p99, _] = quantiles(times);
    println!("A commit of the disk takes {p50:.2} ms (p50), {p99:.2} ms (p99).");
}

/// One table: calls one after the other by each client, with an upstream that answers at once.
async fn added(targets: &[Target], plan: &Plan, clients: usize, what: &str, is_streamed: bool) {
    let mut seen: Vec<Vec<Seen>> = targets.iter().map(|_| Vec::new()).collect();
    for round in 0..plan.rounds {
        for (target, seen) in targets.iter().zip(&mut seen) {
            seen.extend(calls(target, plan.seconds, clients, is_streamed, round).await);
        }
    }
    println!("\nc = {clients}, {what}, an upstream that answers at once:\n");
    println!("| milliseconds | total p50 | p99 | added p50 | p99 | calls/s |");
    println!("| --- | ---: | ---: | ---: | ---: | ---: |");
    for (target, seen) in targets.iter().zip(seen) {
        let rate = seen.len() as f64 / (plan.seconds.as_secs_f64() * plan.rounds as f64);
        let [total, total_p99, _] = quantiles(seen.iter().map(|one| one.total));
        let [added, added_p99, _] = quantiles(seen.iter().map(|one| one.added));
        println!(
            "| {} | {total:.2} | {total_p99:.2} | {added:.2} | {added_p99:.2} | {rate:.0} |",
            target.name
        );
    }
}

/// Calls of one target for that long, by clients that each wait for their answer.
async fn calls(
    target: &Target,
    seconds: Duration,
    clients: usize,
    is_streamed: bool,
    round: usize,
) -> Vec<Seen> {
    let mut tasks = JoinSet::new();
    for client in 0..clients {
        let target = target.clone();
        tasks.spawn(async move {
            let mut connection = Client::open(&target).await;
            let (mut seen, mut number, mut end) = (Vec::new(), 0, None);
            loop {
                // Each text is new, so that nothing can answer from memory.
                let prompt = format!("round {round} client {client} call {number}");
                let one = match is_streamed {
                    true => connection.stream("instant", &prompt).await,
                    false => connection.whole("instant", &prompt).await,
                };
                number += 1;
                if number < WARM {
                    continue;
                }
                let end = *end.get_or_insert_with(|| Instant::now() + seconds);
                if Instant::now() >= end {
                    return seen;
                }
                seen.push(one);
            }
        });
    }
    tasks.join_all().await.into_iter().flatten().collect()
}

/// Streams that are all open at once for a time.
async fn hold_streams(target: &Target, plan: &Plan) {
    let pieces = ((plan.hold + RAMP).as_millis() / PACE.as_millis()) as usize;
    let model = format!("paced-{}x{pieces}", PACE.as_millis());
    let (open, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let mut tasks = JoinSet::new();
    for number in 0..STREAMS {
        let (target, model) = (target.clone(), model.clone());
        let (open, most) = (Arc::clone(&open), Arc::clone(&most));
        tasks.spawn(async move {
            tokio::time::sleep(RAMP * number as u32 / STREAMS as u32).await;
            let mut client = Client::open(&target).await;
            most.fetch_max(open.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
            let seen = client.stream(&model, &format!("stream {number}")).await;
            open.fetch_sub(1, Ordering::Relaxed);
            seen
        });
    }
    let seen = tasks.join_all().await;
    let whole = seen.iter().filter(|one| one.pieces == pieces).count();
    let stalls = seen
        .iter()
        .filter(|one| one.longest_silence > STALL)
        .count();
    println!(
        "\n{}: {STREAMS} streams of {pieces} pieces, one in {PACE:?}, {} at once: {whole} arrived whole, \
         {stalls} stalled for more than {STALL:?}\n",
        target.name,
        most.load(Ordering::Relaxed)
    );
    println!("| milliseconds | p50 | p99 | most |\n| --- | ---: | ---: | ---: |");
    for (what, values) in [
        (
            "added to the first piece",
            seen.iter().map(|one| one.added).collect::<Vec<_>>(),
        ),
        (
            "the latest piece of a stream, on its way",
            seen.iter().map(|one| one.latest).collect(),
        ),
        (
            "longest silence of a stream",
            seen.iter().map(|one| one.longest_silence).collect(),
        ),
    ] {
        let [p50, p99, most] = quantiles(values.into_iter());
        println!("| {what} | {p50:.2} | {p99:.2} | {most:.2} |");
    }
}
