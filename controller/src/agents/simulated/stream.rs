//! Streams between two simulated hosts: nothing of them moves by itself, and each may break at any point.

use fractus_agent_api::cpu::Profile;
use fractus_agent_api::decision::Process;
use fractus_agent_api::machine::ServerId;
use fractus_agent_api::migration::{
    AtLimit, Decision, Lacks, MigrationId, MigrationReport, Pause, Round, State, Transit,
};

use super::machine::Record;
pub use super::machine::Soul;
use super::{SimulatedAgents, SimulatedHost};

/// What happens to a stream next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A round is copied.
    Round,
    /// The guest stands still, and the target has it.
    End,
    /// The same, but for some of its memory.
    Part,
    /// It breaks before the guest was stopped.
    Cut,
    /// The target has the guest, and its answer is lost.
    AnswerLost,
    /// The same, but for some of its memory.
    PartLost,
    /// The last frames are lost, and with them what the target has.
    EndLost,
}

impl SimulatedAgents {
    /// Servers whose guest is being sent.
    pub fn streams(&self) -> Vec<ServerId> {
        let copying = |record: &Record| matches!(record.transit, Transit::Copying(_));
        self.all()
            .iter()
            .flat_map(|host| host.those(copying))
            .collect()
    }

    /// Servers of whose memory some is still to come.
    pub fn debts(&self) -> Vec<ServerId> {
        let lacks = |record: &Record| record.lacks.is_some();
        self.all()
            .iter()
            .flat_map(|host| host.those(lacks))
            .collect()
    }

    /// What was owed of a server's memory has come; or, if nobody owes it any more, whoever lacks it says that it
    /// starves. False if nothing is lacking.
    pub fn pay(&self, server: ServerId) -> bool {
        let hosts = self.all();
        let lacks = |host: &SimulatedHost| {
            host.with(server, |record| {
                let migration = record.migration.as_ref().map(|migration| migration.id);
                migration.filter(|_| record.lacks.is_some())
            })?
        };
        let target = hosts.iter().find_map(|host| Some((host, lacks(host)?)));
        let Some((target, id)) = target else {
            return false;
        };
        let owes = |host: &SimulatedHost| host.with(server, |record| record.owes(id)) == Some(true);
        let source = hosts.iter().find(|host| owes(host));
        // An agent that is not there carries nothing.
        let carried = |host: &SimulatedHost| !host.host().down;
        let paid = source.is_some_and(|source| carried(source) && carried(target));
        let starving = || "the other side is gone".to_owned();
        target.with(server, |record| {
            record.lacks = (!paid).then(|| Lacks {
                starving: source.is_none().then(starving),
            });
        });
        (target.changed)(target.id());
        if let Some(source) = source.filter(|_| paid) {
            source.with(server, |record| {
                if let Some(MigrationReport {
                    state: State::Offered { owes, .. },
                    ..
                }) = &mut record.migration
                {
                    *owes = false;
                }
            });
            (source.changed)(source.id());
        }
        true
    }

    /// Something happens to the stream of a server. False if there is none: where the target is not there, it breaks.
    pub fn stream(&self, server: ServerId, event: Event) -> bool {
        let hosts = self.all();
        let source = hosts
            .iter()
            .find_map(|host| Some((host, host.departing(server)?)));
        let Some((source, id)) = source else {
            return false;
        };
        let target = hosts.iter().find(|host| host.listens(server, id));
        let event = match target {
            Some(target) if source.key(server) == target.key(server) => event,
            _ => Event::Cut,
        };
        let event = match event {
            Event::Part if !source.may_owe(server) => Event::End,
            Event::PartLost if !source.may_owe(server) => Event::AnswerLost,
            event => event,
        };
        let guest = |record: &mut Record| {
            let cpu = record.cpu.clone();
            (record.process, record.soul, cpu, record.guest)
        };
        let Some((process, soul, cpu, said)) = source.with(server, guest) else {
            return false;
        };
        let (now, ran) = (source.now_us(), process == Process::Running);
        let sent = match event {
            Event::Round => Sent::Round,
            Event::Cut => Sent::Broken,
            Event::End => Sent::Offered(None, false),
            Event::Part => Sent::Offered(None, true),
            Event::AnswerLost | Event::PartLost | Event::EndLost => {
                let owes = event == Event::PartLost;
                Sent::Offered(Some("the connection has ended".to_owned()), owes)
            }
        };
        source.with(server, |record| record.sends(id, sent, now));
        (source.changed)(source.id());
        if let Some(target) = target {
            target.with(server, |record| match event {
                Event::Round => {}
                Event::End | Event::AnswerLost | Event::Part | Event::PartLost => {
                    let part = matches!(event, Event::Part | Event::PartLost);
                    record.lacks = part.then(Lacks::default);
                    record.transit = Transit::Arrived(id);
                    (record.ran, record.soul, record.cpu) = (ran, soul, cpu);
                    record.guest = said;
                    record.says(State::Arrived);
                    record.changed_at_us = now;
                }
                Event::Cut | Event::EndLost => {
                    record.lose();
                    let reason = "the stream has ended too early".to_owned();
                    record.says(State::Failed {
                        reason: reason.clone(),
                    });
                    // One that is to be gone by now has not failed.
                    let awaited = record.intent.wanted.arrives.is_some();
                    record.failed = awaited.then_some(reason);
                    record.changed_at_us = now;
                }
            });
            (target.changed)(target.id());
        }
        true
    }
}

