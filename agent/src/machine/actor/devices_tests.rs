//! Devices of a machine whose process says what the test has it say.

use fractus_agent_api::device::{
    DeviceId, DeviceKind, DeviceState, Disk, DiskSource, Mac, Nic, Presence,
};

use super::devices::{ANSWER, NUDGE};
use super::tests::{Stage, Told};
use super::*;
use crate::machine::process::Status;
use crate::vm::protocol::Has;

const DISK: DeviceId = DeviceId(uuid::Uuid::from_u128(0xd1));
const OTHER: DeviceId = DeviceId(uuid::Uuid::from_u128(0xd2));

fn disk(id: DeviceId, presence: Presence) -> Disk {
    Disk {
        id,
        size: 1 << 20,
        read_only: false,
        serial_number: None,
        limit: None,
        source: DiskSource::Local,
        presence,
    }
}

fn has(id: DeviceId, asked: bool) -> Has {
    let kind = DeviceKind::Disk;
    Has { id, kind, asked }
}

/// A process that has these; none: it is too old to have any.
fn status(devices: Option<Vec<Has>>, fresh: bool) -> Heard {
    Heard::Status(Status {
        lacks: None,
        moving: None,
        state: State::Running,
        guest: None,
        devices,
        size: None,
        fresh,
    })
}

impl Stage {
    fn want(&mut self, revision: u64, disks: Vec<Disk>) {
        let (Message::Put(mut put, answer), _) = super::tests::put(revision, Power::Running) else {
            unreachable!("as it was made")
        };
        put.wanted.spec.disks = disks;
        self.actor.take(Message::Put(put, answer));
    }

    /// What the process says, and the turns that follow at once.
    pub(super) async fn hears(&mut self, heard: Heard) {
        self.words.say(heard);
        self.hear_all();
        self.moves().await;
    }

    /// Until nothing is left for the agent to do.
    pub(super) async fn moves(&mut self) {
        while let Some((id, next)) = self.actor.next_move() {
            assert!(self.actor.carry(id, next).await.is_ok());
        }
    }

    fn states(&self) -> Vec<(DeviceId, DeviceState)> {
        let report = self.reports.borrow();
        let states = report.disks.iter();
        states.map(|disk| (disk.id, disk.state.clone())).collect()
    }

    pub(super) fn is_settled(&self) -> bool {
        self.reports.borrow().settled
    }

    pub(super) fn told(&self) -> Vec<Told> {
        std::mem::take(&mut *self.told.lock().unwrap())
    }

    fn stands(&self, id: DeviceId) -> bool {
        self.actor.paths.data_disk(id).exists()
    }
}

#[tokio::test]
async fn a_disk_is_handed_over_once_and_is_attached_when_its_process_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = Stage::running(folder.path()).await;
    stage.want(2, vec![disk(DISK, Presence::Attached)]);
    stage.moves().await;
    assert_eq!(stage.told(), [Told::Attach(DISK)]);
    assert!(!stage.is_settled());
    assert_eq!(stage.states(), [(DISK, DeviceState::Attaching)]);
    // What it says of something else is no answer.
    stage.hears(status(Some(vec![]), false)).await;
    assert_eq!((stage.told(), stage.is_settled()), (vec![], false));
    // A connection that broke may have taken it along.
    stage.hears(status(Some(vec![]), true)).await;
    assert_eq!(stage.told(), [Told::Attach(DISK)]);
    stage
        .hears(status(Some(vec![has(DISK, false)]), false))
        .await;
    assert!(stage.is_settled());
    assert_eq!(stage.states(), [(DISK, DeviceState::Attached)]);
}

#[tokio::test]
async fn a_guest_that_keeps_its_disk_is_asked_again_and_keeps_nothing_else_waiting() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = Stage::running(folder.path()).await;
    stage.want(2, vec![disk(DISK, Presence::Attached)]);
    stage.moves().await;
    stage
        .hears(status(Some(vec![has(DISK, false)]), false))
        .await;
    // The list names it no more.
    stage.want(3, vec![]);
    stage.moves().await;
    stage
        .hears(status(Some(vec![has(DISK, true)]), false))
        .await;
    assert_eq!(stage.told(), [Told::Attach(DISK), Told::Detach(DISK)]);
    assert!(stage.is_settled(), "only its guest can do the rest");
    assert_eq!(stage.states(), [(DISK, DeviceState::Detaching)]);
    for _ in 0..3 {
        stage.actor.devices.pass(NUDGE);
        assert!(stage.actor.turn().await.is_ok());
        assert_eq!(stage.told(), [Told::Detach(DISK)], "a while later");
    }
    // Another comes meanwhile; the first is wanted back, and comes when it has gone.
    let both = vec![
        disk(DISK, Presence::Attached),
        disk(OTHER, Presence::Attached),
    ];
    stage.want(4, both);
    stage.moves().await;
    assert_eq!(stage.told(), [Told::Attach(OTHER)]);
    stage
        .hears(status(
            Some(vec![has(DISK, true), has(OTHER, false)]),
            false,
        ))
        .await;
    assert!(stage.is_settled());
    stage
        .hears(status(Some(vec![has(OTHER, false)]), false))
        .await;
    assert_eq!(stage.told(), [Told::Attach(DISK)]);
}

