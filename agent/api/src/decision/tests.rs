//! The model of one machine, and properties of what its agent decides.

use proptest::prelude::*;

use super::*;
use crate::machine::{Boot, ImageFormat, ImageRef, MachineSpec, Pages, RootDisk};

pub(crate) fn wanted(power: Power, soft: u64, hard: u64, rebuilds: u64) -> Wanted {
    Wanted {
        power,
        soft_reboots: soft,
        hard_reboots: hard,
        rebuilds,
        arrives: None,
        departs: None,
        continues: None,
        copy: None,
        copies: 0,
        restores: None,
        parks: None,
        spec: MachineSpec {
            vcpus: 1,
            max_vcpus: None,
            memory_mib: 64,
            max_memory_mib: None,
            pages: Pages::Small,
            numa_nodes: vec![],
            cpus: vec![],
            cpu_profile: "host".into(),
            cpu: None,
            boot: Boot {
                kernel: Some(ImageRef {
                    id: uuid::Uuid::from_u128(1),
                    size: 1,
                    blake3: "0f".repeat(32),
                    format: ImageFormat::Raw,
                }),
                initrd: None,
                command_line: String::new(),
            },
            root_disk: Some(RootDisk {
                image: None,
                size: 1 << 20,
            }),
            disks: vec![],
            nics: vec![],
            guest: Default::default(),
        },
    }
}

fn put(generation: u64, revision: u64, wanted: Wanted) -> PutMachine {
    PutMachine {
        version: 1,
        generation: Generation(generation),
        revision: Revision(revision),
        wanted,
        request_id: None,
        boot_id: None,
    }
}

/// A host of one machine that does what it is told, and crashes at will.
#[derive(Default)]
struct Model {
    intent: Option<Intent>,
    done: Done,
    process: Option<Process>,
    stop: Option<StopReason>,
    disk: bool,
    /// The disk that the running guest was started on: raised by every new one.
    disks: u64,
    /// Which guest runs, by the start that it began with.
    guest: u64,
    /// The guest whose memory is kept.
    kept: Option<u64>,
    boot: u128,
    unheard: bool,
}

impl Model {
    fn boot(&self) -> Option<Uuid> {
        Some(Uuid::from_u128(self.boot))
    }

    fn reboot(&mut self) {
        self.boot += 1;
        (self.process, self.unheard) = (None, true);
    }

    fn put(&mut self, put: &PutMachine) -> Result<Intake, Refusal> {
        let intake = intake(self.intent.as_ref(), put)?;
        if intake == Intake::New {
            self.intent = Some(Intent {
                generation: put.generation,
                revision: put.revision,
                wanted: put.wanted.clone(),
            });
            self.stop = None;
        }
        self.unheard &= !is_word(put, self.boot());
        Ok(intake)
    }

    fn step(&mut self) -> Step {
        let Some(intent) = &self.intent else {
            return Step::Settled;
        };
        let wanted = intent.wanted.clone();
        let seen = Seen {
            process: self.process.unwrap_or(Process::None),
            stop: self.stop.as_ref(),
            failed: false,
            disk: self.disk,
            held: false,
            kept: self.kept.is_some(),
            transit: Transit::None,
            remains: self.disk || self.process.is_some() || self.kept.is_some(),
            unheard: self.unheard,
        };
        let step = next(&wanted, &self.done, &seen);
        let reboots = |done: &mut Done| {
            done.soft_reboots = wanted.soft_reboots;
            done.hard_reboots = wanted.hard_reboots;
        };
        match step {
            Step::Settled => {}
            Step::Await => assert!(self.unheard && self.process.is_none()),
            Step::SkipReboots => reboots(&mut self.done),
            Step::MakeDisk | Step::RemakeDisk => {
                let guest = (self.process, self.kept);
                assert_eq!(guest, (None, None), "no disk is made under a guest");
                (self.disk, self.disks) = (true, self.disks + 1);
                if step == Step::RemakeDisk {
                    self.done.rebuilds = wanted.rebuilds;
                    reboots(&mut self.done);
                }
            }
            Step::Start => {
                assert_eq!(self.process, None, "one process a machine");
                assert!(self.disk);
                self.process = Some(Process::Running);
                self.done.starts += 1;
                self.stop = None;
                self.guest = self.kept.take().unwrap_or(self.done.starts);
                reboots(&mut self.done);
            }
            Step::Pause => self.process = Some(Process::Paused),
            Step::Resume => {
                assert_eq!(self.kept, None, "what runs on is not what was kept");
                self.process = Some(Process::Running);
            }
            Step::Suspend => {
                self.process = Some(Process::Paused);
                self.kept = Some(self.guest);
            }
            Step::Forget => self.kept = None,
            Step::Shutdown | Step::Kill => self.process = None,
            Step::Remove => (self.disk, self.kept) = (false, None),
            Step::Arrive | Step::GoOn | Step::Depart | Step::Stay | Step::Lost => {
                panic!("{step:?} of a machine that stays where it is");
            }
        }
        step
    }

