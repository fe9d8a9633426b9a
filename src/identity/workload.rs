//! Certificates from the SPIFFE Workload API: an agent on a socket, which tells new ones before the old ones expire.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures_core::Stream;
use spiffe::{WorkloadApiClient, X509Context};
use tokio::time::{sleep, timeout};

use super::{
    material::{Content, Pem, Text},
    store::Store,
};
use crate::rng::Rng;

/// Between attempts to reach the agent; doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);
/// To connect, and then to hear the first word.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
enum AgentError {
    #[error("the agent at {0} does not answer")]
    Silent(String),
    #[error("the agent at {0} has ended")]
    Ended(String),
    #[error("the agent at {socket}: {source}")]
    Api { socket: String, source: spiffe::WorkloadApiError },
    #[error("the agent at {0} told no identity: has this workload been registered?")]
    Nothing(String),
}

/// Follows the agent for as long as it is polled. An agent that goes away is looked for again.
pub async fn follow(store: Arc<Store>, socket: String) {
    let mut rng = Rng::new();
    let mut pause = FIRST_PAUSE;
    loop {
        let mut heard = false;
        let why = listen(&store, &socket, &mut heard).await;
        store.agent_is_away(why.to_string());
        pause = if heard { FIRST_PAUSE } else { (pause * 2).min(LONGEST_PAUSE) };
        sleep(rng.jitter(pause, 0.2)).await;
    }
}

/// Takes what one stream tells until it ends.
async fn listen(store: &Store, socket: &str, heard: &mut bool) -> AgentError {
    let api = |source| AgentError::Api { socket: socket.to_owned(), source };
    let connecting = async { WorkloadApiClient::connect_to(socket).await?.stream_x509_contexts().await };
    let mut stream = match timeout(PATIENCE, connecting).await {
        Ok(Ok(stream)) => Box::pin(stream),
        Ok(Err(error)) => return api(error),
        Err(_) => return AgentError::Silent(socket.to_owned()),
    };
    loop {
        let next = std::future::poll_fn(|cx| Pin::new(&mut stream).poll_next(cx));
        // An agent has nothing to say for hours, but for its first word.
        let next = if *heard { Ok(next.await) } else { timeout(PATIENCE, next).await };
        match next {
            Ok(Some(Ok(context))) => match parts(socket, &context) {
                Some(pem) => {
                    *heard = true;
                    store.deliver(pem);
                }
                None => return AgentError::Nothing(socket.to_owned()),
            },
            Ok(Some(Err(error))) => return api(error),
            Ok(None) => return AgentError::Ended(socket.to_owned()),
            Err(_) => return AgentError::Silent(socket.to_owned()),
        }
    }
}

/// The default SVID, and the roots of its own and of federated trust domains.
fn parts(socket: &str, context: &X509Context) -> Option<Pem> {
    let svid = context.default_svid()?;
    let text =
        |what: &str, der| Text { path: format!("{socket} ({what})").into(), content: Content::Der(der) };
    let chain = svid.cert_chain().iter().map(|certificate| certificate.as_bytes().to_vec()).collect();
    let bundles = context.bundle_set().iter().filter_map(|(domain, bundle)| {
        let roots: Vec<_> = bundle.authorities().iter().map(|root| root.as_bytes().to_vec()).collect();
        // A federated domain whose roots are not known yet keeps nobody else waiting.
        let known = !roots.is_empty();
        known.then(|| Some((Some(domain.to_string().parse().ok()?), text("roots", roots))))?
    });
    let mut ca: Vec<_> = bundles.collect();
    ca.sort_by(|(a, _), (b, _)| a.cmp(b));
    Some(Pem {
        cert: text("certificate", chain),
        key: text("key", vec![svid.private_key().as_bytes().to_vec()]),
        ca,
        crl: None,
    })
}
