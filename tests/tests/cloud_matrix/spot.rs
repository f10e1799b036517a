//! The states of a live migration, each by the message that is on its way in it, and what can break there.

use fractus_agent_api::machine::{MachineReport, Observed, Power, PutMachine};
use fractus_agent_api::migration::State;

/// A message of the protocol, which is caught on its way: what it asks for was not done, what it says is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spot {
    AskedToArrive,
    Arriving,
    AskedToDepart,
    Connecting,
    Copying,
    Owing,
    Ending,
    Answering,
    Offered,
    Arrived,
    ToldToContinue,
    Continued,
    Wanting,
    Following,
    AllThere,
    Whole,
    ToldToEnd,
    Ended,
}

/// How memory comes: the protocol is another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    PreCopy,
    PostCopy,
}

impl How {
    /// MiB of a guest's memory, and of these those that are written.
    pub fn ram(self) -> u32 {
        match self {
            Self::PreCopy => 32,
            // More than the connections between two hosts hold.
            Self::PostCopy => 64,
        }
    }

    pub fn filled(self) -> u32 {
        match self {
            Self::PreCopy => 4,
            Self::PostCopy => 40,
        }
    }
}

/// The agents of one migration.
#[derive(Debug, Clone, Copy)]
pub struct Sides {
    pub source: usize,
    pub target: usize,
}

/// What passes by.
pub enum Seen<'a> {
    /// The controller tells an agent.
    Told { agent: usize, put: &'a PutMachine },
    /// An agent says what it has.
    Said {
        agent: usize,
        report: &'a MachineReport,
    },
    /// The stream itself, of which this comes next.
    Stream(Spot),
}

impl Spot {
    /// Those of a migration.
    pub fn of(how: How) -> &'static [Self] {
        match how {
            How::PreCopy => &[
                Self::AskedToArrive,
                Self::Arriving,
                Self::AskedToDepart,
                Self::Connecting,
                Self::Copying,
                Self::Ending,
                Self::Answering,
                Self::Offered,
                Self::Arrived,
                Self::ToldToContinue,
                Self::Continued,
                Self::ToldToEnd,
                Self::Ended,
            ],
            // Until it is decided that memory follows it is the same.
            How::PostCopy => &[
                Self::Owing,
                Self::Ending,
                Self::Answering,
                Self::Offered,
                Self::Arrived,
                Self::ToldToContinue,
                Self::Continued,
                Self::Wanting,
                Self::Following,
                Self::AllThere,
                Self::Whole,
                Self::ToldToEnd,
                Self::Ended,
            ],
        }
    }

    /// Who is about to say what to whom: C the controller, S the source, T the target.
    pub fn title(self) -> &'static str {
        match self {
            Self::AskedToArrive => "C>T  a guest arrives",
            Self::Arriving => "T>C  it listens",
            Self::AskedToDepart => "C>S  the guest departs",
            Self::Connecting => "S>T  connects",
            Self::Copying => "S>T  memory, while it runs",
            Self::Owing => "S>T  which pages follow",
            Self::Ending => "S>T  the stream's end",
            Self::Answering => "T>S  it has all",
            Self::Offered => "S>C  offered",
            Self::Arrived => "T>C  arrived",
            Self::ToldToContinue => "C>T  row moved: go on",
            Self::Continued => "T>C  it runs",
            Self::Wanting => "T>S  it waits for a page",
            Self::Following => "S>T  memory, behind it",
            Self::AllThere => "T>S  all of it is there",
            Self::Whole => "T>C  it is whole",
            Self::ToldToEnd => "C>S  end what you have",
            Self::Ended => "S>C  nothing is left",
        }
    }

    pub fn is(self, seen: &Seen<'_>, sides: Sides) -> bool {
        match seen {
            Seen::Told { agent, put } => {
                let wanted = &put.wanted;
                match self {
                    Self::AskedToArrive => *agent == sides.target && wanted.arrives.is_some(),
                    Self::AskedToDepart => *agent == sides.source && wanted.departs.is_some(),
                    Self::ToldToContinue => *agent == sides.target && wanted.continues.is_some(),
                    Self::ToldToEnd => *agent == sides.source && wanted.power == Power::Absent,
                    _ => false,
                }
            }
            Seen::Said { agent, report } => {
                let state = report.migration.as_ref().map(|it| &it.state);
                match self {
                    Self::Arriving => matches!(state, Some(State::Arriving { .. })),
                    Self::Offered => matches!(state, Some(State::Offered { .. })),
                    Self::Arrived => state == Some(&State::Arrived),
                    Self::Continued => *agent == sides.target && state == Some(&State::Continued),
                    Self::Whole => {
                        let lacks = report
                            .migration
                            .as_ref()
                            .is_some_and(|it| it.lacks.is_some());
                        *agent == sides.target && state == Some(&State::Continued) && !lacks
                    }
                    Self::Ended => *agent == sides.source && report.observed == Observed::Absent,
                    _ => false,
                }
            }
            Seen::Stream(next) => *next == self,
        }
    }

    fn is_of_the_stream(self) -> bool {
        matches!(
            self,
            Self::Connecting
                | Self::Copying
                | Self::Owing
                | Self::Ending
                | Self::Answering
                | Self::Wanting
                | Self::Following
                | Self::AllThere
        )
    }

    /// Memory is still to come when it is met: so none comes before.
    pub fn is_before_memory(self) -> bool {
        !matches!(
            self,
            Self::Following | Self::AllThere | Self::Whole | Self::ToldToEnd | Self::Ended
        )
    }

    /// The row names the target.
    pub fn is_committed(self) -> bool {
        matches!(
            self,
            Self::ToldToContinue
                | Self::Continued
                | Self::Wanting
                | Self::Following
                | Self::AllThere
                | Self::Whole
                | Self::ToldToEnd
                | Self::Ended
        )
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The connection ends, and the message with it.
    Cut,
    /// It is heard, and the connection ends before that is known.
    LostAnswer,
    /// It is heard twice at once, and once more when all is over.
    Doubled,
    SourceProcess,
    TargetProcess,
    SourceAgent,
    TargetAgent,
    Controller,
}

