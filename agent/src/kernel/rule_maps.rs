//! The rules in the form that the BPF programs need, and the maps that hold them.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::atomic::{Ordering, fence},
};

use gannet_bpf::types;
use libbpf_rs::{MapCore as _, MapFlags, MapMut};

use super::{Kernel, KernelError};

/// Rules that can be in force at one time: each has one bit in a sample.
pub(crate) const MAX_RULES: usize = 64;
/// Bytes of a command name in the kernel.
pub(crate) const MAX_COMM: usize = 15;
/// Bytes of a control group's path that the kernel side can compare.
pub(crate) const MAX_CGROUP_PATH: usize = 251;
const _: () = assert!(size_of::<types::comm_key>() == 8 + MAX_COMM + 1);
const _: () = assert!(size_of::<types::cgroup_key>() == 8 + MAX_CGROUP_PATH + 1);

/// The rules that sample a process, one bit for each slot, and the time between two ticks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Want {
    /// One bit for each slot.
    pub rules: u64,
    /// The shortest period that these rules ask for; 0 if none asks for ticks.
    pub period_ns: u64,
}

impl From<Want> for types::want {
    fn from(want: Want) -> Self {
        Self { rules: want.rules, period_ns: want.period_ns }
    }
}

/// The rules that ask for a property, one bit for each slot. gannet.h describes the fields of `struct side`.
pub type RuleMasks = types::side;

/// The rules in the form that the BPF programs need. Each property of a process selects a set of rules, one bit for each slot;
/// a rule matches if it is in the sets of all properties.
#[derive(Clone, Debug)]
pub struct KernelRules {
    /// The rules that sample every process, known or not.
    pub all: Want,
    /// Command names, each with all rules that it matches, also those of shorter matching prefixes.
    pub comms: Vec<(NamePattern, u64)>,
    /// Paths of control groups, likewise.
    pub cgroups: Vec<(NamePattern, u64)>,
    /// Properties that are compared as numbers.
    pub exact: Vec<(Exact, u64)>,
    /// The rules that ask for each property.
    pub masks: RuleMasks,
    /// Time between two ticks by slot; 0 for a slot that is free or asks for no ticks.
    pub periods_ns: [u64; MAX_RULES],
    /// The slots that ask for blocked time.
    pub off_cpu: u64,
    /// The slots that ask for ticks only while the thread works in a span.
    pub in_span: u64,
    /// Whether any rule asks for user stacks.
    pub user_stacks: bool,
    /// Whether any rule asks for kernel stacks.
    pub kernel_stacks: bool,
}

/// A property that is compared as a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Exact {
    /// A container, by the id of its control group. It covers the groups below.
    Container(u64),
    /// A PID in the namespace of the host.
    Pid(u32),
    /// An effective user id.
    Uid(u32),
}

/// A name or path, or the beginning of one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamePattern {
    /// Of a command at most [`MAX_COMM`] bytes, of a control group at most [`MAX_CGROUP_PATH`].
    pub text: String,
    /// Whether longer names match too.
    pub prefix: bool,
}

impl Default for KernelRules {
    fn default() -> Self {
        Self {
            all: Want::default(),
            comms: Vec::new(),
            cgroups: Vec::new(),
            exact: Vec::new(),
            masks: RuleMasks::default(),
            periods_ns: [0; MAX_RULES],
            off_cpu: 0,
            in_span: 0,
            user_stacks: true,
            kernel_stacks: true,
        }
    }
}

impl KernelRules {
    /// Builds one rule in slot 0 that samples a command.
    pub fn for_comm(comm: NamePattern, period_ns: u64) -> Self {
        let mut rules = Self { comms: vec![(comm, 1)], ..Self::default() };
        rules.masks = RuleMasks {
            rules: 1,
            any_cgroup: 1,
            any_container: 1,
            any_uid: 1,
            any_pid: 1,
            ..RuleMasks::default()
        };
        rules.periods_ns[0] = period_ns;
        rules
    }

