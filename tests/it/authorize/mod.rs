//! Authorization: end-user tokens, the allow list, and what the service learns of its clients.

mod allow;
mod mtls;
mod oauth2;
mod provider;
mod tokens;

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use crate::support::{Upstream, text};

/// A service that responds with the request head that it received, and counts.
struct Echo {
    server: Upstream,
    calls: Arc<AtomicUsize>,
}

impl Echo {
    fn start() -> Self {
        let calls = Arc::new(AtomicUsize::new(0));
        let counting = Arc::clone(&calls);
        let server = Upstream::http1(move |request| {
            counting.fetch_add(1, Ordering::SeqCst);
            let mut seen = format!("{} {}\n", request.method(), request.uri());
            for (name, value) in request.headers() {
                seen.push_str(&format!("{name}: {}\n", String::from_utf8_lossy(value.as_bytes())));
            }
            async move { text(seen) }
        });
        Self { server, calls }
    }

    fn request_count(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }
}
