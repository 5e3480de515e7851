//! The ring buffer through which the BPF programs report events.

use std::{
    cell::RefCell,
    collections::{HashMap, HashSet},
    mem,
    os::fd::{BorrowedFd, RawFd},
    rc::Rc,
    sync::Arc,
};

use libbpf_rs::{AsRawLibbpf as _, MapCore, RingBuffer, RingBufferBuilder, libbpf_sys};

use super::{
    Event, KernelError,
    event::{SampleNumber, SpanRecord},
};
use crate::model::{ImageKey, Sample, SpanKeys, TaskLabels, span_labels};

/// The return code with which the callback of `ring_buffer__consume` ends a read.
const STOP: i32 = -libc::ECANCELED;

/// The reader of the ring buffer.
pub(super) struct EventRing {
    ring: RingBuffer<'static>,
    queue: Rc<RefCell<Queue>>,
    /// Up to the end of the last read.
    arrived: Arrived,
    bytes: usize,
}

/// The samples that were read so far, by the numbers that the BPF programs gave them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Arrived {
    /// By CPU: the samples that it had sent up to the last one that was read.
    by_cpu: Vec<u64>,
    undecodable: u64,
}

/// More CPUs than a kernel can have: a larger number in a record is damage.
const MAX_CPUS: usize = 1 << 16;

impl Arrived {
    /// Returns how many samples this CPU had sent up to the last one that was read.
    pub(crate) fn of_cpu(&self, cpu: usize) -> u64 {
        self.by_cpu.get(cpu).copied().unwrap_or(0)
    }

    /// Returns the samples that could not be decoded, once for each rule.
    pub(crate) fn undecodable(&self) -> u64 {
        self.undecodable
    }

    /// Takes a sample for this number of rules, which the CPU sent behind `sequence` others.
    pub(crate) fn sample(&mut self, cpu: u32, sequence: u64, rules: u64) {
        let cpu = cpu as usize;
        if cpu >= MAX_CPUS {
            return;
        }
        if self.by_cpu.len() <= cpu {
            self.by_cpu.resize(cpu + 1, 0);
        }
        self.by_cpu[cpu] = self.by_cpu[cpu].max(sequence.saturating_add(rules));
    }

    /// Counts a sample for this number of rules that is no use.
    pub(crate) fn count_undecodable(&mut self, rules: u64) {
        self.undecodable += rules;
    }
}

/// Events of the read that is in progress.
#[derive(Default)]
struct Queue {
    events: Vec<Event>,
    undecodable: u64,
    arrived: Arrived,
    labels: WaitingLabels,
    /// By thread group: the names of the attributes of its spans.
    span_keys: HashMap<u32, (ImageKey, Arc<SpanKeys>)>,
    /// Thread groups with attributes without a name.
    unknown_keys: HashSet<u32>,
    /// Bytes that this read may still take.
    left_bytes: usize,
}

/// Threads whose labels may wait for their sample, and different sets of labels that are shared.
const MAX_WAITING: usize = 1024;

/// Labels whose sample comes next.
#[derive(Default)]
struct WaitingLabels {
    /// By thread: the time of the sample. A sample that was lost leaves them behind, until the thread's next ones.
    by_thread: HashMap<u32, (u64, Arc<TaskLabels>)>,
    /// Equal labels take memory once.
    shared: HashSet<Arc<TaskLabels>>,
}

impl WaitingLabels {
    fn put(&mut self, tid: u32, ktime_ns: u64, labels: Arc<TaskLabels>) {
        if self.by_thread.len() >= MAX_WAITING {
            self.by_thread.clear();
        }
        let labels = self.share(labels);
        self.by_thread.insert(tid, (ktime_ns, labels));
    }

    /// Returns the same labels as those of an earlier sample, if that had equal ones.
    fn share(&mut self, labels: Arc<TaskLabels>) -> Arc<TaskLabels> {
        if self.shared.len() >= MAX_WAITING {
            self.shared.clear();
        }
        let same = self.shared.get(&labels).map(Arc::clone);
        same.unwrap_or_else(|| {
            self.shared.insert(Arc::clone(&labels));
            labels
        })
    }

