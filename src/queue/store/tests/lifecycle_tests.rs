//! Opening: keys, versions, foreign and corrupt files, interrupted attempts, a clock that was set.

use std::{collections::BTreeMap, fs};

use super::*;

/// Every file of the directory but the lock, which names its last owner, and an empty log.
fn files(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(path).unwrap().map(|entry| entry.unwrap());
    let files = entries
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path()).unwrap()));
    files.filter(|(name, content)| name != "lock" && !content.is_empty()).collect()
}

fn with_key(path: &Path, key: u8) -> StoreSettings {
    let key_file = path.with_extension(format!("key{key}"));
    fs::write(&key_file, [key; 32]).unwrap();
    StoreSettings { key_file: Some(key_file), ..on_disk(path) }
}

#[tokio::test]
async fn nothing_of_a_request_is_readable_without_the_key() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("store");
    let opened = open(&with_key(&path, 1));
    let id = accept(&opened.0, new_delivery("Canary4711")).await;
    let outcome = Outcome { status: Some(200), body: b"Canary4712".to_vec(), ..Outcome::default() };
    opened.0.settle(id, Verdict::Done, Some(outcome.clone())).await.unwrap();
    assert_eq!(opened.0.content(id).await.unwrap().1, b"Canary4711");
    close(opened);
    for (name, content) in files(&path) {
        for secret in ["Canary471", "text/plain", "/charge"] {
            let found = content.windows(secret.len()).any(|part| part == secret.as_bytes());
            assert!(!found, "{secret} in {name}");
        }
    }
    let opened = open(&with_key(&path, 1));
    assert_eq!(opened.0.outcome(id).await.unwrap(), Some(outcome));
    close(opened);
}

#[tokio::test]
async fn a_wrong_or_missing_key_changes_nothing() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("store");
    let opened = open(&with_key(&path, 1));
    accept(&opened.0, new_delivery("1")).await;
    close(opened);
    let before = files(&path);
    let refused =
        |settings: &StoreSettings| Store::open(settings, SteadyClock::default()).map(drop).unwrap_err();
    assert_eq!(refused(&with_key(&path, 2)), StoreError::WrongKey(path.join("queue.db")));
    assert_eq!(refused(&on_disk(&path)), StoreError::KeyMissing(path.join("queue.db")));
    assert!(files(&path) == before, "the files changed");
    close(open(&with_key(&path, 1)));
}

#[tokio::test]
async fn a_plain_store_can_get_a_key() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("store");
    let opened = open(&on_disk(&path));
    let plain = accept(&opened.0, new_delivery("1")).await;
    close(opened);
    let opened = open(&with_key(&path, 1));
    let sealed = accept(&opened.0, new_delivery("2")).await;
    assert_eq!(opened.0.content(plain).await.unwrap().1, b"1");
    assert_eq!(opened.0.content(sealed).await.unwrap().1, b"2");
    close(opened);
}

#[tokio::test]
async fn foreign_and_newer_files_are_left_as_they_are() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("store");
    close(open(&on_disk(&path)));
    let database = path.join("queue.db");
    let run = |sql: &str| rusqlite::Connection::open(&database).unwrap().execute_batch(sql).unwrap();
    let refused = || Store::open(&on_disk(&path), SteadyClock::default()).map(drop).unwrap_err();
    run("PRAGMA user_version = 99");
    let before = files(&path);
    assert_eq!(refused(), StoreError::NewerSchema { path: database.clone(), found: 99, known: 1 });
    assert!(files(&path) == before, "the files changed");
    run("PRAGMA application_id = 5");
    assert_eq!(refused(), StoreError::NotAStore(database.clone()));
}

#[tokio::test]
async fn a_second_owner_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let opened = open(&on_disk(directory.path()));
    let refused = Store::open(&on_disk(directory.path()), SteadyClock::default()).map(drop);
    assert!(matches!(refused, Err(StoreError::Locked { .. })), "{refused:?}");
    close(opened);
}