    fn settle(&mut self) {
        for _ in 0..20 {
            if matches!(self.step(), Step::Settled | Step::Await) {
                return;
            }
        }
        panic!("no end to the steps: {:?}", self.intent);
    }
}

#[test]
fn a_guest_that_powers_off_stays_off_until_a_newer_intent() {
    let mut model = Model::default();
    model
        .put(&put(1, 1, wanted(Power::Running, 0, 0, 0)))
        .unwrap();
    model.settle();
    (model.process, model.stop) = (None, Some(StopReason::GuestPowerOff));
    model.settle();
    assert_eq!((model.process, model.done.starts), (None, 1));
    model
        .put(&put(1, 2, wanted(Power::Running, 0, 0, 0)))
        .unwrap();
    model.settle();
    assert_eq!(
        (model.process, model.done.starts),
        (Some(Process::Running), 2)
    );
}

#[test]
fn several_raises_of_a_counter_are_one_reboot() {
    let mut model = Model::default();
    model
        .put(&put(1, 1, wanted(Power::Running, 0, 0, 0)))
        .unwrap();
    model.settle();
    model
        .put(&put(1, 2, wanted(Power::Running, 2, 3, 0)))
        .unwrap();
    model.settle();
    assert_eq!(
        model.done,
        Done {
            soft_reboots: 2,
            hard_reboots: 3,
            rebuilds: 0,
            starts: 2,
            ..Done::default()
        }
    );
}

#[test]
fn a_rebuild_makes_the_disk_anew_and_starts_on_it() {
    let mut model = Model::default();
    model
        .put(&put(1, 1, wanted(Power::Running, 0, 0, 0)))
        .unwrap();
    model.settle();
    model
        .put(&put(1, 2, wanted(Power::Running, 0, 0, 1)))
        .unwrap();
    model.settle();
    assert_eq!(
        (model.disks, model.done.starts, model.done.rebuilds),
        (2, 2, 1)
    );
    assert_eq!(model.process, Some(Process::Running));
}

#[test]
fn a_suspended_guest_goes_on_and_one_that_is_rebooted_begins_anew() {
    let mut model = Model::default();
    let mut revision = 0;
    let mut settle = |model: &mut Model, power, hard| {
        revision += 1;
        model
            .put(&put(1, revision, wanted(power, 0, hard, 0)))
            .unwrap();
        model.settle();
        (model.process, model.guest, model.kept)
    };
    let running = Some(Process::Running);
    assert_eq!(settle(&mut model, Power::Running, 0), (running, 1, None));
    assert_eq!(settle(&mut model, Power::Suspended, 0), (None, 1, Some(1)));
    assert_eq!(settle(&mut model, Power::Running, 0), (running, 1, None));
    assert_eq!(model.done.starts, 2);
    assert_eq!(settle(&mut model, Power::Suspended, 0), (None, 1, Some(1)));
    assert_eq!(settle(&mut model, Power::Running, 1), (running, 3, None));
    assert_eq!(settle(&mut model, Power::Suspended, 1), (None, 3, Some(3)));
    assert_eq!(settle(&mut model, Power::Stopped, 1), (None, 3, None));
    // Of one that does not run there is nothing to keep, unless it is rebooted first.
    assert_eq!(settle(&mut model, Power::Suspended, 1), (None, 3, None));
    assert_eq!(settle(&mut model, Power::Suspended, 2), (None, 4, Some(4)));
}

#[test]
fn after_a_reboot_of_its_host_a_machine_waits_for_a_word_of_this_boot() {
    let mut model = Model::default();
    let said = |revision, boot: Option<u128>| PutMachine {
        boot_id: boot.map(Uuid::from_u128),
        ..put(1, revision, wanted(Power::Running, 0, 0, 0))
    };
    model.put(&said(1, Some(0))).unwrap();
    model.settle();
    assert_eq!(model.done.starts, 1);
    model.reboot();
    assert_eq!(model.step(), Step::Await);
    // What was on its way, doubled or newer, before whoever sent it knew of this boot.
    for late in [said(1, Some(0)), said(2, Some(0)), said(2, Some(u128::MAX))] {
        model.put(&late).unwrap();
        assert_eq!(model.step(), Step::Await, "{late:?}");
    }
    assert_eq!(model.put(&said(2, Some(1))), Ok(Intake::Same));
    model.settle();
    assert_eq!(
        (model.process, model.done.starts),
        (Some(Process::Running), 2)
    );
    // A guest that ends in this boot is started again without a word; not so in the next.
    model.process = None;
    model.settle();
    assert_eq!(model.done.starts, 3);
    model.reboot();
    model.put(&said(3, None)).unwrap();
    model.settle();
    assert_eq!(model.done.starts, 4, "a controller of before");
}