impl Fault {
    pub const ALL: [Self; 8] = [
        Self::Cut,
        Self::LostAnswer,
        Self::Doubled,
        Self::SourceProcess,
        Self::TargetProcess,
        Self::SourceAgent,
        Self::TargetAgent,
        Self::Controller,
    ];

    pub fn title(self) -> &'static str {
        match self {
            Self::Cut => "cut",
            Self::LostAnswer => "no answer",
            Self::Doubled => "doubled",
            Self::SourceProcess => "S process",
            Self::TargetProcess => "T process",
            Self::SourceAgent => "S agent",
            Self::TargetAgent => "T agent",
            Self::Controller => "controller",
        }
    }

    /// Why there is no such fault there.
    pub fn cannot(self, spot: Spot) -> Option<&'static str> {
        match (self, spot) {
            (Self::Doubled, spot) if spot.is_of_the_stream() => {
                Some("TCP and TLS let no byte of a stream come twice")
            }
            (Self::LostAnswer, Spot::Connecting | Spot::Copying | Spot::Owing) => {
                Some("nothing answers it before the stream's end")
            }
            (Self::LostAnswer, Spot::Wanting | Spot::Following | Spot::AllThere) => {
                Some("as a line that is cut: what it carries is asked for anew")
            }
            (Self::LostAnswer, Spot::Answering) => {
                Some("it is the answer: as the stream's end without one")
            }
            (Self::TargetProcess, Spot::AskedToArrive) => Some("there is none yet"),
            (Self::SourceProcess, Spot::Ended) => Some("there is none any more"),
            _ => None,
        }
    }

    /// What a server may come to.
    pub fn ends(self, how: How, spot: Spot) -> &'static [End] {
        match how {
            How::PreCopy => self.ends_of_pre_copy(spot),
            How::PostCopy => self.ends_of_post_copy(spot),
        }
    }

    /// The guest is on both sides in part from the stream's end until all of its memory is there, and lost with either of
    /// their processes; with an agent nothing is lost.
    fn ends_of_post_copy(self, spot: Spot) -> &'static [End] {
        let is_whole = matches!(
            spot,
            Spot::AllThere | Spot::Whole | Spot::ToldToEnd | Spot::Ended
        );
        match self {
            Self::SourceProcess if is_whole => &[End::There],
            Self::SourceProcess => &[End::Error],
            Self::TargetProcess => match spot {
                _ if spot.is_committed() && spot != Spot::ToldToContinue => &[End::Error],
                _ => &[End::Here],
            },
            // Its process ends with it as long as the guest did not run there.
            Self::TargetAgent if spot.is_committed() && spot != Spot::ToldToContinue => {
                &[End::There]
            }
            Self::TargetAgent => &[End::Here],
            // The line by which the guest itself comes ends with its agent, and what it has carried is not lost.
            Self::SourceAgent if spot == Spot::Owing => &[End::Here],
            // As long as the row is the source's, whose guest is whole, nobody mends it for one that would be in parts.
            Self::SourceAgent if !spot.is_committed() => &[End::Here, End::There],
            Self::SourceAgent => &[End::There],
            Self::LostAnswer if spot == Spot::Ending => &[End::Here],
            Self::Cut if matches!(spot, Spot::Owing | Spot::Ending | Spot::Answering) => {
                &[End::Here]
            }
            Self::Cut | Self::LostAnswer | Self::Doubled | Self::Controller => &[End::There],
        }
    }

    fn ends_of_pre_copy(self, spot: Spot) -> &'static [End] {
        match self {
            Self::SourceProcess => match spot {
                _ if spot.is_committed() => &[End::There],
                // The target has all of it.
                Spot::Answering | Spot::Offered | Spot::Arrived => &[End::There],
                // What it had given to its end of the line comes, and may be all.
                Spot::Copying | Spot::Ending => &[End::There, End::Error],
                _ => &[End::Error],
            },
            Self::TargetProcess => match spot {
                Spot::Continued | Spot::ToldToEnd | Spot::Ended => &[End::Error],
                _ => &[End::Here],
            },
            Self::TargetAgent => match spot {
                Spot::Continued | Spot::ToldToEnd | Spot::Ended => &[End::There],
                // It is told anew, and makes another place.
                Spot::AskedToArrive => &[End::Here, End::There],
                // Its process ends with it as long as the guest did not run there.
                _ => &[End::Here],
            },
            // The line ends with its agent; what it has carried is not lost.
            Self::SourceAgent => match spot {
                Spot::Connecting | Spot::Copying | Spot::Ending => &[End::Here, End::There],
                _ => &[End::There],
            },
            Self::Cut if matches!(spot, Spot::Connecting | Spot::Copying | Spot::Ending) => {
                &[End::Here]
            }
            Self::Cut | Self::LostAnswer | Self::Doubled | Self::Controller => &[End::There],
        }
    }
}

/// Where a server is when all has come to rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Here,
    There,
    Error,
}
