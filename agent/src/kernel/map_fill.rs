//! How full the BPF maps are.

use libbpf_rs::{MapCore as _, MapType, skel::Skel as _};

use super::Kernel;

/// The entries of one BPF map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapFill {
    /// Name of the map in the BPF programs.
    pub name: String,
    /// Kind of the map; see bpf(2).
    pub kind: &'static str,
    /// Entries in use; of the ring buffer, bytes that wait for the agent. `None`: the map always has all of its entries.
    pub entries: Option<u64>,
    /// Entries that it can have; of the ring buffer, its bytes.
    pub capacity: u64,
}

impl Kernel {
    /// Returns the fill of every map of the BPF programs, by name. It counts keys one by one; `known` are the maps whose entries
    /// the caller has counted already.
    pub(crate) fn map_fill(&self, known: &[(&str, u64)]) -> Vec<MapFill> {
        let fill = |map: libbpf_rs::Map<'_>| {
            let name = map.name().to_string_lossy().into_owned();
            let (kind, has_keys) = kind_of(map.map_type());
            let known = known.iter().find(|(known, _)| *known == name).map(|(_, entries)| *entries);
            let entries = known.or_else(|| match map.map_type() {
                MapType::RingBuf => Some(self.ring.waiting_bytes()),
                _ if has_keys => Some(map.keys().count() as u64),
                _ => None,
            });
            MapFill { name, kind, entries, capacity: map.max_entries().into() }
        };
        let mut maps: Vec<_> = self.skeleton.object().maps().map(fill).collect();
        maps.sort_unstable_by(|one, other| one.name.cmp(&other.name));
        maps
    }
}

/// Returns the name of a kind of map, and whether its entries come and go.
fn kind_of(kind: MapType) -> (&'static str, bool) {
    match kind {
        MapType::Hash => ("hash", true),
        MapType::LruHash => ("lru_hash", true),
        MapType::PercpuHash => ("percpu_hash", true),
        MapType::LpmTrie => ("lpm_trie", true),
        MapType::RingBuf => ("ringbuf", false),
        MapType::Array => ("array", false),
        MapType::PercpuArray => ("percpu_array", false),
        MapType::ProgArray => ("prog_array", false),
        _ => ("other", false),
    }
}
