//! `fractus host drain`: all servers of a host are asked to go, and followed together. How many go at once is the
//! controller's to say.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::ProgressBar;
use serde_json::Value;

use super::{host, migration, path_segment, query_value, server};
use crate::cli::CliError;
use crate::cli::output::Output;
use crate::cli::session::{Service, Session};

#[derive(Debug, Args)]
pub struct Drain {
    /// Name or id
    host: String,
    /// Longest wait for one server, from when its turn has come
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    timeout: u64,
}

/// How often a server is asked to go that has not come anywhere.
const TRIES: u32 = 3;
/// How often, where the cloud says that it cannot go now (409).
const CONFLICTS: u32 = 10;
/// Between two looks at all, and before who was busy is asked again: both grow.
const SOON: Duration = Duration::from_millis(50);
const AGAIN: Duration = Duration::from_millis(250);
const LONGEST_LOOK: Duration = Duration::from_secs(1);
const LONGEST_AGAIN: Duration = Duration::from_secs(10);

/// A server that is to leave.
struct Leaving {
    id: String,
    /// For people: which of them it is, its id and name.
    shown: String,
    stage: Stage,
    tries: u32,
    conflicts: u32,
    /// How long it is waited for before it is asked again.
    pause: Duration,
    /// Since when it is busy, or on its way.
    since: Instant,
    /// Said of it already.
    said: Option<String>,
    /// Bytes that are elsewhere, of how many.
    progress: Option<(u64, u64)>,
}

/// How far it is.
enum Stage {
    /// It is to be asked to go, not before that.
    Ask(Instant),
    /// Its newest migration is looked at; whether its guest is stopped.
    Goes(bool),
    Left,
    Stays,
}

impl Leaving {
    /// One of how many.
    fn new(server: &Value, (n, count): (usize, usize)) -> Self {
        let id = text(server, "id").to_owned();
        Self {
            shown: format!("{n} of {count}: {id} ({})", text(server, "name")),
            id,
            stage: Stage::Ask(Instant::now()),
            tries: 0,
            conflicts: 0,
            pause: AGAIN,
            since: Instant::now(),
            said: None,
            progress: None,
        }
    }

    fn is_over(&self) -> bool {
        matches!(self.stage, Stage::Left | Stage::Stays)
    }

    /// Later, and for longer each time.
    fn again(&mut self) {
        self.stage = Stage::Ask(Instant::now() + self.pause);
        self.pause = (self.pause * 2).min(LONGEST_AGAIN);
    }
}

/// What the server is now, to one that is to go.
enum Now {
    Runs,
    /// Its guest is.
    Stopped,
    /// It is on its way already.
    Going,
    /// Something else is done to it.
    Busy(String),
    /// Nobody asks it to go.
    Stays(String),
    /// It is elsewhere, or nowhere.
    Gone,
}

impl Now {
    fn of(server: &Value) -> Self {
        let status = text(server, "status");
        let task = text(server, "OS-EXT-STS:task_state");
        match status {
            "MIGRATING" => Self::Going,
            _ if !task.is_empty() => Self::Busy(task.to_owned()),
            "BUILD" | "REBOOT" | "HARD_REBOOT" | "REBUILD" | "RESIZE" | "REVERT_RESIZE" => {
                Self::Busy(status.to_owned())
            }
            "ACTIVE" | "PAUSED" => Self::Runs,
            "SHUTOFF" => Self::Stopped,
            "DELETED" => Self::Gone,
            _ => Self::Stays(format!("is {status}, and stays")),
        }
    }
}

/// One host that is drained.
struct Draining<'a> {
    name: String,
    timeout: Duration,
    session: &'a Session,
    output: &'a Output,
    /// Of all; what is said meanwhile goes above it.
    bar: Mutex<Option<ProgressBar>>,
}

impl Drain {
    /// Servers that cannot go are named, and stay.
    pub async fn execute(self, session: &Session, output: &Output) -> Result<(), CliError> {
        let (id, name) = host::find(&self.host, session).await?;
        host::set_enabled(&id, Some("it is drained"), session).await?;
        let draining = Draining {
            name,
            timeout: Duration::from_secs(self.timeout),
            session,
            output,
            bar: Mutex::default(),
        };
        draining.run().await
    }
}

