//! SIGKILL at random instants under concurrent callers.

use std::{
    io::{BufRead, BufReader},
    process::Stdio,
    time::{Duration, Instant},
};

use super::*;
use crate::support::signal;

/// Kills a writer so many times, on one store. Every promise holds after each.
fn kill_writers(rounds: usize, seed: u64) {
    let directory = tempfile::tempdir().expect("a directory");
    let mut rng = Rng::from_seed(seed);
    let mut promises = Promises::default();
    for round in 0..rounds {
        // Of a long run only the last rounds are checked again.
        if round % 20 == 0 {
            promises = Promises::default();
        }
        let mut child = child("queue::writer", directory.path(), &[])
            .env(CALLERS, "100")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("it starts");
        let mut lines = BufReader::new(child.stdout.take().expect("its output")).lines();
        let (enough, delay) = (rng.below(300), Duration::from_micros(rng.below(3000) as u64));
        let mut read = 0;
        while read < enough
            && let Some(Ok(line)) = lines.next()
        {
            read += usize::from(line.starts_with("ACCEPTED"));
            promises.read(&line);
        }
        let begin = Instant::now();
        while begin.elapsed() < delay {
            std::hint::spin_loop();
        }
        signal(child.id(), "KILL");
        child.wait().expect("it ends");
        // What it wrote before it died counts; a last line that was cut does not.
        for line in lines.map_while(Result::ok) {
            promises.read(&line);
        }
        block_on(async {
            let opened = open(directory.path());
            assert!(opened.0.status().is_healthy(), "round {round}: {:?}", opened.0.status());
            assert_eq!(promises.broken(&opened.0).await, None, "round {round} (seed {seed})");
            if round % 10 == 9 {
                check_contents(&opened.0).await.expect("readable");
            }
            close(opened);
        });
    }
}

#[test]
fn what_was_accepted_survives_sigkill() {
    kill_writers(8, 1);
}

/// `cargo test --test it queue::kill::what_was_accepted_survives_500_sigkills -- --ignored`
#[test]
#[ignore = "minutes"]
fn what_was_accepted_survives_500_sigkills() {
    kill_writers(500, 2);
}
