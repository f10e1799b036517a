//! Life of a machine, with guests of a few instructions on the real KVM.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a fault fails the test"
)]

mod common;

use std::os::fd::AsFd;

use common::{Guest, PATIENCE, Rig, config, files, kernel_file};
use fractus_vmm::config::{ConsoleFiles, ConsolePortConfig, WatchdogAction, WatchdogConfig};
use fractus_vmm::machine::{Event, Machine, RunState, StopReason};

#[test]
fn a_pvh_kernel_is_heard_on_the_serial_line() {
    let mut rig = Rig::start(&Guest::new().say("hello").halt());
    assert_eq!(rig.hear(5), "hello");
    rig.wait(&Event::Running);
    assert_eq!(rig.machine.state(), RunState::Running);
    rig.machine.stop();
    assert_eq!(rig.wait_stop(), StopReason::Requested);
}

#[test]
fn a_triple_fault_names_its_vcpu_and_where_that_stood() {
    let mut rig = Rig::start(&Guest::new().say("x").triple_fault());
    let stopped = rig.wait_stop();
    let StopReason::TripleFault { vcpu: 0, registers } = stopped else {
        panic!("{stopped}");
    };
    // Not zeros, which would mean that they could not be read; kvm_amd has reset them.
    assert!(registers.cr0 != 0 && registers.rip != 0, "{registers}");
    assert_eq!(rig.machine.state(), RunState::Stopped);
}

#[test]
fn a_reset_begins_anew_with_memory_cleared() {
    // Says the byte at 2 MiB plus '0' and sets it: '0' in every life if memory is cleared.
    let guest = Guest::new()
        // mov al, [0x200000]; add al, '0'; mov dx, 0x3f8; out dx, al
        .bytes(&[
            0xa0, 0, 0, 0x20, 0, 0x04, b'0', 0x66, 0xba, 0xf8, 0x03, 0xee,
        ])
        .store(0x20_0000, 7)
        .out(0xcf9, 0x06)
        .halt();
    let mut rig = Rig::start(&guest);
    rig.wait(&Event::GuestReset);
    rig.wait(&Event::GuestReset);
    assert_eq!(rig.hear(3), "000");
}

#[test]
fn a_jump_to_the_firmwares_first_instruction_is_a_reset() {
    // mov eax, 0xffff0; jmp eax
    let jump = Guest::new()
        .say("x")
        .bytes(&[0xb8, 0xf0, 0xff, 0x0f, 0, 0xff, 0xe0]);
    let mut rig = Rig::start(&jump);
    rig.wait(&Event::GuestReset);
    assert_eq!(rig.hear(2), "xx");
}

#[test]
fn a_paused_machine_says_nothing_until_it_is_resumed() {
    let mut rig = Rig::start(&Guest::new().chatter());
    rig.hear(10);
    rig.machine.pause().unwrap();
    assert_eq!(rig.machine.state(), RunState::Paused);
    // What was said before the pause, and then nothing.
    rig.serial.set_nonblocking(true).unwrap();
    let mut buffer = [0; 4096];
    while std::io::Read::read(&mut rig.serial, &mut buffer).is_ok() {}
    assert!(std::io::Read::read(&mut rig.serial, &mut buffer).is_err());
    rig.serial.set_nonblocking(false).unwrap();
    rig.machine.resume().unwrap();
    assert_eq!(rig.hear(10), "..........");
    {
        let guard = rig.machine.pause_guard().unwrap();
        assert_eq!(guard.state(), RunState::Paused);
    }
    assert_eq!(rig.machine.state(), RunState::Running);
}

#[test]
fn many_vcpus_enter_before_running_is_told() {
    let mut config = config();
    config.cpus.count = 8;
    let mut rig = Rig::build(config, &Guest::new().say("x").halt());
    assert_eq!(rig.machine.next_event(), None);
    rig.machine.start().unwrap();
    rig.wait(&Event::Running);
    rig.machine.pause().unwrap();
    rig.machine.resume().unwrap();
    rig.wait(&Event::Running);
}

#[test]
fn orders_at_the_wrong_time_are_refused() {
    let mut rig = Rig::build(config(), &Guest::new().halt());
    assert!(rig.machine.pause().is_err());
    assert!(rig.machine.resume().is_err());
    rig.machine.start().unwrap();
    assert!(rig.machine.start().is_err());
    rig.machine.stop();
    assert!(rig.machine.start().is_err());
}

