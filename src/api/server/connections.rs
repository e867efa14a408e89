//! Bounds on the connections that are served at once, in all and from each client network. Idle
//! connections make room for new ones.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use ipnet::IpNet;
use parking_lot::{Mutex, MutexGuard};
use prometheus::IntGauge;

use super::activity::Activity;
use crate::domain::ClientNetwork;

/// Slots beyond the bounds, for health checks only: a balancer that gets no response takes the
/// service for dead and restarts it, which makes an overload worse.
const HEALTH_SLOTS: usize = 32;
/// At a bound, one in this many connections is closed together, so that in a flood not every new
/// connection has to search all others.
const CLOSED_TOGETHER: usize = 64;

/// How many connections are served at once.
#[derive(Clone, Debug)]
pub struct Bounds {
    /// In all.
    pub most: usize,
    /// From one client network.
    pub most_of_network: usize,
    /// Proxies carry the connections of many networks, so they count only towards the bound in all.
    pub proxies: Vec<IpNet>,
}

/// The connections that are being served.
#[derive(Debug)]
pub struct Connections {
    bounds: Bounds,
    open: IntGauge,
    table: Mutex<SlotTable>,
}

#[derive(Debug, Default)]
struct SlotTable {
    next_key: u64,
    served: HashMap<u64, SlotEntry>,
    networks: HashMap<ClientNetwork, usize>,
    /// Those in health slots, the oldest first.
    beyond: Vec<(u64, Arc<Activity>)>,
}

#[derive(Debug)]
struct SlotEntry {
    network: Option<ClientNetwork>,
    activity: Arc<Activity>,
}

/// A connection's slot, in the extensions of each request. A WebSocket that takes the connection
/// over keeps it, so that open sockets count too. It is free again when its last clone is dropped.
#[derive(Clone, Debug)]
pub struct Slot(Arc<OccupiedSlot>);

#[derive(Debug)]
struct OccupiedSlot {
    key: u64,
    connections: Arc<Connections>,
    activity: Arc<Activity>,
    is_for_health: bool,
}

impl Slot {
    /// The connection's activity.
    pub fn activity(&self) -> &Arc<Activity> {
        &self.0.activity
    }

    /// Whether it lies beyond the bounds, so that only health checks are served on it.
    pub fn is_for_health(&self) -> bool {
        self.0.is_for_health
    }
}

impl Connections {
    /// No connections yet; `open` shows how many there are.
    pub fn new(bounds: Bounds, open: IntGauge) -> Arc<Self> {
        Arc::new(Self {
            bounds,
            open,
            table: Mutex::default(),
        })
    }

