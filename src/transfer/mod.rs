//! Moving users and prompts whole, from one place to another. The operator's commands use this;
//! requests do not.
//!
//! Each place gives or takes pages of [`Record`]s in the same order, and `pipe` moves the pages.
//! [`import`] fills the store from a [`source`] and embeds the prompts on the way,
//! [`export`](export()) writes the store's rows as [`json_lines`], [`copy`](copy()) makes one
//! store's contents another's. Each can be interrupted at any moment and started again.

mod copy;
mod export;
pub mod import;
pub mod json_lines;
mod meter;
mod pipe;
mod row;
mod rules;
pub mod source;

use std::ops::AddAssign;

use crate::domain::Record;
use crate::store;

pub use self::copy::copy;
pub use self::export::export;
pub use self::meter::{Meter, Reading};
pub use self::row::{Fault, Location, Problem, Row};

/// Rows of the two kinds that operators count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RowCounts {
    /// Accounts.
    pub users: u64,
    /// Prompts.
    pub prompts: u64,
}

impl RowCounts {
    fn of<'a>(records: impl IntoIterator<Item = &'a Record>) -> Self {
        let mut counts = Self::default();
        for record in records {
            counts.users += u64::from(matches!(record, Record::User(_)));
            counts.prompts += u64::from(matches!(record, Record::Prompt(_)));
        }
        counts
    }
}

impl AddAssign for RowCounts {
    fn add_assign(&mut self, other: Self) {
        self.users += other.users;
        self.prompts += other.prompts;
    }
}

/// Why a move ended before its end. What it had written stays, and the same command continues
/// there.
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
