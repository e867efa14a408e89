//! One upstream: its address, its key, its connections, its breaker and its retries.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{
    ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONTENT_TYPE, HeaderValue, USER_AGENT,
};
use hyper::{Request, Uri};
use rustls::ClientConfig;

use super::breaker::Breaker;
use super::models::ModelCache;
use super::retry::RetryBudget;
use super::transport::Transport;
use crate::config;
use crate::telemetry::Metrics;

const USER_AGENT_VALUE: &str = concat!("prompt-service/", env!("CARGO_PKG_VERSION"));

/// One upstream. Its key is only in the header that is sent to its address.
#[derive(Debug)]
pub struct UpstreamEndpoint {
    /// The name, the address, the key and the models.
    pub config: config::Endpoint,
    /// Its kind, as metrics name it.
    pub provider: &'static str,
    /// Its connections.
    pub transport: Transport,
    /// Whether it may be asked at the moment.
    pub breaker: Breaker,
    /// How many retries there may be.
    pub budget: RetryBudget,
    /// Its list of models.
    pub models: ModelCache,
    uri: Uri,
    authorization: Option<HeaderValue>,
}

impl UpstreamEndpoint {
    /// A client of the upstream.
    ///
    /// # Errors
    /// An address or key cannot be sent, which checked settings exclude.
    pub fn new(
        config: &config::Endpoint,
        tls: &ClientConfig,
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
        let state = &metrics.upstream_breaker_state;
        Ok(Self {
            provider: match config.base_url.is_openai() {
                true => "openai",
                false => "openai-compatible",
            },
            transport: Transport::new(tls, is_https, connect_timeout),
            breaker: Breaker::new(state.with_label_values(&[&config.name])),
            budget: RetryBudget::new(Instant::now()),
            models: ModelCache::default(),
            uri: config.base_url.join("/chat/completions").try_into()?,
            authorization,
            config: config.clone(),
        })
    }

    /// Its address, which has neither user info nor a query, and so no secret.
    pub fn url(&self) -> String {
        self.uri.to_string()
    }

    /// A GET request.
    pub fn get(&self, uri: Uri, with_key: bool) -> Request<Full<Bytes>> {
        self.bare(uri, "application/json", Bytes::new(), with_key)
    }

    /// A POST request with that body.
    pub fn request(&self, body: Bytes, is_streamed: bool) -> Request<Full<Bytes>> {
        let accept = match is_streamed {
            true => "text/event-stream",
            false => "application/json",
        };
        let mut request = self.bare(self.uri.clone(), accept, body, true);
        *request.method_mut() = hyper::Method::POST;
        let json = HeaderValue::from_static("application/json");
        request.headers_mut().insert(CONTENT_TYPE, json);
        request
    }

    fn bare(
        &self,
        uri: Uri,
        accept: &'static str,
        body: Bytes,
        with_key: bool,
    ) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::new(body));
        *request.uri_mut() = uri;
        let headers = request.headers_mut();
        headers.insert(ACCEPT, HeaderValue::from_static(accept));
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        headers.insert(USER_AGENT, HeaderValue::from_static(USER_AGENT_VALUE));
        if let Some(authorization) = self.authorization.as_ref().filter(|_| with_key) {
            headers.insert(AUTHORIZATION, authorization.clone());
        }
        request
    }
}
