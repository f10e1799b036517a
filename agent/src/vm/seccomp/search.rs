//! A filter that finds a system call's number by halves.
//!
//! The crate's programs compare a number with each in turn, and the kernel looks at a program for every number that there
//! is when a thread takes it on, to know those that it always allows: 0.6 ms for a hundred calls, for each thread of a
//! machine, on the way to a guest's first step. By halves, over ranges of numbers, it is a tenth of that. What is allowed for
//! some arguments only stays the crate's.

use std::ops::Range;

use seccompiler::{BpfProgram, sock_filter};

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const IF_NOT_LESS: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
const GO: u16 = (libc::BPF_JMP | libc::BPF_JA) as u16;
const ANSWER: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
/// Where seccomp_data has them.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
/// AUDIT_ARCH_X86_64.
const X86_64: u32 = 0xc000_003e;

/// Allows the calls of `always`, and has `rest` decide on all others and on other architectures.
///
/// # Errors
/// There are too many of them for a program.
pub fn first(always: &[i64], rest: BpfProgram) -> Result<BpfProgram, String> {
    let mut program = vec![
        instruction(LOAD, ARCHITECTURE),
        sock_filter {
            jt: 1,
            ..instruction(IF_EQUAL, X86_64)
        },
        // To the rest; its way is known when all else is there.
        instruction(GO, 0),
        instruction(LOAD, NUMBER),
    ];
    let mut leave = vec![2];
    let bounds = bounds(always)?;
    search(&bounds, false, &mut program, &mut leave)?;
    for at in leave {
        let way = program.len() - at - 1;
        if let Some(jump) = program.get_mut(at) {
            jump.k = u32::try_from(way).map_err(|error| error.to_string())?;
        }
    }
    program.extend(rest);
    Ok(program)
}

fn instruction(code: u16, k: u32) -> sock_filter {
    sock_filter {
        code,
        jt: 0,
        jf: 0,
        k,
    }
}

/// Numbers from which on calls are allowed, then are not, then are, and so on.
fn bounds(calls: &[i64]) -> Result<Vec<u32>, String> {
    let numbers: Result<Vec<u32>, _> = calls.iter().map(|call| u32::try_from(*call)).collect();
    let mut numbers = numbers.map_err(|error| error.to_string())?;
    numbers.sort_unstable();
    let mut ranges: Vec<Range<u32>> = Vec::new();
    for number in numbers {
        match ranges.last_mut() {
            Some(range) if number < range.end => {}
            Some(range) if number == range.end => range.end += 1,
            _ => ranges.push(number..number + 1),
        }
    }
    Ok(ranges
        .iter()
        .flat_map(|range| [range.start, range.end])
        .collect())
}

/// Adds what decides on a number that is in the accumulator and among `bounds`; below the first it is `allowed`. Whatever is
/// not goes on at the places that `leave` tells.
fn search(
    bounds: &[u32],
    allowed: bool,
    program: &mut BpfProgram,
    leave: &mut Vec<usize>,
) -> Result<(), String> {
    let half = bounds.len() / 2;
    let Some((bound, above)) = bounds.get(half..).and_then(<[u32]>::split_first) else {
        if allowed {
            program.push(instruction(ANSWER, libc::SECCOMP_RET_ALLOW));
        } else {
            leave.push(program.len());
            program.push(instruction(GO, 0));
        }
        return Ok(());
    };
    let at = program.len();
    program.push(instruction(IF_NOT_LESS, *bound));
    search(
        bounds.get(..half).unwrap_or_default(),
        allowed,
        program,
        leave,
    )?;
    let way = program.len() - at - 1;
    if let Some(jump) = program.get_mut(at) {
        jump.jt = u8::try_from(way).map_err(|_| format!("a jump over {way} instructions"))?;
    }
    // Each bound that is passed turns it round.
    let allowed = allowed ^ half.is_multiple_of(2);
    search(above, allowed, program, leave)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::answer;
    use super::*;

    const OTHERS: u32 = libc::SECCOMP_RET_TRAP;

    proptest! {
        #[test]
        fn a_number_is_allowed_where_it_is_listed_and_left_to_the_rest_elsewhere(
            calls in prop::collection::vec(0..600_i64, 0..120),
            others in prop::collection::vec(any::<u32>(), 0..20),
        ) {
            let program = first(&calls, vec![instruction(ANSWER, OTHERS)]).unwrap();
            for number in (0..700).chain(others) {
                let listed = calls.contains(&i64::from(number));
                let expected = if listed { libc::SECCOMP_RET_ALLOW } else { OTHERS };
                prop_assert_eq!(answer(&program, X86_64, number, [0; 6]), expected);
                // By 32 bits the same number is another call.
                prop_assert_eq!(answer(&program, 0x4000_0003, number, [0; 6]), OTHERS);
            }
        }
    }

    #[test]
    fn what_is_no_number_and_what_is_too_long_are_told() {
        assert!(first(&[-1], Vec::new()).is_err());
        let many: Vec<i64> = (0..2000).map(|call| call * 2).collect();
        assert!(first(&many, Vec::new()).is_err());
    }
}