    /// Moves the waiting labels into their sample. Those of another time are of a sample that was lost.
    fn take(&mut self, sample: &mut Sample) {
        if self.by_thread.is_empty() {
            return;
        }
        if let Some((ktime_ns, labels)) = self.by_thread.remove(&sample.tid)
            && ktime_ns == sample.subject.ktime_ns
        {
            sample.labels = Some(labels);
        }
    }
}

impl Queue {
    /// Adds the span in the record of a sample to the sample's labels.
    fn add_span(&mut self, bytes: &[u8], sample: &mut Sample) {
        let Some(span) = SpanRecord::of(bytes) else { return };
        let subject = &sample.subject;
        let tgid = subject.key.tgid;
        let known = self.span_keys.get(&tgid).filter(|(key, _)| *key == ImageKey::of(subject));
        let none = SpanKeys::default();
        let keys = known.map_or(&none, |(_, keys)| keys);
        let (labels, is_unknown) = span_labels(span.head, span.attributes, keys);
        if is_unknown && known.is_some() {
            self.unknown_keys.insert(tgid);
        }
        // A task may have labels and a span.
        let labels = match &sample.labels {
            Some(first) => first.with(&labels),
            None => labels,
        };
        sample.labels = Some(self.labels.share(Arc::new(labels)));
    }

    /// Takes one record. Returns [`STOP`] if it is the last one of this read.
    fn take(&mut self, bytes: &[u8]) -> i32 {
        let number = SampleNumber::of(bytes);
        if let Some(SampleNumber { cpu, sequence, rules }) = number {
            self.arrived.sample(cpu, sequence, rules);
        }
        match Event::decode(bytes) {
            Ok(Event::Labels { subject, tid, labels }) => self.labels.put(tid, subject.ktime_ns, labels),
            Ok(Event::Sample(mut sample)) => {
                self.labels.take(&mut sample);
                self.add_span(bytes, &mut sample);
                self.events.push(Event::Sample(sample));
            }
            Ok(event) => self.events.push(event),
            Err(error) => {
                self.undecodable += 1;
                // A sample of which not even the head is there stays unaccounted.
                self.arrived.count_undecodable(number.map_or(0, |number| number.rules));
                if self.undecodable.is_power_of_two() {
                    tracing::warn!(
                        so_far = self.undecodable,
                        "cannot decode an event: {error}; agent and BPF programs differ: install the agent again"
                    );
                }
            }
        }
        self.left_bytes = self.left_bytes.saturating_sub(bytes.len());
        if self.left_bytes == 0 { STOP } else { 0 }
    }
}

impl EventRing {
    /// Opens the reader of a ring buffer of this size.
    pub(super) fn open(events: &dyn MapCore, bytes: u32) -> Result<Self, KernelError> {
        let queue = Rc::new(RefCell::new(Queue::default()));
        let writer = Rc::clone(&queue);
        let mut builder = RingBufferBuilder::new();
        builder.add(events, move |record| writer.borrow_mut().take(record)).map_err(KernelError::Ring)?;
        Ok(Self {
            ring: builder.build().map_err(KernelError::Ring)?,
            queue,
            arrived: Arrived::default(),
            bytes: bytes as usize,
        })
    }

    /// Reads the pending events in the kernel's order. Does not block, and takes no more than the ring buffer can hold: where
    /// this process gets too little CPU time, the programs would otherwise write faster than it reads, for ever.
    pub(super) fn read(&mut self) -> Result<Vec<Event>, KernelError> {
        self.queue.borrow_mut().left_bytes = self.bytes;
        let result = self.ring.consume_raw();
        if result < 0 && result != STOP {
            return Err(KernelError::Ring(libbpf_rs::Error::from_raw_os_error(-result)));
        }
        let mut queue = self.queue.borrow_mut();
        self.arrived.clone_from(&queue.arrived);
        Ok(mem::take(&mut queue.events))
    }

    /// Adds the span in the record of a sample to the sample's labels.
    pub(super) fn add_span(&self, record: &[u8], sample: &mut Sample) {
        self.queue.borrow_mut().add_span(record, sample);
    }

