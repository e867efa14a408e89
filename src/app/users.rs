//! The operator's commands on accounts. They work on the store directly, also while a server runs.

use std::fs::File;
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context, anyhow, bail, ensure};

use super::store::{self, Store};
use crate::cli::{CreateUserArgs, SecretPlace, UserCommand};
use crate::config::Config;
use crate::credentials::{self, HashPool};
use crate::data_dir::DataDir;
use crate::domain::account::{
    Email, NewAccount, NewPassword, Username, canonical_username, trimmed,
};
use crate::domain::{
    Budget, CLOCK_TOLERANCE, ClientNetwork, Record, RecordCursor, Subject, Timestamp, User, UserId,
};
use crate::store::{AccountStore, BulkStore, Error, NewUser};

/// Accounts read at once for a listing.
const LIST_PAGE: usize = 500;

/// Carries out one command and writes its result to `out`.
///
/// # Errors
/// One line that names the problem.
pub async fn run(
    command: UserCommand,
    config: &Config,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    match command {
        UserCommand::Create(arguments) => {
            let user = create(&arguments, config).await?;
            writeln!(out, "created user {}", user.id)?;
        }
        UserCommand::List => on_store(config, async |store| list(&*store.bulk, out).await).await?,
        UserCommand::Disable { username } => {
            on_store(config, async |store| {
                let store = &*store.accounts;
                let id = find(store, &username).await?.id;
                end_tokens(store, id, async |now| {
                    store.set_active(id, false, now).await
                })
                .await
            })
            .await?;
            writeln!(out, "disabled")?;
        }
        UserCommand::Enable { username } => {
            on_store(config, async |store| {
                let store = &*store.accounts;
                let id = find(store, &username).await?.id;
                store.set_active(id, true, Timestamp::now()).await?;
                Ok(())
            })
            .await?;
            writeln!(out, "enabled")?;
        }
        UserCommand::Budget {
            username,
            amount: None,
        } => {
            on_store(config, async |store| {
                show_budget(store, &username, out).await
            })
            .await?
        }
        UserCommand::Budget {
            username,
            amount: Some(amount),
        } => {
            let budget = match amount.as_str() {
                "off" => None,
                text => Some(
                    text.parse::<Budget>()
                        .map_err(|problem| anyhow!("{problem}"))?,
                ),
            };
            on_store(config, async |store| {
                let id = find(&*store.accounts, &username).await?.id;
                store.usage.set_user_budget(id, budget).await?;
                Ok(())
            })
            .await?;
            match budget {
                Some(budget) => writeln!(out, "budget {budget}")?,
                None => writeln!(out, "no budget")?,
            }
        }
        UserCommand::SetPassword { username, secret } => {
            on_store(config, async |store| {
                set_password(&*store.accounts, &username, &secret).await
            })
            .await?;
            writeln!(out, "password set")?;
        }
    }
    Ok(())
}

/// Does the work on the configured store, which must be there.
pub(super) async fn on_store<T>(
    config: &Config,
    work: impl AsyncFnOnce(&Store) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    store::find(&config.store).await?;
    let store = Store::open(&config.store, None).await?;
    let done = work(&store).await;
    store.close().await;
    done
}

async fn create(arguments: &CreateUserArgs, config: &Config) -> anyhow::Result<User> {
    if !arguments.init {
        let hint = "if it is to be made for a first account, add --init";
        let found = store::find(&config.store).await;
        found.map_err(|error| anyhow!("{error:#}; {hint}"))?;
    }
    // First, so that an invalid account leaves no new store behind.
    let new = new_user(arguments).await?;
    if config.store.is_in_data_dir() {
        DataDir::open(config.store.data_dir())?;
    }
    let store = Store::open(&config.store, None).await?;
    let created = store.accounts.create_user(new).await;
    store.close().await;
    match created {
        Err(Error::UsernameTaken) => bail!("the username is taken"),
        created => Ok(created?),
    }
}

async fn new_user(arguments: &CreateUserArgs) -> anyhow::Result<NewUser> {
    let CreateUserArgs {
        username,
        email,
        hashed,
        secret,
        ..
    } = arguments;
    let (username, email, password_hash) = if *hashed {
        let username = Username::parse(username).map_err(refused("username"))?;
        let email = Email::parse(email).map_err(refused("email"))?;
        let password_hash = read_secret("Password hash: ", secret)?;
        ensure!(
            credentials::is_known_hash(&password_hash),
            "the hash is neither $argon2id$… nor pbkdf2_sha256$…"
        );
        (username, email, password_hash)
    } else {
        let password = read_secret("Password: ", secret)?;
        let account = NewAccount::parse(Ok(username), Ok(email), Ok(&password));
        let account = account.map_err(|errors| {
            let lines = errors
                .into_iter()
                .map(|error| refused(error.field)(error.messages).to_string());
            anyhow!("{}", lines.collect::<Vec<_>>().join("; "))
        })?;
        let password_hash = hash(account.password.as_str()).await?;
        (account.username, account.email, password_hash)
    };
    Ok(NewUser {
        username: username.as_str().to_owned(),
        email: email.as_str().to_owned(),
        password_hash,
        created_at: Timestamp::now(),
    })
}