#[test]
fn a_machine_that_waits_is_removed_stays_stopped_and_forgets_without_a_word() {
    let mut model = Model::default();
    model
        .put(&put(1, 1, wanted(Power::Running, 0, 0, 0)))
        .unwrap();
    model.settle();
    model
        .put(&put(1, 2, wanted(Power::Suspended, 0, 0, 0)))
        .unwrap();
    model.settle();
    let unsaid = |revision, wanted| PutMachine {
        boot_id: Some(Uuid::nil()),
        ..put(1, revision, wanted)
    };
    model.reboot();
    assert_eq!(model.step(), Step::Settled, "it is suspended as before");
    model
        .put(&unsaid(3, wanted(Power::Running, 0, 0, 0)))
        .unwrap();
    assert_eq!(model.step(), Step::Await, "nor does one that is kept go on");
    assert_eq!(model.kept, Some(1));
    model
        .put(&unsaid(4, wanted(Power::Stopped, 0, 0, 0)))
        .unwrap();
    model.settle();
    assert_eq!(model.step(), Step::Settled);
    model
        .put(&unsaid(5, wanted(Power::Stopped, 0, 0, 1)))
        .unwrap();
    assert_eq!(model.step(), Step::Await, "its disk may be another's");
    model
        .put(&unsaid(6, wanted(Power::Absent, 0, 0, 1)))
        .unwrap();
    model.settle();
    assert!(!model.disk);
}

#[test]
fn what_no_agent_can_do_is_invalid_and_leaves_the_intent_alone() {
    let mut model = Model::default();
    let mut wrong = put(1, 1, wanted(Power::Running, 0, 0, 0));
    wrong.wanted.spec.vcpus = 65;
    assert!(matches!(model.put(&wrong), Err(Refusal::Invalid { .. })));
    wrong = put(1, 1, wanted(Power::Running, 0, 0, 0));
    wrong.version = NEWEST_PUT + 1;
    assert!(matches!(model.put(&wrong), Err(Refusal::Invalid { .. })));
    assert_eq!(model.intent, None);
}

fn power() -> impl Strategy<Value = Power> {
    prop_oneof![
        3 => Just(Power::Running),
        1 => Just(Power::Paused),
        1 => Just(Power::Suspended),
        1 => Just(Power::Stopped),
        1 => Just(Power::Absent)
    ]
}

proptest! {
    /// Messages that are late, doubled and out of order end in the newest intent, whatever the
    /// host had done in between.
    #[test]
    fn the_newest_intent_wins_whatever_the_order(
        history in prop::collection::vec((power(), 0..2u64, 0..2u64, 0..2u64, 0..2u64), 1..12),
        order in prop::collection::vec((0..12usize, 0..4usize), 0..40),
    ) {
        let (mut generation, mut soft, mut hard, mut rebuilds) = (1, 0, 0, 0);
        let mut puts = Vec::new();
        for (revision, (power, g, s, h, r)) in history.into_iter().enumerate() {
            generation += g;
            (soft, hard, rebuilds) = (soft + s, hard + h, rebuilds + r);
            let wanted = wanted(power, soft, hard, rebuilds);
            puts.push(put(generation, revision as u64 + 1, wanted));
        }
        let mut model = Model::default();
        let mut newest = (Generation(0), Revision(0));
        for (which, steps) in order {
            let Some(put) = puts.get(which) else { continue };
            let age = (put.generation, put.revision);
            match model.put(put) {
                Ok(Intake::New) => { prop_assert!(age > newest); newest = age; }
                Ok(Intake::Same) => prop_assert_eq!(age, newest),
                Err(Refusal::Stale { generation, revision }) => {
                    prop_assert!(age < newest);
                    prop_assert_eq!((generation, revision), newest);
                }
                Err(other) => prop_assert!(false, "{}", other),
            }
            for _ in 0..steps {
                model.step();
            }
        }
        let last = puts.last().unwrap();
        let _ = model.put(last);
        model.settle();
        let expected = match last.wanted.power {
            Power::Running => Some(Process::Running),
            Power::Paused => Some(Process::Paused),
            Power::Suspended | Power::Stopped | Power::Absent => None,
        };
        prop_assert_eq!(model.process, expected);
        prop_assert!(model.kept.is_none() || last.wanted.power == Power::Suspended);
        match last.wanted.power {
            Power::Absent => prop_assert!(!model.disk),
            // One that never ran may have none yet.
            Power::Suspended => {}
            _ => prop_assert!(model.disk),
        }
        if !matches!(last.wanted.power, Power::Absent | Power::Suspended) {
            prop_assert_eq!(model.done.rebuilds, rebuilds);
            prop_assert_eq!(model.done.hard_reboots, hard);
            prop_assert_eq!(model.done.soft_reboots, soft);
        }
    }
}
