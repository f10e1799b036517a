//! Packets as they were when they were first written, and are read for ever.

use super::*;

fn read<T: serde::de::DeserializeOwned>(name: &str) -> Vec<T> {
    let path = format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn text<T: Serialize>(messages: &[T]) -> Vec<String> {
    messages
        .iter()
        .map(|message| serde_json::to_string(message).unwrap())
        .collect()
}

const DEVICE: DeviceId = DeviceId(uuid::Uuid::from_u128(0xd15c));
const ID: ServerId = ServerId(uuid::Uuid::from_u128(0xabc));

fn sent() -> Vec<ToMachine> {
    let request_id = Some("req-1".to_owned());
    vec![
        ToMachine::Hello {
            version: 1,
            role: Role::Control,
        },
        ToMachine::Go,
        ToMachine::Status,
        ToMachine::Pause {
            request_id: request_id.clone(),
        },
        ToMachine::Resume { request_id: None },
        ToMachine::PressPowerButton {
            request_id: request_id.clone(),
        },
        ToMachine::Stop {
            request_id: request_id.clone(),
        },
        ToMachine::AttachDisk {
            request_id: request_id.clone(),
            id: DEVICE,
            config: DiskConfig {
                read_only: true,
                serial_number: "data".to_owned(),
                direct: true,
                limit: None,
                queues: 1,
            },
        },
        ToMachine::Detach {
            request_id: None,
            id: DEVICE,
        },
        ToMachine::Resize {
            request_id: request_id.clone(),
            vcpus: 3,
            hot_memory: 1 << 30,
        },
        ToMachine::AttachNet {
            request_id: request_id.clone(),
            id: DEVICE,
            config: NetConfig {
                mac: [2, 0, 0, 0, 0, 1],
                queues: 2,
                mtu: Some(1400),
                limit: None,
                addresses: Vec::new(),
            },
        },
        ToMachine::Suspend {
            request_id: request_id.clone(),
            attempt: DEVICE.0,
            compression: Compression::None,
        },
        ToMachine::Send {
            request_id,
            migration: MigrationId(DEVICE.0),
            policy: Policy {
                downtime_ms: 50,
                ..Policy::default()
            },
            lent: false,
        },
        ToMachine::Stay { request_id: None },
        ToMachine::Copy {
            request_id: Some("req-1".to_owned()),
            attempt: DEVICE.0,
        },
        ToMachine::NoCopy { request_id: None },
        ToMachine::HandOver {
            request_id: None,
            migration: MigrationId(DEVICE.0),
        },
        ToMachine::Send {
            request_id: None,
            migration: MigrationId(DEVICE.0),
            policy: Policy {
                at_limit: migration::AtLimit::PostCopy,
                ..Policy::default()
            },
            lent: false,
        },
        ToMachine::Send {
            request_id: None,
            migration: MigrationId(DEVICE.0),
            policy: Policy::default(),
            lent: true,
        },
        ToMachine::Suspend {
            request_id: None,
            attempt: DEVICE.0,
            compression: Compression::Zstd,
        },
    ]
}

/// A process of before does not know them, and does without.
#[test]
fn a_networks_addresses_are_told_where_there_are_any() {
    let before = r#"{"mac":[2,0,0,0,0,1],"queues":1,"mtu":null,"limit":null}"#;
    let mut net: NetConfig = serde_json::from_str(before).unwrap();
    assert_eq!(serde_json::to_string(&net).unwrap(), before);
    net.addresses = vec!["10.0.0.1".parse().unwrap(), "fe80::1".parse().unwrap()];
    let text = serde_json::to_string(&net).unwrap();
    assert!(
        text.ends_with(r#","addresses":["10.0.0.1","fe80::1"]}"#),
        "{text}"
    );
    assert_eq!(serde_json::from_str::<NetConfig>(&text).unwrap(), net);
}

fn moving() -> Moving {
    Moving {
        migration: MigrationId(DEVICE.0),
        state: migration::State::Copying,
        progress: migration::Progress {
            memory_total: 1 << 30,
            memory_sent: 1 << 20,
            memory_left: 1 << 19,
            disk_total: 1 << 31,
            disk_sent: 1 << 21,
            disk_left: 1 << 22,
            elapsed_us: 17,
            throttled: 0,
            lanes: 0,
            rounds: vec![migration::Round {
                memory_bytes: 4096,
                disk_bytes: 8192,
                took_us: 5,
                left: 1,
                rate: 0,
                throttled: 0,
                cut: false,
                decision: migration::Decision::Again,
                why: None,
            }],
            pause: Some(migration::Pause {
                stop_us: 1,
                state_us: 2,
                send_us: 3,
                answer_us: 4,
            }),
            followed: None,
            broken: None,
        },
    }
}

fn offered() -> FromMachine {
    FromMachine::Status {
        version: 1,
        id: ID,
        state: State::Paused,
        guest: None,
        devices: None,
        size: None,
        suspends: true,
        sends: true,
        copies: false,
        hands: false,
        follows: false,
        seals: false,
        lanes: false,
        moving: Some(Moving {
            state: migration::State::Offered {
                ran: true,
                doubt: Some("reset".into()),
                owes: false,
            },
            ..moving()
        }),
        lacks: None,
    }
}

fn with_devices() -> FromMachine {
    FromMachine::Status {
        version: 1,
        id: ID,
        state: State::Running,
        guest: Some(GuestSaid::default()),
        devices: Some(vec![
            Has {
                id: DEVICE,
                kind: DeviceKind::Disk,
                asked: true,
            },
            Has {
                id: DeviceId(ID.0),
                kind: DeviceKind::Nic,
                asked: false,
            },
        ]),
        size: Some(Size {
            vcpus: 3,
            vcpus_used: 2,
            max_vcpus: Some(4),
            memory_mib: 1024,
            hot_memory_mib: 512,
            hot_plugged_mib: 256,
            max_hot_memory_mib: Some(1024),
        }),
        suspends: false,
        sends: false,
        copies: false,
        hands: false,
        follows: false,
        seals: false,
        lanes: false,
        moving: None,
        lacks: None,
    }
}

fn heard() -> Vec<FromMachine> {
    let stopped = MachineEvent::Stopped {
        reason: StopReason::InternalError {
            detail: "rip 0".into(),
        },
    };
    vec![
        FromMachine::Ready {
            version: 1,
            lacks: false,
        },
        FromMachine::Status {
            version: 1,
            id: ID,
            state: State::Paused,
            guest: None,
            devices: None,
            size: None,
            suspends: false,
            sends: false,
            copies: false,
            hands: false,
            follows: false,
            seals: false,
            lanes: false,
            moving: None,
            lacks: None,
        },
        FromMachine::Status {
            version: 1,
            id: ID,
            state: State::Running,
            guest: Some(GuestSaid {
                panicked: true,
                watchdog_fired: 2,
                holds: 3,
            }),
            devices: None,
            size: None,
            suspends: false,
            sends: false,
            copies: false,
            hands: false,
            follows: false,
            seals: false,
            lanes: false,
            moving: None,
            lacks: None,
        },
        with_devices(),
        FromMachine::DeviceRefused {
            id: DEVICE,
            detail: "in use".into(),
        },
        FromMachine::ResizeRefused {
            detail: "too few".into(),
        },
        FromMachine::Event {
            event: MachineEvent::Running,
        },
        FromMachine::Event { event: stopped },
        FromMachine::Refused {
            detail: "no".into(),
        },
        FromMachine::Failed {
            detail: "no memory".into(),
        },
        FromMachine::Status {
            version: 1,
            id: ID,
            state: State::Paused,
            guest: None,
            devices: None,
            size: None,
            suspends: true,
            sends: false,
            copies: false,
            hands: false,
            follows: false,
            seals: false,
            lanes: false,
            moving: None,
            lacks: None,
        },
    ]
}

/// Of suspended, sent, copied and handed-over guests.
fn heard_of_ways() -> Vec<FromMachine> {
    vec![
        FromMachine::Suspended {
            attempt: DEVICE.0,
            error: None,
        },
        FromMachine::Suspended {
            attempt: DEVICE.0,
            error: Some("disk full".into()),
        },
        FromMachine::Moving(moving()),
        offered(),
        FromMachine::Status {
            version: 1,
            id: ID,
            state: State::Running,
            guest: None,
            devices: None,
            size: None,
            suspends: true,
            sends: true,
            copies: true,
            hands: false,
            follows: false,
            seals: false,
            lanes: false,
            moving: None,
            lacks: None,
        },
        FromMachine::Copied {
            attempt: DEVICE.0,
            error: None,
        },
        FromMachine::Copied {
            attempt: DEVICE.0,
            error: Some("disk full".into()),
        },
        FromMachine::Status {
            version: 1,
            id: ID,
            state: State::Running,
            guest: None,
            devices: None,
            size: None,
            suspends: true,
            sends: true,
            copies: true,
            hands: true,
            follows: false,
            seals: false,
            lanes: false,
            moving: None,
            lacks: None,
        },
        FromMachine::TookOver { blackout_us: 1500 },
    ]
}

/// Of guests whose memory follows them.
fn heard_of_memory() -> Vec<FromMachine> {
    vec![
        FromMachine::Ready {
            version: 1,
            lacks: true,
        },
        FromMachine::Status {
            version: 1,
            id: ID,
            state: State::Running,
            guest: None,
            devices: None,
            size: None,
            suspends: true,
            sends: true,
            copies: true,
            hands: true,
            follows: true,
            seals: false,
            lanes: false,
            moving: None,
            lacks: Some(Lacks {
                starving: Some("reset".into()),
            }),
        },
        FromMachine::Moving(Moving {
            state: migration::State::Offered {
                ran: true,
                doubt: None,
                owes: true,
            },
            progress: migration::Progress {
                followed: Some(migration::Followed {
                    bytes: 4096,
                    waits: 2,
                    took_us: 17,
                }),
                broken: Some("reset".into()),
                ..moving().progress
            },
            ..moving()
        }),
        // And of processes that speak TLS themselves.
        FromMachine::Status {
            version: 1,
            id: ID,
            state: State::Paused,
            guest: None,
            devices: None,
            size: None,
            suspends: true,
            sends: true,
            copies: true,
            hands: true,
            follows: true,
            seals: true,
            lanes: false,
            moving: None,
            lacks: None,
        },
        // And of those that take several connections.
        FromMachine::Status {
            version: 1,
            id: ID,
            state: State::Paused,
            guest: None,
            devices: None,
            size: None,
            suspends: true,
            sends: true,
            copies: true,
            hands: true,
            follows: true,
            seals: true,
            lanes: true,
            moving: None,
            lacks: None,
        },
        FromMachine::Moving(Moving {
            state: migration::State::Copying,
            progress: migration::Progress {
                lanes: 3,
                ..moving().progress
            },
            ..moving()
        }),
    ]
}

/// That say why a round was the last or not.
fn heard_of_reasons() -> Vec<FromMachine> {
    vec![FromMachine::Moving(Moving {
        progress: migration::Progress {
            rounds: vec![migration::Round {
                rate: 6,
                throttled: 7,
                cut: true,
                why: Some("it helps".to_owned()),
                ..moving().progress.rounds[0].clone()
            }],
            ..moving().progress
        },
        ..moving()
    })]
}

#[test]
fn packets_of_version_1_are_still_understood() {
    let (sent, heard) = (
        sent(),
        [
            heard(),
            heard_of_ways(),
            heard_of_memory(),
            heard_of_reasons(),
        ]
        .concat(),
    );
    assert_eq!(
        read::<ToMachine>("to-machine-v1.jsonl"),
        sent,
        "{:#?}",
        text(&sent)
    );
    assert_eq!(
        read::<FromMachine>("from-machine-v1.jsonl"),
        heard,
        "{:#?}",
        text(&heard)
    );
}
