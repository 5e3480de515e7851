//! Whether the collector has moved objects.
//!
//! The address of an object says what it is only until the collector moves it, or frees its place. A full collection alone does that
//! to bytecode, code and what describes them. V8 counts full collections, each before it moves something, and says while one runs.
//! So addresses mean the same as long as no heap of the process has counted one. Of the others, those of the youngest objects, V8
//! has a count too: they may move strings.

use parking_lot::Mutex;

use super::super::{Memory, Unloads, WhyNot, memory::half};

/// Objects begin in a page of this alignment.
const PAGE: u64 = 256 << 10;
/// Heaps of one process: each of its workers has one.
const MAX_HEAPS: usize = 64;
/// The bits from which on a reading has the number of heaps, and the number of those that are gone.
const HEAPS: u32 = 40;
const GONE: u32 = 48;
/// States of the collector.
const IDLE: u32 = 0;
const YOUNG: [u32; 2] = [1, 3];

/// The way from the page of an object to its heap, and the place of the heap's counts. The source: upstream builds, in which these
/// words follow the collections that a program asks for.
#[derive(Clone, Copy, Debug)]
pub(super) struct HeapLayout {
    /// Distances at which each pointer leads to the next, from the page on to the heap.
    pub(super) path: &'static [u64],
    /// In the heap: the number of full collections, with that of all collections behind it.
    pub(super) collections: u64,
    /// In the heap: the state of the collector.
    pub(super) state: u64,
}

/// The numbers of one heap.
struct Collections {
    full: u32,
    all: u32,
    state: u32,
}

/// The heaps of one process, and what they said last.
#[derive(Debug)]
pub(super) struct Moves {
    layout: HeapLayout,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    heaps: Vec<u64>,
    /// The number of heaps that have ended, or that the agent has forgotten.
    gone: u64,
    last: Option<Unloads>,
    /// The number of the time since V8 may last have moved objects.
    epoch: u32,
}

impl Moves {
    pub(super) fn new(layout: HeapLayout) -> Self {
        Self { layout, known: Mutex::default() }
    }

    /// Returns the number of the epoch: the time since V8 may last have moved objects. At an address that the agent read in an
    /// earlier epoch there may be another object now.
    pub(super) fn epoch(&self) -> u32 {
        self.known.lock().epoch
    }

    /// Returns the number of heaps that the agent reads.
    pub(super) fn heaps(&self) -> usize {
        self.known.lock().heaps.len()
    }

    /// Enters the heap of an object, so that [`Moves::read`] reads the counts of that heap too.
    pub(super) fn enter(&self, object: u64, memory: &dyn Memory) -> Result<(), WhyNot> {
        let mut heap = object & !(PAGE - 1);
        for distance in self.layout.path {
            heap = memory.u64(heap.wrapping_add(*distance))?;
        }
        if self.known.lock().heaps.contains(&heap) {
            return Ok(());
        }
        self.collections(heap, memory)?;
        let mut known = self.known.lock();
        if known.heaps.len() >= MAX_HEAPS {
            known.gone += known.heaps.len() as u64;
            known.heaps.clear();
        }
        known.heaps.push(heap);
        Ok(())
    }

    /// Reads how many full collections the heaps have counted. `is_there` reports whether the process still exists.
    pub(super) fn read(&self, memory: &dyn Memory, is_there: impl FnOnce() -> bool) -> Unloads {
        let heaps = self.known.lock().heaps.clone();
        let found: Vec<_> =
            heaps.iter().filter_map(|heap| Some((*heap, self.collections(*heap, memory).ok()?))).collect();
        if found.len() < heaps.len() && !is_there() {
            return self.known.lock().last.unwrap_or(Unloads::Unknown);
        }
        let may_move = found.iter().any(|(_, of)| of.state != IDLE && !YOUNG.contains(&of.state));
        let full: u64 = found.iter().map(|(_, of)| u64::from(of.full)).sum();
        let mut known = self.known.lock();
        known.gone += (heaps.len() - found.len()) as u64;
        let reading = match full | known.gone << GONE {
            _ if may_move || found.is_empty() => Unloads::Unknown,
            0 => Unloads::Count(0),
            moves => Unloads::Count((found.len() as u64) << HEAPS | moves),
        };
        known.heaps = found.into_iter().map(|(heap, _)| heap).collect();
        if known.last != Some(reading) || reading == Unloads::Unknown {
            known.last = Some(reading);
            known.epoch = known.epoch.wrapping_add(1);
        }
        reading
    }

    /// Reads something of which a part may be young objects. If V8 may have moved young objects meanwhile, two readings must agree.
    pub(super) fn read_steadily<T: PartialEq>(
        &self,
        memory: &dyn Memory,
        read: impl Fn() -> Result<T, WhyNot>,
    ) -> Result<T, WhyNot> {
        let before = self.all(memory);
        let found = read()?;
        let is_steady = before.is_ok() && self.all(memory) == before;
        if is_steady || read()? == found { Ok(found) } else { Err(WhyNot::Implausible("objects that move")) }
    }

    /// Returns the number of all collections of all heaps; an error while one runs.
    fn all(&self, memory: &dyn Memory) -> Result<u64, WhyNot> {
        let heaps = self.known.lock().heaps.clone();
        heaps.into_iter().try_fold(0, |sum, heap| {
            let of = self.collections(heap, memory)?;
            let is_idle = of.state == IDLE;
            if is_idle { Ok(sum + u64::from(of.all)) } else { Err(WhyNot::Implausible("objects that move")) }
        })
    }

    fn collections(&self, heap: u64, memory: &dyn Memory) -> Result<Collections, WhyNot> {
        let counts: [u8; 8] = memory.array(heap.wrapping_add(self.layout.collections))?;
        // Behind the count: a collection that had counted itself before is over if none runs now.
        let state = memory.array(heap.wrapping_add(self.layout.state))?;
        let of =
            Collections { full: half(&counts, 0), all: half(&counts, 4), state: u32::from_ne_bytes(state) };
        let is_heap = of.full <= of.all && of.state <= 4;
        if is_heap { Ok(of) } else { Err(WhyNot::Implausible("a page without a heap")) }
    }
}
