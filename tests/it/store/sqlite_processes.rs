//! Several processes on one file: killed, racing, without room, without permission. The children
//! are this test binary, started again with a variable that names their role.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::{env, fs};

use prompt_service::domain::{Prompt, PromptId, PromptStatus, UserId};
use prompt_service::store::sqlite::{OpenOptions, SqliteStore};
use prompt_service::store::{Error, PromptStore};
use rusqlite::Connection;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

use crate::store::sqlite::{assert_sound, open_in, prompt_is_in_file};
use crate::store::{InsertPrompt, embedded, list_users, model, user};
use crate::support::DEADLINE;

const ROLE: &str = "STORE_TEST_ROLE";
const FOLDER: &str = "STORE_TEST_FOLDER";

/// The entry of the children. Without a role this is not a child, and there is nothing to do.
#[test]
fn child_process() {
    let Ok(role) = env::var(ROLE) else { return };
    let folder = env::var(FOLDER).unwrap();
    let folder = Path::new(&folder);
    match role.as_str() {
        "open" => {
            let opened = SqliteStore::open(&folder.join("test.db"), OpenOptions::default());
            say(&opened.map_or_else(|error| format!("{error:?}"), |_| "opened".to_owned()));
        }
        "insert until killed" => block_on(insert_until_killed(folder)),
        "create 200 users" => block_on(create_200_users(folder)),
        "insert until full" => block_on(insert_until_full(folder)),
        role => panic!("unknown role {role}"),
    }
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    Runtime::new().unwrap().block_on(work)
}

/// One line to the parent, past the test harness's own output.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "\nsays {line}").unwrap();
    out.flush().unwrap();
}

/// The child's lines, without the test harness's.
fn said(child: &mut Child) -> impl Iterator<Item = String> + use<> {
    let out: ChildStdout = child.stdout.take().unwrap();
    let lines = BufReader::new(out).lines();
    lines.filter_map(|line| Some(line.ok()?.strip_prefix("says ")?.to_owned()))
}

const CHILD_ARGUMENTS: [&str; 3] = [
    "--exact",
    "store::sqlite_processes::child_process",
    "--nocapture",
];