impl Draining<'_> {
    async fn run(&self) -> Result<(), CliError> {
        let path = format!(
            "/servers/detail?all_tenants=1&host={}",
            query_value(&self.name)
        );
        let mut all: Vec<Leaving> = Vec::new();
        // What comes here, and was not waited for any longer.
        let mut late = BTreeSet::new();
        let mut is_last = false;
        loop {
            let servers = self.session.list(Service::Compute, &path, "servers");
            let (servers, before) = (servers.await?, all.len());
            let is_known = |server: &&Value| all.iter().any(|it| it.id == text(server, "id"));
            let new: Vec<&Value> = servers.iter().filter(|it| !is_known(it)).collect();
            let count = new.len();
            let numbered = new.into_iter().zip(1..);
            all.extend(numbered.map(|(server, n)| Leaving::new(server, (n, count))));
            let is_quiet = all.len() == before;
            self.leave(&mut all, &servers).await?;
            // What was on its way here when the host was disabled arrives all the same: it is in the list that is asked for
            // after it has.
            let arrived = self.arrivals(&mut late).await?;
            match is_quiet && !arrived {
                true if is_last => break,
                quiet => is_last = quiet,
            }
        }
        let kept = self.kept_disks().await?;
        // What came late was asked to go as well.
        late.retain(|id| !all.iter().any(|one| one.id == *id));
        let stay = all.iter().filter(|one| matches!(one.stage, Stage::Stays));
        let stay = stay.count() + late.len();
        if stay + kept == 0 {
            return Ok(());
        }
        Err(CliError::NotEmpty {
            host: self.name.clone(),
            reason: format!(
                "{stay} of its {} servers are there still, and disks of {kept} others",
                all.len() + late.len()
            ),
        })
    }

    /// Until each has left, or stays. They are as this list says when they are asked first.
    async fn leave(&self, all: &mut [Leaving], servers: &[Value]) -> Result<(), CliError> {
        let spinner = self.output.spinner(&format!("draining {}", self.name));
        *self.bar() = Some(spinner);
        let mut pause = SOON;
        let mut listed = Some(servers);
        let ended = async {
            loop {
                for one in all.iter_mut() {
                    let known =
                        listed.and_then(|all| all.iter().find(|it| text(it, "id") == one.id));
                    self.turn(one, known).await?;
                }
                listed = None;
                if all.iter().all(Leaving::is_over) {
                    return Ok(());
                }
                self.show(all);
                tokio::time::sleep(pause).await;
                pause = (pause * 3 / 2).min(LONGEST_LOOK);
            }
        };
        let ended = ended.await;
        if let Some(bar) = self.bar().take() {
            bar.finish_and_clear();
        }
        ended
    }

    fn bar(&self) -> MutexGuard<'_, Option<ProgressBar>> {
        self.bar.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whatever is to be done next with one of them; as it is listed, if that is known.
    async fn turn(&self, one: &mut Leaving, listed: Option<&Value>) -> Result<(), CliError> {
        match one.stage {
            Stage::Ask(at) if Instant::now() >= at => self.ask(one, listed).await,
            Stage::Goes(stopped) => self.look(one, stopped).await,
            Stage::Ask(_) | Stage::Left | Stage::Stays => Ok(()),
        }
    }

    async fn ask(&self, one: &mut Leaving, listed: Option<&Value>) -> Result<(), CliError> {
        let now = match listed {
            Some(server) => Now::of(server),
            None => self.now(one).await?,
        };
        let (asked, stopped) = match now {
            Now::Runs => (migration::begin(&one.id, None, self.session).await, false),
            Now::Stopped => (
                migration::begin_cold(&one.id, None, self.session).await,
                true,
            ),
            Now::Going => (Ok(()), false),
            Now::Busy(what) => {
                if one.since.elapsed() > self.timeout {
                    self.stays(one, &format!("is busy still ({what})"));
                } else {
                    self.say(one, &format!("is busy ({what}), and is asked again"));
                    one.again();
                }
                return Ok(());
            }
            Now::Stays(why) => {
                self.stays(one, &why);
                return Ok(());
            }
            Now::Gone => {
                self.say(one, "is not there any more");
                one.stage = Stage::Left;
                return Ok(());
            }
        };
        match asked {
            Ok(()) => {
                (one.stage, one.since) = (Stage::Goes(stopped), Instant::now());
                Ok(())
            }
            Err(error @ CliError::Refused { status: 409, .. }) if one.conflicts < CONFLICTS => {
                one.conflicts += 1;
                self.say(one, &format!("is asked again: {error}"));
                one.again();
                Ok(())
            }
            Err(error @ CliError::Refused { .. }) => {
                self.failed(one, &error.to_string());
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// It did not go: it is asked again, a few times.
    fn failed(&self, one: &mut Leaving, why: &str) {
        one.tries += 1;
        if one.tries < TRIES {
            self.say(one, &format!("did not go, and is asked again: {why}"));
            one.again();
        } else {
            self.stays(one, &format!("stays: {why}"));
        }
    }

    async fn now(&self, one: &Leaving) -> Result<Now, CliError> {
        let path = format!("/servers/{}", path_segment(&one.id));
        match self.session.get(Service::Compute, &path).await {
            Ok(shown) => {
                let server = &shown["server"];
                let host = text(server, "OS-EXT-SRV-ATTR:host");
                Ok(match host.is_empty() || host == self.name {
                    true => Now::of(server),
                    false => Now::Gone,
                })
            }
            Err(CliError::Refused { status: 404, .. }) => Ok(Now::Gone),
            Err(error) => Err(error),
        }
    }

    async fn look(&self, one: &mut Leaving, stopped: bool) -> Result<(), CliError> {
        let newest = migration::newest(&one.id, self.session).await?;
        let status = text(&newest, "status");
        match migration::Course::of(status) {
            migration::Course::Arrived => {
                let to = text(&newest, "dest_compute").to_owned();
                one.progress = one.progress.map(|(_, total)| (total, total));
                // This host keeps its disk until then.
                if stopped && let Err(error) = self.confirm(one).await {
                    return self.tell(one, error);
                }
                self.say(one, &format!("went to {to}"));
                one.stage = Stage::Left;
            }
            // Somebody wants it to be here.
            migration::Course::Ended if matches!(status, "cancelled" | "reverted") => {
                self.stays(one, &format!("stays: its migration was {status}"));
            }
            migration::Course::Ended => {
                let why = migration::reason(&newest, self.session).await?;
                self.failed(one, &why);
            }
            migration::Course::Waits => one.since = Instant::now(),
            migration::Course::UnderWay if one.since.elapsed() > self.timeout => {
                let seconds = self.timeout.as_secs();
                let what = format!("its migration is {status} after {seconds} s, and goes on");
                self.stays(one, &what);
            }
            migration::Course::UnderWay => {
                // For the eye alone.
                if self.output.has_bars()
                    && let Some(progress) = migration::progress(&newest, self.session).await
                {
                    one.progress = Some(progress);
                }
            }
        }
        Ok(())
    }

    async fn confirm(&self, one: &Leaving) -> Result<(), CliError> {
        let seconds = self.timeout.as_secs();
        server::confirm(&one.id, seconds, self.session, self.output).await
    }

    /// What is wrong with one of them is told; what is wrong with the cloud ends it all.
    fn tell(&self, one: &mut Leaving, error: CliError) -> Result<(), CliError> {
        match error {
            CliError::Errored { .. } | CliError::Refused { .. } | CliError::Timeout { .. } => {
                self.stays(one, &format!("stays: {error}"));
                Ok(())
            }
            error => Err(error),
        }
    }

    fn stays(&self, one: &mut Leaving, why: &str) {
        self.say(one, why);
        one.stage = Stage::Stays;
    }

    /// Once.
    fn say(&self, one: &mut Leaving, what: &str) {
        if one.said.as_deref() != Some(what) {
            let remark = || self.output.remark(&format!("{}: {what}", one.shown));
            match &*self.bar() {
                Some(bar) => bar.suspend(remark),
                None => remark(),
            }
            one.said = Some(what.to_owned());
        }
    }

    /// One bar for all.
    fn show(&self, all: &[Leaving]) {
        let mut bar = self.bar();
        let Some(bar) = bar.as_mut() else { return };
        let left = all.iter().filter(|one| one.is_over()).count();
        let what = format!("{left} of {} servers of {}", all.len(), self.name);
        let Some((there, total)) = sum(all) else {
            bar.set_message(what);
            return;
        };
        if bar.length().is_none() {
            bar.finish_and_clear();
            *bar = self.output.bar(Some(total), &what);
            bar.enable_steady_tick(Duration::from_millis(120));
        }
        bar.set_message(what);
        bar.set_length(total);
        bar.set_position(there);
    }

    /// Names the servers that are elsewhere, and may still come back to the disk that they have left here; answers how many.
    async fn kept_disks(&self) -> Result<usize, CliError> {
        let name = &self.name;
        let path = format!("/os-migrations?host={}&status=finished", query_value(name));
        let all = self.session.list(Service::Compute, &path, "migrations");
        let all = all.await?;
        let left = all.iter().filter(|migration| {
            text(migration, "source_compute") == name && text(migration, "dest_compute") != name
        });
        let mut kept = 0;
        for migration in left {
            self.output.remark(&format!(
                "{} is on {}, and its disk is here until it is confirmed or reverted",
                text(migration, "instance_uuid"),
                text(migration, "dest_compute")
            ));
            kept += 1;
        }
        Ok(kept)
    }

    /// Waits until what is on its way to the host is there, or will not come; false if nothing was. What is not waited for
    /// any longer is among `late`.
    async fn arrivals(&self, late: &mut BTreeSet<String>) -> Result<bool, CliError> {
        let path = format!("/os-migrations?host={}", query_value(&self.name));
        let all = self.session.list(Service::Compute, &path, "migrations");
        let mut any = false;
        for migration in all.await? {
            let id = text(&migration, "instance_uuid").to_owned();
            let comes = text(&migration, "dest_compute") == self.name
                && migration::Course::of(text(&migration, "status")) == migration::Course::UnderWay;
            if !comes || late.contains(&id) {
                continue;
            }
            any = true;
            let seconds = self.timeout.as_secs();
            match migration::arrived(&id, seconds, self.session, self.output).await {
                Ok(_) | Err(CliError::Stayed { .. }) => {}
                Err(error @ CliError::Timeout { .. }) => {
                    self.output.remark(&format!("{id} is coming here: {error}"));
                    late.insert(id);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(any)
    }
}

/// Bytes of all that are elsewhere, of how many; none: nothing is known.
fn sum(all: &[Leaving]) -> Option<(u64, u64)> {
    let known = all.iter().filter_map(|one| one.progress);
    known.reduce(|(there, total), (next_there, next_total)| {
        (
            there.saturating_add(next_there),
            total.saturating_add(next_total),
        )
    })
}

fn text<'a>(item: &'a Value, name: &str) -> &'a str {
    item[name].as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn one_bar_is_the_sum_of_all_that_is_known() {
        let with = |progress| Leaving {
            progress,
            ..Leaving::new(&Value::Null, (1, 1))
        };
        assert_eq!(sum(&[with(None)]), None);
        let all = [with(Some((1, 10))), with(None), with(Some((5, 5)))];
        assert_eq!(sum(&all), Some((6, 15)));
    }

    #[test]
    fn what_is_done_to_a_server_is_waited_for_and_what_it_has_become_is_not() {
        let busy = |status: &str, task: Value| {
            let server = json!({"status": status, "OS-EXT-STS:task_state": task});
            matches!(Now::of(&server), Now::Busy(_))
        };
        for status in ["BUILD", "REBOOT", "HARD_REBOOT", "REBUILD", "RESIZE"] {
            assert!(busy(status, Value::Null), "{status}");
        }
        for status in ["ACTIVE", "SHUTOFF", "SUSPENDED", "ERROR"] {
            assert!(busy(status, json!("something")), "{status}");
        }
        assert!(!busy("ACTIVE", Value::Null));
        for status in ["ERROR", "SUSPENDED", "SHELVED", "VERIFY_RESIZE"] {
            let now = Now::of(&json!({"status": status}));
            assert!(matches!(now, Now::Stays(_)), "{status}");
        }
    }
}