    /// Sets the names of the attributes of an image's spans.
    pub(super) fn set_span_keys(&self, key: ImageKey, keys: Arc<SpanKeys>) {
        self.queue.borrow_mut().span_keys.insert(key.process.tgid, (key, keys));
    }

    /// Forgets those of a process.
    pub(super) fn remove_span_keys(&self, tgid: u32) {
        let mut queue = self.queue.borrow_mut();
        queue.span_keys.remove(&tgid);
        queue.unknown_keys.remove(&tgid);
    }

    /// Takes the thread groups with attributes without a name since the last call.
    pub(super) fn take_unknown_keys(&self) -> HashSet<u32> {
        mem::take(&mut self.queue.borrow_mut().unknown_keys)
    }

    /// Returns the bytes of records that wait to be read.
    pub(super) fn waiting_bytes(&self) -> u64 {
        // SAFETY: the ring buffer lives as long as `self` and has one ring, which nothing changes but its own thread, this one.
        // Asking for a ring that is not there returns null, which is not dereferenced.
        unsafe {
            let ring = libbpf_sys::ring_buffer__ring(self.ring.as_libbpf_object().as_ptr(), 0);
            if ring.is_null() { 0 } else { libbpf_sys::ring__avail_data_size(ring) as u64 }
        }
    }

    /// Returns the number of records that were no event. Anything but 0 means that agent and BPF programs differ.
    pub(super) fn undecodable(&self) -> u64 {
        self.queue.borrow().undecodable
    }

    /// Returns how far the samples of each CPU were read.
    pub(super) fn arrived(&self) -> &Arrived {
        &self.arrived
    }

    /// Returns a descriptor that is readable when the programs ask for a read before the reader's own time.
    pub(super) fn wake_fd(&self) -> BorrowedFd<'_> {
        let fd: RawFd = self.ring.epoll_fd();
        // SAFETY: the ring buffer owns the descriptor and lives as long as the borrow.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }
}

#[cfg(test)]
mod tests {
    use gannet_bpf::types;

    use super::*;
    use crate::model::RECORD_HEAD_BYTES;

    #[test]
    fn labels_go_to_the_sample_of_their_time() {
        let mut waiting = WaitingLabels::default();
        let labels = |value: &str| {
            let text = |text| (str::as_bytes(text), false);
            Arc::new(TaskLabels::new([(text("name"), text(value))].into_iter()))
        };
        let sample = |tid: u32, ktime: u64| {
            let mut bytes = sample(0);
            let at = std::mem::offset_of!(types::event, tid);
            bytes[at..at + 4].copy_from_slice(&tid.to_ne_bytes());
            let at = std::mem::offset_of!(types::event, ktime);
            bytes[at..at + 8].copy_from_slice(&ktime.to_ne_bytes());
            match Event::decode(&bytes) {
                Ok(Event::Sample(sample)) => sample,
                other => panic!("{other:?}"),
            }
        };
        let take = |waiting: &mut WaitingLabels, tid, ktime| {
            let mut sample = sample(tid, ktime);
            waiting.take(&mut sample);
            sample.labels.map(|labels| labels.iter().next().unwrap().1.to_owned())
        };
        waiting.put(1, 10, labels("a"));
        waiting.put(2, 11, labels("b"));
        assert_eq!(take(&mut waiting, 2, 11).as_deref(), Some("b"));
        assert_eq!(take(&mut waiting, 3, 10), None, "another thread");
        assert_eq!(take(&mut waiting, 1, 12), None, "that sample was lost");
        assert_eq!(take(&mut waiting, 1, 10), None, "and its labels with it");
        // Samples that never come take no memory.
        for tid in 0..10 * MAX_WAITING as u32 {
            waiting.put(tid, 1, labels(&tid.to_string()));
        }
        assert!(waiting.by_thread.len() <= MAX_WAITING && waiting.shared.len() <= MAX_WAITING);
    }

