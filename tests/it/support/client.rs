//! An HTTP client that sends any method, header and body, and shows the whole response.

use std::net::SocketAddr;

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE};
use hyper::http::request::Builder;
use hyper::{HeaderMap, Method};
use hyper_util::client::legacy::Client as Pool;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;

use super::DEADLINE;
use super::stream::Stream;

/// A client of one address. Keeps connections; cheap to clone.
#[derive(Clone)]
pub struct Client {
    addr: SocketAddr,
    pool: Pool<HttpConnector, Full<Bytes>>,
    bearer: Option<String>,
}

impl Client {
    /// A client without credentials.
    pub fn new(addr: SocketAddr) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        Self {
            addr,
            pool: Pool::builder(TokioExecutor::new()).build(connector),
            bearer: None,
        }
    }

    /// The same with an access token on every request.
    pub fn with_bearer(&self, token: &str) -> Self {
        Self {
            bearer: Some(token.to_owned()),
            ..self.clone()
        }
    }

    /// The token that is sent; empty if none is.
    pub fn bearer(&self) -> &str {
        self.bearer.as_deref().unwrap_or_default()
    }

    /// A GET.
    pub fn get(&self, path: &str) -> Request {
        self.request(Method::GET, path)
    }

    /// A POST.
    pub fn post(&self, path: &str) -> Request {
        self.request(Method::POST, path)
    }

    /// A DELETE.
    pub fn delete(&self, path: &str) -> Request {
        self.request(Method::DELETE, path)
    }

    /// A PATCH.
    pub fn patch(&self, path: &str) -> Request {
        self.request(Method::PATCH, path)
    }

    /// A request of any method.
    pub fn request(&self, method: Method, path: &str) -> Request {
        let mut builder = hyper::Request::builder()
            .method(method)
            .uri(format!("http://{}{path}", self.addr));
        if let Some(token) = &self.bearer {
            builder = builder.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        Request {
            pool: self.pool.clone(),
            builder,
            body: Bytes::new(),
        }
    }
}

/// A request that is not sent yet.
#[must_use]
pub struct Request {
    pool: Pool<HttpConnector, Full<Bytes>>,
    builder: Builder,
    body: Bytes,
}

impl Request {
    /// Adds a header.
    pub fn header(self, name: &str, value: &str) -> Self {
        self.header_bytes(name, value.as_bytes())
    }

    /// Adds a header whose value may be any bytes that HTTP allows.
    pub fn header_bytes(mut self, name: &str, value: &[u8]) -> Self {
        self.builder = self.builder.header(name, value);
        self
    }

    /// Adds an `Authorization: Bearer` header.
    pub fn bearer(self, token: &str) -> Self {
        self.header("authorization", &format!("Bearer {token}"))
    }

    /// Sets a JSON body.
    pub fn json(self, body: &Value) -> Self {
        self.body("application/json", body.to_string())
    }

    /// Sets a body of that type.
    pub fn body(mut self, kind: &str, body: impl Into<Bytes>) -> Self {
        self.builder = self.builder.header(CONTENT_TYPE, kind);
        self.body = body.into();
        self
    }

    /// Sends it and reads the whole response. Fails if there is none within the deadline.
    pub async fn send(self) -> Response {
        self.try_send().await.expect("the service answers")
    }

    /// Sends it and reads only the head of the response.
    pub async fn open(self) -> Stream {
        let request = self.builder.body(Full::new(self.body)).unwrap();
        let answer = tokio::time::timeout(DEADLINE, self.pool.request(request)).await;
        Stream::new(answer.expect("the service answers in time").unwrap())
    }

    /// The same as `send` where the connection may be refused or break.
    pub async fn try_send(self) -> anyhow::Result<Response> {
        let request = self.builder.body(Full::new(self.body))?;
        let exchange = async {
            let answer = self.pool.request(request).await?;
            let (head, body) = answer.into_parts();
            anyhow::Ok(Response {
                status: head.status.as_u16(),
                headers: head.headers,
                body: body.collect().await?.to_bytes(),
            })
        };
        tokio::time::timeout(DEADLINE, exchange).await?
    }
}

/// A whole response.
#[derive(Clone, Debug)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// The headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
}

impl Response {
    /// The value of a header, if it is there.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8(self.body.to_vec()).unwrap()
    }

    /// The body as JSON; fails if it is not declared so.
    pub fn json(&self) -> Value {
        assert_eq!(
            self.header("content-type"),
            Some("application/json"),
            "{self:?}"
        );
        serde_json::from_slice(&self.body).unwrap()
    }

    /// The `id` of each of the body's `results`.
    pub fn ids(&self) -> Vec<i64> {
        let results = self.json()["results"].clone();
        let results = results.as_array().unwrap();
        results
            .iter()
            .map(|result| result["id"].as_i64().unwrap())
            .collect()
    }
}
