//! Two hosts and an owner's row, with every message late, doubled or lost, and every crash in between.

use proptest::prelude::*;

use super::tests::wanted;
use super::*;
use crate::migration;
use crate::migration::{Arrival, Departure, Policy, Shape, StreamKey};

fn id(number: u128) -> MigrationId {
    MigrationId(uuid::Uuid::from_u128(number))
}

fn key() -> StreamKey {
    StreamKey {
        certificate: String::new(),
        key: String::new(),
    }
}

fn shape() -> Shape {
    Shape {
        vcpus: 1,
        max_vcpus: None,
        memory_mib: 64,
        max_hot_memory_mib: None,
        root_disk: Some(1 << 20),
    }
}

/// A host of one machine, by what its agent has persisted and what its process is.
#[derive(Default)]
struct Host {
    intent: Option<Intent>,
    done: Done,
    process: Option<Process>,
    transit: Transit,
    failed: bool,
    disk: bool,
    /// The guest's own counter, which goes with it and begins anew with a boot.
    guest: u64,
}

impl Host {
    fn put(&mut self, put: &PutMachine) {
        if intake(self.intent.as_ref(), put) == Ok(Intake::New) {
            self.intent = Some(Intent {
                generation: put.generation,
                revision: put.revision,
                wanted: put.wanted.clone(),
            });
            self.failed = false;
        }
    }

    /// The agent ends and comes back: what had not gone on is gone.
    fn restart(&mut self) {
        self.failed = false;
        if matches!(self.transit, Transit::Arriving(_) | Transit::Arrived(_)) {
            self.lose();
        }
    }

    fn lose(&mut self) {
        (self.process, self.transit) = (None, Transit::None);
    }

    fn step(&mut self) -> Step {
        let Some(intent) = &self.intent else {
            return Step::Settled;
        };
        let wanted = intent.wanted.clone();
        let step = next(
            &wanted,
            &self.done,
            &Seen {
                process: self.process.unwrap_or(Process::None),
                stop: None,
                failed: self.failed,
                disk: self.disk,
                held: false,
                kept: false,
                transit: self.transit,
                remains: self.disk || self.process.is_some(),
                unheard: false,
            },
        );
        match step {
            Step::Settled => {}
            Step::MakeDisk => self.disk = true,
            Step::RemakeDisk => {
                self.done.rebuilds = wanted.rebuilds;
                self.done.hard_reboots = wanted.hard_reboots;
            }
            Step::Start => {
                (self.process, self.guest) = (Some(Process::Running), 0);
                self.done.starts += 1;
                self.done.hard_reboots = wanted.hard_reboots;
            }
            Step::Arrive => {
                let arrival = wanted.arrives.as_ref().unwrap();
                assert_eq!(self.process, None);
                self.disk = true;
                (self.process, self.transit) =
                    (Some(Process::Paused), Transit::Arriving(arrival.id));
                self.done.arrived = Some(arrival.id);
                (self.done.hard_reboots, self.done.rebuilds) =
                    (wanted.hard_reboots, wanted.rebuilds);
            }
            Step::GoOn => {
                self.done.continued = wanted.continues;
                (self.process, self.transit) = (Some(Process::Running), Transit::None);
            }
            Step::Depart => {
                let departure = wanted.departs.as_ref().unwrap();
                self.done.departed = Some(departure.id);
                self.transit = Transit::Copying(departure.id);
            }
            Step::Stay => {
                if wanted.continues.is_some() {
                    self.done.continued = wanted.continues;
                }
                (self.process, self.transit) = (Some(Process::Running), Transit::None);
            }
            Step::Lost => self.failed = true,
            Step::Kill => self.lose(),
            Step::Remove => self.disk = false,
            other => panic!("{other:?}"),
        }
        step
    }

    fn settle(&mut self) {
        for _ in 0..10 {
            if self.step() == Step::Settled {
                return;
            }
        }
        panic!("no end to the steps: {:?}", self.intent);
    }

    fn runs(&self) -> bool {
        self.process == Some(Process::Running)
    }
}

/// The row, and who is told what by it.
struct Row {
    /// Hard reboots and rebuilds that its server has behind it.
    lived: (u64, u64),
    owner: usize,
    generation: u64,
    revision: u64,
    departs: Option<MigrationId>,
    continues: Option<MigrationId>,
}

