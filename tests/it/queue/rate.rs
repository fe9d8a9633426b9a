//! How many requests a second are accepted, beside the bare disk.

use std::{
    fs::File,
    io::Write as _,
    time::{Duration, Instant},
};

use super::*;

const CALLERS_AT_ONCE: u64 = 64;
const MEASURED: Duration = Duration::from_secs(5);

/// Writes batches of 64 × 1 KiB to a file, with one sync each: records a second.
fn bare(path: &Path) -> f64 {
    let mut file = File::create(path.join("bare")).expect("a file");
    let batch = vec![7_u8; 1024 * CALLERS_AT_ONCE as usize];
    let (begin, mut records) = (Instant::now(), 0);
    while begin.elapsed() < MEASURED {
        file.write_all(&batch).and_then(|()| file.sync_data()).expect("written");
        records += CALLERS_AT_ONCE;
    }
    records as f64 / begin.elapsed().as_secs_f64()
}

fn accepted(path: &Path) -> (f64, f64) {
    block_on(async {
        let opened = open(&path.join("store"));
        let begin = Instant::now();
        let callers: Vec<_> = (0..CALLERS_AT_ONCE)
            .map(|_| {
                let store = opened.0.clone();
                tokio::spawn(async move {
                    let mut accepted = 0_u64;
                    while begin.elapsed() < MEASURED {
                        let mut new = new_delivery(vec![7_u8; 1024]);
                        new.limits.max_bytes = ByteSize(1 << 40);
                        store.accept(new).await.expect("accepted");
                        accepted += 1;
                    }
                    accepted
                })
            })
            .collect();
        let mut total = 0;
        for caller in callers {
            total += caller.await.expect("it ends");
        }
        let rate = total as f64 / begin.elapsed().as_secs_f64();
        let commits = opened.0.status().commits;
        close(opened);
        (rate, total as f64 / commits as f64)
    })
}

/// `cargo test --release --test it queue::rate:: -- --ignored --nocapture`
#[test]
#[ignore = "needs a release build and a quiet disk"]
fn accepts_a_tenth_of_what_the_bare_disk_writes() {
    // Not in the temporary directory, which may be in memory.
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let bare = bare(directory.path());
    let (accepted, per_commit) = accepted(directory.path());
    println!(
        "bare {bare:.0}/s, store {accepted:.0}/s ({per_commit:.0} a commit), ratio {:.2}",
        accepted / bare
    );
    assert!(accepted > bare * 0.1, "{accepted:.0}/s of {bare:.0}/s");
}
