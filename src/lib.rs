//! Prompt Service: accounts, an LLM, durable history, semantic search and push in one process.
//!
//! Modules in reading order, from what knows nothing of the rest to what knows everything; `docs/ARCHITECTURE.md` draws the
//! request's path through them.

// Values and rules, what went wrong, what may be set, what operators see, what replicas share.
pub mod config;
pub mod domain;
pub mod error;
pub mod fair_semaphore;
pub mod memory_budget;
pub mod redis;
pub mod telemetry;
pub mod threads;
pub mod turns;
pub mod user_permits;

// Capabilities: each knows the layer above and none of the others.
pub mod credentials;
pub mod data_dir;
pub mod embed;
pub mod llm;
pub mod realtime;
pub mod search;
pub mod store;
pub mod throttle;

// Use cases over capabilities.
pub mod services;
pub mod transfer;

// The way in, and the place where everything is wired.
pub mod api;
pub mod app;
pub mod cli;
pub mod program;

// What strangers send, for the fuzzer.
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
