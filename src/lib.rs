//! Prompt Service: accounts, an LLM, durable history, semantic search and push in one process.
//!
//! Modules in reading order: first those that use no others, last the one that uses all.
//! `docs/ARCHITECTURE.md` shows the path of a request through them.

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

// Capabilities: each uses the modules above and none of the others, except that `search` reads the
// store.
pub mod credentials;
pub mod data_dir;
pub mod embed;
pub mod llm;
pub mod pricing;
pub mod realtime;
pub mod search;
pub mod store;
pub mod throttle;

// Use cases over capabilities.
pub mod services;
pub mod transfer;

// The ways in, and the place where everything is wired.
pub mod api;
pub mod app;
pub mod cli;
pub mod program;

// What strangers send, for the fuzzer.
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
