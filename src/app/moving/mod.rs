//! The operator's commands that move data: `backup`, `export`, `import` and `move`.

mod carry;
mod draft;
mod held;
mod input;
mod progress;

use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, anyhow, bail, ensure};

use self::draft::Draft;
use self::held::{Held, alone};
use self::progress::show;
use super::store::{self, Store};
use crate::cli::{ExportArgs, ImportArgs, SecretUrl};
use crate::config::{Config, Secret, StoreConfig};
use crate::domain::Timestamp;
use crate::embed::{BackgroundEmbedder, Engine};
use crate::interchange::{self, Options, Writer};
use crate::services::moving::export::export as write_rows;
use crate::services::moving::import::{Counts, Embedding, Import, Report};
use crate::services::moving::source::Source;
use crate::services::moving::{Fault, Meter};
use crate::store::old_system::OldSystem;
use crate::store::sqlite::{self, BackupError};

pub use self::carry::carry;

/// How often the growing copy is looked at.
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
    let (draft, _) = Draft::of(file)?;
    let meter = Meter::new(Instant::now());
    meter.begin("copying bytes", Some(bytes));
    let (from, into) = (path.clone(), draft.path().to_owned());
    let copying = tokio::task::spawn_blocking(move || sqlite::backup(&from, &into));
    let copied = show(&meter, watch_size(draft.path(), &meter, copying))
        .await?
        .map_err(named)?;
    draft.keep()?;
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

/// Waits for `work` and tells the meter how large the file has grown meanwhile.
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
            let (draft, handle) = Draft::of(file)?;
            let counts = write_export(store, BufWriter::new(handle), options).await?;
            draft.keep()?;
            writeln!(out, "exported {}", both(counts))?;
        }
        Some(_) | None => {
            write_export(store, BufWriter::new(out), options).await?;
        }
    }
    Ok(())
}

async fn write_export(store: &Store, out: impl Write, options: Options) -> anyhow::Result<Counts> {
    let meter = Meter::new(Instant::now());
    let last = store.bulk.last_ids().await?;
    let mut writer = Writer::begin(out, options, last, Timestamp::now())?;
    let writing = write_rows(&*store.accounts, &*store.bulk, last, &mut writer, &meter);
    let counts = show(&meter, writing).await?;
    writer.finish()?;
    Ok(counts)
}

/// Takes users and prompts of a file, or of the old system, into the store. The server must be
/// stopped.
///
/// # Errors
/// One line that says what is wrong. What was imported until then stays, and the same command goes
/// on from there.
pub async fn import(
    arguments: ImportArgs,
    config: &Config,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let mut source = open_source(&arguments).await?;
    let engine = Arc::new(super::preflight::load_engine(config)?);
    let (store, sole) = if arguments.dry_run && !store::is_there(&config.store).await? {
        (Held::open_temporary(engine.dimension()).await?, None)
    } else {
        Held::open(&config.store, engine.dimension()).await?
    };
    let meter = Meter::new(Instant::now());
    let import = Import {
        accounts: &*store.store.accounts,
        prompts: &*store.store.prompts,
        bulk: &*store.store.bulk,
        max_prompt_chars: config.max_prompt_chars,
        meter: &meter,
    };
    let work = take_in(&arguments, engine, import, &mut *source, out);
    let done = alone(sole, work).await;
    store.store.close().await;
    done
}

async fn take_in(
    arguments: &ImportArgs,
    engine: Arc<Engine>,
    import: Import<'_>,
    source: &mut dyn Source,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let planned = show(import.meter, import.check(source)).await?;
    // Whether anybody reads on does not decide whether rows are imported.
    let _ = tell_plan(&planned, out);
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
    let embedders = (0..cores)
        .map(|_| BackgroundEmbedder::start(Arc::clone(&engine)))
        .collect::<std::io::Result<Vec<_>>>()?;
    let embedding = Embedding {
        embedders: &embedders,
        model: engine.model_id(),
        dimension: engine.dimension(),
    };
    let began = Instant::now();
    let done = show(
        import.meter,
        import.run(source, embedding, planned.new.prompts),
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

fn tell_plan(planned: &Report, out: &mut impl Write) -> std::io::Result<()> {
    writeln!(out, "to import: {}", both(planned.new))?;
    if planned.present != Counts::default() {
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
    for Fault { place, problem } in &planned.first_faults {
        writeln!(out, "fault: {place}: {problem}")?;
    }
    let more = planned.faults - planned.first_faults.len() as u64;
    if more > 0 {
        writeln!(out, "and {more} further faults")?;
    }
    Ok(())
}

fn both(counts: Counts) -> String {
    format!("{} users, {} prompts", counts.users, counts.prompts)
}

fn faults(number: u64) -> String {
    match number {
        1 => "1 row cannot be imported".to_owned(),
        number => format!("{number} rows cannot be imported"),
    }
}

async fn open_source(arguments: &ImportArgs) -> anyhow::Result<Box<dyn Source>> {
    if let Some(url) = secret_url(arguments.old_system())? {
        let old = OldSystem::open(&url, arguments.model.clone()).await?;
        return Ok(Box::new(old));
    }
    let Some(file) = &arguments.file else {
        bail!("name a file, or the old system's database with --from");
    };
    let reader = input::open(file)
        .and_then(|opened| Ok(interchange::Reader::new(opened)?))
        .with_context(|| format!("{} cannot be imported", file.display()))?;
    Ok(Box::new(reader))
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