/// The file is renamed with every byte, and the store goes on with a new one.
#[tokio::test]
async fn a_corrupt_file_is_renamed_and_a_new_one_begun() {
    for damage in ["header", "pages", "cut"] {
        let directory = tempfile::tempdir().unwrap();
        let settings = on_disk(directory.path());
        let opened = open(&settings);
        for _ in 0..50 {
            accept(&opened.0, new_delivery(&"x".repeat(3000))).await;
        }
        close(opened);
        let database = directory.path().join("queue.db");
        let mut content = fs::read(&database).unwrap();
        match damage {
            "header" => content[..100].fill(0x55),
            // All but the first page.
            "pages" => content[4096..].iter_mut().step_by(7).for_each(|byte| *byte ^= 0x2a),
            _ => content.truncate(content.len() / 2 / 4096 * 4096),
        }
        fs::write(&database, &content).unwrap();

        let opened = open(&settings);
        let status = opened.0.status();
        let [aside] = status.set_aside.as_slice() else { panic!("{damage}: {status:?}") };
        assert!(!status.is_healthy());
        assert_eq!(status.failure, None);
        assert!(fs::read(aside).unwrap() == content, "{damage}: the renamed file changed");
        accept(&opened.0, new_delivery("1")).await;
        close(opened);
        // Reported until the next start.
        let opened = open(&settings);
        assert!(opened.0.status().is_healthy());
        assert_eq!(due(&opened.0).await.len(), 1);
        close(opened);
    }
}

#[tokio::test]
async fn an_interrupted_attempt_that_must_not_be_repeated_is_dead() {
    let directory = tempfile::tempdir().unwrap();
    let opened = open(&on_disk(directory.path()));
    let [started, released] =
        [accept(&opened.0, ordered("1", "a")).await, accept(&opened.0, new_delivery("2")).await];
    let next = accept(&opened.0, ordered("3", "a")).await;
    opened.0.start(started).await.unwrap();
    opened.0.start(released).await.unwrap();
    opened.0.settle(released, Verdict::Release, None).await.unwrap();
    close(opened);
    let opened = open(&on_disk(directory.path()));
    let found = opened.0.find(started).await.unwrap();
    assert_eq!((found.state, found.reason), (DeliveryState::Dead, Some(DeadReason::Ambiguous)));
    // It frees its order.
    let mut due = due(&opened.0).await;
    due.sort();
    assert_eq!(due, [released, next]);
    close(opened);
}

#[tokio::test]
async fn an_attempt_that_must_not_be_repeated_begins_once() {
    let opened = open(&in_memory());
    let id = accept(&opened.0, new_delivery("1")).await;
    assert_eq!(opened.0.start(id).await, Ok(true));
    assert_eq!(opened.0.start(id).await, Ok(false), "its outcome was never written");
    opened.0.settle(id, Verdict::Release, None).await.unwrap();
    assert_eq!(opened.0.start(id).await, Ok(true), "it was surely not sent");
    close(opened);
}

#[tokio::test]
async fn a_clock_that_was_set_makes_nothing_wait_and_nothing_lost() {
    let day = HOUR * 24;
    let directory = tempfile::tempdir().unwrap();
    let settings = on_disk(directory.path());
    let at = |time| Store::open(&settings, SteadyClock::starting_at(time)).unwrap();
    let opened = at(NOON);
    let id = accept(&opened.0, new_delivery("1")).await;
    let until = NOON + HOUR;
    opened.0.settle(id, Verdict::Wait { until }, None).await.unwrap();
    close(opened);
    // Some seconds of difference are normal: the wait stays.
    let opened = at(NOON + HOUR / 2);
    assert_eq!(opened.0.find(id).await.unwrap().next, Some(until));
    close(opened);
    // Set back by a day: due at once, and not expired.
    let opened = at(NOON.before(day));
    let found = opened.0.find(id).await.unwrap();
    assert!(found.next.is_some_and(|next| next <= opened.0.now()), "{found:?}");
    assert_eq!(opened.0.sweep(sweep()).await, Ok(Swept::default()));
    assert_eq!(found.attempts, 1);
    // Accepted with the clock wrong, it is delivered with the clock right.
    let second = accept(&opened.0, new_delivery("2")).await;
    close(opened);
    let opened = at(NOON);
    assert_eq!(due(&opened.0).await.len(), 2);
    // A day later than it was accepted: expired is a dead letter, which an operator can replay.
    let swept = opened.0.sweep(sweep()).await.unwrap();
    assert_eq!(swept.expired, [second]);
    opened.0.replay(vec![second], opened.0.now(), Duration::ZERO).await.unwrap();
    assert_eq!(due(&opened.0).await.len(), 2);
    close(opened);
}
