//! Places for connections: so many in all, and for each address only a part of them, so that nobody takes all by holding
//! connections open.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

#[derive(Debug)]
pub struct Places {
    all: Arc<Semaphore>,
    /// Addresses that have connections; never more than there are places.
    taken: Arc<Mutex<HashMap<IpAddr, usize>>>,
    each: usize,
}

impl Places {
    pub fn new(all: usize, each: usize) -> Self {
        Self { all: Arc::new(Semaphore::new(all)), taken: Arc::default(), each }
    }

    /// Waits for a place that anybody may have.
    pub async fn free(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.all).acquire_owned().await.ok()
    }

    /// Gives it to an address, unless that has its part already.
    pub fn take(&self, free: OwnedSemaphorePermit, address: IpAddr) -> Option<Place> {
        let address = address.to_canonical();
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let count = taken.entry(address).or_default();
        if *count >= self.each {
            return None;
        }
        *count += 1;
        Some(Place { _free: free, address, taken: Arc::clone(&self.taken) })
    }
}

/// Free again when dropped.
#[derive(Debug)]
pub struct Place {
    _free: OwnedSemaphorePermit,
    address: IpAddr,
    taken: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = taken.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_address_gets_its_part_and_what_is_given_back_is_there_again() {
        let places = Places::new(4, 2);
        let take = async |address: &str| {
            places.take(places.free().await.expect("open"), address.parse().expect("an address"))
        };
        let (one, two) = (take("10.0.0.1").await, take("::ffff:10.0.0.1").await);
        assert!(one.is_some() && two.is_some() && take("10.0.0.1").await.is_none());
        assert!(take("10.0.0.2").await.is_some());
        drop(one);
        assert!(take("10.0.0.1").await.is_some());
        drop(two);
        assert!(places.taken.lock().expect("a lock").is_empty());
        assert_eq!(places.all.available_permits(), 4);
    }
}