impl Row {
    /// What `host` is told.
    fn put(&self, host: usize) -> PutMachine {
        let mut wanted = wanted(Power::Running, 0, self.lived.0, self.lived.1);
        let mut revision = self.revision;
        if host == self.owner {
            wanted.departs = self.departs.map(|id| Departure {
                id,
                to: String::new(),
                key: key(),
                policy: Policy::default(),
                direct: false,
                lanes: 0,
            });
            wanted.continues = self.continues;
        } else if let Some(id) = self.departs {
            wanted.arrives = Some(Arrival {
                id,
                key: key(),
                shape: shape(),
                direct: false,
            });
        } else {
            wanted.end();
            revision += 1;
        }
        PutMachine {
            version: migration::PUT_VERSION,
            generation: Generation(self.generation),
            revision: Revision(revision),
            wanted,
            request_id: None,
            boot_id: None,
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Move {
    /// What was to be said to a host so many changes of the row ago.
    Tell(usize, usize),
    Step(usize),
    Settle(usize),
    /// A round of the stream, if both ends are there.
    Stream,
    Begin,
    Abort,
    Commit,
    /// The new owner says that it has failed.
    TakeBack,
    Restart(usize),
    /// The process is killed.
    Kill(usize),
}

fn moves() -> impl Strategy<Value = Move> {
    let host = 0..2usize;
    prop_oneof![
        6 => (host.clone(), 0..4usize).prop_map(|(host, ago)| Move::Tell(host, ago)),
        4 => host.clone().prop_map(Move::Step),
        4 => host.clone().prop_map(Move::Settle),
        6 => Just(Move::Stream),
        3 => Just(Move::Begin),
        1 => Just(Move::Abort),
        3 => Just(Move::Commit),
        2 => Just(Move::TakeBack),
        1 => host.clone().prop_map(Move::Restart),
        1 => host.prop_map(Move::Kill),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// At most one host runs the guest, and it is never an older one that runs again; whoever is told to go on with it
    /// and has it not starts no other.
    #[test]
    fn a_guest_runs_once_and_goes_on(
        moves in prop::collection::vec(moves(), 1..80),
        lived in (0..3u64, 0..3u64),
    ) {
        let mut hosts = [Host::default(), Host::default()];
        let mut row = Row { lived, owner: 0, generation: 1, revision: 1, departs: None, continues: None };
        let mut said = vec![[row.put(0), row.put(1)]];
        let (mut attempts, mut killed, mut ticks) = (0, false, 0);
        hosts[0].put(&said[0][0]);
        hosts[0].settle();
        for step in moves {
            let other = 1 - row.owner;
            let changed = match step {
                Move::Tell(host, ago) => {
                    let at = said.len().saturating_sub(ago + 1);
                    hosts[host].put(&said[at][host]);
                    false
                }
                Move::Step(host) => { hosts[host].step(); false }
                Move::Settle(host) => { hosts[host].settle(); false }
                Move::Stream => {
                    for from in 0..2 {
                        let guest = hosts[from].guest;
                        if let (Transit::Copying(a), Transit::Arriving(b)) =
                            (hosts[from].transit, hosts[1 - from].transit)
                            && a == b
                        {
                            hosts[from].process = Some(Process::Paused);
                            hosts[from].transit = Transit::Offered(a);
                            hosts[1 - from].transit = Transit::Arrived(a);
                            hosts[1 - from].guest = guest;
                        }
                    }
                    false
                }
                Move::Begin if row.departs.is_none() && hosts[row.owner].runs() => {
                    attempts += 1;
                    row.revision += 1;
                    (row.departs, row.continues) = (Some(id(attempts)), None);
                    true
                }
                Move::Abort if row.departs.is_some() => {
                    row.revision += 1;
                    row.departs = None;
                    true
                }
                Move::Commit
                    if row.departs.is_some_and(|id| {
                        hosts[row.owner].transit == Transit::Offered(id)
                            && hosts[other].transit == Transit::Arrived(id)
                    }) =>
                {
                    (row.owner, row.generation) = (other, row.generation + 1);
                    row.revision += 1;
                    row.continues = row.departs.take();
                    true
                }
                Move::TakeBack
                    if row.continues.is_some_and(|id| {
                        let owner = &hosts[row.owner];
                        owner.failed
                            && owner.done.continued != Some(id)
                            && hosts[other].transit == Transit::Offered(id)
                            && owner.intent.as_ref().is_some_and(|intent| {
                                intent.generation == Generation(row.generation)
                            })
                    }) =>
                {
                    (row.owner, row.generation) = (other, row.generation + 1);
                    row.revision += 1;
                    true
                }
                Move::Restart(host) => { hosts[host].restart(); false }
                Move::Kill(host) => {
                    killed |= hosts[host].process.is_some();
                    hosts[host].lose();
                    false
                }
                _ => false,
            };
            if changed {
                said.push([row.put(0), row.put(1)]);
            }
            let running: Vec<usize> = (0..2).filter(|host| hosts[*host].runs()).collect();
            prop_assert!(running.len() <= 1, "{running:?}");
            if let [host] = running[..] {
                // What is lost is lost with a process that was killed only.
                prop_assert!(killed || hosts[host].guest == ticks, "an older guest runs");
                ticks = hosts[host].guest + 1;
                hosts[host].guest = ticks;
            }
        }
    }
}

#[test]
fn an_agent_that_knows_nothing_of_migrations_is_not_told_of_one() {
    let mut put = PutMachine {
        version: crate::VERSION,
        generation: Generation(1),
        revision: Revision(1),
        wanted: wanted(Power::Running, 0, 0, 0),
        request_id: None,
        boot_id: None,
    };
    assert_eq!(intake(None, &put), Ok(Intake::New));
    put.wanted.continues = Some(id(1));
    assert!(matches!(intake(None, &put), Err(Refusal::Invalid { .. })));
    put.version = migration::PUT_VERSION;
    assert_eq!(intake(None, &put), Ok(Intake::New));
    put.wanted.end();
    assert!(!put.wanted.migrates());
}
