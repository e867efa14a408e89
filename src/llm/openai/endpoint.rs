//! One upstream: where it is, its key, its connections, and how it has been doing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{
    ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONTENT_TYPE, HeaderValue, USER_AGENT,
};
use hyper::{Request, Uri};
use rustls::ClientConfig;

use super::breaker::Breaker;
use super::retry::Budget;
use super::transport::Transport;
use crate::config;
use crate::llm::measure::CallLabels;
use crate::telemetry::Metrics;

const USER_AGENT_VALUE: &str = concat!("prompt-service/", env!("CARGO_PKG_VERSION"));

/// One upstream. Its key is in the one header that goes to its own address, and nowhere else.
#[derive(Debug)]
pub struct Endpoint {
    /// How it is called in metrics and in the log: `primary`, `fallback-1`, …
    pub name: String,
    /// What is asked, and where.
    pub config: config::Endpoint,
    /// Its kind, as metrics name it.
    pub provider: &'static str,
    /// Its connections.
    pub transport: Transport,
    /// Whether it is left alone for now.
    pub breaker: Breaker,
    /// How many retries there may be.
    pub budget: Budget,
    uri: Uri,
    authorization: Option<HeaderValue>,
}

impl Endpoint {
    /// The upstream at that place of the list.
    ///
    /// # Errors
    /// An address or key that cannot be sent, which checked settings do not have.
    pub fn new(
        at: usize,
        config: &config::Endpoint,
        tls: Arc<ClientConfig>,
        connect_timeout: Duration,
        metrics: &Metrics,
    ) -> Result<Self, hyper::http::Error> {
        let is_https = config.base_url.is_https();
        let authorization = match &config.api_key {
            None => None,
            Some(key) => {
                let mut value = HeaderValue::try_from(format!("Bearer {}", key.expose()))?;
                // Keeps it out of every debug form.
                value.set_sensitive(true);
                Some(value)
            }
        };
        let name = match at {
            0 => "primary".to_owned(),
            at => format!("fallback-{at}"),
        };
        Ok(Self {
            provider: match config.base_url.is_openai() {
                true => "openai",
                false => "openai-compatible",
            },
            transport: Transport::new(tls, is_https, connect_timeout),
            breaker: Breaker::new(metrics.upstream_breaker_state.with_label_values(&[&name])),
            budget: Budget::new(Instant::now()),
            uri: config.base_url.join("/chat/completions").try_into()?,
            authorization,
            config: config.clone(),
            name,
        })
    }

    /// The labels of the metrics of its calls.
    pub fn labels(&self) -> CallLabels<'_> {
        CallLabels {
            provider: self.provider,
            model: &self.config.model,
        }
    }

    /// Where it is asked. An address has neither user info nor a query, so there is no secret in
    /// it.
    pub fn url(&self) -> String {
        self.uri.to_string()
    }

    /// A request for something else of the upstream's.
    pub fn get(&self, uri: Uri, with_key: bool) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::default());
        *request.uri_mut() = uri;
        let headers = request.headers_mut();
        headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        headers.insert(USER_AGENT, HeaderValue::from_static(USER_AGENT_VALUE));
        if let Some(authorization) = self.authorization.as_ref().filter(|_| with_key) {
            headers.insert(AUTHORIZATION, authorization.clone());
        }
        request
    }

    /// A request with that body.
    pub fn request(&self, body: Bytes, is_streamed: bool) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = hyper::Method::POST;
        *request.uri_mut() = self.uri.clone();
        let accept = match is_streamed {
            true => "text/event-stream",
            false => "application/json",
        };
        let headers = request.headers_mut();
        headers.insert(ACCEPT, HeaderValue::from_static(accept));
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(USER_AGENT, HeaderValue::from_static(USER_AGENT_VALUE));
        if let Some(authorization) = &self.authorization {
            headers.insert(AUTHORIZATION, authorization.clone());
        }
        request
    }
}
