//! What becomes of a machine's devices while its process runs: the next move of each, and where it
//! stands, from what is wanted and what is seen.
//!
//! A move may be repeated, and after a crash of agent or process the same moves follow from what the
//! process then says it has. Nothing here waits for a guest: what only a guest can do is no move.

use crate::device::{DeviceState, Presence};

/// Where a device is, as far as the agent knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// There is no process, or it says that it has not got it.
    Outside,
    /// There is a process, and it has not said.
    Unknown,
    /// Handed to the process, which has not answered.
    Handed,
    Inside,
    /// The guest has been asked to let it go, and has not.
    Asked,
}

/// What stood in the way of a move, until a newer intent or process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trouble {
    /// The host could not open it, or delete it.
    Failed(String),
    /// The machine's process cannot take it while it runs.
    Refused(String),
}

/// What is there of a device.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SeenDevice<'a> {
    pub place: Place,
    /// There is a process whose guest has begun.
    pub running: bool,
    pub trouble: Option<&'a Trouble>,
    /// It has content on this host or somewhere else.
    pub stands: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Move {
    /// Open it, and hand it to the process.
    Attach,
    /// Ask the guest to let it go.
    Detach,
    /// Do away with its content.
    Delete,
}

/// The next move; none: it is as is wanted, or not for the agent to change.
pub fn next(wanted: Presence, seen: &SeenDevice<'_>) -> Option<Move> {
    let clear = seen.trouble.is_none();
    match (wanted, seen.place) {
        (Presence::Attached, Place::Outside) if seen.running && clear => Some(Move::Attach),
        (Presence::Detached | Presence::Deleted, Place::Inside) if seen.running => {
            Some(Move::Detach)
        }
        (Presence::Deleted, Place::Outside) if seen.stands && clear => Some(Move::Delete),
        // One that the guest was asked for may go at any moment: it is attached anew when it has.
        (_, Place::Outside | Place::Unknown | Place::Handed | Place::Inside | Place::Asked) => None,
    }
}

/// Whether the agent is not done with it.
pub fn is_pending(wanted: Presence, seen: &SeenDevice<'_>) -> bool {
    next(wanted, seen).is_some() || seen.place == Place::Handed
}