    /// A slot for a connection from `peer`. At a bound, idle connections are asked to leave; if
    /// none is idle, the slot is one for health checks. `None` if those are taken too.
    pub fn admit(self: &Arc<Self>, peer: IpAddr) -> Option<Slot> {
        let peer = peer.to_canonical();
        let is_proxy = self.bounds.proxies.iter().any(|net| net.contains(&peer));
        let network = (!is_proxy).then(|| ClientNetwork::from(peer));
        let activity = Arc::new(Activity::new(Instant::now()));
        let mut table = self.lock();
        if let Some(network) = network {
            let most = self.bounds.most_of_network;
            if table.of_network(network) >= most {
                table.make_room(share(most), |entry| entry.network == Some(network));
            }
        }
        if table.served.len() >= self.bounds.most {
            table.make_room(share(self.bounds.most), |_| true);
        }
        let has_room = table.served.len() < self.bounds.most
            && network.is_none_or(|of| table.of_network(of) < self.bounds.most_of_network);
        let key = table.next_key;
        table.next_key += 1;
        if has_room {
            let activity = Arc::clone(&activity);
            table.add(key, SlotEntry { network, activity });
        } else if !table.add_beyond(key, &activity) {
            return None;
        }
        drop(table);
        self.open.inc();
        Some(Slot(Arc::new(OccupiedSlot {
            key,
            connections: Arc::clone(self),
            activity,
            is_for_health: !has_room,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, SlotTable> {
        self.table.lock()
    }
}

impl Drop for OccupiedSlot {
    fn drop(&mut self) {
        self.connections.lock().remove(self.key);
        self.connections.open.dec();
    }
}

impl SlotTable {
    fn of_network(&self, network: ClientNetwork) -> usize {
        self.networks.get(&network).copied().unwrap_or_default()
    }

    fn add(&mut self, key: u64, entry: SlotEntry) {
        if let Some(network) = entry.network {
            *self.networks.entry(network).or_default() += 1;
        }
        self.served.insert(key, entry);
    }

    /// Takes a health slot; if all are taken, the slot of the oldest connection that has not sent a
    /// request yet.
    fn add_beyond(&mut self, key: u64, activity: &Arc<Activity>) -> bool {
        if self.beyond.len() >= HEALTH_SLOTS {
            let is_idle = |(_, other): &(u64, Arc<Activity>)| other.readiness_to_leave().is_some();
            let Some(at) = self.beyond.iter().position(is_idle) else {
                return false;
            };
            self.beyond.remove(at).1.ask_to_leave();
        }
        self.beyond.push((key, Arc::clone(activity)));
        true
    }

    /// Removes up to `count` idle connections and asks them to leave: first those that never
    /// carried a request, then the longest idle.
    fn make_room(&mut self, count: usize, concerns: impl Fn(&SlotEntry) -> bool) {
        let mut idle: Vec<_> = self
            .served
            .iter()
            .filter(|(_, entry)| concerns(entry))
            .filter_map(|(key, entry)| Some((entry.activity.readiness_to_leave()?, *key)))
            .collect();
        idle.sort_unstable();
        for (_, key) in idle.into_iter().take(count) {
            if let Some(entry) = self.remove(key) {
                entry.activity.ask_to_leave();
            }
        }
    }

    /// Removes a connection, if it is still there: one that was asked to leave is removed already.
    fn remove(&mut self, key: u64) -> Option<SlotEntry> {
        self.beyond.retain(|(other, _)| *other != key);
        let entry = self.served.remove(&key)?;
        if let Some(network) = entry.network
            && let Some(count) = self.networks.get_mut(&network)
        {
            *count -= 1;
            if *count == 0 {
                self.networks.remove(&network);
            }
        }
        Some(entry)
    }
}

fn share(bound: usize) -> usize {
    (bound / CLOSED_TOGETHER).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connections(most: usize, most_of_network: usize) -> Arc<Connections> {
        let bounds = Bounds {
            most,
            most_of_network,
            proxies: vec!["10.0.0.0/8".parse().unwrap()],
        };
        Connections::new(bounds, IntGauge::new("open", "open").unwrap())
    }

    fn admit(connections: &Arc<Connections>, peer: &str) -> Slot {
        connections.admit(peer.parse().unwrap()).unwrap()
    }

    /// One that carries a request, so that it makes no room.
    fn busy(connections: &Arc<Connections>, peer: &str) -> Slot {
        let slot = admit(connections, peer);
        slot.activity().begin_request();
        slot
    }

    async fn was_asked_to_leave(slot: &Slot) -> bool {
        let asked = slot.activity().asked_to_leave();
        tokio::time::timeout(std::time::Duration::ZERO, asked)
            .await
            .is_ok()
    }

    #[tokio::test]
    async fn at_the_bound_the_longest_idle_connection_makes_room() {
        let all = connections(2, 2);
        let served = admit(&all, "192.0.2.1");
        served.activity().begin_request();
        served.activity().end_request(Instant::now());
        let silent = admit(&all, "192.0.2.2");
        let new = admit(&all, "192.0.2.3");
        assert!(!new.is_for_health());
        assert!(was_asked_to_leave(&silent).await, "it never sent anything");
        assert!(!was_asked_to_leave(&served).await);
        let newer = admit(&all, "192.0.2.4");
        assert!(!newer.is_for_health());
        assert!(was_asked_to_leave(&new).await);
    }

    #[tokio::test]
    async fn network_at_its_bound_makes_room_only_among_its_connections() {
        let all = connections(10, 2);
        let other = admit(&all, "192.0.2.1");
        let own = [admit(&all, "2001:db8::1"), admit(&all, "2001:db8::2")];
        let third = admit(&all, "2001:db8::3");
        assert!(!third.is_for_health());
        assert!(was_asked_to_leave(&own[0]).await);
        assert!(!was_asked_to_leave(&other).await && !was_asked_to_leave(&own[1]).await);
        let next = admit(&all, "2001:db8:0:1::1");
        assert!(!next.is_for_health() && !was_asked_to_leave(&own[1]).await);
    }

    #[test]
    fn if_all_are_busy_there_are_only_slots_for_health_checks() {
        let all = connections(2, 1);
        let one = busy(&all, "192.0.2.1");
        assert!(
            admit(&all, "192.0.2.1").is_for_health(),
            "its network has one"
        );
        let two = busy(&all, "192.0.2.2");
        let beyond: Vec<_> = (0..HEALTH_SLOTS).map(|_| busy(&all, "192.0.2.3")).collect();
        assert!(beyond.iter().all(Slot::is_for_health));
        assert!(all.admit("192.0.2.4".parse().unwrap()).is_none());
        drop(beyond);
        assert!(admit(&all, "192.0.2.4").is_for_health());
        drop(one);
        assert!(!admit(&all, "192.0.2.4").is_for_health());
        drop(two);
        assert_eq!(all.open.get(), 0);
        assert!(all.lock().networks.is_empty() && all.lock().beyond.is_empty());
    }

    #[tokio::test]
    async fn a_silent_connection_does_not_keep_a_health_slot() {
        let all = connections(1, 1);
        let _busy = busy(&all, "192.0.2.1");
        let silent: Vec<_> = (0..HEALTH_SLOTS)
            .map(|_| admit(&all, "192.0.2.2"))
            .collect();
        assert!(admit(&all, "192.0.2.3").is_for_health());
        assert!(was_asked_to_leave(&silent[0]).await);
        assert!(!was_asked_to_leave(&silent[1]).await);
    }

    #[test]
    fn a_proxy_brings_the_connections_of_many_networks() {
        let all = connections(4, 1);
        let slots: Vec<_> = (0..4).map(|_| busy(&all, "10.0.0.1")).collect();
        assert!(slots.iter().all(|slot| !slot.is_for_health()));
        assert!(admit(&all, "10.0.0.1").is_for_health());
    }
}
