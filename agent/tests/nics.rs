//! Network devices that come and go while a machine runs: taps of this host, in a network of the test's
//! own. The guests are stand-ins, and the probe on KVM, where there is it.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;
#[path = "../../vmm/tests/tap/mod.rs"]
mod tap;

use common::machine::Machine;
use common::*;
use fractus_agent::network::tap_name;
use fractus_agent_api::device::{DeviceId, DeviceState, Mac, Nic};
use fractus_agent_api::machine::{MachineReport, Power, Refusal};
use uuid::Uuid;

fn nic(number: u8) -> Nic {
    Nic {
        id: DeviceId(Uuid::new_v4()),
        mac: Mac([2, 0xf0, 0, 0, 0, number]),
        mtu: Some(1400),
        queues: 1,
        limit: None,
    }
}

/// Interfaces of the test's own network.
fn interfaces() -> Vec<String> {
    let text = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let names = text.lines().filter_map(|line| line.split_once(':'));
    names.map(|(name, _)| name.trim().to_owned()).collect()
}

fn is_there(nic: &Nic) -> bool {
    interfaces().contains(&tap_name(nic.id))
}

/// Until an interface is gone: the kernel takes it down when the last who held it has closed it.
fn gone(nic: &Nic) -> Result {
    let by = std::time::Instant::now() + PATIENCE;
    while is_there(nic) {
        anyhow::ensure!(std::time::Instant::now() < by, "{:?}", interfaces());
        // sleeps because interfaces of the kernel are looked at, and do not call.
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    Ok(())
}

fn states(report: &MachineReport) -> Vec<DeviceState> {
    report.nics.iter().map(|nic| nic.state.clone()).collect()
}

#[test]
fn a_tap_is_there_for_as_long_as_its_machine_has_the_device() -> Result {
    tap::enter_namespace();
    block_on(async {
        let (_cloud, mut agent, kernel) = with_stand_ins().await?;
        let mut machine = Machine::start(&agent, &kernel).await?;
        let (first, second) = (nic(1), nic(2));
        let wants = vec![first.clone(), second.clone()];
        let report = machine.changed(|it| it.spec.nics = wants).await?;
        assert_eq!(states(&report), [const { DeviceState::Attached }; 2]);
        agent
            .console_says(machine.id, "came 02:f0:00:00:00:02")
            .await?;
        assert!(is_there(&first) && is_there(&second));
        machine
            .changed(|it| {
                it.spec
                    .nics
                    .retain(|nic| nic.mac == Mac([2, 0xf0, 0, 0, 0, 2]))
            })
            .await?;
        gone(&first)?;
        assert!(is_there(&second));
        // Another agent finds it as it is, and a new start has it too.
        let Machine {
            id,
            mut revision,
            wanted,
            ..
        } = machine;
        agent.restart().await?;
        agent
            .settled(id, revision, |report| {
                states(report) == [DeviceState::Attached]
            })
            .await?;
        let mut wanted = wanted;
        wanted.hard_reboots += 1;
        revision += 1;
        agent.put(id, &put(revision, wanted.clone())).await?;
        let report = agent.settled(id, revision, is_running).await?;
        assert_eq!(
            (states(&report), report.starts),
            (vec![DeviceState::Attached], 2)
        );
        assert!(is_there(&second));
        wanted.power = Power::Stopped;
        agent.put(id, &put(revision + 1, wanted.clone())).await?;
        agent.settled(id, revision + 1, |_| true).await?;
        gone(&second)?;
        Ok(())
    })
}

type Change = fn(&mut Vec<Nic>);

#[test]
fn networks_that_no_machine_could_have_are_refused() -> Result {
    tap::enter_namespace();
    block_on(async {
        let (_cloud, agent, kernel) = with_stand_ins().await?;
        let id = running(&agent, &kernel).await?;
        let wrong: [(Change, &str); 5] = [
            (|it| it[1].mac = it[0].mac, "given twice"),
            (|it| it[0].mac = Mac([1, 0, 0, 0, 0, 1]), "single station"),
            (|it| it[0].queues = 17, "queues"),
            (|it| it[0].mtu = Some(60), "MTU"),
            (|it| *it = (1..=9).map(nic).collect(), "at most 8"),
        ];
        for (change, word) in wrong {
            let mut wanted = wanted(&kernel, Power::Running);
            wanted.spec.nics = vec![nic(1), nic(2)];
            change(&mut wanted.spec.nics);
            let refused = agent.client.put(id, &put(2, wanted)).await.unwrap_err();
            let Some(Refusal::Invalid { detail }) = refused.refusal() else {
                panic!("{refused}");
            };
            assert!(detail.contains(word), "{detail}");
        }
        Ok(())
    })
}

#[test]
fn a_jailed_guest_gets_a_network_and_lets_it_go() -> Result {
    let Some(probe) = probe() else {
        println!("no /dev/kvm: nothing was tested");
        return Ok(());
    };
    tap::enter_namespace();
    block_on(async {
        let (_cloud, agent, kernel) = start(&probe, false).await?;
        let mut machine = Machine::start(&agent, &kernel).await?;
        agent.console_says(machine.id, "tick 1 ").await?;
        let new = nic(1);
        let wants = vec![new.clone()];
        let report = machine.changed(|it| it.spec.nics = wants).await?;
        assert_eq!(states(&report), [DeviceState::Attached]);
        let came = machine.slot("up").await?;
        let net = machine.asks("net").await?;
        assert!(net.contains("mac=02:f0:00:00:00:01"), "{net}");
        assert!(is_there(&new));
        machine.changed(|it| it.spec.nics.clear()).await?;
        assert_eq!(machine.slot("down").await?, came);
        machine.asks(&format!("eject {came}")).await?;
        agent
            .until(machine.id, |report| states(report).is_empty())
            .await?;
        gone(&new)?;
        Ok(())
    })
}
