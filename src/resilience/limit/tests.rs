use proptest::prelude::*;

use super::*;

const MS: Duration = Duration::from_millis(1);

#[derive(Clone, Debug, Default)]
struct TestNotify(Arc<AtomicBool>);

impl NotifyWaiter for TestNotify {
    fn notify(self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

impl TestNotify {
    fn is_notified(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

fn limit(max_requests: u32, max_pending: u32) -> RequestLimit<TestNotify> {
    RequestLimit::new(LimitSettings { max_requests, max_pending, ..LimitSettings::default() })
}

#[test]
fn the_queue_is_first_in_first_out() {
    let now = Instant::now();
    let limit = limit(1, 10);
    assert!(limit.try_acquire() && !limit.try_acquire());
    let notifications = [TestNotify::default(), TestNotify::default()];
    let [first, second] =
        notifications.clone().map(|notification| limit.enqueue(now, None, notification).unwrap());
    assert_eq!((limit.in_flight(), limit.pending()), (1, 2));
    limit.release(|| now);
    assert!(notifications[0].is_notified() && !notifications[1].is_notified());
    assert!(!limit.try_acquire(), "the second is before");
    assert!(limit.finish_wait(first));
    limit.release(|| now);
    assert!(notifications[1].is_notified() && limit.finish_wait(second));
    limit.release(|| now);
    assert_eq!((limit.in_flight(), limit.pending()), (0, 0));
}

#[test]
fn the_queue_is_bounded() {
    let now = Instant::now();
    let full = limit(1, 1);
    assert!(full.try_acquire());
    let ticket = full.enqueue(now, None, TestNotify::default()).unwrap();
    assert_eq!(full.enqueue(now, None, TestNotify::default()).unwrap_err(), LimitRefusal::Queue);
    assert_eq!(full.enqueue(now, Some(now), TestNotify::default()).unwrap_err(), LimitRefusal::Deadline);
    assert_eq!(ticket.expires_at, now + MS * 1000);
    assert!(!full.finish_wait(ticket), "it expired before its turn");
    assert_eq!(full.pending(), 0);
    let closed = limit(0, 0);
    assert!(!closed.try_acquire());
    assert_eq!(closed.enqueue(now, None, TestNotify::default()).unwrap_err(), LimitRefusal::Limit);
}

#[test]
fn expired_waiters_are_dropped() {
    let now = Instant::now();
    let limit = limit(1, 2);
    assert!(limit.try_acquire());
    let notifications = [TestNotify::default(), TestNotify::default(), TestNotify::default()];
    let urgent = limit.enqueue(now, Some(now + MS * 10), notifications[0].clone()).unwrap();
    let patient = limit.enqueue(now, Some(now + MS * 5000), notifications[1].clone()).unwrap();
    assert_eq!((urgent.expires_at, patient.expires_at), (now + MS * 10, now + MS * 1000));
    let third = limit.enqueue(now + MS * 20, None, notifications[2].clone()).unwrap();
    assert!(notifications[0].is_notified() && !limit.finish_wait(urgent), "it is removed, and notified");
    limit.release(|| now + MS * 30);
    assert!(limit.finish_wait(patient));
    limit.release(|| now + MS * 2000);
    assert!(!limit.finish_wait(third), "an expired waiter gets no slot");
    assert_eq!(limit.in_flight(), 0);
}

#[test]
fn a_higher_limit_serves_waiters() {
    let now = Instant::now();
    let limit = limit(4, 10);
    limit.set_adaptive_limit(1, now);
    assert!(limit.try_acquire());
    let tickets: Vec<QueueTicket> =
        (0..3).filter_map(|_| limit.enqueue(now, None, TestNotify::default()).ok()).collect();
    limit.set_adaptive_limit(99, now);
    assert_eq!((limit.limit(), limit.in_flight(), limit.pending()), (4, 4, 0));
    assert!(tickets.into_iter().all(|ticket| limit.finish_wait(ticket)));
    limit.set_adaptive_limit(0, now);
    assert_eq!(limit.limit(), 1);
}

#[test]
fn workers_never_exceed_the_limit_and_leak_no_slot() {
    let now = Instant::now();
    let (limit, most) = (limit(3, 64), AtomicU32::new(0));
    let busy = AtomicU32::new(0);
    let work = |has_place: bool| {
        if has_place {
            most.fetch_max(busy.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            std::thread::yield_now();
            busy.fetch_sub(1, Ordering::SeqCst);
            limit.release(|| now);
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                for n in 0..3000 {
                    if limit.try_acquire() {
                        work(true);
                        continue;
                    }
                    let notification = TestNotify::default();
                    let Ok(ticket) = limit.enqueue(now, None, notification.clone()) else { continue };
                    // Every other one waits; a lost notification would hang here.
                    while n % 2 == 0 && !notification.is_notified() {
                        std::thread::yield_now();
                    }
                    work(limit.finish_wait(ticket));
                }
            });
        }
    });
    assert_eq!((limit.in_flight(), limit.pending()), (0, 0));
    assert!(most.into_inner() <= 3);
}

proptest! {
    #[test]
    fn slots_and_waiters_add_up(
        max_requests in 0u32..5, max_pending in 0u32..5,
        events in prop::collection::vec((0u8..5, any::<usize>(), 0u32..400), 1..200),
    ) {
        let limit = limit(max_requests, max_pending);
        let mut now = Instant::now();
        let (mut acquired, mut tickets) = (0u32, Vec::new());
        for (kind, which, pass) in events {
            match kind {
                0 if limit.try_acquire() => acquired += 1,
                0 | 1 => {
                    let deadline = (pass % 2 == 0).then(|| now + MS * pass);
                    if let Ok(ticket) = limit.enqueue(now, deadline, TestNotify::default()) { tickets.push(ticket); }
                }
                2 if acquired > 0 => { acquired -= 1; limit.release(|| now); }
                3 if !tickets.is_empty() => {
                    let ticket = tickets.swap_remove(which % tickets.len());
                    acquired += u32::from(limit.finish_wait(ticket));
                }
                _ => now += MS * pass,
            }
            let granted = tickets.iter().filter(|ticket| ticket.granted.load(Ordering::SeqCst)).count() as u32;
            prop_assert_eq!(limit.in_flight(), acquired + granted);
            prop_assert!(limit.in_flight() <= max_requests && limit.pending() <= max_pending);
            // No request waits while a slot is free.
            prop_assert!(limit.pending() == 0 || limit.in_flight() == max_requests);
        }
        for ticket in tickets { acquired += u32::from(limit.finish_wait(ticket)); }
        for _ in 0..acquired { limit.release(|| now); }
        prop_assert_eq!((limit.in_flight(), limit.pending()), (0, 0));
    }

    #[test]
    fn a_counter_never_exceeds_its_limit(limit in 0u32..10, events in prop::collection::vec(any::<bool>(), 0..100)) {
        let counter = BoundedCounter::new(limit);
        let mut taken = 0;
        for take in events {
            if take { taken += u32::from(counter.try_acquire()) } else { counter.release(); taken -= u32::from(taken > 0) }
            prop_assert_eq!(counter.in_use(), taken);
            prop_assert!(taken <= limit);
        }
    }
}