    #[test]
    fn a_read_ends_when_it_has_taken_a_complete_ring() {
        let mut queue = Queue { left_bytes: 100, ..Queue::default() };
        assert_eq!(
            (queue.take(&[0xff; 60]), queue.take(&[0xff; 60]), queue.take(&[0xff; 60])),
            (0, STOP, STOP)
        );
        assert_eq!(queue.undecodable, 3);
    }
    /// Returns the record of a sample for two rules, which CPU 1 sent behind `sequence` others.
    fn sample(sequence: u64) -> Vec<u8> {
        let mut sample = types::sample { cpu: 1, sequence, kernel_frames: 1, ..types::sample::default() };
        sample.event.kind = 1;
        sample.event.rules = 0b101;
        // SAFETY: a plain structure; its padding is within the zeroed default.
        let head = unsafe {
            std::slice::from_raw_parts(std::ptr::from_ref(&sample).cast::<u8>(), size_of::<types::sample>())
        };
        [head, &[0; 8]].concat()
    }

    /// Returns the record of a sample with this one of its thread's span, or of the first bytes of it.
    fn sample_in_span(span: &[u8]) -> Vec<u8> {
        let mut bytes = sample(0);
        bytes[std::mem::offset_of!(types::sample, context_words)] = span.len().div_ceil(8) as u8;
        bytes.extend_from_slice(span);
        bytes.resize(bytes.len().next_multiple_of(8), 0xff);
        bytes
    }

    #[test]
    fn the_span_of_a_sample_adds_to_its_labels() {
        let mut span = [7_u8; RECORD_HEAD_BYTES + 4];
        span[RECORD_HEAD_BYTES - 2..].copy_from_slice(&[4, 0, 0, 2, b'/', b'x']);
        let labels_of = |span: &[u8]| {
            let mut queue = Queue { left_bytes: 1 << 20, ..Queue::default() };
            let bytes = sample_in_span(span);
            let Ok(Event::Sample(first)) = Event::decode(&bytes) else { unreachable!() };
            let key = ImageKey::of(&first.subject);
            queue.span_keys.insert(0, (key, Arc::new(SpanKeys::of(["route"].into_iter()))));
            let text = |text| (str::as_bytes(text), false);
            let own = TaskLabels::new([(text("shop"), text("1"))].into_iter());
            queue.labels.put(first.tid, first.subject.ktime_ns, Arc::new(own));
            queue.take(&bytes);
            let Some(Event::Sample(sample)) = queue.events.pop() else { unreachable!() };
            assert_eq!((sample.kernel, sample.user), (vec![0], Vec::new()));
            let labels = sample.labels.unwrap();
            labels.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
        };
        let sevens = "07".repeat(8);
        let ids = format!("span_id={sevens} trace_id={sevens}{sevens}");
        assert_eq!(labels_of(&span), format!("route=/x shop=1 {ids}"));
        // A record of fewer bytes than it says, or than a head has, is no span.
        let mut long = span;
        long[RECORD_HEAD_BYTES - 2] = 5;
        assert_eq!(labels_of(&long), "shop=1");
        assert_eq!(labels_of(&span[..24]), "shop=1");
        assert_eq!(labels_of(&[]), "shop=1");
    }

    /// Checks one lost record: in the ring, in the decoder with its head, and in the decoder without.
    #[test]
    fn each_sample_has_its_number_even_if_it_cannot_be_decoded() {
        let mut queue = Queue { left_bytes: 1 << 20, ..Queue::default() };
        queue.take(&sample(0));
        assert_eq!((queue.arrived.of_cpu(1), queue.arrived.undecodable()), (2, 0));
        // The record behind the second sample: the jump shows that two are missing.
        queue.take(&sample(4));
        assert_eq!((queue.arrived.of_cpu(1), queue.events.len()), (6, 2));
        // Its frame is missing: it is lost for a reason.
        let third = sample(6);
        queue.take(&third[..third.len() - 8]);
        assert_eq!((queue.arrived.of_cpu(1), queue.arrived.undecodable(), queue.events.len()), (8, 2, 2));
        // Not even its head is there: the number does not move, until the next sample shows the jump.
        queue.take(&sample(8)[..40]);
        assert_eq!((queue.arrived.of_cpu(1), queue.arrived.undecodable(), queue.undecodable), (8, 2, 2));
    }
}
