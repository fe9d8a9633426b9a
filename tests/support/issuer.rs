//! An identity provider: publishes keys, issues tokens, counts requests, and can be made unavailable.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use http_body_util::BodyExt;
use serde_json::{Value, json};

use super::{
    Upstream, text,
    tokens::{Signer, jwks},
};

/// A running provider.
pub struct Issuer {
    server: Upstream,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    keys: Mutex<String>,
    away: AtomicBool,
    key_fetches: AtomicUsize,
    token_requests: AtomicUsize,
    /// The last token request: Authorization field and body.
    last_request: Mutex<(String, String)>,
    /// Lifetime of tokens in seconds.
    lifetime: AtomicUsize,
    /// Milliseconds before a token is issued.
    delay: AtomicUsize,
}

impl Issuer {
    pub fn start() -> Self {
        let state = Arc::new(State { lifetime: AtomicUsize::new(3600), ..State::default() });
        let serving = Arc::clone(&state);
        let server = Upstream::http1(move |request| {
            let state = Arc::clone(&serving);
            async move {
                let path = request.uri().path().to_owned();
                if path == "/jwks" {
                    state.key_fetches.fetch_add(1, Ordering::SeqCst);
                } else {
                    let number = state.token_requests.fetch_add(1, Ordering::SeqCst) + 1;
                    let field = request.headers().get("authorization");
                    let field = field.and_then(|field| field.to_str().ok()).unwrap_or_default().to_owned();
                    let body = request.into_body().collect().await.expect("a body").to_bytes();
                    let body = String::from_utf8_lossy(&body).into_owned();
                    *state.last_request.lock().expect("a lock") = (field, body);
                    let delay = state.delay.load(Ordering::SeqCst) as u64;
                    tokio::time::sleep(std::time::Duration::from_millis(delay)).await;
                    if !state.away.load(Ordering::SeqCst) {
                        let lifetime = state.lifetime.load(Ordering::SeqCst);
                        let token = json!({
                            "access_token": format!("granted-{number}"), "token_type": "Bearer", "expires_in": lifetime,
                        });
                        return text(token.to_string());
                    }
                }
                let mut response = text(state.keys.lock().expect("a lock").clone());
                if state.away.load(Ordering::SeqCst) {
                    *response.status_mut() = http::StatusCode::SERVICE_UNAVAILABLE;
                }
                response
            }
        });
        Self { server, state }
    }

    pub fn publish(&self, signers: &[&Signer]) {
        *self.state.keys.lock().expect("a lock") = jwks(signers);
    }

    pub fn keys_url(&self) -> String {
        format!("http://{}/jwks", self.server.address())
    }

    pub fn token_url(&self) -> String {
        format!("http://{}/token", self.server.address())
    }

    /// Responds with 503 to everything while it is away.
    pub fn set_away(&self, away: bool) {
        self.state.away.store(away, Ordering::SeqCst);
    }

    pub fn key_fetches(&self) -> usize {
        self.state.key_fetches.load(Ordering::SeqCst)
    }

    pub fn token_requests(&self) -> usize {
        self.state.token_requests.load(Ordering::SeqCst)
    }

    pub fn last_request(&self) -> (String, String) {
        self.state.last_request.lock().expect("a lock").clone()
    }

    pub fn set_lifetime(&self, seconds: usize) {
        self.state.lifetime.store(seconds, Ordering::SeqCst);
    }

    pub fn set_delay(&self, milliseconds: usize) {
        self.state.delay.store(milliseconds, Ordering::SeqCst);
    }
}

pub const ISSUER: &str = "https://id.example";

/// The claims of a valid token for `checkout`.
pub fn good_claims() -> Value {
    json!({ "iss": ISSUER, "aud": "checkout", "sub": "ann", "scope": "orders:read", "exp": in_seconds(300) })
}

/// This many seconds from now, as a Unix time.
pub fn in_seconds(seconds: i64) -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
    i64::try_from(now.as_secs()).expect("a time") + seconds
}
