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
    Ending,
    Answering,
    Offered,
    Arrived,
    ToldToContinue,
    Continued,
    ToldToEnd,
    Ended,
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
    pub const ALL: [Self; 13] = [
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
    ];

    /// Who is about to say what to whom: C the controller, S the source, T the target.
    pub fn title(self) -> &'static str {
        match self {
            Self::AskedToArrive => "C>T  a guest arrives",
            Self::Arriving => "T>C  it listens",
            Self::AskedToDepart => "C>S  the guest departs",
            Self::Connecting => "S>T  connects",
            Self::Copying => "S>T  memory, while it runs",
            Self::Ending => "S>T  the stream's end",
            Self::Answering => "T>S  it has all",
            Self::Offered => "S>C  offered",
            Self::Arrived => "T>C  arrived",
            Self::ToldToContinue => "C>T  row moved: go on",
            Self::Continued => "T>C  it runs",
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
            Self::Connecting | Self::Copying | Self::Ending | Self::Answering
        )
    }

    /// The row names the target.
    pub fn is_committed(self) -> bool {
        matches!(
            self,
            Self::ToldToContinue | Self::Continued | Self::ToldToEnd | Self::Ended
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
            (Self::LostAnswer, Spot::Connecting | Spot::Copying) => {
                Some("nothing answers it before the stream's end")
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
    pub fn ends(self, spot: Spot) -> &'static [End] {
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
