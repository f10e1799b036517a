//! Hostile acts: what a guest must be able to do without harm to anyone but itself.

use crate::command::{Probe, Refusal, Words};
use crate::serial::Line;

pub fn act(_: &mut Probe, _: &mut Words, _: &mut Line) -> Result<(), Refusal> {
    Err(Refusal::Unknown)
}
