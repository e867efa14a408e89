//! The service as its clients meet it, one module a capability; and the store's contract. All in one binary, which links once.

#![expect(
    clippy::unwrap_used,
    reason = "all of this is tests, though only the functions marked so are known as such"
)]

#[macro_use]
mod support;

mod architecture;
mod auth;
mod description;
mod embed_accuracy;
mod idempotency;
mod llm;
mod metrics;
mod moving;
mod oauth;
mod openapi;
mod operator;
mod pages;
mod postgres_service;
mod prompts;
mod realtime;
mod redis;
mod reembedding;
mod search;
mod shutdown;
mod store;
mod streams;
mod throttle;
mod upstream;
