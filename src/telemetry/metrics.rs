//! The metrics of one running service. Label values are chosen by the service alone, never by a
//! client.

use prometheus::{
    Counter, Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter,
    IntCounterVec, IntGauge, Opts, Registry, TextEncoder,
};

use super::process;

/// Bounds for durations from a tenth of a millisecond to ten seconds.
const DURATION_BOUNDS: &[f64] = &[
    0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    5.0, 10.0,
];
/// Declares the struct of metrics, its construction and its registration in one place: name, kind,
/// help.
macro_rules! metrics {
    ($($(#[doc = $help:literal])+ $field:ident: $kind:ty = $make:expr;)+) => {
        /// Every metric, registered. The doc comment of a field is its help text.
        #[derive(Debug)]
        pub struct Metrics {
            registry: Registry,
            $($(#[doc = $help])+ pub $field: $kind,)+
        }

        impl Metrics {
            /// Makes and registers all metrics, each starting at nothing. Independent of any other
            /// instance.
            ///
            /// # Panics
            /// If two metrics share a name, which a test would have shown.
            pub fn new() -> Self {
                let registry = Registry::new();
                $(
                    let make: fn(String) -> $kind = $make;
                    let $field = make([$($help),+].concat().trim().to_owned());
                    registry.register(Box::new($field.clone())).expect("metric names are distinct");
                )+
                Self { registry, $($field,)+ }
            }
        }
    };
}

metrics! {
    /// Answered requests by route template, method and status.
    http_requests: IntCounterVec = |help| counters("http_requests_total", help, &["route", "method", "status"]);
    /// Time from reading a request's head to having its answer, by route template and method.
    http_request_duration: HistogramVec = |help| histograms("http_request_duration_seconds", help, DURATION_BOUNDS, &["route", "method"]);
    /// Connections being served.
    http_connections: IntGauge = |help| gauge("http_connections", help);
    /// Connections that the service ended before their clients did, by reason.
    http_connections_ended: IntCounterVec = |help| counters("http_connections_ended_total", help, &["reason"]);
    /// Memory that request bodies and answers in flight hold.
    request_memory: IntGauge = |help| gauge("request_memory_bytes", help);
    /// Prompts stored, by outcome.
    prompts: IntCounterVec = |help| counters("prompts_total", help, &["status"]);
    /// Time that the service added to the upstream's own: whole answers from reading the request's
    /// head to the answer, streams from admission to the stored end.
    prompt_overhead: HistogramVec = |help| histograms("prompt_overhead_seconds", help, DURATION_BOUNDS, &["kind"]);
    /// Calls of the upstream in progress, by this process.
    calls_running: IntGauge = |help| gauge("calls_running", help);
    /// Calls that were ended because their process stopped renewing them.
    calls_lapsed: IntCounter = |help| counter("calls_lapsed_total", help);
    /// Posts answered from their idempotency key.
    idempotent_replays: IntCounter = |help| counter("idempotent_replays_total", help);
    /// Requests refused by a throttle.
    throttled: IntCounterVec = |help| counters("throttled_requests_total", help, &["throttle"]);
    /// Logins that failed, and those refused because too many had.
    login_failures: IntCounterVec = |help| counters("login_failures_total", help, &["reason"]);
    /// Time the upstream took to answer.
    gen_ai_client_operation_duration: HistogramVec = |help| histograms("gen_ai_client_operation_duration_seconds", help, &exponential(0.01, 2.0, 14), &["gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model", "error_type"]);
    /// Tokens read and written by the upstream.
    gen_ai_client_token_usage: HistogramVec = |help| histograms("gen_ai_client_token_usage", help, &exponential(1.0, 4.0, 14), &["gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model", "gen_ai_token_type"]);
    /// What calls cost, in US dollars, as far as it is known.
    cost: Counter = |help| Counter::with_opts(Opts::new("cost_usd_total", help)).expect("valid metric");
    /// Tokens of metered attempts, by kind.
    metered_tokens: IntCounterVec = |help| counters("metered_tokens_total", help, &["kind"]);
    /// Metered attempts whose cost is not known.
    unpriced_attempts: IntCounter = |help| counter("unpriced_attempts_total", help);
    /// Calls that were refused because of a budget, by reason.
    budget_refusals: IntCounterVec = |help| counters("budget_refusals_total", help, &["reason"]);
    /// Time from asking the upstream to the first text of a streamed answer.
    gen_ai_client_time_to_first_chunk: HistogramVec = |help| histograms("gen_ai_client_operation_time_to_first_chunk_seconds", help, &exponential(0.01, 2.0, 14), &["gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model"]);
    /// Calls to the upstream in flight.
    upstream_calls_in_flight: IntGauge = |help| gauge("upstream_calls_in_flight", help);
    /// Attempts repeated at the same upstream, by what went wrong before.
    upstream_retries: IntCounterVec = |help| counters("upstream_retries_total", help, &["upstream", "error_type"]);
    /// Events of answers that could not be read and were left out.
    upstream_events_skipped: IntCounterVec = |help| counters("upstream_events_skipped_total", help, &["upstream"]);
    /// Whether an upstream's circuit breaker is closed (0), half-open (1) or open (2).
    upstream_breaker_state: GaugeVec = |help| gauges("upstream_breaker_state", help, &["upstream"]);
    /// Time from asking for an embedding to having it, waiting included.
    embedding_duration: HistogramVec = |help| histograms("embedding_duration_seconds", help, DURATION_BOUNDS, &["purpose"]);
    /// Texts embedded together.
    embedding_batch_size: Histogram = |help| histogram("embedding_batch_texts", help, &exponential(1.0, 2.0, 9));
    /// Texts admitted and not yet embedded.
    embedding_queue_depth: IntGauge = |help| gauge("embedding_queue_depth", help);
    /// Texts that needed no computing: found in the cache, or asked for twice at once.
    embedding_saved: IntCounterVec = |help| counters("embedding_saved_total", help, &["how"]);
    /// Requests refused because too many texts wait, or too many calls to the upstream are in
    /// flight.
    overloaded: IntCounter = |help| counter("overloaded_requests_total", help);
    /// Time of a similarity search without the embedding of its query.
    search_duration: HistogramVec = |help| histograms("search_duration_seconds", help, DURATION_BOUNDS, &["scope"]);
    /// Vectors held in memory.
    search_vectors: IntGauge = |help| gauge("search_vectors", help);
    /// Memory of the vectors held.
    search_memory: IntGauge = |help| gauge("search_memory_bytes", help);
    /// Users whose vectors were evicted from memory to make room.
    search_evictions: IntGauge = |help| gauge("search_evicted_users", help);
    /// Prompts that still wait for a vector of the current model.
    reembedding_remaining: IntGauge = |help| gauge("reembedding_remaining_prompts", help);
    /// Open WebSockets.
    websockets_open: IntGauge = |help| gauge("websockets_open", help);
    /// WebSockets closed by the service, by close code.
    websockets_closed: IntCounterVec = |help| counters("websockets_closed_total", help, &["code"]);
    /// Events put into the queues of WebSockets.
    websocket_events: IntCounter = |help| counter("websocket_events_total", help);
    /// Whether a backend works (1), or does not answer or cannot be written (0).
    backend_up: GaugeVec = |help| gauges("backend_up", help, &["backend"]);
    /// Time of a command to Redis, by what it is for.
    redis_command_duration: HistogramVec = |help| histograms("redis_command_duration_seconds", help, DURATION_BOUNDS, &["command"]);
    /// Commands to Redis without a reply, and those that were not sent because Redis is known to be
    /// unavailable.
    redis_command_failures: IntCounterVec = |help| counters("redis_command_failures_total", help, &["command"]);
    /// Limits that this replica decided by its own counts because Redis was unavailable, by limit.
    degraded_decisions: IntCounterVec = |help| counters("degraded_limit_decisions_total", help, &["limit"]);
    /// Times that sockets had to be closed because events may have missed them.
    missed_events: IntCounter = |help| counter("websocket_events_missed_total", help);
    /// Writes waiting for the store.
    store_queue_depth: IntGauge = |help| gauge("store_queue_depth", help);
    /// Writes that shared their commit with the ones before, since the start, and commits made.
    store_writes: GaugeVec = |help| gauges("store_writes", help, &["kind"]);
    /// Which version runs, always 1.
    build_info: GaugeVec = |help| gauges("prompt_service_build_info", help, &["version", "model"]);
    /// Time from the start of the process until it was ready to serve.
    startup_duration: Gauge = |help| Gauge::with_opts(Opts::new("startup_duration_seconds", help)).expect("valid metric");
}

impl Metrics {
    /// All metrics in Prometheus' text format.
    pub fn render(&self) -> Vec<u8> {
        let mut text = Vec::with_capacity(16 * 1024);
        TextEncoder::new()
            .encode(&self.registry.gather(), &mut text)
            .expect("writing to memory does not fail and every family has a name");
        text.extend_from_slice(process::render().as_bytes());
        text
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

fn counter(name: &str, help: String) -> IntCounter {
    IntCounter::with_opts(Opts::new(name, help)).expect("valid metric")
}

fn counters(name: &str, help: String, labels: &[&str]) -> IntCounterVec {
    IntCounterVec::new(Opts::new(name, help), labels).expect("valid metric")
}

fn gauge(name: &str, help: String) -> IntGauge {
    IntGauge::with_opts(Opts::new(name, help)).expect("valid metric")
}

fn gauges(name: &str, help: String, labels: &[&str]) -> GaugeVec {
    GaugeVec::new(Opts::new(name, help), labels).expect("valid metric")
}

/// `count` bounds that start at `start` and grow by `factor`: for `gen_ai` metrics those that the
/// OpenTelemetry GenAI conventions name.
fn exponential(start: f64, factor: f64, count: usize) -> Vec<f64> {
    prometheus::exponential_buckets(start, factor, count).expect("valid bounds")
}

fn histogram(name: &str, help: String, bounds: &[f64]) -> Histogram {
    Histogram::with_opts(HistogramOpts::new(name, help).buckets(bounds.to_vec()))
        .expect("valid metric")
}

fn histograms(name: &str, help: String, bounds: &[f64], labels: &[&str]) -> HistogramVec {
    HistogramVec::new(
        HistogramOpts::new(name, help).buckets(bounds.to_vec()),
        labels,
    )
    .expect("valid metric")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_services_in_one_process_count_apart() {
        let (one, other) = (Metrics::new(), Metrics::new());
        one.overloaded.inc();
        assert_eq!((one.overloaded.get(), other.overloaded.get()), (1, 0));
    }

    #[test]
    fn help_texts_come_from_the_doc_comments() {
        let text = String::from_utf8(Metrics::new().render()).unwrap();
        assert!(
            text.contains("# HELP websockets_open Open WebSockets."),
            "{text}"
        );
        assert!(text.contains("process_resident_memory_bytes"), "{text}");
    }
}
