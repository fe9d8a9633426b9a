//! A full disk, and a disk on which a sync fails.

use std::{
    fs,
    process::Output,
    time::{Duration, Instant},
};

use outrigger::queue::store::{StoreFailure, Sweep};

use super::*;
use crate::support::{WAIT_LIMIT, has_tool, skip, tool};

#[track_caller]
fn assert_success(output: &Output) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}\n{}", text(&output.stdout), text(&output.stderr));
    assert!(text(&output.stdout).contains("1 passed"), "{}", text(&output.stdout));
}

/// On a file system of 16 MiB in a mount namespace of its own.
#[test]
fn a_full_disk_loses_nothing_and_drains() {
    if !rustix::process::geteuid().is_root() {
        return skip("file systems are mounted by root");
    }
    if !has_tool(&["unshare", "mount"]) {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let mount =
        "mount --make-rprivate / && mount -t tmpfs -o size=16m none \"$OUTRIGGER_TEST_STORE\" && exec \"$@\"";
    let unshare = tool("unshare").expect("unshare");
    let tracer = [unshare.to_str().expect("a path"), "-m", "sh", "-c", mount, "sh"];
    let output = child("queue::disk::on_a_small_disk", directory.path(), &tracer).output().expect("it runs");
    assert_success(&output);
}

#[test]
#[ignore = "the main function of a child process"]
fn on_a_small_disk() {
    let Some(path) = env::var_os(STORE) else { return };
    let path = Path::new(&path).join("store");
    let settings = StoreSettings { reserve: ByteSize(4 << 20), ..settings(&path) };
    block_on(async {
        let opened = Store::open(&settings, SteadyClock::default()).expect("the store opens");
        let store = &opened.0;
        let mut accepted = Vec::new();
        let refused = loop {
            match store.accept(new_delivery(vec![7; 20_000])).await {
                Ok(new) => accepted.push(new.id),
                Err(error) => break error,
            }
        };
        assert_eq!(refused, StoreError::Full);
        assert!(accepted.len() > 100, "only {} fit", accepted.len());
        assert_eq!(store.status().failure, Some(StoreFailure::DiskFull));
        assert!(!path.join("reserve").exists(), "the reserve is in use");
        assert_eq!(store.accept(new_delivery("small")).await, Err(StoreError::Full));
        // Everything is there, and its outcome can be written.
        for id in &accepted {
            assert_eq!(store.content(*id).await.expect("readable").1.len(), 20_000);
            store.settle(*id, Verdict::Done, None).await.expect("the outcome is written");
        }
        // Deleting makes space; then the store accepts again.
        let begin = Instant::now();
        let retention = outrigger::resilience::queue::settings::Retention {
            keep_done: outrigger::units::HumanDuration::from_millis(0),
            ..Default::default()
        };
        loop {
            let sweep = Sweep { queue: "orders".to_owned(), expires: None, retention, in_flight: Vec::new() };
            let deleted = store.sweep(sweep).await.expect("swept").deleted;
            if deleted == 0 && store.status().failure.is_none() {
                break;
            }
            assert!(begin.elapsed() < WAIT_LIMIT, "{:?}", store.status());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert!(path.join("reserve").exists(), "the reserve is there again");
        for _ in 0..100 {
            store.accept(new_delivery(vec![8; 20_000])).await.expect("accepted again");
        }
        assert!(store.status().set_aside.is_empty());
        close(opened);
        let opened = Store::open(&settings, SteadyClock::default()).expect("the store opens");
        assert_eq!(check_count(&opened.0).await, 100);
        close(opened);
    });
}

async fn check_count(store: &Store) -> usize {
    store.list(Default::default(), 0, 100_000).await.expect("a list").len()
}

/// Runs a writer whose syncs fail as `when` says, and returns its promises and the trace.
fn write_with_failing_syncs(store: &Path, when: &str, requests: &str) -> (Promises, String) {
    let trace = store.with_extension("trace");
    let strace = tool("strace").expect("strace");
    let inject = format!("inject=fdatasync:error=EIO:when={when}");
    let tracer = [
        strace.to_str().expect("a path"),
        "-f",
        "-y",
        "-e",
        "trace=fdatasync,fsync,openat,pwrite64",
        "-e",
        &inject,
        "-o",
        trace.to_str().expect("a path"),
    ];
    let output = child("queue::writer", store, &tracer)
        .env(CALLERS, "4")
        .env(REQUESTS, requests)
        .output()
        .expect("strace runs");
    assert_success(&output);
    let mut promises = Promises::default();
    String::from_utf8_lossy(&output.stdout).lines().for_each(|line| promises.read(line));
    (promises, fs::read_to_string(&trace).expect("a trace"))
}

#[test]
fn after_a_failed_sync_the_file_is_opened_again_and_nothing_promised_is_lost() {
    if !has_tool(&["strace"]) {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let store = directory.path().join("store");
    let (promises, trace) = write_with_failing_syncs(&store, "15", "30");
    assert!(!promises.failed.is_empty(), "a caller got an error");
    assert!(promises.accepted.len() >= 100, "it goes on: {}", promises.accepted.len());

    // No sync and no write follows on the log before it has been opened again.
    let is_log = |line: &str| line.contains("queue.db-wal>") || line.contains("queue.db-wal\"");
    let after = trace.lines().skip_while(|line| !line.contains("(INJECTED)")).skip(1);
    let after: Vec<&str> = after.filter(|line| is_log(line)).collect();
    assert!(after.first().is_some_and(|line| line.contains("openat(")), "{:#?}", &after[..3]);

    block_on(async {
        let opened = open(&store);
        assert!(opened.0.status().is_healthy());
        assert_eq!(promises.broken(&opened.0).await, None);
        // Who got an error is not delivered.
        let mut stored = 0;
        for delivery in opened.0.list(Default::default(), 0, 100_000).await.expect("a list") {
            let (_, body) = opened.0.content(delivery.id).await.expect("readable");
            let seed = u64::from_be_bytes(*body.first_chunk().expect("a seed"));
            assert!(is_intact(&body) && !promises.failed.contains(&seed), "{seed:x} was refused");
            stored += 1;
        }
        assert_eq!(stored, promises.accepted.len());
        close(opened);
    });
}

/// A disk on which every sync fails for a while: the process lives, and accepts again when the disk is well.
#[test]
fn a_disk_that_fails_for_a_while_is_used_again() {
    if !has_tool(&["strace"]) {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let store = directory.path().join("store");
    // The sync that proves the disk after opening again fails too, so there is a pause of a second.
    let (promises, _) = write_with_failing_syncs(&store, "15..17", "700");
    assert!(promises.failed.len() > 20, "{} callers got an error", promises.failed.len());
    block_on(async {
        let opened = open(&store);
        assert_eq!(promises.broken(&opened.0).await, None);
        assert_eq!(check_contents(&opened.0).await.expect("readable"), promises.accepted.len());
        close(opened);
    });
}
