//! The `prompt-service` program: reads the settings, then serves or carries out an operator's command.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use prompt_service::api::Documents;
use prompt_service::app::{App, check, health_check, moving, secret_files, users};
use prompt_service::cli::{self, Cli, Command};
use prompt_service::config::{Config, Secrets};
use prompt_service::telemetry;
use tokio::signal::unix::{SignalKind, signal};

fn main() -> ExitCode {
    // The working directory's and no other: `dotenvy::dotenv` would go on to its parents, which others may write to.
    // A file that cannot be read is as clear a mistake as a setting that cannot.
    // A folder of that name is none: a virtual environment, or what a container's engine makes of a file that is not there.
    let file = Path::new(".env");
    if !file.is_dir()
        && let Err(error) = dotenvy::from_path(file)
        && !error.not_found()
    {
        return fail(&anyhow::anyhow!(
            ".env: cannot be read; each line is NAME=value"
        ));
    }
    let cli = match Cli::read() {
        Ok(cli) => cli,
        Err(error) => match cli::setting_problem(&error) {
            Some(problem) => return fail(&anyhow::Error::msg(problem)),
            // Help, the version, or a command line that makes no sense: clap's own words suit each of them.
            None => error.exit(),
        },
    };
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

/// One line for the operator: the error with its causes.
fn fail(error: &anyhow::Error) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "error: {error:#}");
    ExitCode::FAILURE
}

fn run(cli: Cli) -> anyhow::Result<()> {
    let command = cli.command.unwrap_or(Command::Serve);
    if let Command::Openapi = command {
        return Ok(std::io::stdout().write_all(&Documents::make().json)?);
    }
    if let Command::Health { ready } = command {
        return health_check::run(cli.settings.bind_addr, ready);
    }
    if let Command::Secrets { folder, files } = command {
        return secret_files::run(&folder, &files, |name| std::env::var_os(name));
    }
    let (log_format, directives) = (cli.settings.log_format, cli.settings.rust_log.clone());
    let variable = |name: &str| std::env::var_os(name);
    let fallbacks = cli.settings.upstream.openai_fallback.clone();
    let config = Secrets::read(variable).and_then(|mut secrets| {
        if let Some(fallbacks) = &fallbacks {
            secrets.read_fallback_keys(fallbacks, variable)?;
        }
        Config::load(cli.settings, secrets)
    });
    let runtime = tokio::runtime::Runtime::new().context("the runtime cannot be started")?;
    let out = &mut std::io::stdout();
    if let Command::Check = command {
        return runtime.block_on(check::run(config, out));
    }
    let config = config?;
    match command {
        Command::User(command) => runtime.block_on(users::run(command, &config, out)),
        Command::Backup { file } => runtime.block_on(moving::backup(&file, &config, out)),
        Command::Export(arguments) => runtime.block_on(moving::export(arguments, &config, out)),
        Command::Move(arguments) => runtime.block_on(moving::carry(arguments, &config, out)),
        Command::Import(arguments) => runtime.block_on(moving::import(arguments, &config, out)),
        Command::Serve
        | Command::Openapi
        | Command::Health { .. }
        | Command::Secrets { .. }
        | Command::Check => {
            telemetry::init_logging(log_format, &directives).map_err(anyhow::Error::msg)?;
            runtime.block_on(async {
                let (mut terminate, mut interrupt) = (
                    signal(SignalKind::terminate())?,
                    signal(SignalKind::interrupt())?,
                );
                let app = App::build(config).await?;
                app.serve(async {
                    tokio::select! {
                        _ = terminate.recv() => {}
                        _ = interrupt.recv() => {}
                    }
                })
                .await
            })
        }
    }
}
