//! Runs the body of a fuzz target in an ordinary test: over the checked-in seeds and over mutations of
//! them, bounded in number and always the same. Taken in by `#[path]` where there is a target.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;

/// Calls `body` with every file in `seeds`, then with `rounds` mutations of these.
pub fn replay(seeds: &Path, rounds: u64, body: impl Fn(&[u8])) {
    let mut files: Vec<_> = std::fs::read_dir(seeds)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    let seeds: Vec<_> = files
        .iter()
        .map(|file| std::fs::read(file).unwrap())
        .collect();
    assert!(!seeds.is_empty(), "there are seeds");
    for (file, seed) in files.iter().zip(&seeds) {
        run(&file.display().to_string(), seed, &body);
    }
    for round in 0..rounds {
        let input = mutate(&seeds, &mut Random(round));
        run(&format!("round {round}"), &input, &body);
    }
}

/// A panic goes on, with the input that led to it in the test's output.
fn run(name: &str, input: &[u8], body: &impl Fn(&[u8])) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| body(input))) {
        let hex: String = input.iter().map(|byte| format!("{byte:02x}")).collect();
        eprintln!("{name}: {hex}");
        resume_unwind(panic);
    }
}

fn mutate(seeds: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    const LENGTH_MAX: usize = 64 << 10;
    let mut input = random.pick(seeds).clone();
    for _ in 0..1 + random.below(8) {
        let at = random.below(input.len().max(1));
        match random.below(8) {
            0 | 1 => change(&mut input, at, |byte| byte ^ (1 << (at % 8))),
            2 => {
                let new = random.next() as u8;
                change(&mut input, at, |_| new);
            }
            3 => {
                let edge = *random.pick(&[0, 1, 0x7f, 0x80, 0xfe, 0xff]);
                let count = 1 << random.below(4);
                (at..at + count).for_each(|at| change(&mut input, at, |_| edge));
            }
            4 => change(&mut input, at, |byte| byte.wrapping_add(1)),
            5 => input.truncate(at),
            6 => {
                // A piece of any seed, put in or over.
                let other = random.pick(seeds);
                let from = random.below(other.len().max(1));
                let piece = &other[from..(from + 1 + random.below(48)).min(other.len())];
                let end = if random.below(2) == 0 {
                    at
                } else {
                    (at + piece.len()).min(input.len())
                };
                input.splice(at.min(end)..end, piece.iter().copied());
            }
            _ => {
                // Goes on as another seed does.
                let other = random.pick(seeds);
                let from = at.min(other.len());
                input.truncate(at);
                input.extend(&other[from..]);
            }
        }
    }
    input.truncate(LENGTH_MAX);
    input
}

fn change(input: &mut [u8], at: usize, how: impl Fn(u8) -> u8) {
    if let Some(byte) = input.get_mut(at) {
        *byte = how(*byte);
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }
}