/// What is told of it.
pub fn state(wanted: Presence, seen: &SeenDevice<'_>) -> DeviceState {
    let failed = |reason: &String| DeviceState::Failed {
        reason: reason.clone(),
    };
    let next_start = |reason: &str| DeviceState::AtNextStart {
        reason: reason.to_owned(),
    };
    match (seen.place, wanted) {
        (Place::Inside, Presence::Attached) => DeviceState::Attached,
        (Place::Asked | Place::Inside, _) => DeviceState::Detaching,
        (Place::Handed, _) | (Place::Unknown, Presence::Attached) => DeviceState::Attaching,
        (Place::Unknown, _) => DeviceState::Detaching,
        (Place::Outside, Presence::Detached) => DeviceState::Detached,
        (Place::Outside, Presence::Deleted) => match seen.trouble {
            _ if !seen.stands => DeviceState::Deleted,
            Some(Trouble::Failed(reason)) => failed(reason),
            Some(Trouble::Refused(_)) | None => DeviceState::Detached,
        },
        (Place::Outside, Presence::Attached) => match seen.trouble {
            Some(Trouble::Failed(reason)) => failed(reason),
            Some(Trouble::Refused(reason)) => next_start(reason),
            None if !seen.running => next_start("the machine does not run"),
            None => DeviceState::Attaching,
        },
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A host, a process and a guest with one device.
    #[derive(Debug)]
    struct Model {
        wanted: Presence,
        content: bool,
        /// The process; whether it has the device, and whether its guest was asked for it.
        process: Option<(bool, bool)>,
        /// The guest lets go of what it is asked for.
        obliging: bool,
        /// What the agent knows: forgotten with it.
        heard: bool,
        trouble: Option<Trouble>,
    }

    #[derive(Debug, Clone)]
    enum Happening {
        Wanted(Presence),
        /// The agent makes so many moves.
        Moves(usize),
        AgentCrashes,
        AgentHears,
        ProcessDies,
        ProcessStarts,
        GuestObliges(bool),
        Refuses,
    }

    impl Model {
        fn new() -> Self {
            Self {
                wanted: Presence::Detached,
                content: false,
                process: None,
                obliging: true,
                heard: true,
                trouble: None,
            }
        }

        fn seen(&self) -> SeenDevice<'_> {
            SeenDevice {
                place: match (self.process, self.heard) {
                    (None, _) | (Some((false, _)), true) => Place::Outside,
                    (Some(_), false) => Place::Unknown,
                    (Some((true, true)), true) => Place::Asked,
                    (Some((true, false)), true) => Place::Inside,
                },
                running: self.process.is_some(),
                trouble: self.trouble.as_ref(),
                stands: self.content,
            }
        }

        fn act(&mut self) -> Option<Move> {
            let next = next(self.wanted, &self.seen())?;
            match next {
                Move::Attach => {
                    assert_eq!(self.wanted, Presence::Attached);
                    assert_eq!(self.process, Some((false, false)), "it has it already");
                    self.content = true;
                    self.process = Some((true, false));
                }
                Move::Detach => {
                    assert_ne!(self.wanted, Presence::Attached);
                    self.process = Some((true, true));
                }
                Move::Delete => {
                    assert_eq!(self.wanted, Presence::Deleted, "nobody asked for that");
                    assert!(
                        !matches!(self.process, Some((true, _))),
                        "under a guest's hands"
                    );
                    self.content = false;
                }
            }
            Some(next)
        }

        /// What the guest does of its own accord.
        fn breathe(&mut self) {
            if self.obliging && matches!(self.process, Some((true, true))) {
                self.process = Some((false, false));
            }
        }

        fn happens(&mut self, happening: Happening) {
            match happening {
                Happening::Wanted(wanted) => (self.wanted, self.trouble) = (wanted, None),
                Happening::Moves(moves) => {
                    for _ in 0..moves {
                        self.act();
                    }
                }
                Happening::AgentCrashes => (self.heard, self.trouble) = (false, None),
                Happening::AgentHears => self.heard = true,
                Happening::ProcessDies => self.process = None,
                Happening::ProcessStarts => {
                    let has = self.wanted == Presence::Attached;
                    self.content |= has;
                    self.process = self.process.or(Some((has, false)));
                    self.trouble = None;
                }
                Happening::GuestObliges(obliging) => self.obliging = obliging,
                Happening::Refuses => self.trouble = Some(Trouble::Refused("full".into())),
            }
        }
    }

    fn presence() -> impl Strategy<Value = Presence> {
        prop_oneof![
            2 => Just(Presence::Attached),
            2 => Just(Presence::Detached),
            1 => Just(Presence::Deleted)
        ]
    }

    fn happening() -> impl Strategy<Value = Happening> {
        prop_oneof![
            3 => presence().prop_map(Happening::Wanted),
            4 => (0..3usize).prop_map(Happening::Moves),
            1 => Just(Happening::AgentCrashes),
            1 => Just(Happening::AgentHears),
            1 => Just(Happening::ProcessDies),
            2 => Just(Happening::ProcessStarts),
            1 => any::<bool>().prop_map(Happening::GuestObliges),
            1 => Just(Happening::Refuses),
        ]
    }

    proptest! {
        /// Whatever happened before: a host that is let be comes to what is wanted, or to what only
        /// its guest keeps from it, in a few moves; and content is lost by `Deleted` alone.
        #[test]
        fn a_device_ends_where_it_is_wanted_and_no_content_is_lost(
            history in prop::collection::vec(happening(), 0..24),
            wanted in presence(),
            obliging: bool,
        ) {
            let mut model = Model::new();
            let (mut had, mut deleted) = (false, false);
            for happening in history {
                model.happens(happening);
                model.breathe();
                model.heard |= model.process.is_none();
                deleted |= model.wanted == Presence::Deleted;
                had |= model.content;
                prop_assert!(deleted || model.content == had, "{model:?}");
            }
            model.happens(Happening::Wanted(wanted));
            model.obliging = obliging;
            model.heard = true;
            let mut moves = 0;
            for _ in 0..10 {
                moves += usize::from(model.act().is_some());
                model.breathe();
            }
            prop_assert!(moves <= 2, "{moves} moves");
            let seen = model.seen();
            prop_assert!(!is_pending(wanted, &seen));
            let expected = match (wanted, seen.place, seen.running) {
                (_, Place::Asked, _) => {
                    prop_assert!(!obliging);
                    DeviceState::Detaching
                }
                (Presence::Attached, _, true) => DeviceState::Attached,
                (Presence::Attached, _, false) => DeviceState::AtNextStart {
                    reason: "the machine does not run".into(),
                },
                (Presence::Detached, ..) => DeviceState::Detached,
                (Presence::Deleted, ..) => DeviceState::Deleted,
            };
            prop_assert_eq!(state(wanted, &seen), expected);
            prop_assert!(wanted != Presence::Deleted || seen.place == Place::Asked || !model.content);
        }
    }

    #[test]
    fn what_a_process_refuses_comes_with_the_next_start_and_what_fails_is_told() {
        let refused = Trouble::Refused("it is of an older version".into());
        let failed = Trouble::Failed("no space left".into());
        let seen = |trouble| SeenDevice {
            place: Place::Outside,
            running: true,
            trouble,
            stands: true,
        };
        assert_eq!(next(Presence::Attached, &seen(Some(&refused))), None);
        assert!(matches!(
            state(Presence::Attached, &seen(Some(&refused))),
            DeviceState::AtNextStart { reason } if reason.contains("older")
        ));
        assert_eq!(next(Presence::Deleted, &seen(Some(&failed))), None);
        let told = state(Presence::Deleted, &seen(Some(&failed)));
        assert!(matches!(told, DeviceState::Failed { reason } if reason.contains("space")));
        // That it could not be attached keeps nobody from deleting it: a newer intent does.
        assert_eq!(next(Presence::Deleted, &seen(None)), Some(Move::Delete));
    }
}
