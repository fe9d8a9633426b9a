use http::HeaderMap;

use super::*;

fn entry(body: &'static str) -> Arc<Entry> {
    sized(Bytes::from_static(body.as_bytes()))
}

fn sized(body: Bytes) -> Arc<Entry> {
    let (headers, now) = (HeaderMap::new(), SystemTime::UNIX_EPOCH);
    let timing = Timing::new(StatusCode::OK, &headers, now, now);
    Arc::new(Entry {
        status: StatusCode::OK,
        headers,
        body,
        timing,
        selection: Selection::default(),
        stored_at: now,
    })
}

fn body(store: &Store, key: &str) -> Option<Bytes> {
    store.find(key.as_bytes(), &HeaderMap::new()).entry.map(|entry| entry.body.clone())
}

fn put(store: &Store, key: &str, body: &'static str) -> bool {
    store.insert(key.as_bytes(), &entry(body), store.ticket(key.as_bytes()), false)
}

const A: &str = "o0 up\nhttp://up/a\n\n\n";
const A_OF_PEER: &str = "o0 up\nhttp://UP/a\nspiffe://td/b\n\n";
const B: &str = "o0 up\nhttp://up/b\n\n\n";

#[test]
fn invalidation_covers_every_identity_and_what_is_on_its_way() {
    let store = Store::new(1 << 20);
    assert!(put(&store, A, "1") && put(&store, A_OF_PEER, "2") && put(&store, B, "3"));
    let on_its_way = store.ticket(A.as_bytes());
    store.invalidate(b"https://up/a");
    assert_eq!((body(&store, A), body(&store, A_OF_PEER)), (None, None));
    assert_eq!(body(&store, B), Some(Bytes::from_static(b"3")));
    assert!(!store.insert(A.as_bytes(), &entry("old"), on_its_way, false));
    assert!(put(&store, A, "new"));
    assert_eq!(body(&store, A), Some(Bytes::from_static(b"new")));
}

#[test]
fn a_purge_removes_what_it_names_and_what_is_on_its_way() {
    let store = Store::new(1 << 20);
    assert!(put(&store, A, "1") && put(&store, A_OF_PEER, "2") && put(&store, B, "3"));
    let on_its_way = store.ticket(A.as_bytes());
    assert_eq!(store.purge("http://up/a*"), 2);
    assert_eq!((body(&store, A), body(&store, B).is_some()), (None, true));
    assert!(!store.insert(A.as_bytes(), &entry("old"), on_its_way, false));
    assert_eq!((store.purge("http://up/"), store.purge_all()), (0, 1));
}

#[test]
fn the_bound_holds_after_each_insertion() {
    let store = Store::new(100_000);
    for number in 0..200 {
        let key = format!("o0 up\nhttp://up/{number}\n\n\n");
        let response = sized(Bytes::from(vec![0; 9000]));
        store.insert(key.as_bytes(), &response, store.ticket(key.as_bytes()), false);
        assert!(store.bytes() <= 100_000, "{} bytes", store.bytes());
    }
    assert!(store.evictions() > 0 && store.bytes() > 0);
    store.resize(20_000);
    assert!(store.bytes() <= 20_000);
}

#[test]
fn a_key_keeps_a_bounded_number_of_variants() {
    let store = Store::new(10 << 20);
    let request = |number: usize| HeaderMap::from_iter([(http::header::ACCEPT, number.into())]);
    for number in 0..100 {
        let names = vec![http::header::ACCEPT];
        let plain = entry("x");
        let variant = Entry {
            selection: Selection::new(names, &request(number)),
            headers: HeaderMap::new(),
            body: plain.body.clone(),
            timing: plain.timing.clone(),
            ..*plain
        };
        store.insert(A.as_bytes(), &Arc::new(variant), store.ticket(A.as_bytes()), false);
    }
    let found = |number| store.find(A.as_bytes(), &request(number)).entry.is_some();
    assert_eq!((0..100).filter(|number| found(*number)).count(), MAX_VARIANTS);
    assert!(found(99) && !found(0));
}

/// A purge during a reload with another `max_bytes` removes what is copied; what is stored meanwhile stays.
#[test]
fn what_changes_while_the_store_is_resized_is_not_lost() {
    let store = Store::new(1 << 20);
    for number in 0..200 {
        put(&store, &format!("o0 up\nhttp://other/{number}\n\n\n"), "x");
    }
    let is_done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut bytes = 2 << 20;
            while !is_done.load(Ordering::Relaxed) {
                store.resize(bytes);
                bytes ^= 1;
            }
        });
        let lost = (0..500).find(|_| {
            let is_stored = put(&store, A, "1") && body(&store, A).is_some();
            let purged = store.purge("http://up/a");
            !is_stored || purged != 1 || body(&store, A).is_some()
        });
        is_done.store(true, Ordering::Relaxed);
        assert_eq!(lost, None);
    });
}