/// What became of the source's end.
enum Sent {
    Round,
    Broken,
    /// With a doubt; memory is to follow.
    Offered(Option<String>, bool),
}

impl Record {
    fn sends(&mut self, id: MigrationId, sent: Sent, now_us: i64) {
        self.changed_at_us = now_us;
        match sent {
            Sent::Round => {
                if let Some(migration) = &mut self.migration {
                    let progress = &mut migration.progress;
                    progress.memory_total = 512 << 20;
                    progress.memory_sent += 1 << 20;
                    progress.rounds.push(Round {
                        memory_bytes: 1 << 20,
                        disk_bytes: 0,
                        took_us: 1000,
                        left: 4096,
                        rate: 1 << 30,
                        throttled: 0,
                        cut: false,
                        decision: Decision::Again,
                        why: None,
                    });
                }
            }
            Sent::Broken => {
                self.transit = Transit::None;
                self.says(State::Failed {
                    reason: "the stream has broken".to_owned(),
                });
            }
            Sent::Offered(doubt, owes) => {
                self.ran = self.process == Process::Running;
                self.process = Process::Paused;
                self.transit = Transit::Offered(id);
                if let Some(migration) = &mut self.migration {
                    migration.progress.pause = Some(Pause {
                        stop_us: 1,
                        state_us: 2,
                        send_us: 3,
                        answer_us: 4,
                    });
                }
                self.says(State::Offered {
                    ran: self.ran,
                    doubt,
                    owes,
                });
            }
        }
    }
}

impl SimulatedHost {
    /// Which guest is here, and for how long it has run; none: there is none, or it is between two hosts.
    pub fn soul(&self, server: ServerId) -> Option<Soul> {
        self.with(server, |record| record.has_guest().then_some(record.soul))?
    }

    /// What the guest that is here began with, wherever that was.
    pub fn guest_cpu(&self, server: ServerId) -> Option<Box<Profile>> {
        let has = |record: &mut Record| record.has_guest().then(|| record.cpu.clone());
        self.with(server, has)??
    }

    /// Time passes for the guests that run.
    pub fn tick(&self) {
        for record in self.host().machines.values_mut() {
            if record.process == Process::Running && record.has_guest() {
                record.soul.ticks += 1;
            }
        }
    }

    fn departing(&self, server: ServerId) -> Option<MigrationId> {
        self.with(server, |record| match record.transit {
            Transit::Copying(id) => Some(id),
            _ => None,
        })?
    }

    fn listens(&self, server: ServerId, id: MigrationId) -> bool {
        self.with(server, |record| record.transit == Transit::Arriving(id)) == Some(true)
    }

    /// Whether memory may follow the guest.
    fn may_owe(&self, server: ServerId) -> bool {
        self.with(server, |record| {
            let departs = record.intent.wanted.departs.as_ref();
            departs.is_some_and(|departure| departure.policy.at_limit == AtLimit::PostCopy)
        }) == Some(true)
    }

    /// Certificate and key that it was told for a stream of the server.
    fn key(&self, server: ServerId) -> Option<(String, String)> {
        self.with(server, |record| {
            let wanted = &record.intent.wanted;
            let arrives = wanted.arrives.as_ref().map(|arrival| &arrival.key);
            let departs = wanted.departs.as_ref().map(|departure| &departure.key);
            let key = arrives.or(departs)?;
            let plain = key.key.starts_with("-----BEGIN PRIVATE KEY-----");
            plain.then(|| (key.certificate.clone(), key.key.clone()))
        })?
    }

    fn now_us(&self) -> i64 {
        self.host().now_us
    }

    fn with<T>(&self, server: ServerId, what: impl FnOnce(&mut Record) -> T) -> Option<T> {
        self.host().machines.get_mut(&server).map(what)
    }
}
