//! One PostgreSQL server a test run. Found or started under a file lock; a watcher ends it and removes
//! its folder when the run's process (nextest or cargo) has ended.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sea_orm::{ConnectOptions, ConnectionTrait};

/// Where the run's server listens.
pub(super) struct Server {
    folder: PathBuf,
}

/// The run's server, started if need be.
pub(super) fn shared() -> Server {
    let run = std::os::unix::process::parent_id();
    let folder = PathBuf::from(format!("/tmp/fractus-postgres-{run}-{}", start_time(run)));
    let _lock = lock(&folder);
    if !folder.join("ready").exists() {
        start(&folder, run);
    }
    Server { folder }
}

/// Held while the template is made: whoever comes meanwhile waits.
pub(super) struct Template {
    marker: PathBuf,
    _lock: File,
}

impl Template {
    pub(super) fn finish(self) {
        let marked = fs::write(&self.marker, "");
        marked.unwrap_or_else(|error| panic!("{}: {error}", self.marker.display()));
    }
}

fn lock(folder: &Path) -> File {
    let lock =
        File::create(folder.with_extension("lock")).and_then(|file| file.lock().map(|()| file));
    lock.unwrap_or_else(|error| panic!("locking {}: {error}", folder.display()))
}

impl Server {
    pub(super) fn url(&self, database: &str) -> String {
        format!(
            "postgres://postgres@localhost/{database}?host={}",
            self.folder.display()
        )
    }

    /// The right to make the database that the others are copied from; `None`: it is there.
    pub(super) fn begin_template(&self) -> Option<Template> {
        let marker = self.folder.join("template");
        let lock = lock(&self.folder);
        (!marker.exists()).then_some(Template {
            marker,
            _lock: lock,
        })
    }

    pub(super) async fn create_database(&self, name: &str, template: Option<&str>) {
        let template = template.map_or(String::new(), |name| format!(" TEMPLATE {name}"));
        self.execute(&[format!("CREATE DATABASE {name}{template}")])
            .await;
    }

    /// Copies a database that is in use: those who use it are cut off, and connect again.
    pub(super) async fn copy_database(&self, original: &str, copy: &str) {
        self.execute(&[
            format!("ALTER DATABASE {original} ALLOW_CONNECTIONS false"),
            format!(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{original}'"
            ),
            format!("CREATE DATABASE {copy} TEMPLATE {original}"),
            format!("ALTER DATABASE {original} ALLOW_CONNECTIONS true"),
        ])
        .await;
    }

    async fn execute(&self, statements: &[String]) {
        let mut options = ConnectOptions::new(self.url("postgres"));
        options.max_connections(1).sqlx_logging(false);
        let done = async {
            let connection = sea_orm::Database::connect(options).await?;
            for statement in statements {
                connection.execute_unprepared(statement).await?;
            }
            connection.close().await
        };
        if let Err(error) = done.await {
            panic!(
                "PostgreSQL of the tests in {}: {statements:?}: {error}",
                self.folder.display()
            );
        }
    }
}

fn start(folder: &Path, run: u32) {
    let _ = fs::remove_dir_all(folder);
    let programs = programs();
    fs::create_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let open_to_all = fs::Permissions::from_mode(0o777);
    let opened = fs::set_permissions(folder, open_to_all);
    opened.unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let script = format!(
        r#"set -e
        {programs}/initdb -D {folder}/data -U postgres -A trust -E UTF8 --locale=C.UTF-8 --no-sync
        {programs}/pg_ctl -D {folder}/data -w -t 60 -l {folder}/log start -o "-c listen_addresses= \
         -c unix_socket_directories={folder} -c fsync=off -c max_connections=400 \
         -c shared_buffers=32MB""#,
        programs = programs.display(),
        folder = folder.display(),
    );
    let started = unprivileged(&script).stdin(Stdio::null()).output();
    match started {
        Ok(output) if output.status.success() => {}
        Ok(output) => panic!(
            "PostgreSQL did not start: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        ),
        Err(error) => panic!("PostgreSQL did not start: {error}"),
    }
    watch(folder, run, &programs);
    let ready = fs::write(folder.join("ready"), "");
    ready.unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
}

/// Ends the server and removes the folder once the run has ended. In a session of its own, so that a
/// signal to the tests' process group does not end the watcher first.
fn watch(folder: &Path, run: u32, programs: &Path) {
    let script = format!(
        "trap '' HUP INT TERM; tail --pid={run} -f /dev/null; \
         {programs}/pg_ctl -D {folder}/data -m immediate stop; rm -rf {folder}",
        programs = programs.display(),
        folder = folder.display(),
    );
    let mut command = Command::new("setsid");
    command.arg("sh").arg("-c");
    if is_root() {
        command.arg(format!(
            "trap '' HUP INT TERM; setpriv --reuid=postgres --regid=postgres --clear-groups sh -c \
             \"{script}\"; rm -rf {folder} {folder}.lock",
            folder = folder.display()
        ));
    } else {
        command.arg(format!("{script} {}.lock", folder.display()));
    }
    let spawned = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    if let Err(error) = spawned {
        panic!("watching over PostgreSQL: {error}");
    }
}

/// PostgreSQL refuses to run as root.
fn unprivileged(script: &str) -> Command {
    if is_root() {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]);
        command.args(["sh", "-c", script]);
        command
    } else {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }
}

fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    fs::metadata("/proc/self").is_ok_and(|metadata| metadata.uid() == 0)
}

/// Debian keeps them outside PATH, in a folder a version.
fn programs() -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten();
    let newest = versions
        .map(|entry| entry.path().join("bin"))
        .filter(|bin| bin.join("initdb").exists())
        .max();
    newest.unwrap_or_else(|| panic!("PostgreSQL is not installed: run scripts/setup"))
}

/// Field 22 of /proc/PID/stat: tells a process from a later one with the same id.
fn start_time(pid: u32) -> String {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    after_name
        .split_whitespace()
        .nth(19)
        .unwrap_or("0")
        .to_owned()
}
