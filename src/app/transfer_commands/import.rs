//! `import`: users and prompts of a file, or of the old system, enter the store.

use std::fs::File;
use std::io::{Seek, Write, copy, stdin};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail, ensure};

use super::super::preflight::load_engine;
use super::super::store;
use super::exclusive::{ExclusiveStore, unless_taken};
use super::progress::show;
use super::{both, secret_url};
use crate::cli::ImportArgs;
use crate::config::Config;
use crate::embed::{BackgroundEmbedder, Engine};
use crate::store::django::DjangoDatabase;
use crate::transfer::import::{Embedders, Import, Report};
use crate::transfer::source::Source;
use crate::transfer::{Meter, RowCounts, json_lines};

/// Imports the users and prompts of a file, or of the old system. The server must be stopped.
///
/// # Errors
/// One line that says what is wrong. What was imported until then stays, and the same command
/// continues there.
pub async fn import(
    arguments: ImportArgs,
    config: &Config,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let mut source = open_source(&arguments).await?;
    let engine = Arc::new(load_engine(config)?);
    let is_trial = arguments.dry_run && !store::is_there(&config.store).await?;
    let mut store = if is_trial {
        ExclusiveStore::open_temporary(engine.dimension()).await?
    } else {
        ExclusiveStore::open(&config.store, engine.dimension()).await?
    };
    let lock = store.lock.take();
    let meter = Meter::new(Instant::now());
    let import = Import {
        accounts: &*store.store.accounts,
        prompts: &*store.store.prompts,
        bulk: &*store.store.bulk,
        max_prompt_chars: config.max_prompt_chars,
        meter: &meter,
    };
    let work = check_and_import(&arguments, engine, import, &mut *source, out);
    let done = unless_taken(lock, work).await;
    store.store.close().await;
    done
}

async fn check_and_import(
    arguments: &ImportArgs,
    engine: Arc<Engine>,
    import: Import<'_>,
    source: &mut dyn Source,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let planned = show(import.meter, import.check(source)).await?;
    // Rows are imported even if the reader of the plan has closed the pipe.
    let _ = write_plan(&planned, out);
    if arguments.dry_run {
        ensure!(planned.faults == 0, "{}", faults(planned.faults));
        return Ok(());
    }
    ensure!(
        planned.faults == 0 || arguments.skip_faulty,
        "{}; nothing was imported. Correct them, or leave them out with --skip-faulty",
        faults(planned.faults)
    );
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = (0..cores)
        .map(|_| BackgroundEmbedder::start(Arc::clone(&engine)))
        .collect::<std::io::Result<Vec<_>>>()?;
    let embedders = Embedders {
        embedders: &threads,
        model: engine.model_id(),
        dimension: engine.dimension(),
    };
    let began = Instant::now();
    let done = show(
        import.meter,
        import.run(source, embedders, planned.new.prompts),
    )
    .await?;
    let seconds = began.elapsed().as_secs_f64();
    writeln!(
        out,
        "imported {} in {seconds:.1} s ({:.0} prompts/s)",
        both(done.new),
        done.new.prompts as f64 / seconds.max(0.001)
    )?;
    Ok(())
}

fn write_plan(planned: &Report, out: &mut impl Write) -> std::io::Result<()> {
    writeln!(out, "to import: {}", both(planned.new))?;
    if planned.present != RowCounts::default() {
        writeln!(out, "here already: {}", both(planned.present))?;
    }
    if planned.lost_passwords > 0 {
        writeln!(
            out,
            "without a password, because theirs is hashed in a way unknown here: {} users; \
             `prompt-service user set-password NAME` gives one a new one",
            planned.lost_passwords
        )?;
    }
    for fault in &planned.first_faults {
        writeln!(out, "fault: {fault}")?;
    }
    let more = planned.faults - planned.first_faults.len() as u64;
    if more > 0 {
        writeln!(out, "and {more} further faults")?;
    }
    Ok(())
}

fn faults(number: u64) -> String {
    match number {
        1 => "1 row cannot be imported".to_owned(),
        number => format!("{number} rows cannot be imported"),
    }
}

async fn open_source(arguments: &ImportArgs) -> anyhow::Result<Box<dyn Source>> {
    if let Some(url) = secret_url(arguments.old_system())? {
        let database = DjangoDatabase::open(&url, arguments.model.clone()).await?;
        return Ok(Box::new(database));
    }
    let Some(file) = &arguments.file else {
        bail!("name a file, or the old system's database with --from");
    };
    let reader = open_file(file)
        .and_then(|opened| Ok(json_lines::Reader::new(opened)?))
        .with_context(|| format!("{} cannot be imported", file.display()))?;
    Ok(Box::new(reader))
}

/// Opens the file; `-` is standard input. An import reads twice, so standard input that is not
/// seekable is copied first, to a temporary file that has no name and ends with the process.
fn open_file(path: &Path) -> anyhow::Result<File> {
    if path.as_os_str() != "-" {
        return Ok(File::open(path)?);
    }
    let mut input = File::from(stdin().as_fd().try_clone_to_owned()?);
    if input.metadata()?.is_file() {
        return Ok(input);
    }
    let mut seekable = tempfile::tempfile()?;
    copy(&mut input, &mut seekable)?;
    seekable.rewind()?;
    Ok(seekable)
}
