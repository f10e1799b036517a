//! Which seeds a storm goes through: those that it is written with, and further ones where FRACTUS_SEEDS wants more
//! (`scripts/test --full`). No two storms have one in common, however many there are.

use std::collections::BTreeSet;
use std::ops::Range;

/// Further seeds of a storm begin where no other's do, and are no more than this.
const ROOM: u64 = 1_000_000;

/// Of a storm that is written with `own`, which no other has. FRACTUS_SEEDS is how many there are to be; on PostgreSQL,
/// which takes ten times as long for each of the many small writes, a tenth of them.
pub fn of(own: Range<u64>) -> Vec<u64> {
    let wanted = std::env::var("FRACTUS_SEEDS").ok();
    let wanted = wanted.map(|text| text.parse().expect("FRACTUS_SEEDS is a number"));
    let count = wanted.unwrap_or(own.end - own.start);
    match crate::database::testing::on_postgres() {
        true => first(own, count / 10),
        false => first(own, count),
    }
}

fn first(own: Range<u64>, count: u64) -> Vec<u64> {
    let further = (own.start + 1) * ROOM;
    let further = further..further + ROOM;
    let seeds: Vec<u64> = own.chain(further).take(count as usize).collect();
    assert_eq!(
        seeds.len() as u64,
        count,
        "more seeds than there is room for"
    );
    seeds
}

#[test]
fn a_storm_has_as_many_seeds_as_are_wanted_and_none_of_anothers() {
    // Wherever they begin, one behind the other.
    let all = [0..50, 50..100, 100..101, 1000..1050, 4000..4020, 4020..4030];
    for count in [1, 50, 1000, 20_000] {
        let mut seen = BTreeSet::new();
        for own in all.clone() {
            let seeds = first(own.clone(), count);
            assert_eq!(seeds.len() as u64, count);
            assert!(own.take(count as usize).all(|seed| seeds.contains(&seed)));
            seen.extend(seeds);
        }
        assert_eq!(seen.len() as u64, count * all.len() as u64);
    }
}