/// Why the value of a field cannot be used.
fn refused(field: &str) -> impl Fn(Vec<&'static str>) -> anyhow::Error {
    move |messages| anyhow!("{field}: {}", messages.join(" "))
}

async fn list(store: &dyn BulkStore, out: &mut impl Write) -> anyhow::Result<()> {
    let mut after = RecordCursor::Users(None);
    loop {
        let page = store.records(after, LIST_PAGE).await?;
        let Some(last) = page.last() else {
            return Ok(());
        };
        after = last.cursor();
        for record in &page {
            if let Record::User(user) = record {
                let state = if user.is_active { "active" } else { "disabled" };
                let (id, name, email) = (user.id, &user.username, &user.email);
                writeln!(out, "{id}\t{name}\t{email}\t{state}")?;
            }
        }
    }
}

/// Prints an account's budget, and what its calls have spent and reserved in the budget's current
/// period.
async fn show_budget(store: &Store, username: &str, out: &mut impl Write) -> anyhow::Result<()> {
    let id = find(&*store.accounts, username).await?.id;
    let Some(budget) = store.usage.user_budget(id).await? else {
        writeln!(out, "no budget")?;
        return Ok(());
    };
    let first_day = budget.period.first_day(Timestamp::now());
    let spend = store.usage.spend(Subject::User(id), first_day).await?;
    writeln!(out, "budget {budget}")?;
    writeln!(out, "spent {}", spend.settled)?;
    writeln!(out, "reserved {}", spend.reserved)?;
    Ok(())
}

async fn set_password(
    store: &dyn AccountStore,
    username: &str,
    secret: &SecretPlace,
) -> anyhow::Result<()> {
    let user = find(store, username).await?;
    let name = Username::parse(&user.username).map_err(refused("username"))?;
    let password = read_secret("New password: ", secret)?;
    let password = NewPassword::parse(&password, &name).map_err(refused("password"))?;
    let hash = hash(password.as_str()).await?;
    end_tokens(store, user.id, async |now| {
        store.set_password(user.id, &hash, now).await
    })
    .await
}

/// Makes a change that ends all credentials of the account. `change` takes the time from which new
/// tokens are valid.
///
/// A login that read the account just before the change was committed may be dated after the
/// change's own time, and would outlive it. Therefore the change is made twice: the second time is
/// after the first commit, and so after any such login.
async fn end_tokens(
    store: &dyn AccountStore,
    id: UserId,
    change: impl AsyncFn(Timestamp) -> Result<bool, Error>,
) -> anyhow::Result<()> {
    let user = store.user(id).await?.context("there is no such user")?;
    change(user.end_of_tokens(Timestamp::now())).await?;
    let is_there = change(Timestamp::now().plus(CLOCK_TOLERANCE)).await?;
    ensure!(is_there, "there is no such user");
    Ok(())
}

/// The account of that name.
///
/// # Errors
/// One line, if there is none.
pub(super) async fn find(store: &dyn AccountStore, username: &str) -> anyhow::Result<User> {
    let name = canonical_username(username).context("there is no such user")?;
    store
        .user_by_username(&name)
        .await?
        .context("there is no such user")
}

async fn hash(password: &str) -> anyhow::Result<String> {
    let pool = HashPool::start(1, 1)?;
    let operator = ClientNetwork::from(IpAddr::from(Ipv4Addr::LOCALHOST));
    Ok(pool.hash(password.to_owned(), operator).await?)
}

/// Reads the environment variable or the first line of the file that `place` names, else one line
/// of standard input. On a terminal the input is not shown.
fn read_secret(prompt: &str, place: &SecretPlace) -> anyhow::Result<String> {
    let line = if let Some(name) = &place.password_env {
        std::env::var(name)
            .map_err(|_| anyhow!("--password-env: no variable of that name is set"))?
    } else if let Some(path) = &place.password_file {
        let file = File::open(path).context("--password-file: the file cannot be read")?;
        first_line(BufReader::new(file)).context("--password-file: the file cannot be read")?
    } else if std::io::stdin().is_terminal() {
        rpassword::prompt_password(prompt)?
    } else {
        first_line(std::io::stdin().lock())
            .context("the password could not be read from standard input")?
    };
    let secret = trimmed(&line);
    ensure!(!secret.is_empty(), "no password was given");
    // Some shells and editors write one before the text. As a part of the password it would lock
    // its owner out.
    ensure!(
        !secret.starts_with('\u{feff}'),
        "the password begins with a byte order mark (BOM): give it without one"
    );
    Ok(secret.to_owned())
}

fn first_line(mut from: impl BufRead) -> std::io::Result<String> {
    let mut line = String::new();
    from.read_line(&mut line)?;
    Ok(line)
}
