//! The program itself, as an operator runs it: settings it takes and refuses, and commands beside a
//! running service.

use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use prompt_service::config::StoreConfig;
use serde_json::json;

use crate::support::{
    App, Folder, PASSWORD, skipped_on_postgres, spawn_app, spawn_app_in, try_spawn_app_in,
};

/// The program in that working directory, with nothing in its environment.
fn program(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_prompt-service"));
    command.args(arguments).current_dir(folder).env_clear();
    command
}

/// What it writes to standard error, having failed.
fn complaint(output: &Output) -> String {
    assert!(!output.status.success(), "{output:?}");
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn only_the_env_file_of_the_working_directory_is_read() {
    let outer = tempfile::tempdir().unwrap();
    let inner = outer.path().join("inner");
    std::fs::create_dir(&inner).unwrap();
    std::fs::write(outer.path().join(".env"), "BIND_ADDR=nonsense\n").unwrap();
    let from = |folder: &Path| program(folder, &["openapi"]).output().unwrap();
    assert!(complaint(&from(outer.path())).contains("BIND_ADDR: "));
    let below = from(&inner);
    assert!(below.status.success(), "{below:?}");
}

#[test]
fn an_empty_variable_counts_as_unset() {
    let folder = tempfile::tempdir().unwrap();
    let help = program(folder.path(), &["--help"]).output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    assert!(!help.contains("not served by this version"), "{help}");
    let mut command = program(
        folder.path(),
        &["user", "create", "alice", "--email", "a@b.c", "--init"],
    );
    let names = help.split("[env: ").skip(1);
    let names: Vec<&str> = names.filter_map(|rest| rest.split('=').next()).collect();
    assert!(names.contains(&"METRICS_ADDR") && names.contains(&"OPENAI_FALLBACK"));
    for name in names {
        command.env(name, "");
    }
    for name in ["SECRET_KEY", "DATABASE_URL", "REDIS_URL", "OPENAI_API_KEY"] {
        command.env(name, "").env(format!("{name}_FILE"), "");
    }
    command
        .env("PASSWORD_HERE", PASSWORD)
        .args(["--password-env", "PASSWORD_HERE"]);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(folder.path().join("data/prompt-service.sqlite3").is_file());
}

#[test]
fn a_secret_that_is_no_text_stops_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = program(folder.path(), &["user", "list"]);
    command.env("SECRET_KEY", OsStr::from_bytes(b"hunter2 \xff"));
    let told = complaint(&command.output().unwrap());
    assert!(told.contains("SECRET_KEY: "), "{told}");
    assert!(!told.contains("hunter2"), "{told}");
}

#[tokio::test]
async fn one_server_uses_a_database_file_whatever_its_data_folder() {
    if skipped_on_postgres("PostgreSQL's lock has tests of its own") {
        return;
    }
    let app = spawn_app(|_| ()).await;
    let StoreConfig::Sqlite { path: file, .. } = app.folder.store_config().await else {
        panic!("the store is no file");
    };
    let at_same_file = |config: &mut prompt_service::config::Config| {
        config.store = StoreConfig::Sqlite {
            data_dir: config.store.data_dir().to_owned(),
            path: file.clone(),
        };
    };
    let other = Folder::new();
    let refused = try_spawn_app_in(other.clone(), at_same_file).await.err();
    let refused = format!("{:#}", refused.unwrap());
    assert!(refused.starts_with("DATABASE_URL: "), "{refused}");
    let made = std::fs::read_dir(other.path()).unwrap().count();
    assert_eq!(made, 0, "a start that is refused makes no lock");
    assert!(!refused.contains('\n'), "{refused}");
    let _folder = app.stop().await;
    spawn_app_in(Folder::new(), at_same_file).await;
}

/// `user set-password alice` beside the app, waiting for the password.
async fn set_password(app: &App) -> Child {
    let mut command = program(app.folder.path(), &["user", "set-password", "alice"]);
    match app.folder.store_config().await {
        StoreConfig::Sqlite { data_dir, .. } => command.env("DATA_DIR", data_dir),
        StoreConfig::Postgres { url, .. } => command.env("DATABASE_URL", url.expose()),
    };
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

#[tokio::test]
async fn credentials_given_while_the_operator_types_a_new_password_end_too() {
    let app = spawn_app(|_| ()).await;
    app.user("alice").await;
    let mut command = set_password(&app).await;
    // The operator takes a while; what is given meanwhile is dated a second later than the
    // command's start at least.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let (access, refresh) = app.login("alice").await;
    let mut typed = command.stdin.take().unwrap();
    typed.write_all(b"another password\n").unwrap();
    drop(typed);
    let done = tokio::task::spawn_blocking(move || command.wait_with_output());
    let done = done.await.unwrap().unwrap();
    assert!(done.status.success(), "{done:?}");
    let body = json!({ "refresh": refresh });
    let answer = app.post("/api/auth/refresh/").json(&body).send().await;
    assert_eq!(answer.status, 401, "{answer:?}");
    eventually!(app.get("/api/auth/me/").bearer(&access).send().await.status == 401);
    assert_eq!(app.try_login("alice", PASSWORD).await.status, 401);
    let answer = app.try_login("alice", "another password").await;
    assert_eq!(answer.status, 200);
}
