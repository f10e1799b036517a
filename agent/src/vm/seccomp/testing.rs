//! What the kernel would do by a filter.

use seccompiler::sock_filter;

/// The program's answer to a call, as the kernel carries it out: classic BPF over seccomp_data.
pub fn answer(program: &[sock_filter], architecture: u32, number: u32, arguments: [u64; 6]) -> u32 {
    let load = |offset: u32| match offset {
        0 => number,
        4 => architecture,
        16.. => {
            let (which, high) = ((offset - 16) / 8, offset % 8 == 4);
            let argument = arguments[which as usize];
            if high {
                (argument >> 32) as u32
            } else {
                argument as u32
            }
        }
        _ => panic!("offset {offset}"),
    };
    let (mut at, mut accumulator) = (0, 0_u32);
    loop {
        let step = &program[at];
        at += 1;
        let mut jump =
            |condition: bool| at += usize::from(if condition { step.jt } else { step.jf });
        match u32::from(step.code) {
            0x20 => accumulator = load(step.k),
            0x05 => at += step.k as usize,
            0x15 => jump(accumulator == step.k),
            0x25 => jump(accumulator > step.k),
            0x35 => jump(accumulator >= step.k),
            0x54 => accumulator &= step.k,
            0x06 => return step.k,
            code => panic!("instruction {code:#x}"),
        }
    }
}
