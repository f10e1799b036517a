//! Doubles for tests of the actor: a host in memory whose processes do what they are told.
