//! The operator's commands that move data: `backup`, `export`, `import` and `move`. Flags, locks,
//! progress and what is printed; the moving itself is [`transfer`](crate::transfer).

mod atomic_file;
mod backup;
mod exclusive;
mod export;
mod import;
mod move_store;
mod progress;

use anyhow::{Context, anyhow};

use crate::cli::SecretUrl;
use crate::config::Secret;
use crate::transfer::RowCounts;

pub use self::backup::backup;
pub use self::export::export;
pub use self::import::import;
pub use self::move_store::move_store;

fn both(counts: RowCounts) -> String {
    format!("{} users, {} prompts", counts.users, counts.prompts)
}

/// The address that was given in one of its three ways, if in any. Errors quote none of what was
/// given: an address put in a name's place by mistake would be shown.
fn secret_url(given: SecretUrl<'_>) -> anyhow::Result<Option<Secret>> {
    let SecretUrl {
        flag,
        url,
        variable,
        file,
    } = given;
    if let Some(name) = variable {
        let value = std::env::var(name)
            .ok()
            .with_context(|| format!("{flag}-env: no variable of that name is set"))?;
        return Ok(Some(Secret::new(value.trim())));
    }
    if let Some(path) = file {
        return Secret::read_file(path)
            .map(Some)
            .map_err(|error| anyhow!("{flag}-file: the file {error}"));
    }
    Ok(url.cloned())
}
