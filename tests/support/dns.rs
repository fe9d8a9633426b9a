//! A DNS server on loopback whose zone a test can change at any time. The proxy queries it by `OUTRIGGER_DNS`.

use std::{
    collections::HashMap,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

const A: u16 = 1;
const SRV: u16 = 33;
const NO_SUCH_NAME: u8 = 3;

/// Priority, weight, port, target.
pub type Srv<'a> = (u16, u16, u16, &'a str);

/// Records of one name and type, and their TTL.
struct Records {
    ttl: u32,
    data: Vec<Vec<u8>>,
}

type Zone = HashMap<(String, u16), Records>;

/// Dropping it stops it.
pub struct Dns {
    address: SocketAddr,
    zone: Arc<Mutex<Zone>>,
    queries: Arc<AtomicUsize>,
    ttl: u32,
    alive: Arc<()>,
}

impl Dns {
    /// Records with a TTL of one second.
    pub fn start() -> Self {
        Self::with_ttl(1)
    }

    /// Records with this TTL in seconds.
    pub fn with_ttl(ttl: u32) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("bind");
        socket.set_read_timeout(Some(Duration::from_millis(200))).expect("a timeout");
        let address = socket.local_addr().expect("an address");
        let (zone, alive) = (Arc::<Mutex<Zone>>::default(), Arc::new(()));
        let queries = Arc::<AtomicUsize>::default();
        let (records, count, owner) = (zone.clone(), queries.clone(), Arc::downgrade(&alive));
        thread::spawn(move || {
            let mut query = [0; 2048];
            while owner.upgrade().is_some() {
                let Ok((length, peer)) = socket.recv_from(&mut query) else { continue };
                count.fetch_add(1, Ordering::Relaxed);
                if let Some(response) = answer(&query[..length], &records.lock().expect("no panic")) {
                    let _ = socket.send_to(&response, peer);
                }
            }
        });
        Self { address, zone, queries, ttl, alive }
    }

    /// The number of queries; A and AAAA are two.
    pub fn queries(&self) -> usize {
        self.queries.load(Ordering::Relaxed)
    }

    /// For `OUTRIGGER_DNS`.
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// Sets the IPv4 addresses of a name; it has no others.
    pub fn addresses(&self, name: &str, addresses: &[Ipv4Addr]) {
        self.addresses_for(self.ttl, name, addresses);
    }

    /// The same with this TTL in seconds.
    pub fn addresses_for(&self, ttl: u32, name: &str, addresses: &[Ipv4Addr]) {
        let data = addresses.iter().map(|address| address.octets().to_vec()).collect();
        self.zone.lock().expect("no panic").insert((name.to_owned(), A), Records { ttl, data });
    }

    pub fn services(&self, name: &str, records: &[Srv<'_>]) {
        let record = |(priority, weight, port, target): &Srv<'_>| {
            let mut data: Vec<u8> =
                [priority, weight, port].into_iter().flat_map(|n| n.to_be_bytes()).collect();
            for label in target.split('.') {
                data.push(u8::try_from(label.len()).expect("a label"));
                data.extend(label.as_bytes());
            }
            data.push(0);
            data
        };
        let records = Records { ttl: self.ttl, data: records.iter().map(record).collect() };
        self.zone.lock().expect("no panic").insert((name.to_owned(), SRV), records);
    }
}

fn answer(query: &[u8], zone: &Zone) -> Option<Vec<u8>> {
    let (mut at, mut labels) = (12, Vec::new());
    while let length @ 1.. = usize::from(*query.get(at)?) {
        labels.push(String::from_utf8_lossy(query.get(at + 1..at + 1 + length)?).to_ascii_lowercase());
        at += 1 + length;
    }
    let name = labels.join(".");
    let kind = u16::from_be_bytes([*query.get(at + 1)?, *query.get(at + 2)?]);
    let question = query.get(12..at + 5)?;
    let (ttl, records) =
        zone.get(&(name.clone(), kind)).map_or((0, &[][..]), |found| (found.ttl, &found.data[..]));
    let known = zone.keys().any(|(known, _)| *known == name);
    let mut response = query[..2].to_vec();
    response.extend([0x81, 0x80 | if known { 0 } else { NO_SUCH_NAME }, 0, 1]);
    response.extend(u16::try_from(records.len()).ok()?.to_be_bytes());
    response.extend([0; 4]);
    response.extend(question);
    for data in records {
        // The name of the question, class IN.
        response.extend([0xc0, 12]);
        response.extend(kind.to_be_bytes());
        response.extend([0, 1]);
        response.extend(ttl.to_be_bytes());
        response.extend(u16::try_from(data.len()).ok()?.to_be_bytes());
        response.extend(data);
    }
    Some(response)
}
