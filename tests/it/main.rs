//! The service as its clients meet it, one module a capability; and the store's contract. All in one binary, which links once.

#![expect(
    clippy::unwrap_used,
    reason = "all of this is tests, though only the functions marked so are known as such"
)]

#[macro_use]
mod support;

mod architecture;
mod auth;
mod connections;
mod description;
mod embed_accuracy;
mod guessing;
mod idempotency;
mod llm;
mod logs;
mod metrics;
mod moving;
mod oauth;
mod openapi;
mod operator;
mod pages;
mod postgres_service;
mod prompts;
mod proxies;
mod purge;
mod realtime;
mod redis;
mod reembedding;
mod search;
mod sessions;
mod shutdown;
mod store;
mod streams;
mod throttle;
mod tokens;
mod upstream;
