//! `export`: users and prompts as JSON lines, also while a server uses the store.

use std::io::{BufWriter, Write};
use std::time::Instant;

use super::super::store::{self, Store};
use super::atomic_file::AtomicFile;
use super::both;
use super::progress::show;
use crate::cli::ExportArgs;
use crate::config::Config;
use crate::domain::Timestamp;
use crate::transfer::json_lines::{Options, Writer};
use crate::transfer::{Meter, RowCounts, export as write_rows};

/// Writes users and prompts as JSON lines, also while a server uses the store.
///
/// # Errors
/// One line that says what is wrong; there is no file then.
pub async fn export(
    arguments: ExportArgs,
    config: &Config,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    store::find(&config.store).await?;
    let store = Store::open(&config.store, None).await?;
    let done = export_from(&store, &arguments, out).await;
    store.close().await;
    done
}

async fn export_from(
    store: &Store,
    arguments: &ExportArgs,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let options = Options {
        password_hashes: arguments.with_password_hashes,
        embeddings: arguments.with_embeddings,
    };
    match &arguments.file {
        Some(file) if file.as_os_str() != "-" => {
            let file = AtomicFile::create(file)?;
            let counts = write_export(store, BufWriter::new(file.file()), options).await?;
            file.keep()?;
            writeln!(out, "exported {}", both(counts))?;
        }
        Some(_) | None => {
            write_export(store, BufWriter::new(out), options).await?;
        }
    }
    Ok(())
}

async fn write_export(
    store: &Store,
    out: impl Write,
    options: Options,
) -> anyhow::Result<RowCounts> {
    let meter = Meter::new(Instant::now());
    let last = store.bulk.last_ids().await?;
    let mut writer = Writer::begin(out, options, last, Timestamp::now())?;
    let writing = write_rows(&*store.bulk, last, &mut writer, &meter);
    let counts = show(&meter, writing).await?;
    writer.finish()?;
    Ok(counts)
}