#[test]
fn input_reaches_the_guest_through_the_receiver() {
    // 1: in al, LSR; test al, 1; jz 1b; then echo what came.
    let guest = Guest::new()
        .bytes(&[0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb])
        .echo(0x3f8)
        .bytes(&[0xeb, 0xeb]);
    let mut rig = Rig::start(&guest);
    let text = "a line of input that is longer than the port's own 64 bytes of buffer, by some";
    std::io::Write::write_all(&mut rig.serial, text.as_bytes()).unwrap();
    assert_eq!(rig.hear(text.len()), text);
}

#[test]
fn a_file_that_is_no_kernel_is_refused_with_the_reason() {
    let (files, _serial) = files(kernel_file(&[0; 4096]));
    let error = Machine::build(config(), files, None).err().unwrap();
    let source = std::error::Error::source(&error).map(ToString::to_string);
    assert_eq!(
        source.as_deref(),
        Some("neither an ELF file nor a Linux bzImage")
    );
}

#[test]
fn a_machine_leaves_no_descriptor_and_no_thread_behind() {
    let count = |what: &str| {
        std::fs::read_dir(format!("/proc/self/{what}"))
            .unwrap()
            .count()
    };
    // Its own process under nextest; under `cargo test` other tests would disturb the count.
    if std::env::var_os("NEXTEST").is_none() {
        return;
    }
    drop(Rig::start(&Guest::new().halt()));
    let (descriptors, threads) = (count("fd"), count("task"));
    for _ in 0..3 {
        let mut rig = Rig::start(&Guest::new().halt());
        assert_eq!(rig.machine.wait_event(PATIENCE), Some(Event::Running));
    }
    assert_eq!((count("fd"), count("task")), (descriptors, threads));
}

#[test]
fn a_guest_that_enters_s5_has_powered_itself_off() {
    let mut rig = Rig::start(&Guest::new().out(0x600, 5 << 2 | 1 << 5).halt());
    assert_eq!(rig.wait_stop(), StopReason::GuestPowerOff);
}

#[test]
fn a_panic_is_told_and_the_machine_runs_on() {
    let guest = Guest::new().echo(0x505).out(0x505, 1).say("on").halt();
    let mut rig = Rig::start(&guest);
    rig.wait(&Event::Panicked {
        crash_loaded: false,
    });
    assert_eq!(rig.hear(3), "\u{3}on");
    assert_eq!(rig.machine.state(), RunState::Running);
}

#[test]
fn the_power_button_is_read_from_the_event_register() {
    // 1: in al, 0x604; test al, al; jz 1b; add al, '0'; out
    let guest = Guest::new()
        .bytes(&[0x66, 0xba, 0x04, 0x06, 0xec, 0x84, 0xc0, 0x74, 0xfb])
        .bytes(&[0x04, b'0', 0x66, 0xba, 0xf8, 0x03, 0xee])
        .halt();
    let mut rig = Rig::start(&guest);
    rig.wait(&Event::Running);
    rig.machine.press_power_button();
    assert_eq!(rig.hear(1), "1");
}

/// mov edx, port; mov eax, value; out dx, eax
fn out32(port: u16, value: u32) -> Vec<u8> {
    let mut code = vec![0xba];
    code.extend(u32::from(port).to_le_bytes());
    code.push(0xb8);
    code.extend(value.to_le_bytes());
    code.push(0xef);
    code
}

#[test]
fn a_watchdog_that_is_not_fed_resets_the_machine_and_says_so_afterwards() {
    let mut config = config();
    config.watchdog = Some(WatchdogConfig {
        action: WatchdogAction::Reset,
    });
    // Says whether it fired, as '0' or '1'; then counts 100 ms, and is not fed.
    let guest = Guest::new()
        .bytes(&[0x66, 0xba, 0x2c, 0x06, 0xec])
        .bytes(&[0x04, b'0', 0x66, 0xba, 0xf8, 0x03, 0xee])
        .bytes(&out32(0x624, 1))
        .bytes(&out32(0x620, 1))
        .halt();
    let mut rig = Rig::build(config, &guest);
    rig.machine.start().unwrap();
    rig.wait(&Event::WatchdogFired);
    rig.wait(&Event::GuestReset);
    assert_eq!(rig.hear(2), "01");
}

/// Says a letter, notes in memory that it has, says the next.
fn counting() -> Guest {
    // 1: inc dword [0x200000]; mov al, [0x200000]; and al, 0x0f; add al, 'a'; mov dx, 0x3f8;
    // out dx, al; mov ecx, 1000; 2: dec ecx; jnz 2b; jmp 1b
    Guest::new()
        .bytes(&[0xff, 0x05, 0, 0, 0x20, 0, 0xa0, 0, 0, 0x20, 0, 0x24, 0x0f])
        .bytes(&[0x04, b'a', 0x66, 0xba, 0xf8, 0x03, 0xee])
        .bytes(&[0xb9, 0xe8, 0x03, 0, 0, 0x49, 0x75, 0xfd, 0xeb, 0xe2])
}