    /// Returns the periods in use.
    pub(super) fn periods(&self) -> BTreeSet<u64> {
        self.periods_ns.iter().copied().filter(|period| *period > 0).collect()
    }

    /// Returns the slots that ask for ticks.
    fn on_cpu(&self) -> u64 {
        let slots = self.periods_ns.iter().enumerate().filter(|(_, period)| **period > 0);
        slots.fold(0, |bits, (slot, _)| bits | 1_u64 << slot)
    }

    /// Returns the rates in use, fastest first, each with the rules that ask for it.
    fn rates(&self) -> [types::want; MAX_RULES] {
        let mut by_period: BTreeMap<u64, u64> = BTreeMap::new();
        for (slot, period) in self.periods_ns.iter().enumerate().filter(|(_, period)| **period > 0) {
            *by_period.entry(*period).or_default() |= 1 << slot;
        }
        let mut rates = [types::want::default(); MAX_RULES];
        for (rate, (period_ns, rules)) in rates.iter_mut().zip(by_period) {
            *rate = types::want { rules, period_ns };
        }
        rates
    }
}

impl Kernel {
    /// Puts rules into force for every later `execve`, and for all running processes by the time this returns. Starts the
    /// clocks that the rules need. On an error the former rules stay.
    pub fn set_rules(&mut self, rules: &KernelRules) -> Result<(), KernelError> {
        let next = self.settings().generation.wrapping_add(1);
        self.fill_side(next & 1, rules)?;
        self.start_sources(rules)?;
        self.change_settings(|settings| {
            settings.rates = rules.rates();
            settings.all = rules.all.into();
            settings.user_stacks = rules.user_stacks.into();
            settings.kernel_stacks = rules.kernel_stacks.into();
            settings.on_cpu_rules = rules.on_cpu();
            settings.off_cpu_rules = rules.off_cpu;
            settings.in_span_rules = rules.in_span;
            settings.live_rules = rules.masks.rules | rules.all.rules;
            settings.sides[(next & 1) as usize] = rules.masks;
        });
        // The side is complete before it comes into force.
        fence(Ordering::SeqCst);
        self.change_settings(|settings| settings.generation = next);
        self.scan_processes()
    }

    /// Makes the maps hold exactly these rules on one side.
    fn fill_side(&mut self, side: u32, rules: &KernelRules) -> Result<(), KernelError> {
        let maps = &self.skeleton.maps;
        let comms = rules.comms.iter().map(|(name, bits)| (comm_key(side, name).to_vec(), *bits));
        fill(&maps.comm_rules, "comm_rules", 4, side, comms)?;
        let cgroups = rules.cgroups.iter().map(|(path, bits)| (cgroup_key(side, path).to_vec(), *bits));
        fill(&maps.cgroup_rules, "cgroup_rules", 4, side, cgroups)?;
        let exact = rules.exact.iter().map(|(exact, bits)| (exact_key(side, *exact).to_vec(), *bits));
        fill(&maps.exact_rules, "exact_rules", 0, side, exact)
    }

    /// Returns the rules that the kernel's trie finds for a command name, as its programs do.
    pub fn look_up_comm(&self, comm: &str) -> Result<u64, KernelError> {
        // A name as the kernel holds it: 16 bytes, all of them compared.
        let mut key = comm_key(self.side(), &NamePattern { text: comm.to_owned(), prefix: false });
        key[..4].copy_from_slice(&(8 * (size_of::<types::comm_key>() as u32 - 4)).to_ne_bytes());
        look_up(&self.skeleton.maps.comm_rules, "comm_rules", &key)
    }

    /// Returns the rules that the kernel's trie finds for the path of a control group.
    pub fn look_up_cgroup(&self, path: &str) -> Result<u64, KernelError> {
        let mut key = cgroup_key(self.side(), &NamePattern { text: path.to_owned(), prefix: false });
        key[..4].copy_from_slice(&(8 * (size_of::<types::cgroup_key>() as u32 - 4)).to_ne_bytes());
        look_up(&self.skeleton.maps.cgroup_rules, "cgroup_rules", &key)
    }

