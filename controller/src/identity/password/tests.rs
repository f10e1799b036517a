//! Hashing: what it answers, and how many blocks of memory it takes.

use super::*;
use crate::clock::{SimulatedClock, SystemClock};

#[tokio::test]
async fn a_password_is_verified_by_its_own_hash_only() {
    let passwords = Passwords::new(SystemClock::shared());
    let hash = passwords.hash("correct horse").await.unwrap();
    assert!(
        hash.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"),
        "{hash}"
    );
    assert!(
        passwords
            .verify("correct horse", Some(&hash))
            .await
            .unwrap()
    );
    assert!(!passwords.verify("wrong", Some(&hash)).await.unwrap());
    assert!(!passwords.verify("correct horse", None).await.unwrap());
}

/// A hash made by the crate itself, in memory of its own.
#[tokio::test]
async fn what_a_block_was_used_for_before_does_not_change_a_hash() {
    let passwords = Passwords::new(SystemClock::shared());
    for password in ["one", "another", ""] {
        let hash = passwords.hash(password).await.unwrap();
        let kept = PasswordHash::new(&hash).unwrap();
        let crates = argon2::PasswordVerifier::verify_password(
            &Argon2::default(),
            password.as_bytes(),
            &kept,
        );
        assert!(crates.is_ok(), "{password}: {hash}");
    }
}

#[tokio::test]
async fn a_hash_that_is_not_of_our_kind_or_costs_more_is_refused_before_any_memory_is_taken() {
    let passwords = Passwords::new(SystemClock::shared());
    for head in [
        "$argon2id$v=19$m=4194304,t=2,p=1",
        "$argon2id$v=19$m=19456,t=4294967295,p=1",
        "$argon2id$v=19$m=19456,t=2,p=64",
        "$argon2id$v=16$m=19456,t=2,p=1",
        "$argon2i$v=19$m=19456,t=2,p=1",
    ] {
        let hash =
            format!("{head}$c29tZXNhbHRzb21lc2FsdA$wvM0qf8VUR6sWmwTnPsvDBOmKdTYRdfKmy8ym0Pd+2A");
        let refused = passwords.verify("x", Some(&hash)).await;
        assert!(refused.is_err(), "{head}");
    }
    assert_eq!(passwords.pool.blocks(), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_hundred_logins_take_one_block_a_core_at_most_and_idle_blocks_are_given_back() {
    let clock = SimulatedClock::starting_at(0);
    let passwords = Passwords::new(Arc::new(clock.clone()));
    let cores = passwords.pool.cores().available_permits();
    let logins = (0..100).map(|_| {
        let passwords = passwords.clone();
        tokio::spawn(async move { passwords.verify("x", None).await.unwrap() })
    });
    futures::future::join_all(logins).await;
    let (now, most) = passwords.pool.blocks();
    assert!((1..=cores).contains(&most), "{most} of {cores}");
    assert_eq!(now, most, "blocks are kept while logins come");
    while passwords.pool.blocks().0 > 0 {
        clock.advance(std::time::Duration::from_secs(1));
        tokio::task::yield_now().await;
    }
    // And the next login takes one again, which is given back as well.
    passwords.verify("x", None).await.unwrap();
    assert_eq!(passwords.pool.blocks().0, 1);
    while passwords.pool.blocks().0 > 0 {
        clock.advance(std::time::Duration::from_secs(1));
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn beyond_the_queue_the_answer_is_429_and_the_queue_empties_again() {
    let passwords = Passwords::new(SystemClock::shared());
    let cores = passwords.pool.cores().available_permits();
    let all = Arc::clone(passwords.pool.cores())
        .acquire_many_owned(cores as u32)
        .await
        .unwrap();
    let waiters: Vec<_> = (0..QUEUE)
        .map(|_| {
            let passwords = passwords.clone();
            tokio::spawn(async move { passwords.on_a_core(|_| Ok(())).await })
        })
        .collect();
    while passwords.waiting.load(Ordering::Relaxed) < QUEUE {
        tokio::task::yield_now().await;
    }
    let refused = passwords.on_a_core(|_| Ok(())).await.unwrap_err();
    assert_eq!(refused.status(), http::StatusCode::TOO_MANY_REQUESTS);
    drop(all);
    for waiter in waiters {
        waiter.await.unwrap().unwrap();
    }
    assert_eq!(passwords.waiting.load(Ordering::Relaxed), 0);
}