/// Every letter follows the one before it.
fn assert_unbroken(said: &str) {
    for pair in said.as_bytes().windows(2) {
        let wanted = (pair[0] - b'a' + 1) % 16 + b'a';
        assert_eq!(pair[1], wanted, "broken: {said}");
    }
}

#[test]
fn a_restored_machine_goes_on_with_the_very_next_instruction() {
    let mut config = config();
    config.cpus.count = 2;
    config.rng = Some(Default::default());
    config.console_ports = vec![ConsolePortConfig {
        name: "agent".to_owned(),
        console: false,
    }];
    config.watchdog = Some(WatchdogConfig {
        action: WatchdogAction::None,
    });
    let guest = counting();
    let (mut descriptors, serial) = files(kernel_file(&guest.elf()));
    descriptors.console_ports = vec![ConsoleFiles::default()];
    let machine = Machine::build(config, descriptors, None).unwrap();
    let mut rig = Rig { machine, serial };
    rig.machine.start().unwrap();
    let mut said = rig.hear(100);
    for _ in 0..5 {
        rig.machine.pause().unwrap();
        let bytes = postcard::to_stdvec(&rig.machine.save().unwrap()).unwrap();
        let memory = rig.machine.memory().as_fd().try_clone_to_owned().unwrap();
        drop(rig.machine);
        std::io::Read::read_to_string(&mut rig.serial, &mut said).unwrap();
        let saved = postcard::from_bytes(&bytes).unwrap();
        let (mut descriptors, serial) = files(kernel_file(&guest.elf()));
        descriptors.console_ports = vec![ConsoleFiles::default()];
        let machine = Machine::restore(saved, memory.into(), descriptors, None).unwrap();
        rig = Rig { machine, serial };
        assert_eq!(rig.machine.state(), RunState::Paused);
        rig.machine.resume().unwrap();
        said += &rig.hear(100);
    }
    assert_unbroken(&said);
}

#[test]
fn a_running_machine_cannot_be_saved() {
    let rig = Rig::start(&Guest::new().halt());
    assert!(rig.machine.save().is_err());
}

#[test]
fn a_bzimage_finds_its_header_initrd_and_command_line() {
    // Says 'L'; then the first bytes of what the zero page at RSI says: header, initrd, command line.
    let say = [0x66, 0xba, 0xf8, 0x03, 0xee];
    let code = Guest::new()
        .say("L")
        .bytes(&[0x8a, 0x86, 0x02, 0x02, 0, 0])
        .bytes(&say)
        .bytes(&[0x8b, 0x9e, 0x18, 0x02, 0, 0, 0x8a, 0x03])
        .bytes(&say)
        .bytes(&[0x8b, 0x9e, 0x28, 0x02, 0, 0, 0x8a, 0x03])
        .bytes(&say)
        .halt();
    let (mut files, serial) = files(kernel_file(&code.bz_image()));
    files.initrd = Some(kernel_file(b"initrd"));
    let mut config = config();
    config.command_line = "command line".to_owned();
    let mut machine = Machine::build(config, files, None).unwrap();
    machine.start().unwrap();
    let mut rig = Rig { machine, serial };
    assert_eq!(rig.hear(4), "LHic");
}

#[test]
fn a_vcpu_that_kvm_cannot_run_stops_the_machine_with_its_registers() {
    // Executes from an address where no memory is: mov eax, 0xd0000000; jmp eax
    let mut rig = Rig::start(&Guest::new().bytes(&[0xb8, 0, 0, 0, 0xd0, 0xff, 0xe0]));
    let StopReason::InternalError { vcpu, detail } = rig.wait_stop() else {
        panic!("another reason");
    };
    assert_eq!(vcpu, 0);
    assert!(detail.contains("suberror 1"), "{detail}");
    assert!(detail.contains("0xd0000000"), "{detail}");
}

#[test]
fn an_order_wakes_who_waits_for_events_and_old_news_is_not_told() {
    let mut rig = Rig::build(config(), &Guest::new().halt());
    rig.machine.start().unwrap();
    rig.machine.pause().unwrap();
    let fd = rig.machine.event_fd().try_clone_to_owned().unwrap();
    let readable = || {
        let mut fds = [rustix::event::PollFd::new(
            &fd,
            rustix::event::PollFlags::IN,
        )];
        rustix::event::poll(&mut fds, Some(&rustix::time::Timespec::default())).unwrap() == 1
    };
    assert!(readable());
    assert_eq!(rig.machine.next_event(), Some(Event::Paused));
    assert_eq!(rig.machine.next_event(), None);
    assert!(!readable());
}