fn start(mut command: Command, role: &str, folder: &Path) -> Child {
    command
        .env(ROLE, role)
        .env(FOLDER, folder)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn start_child(role: &str, folder: &Path) -> Child {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(CHILD_ARGUMENTS);
    start(command, role, folder)
}

async fn insert_until_killed(folder: &Path) {
    let store = Arc::new(open_in(folder, OpenOptions::default()));
    let owner = list_users(&*store, None, 1).await[0].id;
    let mut tasks = JoinSet::new();
    for _ in 0..16 {
        let store = Arc::clone(&store);
        tasks.spawn(async move {
            loop {
                let new = embedded(owner, &"text ".repeat(100), 1);
                say(&store.insert_prompt(new).await.unwrap().id.to_string());
            }
        });
    }
    tasks.join_all().await;
}

#[test]
fn every_acknowledged_prompt_survives_kill_9() {
    let folder = tempfile::tempdir().unwrap();
    let owner = block_on(async {
        let store = open_in(folder.path(), OpenOptions::default());
        let owner = user(&store, "alice").await.id;
        store.close().await;
        owner
    });
    let mut acknowledged = Vec::new();
    for round in 1..=5 {
        let mut child = start_child("insert until killed", folder.path());
        let mut lines = said(&mut child);
        let id = |line: String| PromptId(line.parse().unwrap());
        acknowledged.extend(lines.by_ref().take(40 * round).map(id));
        child.kill().unwrap();
        // What it had reported before it died counts too.
        acknowledged.extend(lines.map(id));
        child.wait().unwrap();

        assert!(
            acknowledged.len() >= 40 * round,
            "the child was killed at work"
        );
        let file = Connection::open(folder.path().join("test.db")).unwrap();
        for id in &acknowledged {
            assert!(
                prompt_is_in_file(&file, *id),
                "{id} was acknowledged and is gone"
            );
        }
        drop(file);
        assert_sound(folder.path());
        assert_whole(folder.path(), owner);
    }
}

/// Each completed prompt has its vector, and the counters agree.
fn assert_whole(folder: &Path, owner: UserId) {
    block_on(async {
        let store = open_in(folder, OpenOptions::default());
        let prompts = store
            .list_prompts(owner, None, usize::MAX, usize::MAX)
            .await
            .unwrap()
            .prompts;
        let vectors = store
            .vectors(&model("a"), None, None, usize::MAX)
            .await
            .unwrap();
        // A call that was killed in its midst is running, without a vector.
        let completed = |prompt: &&Prompt| prompt.status == PromptStatus::Completed;
        let completed = prompts.iter().filter(completed).count() as u64;
        assert_eq!(completed, vectors.ids.len() as u64);
        let covered = store.coverage(&model("a"), Some(owner)).await.unwrap();
        assert_eq!(
            (covered.embedded, covered.completed),
            (completed, completed)
        );
        store.close().await;
    });
}

/// Options for a store that shares its file with busy processes: it waits for its turn.
fn patient() -> OpenOptions {
    OpenOptions {
        busy_timeout: DEADLINE,
        ..OpenOptions::default()
    }
}

async fn create_200_users(folder: &Path) {
    let store = open_in(folder, patient());
    for n in 0..200 {
        user(&store, &format!("{}-{n}", std::process::id())).await;
    }
    store.close().await;
    say("done");
}

#[test]
fn another_process_can_write_beside_a_busy_store() {
    let folder = tempfile::tempdir().unwrap();
    block_on(async {
        let store = Arc::new(open_in(folder.path(), patient()));
        let alice = user(&*store, "alice").await.id;
        let mut tasks = JoinSet::new();
        for _ in 0..8 {
            let store = Arc::clone(&store);
            tasks.spawn(async move {
                loop {
                    store.insert_prompt(embedded(alice, "p", 1)).await.unwrap();
                }
            });
        }
        let children: Vec<_> = (0..2)
            .map(|_| start_child("create 200 users", folder.path()))
            .collect();
        for mut child in children {
            let (status, lines) = tokio::task::spawn_blocking(move || {
                let lines: Vec<_> = said(&mut child).collect();
                (child.wait().unwrap(), lines)
            })
            .await
            .unwrap();
            assert!(status.success());
            assert_eq!(lines, ["done"]);
        }
        tasks.shutdown().await;
        assert_eq!(list_users(&*store, None, 999).await.len(), 401);
        assert_eq!(store.stats().failed_batches, 0);
        store.close().await;
    });
    assert_sound(folder.path());
}

#[test]
fn processes_that_open_a_new_file_at_once_all_succeed() {
    for _ in 0..3 {
        let folder = tempfile::tempdir().unwrap();
        let children: Vec<_> = (0..6).map(|_| start_child("open", folder.path())).collect();
        for mut child in children {
            assert_eq!(said(&mut child).collect::<Vec<_>>(), ["opened"]);
            assert!(child.wait().unwrap().success());
        }
        assert_sound(folder.path());
    }
}

async fn insert_until_full(folder: &Path) {
    let store = open_in(folder, OpenOptions::default());
    let owner = user(&store, "alice").await.id;
    let text = "x".repeat(50_000);
    let mut stored = 0;
    // After a refusal the log is emptied, which may make room for a few more writes.
    let mut refused_in_a_row = 0;
    while refused_in_a_row < 3 {
        match store.insert_prompt(embedded(owner, &text, 1)).await {
            Ok(_) => {
                stored += 1;
                refused_in_a_row = 0;
            }
            Err(Error::Unavailable(_)) => refused_in_a_row += 1,
            Err(error) => panic!("{error:?}"),
        }
    }
    let listed = store
        .list_prompts(owner, None, usize::MAX, usize::MAX)
        .await
        .unwrap()
        .prompts;
    assert_eq!(listed.len(), stored);
    let pid = std::process::id().to_string();
    let raised = Command::new("prlimit")
        .args(["--fsize=unlimited:", "--pid", &pid])
        .status();
    assert!(raised.unwrap().success());
    for _ in 0..stored {
        store
            .insert_prompt(embedded(owner, &text, 1))
            .await
            .unwrap();
    }
    store.close().await;
    say(&format!("stored {stored} and again"));
}

#[test]
fn full_disk_loses_no_acknowledged_write() {
    let folder = tempfile::tempdir().unwrap();
    // A limit on the size of files, with its signal ignored, makes `write` fail half way, as a full
    // disk does.
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' XFSZ; ulimit -S -f 8192; exec \"$@\"", "sh"]);
    command
        .arg(env::current_exe().unwrap())
        .args(CHILD_ARGUMENTS);
    let mut child = start(command, "insert until full", folder.path());
    let lines: Vec<_> = said(&mut child).collect();
    assert!(child.wait().unwrap().success());
    let stored = match &lines[..] {
        [line] => line.split(' ').nth(1).and_then(|n| n.parse::<usize>().ok()),
        _ => None,
    };
    let stored = stored.unwrap_or_else(|| panic!("the child said {lines:?}"));
    assert!(stored > 0);
    assert_sound(folder.path());
    block_on(async {
        let store = open_in(folder.path(), OpenOptions::default());
        let owner = list_users(&store, None, 1).await[0].id;
        let listed = store
            .list_prompts(owner, None, usize::MAX, usize::MAX)
            .await
            .unwrap()
            .prompts;
        assert_eq!(listed.len(), 2 * stored);
    });
}

/// The reports of a process without root's rights that opens `test.db` in the folder.
fn opened_without_privileges(folder: &Path) -> Vec<String> {
    // Root may write anywhere. If this is root, the child becomes `nobody`, who needs a copy of the
    // program in a place that it can reach.
    let program = tempfile::tempdir().unwrap();
    let copy = program.path().join("child");
    // Copied by another process: a child that another test starts meanwhile would inherit this
    // one's copy open for writing, and a file that is open for writing cannot be executed.
    let copied = Command::new("cp")
        .arg(env::current_exe().unwrap())
        .arg(&copy)
        .status();
    assert!(copied.unwrap().success());
    fs::set_permissions(program.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new(copy);
    command.args(CHILD_ARGUMENTS).current_dir("/");
    if fs::metadata("/proc/self").unwrap().uid() == 0 {
        command.uid(65_534).gid(65_534);
    }
    let mut child = start(command, "open", folder);
    let lines = said(&mut child).collect();
    child.wait().unwrap();
    lines
}

#[test]
fn unwritable_file_or_folder_is_refused_as_such() {
    let folder = tempfile::tempdir().unwrap();
    let set = |name: &str, mode| {
        let permissions = fs::Permissions::from_mode(mode);
        fs::set_permissions(folder.path().join(name), permissions).unwrap();
    };
    let refused = |lines: Vec<String>| {
        assert!(
            matches!(&lines[..], [line] if line.starts_with("NotWritable")),
            "{lines:?}"
        );
    };
    set("", 0o555);
    refused(opened_without_privileges(folder.path()));
    set("", 0o755);
    block_on(async { open_in(folder.path(), OpenOptions::default()).close().await });
    set("test.db", 0o444);
    refused(opened_without_privileges(folder.path()));
    // A writable file is not enough: the log is beside it.
    set("test.db", 0o666);
    set("", 0o555);
    refused(opened_without_privileges(folder.path()));
    set("", 0o777);
    assert_eq!(opened_without_privileges(folder.path()), ["opened"]);
}
