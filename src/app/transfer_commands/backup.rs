//! `backup`: a copy of the embedded store, also while a server uses it.

use std::io::Write;
use std::path::Path;
use std::time::Instant;

use anyhow::{bail, ensure};

use super::super::store;
use super::atomic_file::AtomicFile;
use super::progress::show;
use crate::config::{Config, StoreConfig};
use crate::store::sqlite::{self, BackupError};
use crate::transfer::Meter;

/// How often the size of the growing copy is read.
const LOOK_EVERY: std::time::Duration = std::time::Duration::from_millis(100);

/// Copies the embedded store to a new file, also while a server uses it.
///
/// # Errors
/// One line that says what is wrong; there is no file then.
pub async fn backup(file: &Path, config: &Config, out: &mut impl Write) -> anyhow::Result<()> {
    let StoreConfig::Sqlite { path, .. } = &config.store else {
        bail!(
            "DATABASE_URL: a PostgreSQL database is backed up by pg_dump, beside any number of servers"
        );
    };
    ensure!(
        file.as_os_str() != "-",
        "a backup is not written to standard output: name a file"
    );
    let named = |error| {
        if let BackupError::Nothing = error {
            return store::absent(&config.store);
        }
        anyhow::Error::new(error).context(format!("DATABASE_URL: {}", path.display()))
    };
    let bytes = sqlite::backup_bytes(path).map_err(named)?;
    let copy = AtomicFile::create(file)?;
    let meter = Meter::new(Instant::now());
    meter.begin("copying bytes", Some(bytes));
    let (from, into) = (path.clone(), copy.path().to_owned());
    let copying = tokio::task::spawn_blocking(move || sqlite::backup(&from, &into));
    let copied = show(&meter, watch_size(copy.path(), &meter, copying))
        .await?
        .map_err(named)?;
    copy.keep()?;
    let sqlite::Copied {
        bytes,
        users,
        prompts,
    } = copied;
    writeln!(
        out,
        "copied {users} users and {prompts} prompts, {bytes} bytes, checked and whole"
    )?;
    Ok(())
}

/// Waits for `work` and shows the size of the growing file on the meter.
async fn watch_size<T>(file: &Path, meter: &Meter, work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    loop {
        tokio::select! {
            done = &mut work => return done,
            _ = ticks.tick() => meter.reached(std::fs::metadata(file).map_or(0, |found| found.len())),
        }
    }
}
