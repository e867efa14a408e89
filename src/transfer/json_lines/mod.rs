//! Users and prompts as JSON lines: the files of `export` and `import`.
//!
//! A file is a header and then one object a line: users by rising id, then prompts by rising id.
//! `docs/MOVING.md` describes every field for those who write such files themselves. [`Writer`]
//! writes a file, [`Reader`] reads one.

mod fields;
mod parse;
mod reader;
mod writer;

pub use self::fields::LineProblem;
pub use self::reader::Reader;
pub use self::writer::{Options, Writer};

/// What the header's `format` says.
const FORMAT: &str = "prompt-service";

/// The version of the format: raised when a reader of the one before would misunderstand a file.
const VERSION: u32 = 1;

/// The highest id that JavaScript's numbers, and so every client's JSON, can distinguish from the
/// next one. It leaves new rows more ids than anybody needs.
pub const MAX_ID: i64 = (1 << 53) - 1;

/// Marks an account without a known password, as Django does: the account cannot log in before it
/// has another one.
pub(super) const NO_PASSWORD: &str = "!";

/// Why a file cannot be read at all, or cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system fails.
    #[error("the file cannot be used")]
    Io(#[from] std::io::Error),
    /// The first line is not a header.
    #[error(
        "the first line is not the header of an export, {{\"type\":\"header\",\"format\":\"prompt-service\",\"version\":1}}"
    )]
    NoHeader,
    /// The first line is a faulty header.
    #[error("line 1, the header: {0}")]
    Header(LineProblem),
    /// The file is compressed by gzip.
    #[error("the file is compressed: run gunzip --stdout FILE | prompt-service import -")]
    Compressed,
    /// A later version of this program wrote it.
    #[error(
        "the file is of version {0} of the format, and this program knows up to {VERSION}: use a newer one"
    )]
    Newer(u32),
}