    fn side(&self) -> u32 {
        self.settings().generation & 1
    }
}

/// Makes one side of a map hold exactly these entries. `offset` is where a key holds the side.
fn fill(
    map: &MapMut<'_>,
    name: &'static str,
    offset: usize,
    side: u32,
    entries: impl Iterator<Item = (Vec<u8>, u64)>,
) -> Result<(), KernelError> {
    let failed = |source| KernelError::Map { map: name, source };
    let old: Vec<_> =
        map.keys().filter(|key| key.get(offset..offset + 4) == Some(&side.to_ne_bytes())).collect();
    for key in old {
        map.delete(&key).map_err(failed)?;
    }
    for (key, rules) in entries {
        map.update(&key, &rules.to_ne_bytes(), MapFlags::ANY).map_err(failed)?;
    }
    Ok(())
}

fn look_up(map: &MapMut<'_>, name: &'static str, key: &[u8]) -> Result<u64, KernelError> {
    let value = map.lookup(key, MapFlags::ANY).map_err(|source| KernelError::Map { map: name, source })?;
    Ok(value.and_then(|bytes| Some(u64::from_ne_bytes(*bytes.first_chunk()?))).unwrap_or(0))
}

/// Builds the key of a name in a trie: length in bits, side, text. The key of an exact name includes the NUL behind it.
fn trie_key<const KEY: usize>(side: u32, pattern: &NamePattern) -> [u8; KEY] {
    let mut key = [0; KEY];
    let text = &pattern.text.as_bytes()[..pattern.text.len().min(KEY - 9)];
    let bytes = 4 + text.len() + usize::from(!pattern.prefix);
    key[..4].copy_from_slice(&((bytes * 8) as u32).to_ne_bytes());
    key[4..8].copy_from_slice(&side.to_ne_bytes());
    key[8..8 + text.len()].copy_from_slice(text);
    key
}

fn comm_key(side: u32, pattern: &NamePattern) -> [u8; size_of::<types::comm_key>()] {
    trie_key(side, pattern)
}

fn cgroup_key(side: u32, pattern: &NamePattern) -> [u8; size_of::<types::cgroup_key>()] {
    trie_key(side, pattern)
}

fn exact_key(side: u32, exact: Exact) -> [u8; size_of::<types::exact_key>()] {
    // The numbers of `enum exact_kind` in gannet.h.
    let (kind, number) = match exact {
        Exact::Container(id) => (1_u32, id),
        Exact::Pid(pid) => (2, pid.into()),
        Exact::Uid(uid) => (3, uid.into()),
    };
    let mut key = [0; size_of::<types::exact_key>()];
    key[..4].copy_from_slice(&side.to_ne_bytes());
    key[4..8].copy_from_slice(&kind.to_ne_bytes());
    key[8..].copy_from_slice(&number.to_ne_bytes());
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exact_name_is_a_longer_key_than_its_prefix() {
        let name = |text: &str, prefix| comm_key(1, &NamePattern { text: text.into(), prefix });
        let (exact, prefix) = (name("node", false), name("node", true));
        assert_eq!(exact[..4], 72_u32.to_ne_bytes());
        assert_eq!(prefix[..4], 64_u32.to_ne_bytes());
        assert_eq!(exact[4..], prefix[4..]);
        assert_eq!(&exact[8..13], b"node\0");
        assert_eq!(name(&"a".repeat(15), false)[..4], 160_u32.to_ne_bytes());
    }

    #[test]
    fn rates_are_sorted_and_have_all_rules_of_a_period() {
        let mut rules = KernelRules::default();
        rules.periods_ns[..4].copy_from_slice(&[20, 0, 10, 20]);
        let rates = rules.rates().map(|rate| (rate.period_ns, rate.rules));
        assert_eq!(rates[..3], [(10, 0b100), (20, 0b1001), (0, 0)]);
        assert_eq!((rules.on_cpu(), rules.periods()), (0b1101, [10, 20].into()));
    }
}
