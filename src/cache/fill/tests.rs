use std::{sync::Arc, task::Context};

use super::*;
use crate::cache::Store;

fn fill(store: &Arc<Store>) -> Arc<Fill> {
    Arc::new(Fill::new(Reservation::new(Arc::clone(store))))
}

fn part(size: u64) -> Bytes {
    Bytes::from(vec![b'x'; usize::try_from(size).unwrap()])
}

fn read(reader: &mut FillReader) -> Option<Bytes> {
    match reader.poll_part(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(Some(Ok(part))) => Some(part),
        _ => None,
    }
}

#[test]
fn memory_is_reserved_until_the_last_reader_is_gone() {
    const SIZE: u64 = 40_000;
    let store = Arc::new(Store::new(SIZE));
    let fill = fill(&store);
    let (mut fast, mut slow) = (fill.reader(), fill.reader());
    for _ in 0..4 {
        assert!(fill.reserve(SIZE));
        fill.push(part(SIZE / 4));
        assert_eq!(read(&mut fast).map(|part| part.len()), Some(10_000));
    }
    assert_eq!(read(&mut slow).map(|part| part.len()), Some(10_000));
    let whole = fill.complete();
    drop(fill);
    assert!(read(&mut fast).is_none() && fast.is_at_end());
    drop(fast);
    let next = read(&mut slow).unwrap();
    assert_eq!(next.as_ptr(), whole[10_000..].as_ptr(), "one memory for the store and all readers");
    assert!(!slow.is_at_end() && !store.reserve(1));
    let last = read(&mut slow).unwrap();
    assert_eq!(next.len() + last.len(), 30_000);
    assert!(slow.is_at_end() && !whole.as_ptr_range().contains(&last.as_ptr()));
    drop(slow);
    assert!(store.reserve(SIZE));
}

#[test]
fn a_relayed_body_buffers_little_and_gives_its_memory_back() {
    const SIZE: u64 = 200_000;
    let store = Arc::new(Store::new(SIZE));
    let fill = fill(&store);
    let mut reader = fill.reader();
    assert!(fill.reserve(SIZE));
    fill.push(part(SIZE - 1));
    fill.push(part(1));
    assert!(!fill.reserve(SIZE + 1));
    fill.relay();
    let mut cx = Context::from_waker(Waker::noop());
    assert!(fill.poll_capacity(&mut cx).is_pending());
    read(&mut reader).unwrap();
    assert!(fill.poll_capacity(&mut cx).is_ready() && store.reserve(SIZE - 1));
    fill.push(part(RELAY_BUFFER));
    assert!(fill.poll_capacity(&mut cx).is_pending());
    assert!(fill.poll_unread(&mut cx).is_pending());
    drop(reader);
    assert!(fill.poll_unread(&mut cx).is_ready());
}
