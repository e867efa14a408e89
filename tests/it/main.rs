//! The service as its clients see it, one module for each capability, and the contract of the
//! store. All in one binary, which is linked once.

#![expect(
    clippy::unwrap_used,
    reason = "all of this is tests, though only the functions marked so are known as such"
)]

#[macro_use]
mod support;

mod api_keys;
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
mod transfer;
mod upstream;
mod usage;
mod v1;
mod v1_embeddings;
