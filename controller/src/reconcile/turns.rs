//! Whose turn it is: looks at servers, many at a time, so that a host that answers no more holds up
//! its own machines and not everybody's.
//!
//! Owns which servers wait, in order and each once, and which are being looked at: never one server
//! twice at a time. Must never know what a look is.

use std::collections::{BTreeSet, HashMap, VecDeque};

use fractus_agent_api::machine::ServerId;
use tokio::task::{Id, JoinSet};

/// Looks at a time.
const AT_ONCE: usize = 16;

/// Servers that wait for a look, and the looks under way.
#[derive(Debug, Default)]
pub(super) struct Turns {
    order: VecDeque<ServerId>,
    waiting: BTreeSet<ServerId>,
    looked_at: HashMap<Id, ServerId>,
    looks: JoinSet<()>,
}

impl Turns {
    /// The server is to be looked at; once, however often it is said before it has its turn. Said while
    /// it is being looked at: once more after that.
    pub(super) fn add(&mut self, server: ServerId) {
        if self.waiting.insert(server) {
            self.order.push_back(server);
        }
    }

    /// Begins as many looks as may be under way.
    pub(super) fn begin<F>(&mut self, look: impl Fn(ServerId) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        while self.looks.len() < AT_ONCE {
            let free = |server| !self.looked_at.values().any(|looked| looked == server);
            let Some(first) = self.order.iter().position(free) else {
                return;
            };
            let Some(server) = self.order.remove(first) else {
                return;
            };
            self.waiting.remove(&server);
            let task = self.looks.spawn(look(server));
            self.looked_at.insert(task.id(), server);
        }
    }

    /// Until a look has ended; for ever if none is under way. Cancellation-safe.
    pub(super) async fn ended(&mut self) {
        let (id, outcome) = match self.looks.join_next_with_id().await {
            Some(Ok((id, ()))) => (id, Ok(())),
            Some(Err(error)) => (error.id(), Err(error)),
            None => return std::future::pending().await,
        };
        let server = self.looked_at.remove(&id);
        if let Err(error) = outcome {
            tracing::error!(?server, %error, "a look at a server panicked");
        }
    }

    /// Lets the looks under way end; begins no other.
    pub(super) async fn finish(&mut self) {
        while !self.looks.is_empty() {
            self.ended().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use tokio::sync::Semaphore;
    use uuid::Uuid;

    use super::*;

    fn server(n: u128) -> ServerId {
        ServerId(Uuid::from_u128(n))
    }

    /// Looks at odd servers end at once, at even ones when they are let.
    #[derive(Clone)]
    struct Looks {
        seen: Arc<Mutex<Vec<ServerId>>>,
        gate: Arc<Semaphore>,
    }

    impl Looks {
        fn new() -> Self {
            Self {
                seen: Arc::default(),
                gate: Arc::new(Semaphore::new(0)),
            }
        }

        fn look(&self, server: ServerId) -> impl Future<Output = ()> + Send + 'static + use<> {
            self.seen.lock().unwrap().push(server);
            let gate = Arc::clone(&self.gate);
            async move {
                if server.0.as_u128().is_multiple_of(2) {
                    gate.acquire().await.unwrap().forget();
                }
            }
        }

        fn seen(&self) -> Vec<u128> {
            let seen = self.seen.lock().unwrap();
            seen.iter().map(|server| server.0.as_u128()).collect()
        }
    }

    async fn ended(turns: &mut Turns) {
        tokio::time::timeout(Duration::from_secs(20), turns.ended())
            .await
            .unwrap();
    }

    #[tokio::test]
    async fn one_that_hangs_holds_up_nobody_else() {
        let (mut turns, looks) = (Turns::default(), Looks::new());
        for n in [2, 1, 3, 5] {
            turns.add(server(n));
        }
        turns.begin(|server| looks.look(server));
        for _ in 0..3 {
            ended(&mut turns).await;
        }
        assert_eq!(looks.seen(), [2, 1, 3, 5]);
        looks.gate.add_permits(1);
        turns.finish().await;
    }

    #[tokio::test]
    async fn a_server_is_never_looked_at_twice_at_a_time_and_once_more_if_woken_meanwhile() {
        let (mut turns, looks) = (Turns::default(), Looks::new());
        turns.add(server(2));
        turns.add(server(2));
        turns.begin(|server| looks.look(server));
        for _ in 0..100 {
            turns.add(server(2));
        }
        turns.add(server(1));
        turns.begin(|server| looks.look(server));
        ended(&mut turns).await;
        assert_eq!(looks.seen(), [2, 1]);
        looks.gate.add_permits(2);
        ended(&mut turns).await;
        turns.begin(|server| looks.look(server));
        ended(&mut turns).await;
        turns.begin(|server| looks.look(server));
        assert_eq!(looks.seen(), [2, 1, 2]);
    }

    #[tokio::test]
    async fn no_more_than_sixteen_are_under_way() {
        let (mut turns, looks) = (Turns::default(), Looks::new());
        for n in 0..40 {
            turns.add(server(n * 2));
        }
        turns.begin(|server| looks.look(server));
        assert_eq!(looks.seen().len(), 16);
        looks.gate.add_permits(1);
        ended(&mut turns).await;
        turns.begin(|server| looks.look(server));
        assert_eq!(looks.seen().len(), 17);
        looks.gate.add_permits(100);
        turns.finish().await;
        assert_eq!(looks.seen().len(), 17, "no other is begun");
    }
}