#[tokio::test]
async fn only_what_is_to_be_deleted_is_and_not_before_the_guest_has_let_it_go() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = Stage::running(folder.path()).await;
    stage.want(2, vec![disk(DISK, Presence::Attached)]);
    stage.moves().await;
    stage
        .hears(status(Some(vec![has(DISK, false)]), false))
        .await;
    stage.want(3, vec![disk(DISK, Presence::Detached)]);
    stage.moves().await;
    stage.hears(status(Some(vec![]), false)).await;
    assert_eq!(stage.states(), [(DISK, DeviceState::Detached)]);
    assert!(stage.stands(DISK));
    stage.want(4, vec![disk(DISK, Presence::Attached)]);
    stage.moves().await;
    stage
        .hears(status(Some(vec![has(DISK, false)]), false))
        .await;

    stage.want(5, vec![disk(DISK, Presence::Deleted)]);
    stage.moves().await;
    stage
        .hears(status(Some(vec![has(DISK, true)]), false))
        .await;
    assert!(stage.stands(DISK), "the guest has it still");
    assert_eq!(stage.states(), [(DISK, DeviceState::Detaching)]);
    stage.hears(status(Some(vec![]), false)).await;
    assert!(!stage.stands(DISK));
    assert_eq!(stage.states(), [(DISK, DeviceState::Deleted)]);
    assert!(stage.is_settled());
}

#[tokio::test]
async fn what_a_process_cannot_take_now_comes_with_the_next_one() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = Stage::running(folder.path()).await;
    stage.want(2, vec![disk(DISK, Presence::Attached)]);
    stage.moves().await;
    stage
        .hears(Heard::DeviceRefused(DISK, "no place is left".to_owned()))
        .await;
    let why = |stage: &Stage| match stage.states().as_slice() {
        [(DISK, DeviceState::AtNextStart { reason })] => reason.clone(),
        other => panic!("{other:?}"),
    };
    assert!(why(&stage).contains("no place"));
    assert!(stage.is_settled());
    // A newer intent tries it anew; one of an older version is not even asked.
    assert_eq!(stage.told(), [Told::Attach(DISK)]);
    stage.want(3, vec![disk(DISK, Presence::Attached)]);
    stage.moves().await;
    assert_eq!(stage.told(), [Told::Attach(DISK)]);
    stage.hears(status(None, true)).await;
    assert!(why(&stage).contains("older version"));
    assert!(stage.is_settled());
    stage.want(4, vec![disk(DISK, Presence::Attached)]);
    stage.moves().await;
    assert_eq!(stage.told(), []);
    // The machine is started again, with it.
    let detail = "signal 9".to_owned();
    stage.words.say(Heard::Ended(End::Silent { detail }));
    stage.hear_all();
    stage.want(5, vec![disk(DISK, Presence::Attached)]);
    stage.settle(Observed::Running).await;
    assert_eq!(stage.told(), [Told::Start(vec![DISK])]);
    assert_eq!(stage.states(), [(DISK, DeviceState::Attached)]);
}

#[tokio::test]
async fn a_process_that_never_answers_is_told_of_and_may_answer_late() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = Stage::running(folder.path()).await;
    stage.want(2, vec![disk(DISK, Presence::Attached)]);
    stage.moves().await;
    stage.actor.devices.pass(ANSWER);
    assert!(stage.actor.turn().await.is_ok());
    assert!(stage.is_settled());
    let states = stage.states();
    assert!(
        matches!(&states[..], [(DISK, DeviceState::Failed { reason })] if reason.contains("answer")),
        "{states:?}"
    );
    stage
        .hears(status(Some(vec![has(DISK, false)]), false))
        .await;
    assert_eq!(stage.states(), [(DISK, DeviceState::Attached)]);
}

#[tokio::test]
async fn a_network_device_comes_and_is_taken_away_when_nobody_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = Stage::running(folder.path()).await;
    let nic = Nic {
        id: OTHER,
        mac: Mac([2, 0, 0, 0, 0, 1]),
        mtu: None,
        queues: 1,
        limit: None,
    };
    let (Message::Put(mut put, answer), _) = super::tests::put(2, Power::Running) else {
        unreachable!("as it was made")
    };
    put.wanted.spec.nics = vec![nic];
    stage.actor.take(Message::Put(put, answer));
    stage.moves().await;
    let there = |asked| Has {
        id: OTHER,
        kind: DeviceKind::Nic,
        asked,
    };
    stage.hears(status(Some(vec![there(false)]), false)).await;
    let report = stage.reports.borrow().clone();
    assert_eq!((report.disks.len(), report.nics.len()), (0, 1));
    assert_eq!(report.nics[0].state, DeviceState::Attached);
    stage.want(3, vec![]);
    stage.moves().await;
    stage.hears(status(Some(vec![there(true)]), false)).await;
    let report = stage.reports.borrow().clone();
    assert_eq!(report.nics[0].state, DeviceState::Detaching);
    stage.hears(status(Some(vec![]), false)).await;
    assert_eq!(stage.reports.borrow().nics, []);
    assert_eq!(stage.told(), [Told::Attach(OTHER), Told::Detach(OTHER)]);
}
