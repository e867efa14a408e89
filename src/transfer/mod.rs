//! Moving in, out and over: users and prompts whole, from one place to another. Operators' commands stand on this, not requests.
//!
//! [`import`] takes rows of a [`source`] into the store and embeds them on the way, [`export`] writes the store's rows out,
//! [`copy`] makes one store's contents another's. Each can be cut off at any moment and begun again.

pub mod copy;
pub mod export;
pub mod import;
pub mod json_lines;
mod meter;
mod rules;
pub mod source;

use crate::store;

pub use self::meter::{Meter, Reading};
pub use self::rules::{Fault, Place, Problem};

/// Why a move ended before its end. What it had written stays, and the same command goes on from there.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A store failed.
    #[error("the store")]
    Store(#[from] store::Error),
    /// The old system's database failed.
    #[error(transparent)]
    Django(#[from] store::django::Error),
    /// A file of JSON lines failed.
    #[error(transparent)]
    Lines(#[from] json_lines::Error),
    /// The target holds what the source does not.
    #[error(
        "the target is not empty and holds rows that are not the source's: name an empty database"
    )]
    Foreign,
    /// What was read back is not what was written.
    #[error("{what} {key} is not the same on both sides: something else writes to one of them")]
    Differs {
        /// The kind of row.
        what: &'static str,
        /// Its id; empty where the key is a secret.
        key: String,
    },
}
